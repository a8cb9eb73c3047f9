"""How near generated adapters are to real ones, from texts that training saw and from paraphrases that it did not.

    python benchmarks/paraphrases.py --zoo demo-output/full/zoo

Every task's last description is kept from training. The error is |generated - mean of the task's checkpoints| over
|zoo mean - mean of the task's checkpoints|: 0 is the task's own adapter, 1 the average of the zoo.
"""

import argparse
import time
from dataclasses import replace

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from lora_factory import AdapterZoo, TrainArguments, __version__
from lora_factory.models.text_encoders import TextEncoder
from lora_factory.training import from_zoo as reconstruction
from lora_factory.training import train as training


def error(generator, zoo, weights, task, vector):
    with torch.no_grad():
        generated = generator.generate_vector({"text": vector[None]})[0]
    mean = weights[task].mean(0)
    average = torch.stack([rows.mean(0) for rows in weights.values()]).mean(0)
    return float((generated - mean).norm() / (average - mean).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zoo", required=True, help="folder of a zoo whose tasks have two descriptions or more")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    options = parser.parse_args()
    zoo, arguments = AdapterZoo(options.zoo), TrainArguments()
    encoder = TextEncoder(arguments.text_encoder)
    weights = {task: zoo.snapshots(task).float() for task in zoo.tasks}
    encoded = {task: encoder.encode(list(zoo.descriptions(task))) for task in zoo.tasks}
    known = {"text": {task: rows[:-1] for task, rows in encoded.items()}}
    default = (reconstruction.CONDITION_NOISE, reconstruction.HEAD_NOISE)
    variants = {
        "token, default": (arguments, *default),
        "token, a fifth of the noise": (arguments, default[0] / 5, default[1] / 5),
        "token, heads by gradient only": (arguments, default[0], None),
    }
    table = Table(title=f"{zoo.folder}: {len(zoo.tasks)} tasks, {zoo.layout.size:,} weights, {options.seeds} seed(s)")
    for column in ("variant", "known texts, mean", "worst", "held-out paraphrases, mean", "worst", "seconds"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    solve_heads = reconstruction.solve_heads
    for name, (settings, noise, head_noise) in variants.items():
        reconstruction.sample_episode.__kwdefaults__["noise"] = noise
        reconstruction.HEAD_NOISE = head_noise
        reconstruction.solve_heads = solve_heads if head_noise is not None else lambda *_: None
        errors, start = ([], []), time.perf_counter()
        for seed in range(options.seeds):
            generator = training.build_generator(zoo, replace(settings, seed=seed), {"text": encoder.width})
            generator.fit_statistics(weights, known)
            reconstruction.fit(generator, weights, known, replace(settings, seed=seed), Accelerator())
            generator.eval()
            for task, rows in encoded.items():
                errors[0].extend(error(generator, zoo, weights, task, row) for row in rows[:-1])
                errors[1].append(error(generator, zoo, weights, task, rows[-1]))
        figures = [form for group in errors for form in (f"{sum(group) / len(group):.3f}", f"{max(group):.3f}")]
        table.add_row(name, *figures, f"{(time.perf_counter() - start) / options.seeds:.0f}")
    Console(width=120).print(table)
    Console().print(f"lora-factory {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
