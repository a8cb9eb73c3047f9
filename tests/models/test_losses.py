"""Losses of several tasks' adapters at once, on bases whose modules lose the order of the batch."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from helpers.image_bases import WORDS, qwen2_vl
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from tiny_models import make_tokenizer
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import TokenOptions
from lora_factory.models.hidden_states import base_fingerprint
from lora_factory.models.inputs import TokenSequence
from lora_factory.models.losses import FrozenBase, fast_attention, query_loss
from lora_factory.tasks.examples import Example, ImageExample


def with_lora(model: PreTrainedModel, reader: PreTrainedTokenizerBase | ProcessorMixin) -> FrozenBase:
    """A base whose every linear layer is adapted."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    weights, config = get_peft_model_state_dict(wrapped), wrapped.peft_config["default"]
    return FrozenBase(wrapped.unload().eval(), reader, AdapterLayout.from_state_dict(weights, config, base_model="me"))


def images() -> tuple[FrozenBase, list[list[TokenSequence]]]:
    """Qwen2-VL packs the patches of all images: 4 of a small one, 8 and 16 of larger ones."""
    base = with_lora(*qwen2_vl())
    assert any("visual" in module.path for module in base.layout.modules)
    rows = [
        [ImageExample(Image.new("RGB", size, color), "Say it:", word) for size in shapes]
        for word, color, shapes in (("one", "red", [(28, 28), (56, 28)]), ("two", "blue", [(56, 56), (28, 28)]))
    ]
    return base, [list(base.inputs.encode(examples, TokenOptions())) for examples in rows]


def experts() -> tuple[FrozenBase, list[list[TokenSequence]]]:
    """NLLB-MoE, whose router hands its tokens to single experts."""
    tokenizer = make_tokenizer(WORDS, closed=True)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": len(tokenizer)}
    sparse = {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1, "decoder_start_token_id": 2}
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    base = with_lora(NllbMoeForConditionalGeneration(NllbMoeConfig(**sizes, **heads, **sparse, **special)), tokenizer)
    assert any("experts.expert_0" in module.path for module in base.layout.modules)
    rows = [[Example(f"Say it again: {word} {n}", word) for n in range(2)] for word in ("one", "two three")]
    return base, [list(base.inputs.encode(examples, TokenOptions())) for examples in rows]


@pytest.mark.parametrize("leave", [ValueError, KeyboardInterrupt])
def test_fast_attention_leaves_a_model_of_several_parts_as_it_was(leave: type[BaseException]) -> None:
    base, _ = images()
    base.model.to(torch.bfloat16)
    base.model.set_attn_implementation({"": "sdpa", "text_config": "sdpa", "vision_config": "eager"})
    config, reader = base.model.config, FrozenBase(base.model, base.tokenizer.tokenizer, base.layout)
    parts = [config, config.text_config, config.vision_config]
    before = [part._attn_implementation for part in parts]
    with pytest.raises(leave), fast_attention(reader, 2, 16):
        raise leave
    assert [part._attn_implementation for part in parts] == before


@pytest.mark.parametrize("make", [images, experts])
def test_tasks_that_cannot_be_told_apart_in_a_batch_are_read_one_by_one(make) -> None:
    torch.manual_seed(0)
    base, rows = make()
    adapters = (0.3 * torch.randn(2, base.layout.size)).requires_grad_()
    together = query_loss(base, adapters, rows)
    alone = [query_loss(base, adapters[[task]], [rows[task]]) for task in range(2)]
    torch.testing.assert_close(together, sum(alone) / 2)
    swapped = [query_loss(base, adapters[[1 - task]], [rows[task]]) for task in range(2)]
    assert abs((sum(alone) - sum(swapped)).item()) > 1e-3, "the adapters make a difference"
    (gradient,) = torch.autograd.grad(together, adapters)
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(alone) / 2, adapters)[0])


def test_a_base_is_the_same_however_its_tokenizer_was_loaded_and_called(
    pico_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(**options: object) -> str:
        tokenizer = AutoTokenizer.from_pretrained(pico_model_folder, **options)
        tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
        return base_fingerprint(FrozenBase(model, tokenizer, base.layout))

    base, model = images()[0], LlamaForCausalLM.from_pretrained(pico_model_folder)
    first = fingerprint()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not huggingface_hub.constants.HF_HUB_OFFLINE)
    assert fingerprint() == first == fingerprint(padding_side="left", local_files_only=True)
    assert fingerprint(eos_token="a") != first
