"""The generator's configuration: what it writes adapters for, what it listens to, and how large it is."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

FORMAT_VERSION = 1
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
        modalities: Width of every task vector that the generator listens to, for example ``{"text": 384}``.
        text_encoder: Hub id (or folder) of the sentence encoder of the ``text`` modality.
        tasks: The tasks of the zoo that it was trained on: ``{"name", "descriptions", "license"}`` each.
        zoo_fingerprint: ``AdapterZoo.fingerprint()`` of that zoo.
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
    tasks: list[dict[str, Any]] | None = None
    zoo_fingerprint: str | None = None
    decoder: str = "token"
    width: int = 384
    depth: int = 2
    latent_size: int = 32
    channels: list[int] | tuple[int, ...] = PAPER_CHANNELS
    kl_weight: float | int = 1.0
    free_bits: float | int = 0.05
    format_version: int = FORMAT_VERSION

    def validate_generator(self) -> None:
        """Check what the types cannot say."""
        if self.decoder not in ("token", "conv1d"):
            raise ValueError(f"decoder={self.decoder!r}: choose 'token' or 'conv1d'")
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version={self.format_version}: this lora-factory reads versions up to {FORMAT_VERSION}; "
                "pip install --upgrade lora-factory"
            )
        if min(self.width, self.depth, self.latent_size, len(self.channels), *self.channels) < 1:
            raise ValueError("width, depth, latent_size and channels must be at least 1")
