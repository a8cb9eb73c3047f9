"""The README shows calls that run: its quick start is the example's code, its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from lora_factory.cli import build_parser
from lora_factory.tasks import load_tasks

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


def test_commands_parse() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("lora-factory")]
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True)[1:])


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
