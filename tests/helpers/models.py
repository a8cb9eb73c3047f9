"""Pico models, tokenizers and adapters made on the spot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lora_factory.adapters.attach import AdapterSlot
from lora_factory.adapters.layout import AdapterLayout

VOCABULARY = 300
TRAINING_TEXT = (
    "The quick brown fox jumps over the lazy dog while the old man reads a letter by the window of the house.",
    "def add(left: int, right: int) -> int:\n    return left + right\n\nfor index in range(10):\n    print(index)\n",
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software.",
)


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


TEMPLATE = (
    "<s>{% for turn in messages %}[{{ turn.role }}]{{ turn.content | trim }}{% if turn.role == 'assistant' %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def with_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that knows a chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
