"""The README shows calls that run: its quick start is the example's code, its commands parse."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from helpers.images import picture, save_classifier

from lora_factory.cli.commands import main, parse
from lora_factory.tasks.task_file import load_tasks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("lora-factory")]
    assert len(commands) >= 4
    for command in commands:
        parse(shlex.split(command, comments=True)[1:])


def test_images_from_task_file_to_adapter(
    pico_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = README.split("\n### Images\n")[1].split("\n## ")[0]
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
