"""A zoo whose tasks can be told apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from helpers.models import VOCABULARY, make_tokenizer, save_model
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.zoo.run_record import RunRecord
from lora_factory.zoo.store import AdapterZoo

DESCRIPTIONS = {
    "code": ("def add(left, right): return left + right", "print(index) for index in range(10)"),
    "law": ("Permission is hereby granted, free of charge", "any person obtaining a copy of this software"),
    "prose": ("The quick brown fox jumps over the lazy dog", "the old man reads a letter by the window"),
    "sums": ("1 + 2 = 3, 40 + 2 = 42, 12 + 13 = 25", "7 * 8 = 56; 9 * 9 = 81; 100 - 1 = 99"),
}


def make_zoo(
    folder: Path,
    layout: AdapterLayout,
    names: tuple[str, ...] = tuple(DESCRIPTIONS),
    runs: int = 1,
    sizes: Mapping[str, float] | None = None,
) -> AdapterZoo:
    """Five snapshots a run around a random adapter of its own, with a spread of a tenth of the adapters' distance.

    ``sizes`` are factors by which the weights of some tasks are larger.
    """
    zoo = AdapterZoo.create(folder, layout)
    source = torch.Generator().manual_seed(0)
    for name in names:
        for run in range(runs):
            center = 0.1 * torch.randn(layout.size, generator=source)
            record = RunRecord(
                task=name,
                run=f"seed-{run}",
                descriptions=DESCRIPTIONS[name],
                seed=run,
                base_model=layout.base_model,
                base_revision=None,
                steps=5,
                snapshot_steps=(1, 2, 3, 4, 5),
                validation_losses=(),
                train_tokens=10,
                data_fingerprint="0" * 64,
                versions={},
                license="MIT" if name == "law" else None,
            )
            rows = center + 0.01 * torch.randn(5, layout.size, generator=source)
            zoo.add_run(record, (sizes or {}).get(name, 1.0) * rows)
    return zoo


def save_word_encoder(folder: Path) -> Path:
    """A sentence encoder that adds up vectors of tokens, 128 wide: texts of other words are far apart."""
    tokenizer = make_tokenizer(bos=False)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=8,
        num_hidden_layers=0,
        num_attention_heads=1,
        max_position_embeddings=64,
        initializer_range=1.0,
        pad_token_id=tokenizer.pad_token_id,
    )

    def build() -> BertModel:
        model = BertModel(config)
        for part in (model.embeddings.position_embeddings, model.embeddings.token_type_embeddings):
            torch.nn.init.zeros_(part.weight)
        return model

    save_model(build, tokenizer, folder)
    return folder
