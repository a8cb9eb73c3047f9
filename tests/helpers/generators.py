"""Generators without training."""

from __future__ import annotations

from pathlib import Path

import torch

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.generator.configuration import CVAELoRAConfig
from lora_factory.generator.modeling import CVAELoRAGenerator


def make_generator(
    layout: AdapterLayout,
    encoder: Path,
    decoder: str = "core",
    *,
    text: int = 32,
    hidden: int = 64,
    images: tuple[Path, int] | None = None,
) -> CVAELoRAGenerator:
    """An untrained generator of weights of a real adapter's size that differ from text to text.

    Args:
        layout: The adapters'.
        encoder: Folder of the text encoder.
        decoder: "core" or "conv1d".
        text: Width of the text encoder's vectors.
        hidden: Width of the vectors of examples.
        images: Folder of an image encoder and the width of its vectors; default: it reads no images.
    """
    config = CVAELoRAConfig(
        layout=layout.to_dict(),
        modalities={"text": text, "hidden": hidden} | ({"image": images[1]} if images else {}),
        directions={"hidden": 2} | ({"image": images[1]} if images else {}),
        text_encoder=str(encoder),
        image_encoder=str(images[0]) if images else None,
        tasks=[{"name": name, "descriptions": [name], "license": None} for name in ("poems", "code", "law")],
        decoder=decoder,
        width=32,
        depth=1,
        latent_size=8,
        channels=(3, 4),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = CVAELoRAGenerator(config)
        with torch.no_grad():
            for parameter in generator.network.parameters():  # as if trained: no layer is left at zero
                parameter.add_(0.1 * torch.randn(parameter.shape))
            if generator.basis is None:
                generator.center.copy_(0.3 * torch.randn(layout.size))
            else:
                generator.basis.factors.copy_(0.3 * torch.randn(layout.size))
                generator.center.copy_(generator.basis.identity())
            generator.scale.fill_(0.3)
            generator.spread.fill_(0.03)
        generator.fit_conditions(
            {name: {task: torch.randn(2, width) for task in "abc"} for name, width in config.modalities.items()}
        )
    return generator.eval()
