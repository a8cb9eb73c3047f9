"""The generator's configuration: its adapters' layout, its modalities and its sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from lora_factory.arguments import MAX_LAYERS, MAX_SIZE
from lora_factory.utils.paths import safe_name
from lora_factory.utils.versions import check_format

FORMAT_VERSION = 1
# What turns the values of an older config.json into those of the next version, by the older version.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
PAPER_CHANNELS = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)


def paper_channels(depth: int) -> tuple[int, ...]:
    """Channels of ``depth`` convolutions as in the paper: doubled from 8 up to 256, and back."""
    rising = tuple(min(256, 8 * 2**layer) for layer in range((depth + 1) // 2))
    return rising + rising[::-1][depth % 2 :]


@strict
class CVAELoRAConfig(PreTrainedConfig):
    """Configuration of a :class:`~lora_factory.CVAELoRAGenerator`.

    Args:
        layout: ``AdapterLayout.to_dict()`` of the adapters that the generator writes; names base model and commit.
        modalities: Width of the task vectors of every modality of conditions, for example ``{"text": 384}``.
        text_encoder: Hub id (or folder) of the sentence encoder of the ``text`` modality.
        image_encoder: Hub id (or folder) of the image encoder of the ``image`` modality.
        tasks: The tasks of the zoo that it was trained on: ``{"name", "descriptions", "license",
            "dataset"}`` each, the data set by its Hub id, null when it has none.
        zoo_fingerprint: ``AdapterZoo.fingerprint()`` of that zoo.
        chat_template: Whether its adapters were trained in the tokenizer's chat template.
        reach: Two distances by modality: how near a known task a condition is believed, and from where on it is not
            (`familiarity.py`); null where every condition is.
        recall: Three numbers by modality, for those that tell the tasks apart: how a condition is recognised as one of
            a known task (`recall.py`); null where the known tasks' adapters are not kept.
        decoder: ``"token"`` (default) or ``"conv1d"``, the paper's convolutional network.
        width: Hidden size of the token decoder.
        depth: Residual blocks of the token decoder.
        latent_size: Size of the latent z; the paper uses 256.
        channels: Output channels of the convolutions of ``"conv1d"``; their number is its depth (the paper: 12).
        kl_weight: Factor of the KL divergence; the paper uses 0.005.
        free_bits: Nats of KL a latent that cost nothing (token decoder).
        format_version: Version of this file's format.
    """

    model_type = "cvae_lora"

    layout: dict[str, Any] | None = None
    modalities: dict[str, int] | None = None
    text_encoder: str | None = None
    image_encoder: str | None = None
    tasks: list[dict[str, Any]] | None = None
    zoo_fingerprint: str | None = None
    chat_template: bool = False
    reach: dict[str, list[float]] | None = None
    recall: dict[str, list[float]] | None = None
    decoder: str = "token"
    width: int = 384
    depth: int = 2
    latent_size: int = 32
    channels: list[int] | tuple[int, ...] = PAPER_CHANNELS
    kl_weight: float | int = 1.0
    free_bits: float | int = 0.05
    format_version: int = FORMAT_VERSION

    @classmethod
    def own_fields(cls) -> set[str]:
        """The names of the values above, which are all that ``config.json`` has to say."""
        return {name for name in cls.__annotations__ if name != "model_type"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401
        """Build a configuration from JSON values, those of an older format after an `upgrade`."""
        return super().from_dict(upgrade(config_dict), **kwargs)

    def validate_generator(self) -> None:
        """Check what the types cannot say."""
        if self.decoder not in ("token", "conv1d"):
            raise ValueError(f"decoder={self.decoder!r}: choose 'token' or 'conv1d'")
        check_format(self.format_version, FORMAT_VERSION, "the generator")
        sizes = (self.width, self.depth, self.latent_size, len(self.channels), *self.channels)
        if min(sizes) < 1:
            raise ValueError("width, depth, latent_size and channels must be at least 1")
        if max(sizes) > MAX_SIZE or max(self.depth, len(self.channels)) > MAX_LAYERS:
            raise ValueError(f"width, depth, latent_size and channels {sizes} are larger than any real generator's")
        for name, width in (self.modalities or {}).items():
            if not re.fullmatch("[a-z][a-z0-9_]{0,30}", name) or not 1 <= width <= MAX_SIZE:
                raise ValueError(f"modality {name!r} of width {width}: expected a short lower-case name and 1 or more")
        if self.reach is not None and set(self.reach) != set(self.modalities or {}):
            raise ValueError(f"reach={self.reach}: expected one entry for each of the modalities {self.modalities}")
        if self.recall is not None and not 0 < len(set(self.recall) & set(self.modalities or {})) == len(self.recall):
            raise ValueError(f"recall={self.recall}: expected entries for some of the modalities {self.modalities}")
        for field, entries, count in (("reach", self.reach, 2), ("recall", self.recall, 3)):
            for name, numbers in (entries or {}).items():
                rising = len(numbers) == count and 0 <= numbers[-2] < numbers[-1] < math.inf
                if not rising or not 0 <= numbers[0] < math.inf:
                    raise ValueError(
                        f"{field} of {name!r} is {numbers}: expected {count} numbers, the last two rising"
                    )
        for task in self.tasks or []:
            check_task(task)


def upgrade(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a ``config.json`` as this version writes them: older ones are changed, one version at a time.

    Raises:
        LoraFactoryError: When the format is newer than this version, or its number is none.
    """
    upgraded = dict(values)
    oldest = upgraded.get("format_version", 1)
    check_format(oldest, FORMAT_VERSION, "the generator")
    for version in range(oldest, FORMAT_VERSION):
        upgraded = UPGRADES[version](upgraded) | {"format_version": version + 1}
    return upgraded


def check_task(task: dict[str, Any]) -> None:
    """Check one entry of ``tasks``.

    Raises:
        ValueError: When its name cannot be a file's, a description or the licence is no text, or there is none.
    """
    safe_name(task.get("name", ""))
    descriptions = task.get("descriptions")
    if not isinstance(descriptions, list) or not descriptions or not all(isinstance(it, str) for it in descriptions):
        raise ValueError(f"task {task['name']}: descriptions={descriptions!r} must be texts, at least one")
    for key in ("license", "dataset"):
        if not isinstance(task.get(key), str | None):
            raise ValueError(f"task {task['name']}: {key}={task[key]!r} must be a text or null")
