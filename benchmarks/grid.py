"""Text and examples to adapter on the grid of languages and kinds of documents, against a LoRA for all tasks.

    LORA_FACTORY_SHARED=../shared python benchmarks/grid.py --fold 1 --steps 2250 --oracle 2

Tasks are cells of language x kind of document. A fold leaves two languages, a kind and twelve combinations out. The
multi-task LoRA and the generator take the same number of steps with the same number of sequences. The table gives the
test loss in nats per token, over whole sequences and over their first 16 tokens, where little can be inferred from the
context. With --oracle, some cells of the groups left out get cores fitted on the cell itself (the basis frozen), and
a LoRA of their own that goes on from the multi-task LoRA; the share of conditioning headroom is that of the difference
between the multi-task LoRA and the cell's own LoRA.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from lora_factory.arguments import TrainArguments
from lora_factory.collection.trainer import LoRATrainer
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.hidden_states import example_states
from lora_factory.models.losses import query_loss
from lora_factory.tasks.task import Task
from lora_factory.training.train import train_generator
from lora_factory.utils.versions import versions

SHARED = Path(os.environ.get("LORA_FACTORY_SHARED", "../shared"))
CHARACTERS = 2000  # of one example
EXAMPLES = 16  # from which a condition is made
KINDS = {
    "admin_handbook": ["a handbook for system administrators", "an administration guide for servers",
                       "a book about running a Linux system", "the administrator manual",
                       "chapters of a sysadmin handbook", "a guide to administering machines"],
    "desktop_help": ["help pages of the desktop", "user help for a desktop environment", "desktop assistance articles",
                     "the desktop user guide", "help topics for the graphical desktop",
                     "how-to pages for desktop users"],
    "gimp_manual": ["the manual of an image editor", "documentation of photo editing software",
                    "a guide to a picture editing program", "the handbook of a drawing and photo tool",
                    "chapters about retouching images", "an image manipulation manual"],
    "install_guide": ["an installation guide", "instructions for installing an operating system",
                      "a guide to setting up the system", "the installer manual", "a setup handbook",
                      "how to install the system"],
    "man_pages": ["manual pages of commands", "reference pages for command line tools", "man pages",
                  "Unix command documentation", "command reference", "documentation of shell commands"],
    "office_help": ["help of an office suite", "help pages for a spreadsheet and word processor",
                    "office software help",
                    "the user help of an office program", "documentation of text documents and spreadsheets",
                    "office application assistance"],
    "ui_messages": ["messages of programs", "user interface strings", "translated program messages",
                    "error messages and labels of software", "short interface texts", "software localisation strings"],
}  # fmt: skip
LANGUAGES = {
    "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish",
    "fi": "Finnish", "fr": "French", "id": "Indonesian", "it": "Italian", "nl": "Dutch", "pl": "Polish",
    "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "tr": "Turkish",
}  # fmt: skip
TEMPLATES = ("{k} in {l}", "{l}: {k}", "{k}, written in {l}", "text in {l}, {k}", "{k} ({l})", "I need {k} in {l}",
             "adapt the model to {k} in the {l} language", "{l} {k}")  # fmt: skip
HELD_PHRASE, HELD_TEMPLATE = 5, 6  # no training text has this phrase or this template
GIBBERISH = ("asdf jkl qwer uiop", "the purple elephant sang to a teapot", "vrumble snick ottar plen", "hm")
FOLDS = {  # settings were chosen on fold V, which no published table shows
    "V": (("it", "tr"), "admin_handbook"), "1": (("pt", "pl"), "gimp_manual"), "2": (("da", "el"), "man_pages"),
    "3": (("es", "fi"), "install_guide"), "4": (("nl", "ro"), "office_help"),
}  # fmt: skip


def text_of(cell: str, phrase: int, template: int) -> str:
    kind, language = cell.split(".")
    return TEMPLATES[template].format(k=KINDS[kind][phrase], l=LANGUAGES[language])


def split_cells(cells: list[str], fold: str) -> dict[str, list[str]]:
    """The cells of a fold by group: seen, combination, language, kind."""
    languages, kind = FOLDS[fold]
    rest = [c for c in cells if c.split(".")[1] not in languages and c.split(".")[0] != kind]
    combinations: list[str] = []
    order = random.Random(f"fold{fold}").sample(rest, len(rest))
    for cell in order:
        left = [c for c in rest if c not in combinations and c != cell]
        enough = all(sum(c.split(".")[i] == cell.split(".")[i] for c in left) >= 3 for i in (0, 1))
        if len(combinations) < 12 and enough:
            combinations.append(cell)
    return {
        "seen": [c for c in rest if c not in combinations],
        "combination": combinations,
        "language": [c for c in cells if c.split(".")[1] in languages and c.split(".")[0] != kind],
        "kind": [c for c in cells if c.split(".")[0] == kind and c.split(".")[1] not in languages],
    }


def task_of(cell: str) -> Task:
    """A cell as a task, described in 35 wordings; one phrase and one template are held out."""
    wordings = [text_of(cell, p, t) for p in range(HELD_PHRASE) for t in range(len(TEMPLATES)) if t != HELD_TEMPLATE]
    splits = {s: examples(SHARED / "data" / "grid" / cell / f"{s}.txt") for s in ("train", "validation", "test")}
    return Task.from_examples(cell, wordings, **splits)


def examples(path: Path) -> list[str]:
    """A file in pieces of about `CHARACTERS` that end with a line."""
    pieces: list[str] = [""]
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if len(pieces[-1]) > CHARACTERS:
            pieces.append("")
        pieces[-1] += line
    return [piece for piece in pieces if piece.strip()]


class Scorer:
    """Scores adapters on test sequences, whole and their first 16 tokens."""

    def __init__(self, trainer: LoRATrainer, tasks: dict[str, Task], count: int) -> None:
        self.trainer = trainer
        self.rows = {name: trainer.encode(task.examples("test"))[:count] for name, task in tasks.items()}

    @torch.no_grad()
    def losses(self, generator: CVAELoRAGenerator, cell: str, cores: Tensor) -> Tensor:
        """Mean loss of a cell's test sequences and of their first 16 predicted tokens: ``(2,)``."""
        assert generator.basis is not None
        inputs = self.trainer.inputs.collate(self.rows[cell], torch.device("cpu"))
        labels = inputs.pop("labels")[:, 1:]
        with self.trainer.slot.disabled(), generator.basis.in_batch(self.trainer.model, cores):
            logits = self.trainer.model(**inputs, use_cache=False).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return torch.stack([each.mean(), each[:, :16].mean()])


def fitted(
    trainer: LoRATrainer, task: Task, parameters: list[Tensor], loss: Callable[[list], Tensor], rate: float
) -> None:
    """Train parameters on one task until its validation loss has not fallen for four looks; keep the best."""
    train, validation = trainer.encode(task.examples("train")), trainer.validation(task)
    optimizer, source = torch.optim.Adam(parameters, lr=rate), random.Random(0)
    best, kept, looks = torch.inf, [p.detach().clone() for p in parameters], 0
    with trainer.slot.disabled():
        for step in range(2000):
            if step % 25 == 0:
                with torch.no_grad():
                    measured = float(loss(validation))
                looks = 0 if measured < best else looks + 1
                if measured < best:
                    best, kept = measured, [p.detach().clone() for p in parameters]
                if looks == 4:
                    break
            optimizer.zero_grad()
            loss(source.sample(train, min(8, len(train)))).backward()
            optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)


def oracle_core(trainer: LoRATrainer, generator: CVAELoRAGenerator, task: Task) -> Tensor:
    """Cores ``(1, C)`` fitted on a task itself, the basis frozen."""
    basis, cores = generator.basis, generator.center.detach().clone()[None].requires_grad_(True)
    assert basis is not None
    basis.requires_grad_(False)
    read = lambda rows: query_loss(trainer, lambda _: basis.in_batch(trainer.model, cores), [rows])  # noqa: E731
    fitted(trainer, task, [cores], read, 3e-3)
    basis.requires_grad_(True)
    return cores.detach()


def own_lora(trainer: LoRATrainer, multitask: CVAELoRAGenerator, task: Task) -> CVAELoRAGenerator:
    """The multi-task LoRA trained on for one task alone."""
    own = CVAELoRAGenerator(multitask.config)
    own.load_state_dict(multitask.state_dict())
    basis, cores = own.basis, own.center[None]
    assert basis is not None
    read = lambda rows: query_loss(trainer, lambda _: basis.in_batch(trainer.model, cores), [rows])  # noqa: E731
    fitted(trainer, task, [basis.factors], read, 3e-3)
    return own


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fold", choices=FOLDS, default="1")
    parser.add_argument("--steps", type=int, default=2250, help="training steps of each row, 16 sequences each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-sequences", type=int, default=16, help="test sequences per cell")
    parser.add_argument("--tasks", type=int, default=0, help="seen cells to train on; 0: all")
    parser.add_argument("--core", choices=("full", "diagonal"), default="full")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--oracle", type=int, default=0, help="cells of each group left out to fit an oracle core on")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train both, print the tables, and return the loss of every row on every group of cells."""
    if not (SHARED / "data" / "grid").is_dir():
        raise SystemExit(
            f"{SHARED / 'data' / 'grid'} is not there; set LORA_FACTORY_SHARED to the folder of shared data"
        )
    base = str(SHARED / "models" / "stories260k")
    cells = sorted(path.name for path in (SHARED / "data" / "grid").iterdir())
    groups = split_cells(cells, options.fold)
    tasks = {cell: task_of(cell) for cell in cells}
    rng = random.Random(options.seed)
    seen = rng.sample(groups["seen"], len(groups["seen"]))[: options.tasks or None]
    groups["seen"] = sorted(seen)
    arguments = TrainArguments(
        base_steps=options.steps, seed=options.seed, core=options.core, rank=options.rank, lora_alpha=options.rank
    )
    with tempfile.TemporaryDirectory() as folder:
        train = [tasks[cell] for cell in groups["seen"]]
        made = train_generator(output_dir=f"{folder}/g", arguments=arguments, tasks=train, base_model=base)
        alone = replace(arguments, multitask_steps=options.steps)
        multitask = train_generator(output_dir=f"{folder}/m", arguments=alone, tasks=train, base_model=base)
    trainer = zoo_less_trainer(base, options.rank)
    scorer = Scorer(trainer, tasks, options.test_sequences)
    other = {c: rng.choice([d for d in seen if not set(d.split(".")) & set(c.split("."))]) for c in cells}
    held = {c: text_of(c, HELD_PHRASE, HELD_TEMPLATE) for c in cells}
    texts = {
        "known wording": {c: text_of(c, 0, 0) for c in cells},
        "held-out paraphrase": held,
        "gibberish": {c: GIBBERISH[i % len(GIBBERISH)] for i, c in enumerate(cells)},
        "another cell's text": {c: text_of(other[c], 0, 0) for c in cells},
    }
    scored = [cell for members in groups.values() for cell in members]
    conditions = {
        name: {c: {"text": made.text_encoder.encode([by_cell[c]])} for c in scored} for name, by_cell in texts.items()
    }
    with trainer.slot.disabled():
        read = {c: example_states(trainer, tasks[c].examples("train")[:EXAMPLES]) for c in scored}
    states = {c: made.task_vector("hidden", rows) for c, rows in read.items()}
    conditions["one example"] = {c: {"hidden": made.task_vector("hidden", rows[:1])[None]} for c, rows in read.items()}
    conditions[f"{EXAMPLES} examples"] = {c: {"hidden": states[c][None]} for c in scored}
    pairs = {
        "paraphrase and one example": ("held-out paraphrase", "one example"),
        "paraphrase and examples": ("held-out paraphrase", f"{EXAMPLES} examples"),
        "gibberish and examples": ("gibberish", f"{EXAMPLES} examples"),
    }
    for pair, (text, few) in pairs.items():
        conditions[pair] = {c: conditions[text][c] | conditions[few][c] for c in scored}
    print(
        f"fold {options.fold}, seed {options.seed}, {options.steps * 16:,} sequences of 128 tokens per row, rank "
        f"{options.rank}, {options.core} cores, {made.num_parameters():,} weights"
    )
    print(", ".join(f"{name} {len(members)}" for name, members in groups.items()), versions())
    print("| row | " + " | ".join(groups) + " | first 16 tokens: " + " | ".join(groups) + " |\n|" + " --- |" * 9)
    rows: dict[str, Callable[[str], Tensor]] = {
        "base model": lambda cell: scorer.losses(multitask, cell, torch.zeros_like(multitask.center)[None]),
        "multi-task LoRA": lambda cell: scorer.losses(multitask, cell, multitask.center[None]),
        "no condition": lambda cell: scorer.losses(made, cell, made.center[None]),
    }
    for name, by_cell in conditions.items():
        rows[name] = lambda cell, by_cell=by_cell: scorer.losses(made, cell, made.cores(by_cell[cell], 1))
    losses = {}
    for name, score in rows.items():
        means = [torch.stack([score(cell) for cell in members]).mean(0).tolist() for members in groups.values()]
        losses[name] = {group: m[0] for group, m in zip(groups, means, strict=True)}
        cells_shown = [f"{m[0]:.3f}" for m in means] + [f"{m[1]:.3f}" for m in means]
        print(f"| {name} | " + " | ".join(cells_shown) + " |", flush=True)
    if options.oracle:
        print("\n| cells | multi-task LoRA | from paraphrase | oracle core | own LoRA | share: text | oracle |")
        print("|" + " --- |" * 7)
    for group in ("combination", "language", "kind") if options.oracle else ():
        chosen = random.Random(options.seed).sample(groups[group], min(options.oracle, len(groups[group])))
        found = []
        for cell in chosen:
            own = own_lora(trainer, multitask, tasks[cell])
            found.append(
                [
                    float(rows["multi-task LoRA"](cell)[0]),
                    float(rows["held-out paraphrase"](cell)[0]),
                    float(scorer.losses(made, cell, oracle_core(trainer, made, tasks[cell]))[0]),
                    float(scorer.losses(own, cell, own.center[None])[0]),
                ]
            )
        multi, text, oracle, own_loss = torch.tensor(found).mean(0).tolist()
        shares = [(multi - loss) / (multi - own_loss) for loss in (text, oracle)]
        print(
            f"| {len(chosen)} of {group} | {multi:.3f} | {text:.3f} | {oracle:.3f} | {own_loss:.3f} | {shares[0]:.2f} "
            f"| {shares[1]:.2f} |",
            flush=True,
        )
    return losses


def zoo_less_trainer(base: str, rank: int) -> LoRATrainer:
    """The base model with a slot of the generator's layout, to read sequences with."""
    from lora_factory.arguments import CollectArguments
    from lora_factory.collection.trainer import open_trainer

    return open_trainer(base, CollectArguments(rank=rank, lora_alpha=rank), Accelerator())


if __name__ == "__main__":
    run(read_options())
