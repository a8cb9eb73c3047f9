"""The demo from end to end on the pico models and a corpus of a few lines."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from helpers.models import TRAINING_TEXT

from lora_factory.adapters.folder import load_adapter
from lora_factory.arguments import CollectArguments, DemoArguments, TrainArguments
from lora_factory.cli import commands as cli
from lora_factory.demo import run as demo
from lora_factory.demo.run import METHODS, DemoRun, DemoSize, next_commands, run_demo
from lora_factory.evaluation import comparison
from lora_factory.tasks.task import Task

NAMES = ("prose", "code", "law")
UNSEEN = "law"
FIGURES = {"loss", "tokens", "characters", "perplexity", "bits_per_character", "headroom"}


def make_task(name: str, text: str) -> Task:
    texts = [f"{number} {text}" for number in range(6)]
    return Task.from_examples(name, [f"Write {name}.", f"More {name}'s text."], texts[:4], texts[4:5], texts[5:])


@pytest.fixture
def arguments(
    monkeypatch: pytest.MonkeyPatch, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path
) -> DemoArguments:
    """A demo of two seen tasks and one unseen, a few steps each."""
    size = DemoSize(
        seen_tasks=2,
        collect=CollectArguments(
            steps=12, snapshots=3, batch_size=2, sequence_length=32, learning_rate=3e-2, dtype="float32"
        ),
        train=TrainArguments(steps=4, batch_size=4, text_encoder=str(pico_encoder_folder)),
        test_tokens=30,
    )

    def corpus(folder: Path, *, seen: int) -> tuple[list[Task], Task]:
        tasks = [make_task(name, text) for name, text in zip(NAMES, TRAINING_TEXT, strict=True)]
        return tasks[:seen], tasks[-1]

    for name in ("FULL", "FAST"):
        monkeypatch.setattr(demo, name, size)
    monkeypatch.setattr(demo, "build_corpus", corpus)
    return DemoArguments(output_dir=str(tmp_path / "out"), base_model=str(pico_model_folder))


def as_json(value: object) -> object:
    return json.loads(json.dumps(value))


def modification_times(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in [folder, *folder.rglob("*")] if file.is_file()}


def test_demo_from_end_to_end_and_again(
    arguments: DemoArguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run_demo(arguments)
    folder = tmp_path / "out" / "full"
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == as_json(results)
    assert results["unseen_task"] == UNSEEN
    assert results["base_model"] == arguments.base_model
    assert tuple(results["scores"]) == METHODS
    for row in results["scores"].values():
        assert tuple(row) == NAMES
        assert all(set(cell) == FIGURES and cell["tokens"] == 30 for cell in row.values())
    for task in NAMES:
        losses = {method: results["scores"][method][task]["loss"] for method in METHODS}
        assert losses["original LoRA"] < losses["original model"] - 0.5
        assert len(set(losses.values())) == len(METHODS)
        assert results["scores"]["original LoRA"][task]["headroom"] == 1
        assert results["scores"]["original model"][task]["headroom"] == 0
    assert results["scores"]["generated"]["prose"]["headroom"] > 0.8
    assert set(results["seconds"]) == {"base model", "text", "collect", "train", "generate", "evaluate", "all"}
    assert results["sample"]["task"] == UNSEEN and TRAINING_TEXT[2][:20] in results["sample"]["beginning"]
    assert results["settings"]["train"]["steps"] == 4
    assert (folder / "zoo" / "prose").is_dir() and not (folder / "zoo" / UNSEEN).exists()
    layout, _ = load_adapter(folder / "adapters" / UNSEEN)
    assert layout.base_model == arguments.base_model

    shown = capsys.readouterr().out
    assert all(word in shown for word in (*METHODS, *NAMES, "unseen", "PPL", "BPC", "Headroom"))
    assert shown.count("lora-factory ") == 3
    assert "On unseen tasks the generator recovers" in " ".join(shown.split())

    def recomputed(*_: object, **__: object) -> None:
        raise AssertionError("a finished stage was computed again")

    kept = ("zoo", "unseen-zoo", "generator", "cells.jsonl")
    before = {name: modification_times(folder / name) for name in kept}
    monkeypatch.setattr(demo, "train_generator", recomputed)
    monkeypatch.setattr(comparison, "score_task", recomputed)
    again = run_demo(arguments)
    assert {name: modification_times(folder / name) for name in kept} == before
    assert again["scores"] == results["scores"]


def test_a_generator_of_an_earlier_version_is_made_anew(arguments: DemoArguments, tmp_path: Path) -> None:
    run_demo(arguments)
    folder = tmp_path / "out" / "full" / "generator"
    weights = (folder / "model.safetensors").read_bytes()
    config = json.loads((folder / "config.json").read_text()) | {"decoder": "token", "format_version": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"other networks")
    training = json.loads((folder / "training.json").read_text())
    training["arguments"]["base_mixtures"] = 4
    (folder / "training.json").write_text(json.dumps(training))
    run_demo(arguments)
    assert (folder / "model.safetensors").read_bytes() == weights


def test_interrupted_evaluation_repeats_no_cell(arguments: DemoArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    score_task, scored = comparison.score_task, []

    def interrupted(*words: Any, **options: Any) -> object:
        if len(scored) == 7:
            raise KeyboardInterrupt
        scored.append(words[2])
        return score_task(*words, **options)

    monkeypatch.setattr(comparison, "score_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_demo(arguments)
    rest: list[object] = []

    def counted(*words: Any, **options: Any) -> object:
        rest.append(words[2])
        return score_task(*words, **options)

    monkeypatch.setattr(comparison, "score_task", counted)
    results = run_demo(arguments)
    assert len(scored) + len(rest) == len(METHODS) * len(NAMES)
    assert set(results["scores"]["generated"]) == set(NAMES)


def test_a_lora_that_gains_nothing_is_no_failure(
    arguments: DemoArguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "headroom", lambda *_: math.nan)
    results = run_demo(arguments)
    assert json.loads((tmp_path / "out" / "full" / "results.json").read_text(encoding="utf-8")) == as_json(results)
    assert results["scores"]["generated"]["prose"]["headroom"] is None
    assert "unseen" in capsys.readouterr().out.lower()


@pytest.mark.usefixtures("arguments")
def test_unknown_base_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--fast", "--base-model", str(tmp_path / "nowhere"), "--output-dir", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_next_commands_are_commands(tmp_path: Path) -> None:
    run = DemoRun(tmp_path / "my folder", "folder", "pico/llama", demo.FULL)
    commands = next_commands(run, make_task(UNSEEN, "text"))
    parsed = [cli.build_parser().parse_args(shlex.split(command)) for command in commands]
    assert parsed[0].text == f"More {UNSEEN}'s text."
    assert parsed[0].generator == str(tmp_path / "my folder" / "generator")
    assert parsed[1].adapter == [parsed[0].output_dir]
    assert parsed[2].decoder == "conv1d"
