"""The extras: each brings what its users import, and who lacks a package is told which extra to install."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lora_factory.arguments import ServeArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.cond_p_diff import train_cond_p_diff
from lora_factory.evaluation.detection import mean_average_precision
from lora_factory.models.loading import load_base_model
from lora_factory.reporting.plots import svg_settings
from lora_factory.serving.app import open_app
from lora_factory.serving.launch import serve

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[Requirement]] = {
    name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()
}
ZOO = ({"task": torch.zeros(2, 4)}, {"task": torch.zeros(1, 4)})
USERS: dict[tuple[str, str], Callable[[Path], Any]] = {
    ("app", "gradio"): lambda model: open_app(None).__enter__(),
    ("baselines", "diffusers"): lambda model: train_cond_p_diff(*ZOO),
    ("images", "faster_coco_eval"): lambda model: mean_average_precision([], []),
    ("images", "torchmetrics"): lambda model: mean_average_precision([], []),
    ("quantization", "bitsandbytes"): lambda model: load_base_model(model, quantization="4bit"),
    ("report", "matplotlib"): lambda model: svg_settings().__enter__(),
    ("report", "sklearn"): lambda model: svg_settings().__enter__(),
    ("serve", "fastapi"): lambda model: serve(model, ServeArguments()),
    ("serve", "uvicorn"): lambda model: serve(model, ServeArguments()),
}
DISTRIBUTIONS = {"sklearn": "scikit-learn"}


@pytest.mark.parametrize(("extra", "package"), USERS)
def test_who_lacks_a_package_is_told_which_extra_brings_it(
    extra: str, package: str, pico_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        LoraFactoryError, match=rf"^.* needs .*\b{package}; run: pip install 'lora-factory\[{extra}\]'$"
    ):
        USERS[extra, package](pico_model_folder)
    names = {canonicalize_name(requirement.name) for requirement in EXTRAS[extra]}
    assert canonicalize_name(DISTRIBUTIONS.get(package, package)) in names


def test_every_extra_for_users_has_a_user_and_all_brings_every_one_that_needs_no_gpu() -> None:
    for_users = {extra for extra, _ in USERS}
    assert for_users == set(EXTRAS) - {"all", "test", "dev", "docs"}
    (everything,) = EXTRAS["all"]
    assert everything.name == "lora-factory" and everything.extras == for_users - {"quantization"}


def test_what_is_installed_is_what_the_floors_allow() -> None:
    for requirement in flat(map(Requirement, PROJECT["dependencies"]), *EXTRAS.values()):
        with suppress(PackageNotFoundError):
            assert requirement.specifier.contains(version(requirement.name), prereleases=True), requirement


def test_every_extra_that_a_message_or_a_page_names_is_there() -> None:
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *root.glob("docs/**/*.md"), *root.glob("lora_factory/**/*.py")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = {name for names in re.findall(r"lora-factory\[([\w,]+)\]", text) for name in names.split(",")}
    assert len(named) > 4 and named <= set(EXTRAS)


def flat(*groups: Iterable[Requirement]) -> Iterable[Requirement]:
    """All requirements on other projects."""
    return (requirement for group in groups for requirement in group if requirement.name != "lora-factory")
