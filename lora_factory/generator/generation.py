"""One generated adapter: the record of how it was made, and its PEFT folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from lora_factory.adapters.folder import ADAPTER_FILE, CONDITION_FILE, GENERATION_FILE, Generation, save_adapter_config
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.modules import check_adapter_name
from lora_factory.adapters.truncation import truncate
from lora_factory.arguments import MAX_SIZE
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.vae import ConditionalVAE
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.given import as_examples, as_images, as_mixture, as_temperature, as_vectors, as_whole_number
from lora_factory.tasks.image_files import ImageLike
from lora_factory.utils.files import write_json
from lora_factory.utils.paths import sha256_file
from lora_factory.utils.safe_files import is_hub_id
from lora_factory.utils.versions import versions

if TYPE_CHECKING:
    from lora_factory.models.losses import FrozenBase


@dataclass(frozen=True)
class Order:
    """A request for one adapter; the fields are the arguments of ``generate_adapter``.

    Whatever a user may hand in for them is brought into one form: numpy integers, iterators, pairs, dictionaries.

    Raises:
        LoraFactoryError: When a value is of another kind, or out of its range.
    """

    text: str | Mapping[str, float] | None
    examples: Sequence[Example | ImageExample | str] | None = None
    images: Sequence[ImageLike] | None = None
    conditions: Mapping[str, Tensor] | None = None
    seed: int = 0
    temperature: float = 0.0
    refine_steps: int = 0
    adapter_name: str = "default"
    rank: int | None = None

    def __post_init__(self) -> None:
        """Check every value at birth."""
        check_adapter_name(self.adapter_name)
        given = {
            "text": as_mixture(self.text),
            "examples": None if self.examples is None else as_examples(self.examples),
            "images": None if self.images is None else as_images(self.images),
            "conditions": as_vectors(self.conditions),
            "seed": as_whole_number(self.seed, "seed", 2**64 - 1),  # what torch.Generator takes
            "temperature": as_temperature(self.temperature),
            "refine_steps": as_whole_number(self.refine_steps, "refine_steps"),
            "rank": None if self.rank is None else as_whole_number(self.rank, "rank", MAX_SIZE),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        if self.rank == 0:
            raise LoraFactoryError("rank=0 leaves no adapter; give 1 or more, or None for the generator's own rank")

    @property
    def texts(self) -> dict[str, float]:
        """The texts, each with its weight; a single one has the weight 1."""
        if isinstance(self.text, Mapping):
            return dict(self.text)
        return {} if self.text is None else {self.text: 1.0}


@dataclass(frozen=True)
class Made:
    """A generated adapter.

    Attributes:
        layout: Of the rank that was asked for.
        state_dict: Float32 tensors on the CPU under PEFT's names.
        vectors: All task vectors that it was made of, by modality.
        given: Those of them that were made of examples and images or given as such.
        lost: Share of the squared norm of ΔW that a lower rank has lost.
    """

    layout: AdapterLayout
    state_dict: dict[str, Tensor]
    vectors: dict[str, Tensor]
    given: dict[str, Tensor]
    lost: float = 0.0


def fulfil(generator: ConditionalVAE, order: Order, base: FrozenBase | None = None) -> Made:
    """Generate an adapter and, where examples are given, refine it on them.

    A generator that is not conditioned on examples uses them for the refinement alone, if there is another
    condition.

    Args:
        generator: Writes the adapter.
        order: What is asked.
        base: The base model, with ``order.examples``.

    Raises:
        LoraFactoryError: When there is nothing to condition on, or something cannot be read.
    """
    if order.rank is not None and order.rank > (highest := max(m.rank for m in generator.layout.modules)):
        raise LoraFactoryError(f"rank={order.rank} is above the generator's, {highest}; give {highest} or less")
    given = dict(order.conditions or {})
    if order.images is not None:
        given |= generator.encode_images(order.images)
    if order.examples is not None and base is not None:
        heard = "hidden" in (generator.config.modalities or {})
        if heard or not (order.text or given) or not order.refine_steps:
            given |= generator.encode_examples(order.examples, base.model, base.tokenizer)
    vectors = _task_vectors(generator, replace(order, conditions=given))
    for text, vector in zip(order.texts, vectors.get("text", ()), strict=False):
        warn_of_a_stranger(generator, text, vector)
    layout, lost = generator.layout, 0.0
    state_dict = _weights(generator, order, vectors)
    if order.rank is not None:
        layout, state_dict, lost = truncate(layout, state_dict, order.rank)
    if order.examples is not None and base is not None:
        from lora_factory.generator.refine import refine_state_dict

        in_chat = generator.config.chat_template
        base = replace(base, layout=layout)
        state_dict = refine_state_dict(base, state_dict, order.examples, order.refine_steps, chat_template=in_chat)
    return Made(layout, state_dict, _summed(order, vectors), given, lost)


def _task_vectors(generator: ConditionalVAE, order: Order) -> dict[str, Tensor]:
    """The task vectors of an order by modality, ``(texts, width)``, one row where there is no text."""
    rows = [generator.conditions(text, order.conditions) for text in order.texts or [None]]
    return {name: torch.stack([row[name] for row in rows]).to(generator.center) for name in rows[0]}


def _summed(order: Order, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows ``(texts, n)`` by name, added up with the weights of the order's texts; float32, on the CPU."""
    shares = torch.tensor([*order.texts.values()] or [1.0])
    return {name: shares @ values.detach().float().cpu() for name, values in rows.items()}


@torch.no_grad()
def _targets(generator: ConditionalVAE, order: Order, vectors: Mapping[str, Tensor]) -> Tensor:
    """The network's targets ``(1, targets)`` for task vectors, those of several texts added up with their weights.

    So cores (weights, for ``conv1d``) add.
    """
    shares = torch.tensor([*order.texts.values()] or [1.0]).to(generator.center)
    training = generator.training
    generator.eval()
    targets = generator.made(vectors, len(shares), seed=order.seed, temperature=order.temperature)
    generator.train(training)
    return shares[None] @ targets


@torch.no_grad()
def _weights(generator: ConditionalVAE, order: Order, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter of task vectors as the network writes it, checked against the layout."""
    vector = generator.assemble(_targets(generator, order, vectors))[0]
    state_dict = generator.layout.unflatten(vector.float().cpu())
    generator.layout.check(state_dict)
    return state_dict


def write_adapter(generator: ConditionalVAE, folder: Path, order: Order, base: FrozenBase | None = None) -> Generation:
    """Generate an adapter into an existing folder: what PEFT writes, and ``generation.json``; the card is not written.

    Raises:
        LoraFactoryError: As :func:`fulfil`.
    """
    made = fulfil(generator, order, base)
    vectors, given = made.vectors, made.given
    save_adapter_config(made.layout, folder)
    save_file(made.state_dict, folder / ADAPTER_FILE, metadata={"format": "pt"})
    if given:
        kept = {name: vector.detach().float().cpu().contiguous() for name, vector in given.items()}
        save_file(kept, folder / CONDITION_FILE, metadata={"format": "pt"})
    nearest = generator.nearest_tasks(vectors)
    name, commit = generator.config.name_or_path or "", getattr(generator.config, "_commit_hash", None)
    generation = Generation(
        text=described(order),
        conditions=tuple(sorted(given)),
        seed=order.seed,
        temperature=order.temperature,
        chat_template=generator.config.chat_template,
        rank=order.rank,
        rank_error=round(made.lost, 6),
        refined_on=len(order.examples) if order.examples is not None and order.refine_steps else 0,
        nearest_tasks=tuple(nearest),
        distance=round(1 - nearest[0]["similarity"], 4) if nearest else None,
        zoo_distance=zoo_distance(generator, list(vectors)),
        generator=(name if commit and is_hub_id(name) else Path(name).name) or None,
        generator_commit=commit,
        base_model=generator.layout.base_model,
        base_revision=generator.layout.base_revision,
        sha256=sha256_file(folder / ADAPTER_FILE),
        versions=versions(),
    )
    write_json(folder / GENERATION_FILE, asdict(generation))
    return generation


def described(order: Order) -> str | None:
    """What an order's adapter is for, in one text: of several texts, each with its weight."""
    if order.text is None or isinstance(order.text, str):
        return order.text
    return " + ".join(f"{weight:g} * {text!r}" for text, weight in order.texts.items())


@torch.no_grad()
def explain(generator: ConditionalVAE, order: Order) -> dict[str, Any]:
    """How far a condition is from the known tasks, and how much the generator makes of it.

    Args:
        generator: The generator.
        order: What is asked; its texts and task vectors count.

    Returns:
        - ``nearest``: The known tasks nearest to it, best first: ``{"task", "similarity"}``.
        - ``distance``: Cosine distance from the nearest one.
        - ``farther_than``: Share of the known tasks that are nearer to their own nearest neighbour than that: what is
          usual among tasks, each left out in turn. None for fewer than two tasks.
        - ``use``: Size of what the condition changes (the norm of the targets), in units of its median over the known
          tasks: 0 writes the adapter without a condition.
    """
    rows = _task_vectors(generator, order)
    targets, vectors = _targets(generator, order, rows), _summed(order, rows)
    nearest = generator.nearest_tasks(vectors)
    distance = round(1 - nearest[0]["similarity"], 4) if nearest else None
    others = _neighbour_distances(generator, list(vectors))
    known = {name: generator.get_buffer(f"{name}_task_vectors") for name in vectors}
    sizes = generator.made(known, len(next(iter(known.values())))).norm(dim=1)
    return {
        "nearest": nearest,
        "distance": distance,
        "farther_than": None if distance is None or not others else round(fmean(distance > it for it in others), 4),
        "use": round(float(targets.norm() / sizes.median().clamp_min(1e-12)), 4),
    }


def zoo_distance(generator: ConditionalVAE, modalities: list[str]) -> float | None:
    """The median over training tasks of the cosine distance from the nearest other one; None for fewer than two."""
    distances = _neighbour_distances(generator, modalities)
    return round(median(distances), 4) if distances else None


def warn_of_a_stranger(generator: ConditionalVAE, text: str, vector: Tensor) -> None:
    """Warn of a text that is farther from its nearest task than any task of the zoo is from its own nearest one."""
    if len(generator.config.tasks or []) < 2:
        return
    nearest, farthest = generator.nearest_tasks({"text": vector}, 1)[0], max(_neighbour_distances(generator, ["text"]))
    if (distance := 1 - nearest["similarity"]) > farthest + 1e-4:  # similarities are rounded to four places
        warnings.warn(
            f"the text {text[:80]!r} is far from every task that the generator knows: {distance:.2f} (cosine "
            f"distance) from the nearest one, {nearest['task']}, while no two nearest tasks are more than "
            f"{farthest:.2f} apart; expect little of this adapter",
            stacklevel=4,
        )


def _neighbour_distances(generator: ConditionalVAE, modalities: Sequence[str]) -> list[float]:
    """The cosine distance of every training task from its nearest other one; none for fewer than two."""
    rows = [functional.normalize(generator.get_buffer(f"{name}_task_vectors").float(), dim=-1) for name in modalities]
    similarity = torch.stack([row @ row.T for row in rows]).mean(0)
    if len(similarity) < 2:
        return []
    similarity.fill_diagonal_(-1)
    return [1 - value for value in similarity.max(0).values.tolist()]
