"""Leases: one holder at a time, and none that outlives its process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_factory.leases import Lease, Leases


def write_lease(folder: Path, **changes: object) -> Path:
    """The lease file that this process would write, with some entries changed."""
    lease = Leases(folder).claim("run")
    path = folder / "run.1"
    assert lease is not None and lease.path == path
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lease_is_held_by_one_until_it_is_released(tmp_path: Path) -> None:
    first, second = Leases(tmp_path / "leases"), Leases(tmp_path / "leases")
    lease = first.claim("run")
    assert lease is not None
    with lease:
        assert second.claim("run") is None and first.claim("run") is None
        assert second.claim("other") is not None
    assert second.claim("run") is not None


@pytest.mark.parametrize("changes", [{"pid": None}, {"started": 1.0}], ids=["gone", "another one with its id"])
def test_a_dead_process_of_this_host_loses_its_lease_at_once(
    changes: dict[str, object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lease(tmp_path, **({"pid": dead_process()} if "pid" in changes else changes))
    holder = json.loads(path.read_text())
    with caplog.at_level(logging.WARNING):
        assert Leases(tmp_path).claim("run") is not None
    assert f"taking over run from process {holder['pid']} on {holder['host'].split()[0]}" in caplog.text
    assert not path.exists()


@pytest.mark.parametrize("content", ["", '{"host": "elsewhere", "pid": 1, "started": 0}'], ids=["empty", "far away"])
def test_a_lease_nobody_touches_is_taken_over(content: str, tmp_path: Path) -> None:
    path = write_lease(tmp_path)
    path.write_text(content)
    patient, impatient = Leases(tmp_path, stale_seconds=3600), Leases(tmp_path, stale_seconds=0)
    for second in range(3):  # touched between two looks: alive
        os.utime(path, (second, second))
        assert impatient.claim("run") is None and patient.claim("run") is None
    time.sleep(0.01)
    assert patient.claim("run") is None
    assert impatient.claim("run") is not None


def test_one_of_many_takes_a_dead_ones_lease(tmp_path: Path) -> None:
    write_lease(tmp_path, pid=dead_process())
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: Leases(tmp_path).claim("run"), range(16)))
    assert len([claim for claim in claims if claim]) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_holder_touches_its_lease_and_sees_when_it_is_lost(tmp_path: Path) -> None:
    path = write_lease(tmp_path)
    os.utime(path, (0, 0))
    with Lease(path, 0.01) as lease:
        wait_until(lambda: path.stat().st_mtime > 0)
        assert not lease.lost
        path.unlink()
        wait_until(lambda: lease.lost)


def wait_until(condition: object, patience: float = 30.0) -> None:
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
