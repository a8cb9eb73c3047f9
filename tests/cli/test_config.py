"""Options from a YAML file (`--config`) and in groups: its values are defaults, flags win, errors name the file."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from lora_factory.arguments import (
    GROUPS,
    CollectArguments,
    CompareArguments,
    DemoArguments,
    ImportArguments,
    TrainArguments,
)
from lora_factory.cli import commands as cli
from lora_factory.cli.options import read_options
from lora_factory.errors import LoraFactoryError

CLASSES = {
    "demo": DemoArguments,
    "collect": CollectArguments,
    "import": ImportArguments,
    "train": TrainArguments,
    "evaluate": CompareArguments,
}
COLLECT = "tasks: tasks.yaml\nbase_model: base\noutput_dir: zoo\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "119")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


def parsed(text: str, *words: str, command: str = "collect") -> argparse.Namespace:
    Path("c.yaml").write_text(text)
    return cli.parse([command, "--config", "c.yaml", *words])


def test_a_file_gives_options_and_flags_win() -> None:
    text = COLLECT + "steps: 50\nlearning_rate: 1e-3\nseeds: [1, 2]\npacking: false\n"
    text += "target_modules: [q_proj, v_proj]\n"
    options = parsed(text)
    assert (options.tasks, options.base_model, options.output_dir) == ("tasks.yaml", "base", "zoo")
    given = {"learning_rate": 1e-3, "seeds": (1, 2), "packing": False, "target_modules": "q_proj,v_proj"}
    assert read_options(options, CollectArguments) == CollectArguments(steps=50, **given)
    options = parsed(text, "--steps", "60", "--packing", "--output-dir=other")
    given["packing"] = True
    assert read_options(options, CollectArguments) == CollectArguments(steps=60, **given)
    assert (options.base_model, options.output_dir) == ("base", "other")
    assert read_options(parsed("{}", command="demo"), DemoArguments) == DemoArguments()
    assert parsed("", command="demo").output_dir == "demo-output"


def test_every_kind_of_flag_may_stand_in_the_file() -> None:
    text = "source: [a, b]\noutput_dir: zoo\ndescription: [one, two]\nrank: 3\n"
    options = parsed(text, command="import")
    assert (options.source, options.description, options.rank) == (["a", "b"], ["one", "two"], 3)
    options = parsed(text, "c", "--description", "three", command="import")
    assert (options.source, options.description) == (["c"], ["three"])
    assert parsed("source: a\noutput_dir: zoo\n", command="import").source == ["a"]
    options = parsed("zoo: z\noutput_dir: g\noverwrite: true\n", command="train")
    assert options.overwrite is True and options.zoo == "z"


def test_options_that_exclude_each_other() -> None:
    text = "tasks: t\ngenerator: g\n"
    assert parsed(text, command="evaluate").generator == "g"
    options = parsed(text, "--adapter", "a", command="evaluate")
    assert (options.generator, options.adapter) == (None, ["a"])
    with pytest.raises(LoraFactoryError, match=r"c\.yaml has adapter and generator, which exclude each other"):
        parsed(text + "adapter: a\n", command="evaluate")


def test_what_neither_the_file_nor_a_flag_gives_is_still_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("base_model: base\n")
    assert stop.value.code == 2
    assert "the following arguments are required: --tasks, --output-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning-rate: 1", "has the unknown key 'learning-rate'; did you mean learning_rate"),
        ("stepps: 1", "has the unknown key 'stepps'; did you mean steps?"),
        ("help: true", "has the unknown key 'help'"),
        ("config: d.yaml", "has the unknown key 'config'"),
        ("run: x", "has the unknown key 'run'"),
        ("1: x", "has the unknown key 1"),
        ("steps: five", "c.yaml: steps: 'five' must be a whole number"),
        ("steps: ", "c.yaml: steps: None must be a whole number"),
        ("steps: true", "c.yaml: steps: True must be a whole number"),
        ("packing: 1", "c.yaml: packing: 1 must be true or false"),
        ("learning_rate: .nan", "c.yaml: learning_rate: nan must be a finite number"),
        ("seeds: [a]", "c.yaml: seeds: ['a'] must be a list of whole numbers"),
        ("tasks: [a, b]", "c.yaml: tasks: ['a', 'b'] must be text"),
        ("base_model: 3", "c.yaml: base_model: 3 must be text"),
        ("dtype: {a: 1}", "c.yaml: dtype: {'a': 1} must be text"),
        ("- steps", "holds ['steps']"),
        ("steps: 1\nsteps: 2", "'steps' stands twice"),
        ("steps: [", "configuration file c.yaml is not valid YAML"),
        ("a: &a [x,x]\nb: &b [*a,*a]\nsteps: !!python/object:os.system x", "is not valid YAML"),
        ("steps: 0", "steps: 0 in c.yaml, epochs=0: one of them must be at least 1"),
        ("quantization: 3bit", "quantization: '3bit' in c.yaml: choose one of '', '4bit', '8bit'"),
    ],
)
def test_faults_are_one_line(text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(text)
    required = ["--tasks=t", "--base-model=b", "--output-dir=z"]
    assert cli.main(["collect", "--config", "c.yaml", *required]) == 2
    error = capsys.readouterr().err
    assert words.replace("epochs=0", "--epochs 0") in error and error.count("\n") == 1 and "c.yaml" in error


def test_a_small_file_that_aliases_blow_up_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{after}: &{after} [{','.join(['*' + before] * 10)}]\n"
    Path("c.yaml").write_text(bomb)
    assert cli.main(["demo", "--config=c.yaml"]) == 2
    assert "holds more than 1,000,000 values" in capsys.readouterr().err
    assert cli.main(["demo", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml cannot be read (No such file" in capsys.readouterr().err


def test_the_flag_needs_a_file_and_help_reads_none(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, said in (
        (["demo", "--config"], 2, "argument --config: expected one argument"),
        (["demo", "--config", "nowhere.yaml", "--help"], 0, "--config FILE"),
        (["search", "--base-model", "b", "--config", "c"], 2, "there is no option --config"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        captured = capsys.readouterr()
        assert stop.value.code == code and said in captured.out + captured.err


def test_errors_name_the_key_of_the_file_or_the_flag() -> None:
    options = parsed(COLLECT + "steps: 50\n", "--rank", "3")
    said = cli.in_flags("steps=50, rank=3: choose another output_dir, or base_model_name=None", options)
    assert said == "steps: 50 in c.yaml, --rank 3: choose another output_dir, or --base-model-name None"


@pytest.mark.parametrize("command", CLASSES)
def test_fields_stand_in_groups(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = CLASSES[command]
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(options):
        groups.setdefault(field.metadata["group"], []).append(field.name)
    lines = {
        name: rest.replace(";", ",")
        for name, rest in re.findall(r"(\w+)(?:, [\w ]+)?: (.*?)\.\s", options.__doc__, re.S)
    }
    for group, names in groups.items():
        listed = [it.split(": ")[-1].strip() for it in lines[f"{group[0].upper()}{group[1:]}"].split(",")]
        assert sorted(listed) == sorted(names), "the docstring names the groups and their fields"
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    sections = dict(part.split(":\n", 1) for part in text.split("\n\n") if ":\n" in part)
    expected = [f"{group} options" for group in GROUPS if group in groups]
    assert [name for name in sections if name.endswith(" options")] == expected
    for group, names in groups.items():
        assert [name for name in names if f"--{name.replace('_', '-')}" not in sections[f"{group} options"]] == []
    assert "(default: )" not in text and "--config FILE" in text


@pytest.mark.parametrize("options", CLASSES.values())
def test_every_help_text_names_its_default(options: type) -> None:
    for field in dataclasses.fields(options):
        assert field.default not in ("", ()) or "(default: " in field.metadata["help"], field.name
