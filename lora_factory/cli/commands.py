"""The command line: one sub-command per stage, each a thin skin over one public function and its class of options.

Everything heavy is imported inside the command that needs it, so that ``lora-factory --help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lora_factory._lazy import no_collection
from lora_factory._version import __version__
from lora_factory.arguments import (
    DECIDED_BY_ZOO,
    CollectArguments,
    CompareArguments,
    DemoArguments,
    TrainArguments,
)
from lora_factory.cli.config import apply_config
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
    in_flags,
    read_options,
)
from lora_factory.cli.output import plain_warnings, say, say_next
from lora_factory.cli.parser import CommandParser
from lora_factory.cli.publish import add_push_flags, publish
from lora_factory.cli.serve import add_app, add_serve, add_try
from lora_factory.cli.tasks import add_check, add_init
from lora_factory.cli.zoo import add_import, add_zoo
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.terminal import console

if TYPE_CHECKING:
    from accelerate import PartialState

    from lora_factory.evaluation.perplexity import TextScore

# Options of `evaluate` that have no effect on the score of an adapter alone.
_COMPARE_ONLY = (
    *(one.name for one in fields(CompareArguments) if one.name not in ("max_tokens", "max_examples", "window")),
    *("unseen_tasks", "unseen_zoo"),
)


def _flags(names: Sequence[str]) -> str:
    """Options as they stand on the command line."""
    return ", ".join("--" + name.replace("_", "-") for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; default: those of the process.

    Returns:
        The exit code: 0 when all went well, 1 when a collection ended with failed runs, 2 after a wrong input (one
        line on stderr), 130 after Ctrl-C.
    """
    options = argparse.Namespace(run=None, continues=False)
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        if options.quiet:
            from lora_factory.utils.progress import hide_progress

            hide_progress()
        with plain_warnings():
            return options.run(options) or 0
    except LoraFactoryError as error:
        text, colon, example = in_flags(str(error), options).partition(":\n")  # an example is to be pasted as it is
        say(f"error: {' '.join(text.split())}{colon}{example}", stderr=True)
        return 2
    except KeyboardInterrupt as error:
        rest = "; the same command continues where it stopped" if _continues(options) else ""
        say(str(error) or f"interrupted{rest}", stderr=True)
        return 130


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command from its flags and, where they name one with ``--config``, from a YAML file.

    ``words`` among them are the words after the command's name.

    Raises:
        LoraFactoryError: When the file cannot be used; see `apply_config`.
    """
    parser, commands = _parsers()
    if words and words[0] in commands.choices:
        apply_config(commands.choices[words[0]], words[1:])
    options = parser.parse_args(words)
    options.words = tuple(words[1:])
    return options


def _continues(options: argparse.Namespace) -> bool:
    """Return whether a command that is started again continues."""
    if options.run is _train:  # training through the base alone keeps what is done
        return bool(options.base_steps or not options.zoo)
    return bool(options.continues or (options.run is _evaluate and options.generator and not options.text))


def build_parser() -> CommandParser:
    """Build the parser of all sub-commands, without importing any library that a command needs."""
    return _parsers()[0]


def _parsers() -> tuple[CommandParser, Commands]:
    """The parser of all sub-commands, and theirs by name."""
    parser = CommandParser(
        prog="lora-factory", description="Generate LoRA adapters from a description.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    add_init(commands)
    add_check(commands)
    _add_collect(commands)
    add_import(commands)
    add_zoo(commands)
    _add_train(commands)
    _add_generate(commands)
    _add_explain(commands)
    add_try(commands)
    _add_evaluate(commands)
    add_serve(commands)
    _add_export(commands)
    add_app(commands)
    _add_push(commands)
    search = command(commands, "search", _search, "list the generators on the Hub for a base model")
    add_required(search, "--base-model", "Hub id of the base model")
    return parser, commands


def _add_demo(commands: Commands) -> None:
    demo = command(commands, "demo", _demo, "run the whole pipeline on an embedded real model and on local text")
    demo.set_defaults(continues=True)
    add_options(demo, DemoArguments)


def _add_collect(commands: Commands) -> None:
    collect = command(
        commands, "collect", _collect, "fine-tune one LoRA per task and seed and keep its last snapshots"
    )
    add_required(collect, "--tasks", "YAML or JSON task file, or a folder of them")
    add_required(collect, "--base-model", "Hub id or folder of the base model")
    add_required(collect, "--output-dir", "folder of the zoo; finished runs in it are kept")
    collect.add_argument("--base-model-name", help="Hub id that adapters name as their base (default: --base-model)")
    collect.set_defaults(continues=True)
    add_options(collect, CollectArguments)


def _add_train(commands: Commands) -> None:
    train = command(commands, "train", _train, "train a generator on a zoo, on the tasks' examples, or on both")
    train.add_argument(
        "--zoo",
        help="folder of the zoo, as collect or import wrote it (default: train on the examples of --tasks alone)",
    )
    add_required(train, "--output-dir", "folder of the generator")
    train.add_argument(
        "--tasks",
        help="YAML or JSON task file; of the zoo's tasks, if there is one: the generator learns to read examples or "
        "images too (default: descriptions alone)",
    )
    train.add_argument(
        "--held-out-tasks",
        help="task file of more tasks, best ones with something that no other has, such as a language: the step of "
        "--base-steps whose weights do best on them is kept (default: the last one)",
    )
    train.add_argument(
        "--images",
        help="folder with one folder of images per task: the generator learns to read images too (default: none)",
    )
    train.add_argument(
        "--base-model",
        help="with --tasks: Hub id or folder of the base model (default: the one that the zoo names)",
    )
    train.add_argument(
        "--base-model-name",
        help="without --zoo: Hub id that adapters name as their base (default: --base-model)",
    )
    train.add_argument(
        "--overwrite", action="store_true", help="replace a generator in --output-dir (default: refuse to)"
    )
    add_options(train, TrainArguments)
    train.epilog = f"With --zoo, these are decided by the zoo and may not be given: {_flags(DECIDED_BY_ZOO)}."


def _add_generate(commands: Commands) -> None:
    generate = command(commands, "generate", _generate, "write an adapter from a description")
    add_generator(generate)
    generate.add_argument("--text", action=Once, help="description of the task, in a sentence (default: none)")
    generate.add_argument(
        "--texts",
        metavar="FILE",
        help="file of descriptions, one a line, or a .yaml or .json mapping of names to them: write an adapter for "
        "each into a folder in --output-dir (default: none)",
    )
    generate.add_argument(
        "--examples",
        help="file of examples of the task: text with a blank line between two examples, or .jsonl, .json, .csv, .tsv "
        "or .parquet with a column text, or prompt and completion; with or without --text (default: none)",
    )
    generate.add_argument(
        "--images", nargs="+", metavar="FILE", help="images of the task; with or without --text (default: none)"
    )
    generate.add_argument(
        "--refine-steps",
        type=int,
        default=0,
        help="with --examples: optimizer steps at most that refine the adapter on them, as far as that helps on those "
        "left out; minutes without a GPU (default: 0)",
    )
    add_base_model(generate, condition="with --examples: ")
    add_required(generate, "--output-dir", "folder of the adapter, a plain PEFT folder")
    generate.add_argument(
        "--overwrite", action="store_true", help="replace a generated adapter in --output-dir (default: refuse to)"
    )
    add_rank(generate)
    add_sampling(generate)


def _add_explain(commands: Commands) -> None:
    explain = command(commands, "explain", _explain, "say how far a description is from what a generator knows")
    add_generator(explain)
    explain.add_argument("--text", action=Once, required=True, help="description of a task, in a sentence (required)")


def _add_evaluate(commands: Commands) -> None:
    evaluate = command(commands, "evaluate", _evaluate, "score the base model and adapters on the tasks' test splits")
    add_required(evaluate, "--tasks", "YAML or JSON task file, or a folder of them")
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--adapter", action="append", metavar="FOLDER", help="PEFT folder to score; give it again for several"
    )
    what.add_argument(
        "--generator",
        help="folder of a generator, to compare with every baseline and control; with --text: folder or Hub id",
    )
    evaluate.add_argument(
        "--text",
        action="append",
        help="with --generator: score the adapter that it writes for this description, and no other method; give it "
        "again for several",
    )
    add_base_model(evaluate, "adapter or generator")
    evaluate.add_argument("--output", default="evaluation", help="folder of the results (default: evaluation)")
    evaluate.add_argument(
        "--zoo",
        help="with --generator and no --text: folder of the zoo that it was trained on, or where that was none, of a "
        "zoo with LoRAs of its tasks (required); with --adapter: of the zoo whose records say whether its runs "
        "learned in a chat template (default: none)",
    )
    evaluate.add_argument(
        "--unseen-tasks", help="with --generator: task file of tasks that are not in the zoo (default: none)"
    )
    evaluate.add_argument(
        "--unseen-zoo", help="with --unseen-tasks: folder of a zoo with LoRAs of these tasks (required)"
    )
    add_options(evaluate, CompareArguments)
    evaluate.epilog = (
        "These are for comparisons (--generator without --text), and may not be given with --adapter or --text: "
        f"{_flags(_COMPARE_ONLY)}."
    )


def _add_export(commands: Commands) -> None:
    export = command(commands, "export", _export, "write an adapter for llama.cpp and Ollama, or merged into its base")
    add_required(export, "--adapter", "folder of the adapter, as generate or PEFT wrote it")
    export.add_argument(
        "--format",
        choices=("gguf", "merged"),
        default="gguf",
        help="gguf: a file of the adapter alone, which llama.cpp and Ollama load beside the base model; merged: a "
        "folder of the base model with the adapter in its weights, and its tokenizer (default: gguf)",
    )
    export.add_argument(
        "--merged", action="store_const", const="merged", dest="format", help="the same as --format merged"
    )
    add_required(export, "--output", "the file or folder to make; nothing is replaced")
    add_base_model(export, "adapter")


def _add_push(commands: Commands) -> None:
    push = command(commands, "push", _push, "push a generator, or an adapter that it writes, to the Hub")
    add_required(push, "--generator", "folder or Hub id of a generator")
    push.add_argument(
        "--text",
        action=Once,
        help="push the adapter that the generator writes for this description (default: none)",
    )
    add_sampling(push, "with --text: ")
    push.add_argument(
        "--comparison", help="comparison.json that evaluate wrote, for the card of the generator (default: none)"
    )
    add_push_flags(push)


def _demo(options: argparse.Namespace) -> None:
    from lora_factory.demo.run import run_demo

    run_demo(read_options(options, DemoArguments))


def _collect(options: argparse.Namespace) -> int:
    arguments = read_options(options, CollectArguments)
    from lora_factory.tasks.task_file import load_tasks

    tasks, failed = load_tasks(options.tasks), {}
    from accelerate import PartialState

    from lora_factory.collection.collect import collect_adapters
    from lora_factory.collection.scheduler import CollectionError

    try:
        collect_adapters(
            tasks, options.base_model, options.output_dir, arguments=arguments, base_model_name=options.base_model_name
        )
    except CollectionError as error:
        failed = error.reasons
    processes = PartialState()
    if processes.is_main_process:
        _print_collected(options.output_dir, len(tasks) * len(arguments.seeds), failed)
        words = ("--zoo", options.output_dir, "--tasks", options.tasks, "--output-dir", "generator")
        if len(failed) < len(tasks) * len(arguments.seeds):
            say_next(options, "train", *words)
    _leave(processes)
    return 1 if failed else 0


def _leave(processes: PartialState) -> None:
    """End all processes of a launcher together, and their group before them.

    A launcher stops the main process when another ends with an error before it; and a process that ends within its
    group can be aborted by the threads of the group.
    """
    processes.wait_for_everyone()
    processes.destroy_process_group()


def _print_collected(folder: str, runs: int, failed: dict[str, str]) -> None:
    """Print how many runs of a collection are in the zoo, and why the others are not."""
    from rich.table import Table
    from rich.text import Text

    if failed:
        table = Table()
        for heading in ("failed run", "reason"):
            table.add_column(heading, overflow="fold")
        for name, reason in failed.items():
            table.add_row(Text(name), Text(reason))
        console().print(table)
    rest = f", {len(failed)} failed; mend the cause and run the same command again" if failed else ""
    say(f"{runs - len(failed)} of {runs} runs in {folder}{rest}")


def _train(options: argparse.Namespace) -> None:
    arguments = read_options(options, TrainArguments)
    from lora_factory.tasks.image_files import images_in
    from lora_factory.tasks.task_file import load_tasks
    from lora_factory.utils.paths import local_path
    from lora_factory.zoo.store import AdapterZoo

    zoo = AdapterZoo(options.zoo) if options.zoo else None
    tasks = load_tasks(options.tasks) if options.tasks else None
    names = zoo.tasks if zoo else [task.name for task in tasks or ()]
    images = {task: images_in(local_path(options.images) / task) for task in names} if options.images else None
    from lora_factory.training.train import train_generator

    generator = train_generator(
        zoo,
        options.output_dir,
        arguments=arguments,
        tasks=tasks,
        held_out=load_tasks(options.held_out_tasks) if options.held_out_tasks else (),
        images=images,
        base_model=options.base_model,
        base_model_name=options.base_model_name,
        overwrite=options.overwrite,
    )
    from accelerate import PartialState

    processes = PartialState()
    if processes.is_main_process:
        size = sum(file.stat().st_size for file in local_path(options.output_dir).iterdir()) / 1e6
        say(f"wrote {options.output_dir}, a generator of {size:.1f} MB for {len(generator.config.tasks or ())} tasks")
        if "text" in (generator.config.modalities or ()):
            text = generator.config.tasks[0]["descriptions"][0] if generator.config.tasks else "what it is for"
            words = ("--generator", options.output_dir, "--text", text, "--output-dir", "my-adapter")
            say_next(options, "generate", *words)
    _leave(processes)


def _generate(options: argparse.Namespace) -> None:
    with no_collection():
        from lora_factory.adapters.folder import GENERATION_FILE
        from lora_factory.generator.writer import AdapterWriter
        from lora_factory.utils.paths import local_path
        from lora_factory.utils.safe_files import read_json

    one = [options.text, options.examples, options.images]
    if options.texts:
        if any(value is not None for value in one):
            raise LoraFactoryError("--texts goes without --text, --examples and --images; leave these out")
        _generate_many(options)
        return
    for name, given in {"refine_steps": options.refine_steps > 0, "base_model": options.base_model}.items():
        if given and options.examples is None:
            raise LoraFactoryError(f"{name}= has no effect without --examples; give these, or leave it out")
    if all(value is None for value in one):
        raise LoraFactoryError("nothing to condition on; give --text, --examples, --images or several, or --texts")
    generator = AdapterWriter.open(options.generator, options.revision)
    folder = generator.save_adapter(
        options.text,
        options.output_dir,
        examples=given_examples(options),
        images=[local_path(image) for image in options.images] if options.images else None,
        base_model=options.base_model,
        overwrite=options.overwrite,
        seed=options.seed,
        temperature=options.temperature,
        refine_steps=options.refine_steps,
        rank=options.rank,
    )
    made = read_json(folder / GENERATION_FILE)
    lines = [f"wrote {options.output_dir}"]
    if made["nearest_tasks"]:
        nearest = ", ".join(f"{entry['task']} ({1 - entry['similarity']:.2f})" for entry in made["nearest_tasks"])
        lines.append(f"nearest tasks, by cosine distance: {nearest}")
    if made["zoo_distance"] is not None:
        lines.append(f"the known tasks are {made['zoo_distance']:.2f} from their nearest neighbour, in the median")
    if made["rank"] is not None:
        lines.append(f"rank {made['rank']} loses {100 * made['rank_error']:.2g} % of the squared norm of the update")
    say(*lines, wrap=True)
    say_next(options, "evaluate", "--adapter", options.output_dir, "--tasks", "tasks.yaml")


def _generate_many(options: argparse.Namespace) -> None:
    from lora_factory.generator.writer import AdapterWriter
    from lora_factory.tasks.given import read_named_texts
    from lora_factory.utils.printable import few

    folders = AdapterWriter.open(options.generator, options.revision).save_adapters(
        read_named_texts(options.texts),
        options.output_dir,
        overwrite=options.overwrite,
        seed=options.seed,
        temperature=options.temperature,
        rank=options.rank,
    )
    say(f"wrote {len(folders)} adapters to {options.output_dir}: {few([folder.name for folder in folders])}")


def _explain(options: argparse.Namespace) -> None:
    with no_collection():
        from lora_factory.generator.writer import AdapterWriter

    found = AdapterWriter.open(options.generator, options.revision).explain(options.text)
    nearest = ", ".join(f"{entry['task']} ({1 - entry['similarity']:.2f})" for entry in found["nearest"])
    lines = [found["sentence"], f"nearest tasks, by cosine distance: {nearest or 'none'}"]
    if found["farther_than"] is not None:
        share = f"{100 * found['farther_than']:.0f} %"
        lines.append(f"{share} of the known tasks are nearer than that to their own nearest neighbour")
    lines.append(f"it changes {found['use']:.2f} times as much as a known task's description does (median)")
    say(*lines, wrap=True)


def _evaluate(options: argparse.Namespace) -> None:
    arguments = read_options(options, CompareArguments)
    if options.text and not options.generator:
        raise LoraFactoryError("--text needs --generator, the generator that writes the adapter")
    if options.generator and not options.text:
        _compare(options, arguments)
        return
    form, refused = ("--text", (*_COMPARE_ONLY, "zoo")) if options.text else ("--adapter", _COMPARE_ONLY)
    for name in refused:
        if (value := getattr(options, name)) != getattr(CompareArguments, name, None):
            raise LoraFactoryError(
                f"{name}={value!r} has no effect with {form}, which scores adapters alone; leave it out"
            )
    _score(options, arguments)


def _compare(options: argparse.Namespace, arguments: CompareArguments) -> None:
    if not options.zoo:
        raise LoraFactoryError(
            "--generator needs --zoo, LoRAs of its tasks (the zoo that it was trained on, if any), or --text"
        )
    if options.unseen_zoo and not options.unseen_tasks:
        raise LoraFactoryError("unseen_zoo= has no effect without --unseen-tasks; give these, or leave it out")
    from lora_factory.evaluation.comparison import compare
    from lora_factory.evaluation.fold import Fold
    from lora_factory.generator.modeling import CVAELoRAGenerator
    from lora_factory.reporting.report import terminal_tables, write_report
    from lora_factory.tasks.images import language_tasks
    from lora_factory.tasks.task_file import load_tasks
    from lora_factory.training.train import training_history
    from lora_factory.utils.folders import COMPARISON_FILES, check_reports
    from lora_factory.zoo.store import AdapterZoo

    check_reports(options.output, *COMPARISON_FILES)
    zoo = AdapterZoo(options.zoo)
    known = set(zoo.tasks)
    fold = Fold(
        seen=tuple(task for task in language_tasks(load_tasks(options.tasks)) if task.name in known),
        unseen=tuple(language_tasks(load_tasks(options.unseen_tasks))) if options.unseen_tasks else (),
        zoo=zoo,
        originals=AdapterZoo(options.unseen_zoo) if options.unseen_zoo else None,
        generator=CVAELoRAGenerator.from_pretrained(options.generator),
        history=training_history(options.generator),
    )
    base_model = options.base_model or fold.zoo.layout.base_model
    comparison = compare(fold, base_model, options.output, arguments)
    for table in terminal_tables(comparison, console().width):
        console().print(table)
    say(f"wrote {write_report(comparison, options.output)}")


def _score(options: argparse.Namespace, arguments: CompareArguments) -> None:
    """Score adapters in folders, or those that a generator writes for texts."""
    from lora_factory.tasks.images import language_tasks
    from lora_factory.tasks.task_file import load_tasks
    from lora_factory.utils.files import write_json
    from lora_factory.utils.folders import check_reports
    from lora_factory.zoo.store import AdapterZoo

    tasks = language_tasks(load_tasks(options.tasks))
    results = check_reports(options.output, "evaluation.json") / "evaluation.json"
    zoo = AdapterZoo(options.zoo) if options.zoo else None
    from lora_factory.evaluation.perplexity import evaluate_adapters, evaluate_texts
    from lora_factory.generator.writer import AdapterWriter

    with console().status("scoring") as status:
        how: dict[str, Any] = {"max_tokens": arguments.max_tokens, "max_examples": arguments.max_examples}
        how |= {"window": arguments.window, "progress": status.update}
        if options.text:
            generator = AdapterWriter.open(options.generator)
            scores = evaluate_texts(generator, options.text, tasks, options.base_model, **how)
        else:
            scores = evaluate_adapters(options.adapter, tasks, options.base_model, zoo=zoo, **how)
    _print_scores(scores)
    write_json(
        results,
        {model: {task: score.to_dict() for task, score in row.items()} for model, row in scores.items()},
    )
    say(f"wrote {results}")


def _print_scores(scores: dict[str, dict[str, TextScore]]) -> None:
    """Print one row per model and one column per task: perplexity, bits per character, and accuracy if measured."""
    from lora_factory.reporting.report import rich_tables
    from lora_factory.reporting.tables import Column, Table
    from lora_factory.utils.printable import printable

    columns = ("model", *next(iter(scores.values())))
    rows = [(model, *map(_figures, row.values())) for model, row in scores.items()]
    table = Table("", "", tuple(Column(printable(name)) for name in columns), tuple(rows))
    for part in rich_tables(table, console().width):
        console().print(part)
    say("perplexity / bits per character on the test split; lower is better")
    if any(score.accuracy is not None for row in scores.values() for score in row.values()):
        say("where there is a third number, it is the share of right answers; higher is better")


def _figures(score: TextScore) -> str:
    """What is shown of a score."""
    accuracy = [] if score.accuracy is None else [f"{score.accuracy:.3f}"]
    return " / ".join([f"{score.perplexity:.2f}", f"{score.bits_per_character:.3f}", *accuracy])


def _export(options: argparse.Namespace) -> None:
    from lora_factory.serving.export import export_gguf, export_merged

    export = export_gguf if options.format == "gguf" else export_merged
    say(f"wrote {export(options.adapter, options.output, base_model=options.base_model)}")


def _push(options: argparse.Namespace) -> None:
    from lora_factory.generator.hub import adapter_writer, generator_writer
    from lora_factory.generator.modeling import CVAELoRAGenerator

    generator = CVAELoRAGenerator.from_pretrained(options.generator)
    if options.text is None:
        write = generator_writer(generator, comparison=options.comparison, tags=options.tag)
        publish(write, options, "Push generator")
    else:
        sampling = {"seed": options.seed, "temperature": options.temperature}
        write = adapter_writer(generator, options.text, **sampling, tags=options.tag)
        publish(write, options, "Push adapter")


def _search(options: argparse.Namespace) -> None:
    from lora_factory.hub.client import search_generators

    found = search_generators(options.base_model)
    width = max((len(generator.repo_id) for generator in found), default=0)
    lines = [
        f"{generator.repo_id:<{width}}  {generator.downloads:>7,} downloads  licence {generator.license}"
        for generator in found
    ]
    say(*(lines or [f"no generator for {options.base_model} on the Hub"]))
