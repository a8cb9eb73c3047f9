"""Token budgets and chat templates; packing, masking and padding are tested where runs are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import pytest
from helpers.models import TEMPLATE, TRAINING_TEXT, with_template
from transformers import PreTrainedTokenizerBase

from lora_factory.arguments import CollectArguments, TokenOptions
from lora_factory.errors import LoraFactoryError
from lora_factory.models.inputs import (
    IGNORED,
    TokenSequence,
    encode_example,
    encode_sequences,
    length_batches,
    shuffled_batches,
)
from lora_factory.tasks.examples import Example

SETTINGS = TokenOptions(packing=False, sequence_length=64)
CHAT = TokenOptions(packing=False, sequence_length=64, chat_template=True)
EXAMPLES = [Example("", text) for text in TRAINING_TEXT]


@pytest.fixture
def chat_tokenizer(pico_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    return with_template(pico_tokenizer)


def tokens_of(sequences: list[TokenSequence]) -> list[int]:
    return [token for sequence in sequences for token in sequence.tokens]


@pytest.mark.parametrize("packing", [False, True])
def test_a_token_budget_takes_the_first_tokens(pico_tokenizer: PreTrainedTokenizerBase, packing: bool) -> None:
    settings = {"packing": packing, "sequence_length": 10 if packing else 400}
    everything = tokens_of(encode_sequences(pico_tokenizer, EXAMPLES, TokenOptions(**settings)))
    for budget in (10, 70, 120):
        some = tokens_of(encode_sequences(pico_tokenizer, EXAMPLES, TokenOptions(**settings, max_tokens=budget)))
        assert some == everything[: len(some)]
        assert budget - 1 <= len(some) <= budget  # a sequence of one token teaches nothing and is left out
    more = encode_sequences(pico_tokenizer, EXAMPLES, TokenOptions(**settings, max_tokens=10**6))
    assert tokens_of(more) == everything


def test_no_text_beyond_the_budget_is_tokenised(pico_tokenizer: PreTrainedTokenizerBase) -> None:
    class Beyond(Example):
        completion = property(lambda self: pytest.fail("this text was not to be read"))

    with_budget = TokenOptions(packing=False, max_tokens=5)
    assert len(tokens_of(encode_sequences(pico_tokenizer, [EXAMPLES[0], Beyond("", "x")], with_budget))) == 5


def test_the_chat_template_frames_prompt_and_reply(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    (sequence,) = encode_sequences(chat_tokenizer, [Example(" Who? ", "The fox.")], CHAT)
    assert chat_tokenizer.decode(sequence.tokens) == "<s>[user]Who?[assistant]The fox.</s>"
    learnt = [token for token, label in zip(sequence.tokens, sequence.labels, strict=True) if label != IGNORED]
    assert chat_tokenizer.decode(learnt) == "The fox.</s>"
    (plain,) = encode_sequences(chat_tokenizer, [Example(" Who? ", "The fox.")], SETTINGS)
    assert chat_tokenizer.decode(plain.tokens) == "<s> Who? The fox.</s>"


def test_an_overlong_chat_keeps_its_reply(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    sequence = encode_example(chat_tokenizer, Example("never mind " * 40, "The fox."), 24, chat_template=True)
    assert len(sequence.tokens) == 24
    assert chat_tokenizer.decode(sequence.tokens).endswith("never mind[assistant]The fox.</s>")


@pytest.mark.parametrize(
    ("template", "prompt", "words"),
    [
        (None, "Who?", "has no chat template; leave out chat_template"),
        (TEMPLATE, "", "chat_template needs prompts; give prompt_column"),
        ("{{ raise_exception('no user') }}", "Who?", "chat template fails: no user"),
        (
            TEMPLATE.replace("[assistant]", "[assistant]<think>"),
            "Who?",
            r"<think>', but writes a given one in another",
        ),
    ],
)
def test_templates_that_cannot_be_used_are_refused(
    chat_tokenizer: PreTrainedTokenizerBase, template: str | None, prompt: str, words: str
) -> None:
    chat_tokenizer.chat_template = template
    with pytest.raises(LoraFactoryError, match=words):
        encode_sequences(chat_tokenizer, [Example(prompt, "The fox.")], CHAT)


def test_a_budget_is_a_number_of_tokens() -> None:
    with pytest.raises(LoraFactoryError, match="max_tokens=-1 may not be below 0"):
        CollectArguments(max_tokens=-1)


def test_batches_by_length_read_every_sequence_once_an_epoch_with_little_padding() -> None:
    rows = [TokenSequence([number] * (1 + number * 7 % 64), []) for number in range(150)]

    def epochs(make: Callable[..., Iterator[list[TokenSequence]]], seed: int) -> list[list[list[TokenSequence]]]:
        batches = make(rows, 4, seed)
        return [list(islice(batches, 38)) for _ in range(3)]

    def read(epoch: list[list[TokenSequence]]) -> int:
        return sum(len(batch) * max(len(row.tokens) for row in batch) for batch in epoch)

    for epoch in (sorted_epochs := epochs(length_batches, 0)):
        assert sorted(row.tokens[0] for batch in epoch for row in batch) == list(range(150))
        assert sum(len(row.tokens) for row in rows) > 0.85 * read(epoch)
    assert all(read(epoch) > 1.2 * read(sorted_epochs[0]) for epoch in epochs(shuffled_batches, 0))
    assert sorted_epochs == epochs(length_batches, 0) != epochs(length_batches, 1)
    assert sorted_epochs[0] != sorted_epochs[1] != sorted_epochs[2]
