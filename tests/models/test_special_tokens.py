"""Special tokens stand where they belong, whatever a tokenizer puts around texts by itself; vectors are finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.models import make_tokenizer, save_model
from tokenizers import Tokenizer, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_factory.arguments import CollectArguments
from lora_factory.collection.collect import collect_adapters
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.perplexity import score_examples
from lora_factory.models.decoding import end_tokens
from lora_factory.models.hidden_states import HiddenStateEncoder
from lora_factory.models.inputs import IGNORED, Seq2SeqInputs, encode_example
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task


def framing(before: str, behind: str, **names: str | None) -> PreTrainedTokenizerFast:
    """The pico tokenizer with special tokens before and behind every text."""
    plain = make_tokenizer(bos=False)
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    parts = " ".join(part for part in (before, "$A", behind) if part)
    ids = [(name, backend.token_to_id(name)) for name in (before, behind) if name]
    backend.post_processor = processors.TemplateProcessing(single=parts, special_tokens=ids)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{name: it for name, it in names.items() if it})


KINDS = {
    "both": (framing("<s>", "</s>"), "<s>"),
    "end alone": (framing("", "</s>"), ""),
    "start alone": (framing("<s>", ""), "<s>"),
    "neither": (make_tokenizer(bos=False), ""),
    "an end token that is a separator": (framing("<s>", "</s>", eos_token=None, sep_token="</s>"), "<s>"),
    "start and end alike": (framing("</s>", "</s>", bos_token="</s>"), "</s>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_end_token_behind_the_answer(kind: str) -> None:
    tokenizer, start = KINDS[kind]
    asked = encode_example(tokenizer, Example("Q: what?", " answer"), 64)
    assert tokenizer.decode(asked.tokens) == f"{start}Q: what? answer</s>"
    learnt = [label for label in asked.labels if label != IGNORED]
    assert tokenizer.decode(learnt) == " answer</s>"
    plain = encode_example(tokenizer, Example("", "plain text"), 64)
    assert tokenizer.decode(plain.tokens) == f"{start}plain text</s>"
    assert encode_example(tokenizer, Example("", "plain text</s>"), 64) == plain, (
        "one that the text brings along counts"
    )


@pytest.mark.parametrize("kind", ["end alone", "both"])
def test_no_end_token_is_read_where_texts_are_scored_or_listened_to(kind: str, pico_model: LlamaForCausalLM) -> None:
    tokenizer, start = KINDS[kind]
    naive = framing(start, "") if start else make_tokenizer(bos=False)
    for example in (Example("", "plain text"), Example("Q: what?", " answer")):
        assert score_examples(pico_model, tokenizer, [example]) == score_examples(pico_model, naive, [example])
    texts = ["plain text", Example("Q: what?", " answer")]
    closing, open_ = (HiddenStateEncoder(pico_model, one).encode(texts) for one in (tokenizer, naive))
    assert torch.equal(closing, open_)


def test_generation_stops_at_the_token_that_closes_texts(pico_model: LlamaForCausalLM) -> None:
    tokenizer = KINDS["an end token that is a separator"][0]
    pico_model.generation_config.eos_token_id = None
    assert end_tokens(pico_model, tokenizer) == {tokenizer.sep_token_id}


def test_an_encoder_reads_texts_framed_as_its_tokenizer_does() -> None:
    tokenizer = framing("<s>", "</s>")
    settings = CollectArguments(sequence_length=12, packing=False)
    (row,) = Seq2SeqInputs(tokenizer).encode([Example("never mind " * 9 + "who?", "fox")], settings)
    source = [token for token, label in zip(row.tokens, row.labels, strict=True) if label == IGNORED]
    answer = row.tokens[len(source) :]
    assert len(source) == 12 and tokenizer.decode(source).startswith("<s>")
    assert tokenizer.decode(source).endswith("who?</s>")
    assert tokenizer.decode(answer) == "<s>fox</s>"


def test_a_text_of_one_token_has_a_finite_vector(pico_model: LlamaForCausalLM) -> None:
    encoder = HiddenStateEncoder(pico_model, make_tokenizer(bos=False))
    vectors = encoder.encode(["a", "plain text"])
    assert torch.isfinite(vectors).all()
    assert not vectors[0, -32:].any(), "nothing is predicted, so no prediction is wrong"


@pytest.fixture(scope="module")
def short_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 24 learned positions."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    config = GPT2Config(vocab_size=300, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    save_model(lambda: GPT2LMHeadModel(config), make_tokenizer(bos=True), folder)
    return folder


def test_sequences_beyond_the_positions_are_refused(short_model_folder: Path, tmp_path: Path) -> None:
    texts = [f"{number} the quick brown fox jumps over the lazy dog again and again" for number in range(4)]
    task = Task.from_examples("fox", ["Write."], texts, texts[:1], texts[:1])
    settings = CollectArguments(steps=1, snapshots=1, target_modules="c_attn", sequence_length=64)
    with pytest.raises(LoraFactoryError, match=r"the 24 positions of the base model; pass sequence_length=24"):
        collect_adapters([task], short_model_folder, tmp_path / "zoo", settings)
    zoo = collect_adapters([task], short_model_folder, tmp_path / "zoo-2", replace(settings, sequence_length=24))
    assert zoo.tasks == ["fox"]


def test_scoring_and_listening_keep_to_the_positions(short_model_folder: Path) -> None:
    model, tokenizer = GPT2LMHeadModel.from_pretrained(short_model_folder), make_tokenizer(bos=True)
    long = [Example("", "the quick brown fox jumps over the lazy dog " * 9)]
    whole = score_examples(model, tokenizer, long)
    assert whole == score_examples(model, tokenizer, long, window=24, stride=12)
    assert torch.isfinite(HiddenStateEncoder(model, tokenizer).encode(long)).all()
