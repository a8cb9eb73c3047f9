"""The generator's configuration: other formats and impossible values are refused."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from lora_factory.errors import LoraFactoryError
from lora_factory.generator.configuration import CVAELoRAConfig


def test_values_are_kept() -> None:
    config = CVAELoRAConfig.from_dict({"format_version": 2, "width": 8, "core": "diagonal"})
    assert (config.width, config.core, config.decoder, config.format_version) == (8, "diagonal", "core", 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 5}, "reads versions up to 4; pip install --upgrade lora-factory"),
        ({"format_version": 5, "width": "what only a newer version knows"}, "reads versions up to 4"),
        ({"format_version": 0}, "format_version=0"),
        ({}, "the generator has format 1, that of networks which lora-factory no longer has"),
        ({"format_version": 1, "width": "of another kind then"}, "generator has format"),
        ({"core": "round"}, "core='round': choose 'full' or 'diagonal'"),
        ({"decoder": "token"}, "decoder='token': choose 'core' or 'conv1d'"),
        ({"text_encoder": 3}, "text_encoder"),
        ({"latent_size": 0}, "must be at least 1"),
        ({"depth": 10**6}, "larger than any real generator's"),
        ({"modalities": {"../x": 3}}, "modality '../x'"),
        ({"modalities": {"text": 0}}, "of width 0"),
        (
            {"modalities": {"text": 3}, "directions": {"text": 4}},
            "4 of 'text', expected 1 or more",
        ),
        ({"modalities": {"text": 3}, "directions": {"hidden": 1}}, "directions: 1 of 'hidden'"),
        ({"tasks": [{"name": "../x", "descriptions": ["x"]}]}, "'../x' cannot be a file name"),
        ({"tasks": [{"name": "x", "descriptions": []}]}, "must be texts, at least one"),
        ({"tasks": [{"name": "x", "descriptions": ["x"], "license": 3}]}, "license=3 must be a text or null"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((StrictDataclassError, LoraFactoryError)) as caught:
        CVAELoRAConfig.from_dict({"format_version": 2} | values if values else values)
    assert message in str(caught.value)
