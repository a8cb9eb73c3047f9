"""The commands around zoos: ``lora-factory import`` and ``lora-factory zoo …``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from lora_factory.arguments import ImportArguments
from lora_factory.errors import LoraFactoryError

if TYPE_CHECKING:
    from rich.console import Console

Run = Callable[[argparse.Namespace], None]


class AddCommand(Protocol):
    """Adds a parser that runs a function."""

    def __call__(
        self, commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, run: Run, text: str
    ) -> argparse.ArgumentParser:
        """Add it to the commands."""


def add_import(parser: argparse.ArgumentParser) -> None:
    """Add what `lora-factory import` takes besides the fields of `ImportArguments`."""
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="PEFT folder, Hub id (user/name or user/name@revision), or text file with one of these a line, "
        "followed after tabs by task, description and run where wanted",
    )
    parser.add_argument("--output-dir", required=True, help="folder of the zoo, made when missing (required)")
    parser.add_argument("--task", help="name of the task of a single source (default: the folder's or repository's)")
    parser.add_argument(
        "--description",
        action="append",
        default=[],
        help="what a single source does; give it again for more (default: the first paragraph of its card)",
    )


def run_import(options: argparse.Namespace, arguments: ImportArguments) -> None:
    """Import, say what is in the zoo now and what was refused."""
    from lora_factory.zoo.importing import AdapterSource, import_adapters

    sources: list[str | AdapterSource] = list(options.source)
    if options.task or options.description:
        if len(sources) > 1:
            raise LoraFactoryError("--task and --description are for one source; list several in a text file")
        sources = [AdapterSource(options.source[0], options.task, tuple(options.description))]
    report = import_adapters(sources, options.output_dir, arguments)
    lines = [f"{source} -> {place}" for source, place in report.imported.items()]
    lines += [f"refused {source}: {reason}" for source, reason in report.refused.items()]
    _print(lines)
    if report.refused:
        total = len(report.refused) + len(report.imported)
        raise LoraFactoryError(f"{len(report.refused)} of {total} adapters were refused, the others are in the zoo")


def add_zoo(parser: argparse.ArgumentParser, command: AddCommand) -> None:
    """Add the sub-commands of `lora-factory zoo`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verify = command(commands, "verify", _verify, "read every file again and name those that are damaged")
    show = command(commands, "list", _list, "list tasks, runs and sizes")
    prune = command(commands, "prune", _prune, "remove runs, or the older snapshots of runs")
    prune.add_argument("--task", action="append", default=[], help="only this task; give it again for several")
    prune.add_argument(
        "--run", action="append", default=[], dest="runs", help="only runs of this name; give it again for several"
    )
    what = prune.add_mutually_exclusive_group()
    what.add_argument("--damaged", action="store_true", help="remove the damaged ones among them")
    what.add_argument(
        "--keep-last", type=int, default=0, metavar="K", help="remove their snapshots but for the last K"
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    push = command(commands, "push", _push, "push a zoo to the Hub as a data set repository")
    for one in (verify, show, prune, push):
        one.add_argument("--zoo", required=True, help="folder of the zoo (required)")
    merge = command(commands, "merge", _merge, "copy the runs of several zoos of one layout into one")
    merge.add_argument("zoo", nargs="+", metavar="ZOO", help="folder of a zoo")
    pull = command(commands, "pull", _pull, "download a zoo from the Hub")
    for one in (push, pull):
        one.add_argument("--repo-id", required=True, help="Hub id, user/name (required)")
        one.add_argument("--revision", help="branch to push to, or branch, tag or commit to pull (default: main)")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--tag", action="append", default=[], help="one more tag for the card")
    merge.set_defaults(continues=True)
    pull.set_defaults(continues=True)
    for one in (merge, pull):
        one.add_argument("--output-dir", required=True, help="folder of the zoo, made when missing (required)")


def _verify(options: argparse.Namespace) -> None:
    from lora_factory.zoo.store import AdapterZoo

    zoo = AdapterZoo(options.zoo)
    problems = zoo.verify()
    _print(problems)
    if problems:
        raise LoraFactoryError(f"{len(problems)} problems in {zoo.folder}; see `lora-factory zoo prune --damaged`")
    _print([f"{sum(len(zoo.runs(task)) for task in zoo.tasks)} runs of {len(zoo.tasks)} tasks are whole"])


def _list(options: argparse.Namespace) -> None:
    from rich.table import Table

    from lora_factory.zoo.store import AdapterZoo

    zoo = AdapterZoo(options.zoo)
    table = Table(title=f"{zoo.folder}: {zoo.layout.size:,} weights on {zoo.layout.base_model}")
    for column in ("task", "run", "snapshots", "steps", "loss", "MB", "licence"):
        table.add_column(column, justify="left" if column in ("task", "run", "licence") else "right", overflow="fold")
    for task in zoo.tasks:
        for run in zoo.runs(task):
            record = zoo.record(task, run)
            size = sum((zoo.folder / task / run / name).stat().st_size for name in record.sha256) / 1e6
            loss = f"{record.validation_losses[-1]:.3f}" if record.validation_losses else ""
            counts = str(len(record.snapshot_steps)), str(record.steps)
            table.add_row(task, run, *counts, loss, f"{size:.1f}", record.license or "")
    _console().print(table)


def _prune(options: argparse.Namespace) -> None:
    from lora_factory.zoo.store import AdapterZoo
    from lora_factory.zoo.tools import prune

    done = prune(
        AdapterZoo(options.zoo),
        tasks=options.task,
        runs=options.runs,
        damaged=options.damaged,
        keep_last=options.keep_last,
        dry_run=options.dry_run,
    )
    _print(done or ["nothing to remove"])
    if options.dry_run:
        _print(["nothing was changed: this is what would be done without --dry-run"])


def _merge(options: argparse.Namespace) -> None:
    from lora_factory.zoo.store import AdapterZoo
    from lora_factory.zoo.tools import merge

    zoo = merge([AdapterZoo(folder) for folder in options.zoo], options.output_dir)
    _print([f"{zoo.folder} has {sum(len(zoo.runs(task)) for task in zoo.tasks)} runs of {len(zoo.tasks)} tasks"])


def _push(options: argparse.Namespace) -> None:
    from lora_factory.zoo.store import AdapterZoo

    zoo = AdapterZoo(options.zoo)
    commit = zoo.push_to_hub(options.repo_id, tags=options.tag, private=options.private, revision=options.revision)
    _print([f"pushed {commit.commit_url}"])


def _pull(options: argparse.Namespace) -> None:
    from lora_factory.zoo.store import AdapterZoo
    from lora_factory.zoo.tools import merge

    zoo = merge([AdapterZoo.from_hub(options.repo_id, revision=options.revision)], options.output_dir)
    _print([f"{zoo.folder} has {sum(len(zoo.runs(task)) for task in zoo.tasks)} runs of {len(zoo.tasks)} tasks"])


def _print(lines: list[str]) -> None:
    if lines:
        _console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console()
