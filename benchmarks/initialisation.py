"""Generated adapters as a start for fine-tuning: steps to the loss of a domain's own LoRA, beside a fresh start.

    LORA_FACTORY_SHARED=../shared python benchmarks/initialisation.py --domains domains-output --fold 0

Reads the zoo and the generator that `benchmarks/domains.py` made. Both starts have the generator's rank and train on
the domain's own training text, with AdamW, 8 x 128 tokens per step, at each of two constant learning rates; the better
one counts. The goal is the validation loss that the domain's own LoRA ended with.
"""

import argparse
from pathlib import Path
from statistics import fmean

import torch
from accelerate import Accelerator
from domain_tasks import domain_tasks, folds, shared_folder
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from lora_factory import AdapterZoo, CVAELoRAGenerator, Task, __version__
from lora_factory.collection.trainer import MAX_GRAD_NORM, LoRATrainer
from lora_factory.models.inputs import encode_sequences, shuffled_batches
from lora_factory.models.losses import query_loss
from lora_factory.training.train import zoo_factory

RATES = (1e-3, 5e-3)
EVERY, MOST = 10, 300  # steps between looks, and at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", type=Path, default=Path("domains-output"), help="output of benchmarks/domains.py")
    parser.add_argument("--fold", type=int, default=0, help="which fold (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="which seed (default: 0)")
    parser.add_argument("--tasks", type=int, default=4, help="how many seen and how many unseen domains (default: 4)")
    options = parser.parse_args()
    generator = CVAELoRAGenerator.from_pretrained(options.domains / f"generator-{options.fold}-{options.seed}")
    zoo = AdapterZoo(options.domains / "zoo")
    seen, unseen = folds(domain_tasks())[options.fold]
    trainer = zoo_factory(zoo, shared_folder() / "models" / "stories260k", Accelerator(), generator.layout)
    table = Table(title="steps to the validation loss of the domain's own LoRA")
    for column in ("domain", "its LoRA's loss", "fresh start", "from its text", "share"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    shares: dict[str, list[float]] = {}
    for group, tasks in (("seen", seen), ("unseen", unseen)):
        for task in tqdm(tasks[: options.tasks], desc=group):
            goal = validation(
                trainer, task, zoo.layout.widen(zoo.final(task.name, f"seed-{options.seed}"), trainer.layout)
            )
            written = trainer.layout.flatten(generator.generate_state_dict(task.descriptions[0]))
            fresh, generated = (
                min(steps_to(trainer, task, start, goal, rate) for rate in RATES)
                for start in (trainer.initial, written)
            )
            shares.setdefault(group, []).append(generated / max(fresh, 1))
            table.add_row(
                f"{task.name} ({group})", f"{goal:.3f}", str(fresh), str(generated), f"{shares[group][-1]:.2f}"
            )
    console = Console(width=120)
    console.print(table)
    for group, values in shares.items():
        console.print(f"{group}: mean share {fmean(values):.2f}, largest {max(values):.2f}")
    console.print(
        f"{MOST} stands for {MOST} or more; looks every {EVERY} steps; rates {RATES}; fold {options.fold}, "
        f"seed {options.seed}, lora-factory {__version__}, torch {torch.__version__}"
    )


def steps_to(trainer: LoRATrainer, task: Task, start: torch.Tensor, goal: float, rate: float) -> int:
    """Steps until the validation loss is at most ``goal``: 0 where the start has it, ``MOST`` if it never is."""
    sequences = encode_sequences(trainer.tokenizer, task.examples("train"), trainer.arguments.tokens)
    batches = shuffled_batches(sequences, trainer.arguments.batch_size, seed=0)
    weights = start.clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([weights], lr=rate, weight_decay=0.0)
    with trainer.slot.disabled():
        for step in range(MOST):
            if step % EVERY == 0 and validation(trainer, task, weights) <= goal:
                return step
            loss = query_loss(trainer, weights[None], [next(batches)])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([weights], MAX_GRAD_NORM)
            optimizer.step()
    return MOST


@torch.no_grad()
def validation(trainer: LoRATrainer, task: Task, weights: torch.Tensor) -> float:
    """Mean loss of an adapter on a task's validation sequences."""
    with trainer.slot.disabled():
        return float(query_loss(trainer, weights[None], [trainer.validation(task)]))


if __name__ == "__main__":
    main()
