"""The command line: quick, torch-free, readable, and with one line for what went wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.generators import make_generator
from helpers.models import TRAINING_TEXT, attach
from helpers.zoos import record_of, snapshots_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from lora_factory import AdapterZoo, CVAELoRAGenerator, LoraFactoryError, __version__
from lora_factory.adapters.folder import load_adapter
from lora_factory.arguments import CollectArguments, DemoArguments, ImportArguments, TrainArguments
from lora_factory.cli import commands as cli
from lora_factory.cli import options as cli_options
from lora_factory.models.image_encoders import ImageEncoder
from lora_factory.models.loading import load_base_model
from lora_factory.models.text_encoders import TextEncoder
from lora_factory.tasks.image_files import images_in
from lora_factory.tasks.image_sources import read_coco
from lora_factory.tasks.images import ImageTask
from lora_factory.tasks.task_file import load_tasks

COMMANDS = (
    "demo",
    "init",
    "check",
    "collect",
    "import",
    "zoo",
    "train",
    "generate",
    "explain",
    "try",
    "evaluate",
    "serve",
    "export",
    "app",
    "push",
    "search",
)
OVERVIEW = """\
usage: lora-factory [-h] [--version] COMMAND ...

Generate LoRA adapters from a description.

options:
  -h, --help  show this help message and exit
  --version   show program's version number and exit

commands:
  COMMAND
    demo      run the whole pipeline on an embedded real model and on local text
    init      write a commented tasks.yaml to start from, and small data for it
    check     read all data of a collection, and measure the time, memory and disk it needs
    collect   fine-tune one LoRA per task and seed and keep its last snapshots
    import    take PEFT adapters from folders and the Hub into a zoo
    zoo       verify, list, prune, merge, push or pull zoos
    train     train a generator on a zoo, on the tasks' examples, or on both
    generate  write an adapter from a description
    explain   say how far a description is from what a generator knows
    try       answer a prompt with the base model and with a generated adapter
    evaluate  score the base model and adapters on the tasks' test splits
    serve     serve adapters and their answers over HTTP, in OpenAI's form
    export    write an adapter for llama.cpp and Ollama, or merged into its base
    app       open a page in the browser that writes adapters and compares their answers
    push      push a generator, or an adapter that it writes, to the Hub
    search    list the generators on the Hub for a base model
"""


def help_of(*command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "119")
    monkeypatch.setenv("NO_COLOR", "1")


LONG = "Legal notices of a company that sells software. " * 7  # a text where a folder or a Hub id is expected


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--generator", LONG, "--text", "a", "--output-dir", "o"],
        ["explain", "--generator", LONG, "--text", "a"],
        ["serve", "--generator", LONG],
        ["try", "--generator", LONG, "--text", "a", "--prompt", "b"],
        ["zoo", "list", "--zoo", LONG],
        ["zoo", "merge", LONG, "--output-dir", "o"],
        ["train", "--zoo", LONG, "--output-dir", "o"],
        ["train", "--tasks", LONG, "--base-model", "b", "--output-dir", "o"],
        ["collect", "--tasks", LONG, "--base-model", "b", "--output-dir", "o"],
        ["collect", "--tasks", "tasks.yaml", "--base-model", LONG, "--output-dir", "o"],
        ["check", "--tasks", "tasks.yaml", "--base-model", LONG],
        ["evaluate", "--tasks", "tasks.yaml", "--adapter", LONG],
        ["evaluate", "--tasks", "tasks.yaml", "--generator", LONG, "--text", "a"],
        ["export", "--adapter", LONG, "--output", "o"],
        ["push", "--generator", LONG, "--repo-id", "me/x"],
    ],
    ids=lambda words: " ".join("LONG" if word == LONG else word for word in words),
)
def test_a_text_in_the_place_of_a_path_is_one_clear_error(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tasks.yaml").write_text("tasks:\n- {name: a, descriptions: [a], data: rows.jsonl}\n")
    Path("rows.jsonl").write_text('{"text": "a b"}\n{"text": "c d"}\n{"text": "e f"}\n')
    assert cli.main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "a name of more than 255 bytes" in said and "give a file, a folder or a Hub id" in said


def test_a_text_in_the_place_of_a_path_is_one_clear_error_in_python() -> None:
    for read in (
        CVAELoRAGenerator.from_pretrained,
        AdapterZoo,
        load_tasks,
        load_base_model,
        load_adapter,
        TextEncoder,
        ImageEncoder,
        images_in,
        read_coco,
        lambda path: ImageTask.from_folder("a", ["a"], path),
    ):
        with pytest.raises(
            LoraFactoryError, match=r"a name of more than 255 bytes.*give a file, a folder or a Hub id"
        ):
            read(LONG)


def test_overview_reads_as_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_of(capsys=capsys) == OVERVIEW


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", DemoArguments),
        ("collect", CollectArguments),
        ("import", ImportArguments),
        ("train", TrainArguments),
    ],
)
def test_every_field_is_a_flag_with_help_and_default(
    command: str, options: type, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(help_of(command, capsys=capsys).split())
    for field in dataclasses.fields(options):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["help"] in text
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert f"{field.metadata['help']} (default: {field.default})" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(command, capsys=capsys)
    assert text.startswith(f"usage: lora-factory {command} [-h]")
    assert all(len(line) <= 119 for line in text.splitlines())


@pytest.mark.parametrize("words", [["--help"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import json, sys\nfrom lora_factory.cli import commands as cli\n"
        f"try:\n    cli.main({words!r})\nexcept SystemExit:\n    print(json.dumps(sorted(sys.modules)))"
    )
    modules = json.loads(run(["-c", code]).stdout.splitlines()[-1])
    assert "lora_factory.arguments" in modules
    assert not {"torch", "transformers", "peft", "datasets", "numpy", "rich"} & set(modules)


def test_runs_as_a_module() -> None:
    assert run(["-m", "lora_factory.cli", "--version"]).stdout == f"lora-factory {__version__}\n"


def test_flags_become_the_arguments() -> None:
    parser = cli.build_parser()
    words = ["collect", "--tasks", "t.yaml", "--base-model", "b", "--output-dir", "zoo"]
    defaults = parser.parse_args(words)
    assert cli_options.read_options(defaults, CollectArguments) == CollectArguments()
    given = parser.parse_args([*words, "--seeds", "1, 2", "--no-packing", "--learning-rate", "1e-3", "--rank", "4"])
    expected = CollectArguments(seeds=(1, 2), packing=False, learning_rate=1e-3, rank=4)
    assert cli_options.read_options(given, CollectArguments) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--zoo", "z", "--output-dir", "g", "--decoder", "x"],
            "--decoder 'x': choose one of 'core', 'conv1d'",
        ),
        (["train", "--zoo", "z", "--output-dir", "g", "--steps", "0"], "--steps 0 must be above 0"),
        (
            ["train", "--zoo", "z", "--output-dir", "g", "--base-steps", "3", "--multitask-steps", "4"],
            "--multitask-steps 4 are the first of --base-steps 3; give as many or fewer",
        ),
        (
            ["train", "--output-dir", "g"],
            "without a zoo, a generator is trained on examples; pass --tasks and --base-model",
        ),
        (
            ["collect", "--tasks", "t", "--base-model", "b", "--output-dir", "z", "--seeds", ""],
            "seeds is empty; give at least one, for example --seeds 0",
        ),
        (
            ["collect", "--tasks", "t", "--base-model", "b", "--output-dir", "z", "--seeds", "0,1,0"],
            "--seeds 0,1,0 holds 0 more than once; give every seed once",
        ),
        (
            ["import", "a", "b", "--task", "c", "--output-dir", "z"],
            "--task and --description are for one source; list several in a text file and import that, one a line: "
            "FOLDER<TAB>TASK<TAB>DESCRIPTION",
        ),
        (
            ["evaluate", "--tasks", "t", "--adapter", "a", "--refine-steps", "0"],
            "--refine-steps 0 has no effect with --adapter, which scores adapters alone; leave it out",
        ),
        (
            ["evaluate", "--tasks", "t", "--adapter", "a", "--unseen-tasks", "u"],
            "--unseen-tasks 'u' has no effect with --adapter, which scores adapters alone; leave it out",
        ),
        (
            ["evaluate", "--tasks", "t", "--generator", "g", "--text", "a", "--seeds", "0,1"],
            "--seeds 0,1 has no effect with --text, which scores adapters alone; leave it out",
        ),
        (
            ["evaluate", "--tasks", "t", "--generator", "g", "--text", "a", "--zoo", "z"],
            "--zoo 'z' has no effect with --text, which scores adapters alone; leave it out",
        ),
        (
            ["evaluate", "--tasks", "t", "--generator", "g", "--zoo", "z", "--unseen-zoo", "u"],
            "--unseen-zoo has no effect without --unseen-tasks; give these, or leave it out",
        ),
        (
            ["evaluate", "--tasks", "t", "--generator", "g"],
            "--generator needs --zoo, LoRAs of its tasks (the zoo that it was trained on, if any), or --text",
        ),
        (["evaluate", "--tasks", "t", "--adapter", "a", "--max-tokens", "0"], "--max-tokens 0 must be above 0"),
    ],
)
def test_wrong_values_end_with_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["collect", "--tasks", "t"], "the following arguments are required: --base-model, --output-dir"),
        (["demo", "--fastt"], "there is no option --fastt; did you mean --fast or --no-fast?"),
        (["collect", "--tasks", "t", "--ouput-dir=z"], "there is no option --ouput-dir; did you mean --output-dir?"),
        (["generate", "--text", "a", "--text", "b"], "--text is given twice; --texts names a file of several"),
        (["explain", "--text", "a", "--text=b"], "--text is given twice"),
        (["colect"], "there is no command 'colect'; did you mean collect?"),
        (["zoo", "lst"], "there is no command 'lst'; did you mean list?"),
        (["zoo", "x"], "there is no command 'x'; choose one of verify, list, prune, push, merge, pull"),
        (["collect", "--tasks", "t", "--base-model", "b", "--output-dir", "z", "--seeds", "0,a"], "'0,a'"),
    ],
)
def test_wrong_flags_end_with_three_lines(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    error, usage, more = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert usage.startswith("usage: lora-factory ") and "[OPTIONS]" in usage
    assert more.startswith("`lora-factory ") and more.endswith("--help` shows all options")


def test_an_example_in_a_message_can_be_pasted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["collect", "--tasks", str(tmp_path), "--base-model", "b", "--output-dir", "z"]) == 2
    first, example = capsys.readouterr().err.split(":\n", 1)
    assert first == f"error: folder {tmp_path} has no task file (.yaml, .yml or .json); write one"
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(example)
    assert [task.name for task in load_tasks(tasks)] == ["poems"]


def test_errors_of_a_stage_are_one_line_without_markup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> None:
        raise LoraFactoryError(f"no file [bold]tasks.yaml[/bold];\n  {'give one ' * 30}")

    monkeypatch.setattr(cli, "_demo", fail)
    assert cli.main(["demo"]) == 2
    assert re.fullmatch(
        r"error: no file \[bold\]tasks\.yaml\[/bold\]; (give one ){29}give one\n", capsys.readouterr().err
    )


def test_interrupt_says_how_to_continue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues where it stopped\n"


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "_demo", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo"])


@pytest.fixture
def fresh_adapter(
    pico_model: LlamaForCausalLM, pico_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The call that scores an untrained LoRA in the working directory, on a task file that is not there yet."""
    monkeypatch.chdir(tmp_path)
    get_peft_model(pico_model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    return ["evaluate", "--tasks", "tasks.json", "--adapter", "adapter", "--base-model", str(pico_model_folder)]


def test_evaluate_prints_a_table_and_writes_json(fresh_adapter: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = "\n".join(f"The old man reads letter {number} by the window." for number in range(20))
    Path("letters.txt").write_text(lines)
    tasks = [{"name": "letters", "descriptions": ["Write letters"], "data": {"path": "letters.txt"}}]
    Path("tasks.json").write_text(json.dumps({"tasks": tasks}))
    assert cli.main([*fresh_adapter, "--output", "scores"]) == 0
    scores = json.loads(Path("scores/evaluation.json").read_text())
    assert list(scores) == ["base model", "adapter"]
    base = scores["base model"]["letters"]
    assert scores["adapter"]["letters"] == base  # a fresh LoRA changes nothing
    row = re.escape(f"{base['perplexity']:.2f} / {base['bits_per_character']:.3f}")
    output = capsys.readouterr().out
    assert re.search(rf"base model\W+{row}", output)
    assert re.search(rf"adapter\W+{row}", output)
    assert output.endswith("wrote scores/evaluation.json\n")
    assert "right answers" not in output


def test_evaluate_scores_answers_of_tasks_with_a_metric(
    fresh_adapter: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answers = ("yes", "no")
    rows = [{"prompt": f"Does fox {number} jump? ", "completion": answers[number % 2]} for number in range(20)]
    for split in ("train", "test"):
        Path(f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"path": "json", "data_files": {"train": "train.jsonl", "test": "test.jsonl"}}
    data |= {"prompt_column": "prompt", "completion_column": "completion"}
    tasks = [{"name": "foxes", "descriptions": ["Answer"], "data": data, "metric": "multiple_choice"}]
    Path("tasks.json").write_text(json.dumps({"tasks": tasks}))
    right = {}
    for count in ("1", "20"):
        assert cli.main([*fresh_adapter, "--output", count, "--max-examples", count]) == 0
        row = json.loads(Path(count, "evaluation.json").read_text())["adapter"]["foxes"]
        right[count] = row["accuracy"]
        figures = f"{row['perplexity']:.2f} / {row['bits_per_character']:.3f} / {row['accuracy']:.3f}"
        output = capsys.readouterr().out
        assert re.search(rf"adapter\W+{re.escape(figures)}", output)
        assert "where there is a third number, it is the share of right answers; higher is better\n" in output
    assert right["1"] in (0, 1) and right["20"] == 0.5  # the fresh LoRA prefers one of the answers


@pytest.fixture
def tasks_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the test, and in it a task file of two tasks."""
    monkeypatch.chdir(tmp_path)
    tasks = []
    for name, text in zip(("fox", "code"), TRAINING_TEXT, strict=False):
        Path(f"{name}.txt").write_text("\n".join(f"{number} {text}" for number in range(20)))
        tasks.append({"name": name, "descriptions": [text[:30]], "data": {"path": f"{name}.txt"}})
    Path("tasks.json").write_text(json.dumps({"tasks": tasks}))
    return Path("tasks.json")


def test_from_tasks_to_an_adapter_without_a_zoo(
    tasks_file: Path, pico_model_folder: Path, pico_encoder_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--tasks", str(tasks_file), "--base-model", str(pico_model_folder), "--output-dir", "generator"]
    words += ["--rank", "4", "--target-modules", "q_proj,v_proj", "--sequence-length", "32", "--base-steps", "9"]
    words += ["--text-encoder", str(pico_encoder_folder), "--base-model-name", "pico/llama"]
    assert cli.main(words) == 0
    config = json.loads(Path("generator/config.json").read_text())
    assert config["zoo_fingerprint"] is None and [task["name"] for task in config["tasks"]] == ["fox", "code"]
    assert config["layout"]["base_model"] == "pico/llama" and config["layout"]["lora_config"]["r"] == 4
    arguments = json.loads(Path("generator/training.json").read_text())["arguments"]
    assert (arguments["base_steps"], arguments["multitask_steps"], arguments["sequence_length"]) == (9, 3, 32)
    assert cli.main(words) == 2
    assert "already there; choose another path, remove it or pass --overwrite" in capsys.readouterr().err
    words = ["generate", "--generator", "generator", "--text", TRAINING_TEXT[0][:30], "--output-dir", "adapter"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("wrote adapter\nnearest tasks, by cosine distance: fox (0.00), code (")
    words = ["evaluate", "--tasks", str(tasks_file), "--base-model", str(pico_model_folder), "--output"]
    assert cli.main([*words, "folder", "--adapter", "adapter"]) == 0
    texts = ["--text", TRAINING_TEXT[0][:30], "--text", "Something else"]
    assert cli.main([*words, "text", "--generator", "generator", *texts]) == 0
    folder, text = (json.loads(Path(name, "evaluation.json").read_text()) for name in ("folder", "text"))
    assert list(text) == ["base model", TRAINING_TEXT[0][:30], "Something else"]
    assert text["base model"] == folder["base model"] != folder["adapter"]
    for task, score in folder["adapter"].items():
        assert text[TRAINING_TEXT[0][:30]][task]["loss"] == pytest.approx(score["loss"], rel=1e-5)
    assert text["Something else"] != text[TRAINING_TEXT[0][:30]]
    capsys.readouterr()
    assert cli.main([*words, "neither", "--adapter", "adapter", *texts]) == 2
    assert "--text needs --generator" in capsys.readouterr().err
    assert cli.main([*words, "neither", "--generator", "generator", *texts, "--zoo", "zoo"]) == 2
    assert "--zoo 'zoo' has no effect with --text" in capsys.readouterr().err
    assert cli.main([*words, "neither", "--generator", "generator", "--text", "base model"]) == 2
    assert "names the row of the base model itself" in capsys.readouterr().err
    assert not Path("neither/evaluation.json").exists()
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(pico_model_folder), "adapter")
    assert model.peft_config["default"].r == 4


@pytest.fixture
def generator(
    pico_model: LlamaForCausalLM, pico_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> CVAELoRAGenerator:
    """A generator of rank 2 in the folder ``generator`` of the working directory."""
    monkeypatch.chdir(tmp_path)
    generator = make_generator(attach(pico_model)[1], pico_encoder_folder, "core")
    generator.save_pretrained("generator")
    return generator


def test_generate_at_a_lower_rank(generator: CVAELoRAGenerator, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--generator", "generator", "--text", "poems", "--output-dir", "adapter", "--rank"]
    assert cli.main([*words, "1"]) == 0
    lost = json.loads(Path("adapter/generation.json").read_text())["rank_error"]
    assert 0 < lost < 1
    assert f"rank 1 loses {100 * lost:.2g} % of the squared norm of the update\n" in capsys.readouterr().out
    layout, state_dict = load_adapter("adapter")
    expected = generator.generate_state_dict("poems", rank=1)
    assert {module.rank for module in layout.modules} == {1}
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in expected.items())
    for rank, message in (
        ("3", "--rank 3 is above the generator's, 2; give 2 or less"),
        ("0", "--rank 0; give an integer from 1"),
    ):
        assert cli.main([*words, rank, "--overwrite"]) == 2
        assert message in capsys.readouterr().err
    assert json.loads(Path("adapter/generation.json").read_text())["rank"] == 1


def test_explain_says_what_the_generator_makes_of_a_text(
    generator: CVAELoRAGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain", "--generator", "generator", "--text", "poems"]) == 0
    found = generator.explain("poems")
    verdict, nearest, share, use = capsys.readouterr().out.splitlines()
    assert verdict == found["sentence"]
    tasks = [f"{it['task']} ({1 - it['similarity']:.2f})" for it in found["nearest"]]
    assert nearest == f"nearest tasks, by cosine distance: {', '.join(tasks)}"
    assert share.startswith(f"{100 * found['farther_than']:.0f} % of the known tasks are nearer")
    assert use.startswith(f"it changes {found['use']:.2f} times as much as a known task's description does")
    assert cli.main(["explain", "--generator", "generator", "--text", " "]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["generator"]


def test_explain_knows_a_tasks_own_description(
    generator: CVAELoRAGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    generator.get_buffer("text_task_vectors")[0] = generator.conditions("poems")["text"]
    generator.save_pretrained("generator")
    assert cli.main(["explain", "--generator", "generator", "--text", "poems"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Near a task that the generator knows: expect an adapter like that task's."
    assert lines[1].startswith("nearest tasks, by cosine distance: poems (0.00), ")
    assert lines[2] == "0 % of the known tasks are nearer than that to their own nearest neighbour"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--sequence-length 64", "--sequence-length 64 is decided by the zoo"),
        ("--target-modules q_proj", "--target-modules 'q_proj' is decided by the zoo"),
        ("--lora-alpha 3", "--lora-alpha 3.0 is decided by the zoo"),
        ("--chat-template", "--chat-template is decided by the zoo"),
        (
            "--rank 1",
            "--rank 1 is below that of the zoo's adapters, 2; give 2 or more, or 0 for the rank that holds them all. "
            "For an adapter of a lower rank, give --rank when it is generated\n",
        ),
        (
            "--held-out-tasks tasks.json",
            "--held-out-tasks chooses a step of --base-steps, which is 0; pass --base-steps, or leave it out\n",
        ),
        ("--base-steps 3", "--base-steps 3 needs the tasks' examples; pass --tasks, the task file of the zoo"),
        ("--multitask-steps 3", "--multitask-steps 3 are the first of --base-steps 0; give as many of these or more"),
    ],
)
def test_what_a_zoo_decides_may_not_be_given_beside_it(
    flags: str,
    said: str,
    pico_model: LlamaForCausalLM,
    pico_encoder_folder: Path,
    tasks_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = attach(pico_model)[1]
    zoo = AdapterZoo.create(tmp_path / "zoo", layout)
    for task in ("law", "code"):
        record = record_of(task, base_model=layout.base_model, base_revision=layout.base_revision)
        zoo.add_run(record, snapshots_of(layout))
    words = ["train", "--zoo", str(zoo.folder), "--output-dir", str(tmp_path / "g"), *flags.split()]
    assert cli.main([*words, "--text-encoder", str(pico_encoder_folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1
    assert not (tmp_path / "g").exists()


def test_check_names_the_collection_that_it_measured(
    tasks_file: Path, pico_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.yaml").write_text("sequence_length: 16\nbase_model_name: pico/llama\nlearning_rate: 0.001\n")
    words = ["--config", "c.yaml", "--tasks=tasks.json", "--base-model", str(pico_model_folder), "--steps", "10"]
    words += ["--snapshots", "3", "--no-packing"]
    assert cli.main(["check", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"next: lora-factory collect {' '.join(words)} --output-dir zoo"
    )
    Path("c.yaml").write_text("sequence_length: 16\noutput_dir: loras\n")
    assert cli.main(["check", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: lora-factory collect {' '.join(words)}"
    assert not Path("loras").exists()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("train a generator with images= (--images) of every task", "train a generator with --images of every task"),
        ("held_out= (--held-out-tasks) chooses a step", "--held-out-tasks chooses a step"),
        ("pass sequence_length=64 (--sequence-length 64) or less", "pass --sequence-length 64 or less"),
        ("no folder '/a/rank= (--rank)'", "no folder '/a/rank= (--rank)'"),
    ],
)
def test_messages_name_flags_for_what_python_calls_otherwise(said: str, shown: str) -> None:
    options = cli.parse(["generate", "--generator", "g", "--output-dir", "a"])
    assert cli_options.in_flags(said, options) == shown


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
