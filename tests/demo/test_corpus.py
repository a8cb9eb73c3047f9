from __future__ import annotations

import re

import pytest

from lora_factory.demo import corpus
from lora_factory.demo.corpus import build_corpus, find_documents
from lora_factory.demo.text_kinds import KINDS, UNSEEN_KIND, Candidate, TextKind
from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.task_file import load_tasks
from lora_factory.tasks.text import SPLITS

NAMES = [kind.name for kind in KINDS]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "tasks"
    seen, unseen = build_corpus(folder)
    return folder, seen, unseen


def made_up_kind(name, count=90, line="word{number} of line {part} in {name} number{number}"):
    def read(number):
        letters = "".join(chr(97 + int(digit)) for digit in str(number))
        return "\n".join(line.format(name=name, number=letters, part="x" * part) for part in range(5, 45))

    candidates = [Candidate(f"{name}/{number}", lambda number=number: read(number)) for number in range(count)]
    return TextKind(name, (f"Text of {name}.",), lambda: candidates)


@pytest.fixture
def made_up(monkeypatch):
    kinds = tuple(made_up_kind(name) for name in ("python_code", "licences", "cython", UNSEEN_KIND))
    monkeypatch.setattr(corpus, "KINDS", kinds)
    return kinds


def test_this_environment_has_at_least_seven_kinds_and_the_unseen_one(built):
    folder, seen, unseen = built
    assert len(seen) >= 6
    assert unseen.name == UNSEEN_KIND
    assert [task.name for task in seen] == [name for name in NAMES if name in {task.name for task in seen}]
    assert [task.name for task in load_tasks(folder)] == [*(task.name for task in seen), unseen.name]


def test_splits_have_text_are_disjoint_and_keep_their_size(built):
    _, seen, unseen = built
    for task in [*seen, unseen]:
        texts = {split: [example.completion for example in task.examples(split)] for split in SPLITS}
        sizes = {split: sum(len(text.encode()) for text in texts[split]) for split in SPLITS}
        assert sum(map(len, texts.values())) >= 40 and sum(sizes.values()) >= 140_000
        assert (
            sizes["train"] <= 400_000 and 8_000 <= sizes["validation"] <= 40_000 and 8_000 <= sizes["test"] <= 40_000
        )
        assert max(len(text.encode()) for split in SPLITS for text in texts[split]) <= 5_001
        every = [text for split in SPLITS for text in texts[split]]
        assert len(every) == len(set(every))


def test_held_out_documents_are_mostly_their_own(built):
    _, seen, unseen = built
    for task in [*seen, unseen]:
        train = {line.strip().lower() for e in task.examples("train") for line in e.completion.splitlines()}
        for example in task.examples("test"):
            lines = {line.strip().lower() for line in example.completion.splitlines() if len(line.strip()) >= 25}
            assert 2 * len(lines & train) <= len(lines)


def test_descriptions_are_varied_and_belong_to_one_kind():
    every = [text for kind in KINDS for text in kind.descriptions]
    assert len(every) == len(set(every)) and all(len(kind.descriptions) >= 5 for kind in KINDS)
    assert all(re.fullmatch(r"[A-Z].{30,}\.", text) for text in every)


def test_a_second_call_reuses_what_is_there_and_limits_what_it_returns(made_up, tmp_path):
    seen, unseen = build_corpus(tmp_path / "tasks")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "tasks").rglob("*")}
    one, again = build_corpus(tmp_path / "tasks", seen=1)
    assert [task.name for task in one] == ["python_code"] and again.fingerprint() == unseen.fingerprint()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "tasks").rglob("*")} == before
    assert [task.name for task in seen] == ["python_code", "licences", "cython"]


def test_the_same_environment_gives_the_same_text(made_up, tmp_path):
    for name in ("a", "b"):
        build_corpus(tmp_path / name)
    files = [file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*") if file.is_file()]
    assert len(files) == 15
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_a_damaged_corpus_is_written_again(made_up, tmp_path):
    _, unseen = build_corpus(tmp_path / "tasks")
    file = tmp_path / "tasks" / UNSEEN_KIND / "test.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert build_corpus(tmp_path / "tasks")[1].fingerprint() == unseen.fingerprint()
    file.unlink()
    assert build_corpus(tmp_path / "tasks")[1].fingerprint() == unseen.fingerprint()
    (tmp_path / "tasks" / "SHA256SUMS").unlink()
    build_corpus(tmp_path / "tasks")
    assert file.read_bytes() == whole and (tmp_path / "tasks" / "SHA256SUMS").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]


def test_a_folder_with_other_things_is_left_alone(made_up, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(LoraFactoryError, match=r"holds 'thesis.tex'.*another folder"):
        build_corpus(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_little_text_is_an_error(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "KINDS", made_up[:2])
    with pytest.raises(LoraFactoryError, match="2 kinds of text"):
        build_corpus(tmp_path / "tasks")
    assert not list(tmp_path.iterdir())


def test_generated_minified_repeated_and_unreadable_texts_are_left_out():
    good = made_up_kind("good")
    texts = [candidate.read() for candidate in good.candidates()]
    bad = ["# @generated by a tool\n" + texts[0], "x" * 5_000, texts[1] + "\n\n", "0 1 2 3\n" * 400, None, "short"]
    candidates = [*good.candidates(), *(Candidate(f"bad/{n}", lambda text=text: text) for n, text in enumerate(bad))]
    found = find_documents(TextKind("mixed", ("Mixed.",), lambda: candidates))
    assert found is not None
    assert sorted(text for split in SPLITS for text in found[split]) == sorted(text + "\n" for text in texts)


def test_a_kind_with_too_few_documents_is_not_there():
    assert find_documents(made_up_kind("rare", count=39)) is None
