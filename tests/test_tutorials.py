"""The tutorials run as they stand, in order, from an empty folder.

Models of the Hub are in its cache, under the names that the tutorials use: tiny ones of the same kinds.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from helpers.downloads import hide_packages_with_models, put_into_cache
from helpers.hub import contents
from helpers.images import save_classifier
from helpers.serving import running
from hub_server.local import LocalHub
from peft import PeftModel

from lora_factory.cli.commands import main
from lora_factory.tasks.task_file import load_tasks

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
BASE, ENCODER = "HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2"
FEWER = {"train": ["--steps", "100"]}  # options that a test adds to a command, for its time
COMPARISON = ["lora-factory", "evaluate", "--generator"]  # minutes of baselines; tests/evaluation run it


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory of a tutorial; packages that hold models count as not installed."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setenv("LORA_FACTORY_CACHE", str(tmp_path / "cache"))
    hide_packages_with_models(monkeypatch)


@pytest.fixture
def downloaded(
    pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's cache, with tiny models under the names of real ones."""
    vit = save_classifier(tmp_path / "vit")
    models = {BASE: pico_model_folder, ENCODER: pico_encoder_folder, "google/vit-base-patch16-224-in21k": vit}
    put_into_cache(models, tmp_path / "hub", monkeypatch)


def blocks(name: str) -> Iterator[tuple[str, str]]:
    """Language and text of a tutorial's blocks of code, in their order."""
    page = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE):
        yield match[1], match[2]


def run_block(language: str, text: str, names: dict[str, Any]) -> None:
    """Do what a reader does with a block: type commands, run Python, save a file that its first line names."""
    if language == "python":
        exec(compile(text, "tutorial", "exec"), names)
    elif language == "bash":
        for line in text.splitlines():
            if not line.startswith("pip install "):
                if (words := shlex.split(line))[:3] == COMPARISON:
                    continue
                assert words[0] == "lora-factory" and main(words[1:] + FEWER.get(words[1], [])) == 0, line
    else:
        assert language == "yaml"
        named = re.match(r"# ([\w.]+\.yaml)", text)
        Path(named[1] if named else "shown.yaml").write_text(text, encoding="utf-8")
        if "tasks:" in text:
            assert all(task.examples("train") for task in load_tasks(named[1] if named else "shown.yaml"))


def run(name: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for language, text in blocks(name):
        run_block(language, text, names)
    return names


@pytest.mark.slow
@pytest.mark.usefixtures("downloaded")
def test_from_data(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("from-data")
    assert isinstance(names["model"], PeftModel)
    assert json.loads(Path("low-rank/adapter_config.json").read_text())["r"] == 1
    scores = json.loads(Path("evaluation/evaluation.json").read_text())
    assert set(scores) == {"base model", "my-adapter"}
    assert json.loads(Path("from-data/config.json").read_text())["zoo_fingerprint"] is None
    assert re.search(r"about (a|\d+) (second|minute)s? by one process", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.usefixtures("downloaded")
def test_from_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("from-adapters")
    assert isinstance(names["model"], PeftModel)
    assert (
        json.loads(Path("my-adapter/adapter_config.json").read_text())["r"] == 12
    )  # three adapters of rank 4 at most
    errors = json.loads(Path("generator/training.json").read_text())["errors"]
    assert set(errors) == {"licences", "code", "letters"} and max(errors.values()) < 1e-4
    assert str(errors) in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("downloaded")
def test_images() -> None:
    pytest.importorskip("sklearn")
    names = run("images")
    assert isinstance(names["model"], PeftModel)
    generation = json.loads(Path("my-adapter/generation.json").read_text())
    assert (generation["conditions"], generation["text"]) == (["image"], "Is the digit less than three?")


@pytest.mark.slow
@pytest.mark.usefixtures("downloaded")
def test_serve() -> None:
    pytest.importorskip("openai")
    names: dict[str, Any] = {}
    server = None
    with io.StringIO() as printed, redirect_stdout(printed):
        for language, text in blocks("serve"):
            if server is None and "lora-factory serve" not in text:
                run_block(language, text, names)
            elif server is None:
                (line,) = (line for line in text.splitlines() if line.startswith("lora-factory serve "))
                started = running(Path(shlex.split(line)[-1]))
                server = started.__enter__()
            else:
                run_block(language, text.replace("http://127.0.0.1:8000", server.url), names)
    started.__exit__(None, None, None)
    assert names["answer"].usage.completion_tokens > 0
    assert BASE in names["names"]
    (config,) = Path("licence-lora").rglob("adapter_config.json")
    assert json.loads(config.read_text())["r"] == 1


@pytest.mark.slow
def test_publish(hub: LocalHub, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path) -> None:
    card = "---\nlicense: mit\n---\n"
    hub.add_repo(BASE, {**contents(pico_model_folder), "README.md": card})
    hub.add_repo(ENCODER, contents(pico_encoder_folder))
    code = [
        "import shlex, lora_factory.models.embedded as embedded",
        "from lora_factory.cli.commands import main",
        "embedded.find_spec = lambda name: None",
    ]
    for language, text in blocks("publish"):
        text = text.replace("me/", "alice/")
        if language == "python":
            code.append(text)
        else:
            lines = [shlex.split(line)[1:] for line in text.splitlines()]
            code += [f"assert main({words + FEWER.get(words[0], [])!r}) == 0" for words in lines]
    done = hub.run("\n".join([*code, "print(type(model).__name__)"]), timeout=300.0)
    assert done.stdout.splitlines()[-1].startswith("PeftModel")
    assert "would push to alice/my-generator" in done.stdout
    assert re.search(r"^alice/my-generator +\S+ downloads", done.stdout, flags=re.MULTILINE)
    for kind, name in (
        ("model", "my-generator"),
        ("model", "licence-lora"),
        ("model", "loras"),
        ("dataset", "my-zoo"),
    ):
        assert (kind, f"alice/{name}") in hub.repos
    assert json.loads(Path("my-adapter/generation.json").read_text())["text"] == "Write unit tests"
    assert Path("pulled/zoo.json").is_file()
