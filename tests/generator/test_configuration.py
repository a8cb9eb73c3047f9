"""The generator's configuration: older formats are upgraded, newer and impossible ones refused."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from lora_factory.errors import LoraFactoryError
from lora_factory.generator import configuration
from lora_factory.generator.configuration import CVAELoRAConfig


def test_older_formats_are_upgraded_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name != "size"} | {"width": values["size"]}

    monkeypatch.setattr(configuration, "FORMAT_VERSION", 3)
    steps = {1: rename, 2: lambda values: values | {"width": 2 * values["width"]}}
    monkeypatch.setattr(configuration, "UPGRADES", steps)
    assert CVAELoRAConfig.from_dict({"format_version": 1, "size": 8}).width == 16
    assert CVAELoRAConfig.from_dict({"format_version": 2, "width": 8}).width == 16
    config = CVAELoRAConfig.from_dict({"format_version": 3, "width": 8})
    assert (config.width, config.format_version) == (8, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 2}, "reads versions up to 1; pip install --upgrade lora-factory"),
        ({"format_version": 2, "width": "what only a newer version knows"}, "reads versions up to 1"),
        ({"format_version": 0}, "format_version=0"),
        ({"depth": 10**6}, "larger than any real generator's"),
        ({"modalities": {"../x": 3}}, "modality '../x'"),
        ({"modalities": {"text": 0}}, "of width 0"),
        ({"tasks": [{"name": "../x", "descriptions": ["x"]}]}, "'../x' cannot be a file name"),
        ({"tasks": [{"name": "x", "descriptions": []}]}, "must be texts, at least one"),
        ({"tasks": [{"name": "x", "descriptions": ["x"], "license": 3}]}, "license=3 must be a text or null"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((StrictDataclassError, LoraFactoryError)) as caught:
        CVAELoRAConfig.from_dict(values)
    assert message in str(caught.value)
