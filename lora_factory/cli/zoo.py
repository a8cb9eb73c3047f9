"""The commands around zoos: ``lora-factory import`` and ``lora-factory zoo …``."""

from __future__ import annotations

import argparse

from lora_factory.arguments import ImportArguments
from lora_factory.cli.options import Commands, add_options, add_required, command, read_options
from lora_factory.cli.output import say, say_next
from lora_factory.cli.publish import add_push_flags, publish
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.terminal import console


def add_import(commands: Commands) -> None:
    """Add ``lora-factory import``."""
    parser = command(commands, "import", _import, "take PEFT adapters from folders and the Hub into a zoo")
    parser.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help="PEFT folder; Hub id (user/name or user/name@revision); or text file with one of these per line, which "
        "task, description and run may follow after tabs",
    )
    add_required(parser, "--output-dir", "folder of the zoo, made if it is missing")
    parser.add_argument("--task", help="task name of a single source (default: the name of its folder or repository)")
    parser.add_argument(
        "--description",
        action="append",
        default=[],
        help="description of the task of a single source; give it again for several (default: the first paragraph of "
        "its card)",
    )
    add_options(parser, ImportArguments)


def add_zoo(commands: Commands) -> None:
    """Add the sub-commands of ``lora-factory zoo``."""
    parser = commands.add_parser("zoo", help="verify, list, prune, merge, push or pull zoos")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    verify = command(commands, "verify", _verify, "read every file again and name those that are damaged")
    show = command(commands, "list", _list, "list tasks, runs and sizes")
    prune = command(commands, "prune", _prune, "remove runs, or the older snapshots of runs")
    push = command(commands, "push", _push, "push a zoo to the Hub as a data set repository")
    for one in (verify, show, prune, push):
        add_required(one, "--zoo", "folder of the zoo")
    prune.add_argument(
        "--task", action="append", default=[], help="only this task; give it again for several (default: all tasks)"
    )
    prune.add_argument(
        "--run",
        action="append",
        default=[],
        dest="runs",
        help="only runs of this name; give it again for several (default: all runs)",
    )
    what = prune.add_mutually_exclusive_group()
    what.add_argument("--damaged", action="store_true", help="remove only damaged runs")
    what.add_argument(
        "--keep-last",
        type=int,
        metavar="K",
        help="keep the runs with their last K snapshots, and remove their older ones (default: remove whole runs)",
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    add_push_flags(push)
    merge = command(commands, "merge", _merge, "copy the runs of several zoos of one layout into one")
    merge.add_argument("zoo", nargs="+", metavar="ZOO", help="folder of a zoo")
    pull = command(commands, "pull", _pull, "download a zoo from the Hub")
    add_required(pull, "--repo-id", "Hub id, user/name")
    pull.add_argument("--revision", help="branch, tag or commit to pull (default: main)")
    for one in (merge, pull):
        add_required(one, "--output-dir", "folder of the zoo, made if it is missing")
        one.set_defaults(continues=True)


def _import(options: argparse.Namespace) -> None:
    """Import, say what is in the zoo now and what was refused."""
    arguments = read_options(options, ImportArguments)
    from lora_factory.zoo.importing import SEVERAL, AdapterSource, import_adapters

    sources: list[str | AdapterSource] = list(options.source)
    if options.task or options.description:
        if len(sources) > 1:
            raise LoraFactoryError(f"--task and --description are for one source; {SEVERAL}")
        sources = [AdapterSource(options.source[0], options.task, tuple(options.description))]
    report = import_adapters(sources, options.output_dir, arguments)
    say(*(f"{source} -> {place}" for source, place in report.imported.items()))
    say(*(f"refused {source}: {reason}" for source, reason in report.refused.items()))
    if report.refused:
        total = len(report.refused) + len(report.imported)
        raise LoraFactoryError(f"{len(report.refused)} of {total} adapters were refused, the others are in the zoo")
    say_next(options, "train", "--zoo", options.output_dir, "--output-dir", "generator")


def _verify(options: argparse.Namespace) -> None:
    from lora_factory.zoo.store import AdapterZoo

    zoo = AdapterZoo(options.zoo)
    problems = zoo.verify()
    say(*problems)
    if problems:
        raise LoraFactoryError(f"{len(problems)} problems in {zoo.folder}; see `lora-factory zoo prune --damaged`")
    say(f"{sum(len(zoo.runs(task)) for task in zoo.tasks)} runs of {len(zoo.tasks)} tasks are whole")


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
    console().print(table)


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
    say(*(done or ["nothing to remove"]))
    if options.dry_run:
        say("nothing was changed: this is what would be done without --dry-run")


def _merge(options: argparse.Namespace) -> None:
    from lora_factory.zoo.store import AdapterZoo
    from lora_factory.zoo.tools import merge

    zoo = merge([AdapterZoo(folder) for folder in options.zoo], options.output_dir)
    say(f"{zoo.folder} has {sum(len(zoo.runs(task)) for task in zoo.tasks)} runs of {len(zoo.tasks)} tasks")


def _push(options: argparse.Namespace) -> None:
    from lora_factory.zoo.hub import zoo_writer
    from lora_factory.zoo.store import AdapterZoo

    publish(zoo_writer(AdapterZoo(options.zoo), tags=options.tag), options, "Push zoo", "dataset")


def _pull(options: argparse.Namespace) -> None:
    from lora_factory.zoo.store import AdapterZoo
    from lora_factory.zoo.tools import merge

    zoo = merge([AdapterZoo.from_hub(options.repo_id, revision=options.revision)], options.output_dir)
    say(f"{zoo.folder} has {sum(len(zoo.runs(task)) for task in zoo.tasks)} runs of {len(zoo.tasks)} tasks")
