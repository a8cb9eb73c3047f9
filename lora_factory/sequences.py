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


def encode_sequences(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], arguments: CollectArguments
) -> list[TokenSequence]:
    """Tokenise examples into sequences of at most ``sequence_length`` tokens, with the loss on the completion only.

    With packing, examples follow each other (closed by the end-of-text token) and every sequence is full, unless all
    the text is shorter than one. Without it, each example is cut into its own sequences. With ``max_tokens``, only the
    first tokens are used, and no more text is tokenised than these need.

    Raises:
        LoraFactoryError: When no token is left to learn from.
    """
    length, budget = arguments.sequence_length, arguments.max_tokens
    encoded, used = [], 0
    for example in examples:
        sequence = encode_example(tokenizer, example, length, chat_template=arguments.chat_template)
        if budget and used + len(sequence.tokens) >= budget:
            rest = budget - used
            encoded.append(TokenSequence(sequence.tokens[:rest], sequence.labels[:rest]))
            break
        used += len(sequence.tokens)
        encoded.append(sequence)
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


def scored_tokens(batch: Sequence[TokenSequence]) -> int:
    """How many tokens a model's loss on a batch is the mean over."""
    return sum(label != IGNORED for sequence in batch for label in sequence.labels[1:])


def encode_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, length: int, *, chat_template: bool = False
) -> TokenSequence:
    """One example as tokens; an over-long prompt loses its beginning, so that the completion stays.

    A chat template has its own beginning and end of a text; otherwise these are the tokenizer's.
    """
    if chat_template:
        example = render_chat(tokenizer, example)
    prompt = text_tokens(tokenizer, example.prompt, begins=not chat_template) if example.prompt else []
    completion = text_tokens(tokenizer, example.completion, begins=not prompt)
    if not chat_template:
        completion = closed(tokenizer, completion)
    if prompt:
        prompt = prompt[-max(1, length - len(completion)) :]
    return TokenSequence(prompt + completion, [IGNORED] * len(prompt) + completion)


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, begins: bool, target: bool = False) -> list[int]:
    """The tokens of a text; never those that the tokenizer puts behind one, since another text may follow.

    Args:
        tokenizer: Any; whether it puts special tokens before a text, behind it, both or none is found out here.
        text: What is read; special tokens that are written out in it stay.
        begins: Whether the special tokens that start a text come first.
        target: Whether the text is an answer of an encoder-decoder, which some tokenizers frame in another way.
    """
    tokens = _tokens(tokenizer, text, target=target, add_special_tokens=False)
    return [*special_tokens(tokenizer, target=target)[0], *tokens] if begins else tokens


def special_tokens(tokenizer: PreTrainedTokenizerBase, *, target: bool = False) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before a text, and those that it puts behind it."""
    bare = _tokens(tokenizer, "a", target=target, add_special_tokens=False)
    framed = _tokens(tokenizer, "a", target=target, add_special_tokens=True)
    spare = len(framed) - len(bare)
    if not bare:  # the tokenizer does not know the letter: the first end token ends the beginning
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
        start = next((index for index, token in enumerate(framed) if token in ends), spare)
        return framed[:start], framed[start:]
    start = next((index for index in range(spare + 1) if framed[index : index + len(bare)] == bare), 0)
    return framed[:start], framed[start + len(bare) :]


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends a text: the tokenizer's own, else the first that it puts behind a text, such as [SEP]."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    return next(iter(special_tokens(tokenizer)[1]), None)


def closed(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[int]:
    """The tokens of an answer with exactly one end token behind them, where the tokenizer has one."""
    end = end_token(tokenizer)
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, target: bool, add_special_tokens: bool) -> list[int]:
    words = {"text_target" if target else "text": text}
    return list(tokenizer(**words, add_special_tokens=add_special_tokens, verbose=False).input_ids)


def render_chat(tokenizer: PreTrainedTokenizerBase, example: Example) -> Example:
    """An example in the tokenizer's chat template: up to the assistant's turn, and what the assistant says in it.

    Raises:
        LoraFactoryError: When the tokenizer has no chat template, the example no prompt, or the template writes the
            start of a reply in another way than a reply.
    """
    if not tokenizer.chat_template:
        raise LoraFactoryError("the base model's tokenizer has no chat template; leave out chat_template")
    if not example.prompt:
        raise LoraFactoryError(
            "chat_template needs prompts; give prompt_column and completion_column, or leave it out"
        )
    turns = [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}]
    try:
        start = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # the base model's own template: whatever it raises, it cannot be used
        raise LoraFactoryError(f"the tokenizer's chat template fails: {error}; leave out chat_template") from error
    if not whole.startswith(start):
        raise LoraFactoryError(
            f"the tokenizer's chat template starts a reply with {start[-40:]!r}, but writes a given one in another "
            "way; leave out chat_template"
        )
    return Example(start, whole.removeprefix(start))


def shuffled_batches(sequences: Sequence[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Endless shuffled batches; an epoch's last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator).tolist()
        for start in range(0, len(order), size):
            yield [sequences[index] for index in order[start : start + size]]
