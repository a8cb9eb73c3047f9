"""Examples as token sequences with labels, and sequences as padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from lora_factory.arguments import CollectArguments
from lora_factory.data_source import Example
from lora_factory.errors import LoraFactoryError

Row = TypeVar("Row")
IGNORED = -100  # the label that PyTorch's cross-entropy skips


@dataclass(frozen=True)
class TokenSequence:
    """One training sequence: token ids and labels of equal length; label -100 is not scored."""

    tokens: list[int]
    labels: list[int]


@dataclass(frozen=True)
class CausalInputs:
    """Texts for causal language models: prompt and answer in one sequence."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, examples: Sequence[Example], arguments: CollectArguments) -> list[TokenSequence]:
        """As `encode_sequences`."""
        return encode_sequences(self.tokenizer, examples, arguments)

    def collate(self, rows: Sequence[TokenSequence], device: torch.device) -> dict[str, torch.Tensor]:
        """As `collate`."""
        return collate(rows, self.tokenizer.pad_token_id or 0, device)


def encode_sequences(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], arguments: CollectArguments
) -> list[TokenSequence]:
    """Tokenise examples into sequences of at most ``sequence_length`` tokens, with the loss on the completion only.

    With packing, examples follow each other (closed by the end-of-text token) and every sequence is full, unless all
    the text is shorter than one. Without it, each example is cut into its own sequences.

    Raises:
        LoraFactoryError: When no token is left to learn from.
    """
    length = arguments.sequence_length
    encoded = [encode_example(tokenizer, example, length) for example in examples]
    if arguments.packing:
        stream = TokenSequence([t for s in encoded for t in s.tokens], [label for s in encoded for label in s.labels])
        whole = max(length, len(stream.tokens) // length * length)
        encoded = [TokenSequence(stream.tokens[:whole], stream.labels[:whole])]
    cut = [
        TokenSequence(sequence.tokens[start : start + length], sequence.labels[start : start + length])
        for sequence in encoded
        for start in range(0, len(sequence.tokens), length)
    ]
    sequences = [sequence for sequence in cut if any(label != IGNORED for label in sequence.labels[1:])]
    if not sequences:
        raise LoraFactoryError(f"{len(examples)} examples hold no token to learn from; give longer texts")
    return sequences


def collate(batch: Sequence[TokenSequence], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Pad sequences on the right to the batch's longest; tensors of shape ``(batch, tokens)``."""
    longest = max(len(sequence.tokens) for sequence in batch)

    def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)

    return {
        "input_ids": padded([sequence.tokens for sequence in batch], pad_token_id),
        "labels": padded([sequence.labels for sequence in batch], IGNORED),
        "attention_mask": padded([[1] * len(sequence.tokens) for sequence in batch], 0),
    }


def encode_example(tokenizer: PreTrainedTokenizerBase, example: Example, length: int) -> TokenSequence:
    """One example as tokens; an over-long prompt loses its beginning, so that the completion stays."""
    prompt = tokenizer(example.prompt).input_ids if example.prompt else []
    completion = tokenizer(example.completion, add_special_tokens=not prompt).input_ids
    completion = completion + [tokenizer.eos_token_id] * (tokenizer.eos_token_id is not None)
    if prompt:
        prompt = prompt[-max(1, length - len(completion)) :]
    return TokenSequence(prompt + completion, [IGNORED] * len(prompt) + completion)


def shuffled_batches(sequences: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Endless shuffled batches; an epoch's last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [sequences[index] for index in order[start : start + size]]
