"""What other programs on the machine do to collection, by how long OpenMP's waiting threads spin.

    python benchmarks/busy.py --spins 1000 2000 10000 --busy 5

The demo's base model learns from Python's own library, with the settings of the demo's collection, alone and beside
busy processes. Every measurement is a process of its own, and a round takes the settings in turn. A step's seconds are
the difference between a collection of many steps and one of few, over the difference in steps. A fair slowdown is that
of a program with a thread on each core where all that want a core have the same share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lora_factory.collection.collect import collect_adapters
from lora_factory.demo.run import FULL
from lora_factory.models.embedded import EMBEDDED_BASE_MODEL
from lora_factory.tasks.task import Task
from lora_factory.utils.versions import versions

FEW, MANY = 2, 12  # steps


def seconds_a_step() -> float:
    """Of a collection in this process, which a first one has warmed up."""
    sources = sorted(Path(os.__file__).parent.glob("[a-d]*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace")[:4000] for path in sources]
    task = Task.from_examples("library", ["Python's library"], train=texts, validation=texts[:2], test=texts[:2])
    spent = {}
    for steps in (FEW, FEW, MANY):
        settings = replace(FULL.collect, steps=steps, snapshots=1)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            collect_adapters([task], EMBEDDED_BASE_MODEL, f"{folder}/zoo", settings)
            spent[steps] = time.perf_counter() - start
    return (spent[MANY] - spent[FEW]) / (MANY - FEW)


def measured(spin: int, busy: int) -> float:
    """Seconds a step of a process with this GOMP_SPINCOUNT beside so many busy ones."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--worker"],
            env=os.environ | {"GOMP_SPINCOUNT": str(spin)},
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        for other in others:
            other.kill()
            other.wait()
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spins", type=int, nargs="+", default=[1000, 2000, 10000], help="values of GOMP_SPINCOUNT")
    parser.add_argument("--busy", type=int, default=5, help="busy processes (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all settings (default: 3)")
    parser.add_argument("--worker", action="store_true", help="only collect, and print the seconds a step")
    options = parser.parse_args()
    if options.worker:
        print(seconds_a_step())
        return
    cores = os.cpu_count() or 1
    fair = (cores + options.busy) / cores
    print(f"{cores} cores, {options.busy} busy processes, fair slowdown {fair:.1f}, {options.rounds} rounds")
    print(versions())
    times: dict[tuple[int, int], list[float]] = {}
    for _ in range(options.rounds):
        for busy in (0, options.busy):
            for spin in options.spins:
                times.setdefault((spin, busy), []).append(measured(spin, busy))
    print("| GOMP_SPINCOUNT | idle: median (range), s a step | beside busy processes | slowdown, in fair ones |")
    print("| --- | --- | --- | --- |")
    for spin in options.spins:
        both = [times[spin, busy] for busy in (0, options.busy)]
        idle, beside = (statistics.median(rows) for rows in both)
        cells = [f"{statistics.median(rows):.2f} ({min(rows):.2f} to {max(rows):.2f})" for rows in both]
        print(f"| {spin} | {cells[0]} | {cells[1]} | {beside / idle / fair:.2f} |")


if __name__ == "__main__":
    main()
