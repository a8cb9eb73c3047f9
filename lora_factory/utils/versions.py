"""Versions of this package and of those that its results depend on."""

from __future__ import annotations

from importlib.metadata import version

from lora_factory._version import __version__

LIBRARIES = ("torch", "transformers", "peft")


def versions() -> dict[str, str]:
    """The packages that make a run, by name."""
    return {"lora-factory": __version__, **{name: version(name) for name in LIBRARIES}}


def package_versions() -> dict[str, str]:
    """The versions of this package and of those that its files depend on."""
    return {"lora-factory": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}}
