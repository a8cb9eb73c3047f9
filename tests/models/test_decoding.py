"""Answers that are decoded together are those that are decoded alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.models import attach, random_adapter, with_template
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lora_factory.adapters.attach import attach_adapter
from lora_factory.errors import LoraFactoryError
from lora_factory.models.decoding import BASE, Answer, Prompt, chat_tokens, decode
from lora_factory.models.inputs import text_tokens


@pytest.fixture
def tokens(pico_tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    texts = ("The quick brown fox", "def add(left", "Permission is hereby granted, free of charge, to any person")
    return [text_tokens(pico_tokenizer, text, begins=True) for text in texts]


def tokens_of(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def test_greedy_answers_are_those_of_transformers(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]
) -> None:
    answers = decode(pico_model, pico_tokenizer, [Prompt(row, 8) for row in tokens])
    for row, answer in zip(tokens, answers, strict=True):
        own = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=pico_tokenizer.eos_token_id)
        whole = pico_model.generate(torch.tensor([row]), generation_config=own)[0, len(row) :].tolist()
        assert answer.tokens == [token for token in whole if token != pico_tokenizer.eos_token_id]
        assert answer.finish in ("stop", "length")


def test_rows_keep_their_adapters_and_settings(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]
) -> None:
    model, layout = attach(pico_model)
    for number in range(3):
        attach_adapter(model, layout, layout.unflatten(2 * random_adapter(layout, number)), f"slot{number}")
    names = [BASE, "slot0", "slot1", "slot2", "slot0", "slot1"]
    settings: list[dict[str, Any]] = [{}, {}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.5}]
    prompts = [
        Prompt(tokens[row % 3], 3 + row, **settings[row % 4], stop=("e",) if row == 5 else ()) for row in range(6)
    ]
    together = decode(model, pico_tokenizer, prompts, adapters=names)
    alone = [
        decode(model, pico_tokenizer, [prompt], adapters=[name])[0]
        for prompt, name in zip(prompts, names, strict=True)
    ]
    assert tokens_of(together) == tokens_of(alone)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    same = [Prompt(tokens[0], 12)] * 4
    assert len({answer.text for answer in decode(model, pico_tokenizer, same, adapters=names[:4])}) == 4


def test_a_seed_repeats_and_another_one_differs(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]
) -> None:
    prompts = [Prompt(tokens[0], 20, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    first, second, other = tokens_of(decode(pico_model, pico_tokenizer, prompts))
    assert first == second != other


def test_a_tiny_share_of_probability_leaves_the_most_likely_token(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]
) -> None:
    drawn = Prompt(tokens[0], 12, temperature=1.5, top_p=1e-9)
    assert len(set(map(tuple, tokens_of(decode(pico_model, pico_tokenizer, [drawn, Prompt(tokens[0], 12)]))))) == 1


def test_texts_that_are_settled_add_up_to_the_answer(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]
) -> None:
    whole = decode(pico_model, pico_tokenizer, [Prompt(tokens[0], 30)])[0].text
    stop = whole[10:14]
    seen: list[str] = []

    def watch(row: int, answer: Answer) -> bool:
        seen.append(answer.settled)
        return True

    (answer,) = decode(pico_model, pico_tokenizer, [Prompt(tokens[0], 30, stop=(stop,))], watch=watch)
    assert answer.finish == "stop"
    assert answer.text == whole[: whole.index(stop)] == seen[-1]
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))


def test_half_a_stop_text_and_half_a_character_are_held_back(pico_tokenizer: PreTrainedTokenizerBase) -> None:
    answer = Answer(Prompt([1], 99, stop=("END",)), pico_tokenizer)
    for token in text_tokens(pico_tokenizer, "xé", begins=False)[:-1]:
        answer.add(token, set())
    assert answer.settled == "x"
    answer = Answer(Prompt([1], 99, stop=("END",)), pico_tokenizer)
    for token in text_tokens(pico_tokenizer, "the EN", begins=False):
        answer.add(token, set())
    assert (answer.text, answer.settled) == ("the EN", "the ")


def test_an_answer_that_is_no_longer_wanted_ends(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]
) -> None:
    prompts = [Prompt(tokens[0], 12)] * 2
    answers = decode(pico_model, pico_tokenizer, prompts, watch=lambda row, answer: row or len(answer.tokens) < 3)
    assert answers[0].finish == "cancelled" and len(answers[0].tokens) == 3
    assert answers[1].tokens == decode(pico_model, pico_tokenizer, prompts[:1])[0].tokens


@torch.no_grad()
def test_a_failure_leaves_the_model_as_it_was(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]
) -> None:
    model, layout = attach(pico_model)
    attach_adapter(model, layout, layout.unflatten(2 * random_adapter(layout, 1)), "other")
    model.set_adapter("default")
    before = model(torch.tensor(tokens[:1])).logits

    def fail(row: int, answer: Answer) -> bool:
        raise MemoryError

    with pytest.raises(MemoryError):
        decode(model, pico_tokenizer, [Prompt(tokens[0], 4)], adapters=["other"], watch=fail)
    assert torch.equal(model(torch.tensor(tokens[:1])).logits, before)
    assert len(model(torch.tensor([tokens[0]] * 2)).logits) == 2


def test_the_lowest_temperature_takes_the_most_likely_token(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, tokens: list[list[int]]
) -> None:
    drawn, likely = decode(pico_model, pico_tokenizer, [Prompt(tokens[0], 8, temperature=t) for t in (1e-320, 0.0)])
    assert drawn.tokens == likely.tokens


def test_prompts_that_cannot_be_answered_are_refused(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(LoraFactoryError, match="the prompt is empty"):
        decode(pico_model, pico_tokenizer, [Prompt([], 5)])
    with pytest.raises(LoraFactoryError, match="1000 tokens and the answer may have 25, but the model reads 1024"):
        decode(pico_model, pico_tokenizer, [Prompt([5] * 1000, 25)])
    with pytest.raises(LoraFactoryError, match="no chat template"):
        chat_tokens(pico_tokenizer, [{"role": "user", "content": "Hello"}])


def test_a_conversation_in_the_template(pico_tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = chat_tokens(with_template(pico_tokenizer), [{"role": "user", "content": " Hello "}])
    assert pico_tokenizer.decode(tokens) == "<s>[user]Hello[assistant]"
