"""Nothing of the user's is lost: every function and command that writes, in every kind of place it must not empty."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.generators import make_generator
from helpers.models import attach
from helpers.zoos import record_of, snapshots_of
from transformers import LlamaForCausalLM

from lora_factory import Task
from lora_factory.adapters.folder import load_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import CollectArguments, CompareArguments, DemoArguments, TrainArguments
from lora_factory.cli import commands as cli
from lora_factory.cli.options import in_flags
from lora_factory.collection.collect import collect_adapters
from lora_factory.demo.corpus import build_corpus
from lora_factory.demo.run import run_demo
from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.evaluation.comparison import compare
from lora_factory.evaluation.cond_p_diff import CondPDiff
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.reporting.report import write_report
from lora_factory.tasks.task_file import load_tasks, save_tasks
from lora_factory.training.train import save_generator, train_generator
from lora_factory.utils.files import atomic_folder, write_text
from lora_factory.utils.folders import ADAPTER, GENERATOR, check_folder, check_reports, check_saving
from lora_factory.utils.paths import recorded_name
from lora_factory.utils.safe_files import read_json
from lora_factory.zoo.importing import AdapterSource, import_adapters
from lora_factory.zoo.store import AdapterZoo
from lora_factory.zoo.tools import merge, prune

TEXT = "Continue a rhymed poem."
FOREIGN = {
    "thesis.txt": "mine",
    "config.json": '{"model_type": "llama"}',
    "model.safetensors": "weights of mine",
    "adapter_config.json": "{}",
    "README.md": "my words",
    "zoo.json": "my animals",
    "evaluation.json": "{}",
    "comparison.json": "{}",
    "cells.jsonl": "no end of line",
    "tables.md": "my tables",
    "report.html": "<p>mine",
    "detection.json": "{}",
    "results.json": "{}",
    "tasks.yaml": "shopping: milk",
    "cond_p_diff.json": "{}",
    "notes/inside.txt": "deep",
    "fast/results.json": "{}",
    "law/train.jsonl": "{}",
    ".hidden": "hidden",
}


@pytest.fixture(scope="module")
def layout(pico_model_folder: Path) -> AdapterLayout:
    return attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]


@pytest.fixture(scope="module")
def generator(layout: AdapterLayout, pico_encoder_folder: Path) -> CVAELoRAGenerator:
    return make_generator(layout, pico_encoder_folder, "core")


@pytest.fixture
def zoo(tmp_path: Path, layout: AdapterLayout) -> AdapterZoo:
    zoo = AdapterZoo.create(tmp_path / "around" / "zoo", layout)
    for task in ("law", "code"):
        record = record_of(task, "seed-0", base_model=layout.base_model, base_revision=layout.base_revision)
        zoo.add_run(record, snapshots_of(layout, seed=len(task)))
    return zoo


def fill(folder: Path) -> Path:
    for name, text in FOREIGN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def source(zoo: AdapterZoo) -> AdapterSource:
    return AdapterSource(str(zoo.folder / "law" / "seed-0"), "law", ("legal notices",))


Write = Callable[[CVAELoRAGenerator, AdapterZoo, Path, Path], object]


def run(*words: object) -> None:
    if cli.main([str(word) for word in words]):
        raise LoraFactoryError("refused")


TASK = Task.from_examples("law", ["legal notices"], ["a b", "c d", "e f"], ["g h"], ["i j"])
LITTLE = TrainArguments(steps=1)
WRITERS: dict[str, Write] = {
    "train_generator": lambda g, zoo, _, to: train_generator(zoo, to, LITTLE, overwrite=True),
    "save_generator": lambda g, zoo, _, to: save_generator(g, to, {}, overwrite=True, inputs=[zoo.folder]),
    "save_pretrained": lambda g, zoo, _, to: g.save_pretrained(to),
    "save_adapter": lambda g, zoo, _, to: g.save_adapter(TEXT, to, overwrite=True),
    "collect_adapters": lambda g, zoo, base, to: collect_adapters([TASK], base, to, CollectArguments(steps=1)),
    "import_adapters": lambda g, zoo, _, to: import_adapters([source(zoo)], to),
    "merge": lambda g, zoo, _, to: merge([zoo], to),
    "compare": lambda g, zoo, base, to: compare([], base, to, CompareArguments()),
    "write_report": lambda g, zoo, _, to: write_report({}, to),
    "run_demo": lambda g, zoo, base, to: run_demo(DemoArguments(output_dir=str(to), base_model=str(base), fast=True)),
    "build_corpus": lambda g, zoo, _, to: build_corpus(to),
    "save_tasks": lambda g, zoo, _, to: save_tasks([TASK], to / "tasks.yaml"),
    "save_tasks elsewhere": lambda g, zoo, _, to: save_tasks([TASK], to / "other.yaml"),
    "CondPDiff.save": lambda g, zoo, _, to: CondPDiff.save(None, to, overwrite=True),
    "atomic_folder": lambda g, zoo, _, to: atomic_folder(to, GENERATOR, overwrite=True).__enter__(),
    "train": lambda g, zoo, _, to: run("train", "--zoo", zoo.folder, "--output-dir", to, "--overwrite"),
    "evaluate": lambda g, zoo, _, to: run("evaluate", "--tasks", "t", "--adapter", "a", "--output", to),
    "zoo merge": lambda g, zoo, _, to: run("zoo", "merge", zoo.folder, "--output-dir", to),
    "demo": lambda g, zoo, base, to: run("demo", "--fast", "--output-dir", to, "--base-model", base),
}
PLACES = ("foreign", "working directory", "around", "home", "link", "dots", "the input's own folder")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_lost(
    name: str,
    place: str,
    generator: CVAELoRAGenerator,
    zoo: AdapterZoo,
    pico_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    foreign = fill(tmp_path / "foreign")
    (tmp_path / "link").symlink_to(foreign)
    for word in ("home", "here"):
        fill(tmp_path / word)
    fill(tmp_path / "around")
    (zoo.folder / "thesis.txt").write_text("beside the tasks")
    write_text(zoo.folder / "fast" / "results.json", "{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    path = {
        "foreign": foreign,
        "working directory": Path("."),
        "around": zoo.folder.parent,
        "home": Path("~"),
        "link": Path("../link"),
        "dots": Path("../home/../foreign/notes/.."),
        "the input's own folder": zoo.folder,
    }[place]
    before = contents(tmp_path)
    try:
        WRITERS[name](generator, zoo, pico_model_folder, path)
    except (LoraFactoryError, FileNotFoundError, AttributeError) as error:
        assert isinstance(error, LoraFactoryError) or name in ("write_report", "CondPDiff.save"), error
    except KeyError:  # an empty comparison: the places that hold no report of others are free
        assert name == "write_report"
    after = contents(tmp_path)
    assert {file: after.get(file) for file in before} == before
    assert AdapterZoo(zoo.folder).verify() == []
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", [GENERATOR, ADAPTER])
@pytest.mark.parametrize("place", [".", "..", "~", "/"])
def test_places_that_are_never_replaced_be_they_empty(
    kind: object, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(LoraFactoryError, match=r"not replaced|cannot be replaced"):
        check_folder(place, kind, overwrite=True)


def test_an_adapter_that_was_trained_is_not_ours(generator: CVAELoRAGenerator, tmp_path: Path) -> None:
    folder = generator.save_adapter(TEXT, tmp_path / "adapter")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    record = (folder / "generation.json").read_bytes()
    (folder / "generation.json").unlink()  # as PEFT writes one
    with pytest.raises(LoraFactoryError, match="not replaced"):
        generator.save_adapter("Other text", folder, overwrite=True)
    (folder / "generation.json").write_bytes(record)
    changed = weights[:-1] + bytes([weights[-1] ^ 1])
    (folder / "adapter_model.safetensors").write_bytes(changed)  # as one that was trained on and saved there
    with pytest.raises(LoraFactoryError, match="not replaced"):
        generator.save_adapter("Other text", folder, overwrite=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == changed


@pytest.mark.parametrize("extra", ["notes.txt", ".hidden", "more/notes.txt", "link", "empty/"])
def test_anything_else_in_a_folder_of_ours_is_foreign(
    extra: str, generator: CVAELoRAGenerator, tmp_path: Path
) -> None:
    folder = generator.save_adapter(TEXT, tmp_path / "adapter")
    if extra == "link":
        (folder / "link").symlink_to(tmp_path)
    elif extra.endswith("/"):
        (folder / extra).mkdir()
    else:
        write_text(folder / extra, "mine")
    with pytest.raises(LoraFactoryError, match=re.escape(extra.rstrip("/"))):
        generator.save_adapter("Other text", folder, overwrite=True)
    assert os.path.lexists(folder / extra)


def test_sections_that_somebody_wrote_into_a_card_stay(generator: CVAELoRAGenerator, tmp_path: Path) -> None:
    folder = generator.save_adapter(TEXT, tmp_path / "adapter")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\n## What I found\n\nWorks well at noon.\n")
    generator.save_adapter("Other text", folder, overwrite=True)
    assert "Works well at noon." in card.read_text() and "Other text" in card.read_text()
    save_generator(generator, tmp_path / "generator", {})
    card = tmp_path / "generator" / "README.md"
    card.write_text(card.read_text() + "\n## What I found\n\nWorks well at noon.\n")
    save_generator(generator, tmp_path / "generator", {}, overwrite=True)
    assert "Works well at noon." in card.read_text()
    card.write_text("---\n: [\n---\nbroken")
    with pytest.raises(LoraFactoryError, match="nothing in it is lost"):
        save_generator(generator, tmp_path / "generator", {}, overwrite=True)
    assert card.read_text() == "---\n: [\n---\nbroken"


def test_train_asks_before_it_replaces_a_generator_and_before_it_works(
    zoo: AdapterZoo, pico_encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = TrainArguments(steps=1, text_encoder=str(pico_encoder_folder), width=32, depth=1)
    (tmp_path / "generator").mkdir()  # an empty folder is nobody's
    first = train_generator(zoo, tmp_path / "generator", arguments)
    nowhere = ("--text-encoder", tmp_path / "nowhere")  # is not reached
    words = ("train", "--zoo", zoo.folder, "--output-dir", tmp_path / "generator", *nowhere)
    assert cli.main([str(word) for word in words]) == 2
    assert "already there; choose another path, remove it or pass --overwrite" in capsys.readouterr().err
    with pytest.raises(LoraFactoryError, match="overwrite=True"):
        train_generator(zoo, tmp_path / "generator", arguments)
    second = train_generator(zoo, tmp_path / "generator", arguments, overwrite=True)
    assert all(torch.equal(first.state_dict()[name], it) for name, it in second.state_dict().items())


def test_the_working_folder_of_training_is_never_somebody_elses(zoo: AdapterZoo, tmp_path: Path) -> None:
    write_text(tmp_path / "generator.training" / "diary.txt", "mine")
    arguments = TrainArguments(steps=1, base_steps=1)
    with pytest.raises(LoraFactoryError, match=r"generator\.training.*diary"):
        train_generator(zoo, f"{tmp_path}/generator/", arguments, tasks=[TASK])
    assert (tmp_path / "generator.training" / "diary.txt").read_text() == "mine"


def test_prune_leaves_a_run_with_other_files_in_it(zoo: AdapterZoo) -> None:
    (zoo.folder / "law" / "seed-0" / "diary.txt").write_text("mine")
    for options in ({}, {"keep_last": 1}):
        with pytest.raises(LoraFactoryError, match="diary"):
            prune(zoo, tasks=["law"], **options)
    assert (zoo.folder / "law" / "seed-0" / "diary.txt").read_text() == "mine" and zoo.verify() == []


def test_what_appears_in_the_folder_meanwhile_stays(generator: CVAELoRAGenerator, tmp_path: Path) -> None:
    folder = generator.save_adapter(TEXT, tmp_path / "adapter")
    with pytest.raises(LoraFactoryError, match="late"), atomic_folder(folder, ADAPTER, overwrite=True):
        (folder / "late.txt").write_text("mine")
    assert (folder / "late.txt").read_text() == "mine" and (folder / "generation.json").is_file()


def test_an_impossible_path_is_one_clear_error(generator: CVAELoRAGenerator, zoo: AdapterZoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / ("x" * 300), tmp_path.joinpath(*["x" * 200] * 25)):
        for write in (generator.save_adapter, generator.save_pretrained):
            with pytest.raises(LoraFactoryError, match="a name of more than 255 bytes, or has more than 4,095 bytes"):
                write(path) if write == generator.save_pretrained else write(TEXT, path)
    for path in (tmp_path / "file" / "below", Path("/proc/nowhere/adapter")):
        with pytest.raises(StorageError, match=re.escape(str(path)[:40])):
            generator.save_adapter(TEXT, path)
        with pytest.raises(StorageError, match=re.escape(str(path)[:40])):
            train_generator(zoo, path, LITTLE) if "proc" not in str(path) else write_text(path, "x")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match=f"^{re.escape(str(tmp_path))} may not be written into; allow it"):
        check_reports(tmp_path, "report.html")


def test_home_is_expanded_everywhere(
    generator: CVAELoRAGenerator, zoo: AdapterZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    generator.save_adapter(TEXT, "~/adapter")
    load_adapter("~/adapter")
    generator.save_pretrained("~/generator")
    CVAELoRAGenerator.from_pretrained("~/generator")
    assert merge([AdapterZoo("~/around/zoo")], "~/merged").tasks == ["code", "law"]
    save_tasks([TASK], "~/tasks.yaml")
    assert load_tasks("~/tasks.yaml")[0].name == "law"
    write_text("~/text.json", "{}")
    assert read_json("~/text.json") == {}
    assert not list(Path().iterdir())


def test_a_file_in_the_place_of_a_report_s_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(LoraFactoryError, match=r"file is there and is not a folder"):
            check_reports(folder, "evaluation.json")
    assert check_reports(tmp_path / "new" / "a", "evaluation.json") == tmp_path / "new" / "a"


def test_a_generator_is_not_saved_over_a_record_of_the_user_s(tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text("{}")
    with pytest.raises(LoraFactoryError, match=r"training\.json is no generator's"):
        check_saving(tmp_path)


def test_a_local_base_is_recorded_as_one_and_not_pushed(
    pico_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "llama").symlink_to(pico_model_folder)
    monkeypatch.chdir(tmp_path)
    little = CollectArguments(steps=1, snapshots=1, batch_size=2, sequence_length=32, target_modules="q_proj")
    zoo = collect_adapters([TASK], "llama", "zoo", little)
    assert zoo.layout.base_model == str(tmp_path / "llama") == recorded_name("llama")
    config = json.loads((zoo.folder / "law/seed-0/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "llama")
    report = import_adapters([source(zoo)], "imported")
    assert report.zoo.layout.base_model == str(tmp_path / "llama")
    assert cli.main(["zoo", "push", "--zoo", "zoo", "--repo-id", "me/x", "--dry-run"]) == 2
    assert "--base-model-name" in capsys.readouterr().err
    assert collect_adapters([TASK], "llama", "z2", little, base_model_name="me/l").layout.base_model == "me/l"
    again = Task.from_examples("law", ["other words"], ["a b", "c d", "e f"], ["g h"], ["i j"])
    assert collect_adapters([again], "llama", "zoo", little).descriptions("law") == ("other words",)
    assert "law/seed-0: its descriptions in the zoo are now those of the task file" in caplog.text


def test_errors_name_the_flags_of_the_command() -> None:
    options = cli.build_parser().parse_args(["train", "--zoo", "z", "--output-dir", "g"])
    assert in_flags("pass overwrite=True", options) == "pass --overwrite"
    assert in_flags("steps=0, base_tasks=3: no", options) == "--steps 0, --base-tasks 3: no"
    assert in_flags("pass tasks=, the file", options) == "pass --tasks, the file"
    assert in_flags("choose another output_dir, or", options) == "choose another --output-dir, or"
    for text in ("runs/steps=0/x", "train_generator(zoo, output_dir)", "adapter_name='a'", "the seed is odd"):
        assert in_flags(text, options) == text


@pytest.mark.parametrize(
    ("words", "continues"),
    [
        ("generate --generator g --output-dir o", False),
        ("train --zoo z --output-dir o", False),
        ("train --zoo z --output-dir o --base-steps 3", True),
        ("train --tasks t --base-model b --output-dir o", True),
        ("explain --generator g --text t", False),
        ("evaluate --tasks t --adapter a", False),
        ("evaluate --tasks t --generator g", True),
        ("collect --tasks t --base-model b --output-dir o", True),
        ("zoo merge a --output-dir o", True),
    ],
)
def test_only_what_continues_says_so(
    words: str, continues: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = cli.build_parser().parse_args(words.split())
    assert cli._continues(options) is continues
