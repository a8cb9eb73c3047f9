"""Metrics in the manner of Hugging Face `evaluate`, and how often a model gives the right answer.

The classes have the methods of `evaluate.Metric` without being one: importing `evaluate` takes a second or more, each
of its metrics makes a folder in the user's cache, even when it keeps everything in memory, and `evaluate.load` needs
the network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.perplexity import TextScore
from lora_factory.models.generate import end_tokens, greedy_answers, read_answer
from lora_factory.models.inputs import frozen, positions, render_chat, text_tokens
from lora_factory.models.losses import Window, negative_log_likelihoods
from lora_factory.tasks.examples import Example
from lora_factory.tasks.task import Task

Prediction = TypeVar("Prediction")
Reference = TypeVar("Reference")


class Metric(ABC, Generic[Prediction, Reference]):
    """Collects predictions with their references until `compute` turns them into figures and starts afresh."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Prediction, Reference]] = []

    def add(self, *, prediction: Prediction, reference: Reference) -> None:
        """Add one prediction and its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[Prediction], references: Sequence[Reference]) -> None:
        """Add predictions and their references, in the same order.

        Raises:
            LoraFactoryError: When there are more of the one than of the other.
        """
        if len(predictions) != len(references):
            raise LoraFactoryError(
                f"{len(predictions)} predictions and {len(references)} references; give one reference a prediction"
            )
        self._pairs.extend(zip(predictions, references, strict=True))

    def compute(
        self, *, predictions: Sequence[Prediction] = (), references: Sequence[Reference] = ()
    ) -> dict[str, float]:
        """The metric over all that was added, and over what is given here; afterwards nothing is left.

        Raises:
            LoraFactoryError: When there is nothing to compute it from, or a value is out of range or not finite.
        """
        self.add_batch(predictions=predictions, references=references)
        pairs, self._pairs = self._pairs, []
        if not pairs:
            raise LoraFactoryError(f"{type(self).__name__} has no predictions; call add_batch before compute")
        return self._compute(pairs)

    @abstractmethod
    def _compute(self, pairs: Sequence[tuple[Prediction, Reference]]) -> dict[str, float]:
        """The figures of at least one pair."""


class Perplexity(Metric[float, int]):
    """``exp`` of the mean negative log-likelihood; every token counts the same, in whatever text it stands.

    Predictions are texts' summed negative log-likelihoods in nats, references their numbers of scored tokens.
    """

    def _compute(self, pairs: Sequence[tuple[float, int]]) -> dict[str, float]:
        total, tokens = _totals(pairs, "tokens")
        return {"perplexity": TextScore(loss=total / tokens, tokens=tokens, characters=0).perplexity}


class BitsPerCharacter(Metric[float, int]):
    """Total bits over total characters, which is comparable between tokenizers.

    Predictions are texts' summed negative log-likelihoods in nats, references their numbers of characters.
    """

    def _compute(self, pairs: Sequence[tuple[float, int]]) -> dict[str, float]:
        total, characters = _totals(pairs, "characters")
        return {"bits_per_character": total / (characters * math.log(2))}


class ExactMatch(Metric[str, str]):
    """The share of texts that equal their references, blanks around them aside.

    Args:
        ignore_case: Whether upper and lower case count as the same.
    """

    def __init__(self, *, ignore_case: bool = False) -> None:
        super().__init__()
        self.ignore_case = ignore_case

    def _compute(self, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
        matches = sum(self._plain(prediction) == self._plain(reference) for prediction, reference in pairs)
        return {"exact_match": matches / len(pairs)}

    def _plain(self, text: str) -> str:
        return text.strip().casefold() if self.ignore_case else text.strip()


class ChoiceScore(NamedTuple):
    """The total log-likelihood of one possible answer, in nats, and its length in characters."""

    log_likelihood: float
    length: int = 1


class MultipleChoice(Metric[Sequence[ChoiceScore], int]):
    """The share of questions whose right answer is the likeliest of the choices.

    Predictions are the scores of a question's choices, references the index of the right one; of equally likely
    choices, the first one is taken.

    Args:
        normalised: Whether log-likelihoods are divided by the answers' lengths, so that long answers are not at a
            disadvantage: lm-evaluation-harness' `acc_norm`; without it, its `acc`.
    """

    def __init__(self, *, normalised: bool = False) -> None:
        super().__init__()
        self.normalised = normalised

    def _compute(self, pairs: Sequence[tuple[Sequence[ChoiceScore], int]]) -> dict[str, float]:
        right = sum(self._chosen(scores, answer) == answer for scores, answer in pairs)
        return {"accuracy": right / len(pairs)}

    def _chosen(self, scores: Sequence[ChoiceScore], answer: int) -> int:
        if len(scores) < 2 or not 0 <= answer < len(scores) or any(length < 1 for _, length in scores):
            raise LoraFactoryError(f"reference={answer}, {scores}: give two or more choices with lengths from 1 up")
        values = [value / length if self.normalised else value for value, length in scores]
        if not all(map(math.isfinite, values)):
            raise LoraFactoryError(f"the log-likelihoods {values} must be finite; check the model and its adapter")
        return max(range(len(values)), key=values.__getitem__)


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
    """The share of a task's test examples that a model answers right, by the task's own metric.

    Args:
        model: A causal language model, with or without an adapter; left in the mode it was in.
        tokenizer: The model's tokenizer.
        task: What to answer.
        max_examples: Ask at most this many, spread evenly over the test split; default: all.
        batch_size: Texts a forward pass.
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
    """The share of prompts that the model itself, decoding greedily, completes exactly as the examples do.

    An answer ends with the end-of-text token, or with the line on which the example's completion ends. The model's
    own generation settings (sampling, penalties, limits) are left aside.

    Args:
        model: A causal language model, with or without an adapter; left in the mode it was in.
        tokenizer: The model's tokenizer; it needs no padding token.
        examples: Prompts with their right answers.
        max_new_tokens: Cut an answer off here and take it as it is; default: two tokens more than the longest
            completion has, so that a longer answer is not mistaken for it.
        batch_size: Prompts a forward pass.
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
    prompts = [_prompt_tokens(tokenizer, example, max_new_tokens, window, chat_template) for example in examples]
    metric = ExactMatch()
    # Longest first: alike lengths together need little padding, and too large a batch fails at once.
    order = sorted(range(len(examples)), key=lambda number: len(prompts[number]), reverse=True)
    with frozen(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            references = [examples[number].completion for number in batch]
            answers = greedy_answers(
                model, tokenizer, [prompts[number] for number in batch], references, max_new_tokens
            )
            metric.add_batch(predictions=answers, references=references)
    return metric.compute()["exact_match"]


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
    """The share of prompts after which the right answer is the likeliest one of the choices.

    Blanks around choices do not count: each one is scored with the blanks that the example's completion starts with.

    Args:
        model: A causal language model, with or without an adapter; left in the mode it was in.
        tokenizer: The model's tokenizer.
        examples: Prompts with their right answers.
        choices: The possible answers: one list for all examples, or one list an example.
        batch_size: Texts, each a prompt with one choice, a forward pass.
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
    losses: dict[int, float] = {}
    order = sorted(range(len(texts)), key=lambda number: len(texts[number].tokens), reverse=True)
    with frozen(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            found = negative_log_likelihoods(model, [texts[number] for number in batch])
            losses.update(zip(batch, found, strict=True))
    metric = MultipleChoice(normalised=normalised)
    numbers = iter(range(len(texts)))
    for example, offered in zip(examples, questions, strict=True):
        scores = [ChoiceScore(-losses[next(numbers)], len(choice)) for choice in offered]
        metric.add(prediction=scores, reference=offered.index(example.completion.strip()))
    return metric.compute()["accuracy"]


def _totals(pairs: Sequence[tuple[float, int]], unit: str) -> tuple[float, int]:
    """Summed negative log-likelihoods and summed counts."""
    for loss, count in pairs:
        if not math.isfinite(loss) or count < 1:
            raise LoraFactoryError(f"a loss of {loss} over {count} {unit}; give a finite sum over at least one")
    return math.fsum(loss for loss, _ in pairs), sum(count for _, count in pairs)


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
    tokens = text_tokens(tokenizer, text, begins=False)
    if not tokens:
        raise LoraFactoryError(f"the tokenizer has no token for the answer {text!r}; write it in characters it knows")
    return tokens


def _in_chat(tokenizer: PreTrainedTokenizerBase, example: Example, ends: set[int]) -> Example:
    """An example in the chat template, its completion as it is read when a model gives it."""
    prompt, turn = render_chat(tokenizer, example)
    return Example(prompt, read_answer(tokenizer, _answer_tokens(tokenizer, turn), ends))


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, example: Example, answer: int, window: int, chat_template: bool
) -> list[int]:
    """As many of the prompt's last tokens as the window has room for before the tokens of an answer."""
    if not answer < window:
        raise LoraFactoryError(f"window={window} has no room for a prompt and {answer} tokens of answer; enlarge it")
    tokens = text_tokens(tokenizer, example.prompt, begins=not chat_template)
    tokens = tokens[answer - window :]
    if not tokens:
        raise LoraFactoryError(f"the tokenizer has no token for the prompt {example.prompt[:60]!r}")
    return tokens


def _questions(examples: Sequence[Example], choices: Sequence[str] | Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Each example's choices without the blanks around them; the right answer is one of them."""
    shared = all(isinstance(choice, str) for choice in choices)
    each = [choices] * len(examples) if shared else choices
    if len(each) != len(examples):
        raise LoraFactoryError(f"{len(each)} lists of choices and {len(examples)} examples; give one list an example")
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
