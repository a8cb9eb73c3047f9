"""500 hot swaps on one model: time and memory of each hundred, and whether the outputs are those of fresh adapters.

    python benchmarks/hotswap.py --generator FOLDER [--swaps 500] [--compile]

The generator may be the one that `make demo` trains. `--compile` compiles the model with torch.compile and counts the
graphs that are compiled after the first forward pass.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time

import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch._dynamo.utils import counters

from lora_factory import CVAELoRAGenerator
from lora_factory.generator.task_vectors import open_base

TEXTS = ("Legal notices", "Rhymed poems", "Python source code", "Recipes", "Weather reports", "Chess commentary")


def resident_megabytes() -> float:
    """The memory of this process now, not its highest."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="folder of a generator for a language model")
    parser.add_argument("--swaps", type=int, default=500)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    generator = CVAELoRAGenerator.from_pretrained(options.generator)
    tokens = torch.arange(100, 132)[None]
    expected = {}
    for text in TEXTS:
        with torch.no_grad():
            expected[text] = generator.generate_adapter(text, open_base(generator.layout, None))(tokens).logits
    model = generator.generate_adapter(TEXTS[0], open_base(generator.layout, None))
    rank = generator.layout.rank
    run = model
    if options.compile:
        prepare_model_for_compiled_hotswap(model, target_rank=rank, config=model.peft_config)
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", dynamic=False)
    with torch.no_grad():
        run(tokens)
    graphs = counters["stats"]["unique_graphs"]
    print(f"{len(generator.layout.modules)} modules, rank {rank}, {generator.layout.size:,} weights, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, compiled: {options.compile}")  # fmt: skip
    print("| swaps | ms a swap, median | ms a forward pass, median | MB resident | modules | parameters | equal |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    swaps, passes, equal = [], [], 0
    for number in range(1, options.swaps + 1):
        text = TEXTS[number % len(TEXTS)]
        start = time.perf_counter()
        generator.apply(run, text)
        middle = time.perf_counter()
        with torch.no_grad():
            logits = run(tokens).logits
        passes.append(1000 * (time.perf_counter() - middle))
        swaps.append(1000 * (middle - start))
        equal += torch.equal(logits, expected[text])
        if number % 100 == 0 or number == options.swaps:
            gc.collect()
            print(f"| {number} | {statistics.median(swaps):.1f} | {statistics.median(passes):.1f} | "
                  f"{resident_megabytes():.0f} | {len(list(model.modules()))} | {len(list(model.parameters()))} | "
                  f"{equal} |", flush=True)  # fmt: skip
            swaps, passes = [], []
    print(f"graphs compiled after the first pass: {counters['stats']['unique_graphs'] - graphs}")


if __name__ == "__main__":
    main()
