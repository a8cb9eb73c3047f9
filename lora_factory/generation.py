"""One generated adapter: the record of how it was made, and its PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from lora_factory import __version__
from lora_factory.adapters import ADAPTER_FILE, save_adapter_config
from lora_factory.arguments import REFINE_STEPS
from lora_factory.base_loss import FrozenBase
from lora_factory.data_source import Example
from lora_factory.files import sha256_file, write_json
from lora_factory.image_data import ImageExample
from lora_factory.images import ImageLike
from lora_factory.refine import refine_state_dict
from lora_factory.safe_files import is_hub_id

if TYPE_CHECKING:
    from lora_factory.modeling import CVAELoRAGenerator

GENERATION_FILE, CONDITION_FILE = "generation.json", "condition.safetensors"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How an adapter was made; ``generation.json``.

    Attributes:
        text: What it is for, as it was given.
        conditions: The modalities of task vectors that were given beside or instead of a text; they are kept in
            ``condition.safetensors``.
        seed: Seed of the sample.
        temperature: 0 for the most likely adapter.
        chat_template: Whether it expects texts in the tokenizer's chat template.
        refined_on: On how many examples it was refined; 0 when it is as the network wrote it.
        nearest_tasks: The training tasks nearest to the condition, best first: ``{"task", "similarity"}``.
        distance: Cosine distance of the condition from the nearest task.
        zoo_distance: The median of the training tasks' own distances from their nearest neighbour.
        generator: Hub id of the generator, or the name of its folder.
        generator_commit: Its commit on the Hub, if it came from there.
        base_model: Hub id (or folder) of the base model.
        base_revision: Its commit, if known.
        sha256: SHA-256 of ``adapter_model.safetensors``.
        versions: Versions of the packages that made it.
    """

    text: str | None
    conditions: tuple[str, ...]
    seed: int
    temperature: float
    chat_template: bool = False
    refined_on: int = 0
    nearest_tasks: tuple[Mapping[str, Any], ...]
    distance: float | None
    zoo_distance: float | None
    generator: str | None
    generator_commit: str | None
    base_model: str
    base_revision: str | None
    sha256: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Order:
    """What a user asks of a generator; the fields are the arguments of ``generate_adapter``."""

    text: str | None
    examples: Sequence[Example | ImageExample | str] | None = None
    images: Sequence[ImageLike] | None = None
    conditions: Mapping[str, Tensor] | None = None
    seed: int = 0
    temperature: float = 0.0
    refine_steps: int = REFINE_STEPS


def fulfil(
    generator: CVAELoRAGenerator, order: Order, base: FrozenBase | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Generate an adapter and, where examples are given, refine it on them.

    A generator that does not listen to examples takes them for the second alone, if there is something else to listen
    to.

    Args:
        generator: Writes the adapter.
        order: What is asked.
        base: The base model, with ``order.examples``.

    Returns:
        The adapter's state dict, and the task vectors that were made of examples and images or given as such.

    Raises:
        LoraFactoryError: When there is nothing to condition on, or something cannot be read.
    """
    given = dict(order.conditions or {})
    if order.images is not None:
        given |= generator.encode_images(order.images)
    if order.examples is not None and base is not None:
        heard = "hidden" in (generator.config.modalities or {})
        if heard or not (order.text or given) or not order.refine_steps:
            given |= generator.encode_examples(order.examples, base.model, base.tokenizer)
    state_dict = generator.generate_state_dict(
        order.text, conditions=given, seed=order.seed, temperature=order.temperature
    )
    if order.examples is not None and base is not None:
        in_chat = generator.config.chat_template
        state_dict = refine_state_dict(base, state_dict, order.examples, order.refine_steps, chat_template=in_chat)
    return state_dict, given


def write_adapter(
    generator: CVAELoRAGenerator, folder: Path, order: Order, base: FrozenBase | None = None
) -> Generation:
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
        versions=package_versions(),
    )
    write_json(folder / GENERATION_FILE, asdict(generation))
    return generation


def zoo_distance(generator: CVAELoRAGenerator, modalities: list[str]) -> float | None:
    """The median over training tasks of the cosine distance from the nearest other one; None for fewer than two."""
    rows = [functional.normalize(generator.get_buffer(f"{name}_task_vectors").float(), dim=-1) for name in modalities]
    similarity = torch.stack([row @ row.T for row in rows]).mean(0)
    if len(similarity) < 2:
        return None
    similarity.fill_diagonal_(-1)
    return round(1 - median(similarity.max(0).values.tolist()), 4)


def package_versions() -> dict[str, str]:
    """The versions of this package and of those that its files depend on."""
    return {"lora-factory": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}}
