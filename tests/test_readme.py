"""The README shows calls that run, in order and as they stand, from an empty folder."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.downloads import put_into_cache
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lora_factory.cli.commands import main
from lora_factory.models.embedded import EMBEDDED_BASE_MODEL, embedded_base_model, embedded_text_encoder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYERS = 6  # of the base model's 30


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded_cache: Path) -> None:
    """The embedded base model with its first layers alone, for the test's time; plain PEFT has it from the Hub."""
    monkeypatch.setenv("LORA_FACTORY_CACHE", str(embedded_cache))
    whole = embedded_base_model()
    monkeypatch.setenv("LORA_FACTORY_CACHE", str(tmp_path / "cache"))
    shallow = shutil.copytree(whole, tmp_path / "cache" / whole.name, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((whole / "config.json").read_text())
    (shallow / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    layer = re.compile(r"model\.layers\.(\d+)\.")
    weights = load_file(whole / "model.safetensors").items()
    kept = {name: weight for name, weight in weights if not (found := layer.match(name)) or int(found[1]) < LAYERS}
    save_file(kept, shallow / "model.safetensors", metadata={"format": "pt"})
    put_into_cache({EMBEDDED_BASE_MODEL: shallow}, tmp_path / "hub", monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("downloaded")
@pytest.mark.skipif(embedded_text_encoder() is None, reason="the embedded models are not installed")
def test_the_readme_from_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr("lora_factory.models.hidden_states.FEATURE_EXAMPLES", 16)  # of 128, for the test's time
    section = README.split("\n## From tasks to an adapter\n")[1].split("\n## ")[0]
    names: dict[str, object] = {}
    for language, text in re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL):
        if language == "bash":
            for line in text.splitlines():
                assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
        elif language == "python":
            exec(text, names)
        elif text.startswith("# collect.yaml"):
            Path("collect.yaml").write_text(text)
        elif language == "yaml":
            (shown,) = yaml.safe_load(text)["tasks"]
            written = {task["name"]: task for task in yaml.safe_load(Path("tasks.yaml").read_text())["tasks"]}
            assert set(shown["descriptions"]) <= set(written["licences"]["descriptions"])
            assert shown["data"]["data_files"].items() <= written["licences"]["data"]["data_files"].items()
    assert isinstance(names["model"], PeftModel)
    scores = json.loads(Path("evaluation/evaluation.json").read_text())
    loss = {model: tasks["licences"]["perplexity"] for model, tasks in scores.items()}
    assert loss["my-adapter"] < loss["base model"]
    assert len(README.splitlines()) <= 150
