"""Text to adapter on the grid of languages and kinds of documents: a prototype of the next generator.

    LORA_FACTORY_SHARED=../shared python benchmarks/grid.py --fold 1 --sequences 36000

Tasks are cells of language x kind of document. A fold leaves two languages, a kind and twelve combinations out. The
multi-task LoRA and the prototype read the same number of training sequences. The table gives the test loss in nats per
token, over whole sequences and over their first 16 tokens, where little can be inferred from the context.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
from pathlib import Path

import torch
from core_prototype import CoreBasis, CoreNetwork, CorePrior, Settings, train_from_data
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from lora_factory.models.loading import load_base_model
from lora_factory.models.text_encoders import MINILM, TextEncoder
from lora_factory.utils.versions import versions

SHARED = Path(os.environ.get("LORA_FACTORY_SHARED", "../shared"))
LENGTH, TASKS, ROWS, RANK = 128, 8, 2, 16
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
UNRELATED = ("My grandmother bakes apple pies on Sundays.", "qwrx blorp zint fuddle",
             "The train to the coast is late.",
             "zzzz 1234 #### ??", "A recipe for lentil soup", "lorem flarn gibbet okto",
             "Who won the match last night?",
             "The cat sleeps on the warm roof.", "mnbvc lkjhg poiuy", "Buy milk, eggs and bread.")  # fmt: skip
GIBBERISH = ("asdf jkl qwer uiop", "the purple elephant sang to a teapot", "vrumble snick ottar plen", "x")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fold", choices=FOLDS, default="1")
    parser.add_argument("--sequences", type=int, default=36_000, help="training sequences of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-sequences", type=int, default=16, help="test sequences per cell")
    options = parser.parse_args()
    if not (SHARED / "data" / "grid").is_dir():
        raise SystemExit(
            f"{SHARED / 'data' / 'grid'} is not there; set LORA_FACTORY_SHARED to the folder of shared data"
        )
    model, tokenizer = load_base_model(SHARED / "models" / "stories260k", dtype="float32")
    model.requires_grad_(False)
    cells = sorted(path.name for path in (SHARED / "data" / "grid").iterdir())
    groups = split_cells(cells, options.fold)
    data = {
        (c, s): sequences(tokenizer, SHARED / "data" / "grid" / c / f"{s}.txt")
        for c in cells
        for s in ("train", "test")
    }
    encoder = TextEncoder(MINILM)
    seen, rng = groups["seen"], random.Random(options.seed)
    wordings = [[text_of(c, p, t) for p in range(5) for t in range(8) if t != HELD_TEMPLATE] for c in seen]
    vectors = torch.stack([encoder.encode(texts) for texts in wordings])

    def condition(task: int, source: random.Random) -> Tensor:
        """A wording of a task; every other one has some words dropped or replaced."""
        number = source.randrange(vectors.shape[1])
        if source.random() < 0.5:
            return vectors[task, number]
        words = wordings[task][number].split()
        start, count = source.randrange(len(words)), source.randrange(1, 5)
        words[start : start + count] = source.sample(["for", "my", "please", "text"], source.randrange(2))
        return encoder.encode([" ".join(words) or "text"])[0]

    def draw() -> tuple[list[int], Tensor]:
        tasks = rng.sample(range(len(seen)), TASKS)
        rows = [data[seen[t], "train"][rng.randrange(len(data[seen[t], "train"]))] for t in tasks for _ in range(ROWS)]
        return tasks, torch.stack(rows)

    torch.manual_seed(options.seed)
    steps = options.sequences // (TASKS * ROWS)
    shapes = {
        n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }
    shared = CoreBasis(shapes, RANK)
    network = CoreNetwork(CorePrior(vectors.flatten(0, 1)), shared.core_shape)
    bar = tqdm(total=2 * steps, desc="train")

    def loss(basis: CoreBasis, inputs: Tensor, cores: Tensor | None) -> Tensor:
        bar.update()
        each = None if cores is None else cores.repeat_interleave(ROWS, 0)
        return token_losses(model, basis, inputs, each).mean()

    multitask = copy.deepcopy(shared)
    first = steps // 3
    how = {"draw": draw, "condition": condition, "unrelated": encoder.encode(list(UNRELATED)), "seed": options.seed}
    train_from_data(
        shared, network, loss=lambda x, z: loss(shared, x, z), settings=Settings(first, steps - first), **how
    )
    everything = Settings(first, steps - first, without=1.0)
    train_from_data(
        multitask, copy.deepcopy(network), loss=lambda x, z: loss(multitask, x, None), settings=everything, **how
    )
    bar.close()
    other = {c: rng.choice([d for d in seen if not set(d.split(".")) & set(c.split("."))]) for c in cells}
    texts = {
        "known wording": {c: text_of(c, 0, 0) for c in cells},
        "held-out paraphrase": {c: text_of(c, HELD_PHRASE, HELD_TEMPLATE) for c in cells},
        "gibberish": {c: GIBBERISH[i % len(GIBBERISH)] for i, c in enumerate(cells)},
        "another cell's text": {c: text_of(other[c], 0, 0) for c in cells},
    }
    print(
        f"fold {options.fold}, seed {options.seed}, {steps * TASKS * ROWS:,} sequences of {LENGTH} tokens per row, "
        f"rank {RANK}"
    )
    print(", ".join(f"{name} {len(members)}" for name, members in groups.items()), versions())
    print("| row | " + " | ".join(groups) + " | first 16 tokens: " + " | ".join(groups) + " |\n|" + " --- |" * 9)
    rows = {"multi-task LoRA": (multitask, None), "no condition": (shared, None)}
    rows |= {name: (shared, by_cell) for name, by_cell in texts.items()}
    for name, (basis, by_cell) in rows.items():
        scores: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for group, members in groups.items():
                for cell in members:
                    core = None if by_cell is None else network(encoder.encode([by_cell[cell]]))
                    x = data[cell, "test"][: options.test_sequences]
                    each = token_losses(model, basis, x, core)
                    scores.setdefault(group, []).append(torch.stack([each.mean(), each[:, :16].mean()]))
        means = [torch.stack(scores[group]).mean(0).tolist() for group in groups]
        print(
            f"| {name} | "
            + " | ".join(f"{m[0]:.3f}" for m in means)
            + " | "
            + " | ".join(f"{m[1]:.3f}" for m in means)
            + " |"
        )


def sequences(tokenizer, path: Path) -> Tensor:
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    count = len(ids) // (LENGTH - 1)
    rows = torch.tensor(ids[: count * (LENGTH - 1)]).view(count, LENGTH - 1)
    return torch.cat([torch.full((count, 1), tokenizer.bos_token_id), rows], 1)


def token_losses(model, basis: CoreBasis, inputs: Tensor, cores: Tensor | None) -> Tensor:
    """Loss of every predicted token, ``(rows, tokens - 1)``."""
    with basis.attached(model, cores):
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.transpose(1, 2), inputs[:, 1:], reduction="none")


if __name__ == "__main__":
    main()
