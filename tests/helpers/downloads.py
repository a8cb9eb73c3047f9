"""The Hub's cache, as it is when models have been downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

COMMIT = "0" * 40


def put_into_cache(models: Mapping[str, Path], cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Make a folder the Hub's cache, with models from other folders under the names of real ones."""
    for name, folder in models.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "snapshots").mkdir()
        (repository / "snapshots" / COMMIT).symlink_to(folder)
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def hide_packages_with_models(patch: pytest.MonkeyPatch) -> None:
    """Python packages that hold models count as not installed."""
    patch.setattr("lora_factory.models.embedded.find_spec", lambda name: None)
