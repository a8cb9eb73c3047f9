"""Let a causal language model answer prompts: greedily, until its answers are complete."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lora_factory.adapters.live_models import base_of
from lora_factory.models.inputs import end_token, pad_tokens


def greedy_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    references: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """One greedy answer a prompt.

    Args:
        model: A causal language model, with or without an adapter; its own generation settings are left aside.
        tokenizer: The model's tokenizer.
        prompts: Token ids.
        references: The right answers: one is complete when it has as many lines, or with the token that ends a text.
        max_new_tokens: Tokens of an answer at most.
    """
    base = base_of(model)
    own, ends = base.generation_config, end_tokens(model, tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=0
    )
    inputs = pad_tokens(prompts, next(model.parameters()).device, side="left")  # the answers follow on the right
    reader = _AnswerReader(tokenizer, inputs["input_ids"].shape[1], ends, references)
    base.generation_config = greedy  # generate takes from there what the configuration that it is given leaves open
    try:
        criteria = StoppingCriteriaList([reader])
        return reader.read(base.generate(**inputs, generation_config=greedy, stopping_criteria=criteria))
    finally:
        base.generation_config = own


def end_tokens(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text, by the model's own generation settings or the tokenizer."""
    base = base_of(model)
    own = base.generation_config.eos_token_id
    given = own if isinstance(own, list) else [own]
    return {token for token in (*given, end_token(tokenizer)) if token is not None}


def read_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], ends: set[int]) -> str:
    """The text of an answer up to the token that ends it."""
    answer = list(takewhile(lambda token: token not in ends, tokens))
    return str(tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _AnswerReader(StoppingCriteria):
    """Reads answers of as many lines as their references have out of generated rows, and says which are complete."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, start: int, ends: set[int], references: Sequence[str]
    ) -> None:
        self.tokenizer, self.start, self.ends = tokenizer, start, ends
        self.lines = [1 + reference.rstrip().count("\n") for reference in references]

    def __call__(self, input_ids: Tensor, scores: object, **options: object) -> Tensor:
        """Return whether each row is complete, shape ``(rows,)``; `generate` itself stops at end-of-text tokens."""
        texts = self._texts(input_ids)
        done = [text.count("\n") >= lines for text, lines in zip(texts, self.lines, strict=True)]
        return torch.tensor(done, device=input_ids.device)

    def read(self, generated: Tensor) -> list[str]:
        """The rows' answers; what follows an end-of-text token or the last line is left out."""
        texts = zip(self._texts(generated), self.lines, strict=True)
        return ["\n".join(text.split("\n")[:lines]) for text, lines in texts]

    def _texts(self, rows: Tensor) -> list[str]:
        return [read_answer(self.tokenizer, row, self.ends) for row in rows[:, self.start :].tolist()]
