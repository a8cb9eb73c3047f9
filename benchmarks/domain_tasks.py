"""The thirteen text domains of the shared folder as tasks, and the folds that leave three or four of them out."""

import os
from pathlib import Path

from lora_factory.tasks.task import Task
from lora_factory.tasks.text import SPLITS

CHARACTERS = 2000  # about as much of a domain as one example holds; examples end with a line

DESCRIPTIONS = {
    "arxiv_latex": (
        "Write a mathematics paper in LaTeX, with definitions, theorems and proofs.",
        "LaTeX source of a scientific article from arXiv.",
        "Formal mathematical prose with equations between dollar signs.",
        "Continue a research text on type theory and logic typeset in TeX.",
    ),
    "bible": (
        "Continue a passage of the King James Bible.",
        "Scripture in early modern English, verse by verse.",
        "Holy text of the Old and New Testament with chapter and verse numbers.",
        "And the LORD spake: biblical narrative, psalms and prophets.",
    ),
    "books": (
        "Continue a chapter of a novel.",
        "Narrative prose of a published book with dialogue between its characters.",
        "Literary fiction: scenes, descriptions and conversation.",
        "A story from a long book, told in the past tense.",
    ),
    "debian_reference": (
        "Explain how to administer a Debian system.",
        "A handbook of the Debian operating system with commands and configuration files.",
        "Linux system administration guide: packages, network, kernel and shell.",
        "Reference manual for users of the Debian distribution.",
    ),
    "email": (
        "Write an e-mail to a mailing list.",
        "E-mail messages with headers, quoted replies and signatures.",
        "Correspondence by e-mail: From, To, Subject and the body of the message.",
        "Personal and technical mail as it arrives in an inbox.",
    ),
    "fortunes": (
        "Tell a witty saying or a short joke.",
        "Fortune cookies: quotations, aphorisms and jokes with their authors.",
        "Humorous one-liners and epigrams.",
        "Short funny quotes separated by percent signs.",
    ),
    "gutenberg": (
        "Continue a public-domain novel of the nineteenth century.",
        "Classic literature from Project Gutenberg.",
        "Victorian fiction in long, old-fashioned sentences.",
        "Prose of an old English book that is out of copyright.",
    ),
    "jargon": (
        "Define a word of hacker slang.",
        "A dictionary of programmers' jargon with etymology and usage.",
        "Entries of the Jargon File: computer folklore and its vocabulary.",
        "Glossary of terms that hackers use, each with its definition.",
    ),
    "manpages": (
        "Write a Unix manual page.",
        "Man page source in roff with NAME, SYNOPSIS, DESCRIPTION and OPTIONS.",
        "Documentation of a command-line tool: its flags and arguments.",
        "Troff markup of a Linux manual.",
    ),
    "movie_reviews": (
        "Review a film.",
        "Opinions of critics on movies: plot, actors, director and a verdict.",
        "A movie review from a newspaper or the internet.",
        "What is good and what is bad about a film in the cinema.",
    ),
    "python_code": (
        "Write Python source code.",
        "Functions, classes and docstrings of the Python standard library.",
        "Python program text with indentation, imports and comments.",
        "Code of a Python module.",
    ),
    "ubuntu_irc": (
        "Chat about Linux problems in the Ubuntu IRC channel.",
        "IRC log of a support channel with nicknames and short messages.",
        "Online chat between Ubuntu users who help each other.",
        "Informal conversation lines of a chat room about computers.",
    ),
    "wikipedia": (
        "Write a Wikipedia article.",
        "Encyclopaedic text about people, places and events.",
        "Neutral, factual prose of an encyclopedia with section headings.",
        "Article from Wikipedia with dates, names and facts.",
    ),
}
NEW_WORDS = {
    "arxiv_latex": "A manuscript on homotopy theory as its authors typed it, markup and all.",
    "bible": "Ancient religious writings about Moses, David and Jesus in archaic English.",
    "books": "A piece of fiction where people talk, travel and feel.",
    "debian_reference": "Instructions for installing and configuring software on a Linux distribution.",
    "email": "Messages people send each other on discussion lists, including replies.",
    "fortunes": "Amusing maxims by famous people.",
    "gutenberg": "An old novel by someone like Austen, Melville or Dickens.",
    "jargon": "What computer enthusiasts mean by their peculiar expressions.",
    "manpages": "Help text for shell commands in nroff format.",
    "movie_reviews": "Critiques of pictures seen at the theatre, praising or panning them.",
    "python_code": "def, return, self: software in a scripting language.",
    "ubuntu_irc": "Live messages exchanged by people asking for technical support.",
    "wikipedia": "Reference articles on history, geography, sport and music.",
}


def shared_folder() -> Path:
    """The folder of the shared data, from ``LORA_FACTORY_SHARED``."""
    folder = Path(os.environ.get("LORA_FACTORY_SHARED", "../shared"))
    if not (folder / "data" / "domains").is_dir():
        raise SystemExit(f"{folder} has no data/domains; set LORA_FACTORY_SHARED to the folder of the shared data")
    return folder


def domain_tasks() -> list[Task]:
    """All domains in alphabetical order."""
    folder = shared_folder() / "data" / "domains"
    return [
        Task.from_examples(
            name,
            descriptions,
            *(_examples((folder / name / f"{split}.txt").read_text(encoding="utf-8")) for split in SPLITS),
        )
        for name, descriptions in DESCRIPTIONS.items()
    ]


def folds(tasks: list[Task], number: int = 4) -> list[tuple[tuple[Task, ...], tuple[Task, ...]]]:
    """Seen and unseen tasks of every fold: each task is unseen in one of them."""
    return [
        (
            tuple(task for index, task in enumerate(tasks) if index % number != fold),
            tuple(task for index, task in enumerate(tasks) if index % number == fold),
        )
        for fold in range(number)
    ]


def _examples(text: str) -> list[str]:
    examples, lines, length = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= CHARACTERS:
            examples.append("".join(lines))
            lines, length = [], 0
    return [*examples, "".join(lines)] if "".join(lines).strip() else examples
