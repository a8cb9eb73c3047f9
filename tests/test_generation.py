"""Adapters from examples: conditioned on them where the generator listens to them, and refined on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TRAINING_TEXT, attach
from peft import get_peft_model_state_dict
from test_sequences import with_template
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from lora_factory.adapters import load_adapter
from lora_factory.arguments import CollectArguments
from lora_factory.base_loss import FrozenBase, query_loss
from lora_factory.base_models import load_base_model
from lora_factory.configuration import CVAELoRAConfig
from lora_factory.data_source import Example
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation import evaluate_adapters, score_examples
from lora_factory.modeling import CVAELoRAGenerator
from lora_factory.sequences import encode_sequences
from lora_factory.tasks import Task

TEXT, EXAMPLES = "Continue a tale.", [*TRAINING_TEXT[:3] * 4]


@pytest.fixture
def generator(pico_model_folder: Path, pico_encoder_folder: Path) -> CVAELoRAGenerator:
    """One that listens to texts alone."""
    layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]
    config = CVAELoRAConfig(
        layout=layout.to_dict(),
        modalities={"text": 32},
        text_encoder=str(pico_encoder_folder),
        width=32,
        depth=1,
        latent_size=8,
        tasks=[{"name": name, "descriptions": [name], "license": None} for name in "ab"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = CVAELoRAGenerator(config)
        generator.fit_statistics(
            {name: 0.05 * torch.randn(4, layout.size) for name in "ab"},
            {"text": {name: torch.randn(2, 32) for name in "ab"}},
        )
    return generator.eval()


@torch.no_grad()
def loss(base: FrozenBase, state_dict: dict[str, torch.Tensor]) -> float:
    rows = encode_sequences(base.tokenizer, [Example("", text) for text in EXAMPLES[:3]], CollectArguments())
    return float(query_loss(base, base.layout.flatten(state_dict)[None], [rows]))


def test_an_adapter_is_refined_on_the_users_examples(
    generator: CVAELoRAGenerator, pico_model_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_model_folder)
    base = FrozenBase(LlamaForCausalLM.from_pretrained(pico_model_folder), tokenizer, generator.layout)
    written = loss(base, generator.generate_state_dict(TEXT))
    model = generator.generate_adapter(TEXT, pico_model_folder, examples=EXAMPLES)
    refined = loss(base, get_peft_model_state_dict(model))
    assert refined < written - 0.01
    generator.save_adapter(TEXT, tmp_path / "adapter", examples=EXAMPLES, base_model=pico_model_folder)
    assert loss(base, load_adapter(tmp_path / "adapter")[1]) == pytest.approx(refined, abs=1e-5)
    assert json.loads((tmp_path / "adapter" / "generation.json").read_text())["refined_on"] == len(EXAMPLES)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "before it was refined" in card and EXAMPLES[0] not in card


def test_a_live_model_with_an_adapter_is_read_without_it(
    generator: CVAELoRAGenerator, pico_model_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_model_folder)
    fresh = generator.generate_adapter(TEXT, pico_model_folder, examples=EXAMPLES, refine_steps=6)
    used = generator.generate_adapter("Something else", pico_model_folder)
    used = generator.generate_adapter(
        TEXT, used, examples=EXAMPLES, refine_steps=6, adapter_name="second", tokenizer=tokenizer
    )
    expected, found = get_peft_model_state_dict(fresh), get_peft_model_state_dict(used, adapter_name="second")
    assert all(torch.allclose(expected[key], found[key], atol=1e-6) for key in expected)


def test_examples_alone_need_a_generator_that_listens_to_them(
    generator: CVAELoRAGenerator, pico_model_folder: Path
) -> None:
    with pytest.raises(LoraFactoryError, match="not to examples"):
        generator.generate_adapter(base_model=pico_model_folder, examples=EXAMPLES)
    with pytest.raises(LoraFactoryError, match="not to examples"):
        generator.generate_adapter(TEXT, pico_model_folder, examples=EXAMPLES, refine_steps=0)


def test_a_generator_of_chat_adapters_refines_in_the_template_and_says_so(
    generator: CVAELoRAGenerator, pico_model_folder: Path, pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pico_model_folder, base)
    with_template(pico_tokenizer).save_pretrained(base)
    model, tokenizer = load_base_model(base)
    examples = [Example(f"Tell tale {number}.", text) for number, text in enumerate(EXAMPLES)]
    rows = encode_sequences(tokenizer, examples, CollectArguments(chat_template=True))
    losses = {}
    for in_chat in (False, True):
        generator.config.chat_template = in_chat
        generator.save_adapter(TEXT, tmp_path / str(in_chat), examples=examples, base_model=base)
        weights = generator.layout.flatten(load_adapter(tmp_path / str(in_chat))[1])
        with torch.no_grad():
            losses[in_chat] = float(query_loss(FrozenBase(model, tokenizer, generator.layout), weights[None], [rows]))
        assert json.loads((tmp_path / str(in_chat) / "generation.json").read_text())["chat_template"] is in_chat
    assert losses[True] < losses[False] - 0.005
    task = Task.from_examples("tales", [TEXT], examples)
    framed = score_examples(model, tokenizer, task.examples("test"), chat_template=True)
    assert evaluate_adapters([tmp_path / "True"], [task], base)["base model"]["tales"] == framed
    assert evaluate_adapters([tmp_path / "False"], [task], base)["base model"]["tales"] != framed
