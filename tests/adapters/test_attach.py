"""The one adapter slot, and adapters read from folders."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import attach, lora_config, random_adapter, save_adapter
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
)

from lora_factory.adapters.attach import AdapterSlot, adapter_parameters, adapters_in_batch
from lora_factory.adapters.folder import load_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.zoo.store import AdapterZoo


def test_slot_writes_vectors_and_state_dicts_alike(pico_model: LlamaForCausalLM) -> None:
    model, layout = attach(pico_model)
    slot = AdapterSlot(model, layout)
    tokens = torch.arange(20).unsqueeze(0)
    base = model(tokens).logits
    vectors = [random_adapter(layout, seed) for seed in (0, 1)]
    slot.load(vectors[0])
    first = model(tokens).logits
    assert torch.equal(layout.flatten(get_peft_model_state_dict(model)), vectors[0])
    assert not torch.allclose(first, base)
    slot.load(vectors[1])
    assert not torch.allclose(model(tokens).logits, first)
    slot.load(layout.unflatten(vectors[0]))
    assert torch.equal(model(tokens).logits, first)
    with slot.disabled():
        assert torch.equal(model(tokens).logits, base)
    assert torch.equal(model(tokens).logits, first)


def test_slot_is_written_in_place(pico_model: LlamaForCausalLM) -> None:
    model, layout = attach(pico_model)
    before = {key: parameter.data_ptr() for key, parameter in adapter_parameters(model).items()}
    AdapterSlot(model, layout).load(random_adapter(layout, 0))
    assert {key: parameter.data_ptr() for key, parameter in adapter_parameters(model).items()} == before


def test_slot_of_embeddings_and_another_name(pico_model: LlamaForCausalLM) -> None:
    config = lora_config(target_modules=["embed_tokens", "o_proj"])
    model = get_peft_model(pico_model, config, adapter_name="mine").eval()
    state_dict = get_peft_model_state_dict(model, adapter_name="mine", save_embedding_layers=False)
    layout = AdapterLayout.from_state_dict(state_dict, config, base_model="pico/llama")
    vector = random_adapter(layout, 0)
    AdapterSlot(model, layout, "mine").load(vector)
    written = get_peft_model_state_dict(model, adapter_name="mine", save_embedding_layers=False)
    assert torch.equal(layout.flatten(written), vector)
    with pytest.raises(LoraFactoryError, match="no LoRA named 'default'"):
        AdapterSlot(model, layout)


def test_slot_refuses_what_does_not_fit_and_stays_as_it_was(pico_model: LlamaForCausalLM) -> None:
    model, layout = attach(pico_model)
    slot = AdapterSlot(model, layout)
    vector = random_adapter(layout, 0)
    slot.load(vector)
    state_dict = layout.unflatten(vector)
    key = layout.modules[-1].key_b
    for wrong in (
        vector[:-1],
        vector.expand(2, -1),
        vector.index_fill(0, torch.tensor([layout.size - 1]), math.nan),
        {name: tensor for name, tensor in state_dict.items() if name != key},
        {**state_dict, "base_model.model.extra.lora_A.weight": torch.zeros(2, 32)},
        {**state_dict, key: torch.zeros(1, 1)},
    ):
        with pytest.raises(LoraFactoryError):
            slot.load(wrong)
    assert torch.equal(layout.flatten(get_peft_model_state_dict(model)), vector)


@pytest.mark.parametrize("other", [{"target_modules": ["q_proj"]}, {"r": 4, "lora_alpha": 8}, {"lora_alpha": 16}])
def test_slot_refuses_another_layout(
    pico_model: LlamaForCausalLM, pico_model_folder: Path, other: dict[str, Any]
) -> None:
    model, _ = attach(pico_model)
    _, layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder), lora_config(**other))
    with pytest.raises(LoraFactoryError):
        AdapterSlot(model, layout)


def test_load_adapter_reads_what_peft_writes(pico_model: LlamaForCausalLM, tmp_path: Path) -> None:
    model, layout = attach(pico_model)
    loaded, state_dict = load_adapter(save_adapter(model, layout, 0, tmp_path / "adapter"))
    assert loaded.modules == layout.modules
    assert torch.equal(loaded.flatten(state_dict), random_adapter(layout, 0))


def test_load_adapter_says_what_is_wrong(pico_model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(LoraFactoryError, match=r"adapter_config\.json is missing"):
        load_adapter(tmp_path)
    model, layout = attach(pico_model)
    folder = save_adapter(model, layout, 0, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(LoraFactoryError, match=r"adapter_model\.safetensors is damaged"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [("zoo.json", "{}", "a zoo"), ("config.json", '{"model_type": "cvae_lora"}', "a generator")]
    + [("config.json", content, "a model") for content in ('{"model_type": "llama"}', "[", "{}")],
)
def test_another_folder_is_called_what_it_is(tmp_path: Path, name: str, content: str, kind: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LoraFactoryError, match=f"it is {kind}, not an adapter"):
        load_adapter(tmp_path)
    if name != "zoo.json":
        with pytest.raises(LoraFactoryError, match=f"is {kind}, not a zoo"):
            AdapterZoo(tmp_path)


def test_an_adapter_is_no_zoo(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraFactoryError, match="is an adapter, not a zoo"):
        AdapterZoo(tmp_path)


def test_several_adapters_in_a_batch_never_reach_single_experts() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0, "vocab_size": 50}
    sparse = {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
    model = NllbMoeForConditionalGeneration(NllbMoeConfig(**sizes, **heads, **sparse))
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["fc1"]))
    config = peft_model.peft_config["default"]
    layout = AdapterLayout.from_state_dict(get_peft_model_state_dict(peft_model), config, base_model="me/base")
    with (
        pytest.raises(LoraFactoryError, match=r"experts.expert_0.fc1 belongs to one expert of a mixture"),
        adapters_in_batch(model, layout, torch.zeros(2, layout.size)),
    ):
        pass


@torch.no_grad()
def test_an_embedding_that_scales_its_output_scales_adapters_too() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = Gemma3TextConfig(vocab_size=50, num_hidden_layers=1, head_dim=8, **sizes)
    model = Gemma3ForCausalLM(text).eval()
    options = LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
    peft_model, ids = get_peft_model(copy.deepcopy(model), options).eval(), torch.arange(5, 20)[None]
    weights = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    layout = AdapterLayout.from_state_dict(weights, peft_model.peft_config["default"], base_model="me/base")
    expected = peft_model(ids).logits
    with adapters_in_batch(model, layout, layout.flatten(weights)[None]):
        torch.testing.assert_close(model(ids).logits, expected)
