"""A generator on disk, the base model that it names, and a count of what is generated."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.generators import make_generator
from helpers.models import attach, with_template
from helpers.training import save_word_encoder
from transformers import AutoTokenizer, LlamaForCausalLM

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.generator.modeling import CVAELoRAGenerator

TASKS = {"poems": "The old man reads a letter", "code": "print(index) for index in range(10)", "law": "free of charge"}


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
    known = {name: generator.text_encoder.encode([text]) for name, text in TASKS.items()}
    generator.fit_conditions({"text": known})
    generator.scale.mul_(20)  # so that a text changes the most likely tokens
    generator.save_pretrained(folder)
    return folder


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were generated, one entry each time."""
    texts, real = [], CVAELoRAGenerator.save_adapter

    def counted(self: CVAELoRAGenerator, text: str, *args: object, **options: object) -> Path:
        texts.append(text)
        return real(self, text, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(CVAELoRAGenerator, "save_adapter", counted)
    return texts
