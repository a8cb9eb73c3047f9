"""`CVAELoRAGenerator.apply`: one adapter slot overwritten in place."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.generators import make_generator
from helpers.models import attach, lora_config
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator

TOKENS = torch.arange(3, 19)[None]
POEM, CODE = "Continue a rhymed poem.", "Python source code"


@pytest.fixture(scope="module")
def layout(pico_model_folder: Path) -> AdapterLayout:
    config = lora_config(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return attach(LlamaForCausalLM.from_pretrained(pico_model_folder), config)[1]


@pytest.fixture(scope="module")
def generator(layout: AdapterLayout, pico_encoder_folder: Path) -> CVAELoRAGenerator:
    return make_generator(layout, pico_encoder_folder)


@pytest.fixture
def model(generator: CVAELoRAGenerator, pico_model: LlamaForCausalLM) -> PeftModel:
    return generator.generate_adapter(POEM, pico_model)


def logits(model: torch.nn.Module, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(options.pop("tokens", TOKENS), **options).logits


def fresh(generator: CVAELoRAGenerator, folder: Path, text: str, **options: Any) -> torch.Tensor:
    """The logits of an adapter that is attached to a base model of its own."""
    return logits(generator.generate_adapter(text, LlamaForCausalLM.from_pretrained(folder), **options))


def size(model: torch.nn.Module) -> tuple[int, int, int, frozenset[int]]:
    """How many modules and parameters a model has, how many tensors live, and where the parameters are."""
    gc.collect()
    parameters = list(model.parameters())
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return len(list(model.modules())), len(parameters), tensors, frozenset(p.data_ptr() for p in parameters)


def test_many_swaps_leave_the_model_as_large_as_it_was(
    generator: CVAELoRAGenerator, model: PeftModel, pico_model_folder: Path
) -> None:
    expected = {text: fresh(generator, pico_model_folder, text) for text in (POEM, CODE)}
    assert not torch.allclose(expected[POEM], expected[CODE])
    generator.apply(model, CODE)
    before = size(model)
    for text in [POEM, CODE] * 25:
        generator.apply(model, text)
        assert torch.equal(logits(model), expected[text])
    assert size(model) == before
    assert list(model.peft_config) == ["default"]


def test_all_conditions_reach_the_slot(
    generator: CVAELoRAGenerator,
    model: PeftModel,
    pico_model_folder: Path,
    pico_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generator.config, "modalities", {"text": 32})  # the examples refine, and are no condition
    vector = torch.linspace(-1, 1, 32)
    for options in (
        {"text": {POEM: 0.5, CODE: -0.2}},
        {"conditions": {"text": vector}},
        {"text": POEM, "seed": 3, "temperature": 1.0},
        {"text": POEM, "examples": ["a b c", "d e f", "g h i"], "tokenizer": pico_tokenizer, "refine_steps": 2},
    ):
        generator.apply(model, **options)
        base = LlamaForCausalLM.from_pretrained(pico_model_folder)
        assert torch.equal(logits(model), logits(generator.generate_adapter(base_model=base, **options)))


def test_other_adapters_mode_and_activity_stay(generator: CVAELoRAGenerator, model: PeftModel) -> None:
    generator.generate_adapter(CODE, model, adapter_name="code")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items() if ".default." not in name}
    generator.apply(model, "legal notices")
    assert model.training and model.active_adapters == ["code"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_merged_slot_is_unmerged(generator: CVAELoRAGenerator, model: PeftModel, pico_model_folder: Path) -> None:
    model.merge_adapter()
    with pytest.warns(UserWarning, match="were unmerged"):
        generator.apply(model, CODE)
    torch.testing.assert_close(logits(model), fresh(generator, pico_model_folder, CODE))


def test_a_lower_rank_fills_the_slot_up_with_zeros(
    generator: CVAELoRAGenerator, model: PeftModel, pico_model_folder: Path
) -> None:
    generator.apply(model, CODE, rank=1)
    torch.testing.assert_close(logits(model), fresh(generator, pico_model_folder, CODE, rank=1))
    generator.apply(model, CODE)
    assert torch.equal(logits(model), fresh(generator, pico_model_folder, CODE))
    prepare_model_for_compiled_hotswap(model, target_rank=7, config=model.peft_config)
    for rank in (None, 2):
        generator.apply(model, POEM, rank=rank)
        torch.testing.assert_close(logits(model), fresh(generator, pico_model_folder, POEM, rank=rank))


def test_it_writes_what_peft_writes(generator: CVAELoRAGenerator, model: PeftModel) -> None:
    def named(text: str) -> dict[str, torch.Tensor]:
        state_dict = generator.generate_state_dict(text)
        return {key.replace(".weight", ".default.weight"): value for key, value in state_dict.items()}

    prepare_model_for_compiled_hotswap(model, target_rank=8)
    generator.apply(model, CODE)
    ours = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hotswap_adapter_from_state_dict(model, named(POEM), "default", generator.layout.peft_config())
        assert not all(torch.equal(ours[name], value) for name, value in model.state_dict().items())
        hotswap_adapter_from_state_dict(model, named(CODE), "default", generator.layout.peft_config())
    assert all(torch.equal(ours[name], value) for name, value in model.state_dict().items())


def test_a_compiled_model_is_not_compiled_again(
    generator: CVAELoRAGenerator, model: PeftModel, pico_model_folder: Path
) -> None:
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    first = logits(compiled)
    graphs, frames = counters["stats"]["unique_graphs"], counters["frames"]["total"]
    assert graphs > 0
    with torch._dynamo.config.patch(error_on_recompile=True):
        for text, rank in ((CODE, None), ("law", 2), (POEM, None), (CODE, 1)) * 3:
            generator.apply(compiled, text, rank=rank)
            torch.testing.assert_close(logits(compiled), fresh(generator, pico_model_folder, text, rank=rank))
    assert not torch.allclose(first, logits(compiled))
    assert (counters["stats"]["unique_graphs"], counters["frames"]["total"]) == (graphs, frames)


def test_a_batch_of_many_adapters_and_the_base(
    generator: CVAELoRAGenerator, model: PeftModel, pico_model_folder: Path
) -> None:
    generator.generate_adapter(CODE, model, adapter_name="code")
    generator.apply(model, "law", adapter_name="code")
    mixed = logits(model, tokens=TOKENS.expand(3, -1), adapter_names=["default", "__base__", "code"])
    alone = [
        fresh(generator, pico_model_folder, POEM),
        logits(LlamaForCausalLM.from_pretrained(pico_model_folder)),
        fresh(generator, pico_model_folder, "law"),
    ]
    torch.testing.assert_close(mixed, torch.cat(alone))


def test_peft_merges_and_adds_what_was_applied(
    generator: CVAELoRAGenerator, model: PeftModel, pico_model_folder: Path
) -> None:
    generator.generate_adapter(POEM, model, adapter_name="code")
    generator.apply(model, CODE, adapter_name="code")
    model.add_weighted_adapter(["default", "code"], [0.7, 0.3], adapter_name="both", combination_type="cat")
    model.set_adapter("both")
    summed = fresh(generator, pico_model_folder, {POEM: 0.7, CODE: 0.3})
    torch.testing.assert_close(logits(model), summed, rtol=1e-4, atol=1e-4)
    model.set_adapter("code")
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)


def test_transformers_swaps_our_state_dict(
    generator: CVAELoRAGenerator, pico_model: LlamaForCausalLM, pico_model_folder: Path
) -> None:
    pico_model.enable_peft_hotswap(target_rank=generator.layout.modules[0].rank)
    for text in (POEM, CODE, "law"):
        state_dict, config = generator.generate_state_dict(text), generator.layout.peft_config()
        pico_model.load_adapter(
            adapter_name="default", adapter_state_dict=state_dict, peft_config=config, hotswap="auto"
        )
        assert torch.equal(logits(pico_model), fresh(generator, pico_model_folder, text))
    assert list(pico_model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ({"target_modules": ["q_proj"]}, r"does not fit the slot 'default': the slot has no .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, r"the slot has .*o_proj"),
        ({"r": 2, "lora_alpha": 4}, r"q_proj has rank 2 in the slot, 4 in the adapter"),
        ({"lora_alpha": 16}, r"q_proj scales its LoRA by 4.0, the layout by 2.0"),
        ({"use_dora": True}, r"use_dora=True"),
    ],
)
def test_another_slot_is_refused_and_stays(
    generator: CVAELoRAGenerator, pico_model: LlamaForCausalLM, slot: dict[str, Any], message: str
) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | slot
    model = get_peft_model(pico_model, lora_config(**options)).eval()
    before = logits(model)
    with pytest.raises(LoraFactoryError, match=message):
        generator.apply(model, CODE)
    assert torch.equal(logits(model), before)


def test_a_missing_slot_is_named(generator: CVAELoRAGenerator, model: PeftModel, pico_model_folder: Path) -> None:
    with pytest.raises(LoraFactoryError, match=r"'law', and this \w+ has adapters named default; attach"):
        generator.apply(model, CODE, adapter_name="law")
    bare = LlamaForCausalLM.from_pretrained(pico_model_folder)
    with pytest.raises(LoraFactoryError, match=r"this LlamaForCausalLM has none; attach"):
        generator.apply(bare, CODE)
    with pytest.raises(LoraFactoryError, match=r"the base model is a str"):
        generator.apply("pico/llama", CODE)  # type: ignore[arg-type]


def test_a_function_is_applied_to_the_modules_as_in_pytorch(generator: CVAELoRAGenerator) -> None:
    seen: list[torch.nn.Module] = []
    assert generator.apply(seen.append) is generator
    assert set(map(id, seen)) == set(map(id, generator.modules()))
