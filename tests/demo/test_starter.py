"""The task file to start from: it loads as it stands, and nothing of the user's is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_factory.cli import commands as cli
from lora_factory.demo.corpus import find_documents
from lora_factory.demo.starter import DOCUMENTS, STARTER_KINDS, write_starter
from lora_factory.demo.text_kinds import TextKind
from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.task_file import check_tasks, load_tasks
from lora_factory.tasks.text import Split


def test_the_file_can_be_used_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", "--output-dir", str(tmp_path / "new")]) == 0
    wrote, following = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"wrote {tmp_path / 'new' / 'tasks.yaml'}")
    assert following.startswith("next: lora-factory check --tasks ")
    tasks = load_tasks(tmp_path / "new" / "tasks.yaml")
    check_tasks(tasks)
    assert {task.name for task in tasks} == set(STARTER_KINDS)
    assert all(0 < len(task.examples(split)) <= count for task in tasks for split, count in DOCUMENTS.items())
    assert (tmp_path / "new" / "tasks.yaml").read_text().count("    # ") == 2 * len(tasks)


def test_what_is_cut_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def cut_off(kind: TextKind) -> dict[Split, list[str]] | None:
        if found:
            raise KeyboardInterrupt
        found.append(kind)
        return find_documents(kind)

    monkeypatch.setattr("lora_factory.demo.starter.find_documents", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_starter(tmp_path)
    assert found and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tasks.yaml", "data"])
def test_what_is_there_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(LoraFactoryError, match=f"{name} is there already; give another folder"):
        write_starter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not list((tmp_path / name).iterdir())
