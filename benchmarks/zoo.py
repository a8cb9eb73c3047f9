"""What a large zoo costs: time to open, to read a snapshot, to make statistics and batches, and peak memory.

    python benchmarks/zoo.py --folder /tmp/zoo-benchmark

Synthetic zoos of 125, 250 and 500 tasks, 50 snapshots each, 1.97 million weights a snapshot (rank 16 on two modules of
each of 30 layers of width 1024): 49, 98 and 197 GB of float32. Only a few different files are written; the tasks'
files are hard links to them, so that the zoos take 2 GB of the disk, and after the first tasks all is read from the
page cache. Every line is measured in a process of its own; its memory is the peak of the resident set (VmHWM), of
which the libraries alone take what the line of 0 tasks says. "fit" is the whole
training on the zoo's weights: the joint factorisation, the cores of all snapshots, and a few steps of the network.
"read" is no more than reading all files.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from performance import make_layout
from rich.console import Console
from rich.table import Table

from lora_factory import __version__
from lora_factory.arguments import TrainArguments
from lora_factory.utils.files import write_json
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import AdapterZoo

SNAPSHOTS = 50
LAYOUT = make_layout(30, {"q_proj": (1024, 1024), "v_proj": (1024, 1024)}, 16)
STEPS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("zoo-benchmark"), help="where the zoos are made")
    parser.add_argument("--tasks", default="125,250,500", help="sizes of the zoos (default: 125,250,500)")
    parser.add_argument("--distinct", type=int, default=5, help="different files, 400 MB each (default: 5)")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.folder / str(options.measure), options.measure)))
        return
    columns = ("tasks", "open ms", "snapshot ms", "read s", "fit s", "peak memory GB")
    table = Table(title=f"{SNAPSHOTS} snapshots of {LAYOUT.size:,} weights per task")
    for column in columns:
        table.add_column(column, justify="right")
    for count in (0, *map(int, options.tasks.split(","))):
        if count and not (options.folder / str(count)).exists():
            make_zoo(options.folder, count, options.distinct)
        command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", str(count)]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(result.stdout.splitlines()[-1])
        table.add_row(str(count), *(f"{figures[name]:.2f}" if name in figures else "" for name in columns[1:]))
    Console(width=110).print(table)
    Console().print(f"lora-factory {__version__}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")


def make_zoo(folder: Path, count: int, distinct: int) -> None:
    """A zoo of ``count`` tasks whose files are links to those of a few."""
    originals = AdapterZoo.create(folder / "originals", LAYOUT)
    for number in range(distinct):
        if originals.has_run(f"original-{number}", "seed-0"):
            continue
        record = RunRecord(
            task=f"original-{number}",
            run="seed-0",
            descriptions=("A synthetic task",),
            seed=number,
            base_model=LAYOUT.base_model,
            base_revision=None,
            steps=SNAPSHOTS,
            snapshot_steps=tuple(range(1, SNAPSHOTS + 1)),
            validation_losses=(),
            train_tokens=0,
            data_fingerprint="",
            versions={},
        )
        snapshots = torch.randn(SNAPSHOTS, LAYOUT.size, generator=torch.Generator().manual_seed(number))
        originals.add_run(record, snapshots.mul_(0.01).add_(0.02 * snapshots[0]))
    zoo = AdapterZoo.create(folder / f".tmp-{count}", LAYOUT)
    for number in range(count):
        record = replace(originals.record(f"original-{number % distinct}", "seed-0"), task=f"task-{number}")
        run = zoo.folder / record.task / record.run
        run.mkdir(parents=True, exist_ok=True)
        for name in record.sha256:
            if not (run / name).exists():
                os.link(originals.folder / f"original-{number % distinct}" / record.run / name, run / name)
        write_json(run / "run.json", record.to_dict())
    zoo.folder.rename(folder / str(count))


def measure(folder: Path, count: int) -> dict[str, float]:
    """Open a zoo and train on it for a few steps, with made-up task vectors."""
    from accelerate import Accelerator

    from lora_factory.training.from_zoo import basis_rank, fit
    from lora_factory.training.train import build_generator
    from lora_factory.zoo.checkpoints import open_checkpoints

    figures, timer = {}, Timer()

    def note(name: str, value: float) -> None:
        """Write it down, and show it at once: the whole takes minutes."""
        figures[name] = value
        print(f"{count} tasks: {name} {value:.2f}, peak memory {peak_memory():.2f} GB", file=sys.stderr, flush=True)

    if count:
        zoo = AdapterZoo(folder)
        weights = open_checkpoints(zoo)
        note("open ms", 1000 * timer.lap())
        source = random.Random(0)
        for _ in range(50):
            row = source.randrange(SNAPSHOTS)
            zoo.snapshots(source.choice(list(weights)), "seed-0", rows=slice(row, row + 1))
        note("snapshot ms", 1000 * timer.lap() / 50)
        buffer = bytearray(1 << 24)
        for path in sorted(folder.rglob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        note("read s", timer.lap())
        arguments = TrainArguments(steps=STEPS)
        layout = zoo.layout.with_rank(basis_rank(zoo, arguments))
        about = [{"name": task, "descriptions": [task]} for task in weights]
        generator = build_generator(zoo, arguments, {"text": 384}, layout, about)
        numbers = torch.Generator().manual_seed(0)
        features = {"text": {task: torch.randn(2, 384, generator=numbers) for task in weights}}
        generator.fit_conditions(features)
        timer.lap()
        fit(generator, zoo, features, arguments, Accelerator(cpu=True))
        note("fit s", timer.lap())
    return figures | {"peak memory GB": peak_memory()}


def peak_memory() -> float:
    """The largest resident set that this process has had, in GB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1e6


class Timer:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds


if __name__ == "__main__":
    main()
