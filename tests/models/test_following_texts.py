"""Answers are learned, scored and read as written, also where a tokenizer puts a space before every text."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.models import make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lora_factory.evaluation.accuracy import choice_accuracy
from lora_factory.evaluation.perplexity import score_examples
from lora_factory.models.decoding import Prompt, decode
from lora_factory.models.inputs import encode_example, text_tokens
from lora_factory.tasks.examples import Example

TEXTS = ["print(index) Say: yes no maybe answer the question <|user|> <|assistant|>", "Q: a\nA: yes no"]
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PAIRS = [("Q: a\nA:", " yes"), ("Q: a\nA:", "yes no"), ("yes", "(index)"), ("Say:", "\n\nyes"), ("Say:\n", "\n yes")]


def spaced() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text, bytes for what the vocabulary lacks."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([word for text in TEXTS for word in text.split()], trainer)
    content = json.loads(backend.to_str())
    content["model"]["byte_fallback"] = True
    for number in range(256):
        content["model"]["vocab"][f"<0x{number:02X}>"] = len(content["model"]["vocab"])
    backend = Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture(scope="module", params=["a space before every text", "none"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    (make_tokenizer(bos=True) if request.param == "none" else spaced()).save_pretrained(folder)
    found = AutoTokenizer.from_pretrained(folder)
    found.chat_template = CHAT
    return found


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes)).eval()


@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_an_answer_is_learned_as_it_is_written(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> None:
    tokens = encode_example(tokenizer, Example(prompt, answer), 100).tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == prompt + answer
    assert tokens == [*tokenizer(prompt).input_ids, *tokens[len(tokenizer(prompt).input_ids) :]]


def test_a_text_alone_and_a_chat_are_those_of_transformers(tokenizer: PreTrainedTokenizerBase) -> None:
    assert encode_example(tokenizer, Example("", "yes no"), 100).tokens == [
        *tokenizer("yes no").input_ids,
        tokenizer.eos_token_id,
    ]
    chat = encode_example(tokenizer, Example("the question", "yes"), 100, chat_template=True).tokens
    turns = [{"role": "user", "content": "the question"}, {"role": "assistant", "content": "yes"}]
    assert chat == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "answer"), [*PAIRS[:3], ("", "yes no")])
def test_an_answer_is_scored_as_transformers_reads_it(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM, prompt: str, answer: str
) -> None:
    asked = tokenizer(prompt).input_ids if prompt else [tokenizer.bos_token_id]
    ids = torch.tensor([tokenizer(prompt + answer).input_ids])
    labels = ids.clone()
    labels[:, : len(asked)] = -100
    expected = float(model(ids, labels=labels).loss)
    assert score_examples(model, tokenizer, [Example(prompt, answer)]).loss == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_an_answer_keeps_its_first_space(tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    tokens = text_tokens(tokenizer, "Say:", begins=True)
    prompts = [Prompt(tokens, 4, temperature=3.0, seed=seed) for seed in range(60)]
    answers = decode(model, tokenizer, prompts)
    assert any(answer.text.startswith(" ") for answer in answers)
    for answer in answers:
        whole = tokenizer.decode([*tokens, *answer.tokens], skip_special_tokens=True)
        assert "Say:" + answer.text == whole


@torch.no_grad()
def test_choices_are_told_apart_as_they_are_written(
    tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM
) -> None:
    for right, wrong in (("yes", "no"), ("no", "yes")):
        losses = [score_examples(model, tokenizer, [Example("print(", one)]) for one in (right, wrong)]
        sums = [score.loss * score.tokens for score in losses]
        expected = float(sums[0] < sums[1])
        assert choice_accuracy(model, tokenizer, [Example("print(", right)], ["yes", "no"]) == expected
