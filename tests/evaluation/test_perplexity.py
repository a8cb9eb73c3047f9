"""Scores against a computation one token at a time, and the one adapter slot."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.models import attach, lora_config, make_tokenizer, save_adapter, with_template
from helpers.runs import SMALL
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from lora_factory.cli import commands as cli
from lora_factory.collection.collect import collect_adapters
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.perplexity import TextScore, evaluate_adapters, score_examples
from lora_factory.models.inputs import IGNORED, collate, encode_example, scored_tokens
from lora_factory.models.loading import load_base_model
from lora_factory.reporting.summary import headroom
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import save_tasks
from lora_factory.tasks.text import DataSource
from lora_factory.utils.safe_files import read_json

LONG = "The quick brown fox jumps over the lazy dog, and the café owner reads: def add(left, right). " * 4


EXAMPLES = [
    Example("", "The old man reads a letter."),
    Example("Question: what is it?\nAnswer:", " a house with a window"),
    Example("", LONG),
    Example(LONG, " the end"),
    Example("", ""),
    Example("", "x"),
]


@torch.no_grad()
def naive_score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: list[Example], window: int, stride: int
) -> tuple[float, int]:
    """Total loss and count, one token and one forward pass at a time, each with the context its window gives it."""
    total, count = 0.0, 0
    for example in examples:
        context = tokenizer(example.prompt).input_ids
        tokens = context + tokenizer(example.completion, add_special_tokens=False).input_ids
        for position in range(max(1, len(context)), len(tokens)):
            start = max(0, math.ceil((position + 1 - window) / stride)) * stride
            logits = model(torch.tensor([tokens[start:position]])).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[tokens[position]])
            count += 1
    return total, count


def test_matches_one_token_at_a_time(pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase) -> None:
    total, count = naive_score(pico_model, pico_tokenizer, EXAMPLES, window=1000, stride=500)
    score = score_examples(pico_model, pico_tokenizer, EXAMPLES, window=1000, stride=500)
    assert score.tokens == count
    assert score.loss == pytest.approx(total / count, rel=1e-5)
    assert score.characters == sum(len(example.completion) for example in EXAMPLES)
    assert score.loss > math.log(300) / 2  # it knows nothing: near the uniform distribution over 300 tokens


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (16, 1), (7, 3), (2, 1)])
def test_sliding_window_matches_one_token_at_a_time(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, window: int, stride: int
) -> None:
    total, count = naive_score(pico_model, pico_tokenizer, EXAMPLES, window, stride)
    score = score_examples(pico_model, pico_tokenizer, EXAMPLES, window=window, stride=stride)
    assert score.tokens == count
    assert score.loss == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batching_changes_nothing(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    expected = score_examples(pico_model, pico_tokenizer, EXAMPLES, window=32, stride=16)
    score = score_examples(pico_model, pico_tokenizer, EXAMPLES, window=32, stride=16, batch_size=batch_size)
    assert (score.tokens, score.characters) == (expected.tokens, expected.characters)
    assert score.loss == pytest.approx(expected.loss, rel=1e-6)


def test_windows_do_not_matter_where_texts_fit(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase
) -> None:
    wide = score_examples(pico_model, pico_tokenizer, EXAMPLES[:2], window=512, stride=256)
    tight = score_examples(pico_model, pico_tokenizer, EXAMPLES[:2], window=64, stride=3)
    assert tight.loss == pytest.approx(wide.loss, rel=1e-6)


def test_prompt_is_read_but_not_scored(pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase) -> None:
    completion = " a house with a window"
    alone = score_examples(pico_model, pico_tokenizer, [Example("", completion)])
    prompted = score_examples(pico_model, pico_tokenizer, [Example("A letter", completion)])
    assert (prompted.tokens, prompted.characters) == (alone.tokens, alone.characters)
    assert prompted.loss != pytest.approx(alone.loss, rel=1e-3)


def test_loss_is_weighted_by_token(pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase) -> None:
    scores = [score_examples(pico_model, pico_tokenizer, [example]) for example in EXAMPLES[:2]]
    both = score_examples(pico_model, pico_tokenizer, EXAMPLES[:2])
    assert both.tokens == sum(score.tokens for score in scores)
    assert both.loss == pytest.approx(sum(score.loss * score.tokens for score in scores) / both.tokens, rel=1e-6)


def test_without_start_token_the_first_token_is_context(pico_model: LlamaForCausalLM) -> None:
    tokenizer = make_tokenizer(bos=False)
    text = "Permission is hereby granted"
    tokens = tokenizer(text).input_ids
    score = score_examples(pico_model, tokenizer, [Example("", text)])
    assert score.tokens == len(tokens) - 1
    assert score.characters == len(text) - len(tokenizer.decode(tokens[:1]))
    prompted = score_examples(pico_model, tokenizer, [Example("Please:", text)])
    assert (prompted.tokens, prompted.characters) == (len(tokens), len(text))


def test_token_budget_scores_a_prefix(pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase) -> None:
    first = score_examples(pico_model, pico_tokenizer, EXAMPLES[:1])
    capped = score_examples(pico_model, pico_tokenizer, EXAMPLES[:3], max_tokens=first.tokens)
    assert capped == first
    beyond = score_examples(pico_model, pico_tokenizer, EXAMPLES, max_tokens=first.tokens + 2)
    scored = pico_tokenizer(EXAMPLES[1].completion, add_special_tokens=False).input_ids[:2]
    assert beyond.tokens == first.tokens + 2
    assert beyond.characters == first.characters + len(pico_tokenizer.decode(scored))
    everything = score_examples(pico_model, pico_tokenizer, EXAMPLES)
    assert score_examples(pico_model, pico_tokenizer, EXAMPLES, max_tokens=10**6) == everything


def test_reports_progress_and_leaves_the_model_as_it_was(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase
) -> None:
    pico_model.train()
    calls: list[tuple[int, int]] = []
    score_examples(
        pico_model,
        pico_tokenizer,
        EXAMPLES[:3],
        batch_size=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(2, 3), (3, 3)]
    assert pico_model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"window": 8, "stride": 8}, "stride=8, window=8"),
        ({"stride": 0}, "stride=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_sizes_out_of_range(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(LoraFactoryError, match=message):
        score_examples(pico_model, pico_tokenizer, EXAMPLES, **sizes)


@pytest.mark.parametrize("examples", [[], [Example("a prompt alone", "")]])
def test_nothing_to_score(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> None:
    with pytest.raises(LoraFactoryError, match="no token to score"):
        score_examples(pico_model, pico_tokenizer, examples)


def test_derived_figures() -> None:
    score = TextScore(loss=math.log(8), tokens=10, characters=30)
    assert score.perplexity == pytest.approx(8)
    assert score.bits_per_character == pytest.approx(1)  # 10 tokens of 3 bits over 30 characters
    assert set(score.to_dict()) == {"loss", "tokens", "characters", "accuracy", "perplexity", "bits_per_character"}
    assert TextScore(loss=1e4, tokens=1, characters=1).perplexity == math.inf
    assert math.isnan(TextScore(loss=math.nan, tokens=1, characters=1).perplexity)


def test_headroom() -> None:
    assert headroom(3.0, 3.0, 2.0) == 0
    assert headroom(3.0, 2.0, 2.0) == 1
    assert headroom(3.0, 2.25, 2.0) == pytest.approx(0.75)
    assert headroom(3.0, 3.5, 2.0) == pytest.approx(-0.5)
    assert math.isnan(headroom(2.0, 1.0, 2.0))
    assert math.isnan(headroom(2.0, 1.0, 2.5))
    assert math.isnan(headroom(math.nan, 1.0, 2.5))


class FixedTask(NamedTuple):
    """Stands in for a Task with one split."""

    name: str
    test: list[Example]
    metric: None = None

    def examples(self, split: str) -> list[Example]:
        assert split == "test"
        return self.test


def test_evaluate_adapters_of_several_layouts(
    pico_model_folder: Path, pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tasks = [FixedTask("letters", EXAMPLES[:1]), FixedTask("questions", EXAMPLES[1:2])]
    expected: dict[str, dict[str, TextScore]] = {}
    configs = [lora_config(), lora_config(), lora_config(target_modules=["o_proj"], r=3)]
    for seed, config in enumerate(configs):
        model, layout = attach(LlamaForCausalLM.from_pretrained(pico_model_folder), config)
        folder = save_adapter(model, layout, seed, tmp_path / str(seed))
        expected[str(folder)] = {task.name: score_examples(model, pico_tokenizer, task.test) for task in tasks}
    base = LlamaForCausalLM.from_pretrained(pico_model_folder)
    expected["base model"] = {task.name: score_examples(base, pico_tokenizer, task.test) for task in tasks}
    said: list[str] = []
    folders = [name for name in expected if name != "base model"]
    scores = evaluate_adapters(folders, tasks, pico_model_folder, progress=said.append)
    assert list(scores) == ["base model", *folders]
    for name, row in scores.items():
        for task, score in row.items():
            assert score.tokens == expected[name][task].tokens
            assert score.loss == pytest.approx(expected[name][task].loss, rel=1e-5)
    assert said[0] == "scoring base model on letters"
    assert len(said) == 8


def test_evaluate_adapters_refuses_another_base(
    pico_model: LlamaForCausalLM, pico_model_folder: Path, tmp_path: Path
) -> None:
    model, layout = attach(pico_model, lora_config(target_modules=["o_proj"]))
    folder = save_adapter(model, layout, 0, tmp_path / "adapter")
    config = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config.replace("o_proj", "c_attn"))
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights.replace(b"o_proj", b"c_attn"))
    with pytest.raises(LoraFactoryError, match="has no module"):
        evaluate_adapters([folder], [FixedTask("letters", EXAMPLES[:1])], pico_model_folder)


@torch.no_grad()
def test_the_chat_template_is_scored_as_it_is_trained(
    pico_model: LlamaForCausalLM, pico_tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = with_template(pico_tokenizer)
    examples = [Example("Who jumps? ", "The fox."), Example("Over what?", " the lazy dog ")]
    for example in examples:
        trained = encode_example(tokenizer, example, 512, chat_template=True)
        expected = pico_model(**collate([trained], 0, torch.device("cpu"))).loss
        score = score_examples(pico_model, tokenizer, [example], chat_template=True)
        assert score.loss == pytest.approx(float(expected), rel=1e-5)
        assert score.tokens == scored_tokens([trained])
        assert score.characters == len(example.completion.strip() + "</s>")
        assert score.loss != pytest.approx(score_examples(pico_model, tokenizer, [example]).loss, rel=1e-2)
    capped = score_examples(pico_model, tokenizer, examples, max_tokens=3, chat_template=True)
    assert (capped.tokens, capped.characters) == (3, len(tokenizer.decode(trained_start(tokenizer, examples[0]))))
    with pytest.raises(LoraFactoryError, match="chat_template needs prompts"):
        score_examples(pico_model, tokenizer, EXAMPLES[:1], chat_template=True)


def trained_start(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """The first three tokens that an example is learned from."""
    labels = encode_example(tokenizer, example, 512, chat_template=True).labels
    return [label for label in labels if label != IGNORED][:3]


def test_adapters_are_scored_in_the_template_that_their_record_names(
    pico_model_folder: Path, pico_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pico_model_folder, base)
    with_template(pico_tokenizer).save_pretrained(base)
    examples = [Example(f"Who jumps over {number}?", f"The fox {number}.") for number in range(6)]
    task = Task.from_examples("foxes", ["Answer."], examples[:3], examples[3:4], examples[4:])
    chat = collect_adapters([task], base, tmp_path / "chat", replace(SMALL, chat_template=True))
    plain = collect_adapters([task], base, tmp_path / "plain", SMALL)
    run, other = (zoo.folder / "foxes" / "seed-0" for zoo in (chat, plain))
    copied = shutil.copytree(run, tmp_path / "adapter")

    model, tokenizer = load_base_model(base)
    framed, bare = (
        score_examples(model, tokenizer, task.examples("test"), chat_template=template) for template in (True, False)
    )
    assert framed.loss != pytest.approx(bare.loss, rel=1e-2)
    assert evaluate_adapters([run, copied], [task], base)["base model"]["foxes"] == framed
    assert evaluate_adapters([copied], [task], base, zoo=chat)["base model"]["foxes"] == framed
    assert evaluate_adapters([copied], [task], base)["base model"]["foxes"] == bare, "there is no record"
    assert evaluate_adapters([other], [task], base, zoo=plain)["base model"]["foxes"] == bare
    for zoo in (None, chat):
        with pytest.raises(LoraFactoryError, match=r"chat_template \(.*: true, .*: false\); evaluate the two kinds"):
            evaluate_adapters([run, other], [task], base, zoo=zoo)

    said: list[str] = []
    broken = Task("broken", ("Nothing.",), DataSource(str(tmp_path / "no.jsonl")))
    without = Task.from_examples("without", ["No prompts."], ["a b", "b c", "c d", "d e"])
    for last, reason in ((broken, "no.jsonl"), (without, "chat_template needs prompts")):
        with pytest.raises(LoraFactoryError, match=rf"task '{last.name}' cannot be used: .*{reason}"):
            evaluate_adapters([run], [task, last], base, progress=said.append)
    assert not said, "all data is read before anything is scored"

    save_tasks([task], tmp_path / "tasks.json")
    words = ["evaluate", "--tasks", str(tmp_path / "tasks.json"), "--adapter", str(copied), "--zoo", str(chat.folder)]
    assert cli.main([*words, "--base-model", str(base), "--output", str(tmp_path / "results")]) == 0
    scores = read_json(tmp_path / "results" / "evaluation.json")
    assert scores["base model"]["foxes"]["tokens"] == framed.tokens
