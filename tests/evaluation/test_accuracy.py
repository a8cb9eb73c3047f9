"""Accuracies against a computation one token at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from helpers.models import attach, make_tokenizer, random_adapter, with_template
from tokenizers import Tokenizer
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lora_factory.adapters.attach import AdapterSlot
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation import accuracy
from lora_factory.evaluation.accuracy import choice_accuracy, completion_accuracy, task_accuracy
from lora_factory.models.inputs import render_chat
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task

PROMPTS = [
    "Who reads?\nAnswer:",
    "What jumps over the lazy dog while the old man reads a letter by the window of the house?\nAnswer:",
    "x",
    "def add(left, right):\n",
    "Permission is hereby granted, free of charge, to any",
    "The fox <pad>",
    "for index in range(10):\n    print(",
]
CHOICES = (" a", " t", " r", " house", " window")


class Setup:
    """A model, its tokenizer, and how they answer, computed without batches and without padding."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @torch.no_grad()
    def greedy(self, prompt: str, count: int, window: int = 512) -> str:
        tokens = self.tokenizer(prompt).input_ids[-(window - count) :]
        start = len(tokens)
        for _ in range(count):
            tokens.append(int(self.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return self.tokenizer.decode(tokens[start:])

    @torch.no_grad()
    def log_likelihood(self, prompt: str, completion: str, window: int = 512) -> float:
        answer = self.tokenizer(completion, add_special_tokens=False).input_ids
        tokens = self.tokenizer(prompt).input_ids[-(window - len(answer)) :]
        total = 0.0
        for token in answer:
            total += float(self.model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)[token])
            tokens.append(token)
        return total


@pytest.fixture(params=["llama-with-bos", "gpt2-without-bos-and-padding-token"])
def setup(request: pytest.FixtureRequest, pico_tokenizer: PreTrainedTokenizerBase) -> Setup:
    """Rotary and absolute positions: the latter go wrong with any padding that is not accounted for."""
    if request.param == "llama-with-bos":
        return Setup(request.getfixturevalue("pico_model"), pico_tokenizer)
    tokenizer = make_tokenizer(bos=False)
    tokenizer.pad_token = None
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, eos_token_id=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Setup(GPT2LMHeadModel(config).eval(), tokenizer)


@pytest.fixture(scope="module")
def answering(pico_model_folder) -> Setup:
    """A pico Llama that was taught these answers, to the end-of-text token where ``</s>`` stands.

    Its tokenizer has a word with the id 0, as GPT-2's has, so that padding after an answer would be read as text.
    """
    model = LlamaForCausalLM.from_pretrained(pico_model_folder)
    backend = json.loads(make_tokenizer(bos=True).backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] != 0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), bos_token="<s>", eos_token="</s>"
    )
    assert "<pad>" in tokenizer.decode([0], skip_special_tokens=True)
    taught = {
        "Fox?": " yes</s>",
        "Dog?": " no\nFox?",
        "Old man?": "\nyes\nno\nno",
        "House?": " yes, a house</s>",
    }
    rows = [
        (tokenizer(prompt).input_ids, tokenizer(answer, add_special_tokens=False).input_ids)
        for prompt, answer in taught.items()
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        for prompt, answer in rows:
            labels = [-100] * len(prompt) + answer
            model(torch.tensor([prompt + answer]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Setup(model.eval(), tokenizer)


def test_log_likelihoods_that_are_not_finite_are_refused(answering: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "negative_log_likelihoods", lambda _, windows: [math.nan] * len(windows))
    with pytest.raises(LoraFactoryError, match=r"nan, nan.* must be finite; check the model"):
        choice_accuracy(answering.model, answering.tokenizer, [Example("Fox?", " yes")], ("yes", "no"))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_greedy_answers_are_those_of_one_token_at_a_time(setup: Setup, batch_size: int) -> None:
    answers = [setup.greedy(prompt, 6).partition("\n")[0] for prompt in PROMPTS]
    right = [Example(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    wrong = [example._replace(completion=example.completion + "!") for example in right[::2]]
    options = {"max_new_tokens": 6, "batch_size": batch_size}
    for example in right:  # each alone, so that no right answer makes up for a wrong one
        assert completion_accuracy(setup.model, setup.tokenizer, [example], **options) == 1
    assert completion_accuracy(setup.model, setup.tokenizer, right, **options) == 1
    assert completion_accuracy(setup.model, setup.tokenizer, [*right, *wrong], **options) == 7 / 11


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_likelihoods_are_those_of_one_token_at_a_time(setup: Setup, batch_size: int, normalised: bool) -> None:
    likeliest = [chosen(setup, prompt, CHOICES, normalised) for prompt in PROMPTS]
    assert len(set(likeliest)) > 1
    assert likeliest != [chosen(setup, prompt, CHOICES, not normalised) for prompt in PROMPTS]
    right = [Example(prompt, answer) for prompt, answer in zip(PROMPTS, likeliest, strict=True)]
    options = {"batch_size": batch_size, "normalised": normalised}
    assert choice_accuracy(setup.model, setup.tokenizer, right, CHOICES, **options) == 1
    for answer in CHOICES:
        same = [Example(prompt, answer) for prompt in PROMPTS]
        share = likeliest.count(answer) / len(likeliest)
        assert choice_accuracy(setup.model, setup.tokenizer, same, CHOICES, **options) == share


def chosen(setup: Setup, prompt: str, choices: Sequence[str], normalised: bool = False, window: int = 512) -> str:
    def score(choice: str) -> float:
        return setup.log_likelihood(prompt, choice, window) / (len(choice.strip()) if normalised else 1)

    return max(choices, key=score)


def test_choices_may_differ_from_example_to_example(setup: Setup) -> None:
    choices = [CHOICES, CHOICES[:2], (*CHOICES, " x"), CHOICES[1:], CHOICES, CHOICES[:2], CHOICES]
    right = [Example(prompt, chosen(setup, prompt, given)) for prompt, given in zip(PROMPTS, choices, strict=True)]
    assert choice_accuracy(setup.model, setup.tokenizer, right, choices, batch_size=4) == 1
    with pytest.raises(LoraFactoryError, match="2 lists of choices and 7 examples"):
        choice_accuracy(setup.model, setup.tokenizer, right, choices[:2])


def test_choices_take_the_blanks_before_the_completions(setup: Setup) -> None:
    right = [Example(prompt, chosen(setup, prompt, CHOICES) + "\n") for prompt in PROMPTS]
    bare = [choice.strip() for choice in CHOICES]
    assert choice_accuracy(setup.model, setup.tokenizer, right, bare) == 1
    glued = [Example(prompt, chosen(setup, prompt, bare)) for prompt in PROMPTS]
    assert [e.completion for e in glued] != [e.completion.strip() for e in right]  # blanks do matter to the model
    assert choice_accuracy(setup.model, setup.tokenizer, glued, bare) == 1


def test_an_answer_ends_with_the_text_or_with_its_last_line(answering: Setup) -> None:
    def is_right(prompt: str, completion: str, **options: int) -> bool:
        examples = [Example("Dog?", " never"), Example(prompt, completion)]  # never alone in its batch
        return completion_accuracy(answering.model, answering.tokenizer, examples, **options) == 0.5

    assert answering.greedy("Dog?", 6).startswith(" no\n")  # it was taught
    assert is_right("Fox?", " yes") and is_right("Fox?", "yes\n")
    assert is_right("Dog?", "no"), "what follows a line of answer does not count"
    assert not is_right("House?", " yes"), "a longer answer is not this one"
    assert is_right("House?", " yes, a house", max_new_tokens=40)
    assert is_right("Old man?", "\nyes") and is_right("Old man?", "\nyes\nno", max_new_tokens=40)
    assert not is_right("Old man?", "yes"), "an empty line is an answer too"


def test_generation_stops_when_every_answer_is_complete(answering: Setup) -> None:
    passes = []
    hook = answering.model.register_forward_hook(lambda *call: passes.append(call))
    examples = [Example("Fox?", " yes"), Example("Dog?", " no")]
    assert completion_accuracy(answering.model, answering.tokenizer, examples, max_new_tokens=100) == 1
    hook.remove()
    assert len(passes) < 10


def test_the_models_own_generation_settings_are_left_aside_and_kept(answering: Setup, monkeypatch) -> None:
    own = GenerationConfig(do_sample=True, temperature=50.0, repetition_penalty=9.0, max_length=4, eos_token_id=[2, 7])
    monkeypatch.setattr(answering.model, "generation_config", own)
    examples = [Example("Fox?", " yes"), Example("Dog?", " no"), Example("House?", " yes, a house")]
    assert completion_accuracy(answering.model, answering.tokenizer, examples) == 1
    assert answering.model.generation_config is own and own.do_sample and own.max_new_tokens is None


@pytest.mark.parametrize("training", [True, False])
def test_models_answer_in_eval_mode_without_gradients_and_return_to_their_mode(setup: Setup, training: bool) -> None:
    greedy = [Example(prompt, setup.greedy(prompt, 6).partition("\n")[0]) for prompt in PROMPTS]
    likeliest = [Example(prompt, chosen(setup, prompt, CHOICES)) for prompt in PROMPTS]
    setup.model.train(training)  # GPT-2 has dropout
    had_gradients = []
    setup.model.register_forward_hook(lambda *call: had_gradients.append(call[-1].logits.requires_grad))
    assert completion_accuracy(setup.model, setup.tokenizer, greedy, max_new_tokens=6) == 1
    assert choice_accuracy(setup.model, setup.tokenizer, likeliest, CHOICES) == 1
    assert setup.model.training is training
    assert had_gradients and not any(had_gradients)


def test_an_adapter_in_its_slot_is_what_answers(pico_model: LlamaForCausalLM, pico_tokenizer) -> None:
    base = Setup(pico_model, pico_tokenizer)
    answers = [base.greedy(prompt, 5) for prompt in PROMPTS]
    chosen_by_base = [chosen(base, prompt, CHOICES) for prompt in PROMPTS]
    examples = [Example(*pair) for pair in zip(PROMPTS, answers, strict=True)]
    questions = [Example(*pair) for pair in zip(PROMPTS, chosen_by_base, strict=True)]
    model, layout = attach(pico_model)
    slot = AdapterSlot(model, layout)
    slot.load(random_adapter(layout, seed=1) * 5)
    assert completion_accuracy(model, pico_tokenizer, examples, max_new_tokens=5) < 1
    assert choice_accuracy(model, pico_tokenizer, questions, CHOICES) < 1
    with slot.disabled():
        assert completion_accuracy(model, pico_tokenizer, examples, max_new_tokens=5) == 1
        assert choice_accuracy(model, pico_tokenizer, questions, CHOICES) == 1


def test_a_prompt_beyond_the_window_loses_its_beginning(setup: Setup) -> None:
    prompt = PROMPTS[1] * 20  # more tokens than GPT-2 has positions
    examples = [Example(prompt, setup.greedy(prompt, 5, window=32).partition("\n")[0])]
    assert completion_accuracy(setup.model, setup.tokenizer, examples, max_new_tokens=5, window=32) == 1
    examples = [Example(prompt, chosen(setup, prompt, CHOICES, window=32))]
    assert choice_accuracy(setup.model, setup.tokenizer, examples, CHOICES, window=32) == 1
    with pytest.raises(LoraFactoryError, match="window=32 has no room for a prompt and 32 tokens of answer"):
        completion_accuracy(setup.model, setup.tokenizer, examples, max_new_tokens=32, window=32)


@pytest.mark.parametrize(
    ("example", "choices", "options", "says"),
    [
        (Example("", "no"), ["no", "yes"], {}, "completion 'no' has no prompt.*give prompt_column"),
        (
            Example("Who?", "he"),
            ["no", "yes"],
            {},
            "'he' is not among the choices 'no', 'yes'; list every right answer",
        ),
        (Example("Who?", "no"), ["no"], {}, "must be two or more, all different"),
        (Example("Who?", "no"), ["no", " no"], {}, "must be two or more, all different"),
        (Example("Who?", "no"), ["no", " "], {}, "not empty"),
        (Example("Who?", "no"), ["no", "yes"], {"batch_size": 0}, "1 examples, batch_size=0"),
        (Example("Who?", "no"), ["no", "yes"], {"window": 2}, "window=2 has no room"),
    ],
)
def test_questions_that_make_no_sense_are_refused(pico_model, pico_tokenizer, example, choices, options, says) -> None:
    with pytest.raises(LoraFactoryError, match=says):
        choice_accuracy(pico_model, pico_tokenizer, [example], choices, **options)


def test_answers_without_tokens_cannot_win(pico_model, pico_tokenizer) -> None:
    tokenizer = make_tokenizer(bos=True)
    tokenizer.backend_tokenizer.pre_tokenizer = None  # then it drops whatever is not in its vocabulary
    with pytest.raises(LoraFactoryError, match="no token for the answer '終'"):
        choice_accuracy(pico_model, tokenizer, [Example("Who?", "no")], ["no", "終"])


def test_generation_needs_examples_and_room_for_a_token(pico_model, pico_tokenizer) -> None:
    with pytest.raises(LoraFactoryError, match="0 examples"):
        completion_accuracy(pico_model, pico_tokenizer, [])
    with pytest.raises(LoraFactoryError, match="max_new_tokens=0 must be at least 1"):
        completion_accuracy(pico_model, pico_tokenizer, [Example("Who?", "he")], max_new_tokens=0)


def test_answers_in_the_chat_template_are_those_of_one_token_at_a_time(pico_model, pico_tokenizer) -> None:
    tokenizer = with_template(pico_tokenizer)
    naive = Setup(pico_model, make_tokenizer(bos=False))  # the template starts a text itself
    asked = [prompt for prompt in PROMPTS if "<" not in prompt]
    starts = [render_chat(tokenizer, Example(prompt, "x")).prompt for prompt in asked]
    answers = [naive.greedy(start, 6).partition("\n")[0] for start in starts]
    right = [Example(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]
    options = {"chat_template": True, "batch_size": 2}
    assert completion_accuracy(pico_model, tokenizer, right, max_new_tokens=6, **options) == 1
    assert completion_accuracy(pico_model, tokenizer, right, max_new_tokens=6) < 1

    choices = [choice.strip() for choice in CHOICES]
    turns = {choice + "</s>": choice for choice in choices}
    likeliest = [turns[chosen(naive, start, list(turns))] for start in starts]
    questions = [Example(prompt, f" {choice}") for prompt, choice in zip(asked, likeliest, strict=True)]
    assert choice_accuracy(pico_model, tokenizer, questions, choices, **options) == 1
    assert choice_accuracy(pico_model, tokenizer, questions, choices) < 1
    task = make_task(questions, "multiple_choice", tuple(choices))
    assert task_accuracy(pico_model, tokenizer, task, chat_template=True) == 1


def make_task(test: Sequence[Example], metric: str | None = None, choices: tuple[str, ...] = ()) -> Task:
    train = [Example("Fox?", " yes"), Example("Dog?", " no")]
    return Task.from_examples("animals", ["Yes or no."], train, train, test, metric=metric, choices=choices)


def test_a_task_is_judged_by_its_own_metric(answering: Setup) -> None:
    test = [Example("Fox?", " yes"), Example("Dog?", " yes"), Example("House?", " yes")]
    accuracy = {
        metric: task_accuracy(answering.model, answering.tokenizer, make_task(test, metric))
        for metric in (None, "exact_match", "multiple_choice")
    }
    assert accuracy == {None: None, "exact_match": 1 / 3, "multiple_choice": 2 / 3}
    told = make_task(test, "multiple_choice", ("yes", "no", "yes, a house"))
    assert task_accuracy(answering.model, answering.tokenizer, told, batch_size=2) == 2 / 3


def test_the_questions_asked_are_spread_over_the_test_split(answering: Setup) -> None:
    test = [*[Example("Fox?", " yes")] * 10, *[Example("Dog?", " yes")] * 10]
    task = make_task(test, "multiple_choice")
    for count, expected in ((4, 0.5), (3, 2 / 3), (1, 1), (100, 0.5), (None, 0.5)):
        assert task_accuracy(answering.model, answering.tokenizer, task, max_examples=count) == expected


def test_errors_name_the_task(answering: Setup) -> None:
    plain = make_task([Example("", "yes")], "exact_match")
    with pytest.raises(LoraFactoryError, match="task 'animals': the example with the completion 'yes' has no prompt"):
        task_accuracy(answering.model, answering.tokenizer, plain)
    unseen = make_task([Example("Fox?", "maybe")], "multiple_choice")
    with pytest.raises(LoraFactoryError, match="task 'animals': the completion 'maybe' is not among the choices 'no'"):
        task_accuracy(answering.model, answering.tokenizer, unseen)
