"""Pico models made on the spot: real architectures with two layers of width 32, and tokenizers trained on one text."""

from __future__ import annotations

import os

from helpers.models import VOCABULARY, make_tokenizer, save_model

# Before any Hugging Face library is imported: no test reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hub_server.local import hub as hub
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from lora_factory.models.embedded import embedded_base_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest, so that none is left to one process at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is written into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FACTORY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def embedded_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the embedded base model, which one of the processes of a session makes for all."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(folder / "embedded.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_FACTORY_CACHE", str(folder / "embedded"))
        embedded_base_model()
    return folder / "embedded"


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
