"""The wheel: built offline, installed in a virtual environment of its own, imported from there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import lora_factory

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.cfg", "README.md", "LICENSE", "lora_factory", "model_card_templates")
SITE_PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'))"
PROBE = """
import json, sys
from importlib import metadata, resources
import lora_factory
light = not {"torch", "transformers"} & set(sys.modules)
templates = resources.files("lora_factory.model_card_templates")
print(json.dumps({
    "file": lora_factory.__file__,
    "version": [lora_factory.__version__, metadata.version("lora-factory")],
    "light": light,
    "typed": (resources.files("lora_factory") / "py.typed").is_file(),
    "templates": {entry.name: len(entry.read_text()) for entry in templates.iterdir() if entry.name.endswith(".md")},
    "public": [name for name in lora_factory.__all__ if not getattr(lora_factory, name)],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    # Build isolation would download setuptools; the extra "test" has it.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder, cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_wheel_holds_the_package_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lora_factory").rglob("*.py")}
    cards = {f"lora_factory/model_card_templates/{path.name}" for path in (ROOT / "model_card_templates").glob("*.*")}
    packed = {name for name in names if ".dist-info/" not in name}
    data = {"lora_factory/py.typed", "lora_factory/demo/descriptions.yaml"}
    data |= {f"lora_factory/reporting/{name}" for name in ("report.html", "headroom.svg")}
    assert packed == modules | cards | data
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_says_who_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert {"Name: lora-factory", f"Version: {lora_factory.__version__}", "License-Expression: Apache-2.0"} <= set(
        lines
    )
    assert "lora-factory = lora_factory.cli:main" in scripts
    assert {"Requires-Python: >=3.11", "Provides-Extra: test", "Provides-Extra: dev"} <= set(lines)


@pytest.mark.slow
def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=sys.platform != "win32")
    scripts = environment / ("Scripts" if sys.platform == "win32" else "bin")
    python = scripts / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    (packages,) = (Path(line) for line in run(python, "-c", SITE_PACKAGES, cwd=tmp_path).splitlines())
    # The dependencies come from the running environment; a plain path entry brings no editable install along.
    (packages / "dependencies.pth").write_text(run(sys.executable, "-c", SITE_PACKAGES, cwd=tmp_path))
    found = json.loads(run(python, "-c", PROBE, cwd=tmp_path).splitlines()[-1])
    assert Path(found["file"]).resolve().is_relative_to(environment.resolve())
    assert set(found["version"]) == {lora_factory.__version__}
    assert found["light"]
    assert found["typed"]
    assert found["public"] == []
    assert set(found["templates"]) == {path.name for path in (ROOT / "model_card_templates").glob("*.md")}
    assert all(found["templates"].values())
    version = run(scripts / "lora-factory", "--version", cwd=tmp_path)
    assert version == f"lora-factory {lora_factory.__version__}\n"


def run(*words: str | Path, cwd: Path) -> str:
    """Run a command away from the checkout and return what it prints; on failure, show all it said."""
    finished = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, f"{words} failed:\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def test_public_names_are_lazy_and_listed() -> None:
    code = (
        "import sys, lora_factory as package; "
        "print(sorted(set(package.__all__) - set(dir(package))), 'torch' in sys.modules)"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT) == "[] False\n"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'lora_factory' has no attribute 'Generator'"):
        lora_factory.Generator  # noqa: B018


def test_arguments_and_errors_are_the_modules_own() -> None:
    from lora_factory.arguments import TrainArguments
    from lora_factory.errors import LoraFactoryError

    assert lora_factory.TrainArguments is TrainArguments
    assert lora_factory.LoraFactoryError is LoraFactoryError


@pytest.mark.parametrize(
    ("own", "expected"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_leave_the_cores_to_others(own: dict[str, str], expected: str | None) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    code = "import os, sys, lora_factory; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | own, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(expected)
