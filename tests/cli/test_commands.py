"""The command line: quick, torch-free, readable, and with one line for what went wrong."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from lora_factory import LoraFactoryError, __version__
from lora_factory.arguments import CollectArguments, DemoArguments, ImportArguments, TrainArguments
from lora_factory.cli import commands as cli
from lora_factory.cli import options as cli_options

COMMANDS = ("demo", "collect", "import", "zoo", "train", "generate", "evaluate", "push", "search")
OVERVIEW = """\
usage: lora-factory [-h] [--version] COMMAND ...

Generate LoRA adapters from a description.

options:
  -h, --help  show this help message and exit
  --version   show program's version number and exit

commands:
  COMMAND
    demo      run the whole pipeline on an embedded real model and on local text
    collect   fine-tune one LoRA per task and seed and keep its last snapshots
    import    take PEFT adapters from folders and the Hub into a zoo
    zoo       verify, list, prune, merge, push or pull zoos
    train     train a generator on a zoo
    generate  write an adapter from a description
    evaluate  score the base model and adapters on the tasks' test splits
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
            "--decoder 'x': choose 'token' or 'conv1d'",
        ),
        (["train", "--zoo", "z", "--output-dir", "g", "--steps", "0"], "--steps 0 must be above 0"),
        (
            ["collect", "--tasks", "t", "--base-model", "b", "--output-dir", "z", "--seeds", ""],
            "seeds is empty; give at least one, for example --seeds 0",
        ),
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
        (["demo", "--fastt"], "unrecognized arguments: --fastt"),
        (["collect", "--tasks", "t", "--base-model", "b", "--output-dir", "z", "--seeds", "0,a"], "'0,a'"),
    ],
)
def test_wrong_flags_end_with_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


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


def test_evaluate_prints_a_table_and_writes_json(
    pico_model: LlamaForCausalLM,
    pico_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    get_peft_model(pico_model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    lines = "\n".join(f"The old man reads letter {number} by the window." for number in range(20))
    Path("letters.txt").write_text(lines)
    tasks = [{"name": "letters", "descriptions": ["Write letters"], "data": {"path": "letters.txt"}}]
    Path("tasks.json").write_text(json.dumps({"tasks": tasks}))
    words = ["evaluate", "--tasks", "tasks.json", "--adapter", "adapter", "--base-model", str(pico_model_folder)]
    assert cli.main([*words, "--output", "scores"]) == 0
    scores = json.loads(Path("scores/evaluation.json").read_text())
    assert list(scores) == ["base model", "adapter"]
    base = scores["base model"]["letters"]
    assert scores["adapter"]["letters"] == base  # a fresh LoRA changes nothing
    row = re.escape(f"{base['perplexity']:.2f} / {base['bits_per_character']:.3f}")
    output = capsys.readouterr().out
    assert re.search(rf"base model\W+{row}", output)
    assert re.search(rf"adapter\W+{row}", output)
    assert output.endswith("wrote scores/evaluation.json\n")


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
