"""Every script in examples/ runs as it stands, in one folder, on tiny models under the names of real ones."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from helpers.downloads import hide_packages_with_models, put_into_cache
from peft import PeftModel

from lora_factory import CVAELoRAGenerator

EXAMPLES = Path(__file__).parents[1] / "examples"
BASE, ENCODER = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
TASKS = {"iso", "dotted", "german", "british", "american"}


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


@pytest.fixture(scope="module")
def own_data(
    pico_model_folder: Path, pico_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What the example leaves behind that the others go on from; its folder is the working directory."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("LORA_FACTORY_CACHE", str(folder / "cache"))
        hide_packages_with_models(patch)
        put_into_cache({BASE: pico_model_folder, ENCODER: pico_encoder_folder}, folder / "hub", patch)
        yield run("own_data")


def test_each_is_short_tested_and_listed() -> None:
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")}
    assert 5 <= len(scripts) <= 8
    assert {name: len(text.splitlines()) for name, text in scripts.items() if text.count("\n") >= 80} == {}
    assert scripts.keys() <= set(re.findall(r'run\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8")))
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+)\.py\)", page)) == scripts.keys()


def test_own_data(own_data: dict[str, Any]) -> None:
    assert set(own_data["zoo"].tasks) == TASKS
    assert own_data["generator"].training_record["errors"].keys() == TASKS
    assert Path("examples-output/generator/model.safetensors").is_file()


@pytest.mark.usefixtures("own_data")
def test_existing_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    report = run("existing_adapters")["report"]
    assert (set(report.zoo.tasks), report.refused) == ({"iso", "german", "british"}, {})
    assert Path("examples-output/dots/adapter_model.safetensors").is_file()
    assert "not imported" not in capsys.readouterr().out


@pytest.mark.usefixtures("own_data")
def test_many_adapters() -> None:
    for _ in range(2):  # what the first run wrote does not stop the second
        folders = run("many_adapters")["folders"]
    assert {folder.name for folder in folders} == {"year-first", "day-first", "month-first"}
    for folder in folders:
        assert (folder / "adapter_model.safetensors").is_file()
        assert len(GGUFReader(folder.with_suffix(".gguf")).tensors) == 8  # A and B of two modules in two layers


@pytest.mark.usefixtures("own_data")
def test_hot_swap(capsys: pytest.CaptureFixture[str]) -> None:
    model = run("hot_swap")["model"]
    assert isinstance(model, PeftModel) and list(model.peft_config) == ["default"]
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert lines[0].startswith("base model ") and len(lines) == 4


@pytest.mark.usefixtures("own_data")
def test_steering(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("steering")
    assert isinstance(names["model"], PeftModel)
    assert (
        len(re.findall(r"^ *\S+ of day first: year first \d+%, day first \d+%$", capsys.readouterr().out, re.M)) == 7
    )


@pytest.mark.usefixtures("own_data")
def test_score_descriptions(capsys: pytest.CaptureFixture[str]) -> None:
    scores = run("score_descriptions")["scores"]
    assert next(iter(scores)) == "base model" and len(scores) == 4
    loss = {name: by_task["year-first"].loss for name, by_task in scores.items()}
    assert loss["Write the date with hyphens, year first"] < loss["base model"]
    assert capsys.readouterr().out.count("\n") == 5


@pytest.mark.slow
@pytest.mark.usefixtures("own_data")
def test_quick_start() -> None:
    generator = run("quick_start")["generator"]
    assert isinstance(generator, CVAELoRAGenerator)
    assert Path("quick-start/adapter/adapter_model.safetensors").is_file()
