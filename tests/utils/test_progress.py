"""Progress: lines in a log, and nothing of what nobody asked for."""

from __future__ import annotations

import re
import sys

import pytest

from lora_factory.utils import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test turns."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    bar = progress.progress_bar(total=1000, desc="train")
    for _ in range(1000):
        clock[0] += 0.03125
        bar.update()
        bar.set_postfix(loss="1.5")
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" steps")[0] for line in lines] == [f"train: {n}/1000" for n in (320, 640, 960, 1000)]
    assert "00:10 passed, 00:21 left, loss=1.5" in lines[0]
    assert not any(re.search(r"[\r|\x1b]", line) for line in lines)


def test_what_is_done_at_once_leaves_no_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress.progress_bar(range(50), desc="short"):
        clock[0] += 0.1
    bar = progress.progress_bar(total=3, desc="collect")
    bar.n = 2
    bar.refresh()
    bar.close()
    assert capsys.readouterr().err == ""


def test_a_terminal_shows_nothing_of_what_is_done_at_once(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for step in (0.1, 1.0):
        bar = progress.progress_bar(total=3, desc="measure")
        for _ in range(3):
            clock[0] += step
            bar.update()
            bar.set_postfix(loss="1.5")
        bar.close()
        shown = capsys.readouterr().err
        assert shown.endswith("\n") is ("measure" in shown) is (step == 1.0)


def test_a_bar_within_a_bar_prints_lines_of_its_own(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(total=2, desc="outer", unit="runs") as outer:
        with progress.progress_bar(total=2, desc="inner", leave=None) as inner:
            clock[0] += 11
            inner.update()
            outer.update()
        clock[0] += 11
        outer.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" passed")[0] for line in lines] == [
        "inner: 1/2 steps, 00:11",
        "outer: 1/2 runs, 00:11",
        "outer: 2/2 runs, 00:22",
    ]


def test_progress_can_be_hidden(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_quiet", False)
    progress.hide_progress()
    for _ in progress.progress_bar(range(3)):
        clock[0] += 20
    assert capsys.readouterr().err == ""
