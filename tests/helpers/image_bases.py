"""Pico models that read images, with their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tokenizer
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
)

WORDS = ["dog cat Locate the objects with category name in the image. Say it again: one two three"]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 1}
VISION = {**SIZES, "image_size": 32, "patch_size": 16}
SIDE = {"height": 32, "width": 32}


def chat_template(image: str) -> str:
    """Images as these tokens, and texts as they are."""
    return (
        "{% for message in messages %}{% for part in message['content'] %}"
        f"{{{{ '{image}' if part['type'] == 'image' else part['text'] }}}}{{% endfor %}}{{% endfor %}} "
    )


def llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Four tokens an image, and a chat template."""
    tokenizer = make_tokenizer(WORDS, image=True)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size=SIDE, crop_size=SIDE),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return _built(LlavaForConditionalGeneration, config), processor


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Packs the patches of all images: 4 of a small one, 8 and 16 of larger ones."""
    tokenizer = make_tokenizer(WORDS, image=True)
    names = ["<image>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names[1:]})
    image, video, start, end = tokenizer.convert_tokens_to_ids(names)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    config = Qwen2VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **TEXT},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    limits = {"min_pixels": 28 * 28, "max_pixels": 112 * 112}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**limits),
        tokenizer,
        Qwen2VLVideoProcessor(**limits),
        chat_template=chat_template("<|vision_start|><image><|vision_end|>"),
    )
    return _built(Qwen2VLForConditionalGeneration, config), processor


def paligemma() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Four tokens an image; image and prompt are read in both directions."""
    images = SiglipImageProcessor(size=SIDE)
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, make_tokenizer(WORDS, image=True))
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "projection_dim": 32, **VISION},
        text_config={"model_type": "gemma", "vocab_size": len(processor.tokenizer), "head_dim": 8, **TEXT},
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return _built(PaliGemmaForConditionalGeneration, config), processor


def git() -> tuple[PreTrainedModel, ProcessorMixin]:
    """States of five image tokens come before those of the text, which has no token for the image."""
    tokenizer = make_tokenizer(WORDS, image=True)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = GitConfig(vision_config=VISION, vocab_size=len(tokenizer), initializer_range=0.2, **SIZES, **special)
    processor = GitProcessor(CLIPImageProcessor(size=SIDE, crop_size=SIDE), tokenizer)
    return _built(GitForCausalLM, config), processor


def blip() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Has its output embeddings in a model inside it."""
    tokenizer = make_tokenizer(WORDS, image=True)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "sep_token_id": tokenizer.eos_token_id, "encoder_hidden_size": 32}
    config = BlipConfig(text_config={**SIZES, **special, **text}, vision_config=VISION)
    return _built(BlipForConditionalGeneration, config), BlipProcessor(BlipImageProcessor(size=SIDE), tokenizer)


def save(parts: tuple[PreTrainedModel, ProcessorMixin], folder: Path) -> Path:
    """Model and processor in one folder."""
    for part in parts:
        part.save_pretrained(folder)
    return folder


def _built(kind: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """A model with seeded random weights, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()
