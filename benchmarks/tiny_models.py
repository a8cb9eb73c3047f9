"""Models of real architectures with random weights, made on the spot: what --smoke and tests run on, offline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_factory.tasks.boxes import BINS


def tiny_florence(
    folder: Path,
    words: Sequence[str],
    *,
    side: int = 32,
    width: int = 32,
    layers: int = 2,
    embed_dim: Sequence[int] = (16, 32),
    strides: Sequence[int] = (4, 2),
    depths: Sequence[int] = (1, 1),
    spread: float = 0.2,
    seed: int = 0,
) -> Path:
    """A Florence-2 for square images with its processor; the tokenizer knows the words and all location tokens.

    Random weights of a large ``spread`` have something to say that an adapter can change; training wants 0.02.
    """
    tokenizer = make_tokenizer(words, image=True, closed=True)
    grid = side
    for stride in strides:
        grid //= stride
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        max_position_embeddings=256,
        dropout=0.0,
        attention_dropout=0.0,
        init_std=spread,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_bos_token_id=tokenizer.bos_token_id,
    )
    stages = len(embed_dim)
    vision = {
        "depths": list(depths),
        "patch_size": [strides[0] + 3, *[3] * (stages - 1)],
        "patch_stride": list(strides),
        "patch_padding": [3, *[1] * (stages - 1)],
        "patch_prenorm": [False, *[True] * (stages - 1)],
        "embed_dim": list(embed_dim),
        "num_heads": [4] * stages,
        "num_groups": [4] * stages,
        "window_size": grid,
        "drop_path_rate": 0.0,
        "projection_dim": width,
    }
    config = Florence2Config(
        text_config=text.to_dict(),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    image_processor = CLIPImageProcessor(
        size={"height": side, "width": side}, do_center_crop=False, image_seq_length=grid * grid + 1
    )
    _save(lambda: Florence2ForConditionalGeneration(config), folder, seed)
    Florence2Processor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def tiny_llama(folder: Path, texts: Sequence[str], *, width: int = 32, seed: int = 0) -> Path:
    """A Llama of two layers and its tokenizer."""
    tokenizer = make_tokenizer(texts)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokenizer.save_pretrained(_save(lambda: LlamaForCausalLM(config), folder, seed))
    return folder


def tiny_t5(folder: Path, texts: Sequence[str], *, seed: int = 0) -> Path:
    """A T5 of two layers on either side and its tokenizer."""
    tokenizer = make_tokenizer(texts)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(_save(lambda: T5ForConditionalGeneration(config), folder, seed))
    return folder


def tiny_text_encoder(folder: Path, texts: Sequence[str], *, seed: int = 0) -> Path:
    """A BERT of two layers and its tokenizer, for the descriptions of tasks."""
    tokenizer = make_tokenizer(texts)
    tokenizer.model_max_length = 64
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(_save(lambda: BertModel(config), folder, seed))
    return folder


def make_tokenizer(texts: Sequence[str], *, image: bool = False, closed: bool = False) -> PreTrainedTokenizerBase:
    """A byte-level BPE of a few hundred tokens.

    Args:
        texts: What it is trained on.
        image: Whether it has an image token and the location tokens.
        closed: Whether texts end with the end token, as BART's do.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "</s>" if closed else ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {end}".strip(),
        pair=f"<s> $A $B {end}".strip(),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    options: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "model_max_length": 512}
    if image:
        options["extra_special_tokens"] = {"image_token": "<image>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    if image:
        fast.add_tokens([f"<loc_{number}>" for number in range(BINS)])
    return fast


def _save(build: Callable[[], PreTrainedModel], folder: Path, seed: int) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    model.save_pretrained(folder)
    return folder
