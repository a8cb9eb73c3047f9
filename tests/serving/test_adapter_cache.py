"""Folders of adapters on first use: once under concurrency, bounded, never a path of a name."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_factory.adapters.folder import load_adapter
from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.serving import adapter_cache
from lora_factory.serving.adapter_cache import AdapterCache

pytestmark = pytest.mark.filterwarnings("ignore:the text .* is far from every task")


class User:
    """Somebody who reads a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder


def folders(parent: Path) -> set[str]:
    return {path.parent.name for path in parent.glob("*/*/adapter_config.json")}


def test_a_folder_is_what_the_generator_writes(generator_folder: Path, tmp_path: Path) -> None:
    cache = AdapterCache(str(generator_folder), parent=tmp_path)
    user = cache.lend("Legal notices", User)
    layout, weights = load_adapter(user.folder)
    expected = CVAELoRAGenerator.from_pretrained(generator_folder).generate_state_dict("Legal notices")
    assert layout.flatten(weights).equal(layout.flatten(expected))


def test_concurrent_threads_generate_each_text_once(
    generator_folder: Path, tmp_path: Path, generated: list[str]
) -> None:
    cache, texts = AdapterCache(str(generator_folder), parent=tmp_path), [f"text {n % 5}" for n in range(60)]
    start = threading.Barrier(12)

    def lend(number: int) -> list[User]:
        start.wait()
        return [cache.lend(text, User) for text in texts[number::12]]

    with ThreadPoolExecutor(12) as pool:
        users = [user for found in pool.map(lend, range(12)) for user in found]
    assert sorted(generated) == sorted(set(texts))
    assert {user.folder.name for user in users} == folders(tmp_path)
    named = {json.loads((user.folder / "generation.json").read_text())["text"] for user in users}
    assert named == set(texts)


@pytest.mark.parametrize(
    "text",
    [
        "../../../etc/passwd",
        "/etc/passwd",
        "..",
        "a/b\\c",
        "~root",
        "C:\\windows",
        "%2e%2e%2f",
        "$(touch x)",
        "con\n\r\x1b[31m",
        "Übersetze ins 日本語 🦜 \u202egnp.exe",
    ],
)
def test_a_text_is_never_a_path(generator_folder: Path, tmp_path: Path, text: str) -> None:
    before = set(tmp_path.parent.iterdir())
    (tmp_path / "cache").mkdir()
    cache = AdapterCache(str(generator_folder), parent=tmp_path / "cache")
    user = cache.lend(text, User)
    assert user.folder.parent.parent == tmp_path / "cache"
    assert len(user.folder.name) == 64 and set(user.folder.name) <= set("0123456789abcdef")
    assert json.loads((user.folder / "generation.json").read_text(encoding="utf-8"))["text"] == text
    assert set(tmp_path.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\t", "is empty"),
        (None, "is empty"),
        ("x" * 10_000_000, "10,000,000 characters"),
        ("a\0b", "NUL"),
        ("a\ud800b", "surrogate"),
    ],
    ids=["empty", "blank", "none", "10 MB", "NUL", "surrogate"],
)
def test_what_is_no_text_writes_and_loads_nothing(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LoraFactoryError, match=message) as error:
        AdapterCache("no/generator", parent=tmp_path).lend(text, User)
    assert len(str(error.value)) < 300
    assert not list(tmp_path.iterdir())


def test_the_least_recently_used_folder_goes_and_none_in_use(
    generator_folder: Path, tmp_path: Path, generated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_cache, "MAX_ADAPTERS", 3)
    cache = AdapterCache(str(generator_folder), parent=tmp_path)
    kept = {text: cache.lend(text, User) for text in ("one", "two", "three")}
    with pytest.raises(LoraFactoryError, match=r"no room .* 3 adapters \(at most 3\) .* in use; unload one"):
        cache.lend("four", User)
    names = {text: user.folder.name for text, user in kept.items()}
    assert folders(tmp_path) == set(names.values())
    cache.lend("one", User)  # used by two, of whom one lives
    gc.collect()
    del kept["two"], kept["three"]
    gc.collect()
    cache.lend("two", User)  # used again, and later than "three"
    gc.collect()
    kept["four"] = cache.lend("four", User)
    assert folders(tmp_path) == {names["one"], names["two"], kept["four"].folder.name}
    kept["three"] = cache.lend("three", User)
    assert folders(tmp_path) == {names["one"], names["three"], kept["four"].folder.name}
    assert generated == ["one", "two", "three", "four", "three"]


def test_the_size_is_bounded(generator_folder: Path, tmp_path: Path) -> None:
    first = AdapterCache(str(generator_folder), parent=tmp_path)
    size = sum(file.stat().st_size for file in first.lend("one", User).folder.iterdir())
    cache = AdapterCache(str(generator_folder), parent=tmp_path, max_bytes=3 * size + (64 << 10))
    for number in range(6):
        cache.lend(f"text {number}", User)
        gc.collect()
        written = [file for file in cache.root.rglob("*") if file.is_file() and file.name != ".lock"]
        assert sum(file.stat().st_size for file in written) <= 3 * size + (64 << 10)
    with pytest.raises(LoraFactoryError, match="no room"):
        AdapterCache(str(generator_folder), parent=tmp_path, max_bytes=1000).lend("one", User)


def test_a_folder_that_was_removed_is_made_again(generator_folder: Path, tmp_path: Path, generated: list[str]) -> None:
    cache = AdapterCache(str(generator_folder), parent=tmp_path)
    user = cache.lend("one", User)
    for file in user.folder.iterdir():
        file.unlink()
    user.folder.rmdir()
    assert (cache.lend("one", User).folder / "adapter_model.safetensors").is_file()
    assert generated == ["one", "one"]


def test_a_missing_generator_or_place_is_an_error_and_mended_later(generator_folder: Path, tmp_path: Path) -> None:
    cache = AdapterCache(str(tmp_path / "later"), parent=tmp_path / "place")
    with pytest.raises(LoraFactoryError, match="cannot load a generator"):
        cache.lend("one", User)
    (tmp_path / "later").symlink_to(generator_folder)
    with pytest.raises(StorageError, match="place"):
        cache.lend("one", User)
    (tmp_path / "place").mkdir()
    assert cache.lend("one", User).folder.is_dir()


def test_folders_go_with_their_process_also_after_a_kill(generator_folder: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        "from lora_factory.serving.adapter_cache import AdapterCache\n"
        "cache = AdapterCache(sys.argv[1], parent=Path(sys.argv[2]))\n"
        "cache.lend('one', type('User', (), {'__init__': lambda self, folder: print(folder, flush=True)}))\n"
        "if sys.argv[3] == 'wait': time.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, str(generator_folder), str(tmp_path)]
    ended = subprocess.run([*words, "end"], check=True, capture_output=True, text=True)
    assert not Path(ended.stdout.strip()).parent.exists()
    with subprocess.Popen([*words, "wait"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        assert left.is_dir()
        cache = AdapterCache(str(generator_folder), parent=tmp_path)
        own = cache.root
        assert left.is_dir(), "it belongs to a process that lives"
        process.send_signal(signal.SIGKILL)
    assert left.is_dir()
    other = AdapterCache(str(generator_folder), parent=tmp_path)
    assert other.root.is_dir() and own.is_dir() and not left.parent.exists()


def test_a_folder_with_anything_else_in_it_stays(generator_folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "lora-factory-notes"
    mine.mkdir()
    (mine / ".lock").touch()
    (mine / "chapter.txt").write_text("mine")
    assert AdapterCache(str(generator_folder), parent=tmp_path).root.is_dir()
    assert (mine / "chapter.txt").read_text() == "mine"


def test_folders_go_with_their_cache(generator_folder: Path, tmp_path: Path) -> None:
    cache = AdapterCache(str(generator_folder), parent=tmp_path)
    root = cache.lend("one", User).folder.parent
    assert oct(root.stat().st_mode & 0o777) == "0o700"
    del cache
    gc.collect()
    assert not root.exists()
