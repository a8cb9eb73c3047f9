"""One generated adapter: the record of how it was made, and its PEFT folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from lora_factory.adapters.attach import check_adapter_name
from lora_factory.adapters.folder import ADAPTER_FILE, CONDITION_FILE, GENERATION_FILE, Generation, save_adapter_config
from lora_factory.arguments import REFINE_STEPS
from lora_factory.generator.refine import refine_state_dict
from lora_factory.generator.vae import ConditionalVAE
from lora_factory.models.losses import FrozenBase
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.given import as_examples, as_images, as_temperature, as_text, as_vectors, as_whole_number
from lora_factory.tasks.image_files import ImageLike
from lora_factory.utils.files import write_json
from lora_factory.utils.paths import sha256_file
from lora_factory.utils.safe_files import is_hub_id
from lora_factory.utils.versions import versions


@dataclass(frozen=True)
class Order:
    """A request for one adapter; the fields are the arguments of ``generate_adapter``.

    Whatever a user may hand in for them is brought into one form: numpy integers, iterators, pairs, dictionaries.

    Raises:
        LoraFactoryError: When a value is of another kind, or out of its range.
    """

    text: str | None
    examples: Sequence[Example | ImageExample | str] | None = None
    images: Sequence[ImageLike] | None = None
    conditions: Mapping[str, Tensor] | None = None
    seed: int = 0
    temperature: float = 0.0
    refine_steps: int = REFINE_STEPS
    adapter_name: str = "default"

    def __post_init__(self) -> None:
        """Check every value at birth."""
        check_adapter_name(self.adapter_name)
        given = {
            "text": as_text(self.text),
            "examples": None if self.examples is None else as_examples(self.examples),
            "images": None if self.images is None else as_images(self.images),
            "conditions": as_vectors(self.conditions),
            "seed": as_whole_number(self.seed, "seed", 2**64 - 1),  # what torch.Generator takes
            "temperature": as_temperature(self.temperature),
            "refine_steps": as_whole_number(self.refine_steps, "refine_steps"),
        }
        for name, value in given.items():
            object.__setattr__(self, name, value)


def fulfil(
    generator: ConditionalVAE, order: Order, base: FrozenBase | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Generate an adapter and, where examples are given, refine it on them.

    A generator that is not conditioned on examples uses them for the refinement alone, if there is another
    condition.

    Args:
        generator: Writes the adapter.
        order: What is asked.
        base: The base model, with ``order.examples``.

    Returns:
        The adapter's state dict, and the task vectors that were made of examples and images or given as such.

    Raises:
        LoraFactoryError: When there is nothing to condition on, or something cannot be read.
    """
    warn_of_a_stranger(generator, order.text)
    given = dict(order.conditions or {})
    if order.images is not None:
        given |= generator.encode_images(order.images)
    if order.examples is not None and base is not None:
        heard = "hidden" in (generator.config.modalities or {})
        if heard or not (order.text or given) or not order.refine_steps:
            given |= generator.encode_examples(order.examples, base.model, base.tokenizer)
    state_dict = write_weights(generator, replace(order, conditions=given))
    if order.examples is not None and base is not None:
        in_chat = generator.config.chat_template
        state_dict = refine_state_dict(base, state_dict, order.examples, order.refine_steps, chat_template=in_chat)
    return state_dict, given


@torch.no_grad()
def write_weights(generator: ConditionalVAE, order: Order) -> dict[str, Tensor]:
    """The adapter of an order's text and task vectors, as the network writes it: float32 on the CPU."""
    vectors = generator.conditions(order.text, order.conditions)
    rows = {name: vector[None].to(generator.bias) for name, vector in vectors.items()}
    training = generator.training
    generator.eval()
    vector = generator.generate_vector(rows, seed=order.seed, temperature=order.temperature)[0]
    generator.train(training)
    state_dict = generator.layout.unflatten(vector.float().cpu())
    generator.layout.check(state_dict)
    return state_dict


def write_adapter(generator: ConditionalVAE, folder: Path, order: Order, base: FrozenBase | None = None) -> Generation:
    """Generate an adapter into an existing folder: what PEFT writes, and ``generation.json``; the card is not written.

    Raises:
        LoraFactoryError: As :func:`fulfil`.
    """
    state_dict, given = fulfil(generator, order, base)
    vectors = generator.conditions(order.text, given)
    save_adapter_config(generator.layout, folder)
    save_file(state_dict, folder / ADAPTER_FILE, metadata={"format": "pt"})
    if given:
        kept = {name: vector.detach().float().cpu().contiguous() for name, vector in given.items()}
        save_file(kept, folder / CONDITION_FILE, metadata={"format": "pt"})
    nearest = generator.nearest_tasks(vectors)
    name, commit = generator.config.name_or_path or "", getattr(generator.config, "_commit_hash", None)
    generation = Generation(
        text=order.text,
        conditions=tuple(sorted(given)),
        seed=order.seed,
        temperature=order.temperature,
        chat_template=generator.config.chat_template,
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


def zoo_distance(generator: ConditionalVAE, modalities: list[str]) -> float | None:
    """The median over training tasks of the cosine distance from the nearest other one; None for fewer than two."""
    distances = _neighbour_distances(generator, modalities)
    return round(median(distances), 4) if distances else None


def warn_of_a_stranger(generator: ConditionalVAE, text: str | None) -> None:
    """Warn of a text that is farther from its nearest task than any task of the zoo is from its own nearest one."""
    if text is None or len(generator.config.tasks or []) < 2:
        return
    vectors = generator.conditions(text)
    nearest, farthest = generator.nearest_tasks(vectors, 1)[0], max(_neighbour_distances(generator, ["text"]))
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
