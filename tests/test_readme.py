"""README and guide show calls that run: those of the README in order and as they stand, from an empty folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers.images import picture, save_classifier
from peft import PeftModel

from lora_factory.cli.commands import main, parse
from lora_factory.models.embedded import embedded_base_model, embedded_text_encoder
from lora_factory.tasks.task_file import load_tasks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = GUIDE) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's cache, as it is when plain PEFT has downloaded the base model."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(embedded_base_model())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("downloaded")
@pytest.mark.skipif(embedded_text_encoder() is None, reason="the embedded models are not installed")
def test_the_readme_from_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
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


def test_quick_start_is_the_example() -> None:
    example = (ROOT / "examples" / "quick_start.py").read_text(encoding="utf-8")
    code = blocks("python")[0]
    assert example.endswith(code)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 10
    compile(code, "quick_start.py", "exec")


def test_commands_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (config,) = [block for block in blocks("yaml") if block.startswith("tasks: ")]
    (tmp_path / "collect.yaml").write_text(config)
    commands = [line for line in "".join(blocks("bash")).splitlines() if line.startswith("lora-factory")]
    assert len(commands) >= 8
    for command in commands:
        parse(shlex.split(command, comments=True)[1:])


def test_images_from_task_file_to_adapter(
    pico_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = GUIDE.split("\n## Images\n")[1].split("\n## ")[0]
    (file,) = re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "animals.yaml").write_text(file)
    for number, kind in enumerate(("cat", "dog", "horse")):
        (tmp_path / "animals" / kind).mkdir(parents=True)
        for index in range(8):
            picture(10 * number + index).save(tmp_path / "animals" / kind / f"{index}.png")
    for name in ("cat1.png", "cat2.png"):
        picture(99).save(tmp_path / name)
    exec(code.replace("google/vit-base-patch16-224-in21k", str(save_classifier(tmp_path / "pico"))), {})
    few = {"train": f"--steps 2 --width 8 --text-encoder {pico_encoder_folder}", "collect": "--steps 20 --snapshots 2"}
    for command in commands.splitlines():
        words = shlex.split(command)[1:]
        assert main(words + shlex.split(few.get(words[0], ""))) == 0
    generation = json.loads((tmp_path / "my-adapter" / "generation.json").read_text())
    assert (generation["conditions"], generation["text"]) == (["image"], "Is it a cat?")
    assert len(load_tasks("animals.yaml")[0].images()) < 8 * 3 / 2  # cats alone tell what the task of cats is


def test_task_file_loads(tmp_path: Path) -> None:
    text = blocks("yaml")[0]
    (tmp_path / "licences").mkdir()
    for split in ("train", "test"):
        rows = "\n".join(f'{{"text": "Permission is granted, clause {number} of {split}."}}' for number in range(20))
        (tmp_path / "licences" / f"{split}.jsonl").write_text(rows)
    (tmp_path / "tasks.yaml").write_text(text)
    assert [task.name for task in load_tasks(tmp_path / "tasks.yaml")] == [
        task["name"] for task in yaml.safe_load(text)["tasks"]
    ]
    assert load_tasks(tmp_path / "tasks.yaml")[0].examples("test")
