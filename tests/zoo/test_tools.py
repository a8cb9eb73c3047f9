"""Whole zoos: listed, checked, pruned and merged, and there and back over a local hub."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.zoos import COMMIT, layout_of, record_of, snapshots_of
from hub_server.local import LocalHub
from peft import LoraConfig
from safetensors.torch import load_file

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.cli import commands as cli
from lora_factory.errors import LoraFactoryError
from lora_factory.zoo import hub as zoo_hub
from lora_factory.zoo import store
from lora_factory.zoo.store import AdapterZoo
from lora_factory.zoo.tools import merge, prune


@pytest.fixture(scope="module")
def layout() -> AdapterLayout:
    return layout_of()


@pytest.fixture
def zoo(tmp_path: Path, layout: AdapterLayout) -> AdapterZoo:
    return make_zoo(tmp_path / "zoo", layout, ("a", "seed-0"), ("a", "seed-1"), ("b", "seed-0"))


def make_zoo(folder: Path, layout: AdapterLayout, *runs: tuple[str, str]) -> AdapterZoo:
    """A zoo of bfloat16 runs; a run's weights depend on its name alone."""
    zoo = AdapterZoo.create(folder, layout)
    for task, run in runs:
        vectors = snapshots_of(layout, seed=sum(map(ord, task + run))).bfloat16()
        zoo.add_run(record_of(task, run, license="MIT"), vectors, extra_files={"note.txt": "kept"})
    return zoo


def damage(zoo: AdapterZoo, task: str, run: str) -> None:
    path = zoo.folder / task / run / "checkpoints.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def said_by(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    """What a command prints, which ends with this exit code."""
    assert cli.main([str(word) for word in words]) == code
    said = capsys.readouterr()
    return " ".join((said.out + said.err).split())


def test_verify_and_list(zoo: AdapterZoo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert said_by(capsys, 0, "zoo", "verify", "--zoo", zoo.folder) == "3 runs of 2 tasks are whole"
    listed = said_by(capsys, 0, "zoo", "list", "--zoo", zoo.folder)
    assert f"{zoo.layout.size:,} weights on someone/pico" in listed
    assert listed.count("seed-0 │ 3 │ 10 │ 1.500") == 2 and listed.count("MIT") == 3
    damage(zoo, "a", "seed-1")
    said = said_by(capsys, 2, "zoo", "verify", "--zoo", zoo.folder)
    assert f"{zoo.folder / 'a/seed-1/checkpoints.safetensors'} was cut short or altered" in said
    assert "1 problems in" in said and "prune --damaged" in said


def test_prune_by_name(zoo: AdapterZoo, capsys: pytest.CaptureFixture[str]) -> None:
    before = zoo.fingerprint()
    words = ("zoo", "prune", "--zoo", zoo.folder, "--task", "b")
    assert said_by(capsys, 0, *words, "--dry-run").startswith("b/seed-0: removed nothing was changed")
    assert zoo.fingerprint() == before
    assert said_by(capsys, 0, *words) == "b/seed-0: removed"
    assert zoo.tasks == ["a"] and not (zoo.folder / "b").exists()
    assert prune(zoo, runs=["seed-1"]) == ["a/seed-1: removed"]
    assert zoo.runs("a") == ["seed-0"] and sorted(path.name for path in zoo.folder.iterdir()) == ["a", "zoo.json"]


def test_prune_removes_damaged_runs(zoo: AdapterZoo) -> None:
    assert prune(zoo, damaged=True) == []
    damage(zoo, "a", "seed-1")
    (zoo.folder / "b" / "seed-0" / "run.json").write_text("{")
    (zoo.folder / "b" / "seed-0" / "note.txt").unlink()  # without its record, nothing says whose it is
    assert prune(zoo, tasks=["a"], damaged=True)[0].startswith("a/seed-1: removed, since ")
    (line,) = prune(zoo, damaged=True)
    assert "run.json" in line
    assert zoo.tasks == ["a"] and zoo.verify() == []


def test_prune_of_damaged_runs_keeps_what_is_the_users_or_a_newer_versions(zoo: AdapterZoo) -> None:
    record, run = zoo.folder / "a" / "seed-0" / "run.json", zoo.folder / "b" / "seed-0"
    record.write_text(record.read_text().replace('"format_version": 1', '"format_version": 99'))
    assert prune(zoo, damaged=True) == [] and record.is_file()
    assert "pip install --upgrade" in zoo.verify()[0] and "delete" not in zoo.verify()[0]
    (run / "run.json").write_text("{")
    (run / "mine.txt").write_text("mine")
    (run / "note.txt").unlink()
    with pytest.raises(LoraFactoryError, match=r"holds 'mine\.txt'.*move that file elsewhere"):
        prune(zoo, damaged=True)
    assert (run / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["run.json", "checkpoints.safetensors", "adapter_config.json"])
def test_a_run_that_cannot_be_read_now_is_named_and_not_removed(
    zoo: AdapterZoo, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, path = io.open, zoo.folder / "b" / "seed-0" / name

    def failing(file: Any, *words: Any, **options: Any) -> Any:
        if str(file) == str(path):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))
        return opened(file, *words, **options)

    monkeypatch.setattr(io, "open", failing)
    assert prune(AdapterZoo(zoo.folder), damaged=True) == []
    (problem,) = AdapterZoo(zoo.folder).verify()
    assert re.fullmatch(rf"{re.escape(str(path))} cannot be read \(Stale file handle\); let this user .*", problem)
    monkeypatch.undo()
    assert zoo.verify() == []


def test_a_run_that_is_written_anew_while_it_is_read_is_not_damaged(
    zoo: AdapterZoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process keeps the last checkpoint alone, just before a file of the run is hashed."""
    hashed, left = store.sha256_file, iter(("a", "b"))

    def changed_before(path: Path) -> str:
        if path.name == "checkpoints.safetensors" and path.parent.parent.name in left:
            prune(AdapterZoo(zoo.folder), keep_last=1, tasks=[path.parent.parent.name])
        return hashed(path)

    monkeypatch.setattr(store, "sha256_file", changed_before)
    assert zoo.snapshots("a", "seed-0").shape[0] == 1
    assert prune(AdapterZoo(zoo.folder), damaged=True) == []
    assert len(zoo.runs("a")) == 2 and len(zoo.runs("b")) == 1


def test_prune_keeps_the_last_snapshots_bit_for_bit(zoo: AdapterZoo) -> None:
    vectors, others = zoo.snapshots("a", "seed-0"), zoo.snapshots("b")
    assert prune(zoo, tasks=["a"], runs=["seed-0"], keep_last=2) == ["a/seed-0: removed 1 of 3 snapshots"]
    record = zoo.record("a", "seed-0")
    assert (record.snapshot_steps, record.validation_losses) == ((9, 10), (1.5, 1.5))
    assert torch.equal(zoo.snapshots("a", "seed-0"), vectors[1:]) and torch.equal(zoo.snapshots("b"), others)
    run = zoo.folder / "a" / "seed-0"
    assert {tensor.dtype for tensor in load_file(run / "checkpoints.safetensors").values()} == {torch.bfloat16}
    assert (run / "note.txt").read_text() == "kept" and zoo.verify() == []
    assert len(prune(zoo, keep_last=2)) == 2 and prune(zoo, keep_last=2) == []
    damage(zoo, "b", "seed-0")
    with pytest.raises(LoraFactoryError, match="cut short or altered"):
        prune(zoo, keep_last=1)


def test_a_damaged_zoo_of_the_hub_is_not_to_be_mended_in_the_cache(layout: AdapterLayout, tmp_path: Path) -> None:
    folder = tmp_path / "datasets--alice--my-zoo" / "snapshots" / COMMIT
    zoo = make_zoo(folder, layout, ("a", "seed-0"), ("a", "seed-1"), ("a", "seed-2"))
    damage(zoo, "a", "seed-0")
    (folder / "a" / "seed-1" / "note.txt").unlink()
    mend = (
        rf"repository alice/my-zoo is damaged at commit {COMMIT[:12]}; pull another revision of it, or ask its author"
    )
    for message in zoo.verify():
        assert re.search(mend, message) and "delete" not in message
    with pytest.raises(LoraFactoryError, match=mend) as info:
        merge([zoo], tmp_path / "copy")
    assert "prune" not in str(info.value)
    (folder / "a" / "seed-2" / "run.json").write_text("[]")
    with pytest.raises(LoraFactoryError, match=mend):
        zoo.record("a", "seed-2")
    (folder / "zoo.json").unlink()
    with pytest.raises(LoraFactoryError, match="the repository alice/my-zoo has none at that commit") as info:
        AdapterZoo(folder)
    assert "collect" not in str(info.value)


def test_prune_asks_what_to_remove(zoo: AdapterZoo) -> None:
    for options in ({}, {"damaged": True, "keep_last": 1}, {"dry_run": True}):
        with pytest.raises(LoraFactoryError, match="say what to remove"):
            prune(zoo, **options)
    for count in (-1, 0):
        with pytest.raises(LoraFactoryError, match=f"^keep_last={count} must be 1 or more"):
            prune(zoo, tasks=["a"], keep_last=count)
    assert zoo.runs("a")
    with pytest.raises(LoraFactoryError, match="no task 'c'"):
        prune(zoo, tasks=["c"])
    with pytest.raises(LoraFactoryError, match="no run named seed-7"):
        prune(zoo, runs=["seed-0", "seed-7"])
    assert len(zoo.tasks) == 2


def test_merging_parts_gives_the_whole(
    zoo: AdapterZoo, layout: AdapterLayout, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_zoo(tmp_path / "one", layout, ("a", "seed-0"), ("b", "seed-0"))
    make_zoo(tmp_path / "two", layout, ("a", "seed-1"), ("b", "seed-0"))
    words = ("zoo", "merge", tmp_path / "one", tmp_path / "two", "--output-dir", tmp_path / "all")
    for _ in range(2):
        assert said_by(capsys, 0, *words) == f"{tmp_path / 'all'} has 3 runs of 2 tasks"
        assert AdapterZoo(tmp_path / "all").fingerprint() == zoo.fingerprint()
    assert AdapterZoo(tmp_path / "all").verify() == []


def test_merging_names_conflicts_and_writes_nothing(zoo: AdapterZoo, layout: AdapterLayout, tmp_path: Path) -> None:
    other = AdapterZoo.create(tmp_path / "other", layout)
    other.add_run(record_of("b"), snapshots_of(layout, seed=1))
    other.add_run(record_of("c"), snapshots_of(layout, seed=1))
    with pytest.raises(LoraFactoryError, match=r"1 runs have the same name .*b/seed-0 of .*zoo and .*other"):
        merge([zoo, other], tmp_path / "all")
    strangers = (layout_of(r=3), replace(layout, base_revision=None), replace(layout, base_model="someone/else"))
    for number, stranger in enumerate(strangers):
        with pytest.raises(LoraFactoryError, match="merge zoos of one layout"):
            merge([zoo, AdapterZoo.create(tmp_path / str(number), stranger)], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    damage(other, "c", "seed-0")
    with pytest.raises(LoraFactoryError, match=r"c/seed-0/checkpoints.safetensors was cut short or altered"):
        merge([other], tmp_path / "all")
    assert AdapterZoo(tmp_path / "all").tasks == ["b"]
    with pytest.raises(LoraFactoryError, match="nothing to merge"):
        merge([], tmp_path / "all")


def test_a_link_out_of_a_zoo_is_not_followed(zoo: AdapterZoo, layout: AdapterLayout, tmp_path: Path) -> None:
    note, private = zoo.folder / "b" / "seed-0" / "note.txt", tmp_path / "private"
    note.rename(private)
    note.symlink_to(private)
    with pytest.raises(LoraFactoryError, match=r"note\.txt is a link to .*private, outside of its folder"):
        merge([zoo], tmp_path / "all")
    assert not (tmp_path / "all" / "b" / "seed-0").exists()
    with pytest.raises(LoraFactoryError, match="outside of its folder"):
        prune(zoo, tasks=["b"], keep_last=1)
    note.unlink()
    with pytest.raises(LoraFactoryError, match=r"note\.txt is missing"):
        merge([zoo], tmp_path / "more")


def test_push_and_pull(hub: LocalHub, zoo: AdapterZoo, tmp_path: Path) -> None:
    pulled = tmp_path / "pulled"
    code = f"""
from lora_factory import AdapterZoo, LoraFactoryError
from lora_factory.cli import commands as cli
def attempt(*arguments, **options):
    try:
        return AdapterZoo.from_hub(*arguments, **options).fingerprint()
    except LoraFactoryError as error:
        return str(error)
codes = [cli.main(["zoo", "push", "--zoo", {str(zoo.folder)!r}, "--repo-id", "alice/zoo"])]
codes += [cli.main(["zoo", "pull", "--repo-id", "alice/zoo", "--output-dir", {str(pulled)!r}])]
result = [codes, attempt("alice/zoo"), attempt("alice/none"), attempt("a b"), attempt("alice/zoo", revision="v9")]
"""
    codes, fingerprint, missing, no_id, no_revision = hub.evaluate(code, timeout=300.0)
    assert codes == [0, 0]
    opened = AdapterZoo(pulled)
    assert fingerprint == zoo.fingerprint() == opened.fingerprint() and opened.verify() == []
    assert not any(path.is_symlink() for path in pulled.rglob("*"))
    assert "there is no repository alice/none" in missing and "'a b' is neither a folder nor a Hub id" in no_id
    assert "no such revision" in no_revision


def test_what_is_pulled_is_not_trusted(zoo: AdapterZoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which names of a repository are asked for, and with which limits; `hub.download_files` applies these."""
    asked: dict[str, int] = {}
    names = ["zoo.json", "a/seed-0/run.json", "README.md", "a/seed-0/evil.py", "x.py", "a/b/seed-0/run.json"]
    names += [f"a/seed-0/{name}" for name in zoo.record("a", "seed-0").sha256]

    def download(repo_id: str, limit_of: Callable[[str], int], **_: object) -> Path:
        asked.update({name: limit for name in names if (limit := limit_of(name))})
        return zoo.folder

    monkeypatch.setattr(zoo_hub, "download_files", download)
    AdapterZoo.from_hub("alice/zoo")
    assert set(asked) == set(names) - {"README.md", "a/seed-0/evil.py", "x.py", "a/b/seed-0/run.json"}
    assert asked["a/seed-0/checkpoints.safetensors"] == (16 << 20) + 3 * 8 * zoo.layout.size
    (zoo.folder / "b" / "seed-0" / "note.txt").unlink()
    with pytest.raises(LoraFactoryError, match=r"lacks 1 files of its runs, first b/seed-0/note.txt"):
        AdapterZoo.from_hub("alice/zoo")


def test_a_run_of_many_modules_is_pushed_and_pulled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are larger than their numbers: a safetensors file names every tensor in its header."""
    paths = [f"experts.{number}.{'deep.' * 50}proj" for number in range(2000)]
    weights = {}
    for path in paths:
        weights[f"base_model.model.{path}.lora_A.weight"] = torch.zeros(1, 1)
        weights[f"base_model.model.{path}.lora_B.weight"] = torch.zeros(1, 1)
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["proj"])
    layout = AdapterLayout.from_state_dict(weights, config, base_model="someone/pico", base_revision=COMMIT)
    zoo = make_zoo(tmp_path / "zoo", layout, ("a", "seed-0"))
    sizes = {f"a/seed-0/{path.name}": path.stat().st_size for path in (zoo.folder / "a" / "seed-0").iterdir()}
    assert sizes["a/seed-0/checkpoints.safetensors"] > (1 << 20) + 3 * 4 * layout.size
    assert zoo_hub.zoo_writer(zoo)(tmp_path / "pushed", "zoo") == set(sizes)
    allowed: dict[str, int] = {}

    def download(repo_id: str, limit_of: Callable[[str], int], **_: object) -> Path:
        allowed.update({name: limit_of(name) for name in sizes})
        return zoo.folder

    monkeypatch.setattr(zoo_hub, "download_files", download)
    AdapterZoo.from_hub("alice/zoo")
    assert all(allowed[name] >= size for name, size in sizes.items())


def test_adapters_are_imported_from_the_hub(hub: LocalHub, zoo: AdapterZoo, tmp_path: Path) -> None:
    run = zoo.folder / "a" / "seed-0"
    files = {name: (run / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    card = {"README.md": b"# T\n\nWrites letters to pirates."}
    big = {"adapter_config.json": b" " * (17 << 20), "adapter_model.safetensors": b""}
    checkpoint = {f"checkpoint-7/{name}": content for name, content in files.items()}
    first = hub.add_repo("alice/letters", {**files, **checkpoint, **card, "evil.py": b"1"}).find().oid
    hub.commit("alice/letters", {"adapter_config.json": b"{}"})
    hub.add_repo("alice/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    hub.add_repo("alice/big", big)
    hub.add_repo("alice/empty", {"README.md": b"# T"})
    code = f"""
from lora_factory.zoo.importing import import_adapters
sources = ["alice/letters@{first}", "alice/pickled", "alice/big", "alice/empty"]
report = import_adapters(sources, {str(tmp_path / "imported")!r})
result = [report.imported, report.refused]
"""
    imported, refused = hub.evaluate(code, timeout=300.0)
    assert imported == {f"alice/letters@{first}": "letters/imported"}
    assert "hf download alice/pickled --local-dir pickled && python -c" in refused["alice/pickled"]
    assert "adapter_config.json has 17825792 bytes, at most" in refused["alice/big"]
    assert "adapter_config.json is missing" in refused["alice/empty"]
    taken = AdapterZoo(tmp_path / "imported")
    assert taken.layout.base_revision == COMMIT and taken.descriptions("letters") == ("Writes letters to pirates.",)
    assert taken.record("letters", "imported").snapshot_steps == (7,)
    origin = json.loads((taken.folder / "letters/imported/import.json").read_text())
    assert origin["commit"] == first and not origin["padded"]
    assert torch.equal(taken.final("letters", "imported"), zoo.final("a", "seed-0"))
    assert hub.log.matching("/resolve/.*adapter_model.safetensors") and not hub.log.matching("evil")
