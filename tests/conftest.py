"""Pico models made on the spot: real architectures with two layers of width 32, and tokenizers trained on one text."""

from __future__ import annotations

import os

# Before any Hugging Face library is imported: no test reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lora_factory.adapters.attach import AdapterSlot
from lora_factory.adapters.layout import AdapterLayout

VOCABULARY = 300
TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog while the old man reads a letter by the window of the house.",
    "def add(left: int, right: int) -> int:\n    return left + right\n\nfor index in range(10):\n    print(index)\n",
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software.",
)


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FACTORY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pico_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 300 tokens that starts every text with ``<s>``; also knows ``</s>`` and ``<pad>``."""
    return make_tokenizer(bos=True)


@pytest.fixture(scope="session")
def pico_model_folder(tmp_path_factory: pytest.TempPathFactory, pico_tokenizer: PreTrainedTokenizerBase) -> Path:
    """The folder of a Llama of two layers of width 32 and its tokenizer; never written to by a test."""
    folder = tmp_path_factory.mktemp("models") / "pico-llama"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,  # ten times the usual, so that predictions differ from token to token
        tie_word_embeddings=False,
        bos_token_id=pico_tokenizer.bos_token_id,
        eos_token_id=pico_tokenizer.eos_token_id,
        pad_token_id=pico_tokenizer.pad_token_id,
    )
    save_model(lambda: LlamaForCausalLM(config), pico_tokenizer, folder)
    return folder


@pytest.fixture
def pico_model(pico_model_folder: Path) -> LlamaForCausalLM:
    """A fresh copy of the pico Llama, float32, in eval mode; a test may change it."""
    return LlamaForCausalLM.from_pretrained(pico_model_folder).eval()


@pytest.fixture(scope="session")
def pico_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sentence encoder: a BERT of two layers of width 32 and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "pico-encoder"
    tokenizer = make_tokenizer(bos=False)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(lambda: BertModel(config), tokenizer, folder)
    return folder


def make_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Train the pico tokenizer; with ``bos`` it puts ``<s>`` before every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=1024 if bos else 64,
    )


def save_model(build: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a model with seeded random weights, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def lora_config(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | options))


def attach(model: LlamaForCausalLM, config: LoraConfig | None = None) -> tuple[PeftModel, AdapterLayout]:
    config = config or lora_config()
    peft_model = get_peft_model(model, config).eval()
    layout = AdapterLayout.from_state_dict(get_peft_model_state_dict(peft_model), config, base_model="pico/llama")
    return peft_model, layout


def random_adapter(layout: AdapterLayout, seed: int) -> torch.Tensor:
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(seed)) * 0.3


def save_adapter(model: PeftModel, layout: AdapterLayout, seed: int, folder: Path) -> Path:
    AdapterSlot(model, layout).load(random_adapter(layout, seed))
    model.save_pretrained(folder)
    return folder
