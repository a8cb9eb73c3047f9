"""``--config FILE.yaml``: a command's options from a file; flags on the command line win over it.

Keys are the options' names with underscores. Their values become the defaults of the command's parser, so that
required options may stand in the file too.
"""

from __future__ import annotations

import argparse
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_factory.arguments import converted, expectation
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.printable import meant

_NO_OPTIONS = ("help", "config")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the flag to a command."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of options by name with underscores, required ones too, such as output_dir: folder; "
        "flags win over the file (default: no file)",
    )


def apply_config(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Make the values of a configuration file the defaults of a command, if its words name such a file.

    The parsed options then have a set ``config_options``: the names of those that the file decides.

    Args:
        parser: The command's own parser.
        words: The words after the command's name.

    Raises:
        LoraFactoryError: When the file cannot be read or is no mapping, has an unknown key, one key twice, two options
            that exclude each other, or a value of the wrong type.
    """
    path = _path(parser, words)
    if path is None:
        return
    actions = {action.dest: action for action in parser._actions if action.dest not in _NO_OPTIONS}
    values = _read(path, actions, parser.prog)
    flags = {word.partition("=")[0] for word in words}
    given = {name for name, action in actions.items() if flags.intersection(action.option_strings)}
    for group in parser._mutually_exclusive_groups:
        members = {action.dest for action in group._group_actions}
        named = sorted(members.intersection(values))
        if len(named) > 1:
            raise LoraFactoryError(f"{path} has {' and '.join(named)}, which exclude each other; leave one out")
        if named and not members & given:
            group.required = False
        elif members & given:
            given |= members
    for name in values.keys() - given:
        action = actions[name]
        action.default, action.required = values[name], False
        if not action.option_strings:
            action.nargs = "*"  # words on the command line still win
    parser.set_defaults(config_options=frozenset(values.keys() - given))


def _path(parser: argparse.ArgumentParser, words: Sequence[str]) -> str | None:
    """The file that the flag names; None when the command has no such flag, or its own parser is to complain."""
    if {"-h", "--help"}.intersection(words) or not any(action.dest == "config" for action in parser._actions):
        return None
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag.add_argument("--config")
    try:
        return flag.parse_known_args(words)[0].config
    except argparse.ArgumentError:
        return None


def _read(path: str, actions: Mapping[str, argparse.Action], command: str) -> dict[str, Any]:
    from lora_factory.utils.yaml_files import read_values

    content = read_values(path, "configuration file")
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise LoraFactoryError(
            f"{path} holds {reprlib.repr(content)}; a configuration file holds options of `{command}` by name, for "
            "example `output_dir: folder`"
        )
    for key in content:
        if key not in actions:
            near = meant(str(key).replace("-", "_").lower(), actions)
            raise LoraFactoryError(
                f"{path} has the unknown key {reprlib.repr(key)}{near}; `{command} --help` shows all options"
            )
    return {key: _value(path, actions[key], value) for key, value in content.items()}


def _value(path: str, action: argparse.Action, value: Any) -> Any:  # noqa: ANN401
    """A value of the file as the flag would leave it."""
    if isinstance(action.default, list) or action.nargs == "+" or isinstance(action, argparse._AppendAction):
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            return texts
        expected = expectation(tuple[str, ...])
    elif action.type is None and action.nargs != 0:
        if isinstance(value, str):
            return value
        expected = expectation(str)
    else:
        kind = bool if action.nargs == 0 else getattr(action.type, "kind", action.type)
        try:
            return converted(action.dest, kind, value)
        except LoraFactoryError:
            expected = expectation(kind)
    raise LoraFactoryError(f"{path}: {action.dest}: {reprlib.repr(value)} {expected}")
