"""Decode answers to prompts in one batch: each row with its own adapter, sampling, stop texts and end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lora_factory.adapters.live_models import base_of
from lora_factory.errors import LoraFactoryError
from lora_factory.models.inputs import end_token, line_break, pad_tokens, positions, text_tokens

BASE = "__base__"  # PEFT's name for rows that go through no adapter
STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"


@dataclass(frozen=True)
class Prompt:
    """What a model is to continue, and how.

    Attributes:
        tokens: Token ids, at least one.
        max_new_tokens: Tokens of the answer at most.
        temperature: 0 takes the most likely token; above 0 the token is drawn.
        top_p: Tokens are drawn from the most likely ones that together have this probability.
        seed: Of the draws; rows of a batch do not share it.
        stop: Texts that end the answer; they are not part of it.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass
class Answer:
    """An answer while it grows, and when it is complete.

    Attributes:
        prompt: What it answers.
        tokenizer: Reads its tokens.
        tokens: Those generated so far, without the one that ends a text.
        finish: None while it grows; then "stop" (an end token or a stop text), "length" or "cancelled".
    """

    prompt: Prompt
    tokenizer: PreTrainedTokenizerBase
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None

    @property
    def text(self) -> str:
        """The answer so far, up to the first stop text."""
        text = read_answer(self.tokenizer, self.tokens, set())
        places = [place for stop in self.prompt.stop if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    @property
    def settled(self) -> str:
        """The part of the answer that no later token changes: without half a character or half a stop text."""
        text = self.text
        if self.finish is not None:
            return text
        text = text.rstrip("\ufffd")
        half = max(
            (size for stop in self.prompt.stop for size in range(1, len(stop)) if text.endswith(stop[:size])),
            default=0,
        )
        return text[: len(text) - half]

    def add(self, token: int, ends: set[int]) -> None:
        """Take one more token."""
        if token in ends:
            self.finish = STOP
            return
        self.tokens.append(token)
        if self.prompt.stop and len(self.text) < len(read_answer(self.tokenizer, self.tokens, set())):
            self.finish = STOP
        elif len(self.tokens) >= self.prompt.max_new_tokens:
            self.finish = LENGTH


@torch.inference_mode()
def decode(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    adapters: Sequence[str] | None = None,
    watch: Callable[[int, Answer], bool] | None = None,
) -> list[Answer]:
    """Answer prompts together, in one call of ``generate``.

    Args:
        model: A causal language model, with or without adapters; its own generation settings are left aside.
        tokenizer: The model's tokenizer.
        prompts: What to answer.
        adapters: With a ``PeftModel``: the name of each row's adapter in it, or ``BASE``.
        watch: Called after every token of an answer with its row and the answer, last when it is complete; returns
            whether the answer is still wanted.

    Returns:
        One answer a prompt.

    Raises:
        LoraFactoryError: When a prompt is empty, or longer than the model reads.
    """
    base = base_of(model)
    limit = positions(base)
    for prompt in prompts:
        check_prompt(prompt, limit)
    inputs = pad_tokens([prompt.tokens for prompt in prompts], next(base.parameters()).device, side="left")
    ends = end_tokens(model, tokenizer)
    reader = _Reader([Answer(prompt, tokenizer) for prompt in prompts], ends, watch)
    options: dict[str, Any] = {
        "generation_config": GenerationConfig(
            max_new_tokens=max(prompt.max_new_tokens for prompt in prompts),
            do_sample=False,  # _Drawn draws, for each row in its own way
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
        ),
        "stopping_criteria": StoppingCriteriaList([reader]),
        "logits_processor": LogitsProcessorList([_Drawn(prompts)] if any(p.temperature for p in prompts) else []),
    }
    hooked = {module: set(module._forward_pre_hooks) for module in base.modules()}
    own, base.generation_config = base.generation_config, options["generation_config"]
    try:
        if adapters is not None and isinstance(model, PeftModel):
            # PeftModelForCausalLM's own method puts the generation settings of its birth back into the base model.
            PeftModel.generate(model, **inputs, **options, adapter_names=list(adapters))
        else:
            base.generate(**inputs, **options)
    except BaseException:
        for module, hooks in hooked.items():  # PEFT's hooks, which it takes out only where nothing fails
            for key in set(module._forward_pre_hooks) - hooks:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        raise
    finally:
        base.generation_config = own
    return reader.answers


def end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text, by the model's own generation settings or the tokenizer."""
    own = base_of(model).generation_config.eos_token_id
    given = own if isinstance(own, list) else [own]
    return {token for token in (*given, end_token(tokenizer)) if token is not None}


def read_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], ends: set[int]) -> str:
    """The text of an answer up to the token that ends it."""
    before, answer = [*line_break(tokenizer)], list(takewhile(lambda token: token not in ends, tokens))
    # Behind a line break, so that a tokenizer that puts a space before every text leaves the answer's own.
    lead, text = (
        str(tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for row in (before, before + answer)
    )
    return text[len(lead) :]


def check_prompt(prompt: Prompt, limit: int | None) -> None:
    """Refuse a prompt that a model cannot answer in full.

    Args:
        prompt: The prompt.
        limit: Tokens that the model reads, prompt and answer together; None: any number.

    Raises:
        LoraFactoryError: When it has no token, or is too long with its answer.
    """
    if not prompt.tokens:
        raise LoraFactoryError("the prompt is empty; give a text to continue")
    if limit and len(prompt.tokens) + prompt.max_new_tokens > limit:
        raise LoraFactoryError(
            f"the prompt has {len(prompt.tokens)} tokens and the answer may have {prompt.max_new_tokens}, but the "
            f"model reads {limit} together; give a shorter prompt or ask for fewer tokens"
        )


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of a conversation in the tokenizer's chat template, up to the start of the assistant's turn.

    Args:
        tokenizer: One with a chat template.
        messages: ``{"role", "content"}`` in order.

    Raises:
        LoraFactoryError: When the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise LoraFactoryError(
            "the base model's tokenizer has no chat template, so it knows no conversations; give it a text to continue"
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # the base model's own template: whatever it raises, the messages cannot be used
        raise LoraFactoryError(f"the chat template refuses the messages: {error}") from error
    return text_tokens(tokenizer, str(text), begins=False)


class _Reader(StoppingCriteria):
    """Adds every new token to its row's answer, and says which answers are complete."""

    def __init__(self, answers: list[Answer], ends: set[int], watch: Callable[[int, Answer], bool] | None) -> None:
        self.answers, self.ends, self.watch = answers, ends, watch

    def __call__(self, input_ids: Tensor, scores: object, **options: object) -> Tensor:
        """Return whether each row is complete, shape ``(rows,)``."""
        for row, (answer, token) in enumerate(zip(self.answers, input_ids[:, -1].tolist(), strict=True)):
            if answer.finish is not None:
                continue
            answer.add(token, self.ends)
            if self.watch is not None and not self.watch(row, answer) and answer.finish is None:
                answer.finish = CANCELLED
        done = [answer.finish is not None for answer in self.answers]
        return torch.tensor(done, device=input_ids.device)


class _Drawn(LogitsProcessor):
    """Draws the next token of rows with a temperature, and leaves it as the only one that greedy decoding can take."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.rows = {
            row: (prompt, torch.Generator().manual_seed(prompt.seed))
            for row, prompt in enumerate(prompts)
            if prompt.temperature
        }

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of shape ``(rows, tokens)``, those of drawn rows -inf but for one token."""
        scores = scores.clone()
        for row, (prompt, source) in self.rows.items():
            token = _draw(scores[row].float().cpu(), prompt, source)
            scores[row] = -math.inf
            scores[row, token] = 0.0
        return scores


def _draw(scores: Tensor, prompt: Prompt, source: torch.Generator) -> int:
    """One token by the probabilities of scores ``(tokens,)``."""
    scores = scores.double()
    chances = torch.softmax((scores - scores.max()) / prompt.temperature, dim=0)  # finite at any temperature
    if prompt.top_p >= 1:
        return int(torch.multinomial(chances, 1, generator=source))
    ordered, tokens = chances.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < prompt.top_p  # the first one always
    kept[0] = True
    return int(tokens[torch.multinomial(ordered * kept, 1, generator=source)])
