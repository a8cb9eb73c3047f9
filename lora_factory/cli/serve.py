"""``lora-factory try``, ``serve`` and ``app``: answers of the base model with generated adapters."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading

from lora_factory.arguments import APP_PORT, ServeArguments
from lora_factory.cli.options import (
    Commands,
    Once,
    add_base_model,
    add_generator,
    add_options,
    add_rank,
    add_required,
    add_sampling,
    command,
    given_examples,
    read_options,
)
from lora_factory.cli.output import say
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.terminal import console

_TWO_COLUMNS = 100  # characters of the terminal from which answers stand side by side


def add_try(commands: Commands) -> None:
    """Add ``try``."""
    trial = command(commands, "try", _try, "answer a prompt with the base model and with a generated adapter")
    add_generator(trial)
    add_required(trial, "--prompt", "question to both, or the beginning of a text that both continue")
    trial.add_argument("--text", action=Once, help="description of the task, in a sentence (default: none)")
    trial.add_argument(
        "--examples", help="file of examples of the task, as for generate; with or without --text (default: none)"
    )
    add_base_model(trial)
    trial.add_argument("--max-new-tokens", type=int, default=100, help="tokens of an answer at most (default: 100)")
    trial.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="put the prompt into the tokenizer's chat template (default: if it has one)",
    )
    add_rank(trial)
    add_sampling(trial)


def add_serve(commands: Commands) -> None:
    """Add ``serve``."""
    serve = command(commands, "serve", _serve, "serve adapters and their answers over HTTP, in OpenAI's form")
    add_generator(serve)
    add_options(serve, ServeArguments)


def add_app(commands: Commands) -> None:
    """Add ``app``."""
    app = command(commands, "app", _app, "open a page in the browser that writes adapters and compares their answers")
    add_generator(app, "the page says how to get one")
    add_base_model(app)
    app.add_argument("--port", type=int, default=APP_PORT, help=f"TCP port on this machine (default: {APP_PORT})")


def _try(options: argparse.Namespace) -> None:
    if options.text is None and options.examples is None:
        raise LoraFactoryError("nothing to make an adapter of; give --text, --examples or both")
    from lora_factory.generator.modeling import CVAELoRAGenerator
    from lora_factory.serving.trial import try_adapter

    trial = try_adapter(
        CVAELoRAGenerator.from_pretrained(options.generator, revision=options.revision),
        options.prompt,
        options.text,
        examples=given_examples(options),
        base_model=options.base_model,
        max_new_tokens=options.max_new_tokens,
        chat_template=options.chat_template,
        seed=options.seed,
        temperature=options.temperature,
        rank=options.rank,
    )
    print_side_by_side({"base model": trial.base, "with the adapter": trial.adapted})


def print_side_by_side(answers: dict[str, str]) -> None:
    """Print answers in columns, or one below the other where the terminal is narrow.

    Args:
        answers: The answers by their heading.
    """
    from rich.table import Table
    from rich.text import Text

    from lora_factory.utils.printable import printable_lines

    screen, shown = console(), {name: Text(printable_lines(answer)) for name, answer in answers.items()}
    if screen.width >= _TWO_COLUMNS:
        table = Table(expand=True)
        for name in shown:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*shown.values())
        screen.print(table)
        return
    for name, answer in shown.items():
        screen.rule(name, align="left")
        screen.print(answer, overflow="fold")


def _serve(options: argparse.Namespace) -> None:
    arguments = read_options(options, ServeArguments)
    from lora_factory.serving.launch import serve

    serve(options.generator, arguments, revision=options.revision)


def _app(options: argparse.Namespace) -> None:
    from lora_factory.serving.app import open_app

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends as with Ctrl-C: temporary files are removed
    with (
        contextlib.suppress(KeyboardInterrupt),
        open_app(
            options.generator, base_model=options.base_model, revision=options.revision, port=options.port
        ) as address,
    ):
        say(f"the app is at {address} and ends with Ctrl-C")
        threading.Event().wait()
