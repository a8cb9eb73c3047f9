"""Live base models that already carry adapters, merged or not, or come in a wrapper."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import attach, lora_config, random_adapter
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerBase,
)

from lora_factory.adapters.attach import AdapterSlot, adapters_in_batch, attach_adapter
from lora_factory.adapters.folder import load_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.adapters.live_models import without_adapters
from lora_factory.errors import LoraFactoryError
from lora_factory.models.hidden_states import HiddenStateEncoder
from lora_factory.tasks.examples import Example

TOKENS = torch.arange(3, 19)[None]
Wrap = Callable[[nn.Module], Any]


@pytest.fixture(scope="module")
def layout(pico_model_folder: Path) -> AdapterLayout:
    return attach(LlamaForCausalLM.from_pretrained(pico_model_folder))[1]


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def put(model: Any, layout: AdapterLayout, seed: int, name: str = "default") -> PeftModel:
    return attach_adapter(model, layout, layout.unflatten(random_adapter(layout, seed)), name)


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder).eval()


def merge_own(model: PeftModel) -> None:
    model.merge_adapter()


def merge_another(model: PeftModel) -> None:
    put(model, model.own_layout, 5, "other").merge_adapter(["other"])


def merge_both(model: PeftModel) -> None:
    put(model, model.own_layout, 5, "other").merge_adapter(["default", "other"])


def switch_off(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


@pytest.mark.parametrize("state", [merge_own, merge_another, merge_both, switch_off])
@pytest.mark.filterwarnings("ignore:.*were unmerged")
def test_a_new_adapter_takes_a_slot_whatever_is_merged_or_switched_off(
    pico_model_folder: Path, layout: AdapterLayout, state: Callable[[PeftModel], None]
) -> None:
    plain, right = logits(load(pico_model_folder)), logits(put(load(pico_model_folder), layout, 1))
    model = put(load(pico_model_folder), layout, 0)
    model.own_layout = layout
    state(model)
    assert put(model, layout, 1) is model
    torch.testing.assert_close(logits(model), right, rtol=0, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-4)


def test_unmerging_is_said(pico_model: LlamaForCausalLM, layout: AdapterLayout) -> None:
    model = put(pico_model, layout, 0)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"merged adapters \(default\) were unmerged"):
        AdapterSlot(model, layout).load(random_adapter(layout, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdapterSlot(model, layout).load(random_adapter(layout, 2))


def test_a_slot_that_is_no_plain_lora_is_not_written(pico_model: LlamaForCausalLM, layout: AdapterLayout) -> None:
    model = get_peft_model(pico_model, lora_config(use_dora=True))
    with pytest.raises(LoraFactoryError, match="use_dora"):
        put(model, layout, 0)


def peft_model(model: LlamaForCausalLM, layout: AdapterLayout) -> PeftModel:
    return put(model, layout, 0)


def injected(model: LlamaForCausalLM, layout: AdapterLayout) -> LlamaForCausalLM:
    put(model, layout, 0)
    return model


def by_transformers(model: LlamaForCausalLM, layout: AdapterLayout) -> LlamaForCausalLM:
    """What transformers' own add_adapter does."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return inject_adapter_in_model(config, model).eval()


def on_the_head(model: LlamaForCausalLM, layout: AdapterLayout) -> PeftModel:
    return get_peft_model(model, lora_config(target_modules=["lm_head", "embed_tokens"], init_lora_weights=False))


def merged(model: LlamaForCausalLM, layout: AdapterLayout) -> PeftModel:
    model = put(model, layout, 0)
    model.merge_adapter()
    return model


def compiled(model: LlamaForCausalLM, layout: AdapterLayout) -> Any:
    return torch.compile(put(model, layout, 0), backend="eager")


@pytest.mark.parametrize("carrier", [peft_model, injected, by_transformers, on_the_head, merged, compiled])
def test_examples_are_read_without_adapters(
    pico_model_folder: Path, layout: AdapterLayout, carrier: Callable[[LlamaForCausalLM, AdapterLayout], Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico_model_folder)
    examples = ["The quick brown fox", Example("the old man", " reads")]
    plain = HiddenStateEncoder(load(pico_model_folder), tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = carrier(load(pico_model_folder), layout)
    before = logits(model)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    encoder = HiddenStateEncoder(model, tokenizer)
    torch.testing.assert_close(encoder.encode(examples), plain.encode(examples), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    with without_adapters(model):
        torch.testing.assert_close(logits(model), logits(load(pico_model_folder)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("carrier", [injected, by_transformers])
def test_a_base_model_given_again_leaves_the_first_model_as_it_was(
    pico_model_folder: Path, layout: AdapterLayout, carrier: Callable[[LlamaForCausalLM, AdapterLayout], Any]
) -> None:
    base = carrier(load(pico_model_folder), layout)
    first = logits(base)
    with pytest.warns(UserWarning, match="already carries adapters .* copy of the base model"):
        second = put(base, layout, 1)
    assert torch.equal(logits(base), first)
    assert torch.equal(logits(second), logits(put(load(pico_model_folder), layout, 1)))
    with second.disable_adapter():
        assert torch.equal(logits(second), logits(load(pico_model_folder)))
    second.merge_and_unload()
    assert torch.equal(logits(base), first)


def dynamo(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def dynamo_of_a_layer(model: nn.Module) -> nn.Module:
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    layers[0] = torch.compile(layers[0], backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [dynamo, nn.DataParallel, dynamo_of_a_layer, lambda model: dynamo(nn.DataParallel(dynamo(model)))],
    ids=["compile", "DataParallel", "a layer", "nested"],
)
def test_a_base_model_in_a_wrapper(pico_model_folder: Path, layout: AdapterLayout, wrap: Wrap) -> None:
    right = logits(put(load(pico_model_folder), layout, 0))
    model = put(wrap(load(pico_model_folder)), layout, 0)
    assert isinstance(model, PeftModel)
    torch.testing.assert_close(logits(model), right, rtol=0, atol=1e-5)
    again = put(wrap(put(load(pico_model_folder), layout, 1)), layout, 0)  # a PeftModel in the wrapper
    torch.testing.assert_close(logits(again), right, rtol=0, atol=1e-5)


def test_each_share_of_a_batch_has_its_own_adapter_in_a_wrapped_model(
    pico_model_folder: Path, layout: AdapterLayout
) -> None:
    model = load(pico_model_folder)
    vectors = torch.stack([random_adapter(layout, seed) for seed in (0, 1)])
    with adapters_in_batch(dynamo(model), layout, vectors), torch.no_grad():
        both = model(input_ids=TOKENS.repeat(2, 1)).logits
    for seed in (0, 1):
        right = logits(put(load(pico_model_folder), layout, seed))
        torch.testing.assert_close(both[seed : seed + 1], right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("no_model", ["tokenizer", None, [1]])
def test_what_is_no_model_is_named(layout: AdapterLayout, no_model: Any) -> None:
    with pytest.raises(LoraFactoryError, match=f"base model is a {type(no_model).__name__}; give a transformers"):
        put(no_model, layout, 0)


def test_the_remedy_is_not_what_was_given(layout: AdapterLayout) -> None:
    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    for change in ({"hidden_size": 64, "num_hidden_layers": 2}, {"hidden_size": 32, "num_hidden_layers": 1}):
        model = LlamaForCausalLM(LlamaConfig(**sizes, **change))
        model.config.name_or_path = layout.base_model
        with pytest.raises(LoraFactoryError, match="has this name too") as caught:
            put(model, layout, 0)
        assert "pass base_model=" not in str(caught.value)


def test_an_adapter_of_single_experts_is_named_as_one() -> None:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, num_local_experts=2,
    )  # fmt: skip
    path = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    weights = {f"{path}.lora_A.weight": torch.zeros(2, 32), f"{path}.lora_B.weight": torch.zeros(64, 2)}
    layout = AdapterLayout.from_state_dict(weights, lora_config(target_modules=["w1"]), base_model="some/mixtral")
    with pytest.raises(LoraFactoryError, match=r"single experts.*PeftModel\.from_pretrained") as caught:
        attach_adapter(MixtralForCausalLM(config), layout, weights)
    assert "pass base_model=" not in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model with `tie_word_embeddings=True`")
def test_an_adapter_on_embeddings_and_head_comes_back_from_what_peft_saves(
    pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, tied: bool
) -> None:
    def base() -> LlamaForCausalLM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=300, initializer_range=0.2, tie_word_embeddings=tied,
                )
            ).eval()  # fmt: skip

    targets = ["q_proj", "embed_tokens", *([] if tied else ["lm_head"])]
    model = get_peft_model(base(), lora_config(target_modules=targets, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="left out, PEFT saves the base model's own embeddings"):
        layout, state_dict = load_adapter_of(tmp_path / "adapter")
    assert not [key for key in state_dict if "base_layer" in key]
    attached = attach_adapter(base(), layout, state_dict)
    torch.testing.assert_close(logits(attached), logits(model), rtol=0, atol=1e-6)


def load_adapter_of(folder: Path) -> tuple[AdapterLayout, dict[str, torch.Tensor]]:
    return load_adapter(folder, base_model="pico/llama")


@pytest.mark.parametrize(("dtype", "read"), [(torch.float64, True), (torch.float8_e4m3fn, False), (torch.int8, False)])
def test_precisions_of_adapters(pico_model: LlamaForCausalLM, tmp_path: Path, dtype: torch.dtype, read: bool) -> None:
    from safetensors.torch import load_file, save_file

    model, layout = attach(pico_model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    save_file({**weights, first: weights[first].to(dtype)}, file)  # mixed with float32
    if not read:
        with pytest.raises(LoraFactoryError, match=r"it holds .*expected one of"):
            load_adapter_of(tmp_path)
        return
    with pytest.warns(UserWarning, match="float64; it is read as float32"):
        _, state_dict = load_adapter_of(tmp_path)
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.float32}
    assert torch.equal(layout.flatten(state_dict), layout.flatten(weights))
