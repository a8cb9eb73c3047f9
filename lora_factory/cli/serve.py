"""``lora-factory try`` and ``serve``: answers of the base model with generated adapters."""

from __future__ import annotations

import argparse

from lora_factory.arguments import ServeArguments
from lora_factory.cli.options import Commands, add_options, add_required, command, read_options
from lora_factory.cli.output import console
from lora_factory.errors import LoraFactoryError

_TWO_COLUMNS = 100  # characters of the terminal from which answers stand side by side


def add_try(commands: Commands) -> None:
    """Add ``try``."""
    trial = command(commands, "try", _try, "answer a prompt with the base model and with a generated adapter")
    add_required(trial, "--generator", "folder or Hub id of a generator")
    add_required(trial, "--prompt", "question to both, or the beginning of a text that both continue")
    trial.add_argument("--text", help="description of the task, in a sentence (default: none)")
    trial.add_argument(
        "--examples", help="file of examples of the task, as for generate; with or without --text (default: none)"
    )
    trial.add_argument(
        "--base-model", help="Hub id or folder of the base model (default: the one that the generator names)"
    )
    trial.add_argument("--max-new-tokens", type=int, default=100, help="tokens of an answer at most (default: 100)")
    trial.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="put the prompt into the tokenizer's chat template (default: if it has one)",
    )
    trial.add_argument(
        "--rank", type=int, help="rank of the adapter, if it is to be lower than the generator's (default: the same)"
    )
    trial.add_argument("--revision", help="branch, tag or commit of a generator on the Hub (default: main)")
    trial.add_argument("--seed", type=int, default=0, help="seed of the adapter's latent noise (default: 0)")
    trial.add_argument(
        "--temperature", type=float, default=0.0, help="scale of the adapter's latent noise; 0: none (default: 0.0)"
    )


def add_serve(commands: Commands) -> None:
    """Add ``serve``."""
    serve = command(commands, "serve", _serve, "serve adapters and their answers over HTTP, in OpenAI's form")
    add_required(serve, "--generator", "folder or Hub id of a generator")
    serve.add_argument("--revision", help="branch, tag or commit of a generator on the Hub (default: main)")
    add_options(serve, ServeArguments)


def _try(options: argparse.Namespace) -> None:
    if options.text is None and options.examples is None:
        raise LoraFactoryError("nothing to make an adapter of; give --text, --examples or both")
    from lora_factory.generator.modeling import CVAELoRAGenerator
    from lora_factory.serving.trial import try_adapter
    from lora_factory.tasks.text import read_examples

    trial = try_adapter(
        CVAELoRAGenerator.from_pretrained(options.generator, revision=options.revision),
        options.prompt,
        options.text,
        examples=read_examples(options.examples) if options.examples else None,
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
