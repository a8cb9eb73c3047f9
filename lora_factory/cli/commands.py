"""The command line: one sub-command a stage, each a thin skin over one public function and its data class of options.

Everything heavy is imported inside the command that needs it, so that ``lora-factory --help`` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_factory._version import __version__
from lora_factory.arguments import (
    REFINE_STEPS,
    CollectArguments,
    CompareArguments,
    DemoArguments,
    ImportArguments,
    TrainArguments,
)
from lora_factory.cli.options import add_options, add_required, command, in_flags, read_options
from lora_factory.cli.zoo import add_import, add_zoo, run_import
from lora_factory.errors import LoraFactoryError

if TYPE_CHECKING:
    from rich.console import Console

    from lora_factory.evaluation.perplexity import TextScore


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; default: those of the process.

    Returns:
        The exit code: 0 when all went well, 1 when a collection ended with failed runs, 2 after a wrong input (one
        line on stderr), 130 after Ctrl-C.
    """
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except LoraFactoryError as error:
        message = " ".join(in_flags(str(error), options).split())
        _console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt as error:
        rest = "; the same command continues where it stopped" if _continues(options) else ""
        words = str(error) or f"interrupted{rest}"
        _console(stderr=True).print(words, markup=False, highlight=False, soft_wrap=True)
        return 130


def _continues(options: argparse.Namespace) -> bool:
    """Whether what a command has done so far is kept for the next time."""
    if options.run is _train:  # stage 2 alone keeps what is done
        return bool(options.specialist_steps)
    return bool(options.continues or (options.run is _evaluate and options.generator))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all sub-commands, without importing any library that a command needs."""
    parser = argparse.ArgumentParser(
        prog="lora-factory", description="Generate LoRA adapters from a description.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = command(commands, "demo", _demo, "run the whole pipeline on an embedded real model and on local text")
    demo.set_defaults(continues=True)
    add_options(demo, DemoArguments)

    collect = command(commands, "collect", _collect, "fine-tune one LoRA a task and seed and keep its last snapshots")
    add_required(collect, "--tasks", "YAML or JSON task file, or a folder of them")
    add_required(collect, "--base-model", "Hub id or folder of the base model")
    add_required(collect, "--output-dir", "folder of the zoo; finished runs in it are kept")
    collect.add_argument("--base-model-name", help="Hub id that adapters name as their base (default: --base-model)")
    collect.set_defaults(continues=True)
    add_options(collect, CollectArguments)

    imported = command(commands, "import", _import, "take PEFT adapters from folders and the Hub into a zoo")
    add_import(imported)
    add_options(imported, ImportArguments)

    add_zoo(commands.add_parser("zoo", help="verify, list, prune, merge, push or pull zoos"), command)

    train = command(commands, "train", _train, "train a generator on a zoo")
    add_required(train, "--zoo", "folder that collect wrote")
    add_required(train, "--output-dir", "folder of the generator")
    train.add_argument(
        "--tasks", help="YAML or JSON task file of the zoo's tasks, to learn from their examples or images"
    )
    train.add_argument("--images", help="folder with a folder of images for every task, to be conditioned on images")
    train.add_argument("--base-model", help="Hub id or folder of the base model, for what needs it")
    train.add_argument("--overwrite", action="store_true", help="replace a generator that is there already")
    add_options(train, TrainArguments)

    generate = command(commands, "generate", _generate, "write an adapter from a description")
    add_required(generate, "--generator", "folder or Hub id of a generator")
    generate.add_argument("--text", help="what the adapter is to do, in a sentence")
    generate.add_argument(
        "--examples",
        help="examples of the task: a text file with a blank line between them, or .jsonl, .json, .csv, .tsv or"
        " .parquet with a column text, or prompt and completion; beside --text or alone",
    )
    generate.add_argument("--images", nargs="+", metavar="FILE", help="images of the task: beside --text or alone")
    generate.add_argument(
        "--refine-steps",
        type=int,
        default=REFINE_STEPS,
        help=f"with --examples: steps on them at most, 0 for none (default: {REFINE_STEPS})",
    )
    generate.add_argument("--base-model", help="with --examples: the base model (default: the generator's)")
    add_required(generate, "--output-dir", "folder of the adapter, a plain PEFT folder")
    generate.add_argument("--overwrite", action="store_true", help="replace a generated adapter that is there already")
    generate.add_argument("--revision", help="branch, tag or commit of a generator on the Hub")
    generate.add_argument("--seed", type=int, default=0, help="seed of the latent noise (default: 0)")
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="spread of the latent noise; 0 is deterministic (default: 0.0)"
    )

    evaluate = command(commands, "evaluate", _evaluate, "score the base model and adapters on the tasks' test splits")
    add_required(evaluate, "--tasks", "YAML or JSON task file, or a folder of them")
    what = evaluate.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter", action="append", metavar="FOLDER", help="PEFT folder; give it again for several")
    what.add_argument("--generator", help="folder of a generator: compare it with every baseline and control")
    evaluate.add_argument("--base-model", help="Hub id or folder (default: the base that adapter or generator names)")
    evaluate.add_argument("--output", default="evaluation", help="folder of the results (default: evaluation)")
    evaluate.add_argument(
        "--zoo", help="zoo of the generator; with --adapter: the one that says if it learned in a chat template"
    )
    evaluate.add_argument("--unseen-tasks", help="with --generator: task file of tasks that are not in the zoo")
    evaluate.add_argument("--unseen-zoo", help="with --generator: zoo of the unseen tasks' own LoRAs")
    add_options(evaluate, CompareArguments)

    push = command(commands, "push", _push, "push a generator, an adapter that it writes, or a zoo to the Hub")
    what = push.add_mutually_exclusive_group(required=True)
    what.add_argument("--generator", help="folder or Hub id of a generator")
    what.add_argument("--zoo", help="folder of a zoo, which becomes a data set repository")
    add_required(push, "--repo-id", "Hub id to push to, user/name")
    push.add_argument("--text", help="with --generator: push the adapter that it writes for this description")
    push.add_argument("--seed", type=int, default=0, help="with --text: seed of the latent noise (default: 0)")
    push.add_argument(
        "--temperature", type=float, default=0.0, help="with --text: spread of the latent noise (default: 0.0)"
    )
    push.add_argument("--comparison", help="with --generator: comparison.json that evaluate wrote, for the card")
    push.add_argument(
        "--tag", action="append", default=[], help="one more tag for the card; give it again for several"
    )
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", help="branch to push to, made if it is not there (default: main)")
    push.add_argument("--commit-message", help="first line of the commit")
    push.add_argument("--create-pr", action="store_true", help="propose the commit as a pull request")
    push.add_argument("--dry-run", action="store_true", help="show the files and the card, and push nothing")

    search = command(commands, "search", _search, "list the generators on the Hub for a base model")
    add_required(search, "--base-model", "Hub id of the base model")
    return parser


def _demo(options: argparse.Namespace) -> None:
    from lora_factory.demo.run import run_demo

    run_demo(read_options(options, DemoArguments))


def _collect(options: argparse.Namespace) -> int:
    arguments = read_options(options, CollectArguments)
    from accelerate import PartialState

    from lora_factory.collection.collect import collect_adapters
    from lora_factory.collection.scheduler import CollectionError
    from lora_factory.tasks.task_file import load_tasks

    tasks, failed = load_tasks(options.tasks), {}
    try:
        collect_adapters(
            tasks, options.base_model, options.output_dir, arguments=arguments, base_model_name=options.base_model_name
        )
    except CollectionError as error:
        failed = error.reasons
    processes = PartialState()
    if processes.is_main_process:
        _print_collected(options.output_dir, len(tasks) * len(arguments.seeds), failed)
    processes.wait_for_everyone()  # a launcher stops the main process when another ends with an error before it
    processes.destroy_process_group()
    return 1 if failed else 0


def _print_collected(folder: str, runs: int, failed: dict[str, str]) -> None:
    """Print how many runs of a collection are in the zoo, and why the others are not."""
    from rich.table import Table
    from rich.text import Text

    console = _console()
    if failed:
        table = Table("failed run", "reason")
        for name, reason in failed.items():
            table.add_row(Text(name), Text(reason))
        console.print(table)
    rest = f", {len(failed)} failed; mend the cause and run the same command again" if failed else ""
    console.print(
        f"{runs - len(failed)} of {runs} runs in {folder}{rest}", markup=False, highlight=False, soft_wrap=True
    )


def _import(options: argparse.Namespace) -> None:
    run_import(options, read_options(options, ImportArguments))


def _train(options: argparse.Namespace) -> None:
    arguments = read_options(options, TrainArguments)
    from lora_factory.tasks.image_files import images_in
    from lora_factory.tasks.task_file import load_tasks
    from lora_factory.training.train import train_generator
    from lora_factory.utils.paths import local_path
    from lora_factory.zoo.store import AdapterZoo

    zoo, tasks = AdapterZoo(options.zoo), load_tasks(options.tasks) if options.tasks else None
    images = {task: images_in(local_path(options.images) / task) for task in zoo.tasks} if options.images else None
    train_generator(
        zoo,
        options.output_dir,
        arguments=arguments,
        tasks=tasks,
        images=images,
        base_model=options.base_model,
        overwrite=options.overwrite,
    )


def _generate(options: argparse.Namespace) -> None:
    from lora_factory.adapters.folder import GENERATION_FILE
    from lora_factory.generator.modeling import CVAELoRAGenerator
    from lora_factory.tasks.text import read_examples
    from lora_factory.utils.paths import local_path
    from lora_factory.utils.safe_files import read_json

    if options.text is None and options.examples is None and options.images is None:
        raise LoraFactoryError("nothing to condition on; give --text, --examples, --images or several of them")
    generator = CVAELoRAGenerator.from_pretrained(options.generator, revision=options.revision)
    generator.save_adapter(
        options.text,
        options.output_dir,
        examples=read_examples(options.examples) if options.examples else None,
        images=[local_path(image) for image in options.images] if options.images else None,
        base_model=options.base_model,
        overwrite=options.overwrite,
        seed=options.seed,
        temperature=options.temperature,
        refine_steps=options.refine_steps,
    )
    made = read_json(local_path(options.output_dir) / GENERATION_FILE)
    lines = [f"wrote {options.output_dir}"]
    if made["nearest_tasks"]:
        nearest = ", ".join(f"{entry['task']} ({1 - entry['similarity']:.2f})" for entry in made["nearest_tasks"])
        lines.append(f"nearest tasks, by cosine distance: {nearest}")
    if made["zoo_distance"] is not None:
        lines.append(f"the zoo's tasks are {made['zoo_distance']:.2f} from their nearest neighbour, in the median")
    for line in lines:
        _console().print(line, markup=False, highlight=False, soft_wrap=True)


def _evaluate(options: argparse.Namespace) -> None:
    if options.generator:
        _compare(options)
    else:
        _evaluate_adapters(options)


def _compare(options: argparse.Namespace) -> None:
    if not options.zoo:
        raise LoraFactoryError("--generator needs --zoo, the folder of the zoo that the generator was trained on")
    arguments = read_options(options, CompareArguments)
    from lora_factory.evaluation.comparison import compare
    from lora_factory.evaluation.fold import Fold
    from lora_factory.generator.modeling import CVAELoRAGenerator
    from lora_factory.reporting.report import terminal_tables, write_report
    from lora_factory.tasks.images import language_tasks
    from lora_factory.tasks.task_file import check_tasks, load_tasks
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
    check_tasks([*fold.seen, *fold.unseen])
    base_model = options.base_model or fold.zoo.layout.base_model
    comparison = compare(fold, base_model, options.output, arguments)
    console = _console()
    for table in terminal_tables(comparison):
        console.print(table)
    page = write_report(comparison, options.output)
    console.print(f"wrote {page}", markup=False, highlight=False, soft_wrap=True)


def _evaluate_adapters(options: argparse.Namespace) -> None:
    from lora_factory.evaluation.perplexity import evaluate_adapters
    from lora_factory.tasks.images import language_tasks
    from lora_factory.tasks.task_file import check_tasks, load_tasks
    from lora_factory.utils.files import write_json
    from lora_factory.utils.folders import check_reports
    from lora_factory.zoo.store import AdapterZoo

    tasks = language_tasks(load_tasks(options.tasks))
    check_tasks(tasks)
    console = _console()
    results = check_reports(options.output, "evaluation.json") / "evaluation.json"
    with console.status("scoring") as status:
        scores = evaluate_adapters(
            options.adapter,
            tasks,
            base_model=options.base_model,
            max_tokens=options.max_tokens,
            window=options.window,
            zoo=AdapterZoo(options.zoo) if options.zoo else None,
            progress=status.update,
        )
    write_json(
        results,
        {model: {task: score.to_dict() for task, score in row.items()} for model, row in scores.items()},
    )
    _print_scores(console, scores)
    console.print(f"wrote {results}", markup=False, highlight=False, soft_wrap=True)


def _print_scores(console: Console, scores: dict[str, dict[str, TextScore]]) -> None:
    """Print one row a model and one column a task: perplexity and bits per character."""
    from rich.table import Table

    table = Table()
    table.add_column("model", overflow="fold")
    for task in next(iter(scores.values())):
        table.add_column(task, justify="right", overflow="fold")
    for model, row in scores.items():
        table.add_row(model, *(f"{score.perplexity:.2f} / {score.bits_per_character:.3f}" for score in row.values()))
    console.print(table)
    console.print("perplexity / bits per character on the test split; lower is better", soft_wrap=True)


def _push(options: argparse.Namespace) -> None:
    from lora_factory.generator.hub import adapter_writer, generator_writer
    from lora_factory.generator.modeling import CVAELoRAGenerator
    from lora_factory.hub.client import preview, push
    from lora_factory.zoo.hub import zoo_writer
    from lora_factory.zoo.store import AdapterZoo

    if options.zoo:
        write = zoo_writer(AdapterZoo(options.zoo), tags=options.tag)
    elif options.text is None:
        generator = CVAELoRAGenerator.from_pretrained(options.generator)
        write = generator_writer(generator, comparison=options.comparison, tags=options.tag)
    else:
        write = adapter_writer(
            CVAELoRAGenerator.from_pretrained(options.generator),
            options.text,
            seed=options.seed,
            temperature=options.temperature,
            tags=options.tag,
        )
    console = _console()
    if options.dry_run:
        files, card = preview(write, options.repo_id)
        lines = [f"{size:>14,}  {name}" for name, size in files.items()]
        words = ["would push to " + options.repo_id, *lines, "", card.rstrip("\n")]
    else:
        commit = push(
            write,
            options.repo_id,
            default_message="Push zoo" if options.zoo else "Push adapter" if options.text else "Push generator",
            repo_type="dataset" if options.zoo else "model",
            private=options.private,
            revision=options.revision,
            commit_message=options.commit_message,
            create_pr=options.create_pr,
        )
        words = [f"pushed {commit.pr_url or commit.commit_url}"]
    console.print("\n".join(words), markup=False, highlight=False, soft_wrap=True)


def _search(options: argparse.Namespace) -> None:
    from lora_factory.hub.client import search_generators

    found = search_generators(options.base_model)
    width = max((len(generator.repo_id) for generator in found), default=0)
    lines = [
        f"{generator.repo_id:<{width}}  {generator.downloads:>7,} downloads  licence {generator.license}"
        for generator in found
    ]
    text = "\n".join(lines) or f"no generator for {options.base_model} on the Hub"
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)
