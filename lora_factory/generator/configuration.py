"""The generator's configuration: its adapters' layout, its modalities and its sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from lora_factory.arguments import MAX_LAYERS, MAX_SIZE
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.paths import safe_name
from lora_factory.utils.versions import check_format

FORMAT_VERSION, OLDEST_VERSION = 4, 2
PAPER_CHANNELS = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)


def paper_channels(depth: int) -> tuple[int, ...]:
    """Channels of ``depth`` convolutions as in the paper: doubled from 8 up to 256, and back."""
    rising = tuple(min(256, 8 * 2**layer) for layer in range((depth + 1) // 2))
    return rising + rising[::-1][depth % 2 :]


@strict
class CVAELoRAConfig(PreTrainedConfig):
    """Configuration of a `CVAELoRAGenerator`.

    Attributes:
        layout: ``AdapterLayout.to_dict()`` of the adapters that the generator writes; names base model and commit.
        modalities: Width of the task vectors of every modality of conditions, for example ``{"text": 384}``.
        directions: How many coordinates are made of a modality's task vectors; one that is not named keeps its own.
            Format 2 has no such field: all modalities are named there, with their width.
        text_encoder: Hub id (or folder) of the sentence encoder of the ``text`` modality.
        image_encoder: Hub id (or folder) of the image encoder of the ``image`` modality.
        tasks: The tasks that it was trained on: ``{"name", "descriptions", "license", "dataset"}`` each, the data set
            by its Hub id, null when it has none.
        zoo_fingerprint: ``AdapterZoo.fingerprint()`` of the zoo that it was trained on; null without one.
        chat_template: Whether its adapters were trained in the tokenizer's chat template.
        decoder: ``"core"`` (default): a basis that all adapters share, and a generated core; or ``"conv1d"``, the
            paper's convolutional network over the weights themselves.
        core: ``"full"`` (default) R x R cores, or ``"diagonal"`` ones.
        width: Hidden size of the network that reads conditions (``"core"``).
        depth: Its hidden layers.
        latent_size: Size of the latent z; the paper uses 256.
        channels: Output channels of the convolutions of ``"conv1d"``; their number is its depth (the paper: 12).
        kl_weight: Factor of the KL divergence: 1 is the evidence lower bound; the paper uses 0.005 per squared error.
        format_version: Version of this file's format. Generators of formats 2 and 3 do not filter texts, and take the
            mean of a few examples for that of the task.
    """

    model_type = "cvae_lora"

    layout: dict[str, Any] | None = None
    modalities: dict[str, int] | None = None
    directions: dict[str, int] | None = None
    text_encoder: str | None = None
    image_encoder: str | None = None
    tasks: list[dict[str, Any]] | None = None
    zoo_fingerprint: str | None = None
    chat_template: bool = False
    decoder: str = "core"
    core: str = "full"
    width: int = 256
    depth: int = 1
    latent_size: int = 128
    channels: list[int] | tuple[int, ...] = PAPER_CHANNELS
    kl_weight: float | int = 1.0
    format_version: int = FORMAT_VERSION

    @classmethod
    def own_fields(cls) -> set[str]:
        """The names of the values above, which are all that ``config.json`` has to say."""
        return {name for name in cls.__annotations__ if name != "model_type"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401
        """Build a configuration from JSON values of this format; see `check_version`."""
        check_version(config_dict)
        if config_dict.get("format_version") == OLDEST_VERSION:
            config_dict = {"directions": config_dict.get("modalities"), **config_dict}
        return super().from_dict(config_dict, **kwargs)

    def validate_generator(self) -> None:
        """Check what the types cannot say."""
        for name, choices in (("decoder", ("core", "conv1d")), ("core", ("full", "diagonal"))):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r}: choose {choices[0]!r} or {choices[1]!r}")
        for name in ("text_encoder", "image_encoder", "zoo_fingerprint"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"{name}={value!r} must be a text or null")
        check_format(self.format_version, FORMAT_VERSION, "the generator")
        sizes = (self.width, self.depth, self.latent_size, len(self.channels), *self.channels)
        if min(sizes) < 1:
            raise ValueError("width, depth, latent_size and channels must be at least 1")
        if max(sizes) > MAX_SIZE or max(self.depth, len(self.channels)) > MAX_LAYERS:
            raise ValueError(f"width, depth, latent_size and channels {sizes} are larger than any real generator's")
        for name, width in (self.modalities or {}).items():
            if not re.fullmatch("[a-z][a-z0-9_]{0,30}", name) or not 1 <= width <= MAX_SIZE:
                raise ValueError(f"modality {name!r} of width {width}: expected a short lower-case name and 1 or more")
        for name, count in (self.directions or {}).items():
            if not 1 <= count <= (self.modalities or {}).get(name, 0):
                raise ValueError(f"directions: {count} of {name!r}, expected 1 or more, at most its width")
        for task in self.tasks or []:
            check_task(task)


def check_version(values: Mapping[str, Any]) -> None:
    """Check the format of a ``config.json``.

    Raises:
        LoraFactoryError: When it is newer than this version, older, or no number.
    """
    version = values.get("format_version", 1)
    check_format(version, FORMAT_VERSION, "the generator")
    if version < OLDEST_VERSION:
        raise LoraFactoryError(
            f"the generator has format {version}, that of networks which lora-factory no longer has; train it again, "
            "with lora-factory train or train_generator"
        )


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
