"""The commands around task files: ``lora-factory init`` and ``lora-factory check``."""

from __future__ import annotations

import argparse

from lora_factory.arguments import CollectArguments
from lora_factory.cli.options import Commands, add_options, add_required, command, read_options
from lora_factory.cli.output import say, say_next


def add_init(commands: Commands) -> None:
    """Add ``lora-factory init``."""
    init = command(commands, "init", _init, "write a commented tasks.yaml to start from, and small data for it")
    init.add_argument("--output-dir", default=".", help="folder of tasks.yaml and data (default: this folder)")


def add_check(commands: Commands) -> None:
    """Add ``lora-factory check``."""
    check = command(
        commands, "check", _check, "read all data of a collection, and measure the time, memory and disk it needs"
    )
    add_required(check, "--tasks", "YAML or JSON task file, or a folder of them")
    add_required(check, "--base-model", "Hub id or folder of the base model")
    # Flags and configuration files of collect are taken as they are.
    check.add_argument("--output-dir", help="as for collect; nothing is written (default: none)")
    check.add_argument("--base-model-name", help="as for collect; nothing depends on it (default: none)")
    add_options(check, CollectArguments)


def _init(options: argparse.Namespace) -> None:
    from lora_factory.demo.starter import write_starter

    path = write_starter(options.output_dir)
    say(f"wrote {path}; its tasks are examples, put yours in their place")
    say_next(options, "check", "--tasks", str(path), "--base-model", "HuggingFaceTB/SmolLM2-135M-Instruct")


def _check(options: argparse.Namespace) -> None:
    arguments = read_options(options, CollectArguments)
    from lora_factory.tasks.task_file import load_tasks

    tasks = load_tasks(options.tasks)
    from lora_factory.collection.check import check_collection

    size = check_collection(tasks, options.base_model, arguments)
    for name, task in size.tasks.items():
        rows = ", ".join(f"{count:,} {split}" for split, count in task.examples.items())
        train = f"{task.sequences:,} training sequences, {task.tokens:,} tokens, {task.steps:,} steps per run"
        say(f"{name}: {rows}; {train}", wrap=True)
    say(
        f"{size.runs} runs of {size.weights:,} weights: about {_time(size.seconds)} by one process here, "
        f"{size.memory / 1e9:.1f} GB of memory, {size.disk / 1e6:,.1f} MB of disk",
        wrap=True,
    )
    say_next(options, "collect", *options.words, *(() if options.output_dir else ("--output-dir", "zoo")))


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"
