"""One generated adapter: the record of how it was made, and its PEFT folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from lora_factory.adapters.folder import (
    CONDITION_FILE,
    GENERATION_FILE,
    Generation,
    save_adapter_config,
    save_adapter_weights,
)
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.modules import check_adapter_name
from lora_factory.adapters.truncation import truncate
from lora_factory.arguments import MAX_SIZE
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.task_vectors import check_conditions
from lora_factory.generator.vae import ConditionalVAE
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.given import as_examples, as_images, as_mixture, as_temperature, as_vectors, as_whole_number
from lora_factory.tasks.image_files import ImageLike
from lora_factory.utils.files import write_json
from lora_factory.utils.precision import own_precision
from lora_factory.utils.safe_files import is_hub_id
from lora_factory.utils.versions import versions

if TYPE_CHECKING:
    from lora_factory.models.losses import FrozenBase

# Written at once for several texts: 64 MB. From 2^18 to 2^26 the time per text is the same (100 texts, 115,200 each).
BATCH_WEIGHTS = 1 << 24


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
            "rank": None if self.rank is None else as_whole_number(self.rank, "rank", MAX_SIZE, least=1),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)
        if self.refine_steps and self.examples is None:
            raise LoraFactoryError(
                f"refine_steps={self.refine_steps} needs examples=; give the examples to refine on, or leave it out"
            )
        for argument, modality in {"text": "text", "examples": "hidden", "images": "image"}.items():
            if getattr(self, argument) is not None and modality in (self.conditions or {}):
                raise LoraFactoryError(
                    f"{argument}= and conditions={{{modality!r}: ...}} give the same task vector; leave one out"
                )

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
        refined_on: On how many examples it was refined; 0 where that has changed nothing.
    """

    layout: AdapterLayout
    state_dict: dict[str, Tensor]
    vectors: dict[str, Tensor]
    given: dict[str, Tensor]
    lost: float = 0.0
    refined_on: int = 0


@own_precision()
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
    check_rank(generator, order.rank)
    given = dict(order.conditions or {})
    if order.images is not None:
        given |= generator.encode_images(order.images)
    if order.examples is not None and base is not None:
        heard = "hidden" in (generator.config.modalities or {})
        if heard or not (order.text or given) or not order.refine_steps:
            given |= generator.encode_examples(order.examples, base.model, base.tokenizer)
    vectors = _task_vectors(generator, order, given)
    if order.texts:
        _warn_of_strangers(generator, order.texts, vectors["text"])
    layout, state_dict, lost = _of_rank(generator.layout, _weights(generator, order, vectors)[0], order.rank)
    refined_on = 0
    if order.examples is not None and order.refine_steps and base is not None:
        from lora_factory.generator.refine import refine_state_dict

        in_chat = generator.config.chat_template
        base = replace(base, layout=layout)
        written = state_dict
        state_dict = refine_state_dict(base, written, order.examples, order.refine_steps, chat_template=in_chat)
        if state_dict is not written:
            refined_on = len(order.examples)
    return Made(layout, state_dict, _summed(order, vectors), given, lost, refined_on)


def fulfil_texts(generator: ConditionalVAE, orders: Sequence[Order]) -> Iterator[Made]:
    """Generate an adapter for each of several texts, in the same order.

    The encoder reads all texts at once. The network writes as many adapters at a time as `BATCH_WEIGHTS` allows, so
    that memory does not grow with the number of texts.

    Args:
        generator: Writes the adapters.
        orders: Each of one text and nothing else; seed, temperature and rank are those of the first.

    Raises:
        LoraFactoryError: As `fulfil`.
    """
    if not orders:
        return
    first, texts = orders[0], [text for order in orders for text in order.texts]
    check_rank(generator, first.rank)
    with own_precision():
        vectors = generator.text_encoder.encode(texts)
        check_conditions({"text": vectors[0]}, generator.config.modalities or {})
        _warn_of_strangers(generator, texts, vectors.to(generator.center))
    count = max(1, BATCH_WEIGHTS // generator.layout.size)
    for start in range(0, len(texts), count):
        rows = vectors[start : start + count]
        with own_precision():
            made = _weights(generator, first, {"text": rows.to(generator.center)}, each=True)
        for row, weights in zip(rows, made, strict=True):
            with own_precision():
                layout, state_dict, lost = _of_rank(generator.layout, weights, first.rank)
            yield Made(layout, state_dict, {"text": row}, {}, lost)


def check_rank(generator: ConditionalVAE, rank: int | None) -> None:
    """Refuse a rank above the generator's.

    Raises:
        LoraFactoryError: When it is.
    """
    if rank is not None and rank > (highest := generator.layout.rank):
        raise LoraFactoryError(f"rank={rank} is above the generator's, {highest}; give {highest} or less")


def _of_rank(
    layout: AdapterLayout, state_dict: dict[str, Tensor], rank: int | None
) -> tuple[AdapterLayout, dict[str, Tensor], float]:
    return (layout, state_dict, 0.0) if rank is None else truncate(layout, state_dict, rank)


def _task_vectors(generator: ConditionalVAE, order: Order, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The vectors of an order's texts and those given, by modality, ``(texts, width)``; one row without a text."""
    rows = [generator.conditions(text, given) for text in order.texts or [None]]
    return {name: torch.stack([row[name] for row in rows]).to(generator.center) for name in rows[0]}


def _summed(order: Order, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows ``(texts, n)`` by name, added up with the weights of the order's texts; float32, on the CPU."""
    shares = torch.tensor([*order.texts.values()] or [1.0])
    return {name: shares @ values.detach().float().cpu() for name, values in rows.items()}


@torch.no_grad()
def _targets(generator: ConditionalVAE, order: Order, vectors: Mapping[str, Tensor], *, each: bool = False) -> Tensor:
    """The network's targets for task vectors ``(rows, width)``.

    Args:
        generator: The generator.
        order: Its seed and temperature count, and the weights of its texts.
        vectors: Task vectors by modality.
        each: Whether each row is an adapter of its own, with the noise that it would have alone: ``(rows, targets)``.
            Else the rows are those of the order's texts, and are added up with their weights, so that cores (weights,
            for ``conv1d``) add: ``(1, targets)``.
    """
    count = len(next(iter(vectors.values())))
    how: dict[str, Any] = {"seed": order.seed, "temperature": order.temperature}
    training = generator.training
    generator.eval()
    if each and order.temperature > 0:
        rows = [{name: values[row, None] for name, values in vectors.items()} for row in range(count)]
        targets = torch.cat([generator.made(row, 1, **how) for row in rows])
    else:
        targets = generator.made(vectors, count, **how)
    generator.train(training)
    return targets if each else torch.tensor([[*order.texts.values()] or [1.0]]).to(targets) @ targets


@torch.no_grad()
def _weights(
    generator: ConditionalVAE, order: Order, vectors: Mapping[str, Tensor], *, each: bool = False
) -> list[dict[str, Tensor]]:
    """The adapters of task vectors as the network writes them, checked: one, or one for each row; see `_targets`."""
    made = generator.assemble(_targets(generator, order, vectors, each=each)).float().cpu()
    state_dicts = [generator.layout.unflatten(vector) for vector in made]
    if not torch.stack(made.aminmax()).isfinite().all():
        for state_dict in state_dicts:
            generator.layout.check(state_dict)
    return state_dicts


def write_adapter(generator: ConditionalVAE, folder: Path, order: Order, base: FrozenBase | None = None) -> Generation:
    """Generate an adapter into an existing folder: what PEFT writes, and ``generation.json``; the card is not written.

    Raises:
        LoraFactoryError: As `fulfil`.
    """
    return record(generator, folder, order, fulfil(generator, order, base))


@own_precision()
def record(generator: ConditionalVAE, folder: Path, order: Order, made: Made) -> Generation:
    """Write a generated adapter into an existing folder; see `write_adapter`."""
    vectors, given = made.vectors, made.given
    save_adapter_config(made.layout, folder)
    sha256 = save_adapter_weights(made.state_dict, folder)
    if given:
        kept = {name: vector.detach().float().cpu().contiguous() for name, vector in given.items()}
        save_file(kept, folder / CONDITION_FILE, metadata={"format": "pt"})
    nearest = generator.nearest_tasks(vectors)
    name, commit = generator.config.name_or_path or "", getattr(generator.config, "_commit_hash", None)
    generation = Generation(
        text=described(order),
        texts=order.texts if isinstance(order.text, Mapping) else None,
        conditions=tuple(sorted(given)),
        seed=order.seed,
        temperature=order.temperature,
        chat_template=generator.config.chat_template,
        rank=order.rank,
        rank_error=round(made.lost, 6),
        refined_on=made.refined_on,
        nearest_tasks=tuple(nearest),
        distance=round(1 - nearest[0]["similarity"], 4) if nearest else None,
        zoo_distance=zoo_distance(generator, list(vectors)),
        generator=(name if commit and is_hub_id(name) else Path(name).name) or None,
        generator_commit=commit,
        base_model=generator.layout.base_model,
        base_revision=generator.layout.base_revision,
        sha256=sha256,
        versions=versions(),
    )
    write_json(folder / GENERATION_FILE, asdict(generation), durable=False)
    return generation


def described(order: Order) -> str | None:
    """What an order's adapter is for, in one text: of several texts, each with its weight."""
    if order.text is None or isinstance(order.text, str):
        return order.text
    return " + ".join(f"{weight:g} * {text!r}" for text, weight in order.texts.items())


@torch.no_grad()
@own_precision()
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
        - ``verdict``: "near" where half of the known tasks or fewer are nearer to their own nearest neighbour, "far"
          where all are, "between" otherwise and where there are fewer than two.
        - ``sentence``: The verdict in words.
    """
    rows = _task_vectors(generator, order, order.conditions)
    targets, vectors = _targets(generator, order, rows), _summed(order, rows)
    nearest = generator.nearest_tasks(vectors)
    distance = round(1 - nearest[0]["similarity"], 4) if nearest else None
    others = _neighbour_distances(generator, list(vectors))
    known = {name: generator.get_buffer(f"{name}_task_vectors") for name in vectors}
    sizes = _targets(generator, order, known, each=True).norm(dim=1)
    farther = None if distance is None or not others else round(fmean(distance > it for it in others), 4)
    if farther is None:
        verdict, sentence = "between", "The generator knows fewer than two tasks, so there is nothing to compare with."
    elif farther >= 1:
        verdict = "far"
        sentence = "Far from every task that the generator knows: expect little of this adapter."
    elif farther > 0.5:
        verdict = "between"
        sentence = "Between the tasks that the generator knows: expect a mixture of their adapters."
    else:
        verdict, sentence = "near", "Near a task that the generator knows: expect an adapter like that task's."
    return {
        "verdict": verdict,
        "sentence": sentence,
        "nearest": nearest,
        "distance": distance,
        "farther_than": farther,
        "use": round(float(targets.norm() / sizes.median().clamp_min(1e-12)), 4),
    }


def zoo_distance(generator: ConditionalVAE, modalities: list[str]) -> float | None:
    """The median over training tasks of the cosine distance from the nearest other one; None for fewer than two."""
    distances = _neighbour_distances(generator, modalities)
    return round(median(distances), 4) if distances else None


def _warn_of_strangers(generator: ConditionalVAE, texts: Iterable[str], vectors: Tensor) -> None:
    """Warn of texts that are farther from their nearest task than any task of the zoo is from its own nearest one."""
    if len(generator.config.tasks or []) < 2:
        return
    farthest = max(_neighbour_distances(generator, ["text"]))
    for text, vector in zip(texts, vectors, strict=True):
        nearest = generator.nearest_tasks({"text": vector}, 1)[0]
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
