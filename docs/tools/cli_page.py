"""Write docs/cli.md, the reference of the command line, from the parser itself: python docs/tools/cli_page.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_factory.cli.commands import build_parser

PAGE = Path(__file__).parents[1] / "cli.md"
HEAD = """\
# Command line

Every command answers `--help`. A command prints results on standard output and errors on standard error. It ends with
0 when all went well, 1 when some runs of a collection failed, 2 after a wrong input, and 130 after Ctrl-C. Options
that take several values want commas between them. This page is made from the parser:
`python docs/tools/cli_page.py` writes it.
"""


def page() -> str:
    """Render the whole page as Markdown."""
    parts = [HEAD]
    for name, parser, text in _commands(build_parser()):
        parts.append(f"## {name}\n\n{_sentence(text)}\n")
        subcommands = list(_commands(parser))
        if not subcommands:
            parts += _options(parser, name)
        for child, sub_parser, sub_text in subcommands:
            parts.append(f"### {name} {child}\n\n{_sentence(sub_text)}\n")
            parts += _options(sub_parser, f"{name} {child}")
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """The sub-commands of a parser, in its order: name, parser and help."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, child in action.choices.items():
                yield name, child, texts[name]


def _options(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """A line that shows the call, a table of options for each group of them, and the sentence below these."""
    shown = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    required = [action for action in shown if action.required or not action.option_strings]
    yield f"```bash\nlora-factory {' '.join([name, *map(_call, required), '[OPTIONS]'])}\n```\n"
    for group in parser._action_groups:
        rows = [action for action in group._group_actions if action in shown]
        if rows:
            yield _table(group.title or "options", rows)
    if parser.epilog:
        yield f"{_cell(parser.epilog)}\n"


def _call(action: argparse.Action) -> str:
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.option_strings:
        return f"{action.option_strings[-1]} {name}"
    return f"{name}..." if action.nargs == "+" else name


def _table(title: str, actions: Iterable[argparse.Action]) -> str:
    heading = {"options": "command options", "positional arguments": "arguments"}.get(title, title)
    lines = [f"| {heading} | |", "| --- | --- |"]
    lines += [f"| {_name(action)} | {_cell(_text(action))} |" for action in actions]
    return "\n".join(lines) + "\n"


def _name(action: argparse.Action) -> str:
    """An option as it is written, with the kind of its value."""
    if not action.option_strings:
        return f"`{_call(action)}`"
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    takes = "" if action.nargs == 0 else f" {value} ..." if action.nargs == "+" else f" {value}"
    return ", ".join(f"`{flag}{takes}`" for flag in action.option_strings)


def _text(action: argparse.Action) -> str:
    """The help of an option, which writes its default out; some versions of argparse add theirs to switches."""
    return (action.help or "").removesuffix(" (default: %(default)s)").replace("%%", "%")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{_cell(text[1:])}."


def _cell(text: str) -> str:
    """Text that Markdown shows as it is: what could be markup is quoted or escaped."""
    text = re.sub(r"(?<![\w-])--[a-z][\w-]*", lambda match: f"`{match[0]}`", text)
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
