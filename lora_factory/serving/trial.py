"""Try an adapter: the base model's answer to a prompt beside that of the base model with the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.errors import LoraFactoryError
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.decoding import BASE, Prompt, chat_tokens, decode
from lora_factory.models.inputs import text_tokens
from lora_factory.models.loading import base_source, load_base_model
from lora_factory.tasks.examples import Example, ImageExample


class Trial(NamedTuple):
    """Two answers to one prompt."""

    base: str
    adapted: str


def try_adapter(
    generator: CVAELoRAGenerator,
    prompt: str,
    text: str | None = None,
    *,
    examples: Sequence[Example | ImageExample | str] | None = None,
    base_model: str | Path | None = None,
    max_new_tokens: int = 100,
    chat_template: bool | None = None,
    **options: Any,  # noqa: ANN401
) -> Trial:
    """Answer a prompt with the base model and with a generated adapter; both take the most likely tokens.

    Args:
        generator: Writes the adapter.
        prompt: What both are asked, or what they are to continue.
        text: What the adapter is for.
        examples: A few examples of the task, beside ``text`` or instead of it.
        base_model: Folder or Hub id of the base model; default: the one that the generator names.
        max_new_tokens: Tokens of an answer at most.
        chat_template: Whether the prompt is put into the tokenizer's chat template; default: if it has one.
        **options: ``seed``, ``temperature``, ``rank`` and ``refine_steps`` of ``generate_adapter``.

    Raises:
        LoraFactoryError: As ``generate_adapter``, and when the base model is none that continues text, or the prompt
            is empty or too long.
    """
    if max_new_tokens < 1:
        raise LoraFactoryError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompt.strip():
        raise LoraFactoryError("prompt is empty; give a question, or the beginning of a text")
    base, tokenizer = load_causal_model(generator, base_model)
    in_chat = bool(tokenizer.chat_template) if chat_template is None else chat_template
    tokens = (
        chat_tokens(tokenizer, [{"role": "user", "content": prompt}])
        if in_chat
        else text_tokens(tokenizer, prompt, begins=True)
    )
    model: PeftModel = generator.generate_adapter(text, base, examples=examples, tokenizer=tokenizer, **options)
    asked = Prompt(tokens, max_new_tokens)
    answers = decode(model, tokenizer, [asked, asked], adapters=[BASE, "default"])
    return Trial(*(answer.text for answer in answers))


def load_causal_model(
    generator: CVAELoRAGenerator, base_model: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model of a generator's adapters and its tokenizer, to continue texts; onto a GPU if there is one.

    Args:
        generator: Names the base model.
        base_model: Folder or Hub id of another copy of it.

    Raises:
        LoraFactoryError: When it cannot be loaded, or is no model that continues text.
    """
    name, revision = base_source(generator.layout, base_model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_base_model(name, revision=revision, device=device)
    if model.config.is_encoder_decoder or not model.can_generate():
        raise LoraFactoryError(
            f"the base model {name!r} is a {type(model).__name__}, which does not continue texts; take a generator "
            "for a causal language model"
        )
    return model, tokenizer
