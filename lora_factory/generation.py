"""One generated adapter: the record of how it was made, and its PEFT folder."""

from __future__ import annotations

from collections.abc import Mapping
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
from lora_factory.adapters import ADAPTER_FILE
from lora_factory.files import sha256_file, write_json
from lora_factory.generator_files import is_hub_id

if TYPE_CHECKING:
    from lora_factory.modeling import CVAELoRAGenerator

CONDITION_FILE = "condition.safetensors"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How an adapter was made; ``generation.json``.

    Attributes:
        text: What it is for, as it was given.
        conditions: The modalities of task vectors that were given beside or instead of a text; they are kept in
            ``condition.safetensors``.
        seed: Seed of the sample.
        temperature: 0 for the most likely adapter.
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
    nearest_tasks: tuple[Mapping[str, Any], ...]
    distance: float | None
    zoo_distance: float | None
    generator: str | None
    generator_commit: str | None
    base_model: str
    base_revision: str | None
    sha256: str
    versions: Mapping[str, str]


def write_adapter(
    generator: CVAELoRAGenerator,
    folder: Path,
    *,
    text: str | None,
    conditions: Mapping[str, Tensor] | None,
    seed: int,
    temperature: float,
) -> Generation:
    """Generate an adapter into an existing folder: what PEFT writes, and ``generation.json``; the card is not written.

    Raises:
        LoraFactoryError: When the text is empty, or a task vector has another size.
    """
    vectors = generator.conditions(text, conditions)
    state_dict = generator.generate_state_dict(conditions=vectors, seed=seed, temperature=temperature)
    generator.layout.peft_config().save_pretrained(str(folder))
    save_file(state_dict, folder / ADAPTER_FILE, metadata={"format": "pt"})
    if conditions:
        given = {name: vector.detach().float().cpu().contiguous() for name, vector in conditions.items()}
        save_file(given, folder / CONDITION_FILE, metadata={"format": "pt"})
    nearest = generator.nearest_tasks(vectors)
    name, commit = generator.config.name_or_path or "", getattr(generator.config, "_commit_hash", None)
    generation = Generation(
        text=text,
        conditions=tuple(sorted(conditions or ())),
        seed=seed,
        temperature=temperature,
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
    write_json(folder / "generation.json", asdict(generation))
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
