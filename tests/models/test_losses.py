"""Losses of several tasks' adapters at once, on bases whose modules lose the order of the batch."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from tiny_models import make_tokenizer
from transformers import (
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from lora_factory.adapters.layout import AdapterLayout
from lora_factory.arguments import TokenOptions
from lora_factory.models.inputs import TokenSequence
from lora_factory.models.losses import FrozenBase, query_loss
from lora_factory.tasks.examples import Example, ImageExample

WORDS = ["Say it again: one two three"]
IMAGE_TOKENS = ["<image>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def with_lora(model: PreTrainedModel, reader: PreTrainedTokenizerBase | Qwen2VLProcessor) -> FrozenBase:
    """A base whose every linear layer is adapted."""
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    weights, config = get_peft_model_state_dict(wrapped), wrapped.peft_config["default"]
    return FrozenBase(wrapped.unload().eval(), reader, AdapterLayout.from_state_dict(weights, config, base_model="me"))


def images() -> tuple[FrozenBase, list[list[TokenSequence]]]:
    """Qwen2-VL packs the patches of all images: 4 of a small one, 8 and 16 of larger ones."""
    tokenizer = make_tokenizer(WORDS, image=True)
    tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_TOKENS[1:]})
    ids = dict(zip(IMAGE_TOKENS, tokenizer.convert_tokens_to_ids(IMAGE_TOKENS), strict=True))
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    config = Qwen2VLConfig(
        text_config={**sizes, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=ids["<image>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{{ '<|vision_start|><image><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
        "{% endfor %}{% endfor %} "
    )
    limits = {"min_pixels": 28 * 28, "max_pixels": 112 * 112}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**limits), tokenizer, Qwen2VLVideoProcessor(**limits), chat_template=template
    )
    base = with_lora(Qwen2VLForConditionalGeneration(config), processor)
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
