"""The fault drill: what happens to a collection on a bad weekend, and whether the zoo is what it would have been.

    LORA_FACTORY_SHARED=../shared python benchmarks/faults.py --output /tmp/faults

Thirteen text domains on a 260 K Llama. Two processes collect on one zoo, one of them is killed (SIGKILL) at a random
moment and replaced, again and again. Then, one fault at a time: a full disk, a file cut short, a read-only folder, a
byte flipped in a stored snapshot and one in a saved state. After each the same command must end with the files of an
undisturbed collection, byte for byte, and the fault must have been named. Disks are small tmpfs mounts; where mounting
is not allowed these two faults are left out, and the table says so.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from domain_tasks import domain_tasks, shared_folder
from filelock import SoftFileLease
from rich.console import Console
from rich.table import Table

from lora_factory.arguments import CollectArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.errors import LoraFactoryError
from lora_factory.zoo.store import AdapterZoo

SETTINGS = CollectArguments(
    rank=4, lora_alpha=8.0, snapshots=5, learning_rate=1e-2, validation_sequences=8, dtype="float32"
)
# A server that has imported everything, and trained nothing, makes new processes at once.
CONTEXT = multiprocessing.get_context("forkserver")
PROCESSES = 2


class Drill:
    """Faults on the collection of one set of tasks."""

    def __init__(self, output: Path, steps: int) -> None:
        """Collect the undisturbed zoo, in a process of its own."""
        self.output, self.settings = output, {"steps": steps, "state_every": 5}
        start = time.monotonic()
        assert self.run(output / "calm") == "", "the undisturbed collection failed"
        self.seconds = time.monotonic() - start
        self.calm = contents(output / "calm")

    def start(self, folder: Path) -> multiprocessing.process.BaseProcess:
        process = CONTEXT.Process(target=collect, args=(folder, self.settings, self.output / "log"))
        process.start()
        return process

    def run(self, folder: Path) -> str:
        """Collect to the end and return the error's message, if there was one."""
        process = self.start(folder)
        process.join()
        return (self.output / "log").read_text().strip().rpartition("\n")[2] if process.exitcode else ""

    def kills(self, count: int) -> str:
        """Kill one of two processes at a random moment, again and again."""
        folder, source, done = self.output / "kills", random.Random(0), 0
        processes = [self.start(folder) for _ in range(PROCESSES)]
        while done < count:
            victim = source.randrange(PROCESSES)
            wait_for_lease(processes[victim], folder / ".collection" / "leases")
            processes[victim].join(source.uniform(0, self.seconds / count))
            if processes[victim].exitcode is not None:
                break
            processes[victim].kill()
            processes[victim].join()
            processes[victim], done = self.start(folder), done + 1
        landed = len(list(folder.glob("*/*/run.json")))
        for process in processes:
            process.join()
        self.run(folder)
        log = (self.output / "log").read_text()
        taken, continued = log.count("taking over"), log.count("the run continues at step")
        runs = sum(1 for name in self.calm if name.endswith("run.json"))
        self.check(folder)
        return f"{done} kills ({landed} of {runs} runs landed by then), {taken} take-overs, {continued} continued"

    def full_disk(self) -> str:
        with small_disk(self.output / "disk") as disk:
            named = self.run(disk / "zoo")
            mount("-o", "remount,size=256m", disk)
            return self.named(named, "No space left", disk / "zoo")

    def read_only(self) -> str:
        with small_disk(self.output / "disk", "256m") as disk:
            mount("-o", "remount,ro", disk)
            named = self.run(disk / "zoo")
            mount("-o", "remount,rw", disk)
            return self.named(named, "Read-only", disk / "zoo")

    def truncated(self) -> str:
        return self.damaged("adapter_model.safetensors", lambda path: os.truncate(path, path.stat().st_size // 2))

    def corrupted(self) -> str:
        return self.damaged("checkpoints.safetensors", flip)

    def damaged(self, name: str, damage: Callable[[Path], None]) -> str:
        folder = self.output / name
        shutil.copytree(self.output / "calm", folder)
        path = sorted(folder.rglob(name))[3]
        damage(path)
        (named,) = AdapterZoo(folder).verify()
        shutil.rmtree(path.parent)
        return self.named(named, str(path), folder)

    def corrupted_state(self) -> str:
        folder = self.output / "state"
        process = self.start(folder)
        while not (states := list(folder.glob(".collection/state/[!.]*@*/state.safetensors"))):
            time.sleep(0.002)
        process.kill()
        process.join()
        flip(states[0])
        (self.output / "log").unlink()
        self.run(folder)
        lines = (self.output / "log").read_text().splitlines()
        return self.named(next((line for line in lines if "is damaged" in line), ""), "starts over", folder)

    def named(self, message: str, words: str, folder: Path) -> str:
        """Collect again, and return what was said of the fault."""
        assert words in message, f"the fault is not named: {message}"
        assert self.run(folder) == ""
        self.check(folder)
        return message.replace(str(self.output), "…")

    def check(self, folder: Path) -> None:
        found = contents(folder)
        different = sorted(name for name in {*found, *self.calm} if found.get(name) != self.calm.get(name))
        assert not different, f"{len(different)} files differ from the undisturbed zoo: {different[:3]}"
        assert AdapterZoo(folder).verify() == []


def collect(folder: Path, settings: dict[str, int], log: Path) -> None:
    """What a process does; its words go to a file."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    base = shared_folder() / "models" / "stories260k"
    collect_adapters(domain_tasks(), base, folder, replace(SETTINGS, **settings), base_model_name="stories260k")


def contents(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_bytes() for name, path in files.items() if not any(p[0] == "." for p in name.parts)}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def wait_for_lease(process: multiprocessing.process.BaseProcess, folder: Path) -> None:
    """Until a process is at work, or has ended."""
    while process.is_alive():
        if any(SoftFileLease(path).pid == process.pid for path in folder.glob("*")):
            return
        time.sleep(0.005)


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "1m"):
    folder.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoraFactoryError(f"left out: mounting is not allowed here ({done.stderr.strip()})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("faults-output"), help="folder, made anew")
    parser.add_argument("--kills", type=int, default=50, help="processes that are killed (default: 50)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps a run (default: 60)")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    CONTEXT.set_forkserver_preload(["lora_factory.collection.collect", "domain_tasks"])
    drill = Drill(options.output.resolve(), options.steps)
    table = Table("fault", "what was said of it", "seconds", title="the zoo afterwards is the undisturbed one")
    table.add_row("none", f"{len(drill.calm)} files", f"{drill.seconds:.0f}")
    faults = {
        f"{options.kills} times kill -9": lambda: drill.kills(options.kills),
        "full disk": drill.full_disk,
        "file cut short": drill.truncated,
        "read-only folder": drill.read_only,
        "corrupted snapshot": drill.corrupted,
        "corrupted state": drill.corrupted_state,
    }
    for name, fault in faults.items():
        start = time.monotonic()
        try:
            said = fault()
        except LoraFactoryError as error:
            said = str(error)
        table.add_row(name, said, f"{time.monotonic() - start:.0f}")
    console = Console(width=140)
    console.print(table)
    console.print(f"{os.cpu_count()} cores, load average {' '.join(f'{load:.1f}' for load in os.getloadavg())}")


if __name__ == "__main__":
    main()
