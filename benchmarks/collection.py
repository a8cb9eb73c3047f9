"""What collection costs beside a bare PEFT + Accelerate loop, and what a second process brings.

    LORA_FACTORY_SHARED=../shared python benchmarks/collection.py --output /tmp/collection

A 260 K Llama on text domains. The bare loop trains one LoRA per domain with the same base, LoRA, data, batch size,
optimiser and schedule, and keeps nothing; collection adds validation, snapshots, saved states, leases and the zoo's
files. Both run in turns in one process. Seconds of processor time stand beside those of the clock, which other work on
the machine distorts. The second part collects one zoo with one process and with two, and compares the files.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path

import torch
from accelerate import Accelerator
from domain_tasks import domain_tasks, shared_folder
from faults import contents
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from lora_factory.arguments import CollectArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.models.inputs import collate, encode_sequences
from lora_factory.tasks.task import Task

SETTINGS = CollectArguments(
    rank=4, lora_alpha=8.0, steps=300, snapshots=5, learning_rate=1e-2, validation_sequences=16, dtype="float32"
)


def bare_loop(tasks: list[Task], base: Path) -> None:
    """As the documentation of the two libraries has it."""
    accelerator = Accelerator(cpu=True)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(base),
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    )
    config = LoraConfig(r=4, lora_alpha=8.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for task in tasks:
        rows = encode_sequences(tokenizer, task.examples("train"), SETTINGS.tokens)
        loader = DataLoader(
            rows, batch_size=8, shuffle=True, collate_fn=lambda batch: collate(batch, 0, accelerator.device)
        )
        optimizer = torch.optim.AdamW(parameters, lr=SETTINGS.learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, ceil(0.1 * SETTINGS.steps), SETTINGS.steps)
        prepared, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        step = 0
        while step < SETTINGS.steps:
            for batch in loader:
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                step += 1
                if step == SETTINGS.steps:
                    break


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def throughput(output: Path, tasks: list[Task], base: Path, rounds: int) -> None:
    times: dict[str, list[tuple[float, float]]] = {"bare loop": [], "collection": []}
    for number in range(rounds + 1):
        folder = output / f"zoo-{number}"
        bare = measured(lambda: bare_loop(tasks, base))
        ours = measured(lambda folder=folder: collect_adapters(tasks, base, folder, SETTINGS))
        if number:  # the first round warms up
            times["bare loop"].append(bare)
            times["collection"].append(ours)
    tokens = len(tasks) * SETTINGS.steps * SETTINGS.batch_size * SETTINGS.sequence_length
    for kind, column in (("clock", 0), ("processor", 1)):
        seconds = {name: statistics.median(row[column] for row in rows) for name, rows in times.items()}
        rates = ", ".join(f"{name} {tokens / value:,.0f} tokens/s" for name, value in seconds.items())
        print(f"{kind}: {rates}; ratio of throughputs {seconds['bare loop'] / seconds['collection']:.3f}")


def two_processes(output: Path) -> None:
    seconds = {}
    for count in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        done = subprocess.run(
            [*command, __file__, "--worker", "--output", str(output / f"by-{count}")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        seconds[count] = max(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("seconds"))
    same = contents(output / "by-1") == contents(output / "by-2")
    ratio = seconds[2] / seconds[1]
    print(f"8 tasks: one process {seconds[1]:.1f} s, two {seconds[2]:.1f} s, ratio {ratio:.2f}; same files: {same}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("collection-output"), help="folder, made anew")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the bare loop and collection (default: 3)")
    parser.add_argument("--worker", action="store_true", help="only collect, as one of several processes")
    options = parser.parse_args()
    tasks, base = domain_tasks(), shared_folder() / "models" / "stories260k"
    if options.worker:
        clock, _ = measured(lambda: collect_adapters(tasks[:8], base, options.output, SETTINGS))
        print(f"seconds {clock}")
        return
    shutil.rmtree(options.output, ignore_errors=True)
    torch.set_num_threads(1)
    loads = [os.getloadavg()[0]]
    throughput(options.output, tasks[:2], base, options.rounds)
    loads.append(os.getloadavg()[0])
    two_processes(options.output)
    loads.append(os.getloadavg()[0])
    print(
        f"{os.cpu_count()} cores; load average before, between and after: {', '.join(f'{load:.1f}' for load in loads)}"
    )


if __name__ == "__main__":
    main()
