import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.tasks.local_rows import read_paragraphs
from lora_factory.utils import files
from lora_factory.utils.files import atomic_folder, write_json, write_text
from lora_factory.utils.folders import FolderKind
from lora_factory.utils.paths import local_path, safe_name, sha256_file, sha256_text
from lora_factory.utils.safe_files import read_json

OWN = FolderKind("a test's folder", "old|new|sub/old|file")


@pytest.mark.parametrize("name", ["a", "seed-0", "c-headers", "Python_3.11", "0", "x" * 100])
def test_safe_name_accepts(name):
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".tmp-seed-0",
        "-a",
        "_a",
        "a/b",
        "a\\b",
        "a..b",
        "a b",
        "a\n",
        "é",
        "x" * 101,
        "a\0b",
        "C:",
        None,
    ],
)
def test_safe_name_refuses(name):
    with pytest.raises(LoraFactoryError, match="cannot be a file name"):
        safe_name(name)


@pytest.mark.parametrize("path", ["x" * 256, "é" * 128, "a/" + "x" * 300 + "/b", "ab/" * 1400, "a\0b"])
def test_a_path_that_no_file_system_takes_is_refused(path):
    with pytest.raises(
        LoraFactoryError, match="NUL character, or a name of more than 255 bytes, or has more than 4,095"
    ):
        local_path(path)
    for fits in ("x" * 255, "é" * 127, "ab/" * 1300):
        assert str(local_path(fits)) == fits.rstrip("/")


@given(st.text(max_size=120))
def test_a_safe_name_stays_inside_its_folder(name):
    try:
        safe_name(name)
    except LoraFactoryError:
        return
    assert Path("/zoo", name).parent == Path("/zoo")
    assert not name.startswith(".")
    assert os.path.normpath(f"/zoo/{name}") == f"/zoo/{name}"


def test_text_round_trip_keeps_newlines_and_replaces(tmp_path):
    path = tmp_path / "deep" / "er" / "text.txt"
    write_text(path, "old")
    write_text(path, "é\r\nb\n")
    assert path.read_bytes() == "é\r\nb\n".encode()
    assert sha256_file(path) == sha256_text("é\r\nb\n") == hashlib.sha256("é\r\nb\n".encode()).hexdigest()
    assert os.listdir(path.parent) == ["text.txt"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@given(json_values)
def test_json_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    write_json(path, value)
    assert read_json(path) == value


def test_json_keeps_the_order_of_keys(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    assert list(read_json(tmp_path / "a.json")) == ["b", "a"]


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": object()}])
def test_what_json_does_not_know_is_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(LoraFactoryError, match=r"a\.json was not written"):
        write_json(path, value)
    assert read_json(path) == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_reading_damaged_or_missing_json_teaches(tmp_path):
    (tmp_path / "cut.json").write_text('{"a": ')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("cut.json", "binary.json"):
        with pytest.raises(LoraFactoryError, match=f"{name}.*cut short or altered"):
            read_json(tmp_path / name)
    with pytest.raises(LoraFactoryError, match=r"none\.json cannot be read"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize("number", ["1" * 300, "-" + "1" * 300, "1" * 300 + ".5", "1e400"])
def test_digits_beyond_any_number_are_refused_and_as_a_text_they_are_none(tmp_path, number):
    write_json(tmp_path / "text.json", {number: [number, 1, -2, 0.5]})
    assert read_json(tmp_path / "text.json") == {number: [number, 1, -2, 0.5]}
    (tmp_path / "number.json").write_text(f'{{"a": {number}}}')
    with pytest.raises(LoraFactoryError, match="a number"):
        read_json(tmp_path / "number.json")


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(StorageError, match="disk full"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_atomic_folder_appears_as_a_whole(tmp_path):
    path = tmp_path / "parent" / "run"
    with atomic_folder(path) as folder:
        assert folder.parent == path.parent
        assert folder.name.startswith(".tmp-")
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not path.exists()
    assert (path / "sub" / "file").read_text() == "x"
    assert os.listdir(path.parent) == ["run"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_inside_atomic_folder_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_folder(tmp_path / "run") as folder:
        (folder / "file").write_text("x")
        raise error
    assert os.listdir(tmp_path) == []


def test_failure_inside_an_overwrite_leaves_the_old_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "run", OWN, overwrite=True) as folder:
        (folder / "new").write_text("new")
        raise RuntimeError
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["old"]


def test_overwrite_replaces_the_folder_as_a_whole(tmp_path):
    (tmp_path / "run" / "sub").mkdir(parents=True)
    (tmp_path / "run" / "sub" / "old").write_text("old")
    with atomic_folder(tmp_path / "run", OWN, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["new"]


def test_when_the_last_rename_fails_the_old_folder_comes_back(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    rename = Path.rename

    def refuse_new(self, target):
        if (self / "new").exists():
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # as on file systems that know no exchange
    with pytest.raises(StorageError, match="no"), atomic_folder(tmp_path / "run", OWN, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert os.listdir(tmp_path) == ["run"]
    assert os.listdir(tmp_path / "run") == ["old"]


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step on Linux alone")
def test_a_folder_that_is_replaced_is_never_missing(tmp_path):
    run, missing, done = tmp_path / "run", [], threading.Event()
    filled(run)

    def look():
        while not done.is_set():
            try:
                os.stat(run)
            except FileNotFoundError:
                missing.append(True)

    looker = threading.Thread(target=look)
    looker.start()
    for _ in range(300):
        with atomic_folder(run, OWN, overwrite=True) as folder:
            (folder / "new").touch()
    done.set()
    looker.join()
    assert not missing and os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_what_others_write_in_the_last_moment_stays(tmp_path, monkeypatch, exchanges):
    run, check = tmp_path / "run", files.check_folder
    filled(run)

    def check_too_early(*words, **options):
        found = check(*words, **options)
        (run / "theirs").touch()
        return found

    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    with (
        pytest.raises(LoraFactoryError, match="theirs has just been written by somebody else"),
        atomic_folder(run, OWN, overwrite=True) as folder,
    ):
        (folder / "new").touch()
        monkeypatch.setattr(files, "check_folder", check_too_early)
    assert os.listdir(tmp_path) == ["run"] and sorted(os.listdir(run)) == ["old", "theirs"]


def filled(path):
    path.mkdir()
    (path / "old").touch()


@pytest.mark.parametrize("make", [filled, Path.touch])
def test_what_is_there_is_refused_before_any_work(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(LoraFactoryError, match=r"is (already )?there"), atomic_folder(tmp_path / "run"):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(LoraFactoryError, match="already there"), atomic_folder(tmp_path / "run"):
        filled(tmp_path / "run")
    assert os.listdir(tmp_path) == ["run"]


def test_a_file_or_link_is_never_overwritten_by_a_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for name in ("file", "link"):
        with (
            pytest.raises(LoraFactoryError, match="is not a folder"),
            atomic_folder(tmp_path / name, OWN, overwrite=True),
        ):
            pytest.fail("the block must not run")


def test_others_can_read_what_was_written(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "run") as folder:
            write_text(folder / "file", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "run" / "file").stat().st_mode) == 0o644


def test_kill_inside_atomic_folder_leaves_only_a_temporary_folder_and_the_next_try_succeeds(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from lora_factory.utils.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'run.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = str(Path(files.__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], cwd=root, check=False)
    assert result.returncode == -9
    assert [name[:9] for name in os.listdir(tmp_path)] == [".tmp-run-"]
    with atomic_folder(tmp_path / "run") as folder:
        write_text(folder / "run.json", "whole")
    assert (tmp_path / "run" / "run.json").read_text() == "whole"


def test_the_module_imports_nothing_heavy():
    root = str(Path(files.__file__).parents[2])
    script = "import sys, lora_factory.utils.files; assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def test_paragraphs_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "examples.txt"
    file.write_text("\n\none\n  two\n \n\nthree\n", encoding="utf-8")
    assert read_paragraphs(file) == ["one\n  two", "three"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(LoraFactoryError, match="name a text file"):
        read_paragraphs(file)
    file.write_text(" \n\n")
    with pytest.raises(LoraFactoryError, match="is empty"):
        read_paragraphs(file)
    with pytest.raises(LoraFactoryError, match="cannot read"):
        read_paragraphs(tmp_path)


def test_half_of_a_surrogate_pair_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(LoraFactoryError, match="surrogate pair"), atomic_folder(f"{tmp_path}/\ud800"):
        pass
    assert local_path("\udcff") == Path("\udcff")  # how Python reads a name that is no UTF-8
