"""What is imported and which files are opened: counts instead of seconds, which differ from machine to machine."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.generators import make_generator
from helpers.models import attach
from transformers import LlamaForCausalLM

from lora_factory._lazy import no_collection

HEAVY = ("peft", "datasets", "accelerate", "torchvision", "open_clip", "sklearn", "scipy", "pandas", "torch._dynamo")
PROGRAM = """
import json, sys

opened = []
sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
try:
    {code}
finally:
    names = sorted(sys.modules)
    print(json.dumps([names, opened]))
"""


def run(code: str) -> tuple[set[str], list[str]]:
    """The modules that a program imports in a fresh process, and the files that it opens."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(code=code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    names, opened = json.loads(done.stdout.splitlines()[-1])
    return set(names), opened


@pytest.fixture(scope="module")
def generator(pico_model_folder: Path, pico_encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator for a base model in a folder that has lost all but its configuration."""
    root = tmp_path_factory.mktemp("imports")
    base = shutil.copytree(pico_model_folder, root / "base")
    layout = attach(LlamaForCausalLM.from_pretrained(base))[1]
    make_generator(replace(layout, base_model=str(base)), pico_encoder_folder).save_pretrained(root / "generator")
    for path in base.iterdir():  # safetensors opens files without telling Python, so that no hook would see it
        if path.name != "config.json":
            path.unlink()
    return root / "generator"


@pytest.mark.parametrize("command", ["generate", "explain"])
def test_a_command_needs_neither_the_base_model_nor_peft(generator: Path, command: str) -> None:
    words = [command, "--generator", str(generator), "--text", "Legal notices"]
    words += ["--output-dir", str(generator.with_name("adapter"))] if command == "generate" else []
    imported, opened = run(f"from lora_factory.cli.commands import main; assert main({words!r}) == 0")
    assert not imported & {*HEAVY, "transformers.modeling_utils"}
    base = str(generator.with_name("base"))
    assert {Path(path).name for path in opened if path.startswith(base)} <= {"config.json"}


def test_the_class_is_imported_without_what_it_does_not_always_need() -> None:
    imported, _ = run("from lora_factory import CVAELoRAGenerator")
    assert "transformers.modeling_utils" in imported
    assert not imported & {"peft", "datasets", "open_clip", "timm", "evaluate", "rich", "lora_factory.collection"}


def test_the_collector_is_on_again_after_an_import() -> None:
    with no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
