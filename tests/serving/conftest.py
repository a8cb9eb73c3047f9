"""A generator on disk, and the base model that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.generators import make_generator
from helpers.models import attach, with_template
from helpers.training import save_word_encoder
from transformers import AutoTokenizer, LlamaForCausalLM

from lora_factory.adapters.layout import AdapterLayout


@pytest.fixture(scope="session")
def base_folder(pico_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Llama with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "pico-chat"
    LlamaForCausalLM.from_pretrained(pico_model_folder).save_pretrained(folder)
    with_template(AutoTokenizer.from_pretrained(pico_model_folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def generator_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator for that base model whose adapters differ from text to text."""
    layout = attach(LlamaForCausalLM.from_pretrained(base_folder))[1]
    named = AdapterLayout.from_dict(layout.to_dict() | {"base_model": str(base_folder)})
    encoder = save_word_encoder(tmp_path_factory.mktemp("served") / "encoder")
    folder = tmp_path_factory.mktemp("served") / "generator"
    generator = make_generator(named, encoder, text=128, hidden=96)
    generator.scale.mul_(20)  # so that a text changes the most likely tokens
    generator.save_pretrained(folder)
    return folder
