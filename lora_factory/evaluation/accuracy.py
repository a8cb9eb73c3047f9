"""The share of a task's test examples that a causal language model answers right."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.errors import LoraFactoryError
from lora_factory.models.decoding import Prompt, decode, end_tokens, read_answer
from lora_factory.models.inputs import following_tokens, frozen, positions, render_chat, text_tokens
from lora_factory.models.losses import Window, negative_log_likelihoods
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task

Result = TypeVar("Result")


def task_accuracy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    max_examples: int | None = None,
    batch_size: int = 8,
    window: int = 512,
    chat_template: bool = False,
) -> float | None:
    """Return the share of a task's test examples that a model answers right, by the metric that the task names.

    Args:
        model: A causal language model, with or without an adapter; left in the mode it was in.
        tokenizer: The model's tokenizer.
        task: A task with prompts.
        max_examples: Ask at most this many, spread evenly over the test split; default: all.
        batch_size: Texts per forward pass.
        window: Tokens of prompt and answer; a longer prompt loses its beginning.
        chat_template: Ask and answer in the tokenizer's chat template.

    Returns:
        From 0 to 1; None when the task has no metric.

    Raises:
        LoraFactoryError: When an example has no prompt, or a right answer is not among the task's choices.
    """
    if task.metric is None:
        return None
    examples = task.examples("test")
    if max_examples is not None and max_examples < len(examples):
        # Not the first ones, which may all be of one kind.
        examples = [examples[number * len(examples) // max_examples] for number in range(max_examples)]
    options: Any = {"batch_size": batch_size, "window": window, "chat_template": chat_template}
    try:
        if task.metric == "exact_match":
            return completion_accuracy(model, tokenizer, examples, **options)
        return choice_accuracy(model, tokenizer, examples, task.answer_choices(), **options)
    except LoraFactoryError as error:
        raise LoraFactoryError(f"accuracy on task {task.name!r}: {error}") from error


def check_metric(task: Task) -> None:
    """Refuse a task with test examples that its metric cannot judge.

    Raises:
        LoraFactoryError: As `task_accuracy`.
    """
    if task.metric is not None:
        examples = task.examples("test")
        _check(examples, 1)
        if task.metric == "multiple_choice":
            _questions(examples, task.answer_choices())


def completion_accuracy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    window: int = 512,
    chat_template: bool = False,
) -> float:
    """Return the share of prompts whose greedy completion equals the example's, whitespace around it aside.

    An answer ends with the end-of-text token, or with the line on which the example's completion ends. The model's
    own generation settings (sampling, penalties, limits) are left aside.

    Args:
        model: A causal language model, with or without an adapter; left in the mode it was in.
        tokenizer: The model's tokenizer; it needs no padding token.
        examples: Prompts with their right answers.
        max_new_tokens: Tokens after which an answer is cut off; default: two more than the longest completion has,
            so that a longer answer differs from it.
        batch_size: Prompts per forward pass.
        window: Tokens of prompt and answer; a longer prompt loses its beginning.
        chat_template: Ask in the tokenizer's chat template; the right answer is the turn as the template writes it.

    Raises:
        LoraFactoryError: When there is no example, one has no prompt, or a size is out of range.
    """
    _check(examples, batch_size)
    window = min(window, positions(model) or window)
    if chat_template:
        ends = end_tokens(model, tokenizer)
        examples = [_in_chat(tokenizer, example, ends) for example in examples]
    if max_new_tokens is None:
        max_new_tokens = 2 + max(len(_answer_tokens(tokenizer, example.completion)) for example in examples)
    if max_new_tokens < 1:
        raise LoraFactoryError(f"max_new_tokens={max_new_tokens} must be at least 1")
    limit = max_new_tokens
    prompts = [_prompt_tokens(tokenizer, example, limit, window, chat_template) for example in examples]

    def answer(batch: list[int]) -> Sequence[str]:
        lines = [1 + examples[number].completion.rstrip().count("\n") for number in batch]
        asked = [Prompt(prompts[number], limit) for number in batch]
        answers = decode(model, tokenizer, asked, watch=lambda row, grown: grown.text.count("\n") < lines[row])
        return ["\n".join(grown.text.split("\n")[:most]) for grown, most in zip(answers, lines, strict=True)]

    answers = _in_batches(model, [len(prompt) for prompt in prompts], batch_size, answer)
    pairs = zip(answers, examples, strict=True)
    return sum(answer.strip() == example.completion.strip() for answer, example in pairs) / len(examples)


def choice_accuracy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    choices: Sequence[str] | Sequence[Sequence[str]],
    *,
    batch_size: int = 8,
    normalised: bool = False,
    window: int = 512,
    chat_template: bool = False,
) -> float:
    """Return the share of prompts after which the right answer is the most likely choice.

    Whitespace around choices is ignored: each is scored with the whitespace that the example's completion starts with.

    Args:
        model: A causal language model, with or without an adapter; left in the mode it was in.
        tokenizer: The model's tokenizer.
        examples: Prompts with their right answers.
        choices: The possible answers: one list for all examples, or one list per example.
        batch_size: Texts per forward pass, each a prompt with one choice.
        normalised: Whether log-likelihoods are divided by the choices' numbers of characters.
        window: Tokens of prompt and choice; a longer prompt loses its beginning.
        chat_template: Put prompts and choices into the tokenizer's chat template.

    Raises:
        LoraFactoryError: When there is no example, one has no prompt, its completion is not among its choices, or
            two choices are the same.
    """
    _check(examples, batch_size)
    window = min(window, positions(model) or window)
    questions = _questions(examples, choices)
    texts = [
        _choice_window(tokenizer, example, choice, window, chat_template)
        for example, offered in zip(examples, questions, strict=True)
        for choice in offered
    ]
    lengths = [len(text.tokens) for text in texts]
    losses = iter(
        _in_batches(
            model, lengths, batch_size, lambda batch: negative_log_likelihoods(model, [texts[i] for i in batch])
        )
    )
    right = 0
    for example, offered in zip(examples, questions, strict=True):
        values = [-next(losses) / (len(choice) if normalised else 1) for choice in offered]
        if not all(map(math.isfinite, values)):
            raise LoraFactoryError(f"the log-likelihoods {values} must be finite; check the model and its adapter")
        right += values.index(max(values)) == offered.index(example.completion.strip())
    return right / len(examples)


def _in_batches(
    model: PreTrainedModel | PeftModel,
    lengths: Sequence[int],
    batch_size: int,
    compute: Callable[[list[int]], Sequence[Result]],
) -> list[Result]:
    """Apply ``compute`` to batches of indices into ``lengths``; returns one result per index, in index order.

    The longest texts come first: similar lengths together need little padding, and too large a batch fails at once.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    results: dict[int, Result] = {}
    with frozen(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            results.update(zip(batch, compute(batch), strict=True))
    return [results[number] for number in range(len(lengths))]


def _check(examples: Sequence[Example], batch_size: int) -> None:
    if not examples or batch_size < 1:
        raise LoraFactoryError(f"{len(examples)} examples, batch_size={batch_size}: both must be at least 1")
    for example in examples:
        if not example.prompt.strip():
            raise LoraFactoryError(
                f"the example with the completion {example.completion[:60]!r} has no prompt, and only an answer to"
                " something is right or wrong; give prompt_column and completion_column, or leave the metric out"
            )


def _answer_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    tokens = following_tokens(tokenizer, text)
    if not tokens:
        raise LoraFactoryError(f"the tokenizer has no token for the answer {text!r}; write it in characters it knows")
    return tokens


def _in_chat(tokenizer: PreTrainedTokenizerBase, example: Example, ends: set[int]) -> Example:
    """Put an example into the chat template; its completion becomes what `read_answer` reads from the model's turn."""
    prompt, turn = render_chat(tokenizer, example)
    return Example(prompt, read_answer(tokenizer, _answer_tokens(tokenizer, turn), ends))


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, example: Example, answer: int, window: int, chat_template: bool
) -> list[int]:
    """Tokenise a prompt and keep its last ``window - answer`` tokens, where ``answer`` is the answer's length."""
    if not answer < window:
        raise LoraFactoryError(f"window={window} has no room for a prompt and {answer} tokens of answer; enlarge it")
    tokens = text_tokens(tokenizer, example.prompt, begins=not chat_template)
    tokens = tokens[answer - window :]
    if not tokens:
        raise LoraFactoryError(f"the tokenizer has no token for the prompt {example.prompt[:60]!r}")
    return tokens


def _questions(examples: Sequence[Example], choices: Sequence[str] | Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Strip every example's choices and check that they differ and include the example's completion."""
    shared = all(isinstance(choice, str) for choice in choices)
    each = [choices] * len(examples) if shared else choices
    if len(each) != len(examples):
        raise LoraFactoryError(f"{len(each)} lists of choices and {len(examples)} examples; give one list per example")
    questions = []
    for example, offered in zip(examples, each, strict=True):
        found = tuple(str(choice).strip() for choice in offered)
        if len(found) < 2 or len(set(found)) < len(found) or "" in found:
            raise LoraFactoryError(f"choices={found!r} must be two or more, all different and not empty")
        if example.completion.strip() not in found:
            raise LoraFactoryError(
                f"the completion {example.completion[:60]!r} is not among the choices {', '.join(map(repr, found))};"
                " list every right answer"
            )
        questions.append(found)
    return questions


def _choice_window(
    tokenizer: PreTrainedTokenizerBase, example: Example, choice: str, window: int, chat_template: bool
) -> Window:
    blanks = example.completion[: len(example.completion) - len(example.completion.lstrip())]
    example = example._replace(completion=blanks + choice)
    if chat_template:
        example = render_chat(tokenizer, example)
    answer = _answer_tokens(tokenizer, example.completion)
    prompt = _prompt_tokens(tokenizer, example, len(answer), window, chat_template)
    return Window(prompt + answer, len(prompt))
