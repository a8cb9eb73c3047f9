"""The card of an adapter that somebody else wrote: its description and licence, in linear time and bounded memory."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import yaml

from lora_factory.hub.cards import CARD_FILE
from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, checked_file

_CARD_BYTES = 64 << 10  # of a card are read; what an adapter does stands at its beginning
_HEAD_DEPTH = 16
_LONGEST_DESCRIPTION = 300  # characters
_NO_PROSE = re.compile(r"\s*([#|>*+!<\[-]|\d{1,9}[.)])|\s*={3,}\s*$")  # headings, lists, tables, quotes, HTML
_ZERO_WIDTH = dict.fromkeys((0x200B, 0xFEFF))
_LETTERS_OF_PROSE = 6  # of a script without capitals, such as Chinese or Thai, which puts no blanks between words
_FINE_TUNED = ("this model is a fine-tuned version of ", "this model was trained with ")
# What trainers write by themselves into every card: the sentences that hold one of these say nothing of the task.
_GENERATED = (
    # the Hub's template and PEFT's
    *("more information needed", "this modelcard aims to be", "it has been generated using [this raw template]"),
    *("this is the model card of a", "this model card has been automatically generated", "use the code below to get"),
    *("users (both direct and downstream) should be", "carbon emissions can be estimated using"),
    *("section for the model card authors", "the following `bitsandbytes` quantization config was used"),
    # transformers' Trainer, and LLaMA-Factory and axolotl, which use it
    *(
        "it achieves the following results on the",
        "the following hyperparameters were used during",
        "axolotl version:",
    ),
    "this model was trained from scratch on",
    # TRL, Unsloth, AutoTrain, diffusers, MLX
    *("has been trained using [trl]", "a method introduced in [", "cite trl as", "trained 2x faster with"),
    *(
        "was trained using autotrain",
        "please visit [autotrain]",
        "lora adaption weights for",
        "was converted to mlx format",
        "converted to gguf format using [unsloth]",
        "the weights were trained using [dreambooth]",
        "lora for the text encoder was enabled",
        "special vae used for training",
        "weights for this model are available in",
    ),
)


def read_card(folder: Path) -> str:
    """The first 64 kB of a folder's model card; empty where there is none."""
    if not (folder / CARD_FILE).exists():
        return ""
    with checked_file(folder, CARD_FILE, MAX_CONFIG_BYTES).open("rb") as file:
        return file.read(_CARD_BYTES).decode("utf-8-sig", errors="replace")


def card_description(text: str) -> str | None:
    """The first paragraph of prose in a model card, as plain text of at most 300 characters; None without one.

    What training programs write into every card is none.
    """
    paragraph: list[str] = []
    for line in [*_prose_lines(_parts(text[:_CARD_BYTES])[1]), ""]:
        if line.strip():
            if not _NO_PROSE.match(line):
                paragraph.append(line)
            continue
        words = _own_words(" ".join(paragraph).translate(_ZERO_WIDTH).split())
        paragraph = []
        letters = sum(unicodedata.category(character) == "Lo" for character in words[:_LONGEST_DESCRIPTION])
        if (words.count(" ") > 1 or letters >= _LETTERS_OF_PROSE) and words.isprintable():
            return words[:_LONGEST_DESCRIPTION]
    return None


def card_license(text: str) -> str | None:
    """The licence that the head of a model card names; None if the head is no plain YAML."""
    head = _parts(text[:_CARD_BYTES])[0]
    depth = 0
    try:
        for event in yaml.parse(head, Loader=yaml.BaseLoader):  # no deeper: the parser's time grows with the square
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _HEAD_DEPTH or isinstance(event, yaml.AliasEvent):
                return None
        values = yaml.load(head, Loader=yaml.BaseLoader)  # texts, lists and mappings alone
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    license = values.get("license") if isinstance(values, dict) else None
    return license if isinstance(license, str) and license else None


def _parts(card: str) -> tuple[str, str]:
    """The YAML head of a card, between two lines of three dashes, and the rest."""
    lines = card.removeprefix("\ufeff").splitlines()
    marks = [number for number, line in enumerate(lines) if line.rstrip() == "---"][:2]
    if len(marks) < 2 or marks[0] != 0:
        return "", "\n".join(lines)
    return "\n".join(lines[1 : marks[1]]), "\n".join(lines[marks[1] + 1 :])


def _prose_lines(body: str) -> list[str]:
    """The lines outside of comments and blocks of code."""
    kept, position = [], 0
    while (start := body.find("<!--", position)) >= 0:
        kept.append(body[position:start])
        end = body.find("-->", start)
        position = len(body) if end < 0 else end + 3
    kept.append(body[position:])
    lines, fence = [], ""
    for line in "".join(kept).splitlines():
        mark = line.lstrip()[:3]
        if fence or mark in ("```", "~~~"):
            fence = mark if not fence else "" if mark == fence else fence
        else:
            lines.append(line)
    return lines


def _own_words(words: list[str]) -> str:
    """A paragraph without the sentences that a training program wrote."""
    sentences: list[list[str]] = [[]]
    inside = 0  # brackets: the title of a link may hold a colon or a full stop
    for word in words:
        sentences[-1].append(word)
        inside = max(0, inside + word.count("[") - word.count("]"))
        if not inside and word.endswith((".", ":", "!", "?", "。")):
            sentences.append([])
    return " ".join(text for text in map(" ".join, sentences) if text and not _is_generated(text))


def _is_generated(sentence: str) -> bool:
    low = sentence.lower()
    for opening in _FINE_TUNED:  # "... of NAME", "... of NAME on the NAME dataset", and no purpose
        name, _, rest = low.removeprefix(opening).partition(" ")
        if low.startswith(opening) and (not rest or (rest.startswith("on ") and "dataset" in rest.split()[-1])):
            return bool(name)
    return any(phrase in low for phrase in _GENERATED)
