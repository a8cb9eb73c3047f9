"""Flags of the command line: one for every field of a stage's data class, in the groups of the fields."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

from lora_factory.arguments import (
    GROUPS,
    CollectArguments,
    CompareArguments,
    DemoArguments,
    ImportArguments,
    ServeArguments,
    TrainArguments,
    converted,
)
from lora_factory.cli.config import add_config
from lora_factory.cli.parser import CommandParser

if TYPE_CHECKING:
    from lora_factory.tasks.examples import Example

Options = TypeVar(
    "Options", CollectArguments, CompareArguments, DemoArguments, ImportArguments, ServeArguments, TrainArguments
)
Commands: TypeAlias = "argparse._SubParsersAction[CommandParser]"
METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


class Once(argparse.Action):
    """Keep a flag's value, and refuse a second one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401
        option_string: str | None = None,
    ) -> None:
        """Set the value."""
        if getattr(namespace, self.dest) is not None:
            several = "; --texts names a file of several" if "--texts" in parser._option_string_actions else ""
            parser.error(f"{option_string} is given twice{several}")
        setattr(namespace, self.dest, values)


def command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
) -> argparse.ArgumentParser:
    """Add a sub-command that runs a function."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    parser.add_argument("--quiet", action="store_true", help="print results and errors only, no progress")
    parser.set_defaults(run=run, continues=False)
    return parser


def add_required(parser: argparse.ArgumentParser, flag: str, text: str) -> None:
    """Add a flag that must be given."""
    parser.add_argument(flag, required=True, help=f"{text} (required)")


def add_generator(parser: argparse.ArgumentParser, absent: str = "") -> None:
    """Add ``--generator`` and ``--revision``.

    Args:
        parser: The command's.
        absent: What happens without ``--generator``; by default it must be given.
    """
    text = "folder or Hub id of a generator"
    if absent:
        parser.add_argument("--generator", help=f"{text} (default: {absent})")
    else:
        add_required(parser, "--generator", text)
    parser.add_argument("--revision", help="branch, tag or commit of a generator on the Hub (default: main)")


def add_sampling(parser: argparse.ArgumentParser, condition: str = "") -> None:
    """Add ``--seed`` and ``--temperature``; a condition stands before what they do."""
    parser.add_argument("--seed", type=int, default=0, help=f"{condition}seed of the latent noise (default: 0)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help=f"{condition}scale of the latent noise; 0: none; 1: adapters spread as the snapshots of a task "
        "(default: 0.0)",
    )


def add_base_model(parser: argparse.ArgumentParser, named: str = "generator", condition: str = "") -> None:
    """Add ``--base-model``; ``named`` names the default, and ``condition`` says when the option is of use."""
    words = f"{condition}Hub id or folder of the base model (default: the one that the {named} names)"
    parser.add_argument("--base-model", help=words)


def add_rank(parser: argparse.ArgumentParser) -> None:
    """Add ``--rank``."""
    parser.add_argument(
        "--rank", type=int, help="rank of the adapter, if it is to be lower than the generator's (default: the same)"
    )


def given_examples(options: argparse.Namespace) -> list[Example] | None:
    """The examples in the file that ``--examples`` names; None where it names none."""
    if not options.examples:
        return None
    from lora_factory.tasks.text import read_examples

    return read_examples(options.examples)


def add_options(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    """Add one flag per field, in the fields' groups, and ``--config``.

    Examples: ``--learning-rate 0.002``, ``--seeds 0,1``, ``--packing`` or ``--no-packing``.
    """
    add_config(parser)
    types = get_type_hints(options)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for field in sorted(dataclasses.fields(options), key=lambda field: GROUPS.index(field.metadata["group"])):
        if (name := field.metadata["group"]) not in groups:
            groups[name] = parser.add_argument_group(f"{name} options")
        group = groups[name]
        flag, kind = f"--{field.name.replace('_', '-')}", types[field.name]
        default: Any = field.default
        text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            shown = flag if default else flag.replace("--", "--no-", 1)
            text = f"{text} (default: {shown})"
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
            continue
        many = get_origin(kind) is tuple
        shown = ",".join(map(str, default)) if many else str(default)
        text = f"{text} (default: {shown})" if shown else text
        parse = _parser(flag, kind)
        group.add_argument(flag, type=parse, default=default, help=text, metavar=METAVARS.get(kind, "LIST"))


def read_options(namespace: argparse.Namespace, options: type[Options]) -> Options:
    """The data class of a command, from its parsed flags."""
    return options(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(options)})


def in_flags(message: str, options: argparse.Namespace) -> str:
    """An error of a Python function in the words of the command line.

    Python's ``overwrite=True``, ``steps=0``, ``tasks=`` and ``output_dir`` become ``--overwrite``, ``--steps 0``,
    ``--tasks`` and ``--output-dir``, where the command has such a flag. ``held_out= (--held-out-tasks)``, which names
    both, becomes the flag. Options that a configuration file decides are named as there: ``steps: 0 in train.yaml``.
    What stands in a path or in quotes stays.

    Args:
        message: What the error says.
        options: The command's parsed flags.
    """
    internal = ("run", "continues", "config_options", "quiet", "words")
    in_file = frozenset(getattr(options, "config_options", ()))
    names = sorted((name for name in vars(options) if name not in internal), key=len, reverse=True)
    before, flag = r"(?<![\w.(/'\"=-])", "|".join(map(re.escape, names))

    def assigned(match: re.Match[str]) -> str:
        name, value = match["name"].replace("_", "-"), match["value"]
        if match["name"] in in_file:
            return f"{match['name']}{': ' + value if value else ''} in {options.config}"
        if value.startswith("("):  # a tuple is a list with commas
            value = ",".join(part.strip() for part in value[1:-1].split(",") if part.strip())
        return f"--no-{name}" if value == "False" else f"--{name}{'' if value in ('True', '') else ' ' + value}"

    if not names:
        return message
    message = re.sub(rf"{before}\w+=\S* \((--[^()]+)\)", r"\1", message)
    value = r"\([^)]*\)|'[^']*'|\"[^\"]*\"|[^\s,;:=)]+|(?=[\s,;:)]|$)"
    message = re.sub(rf"{before}(?P<name>{flag})=(?P<value>{value})", assigned, message)
    words = "|".join(re.escape(name) for name in names if "_" in name and name not in in_file)
    if words:
        message = re.sub(rf"{before}(?:{words})(?![\w=(/'\".)-])", lambda m: "--" + m[0].replace("_", "-"), message)
    return message


def _parser(flag: str, kind: Any) -> Callable[[str], object]:  # noqa: ANN401
    """A function that turns a flag's text into a value, as the data class itself would; ``kind`` is its type."""

    def parse(text: str) -> object:
        return converted(flag, kind, text)

    many = get_origin(kind) is tuple
    parse.__name__ = f"comma-separated {get_args(kind)[0].__name__}" if many else kind.__name__
    parse.kind = kind  # type: ignore[attr-defined]  # read where the value comes from a file
    return parse
