"""Token-weighted perplexity and bits per character of causal language models and adapters, and their accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_factory.adapters.attach import AdapterSlot, attach_adapter
from lora_factory.adapters.folder import GENERATION_FILE, load_adapter
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.errors import LoraFactoryError
from lora_factory.evaluation.accuracy import task_accuracy
from lora_factory.models.inputs import following_tokens, frozen, positions, render_chat, text_tokens
from lora_factory.models.loading import base_source, load_base_model
from lora_factory.models.losses import Window, negative_log_likelihoods
from lora_factory.tasks.examples import Example
from lora_factory.tasks.given import as_texts
from lora_factory.tasks.task import Task
from lora_factory.tasks.task_file import check_tasks
from lora_factory.utils.paths import local_path
from lora_factory.utils.safe_files import read_json_object
from lora_factory.zoo.store import RECORD_FILE, ZOO_FILE, AdapterZoo

if TYPE_CHECKING:
    from lora_factory.generator.writer import AdapterWriter

BASE = "base model"  # the name of its row among the scores


@dataclass(frozen=True)
class TextScore:
    """The loss of a model on some text.

    Attributes:
        loss: Mean negative log-likelihood in nats per scored token.
        tokens: Number of scored tokens.
        characters: Number of characters of the scored tokens' text.
        accuracy: Share of test examples answered right, from 0 to 1; None where no metric was taken.
    """

    loss: float
    tokens: int
    characters: int
    accuracy: float | None = None

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where a float cannot hold it."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf

    @property
    def bits_per_character(self) -> float:
        """Total bits over characters: comparable between tokenizers, unlike the perplexity."""
        return self.loss * self.tokens / (self.characters * math.log(2))

    def to_dict(self) -> dict[str, float | None]:
        """All fields, the perplexity and the bits per character, for JSON."""
        return {**asdict(self), "perplexity": self.perplexity, "bits_per_character": self.bits_per_character}


def score_examples(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    window: int = 512,
    stride: int = 256,
    batch_size: int = 8,
    max_tokens: int | None = None,
    chat_template: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TextScore:
    """Score the completions of examples; every token is scored once and has the same weight.

    A text longer than the window is read in overlapping windows: each token is scored in the first window that holds
    it, so that every token beyond the first window has at least ``window - stride`` tokens of context. Prompts are
    read, not scored. A plain text's first token is not scored if the tokenizer adds no special token before it.

    Args:
        model: A causal language model; scored in eval mode and left in the mode it was in.
        tokenizer: The model's tokenizer.
        examples: Prompts with completions; a plain text has an empty prompt.
        window: Tokens per window, at most the number of the model's positions.
        stride: Tokens between the starts of two windows; below ``window``, and shortened in proportion to it.
        batch_size: Windows per forward pass.
        max_tokens: Stop after this many scored tokens, in the order of the examples; default: score all.
        chat_template: Put prompts and completions into the tokenizer's chat template, as ``collect --chat-template``
            does; the end of the turn, which it adds to a completion, is scored too.
        progress: Called after every forward pass with the number of windows done and the number of all windows.

    Returns:
        The mean loss over all scored tokens, their number, and the number of their characters.

    Raises:
        LoraFactoryError: When there is nothing to score, a size is out of range, or the chat template does not fit.
    """
    if window < 2:
        raise LoraFactoryError(f"window={window}: a token is predicted from those before it; give 2 or more")
    if not 0 < stride < window:
        raise LoraFactoryError(f"stride={stride}, window={window}: stride must be at least 1 and below window")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise LoraFactoryError(f"{name}={value}: give 1 or more")
    if (limit := positions(model) or window) < window:
        window, stride = limit, max(1, stride * limit // window)
    windows: list[Window] = []
    tokens = characters = 0
    for example in examples:
        budget = None if max_tokens is None else max_tokens - tokens
        text = _encode(tokenizer, example, budget, chat_template=chat_template)
        windows.extend(_windows(text, window, stride))
        tokens += len(text.tokens) - text.first
        characters += text.characters
        if tokens == max_tokens:
            break
    if not tokens:
        raise LoraFactoryError(f"{len(examples)} examples hold no token to score; give longer texts or completions")
    windows.sort(key=lambda item: len(item.tokens), reverse=True)  # similar lengths together: little padding
    total = 0.0
    with frozen(model):
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            total += sum(negative_log_likelihoods(model, batch))
            if progress:
                progress(start + len(batch), len(windows))
    return TextScore(loss=total / tokens, tokens=tokens, characters=characters)


def score_task(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    window: int = 512,
    max_tokens: int | None = None,
    chat_template: bool = False,
) -> TextScore:
    """Score a task's test split in windows that overlap by a quarter; see `score_examples`."""
    options: Any = {"window": window, "stride": window * 3 // 4, "max_tokens": max_tokens}
    return score_examples(model, tokenizer, task.examples("test"), chat_template=chat_template, **options)


def evaluate_adapters(
    adapters: Sequence[str | Path],
    tasks: Sequence[Task],
    base_model: str | Path | None = None,
    *,
    max_tokens: int | None = None,
    max_examples: int | None = None,
    window: int = 512,
    zoo: AdapterZoo | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, TextScore]]:
    """Score a base model and adapters for it on every task's test split, by the task's metric too where it has one.

    Texts are put into the chat template if the adapters were trained in it.

    Args:
        adapters: Folders of PEFT LoRA adapters.
        tasks: Tasks with test splits.
        base_model: Hub id or folder of the base model; default: the one that the first adapter names.
        max_tokens: Score at most this many tokens per task.
        max_examples: Answer at most this many test examples of a task that has a metric; default: all.
        window: Tokens per window; windows overlap by a quarter.
        zoo: The zoo that the adapters were generated from, whose record says whether the chat template was used;
            not needed for runs of a zoo and generated adapters, which have records of their own.
        progress: Called with a description of the scoring that begins, before each model and task.

    Returns:
        Scores by model (``"base model"``, then the adapters' folders as given) and task name.

    Raises:
        LoraFactoryError: When an adapter cannot be read or does not fit the base model, the data of a task cannot be
            used (nothing is scored then), its metric does not fit its examples, or some adapters were trained in the
            chat template and others not.
    """
    if not adapters or not tasks:
        raise LoraFactoryError(f"{len(adapters)} adapters and {len(tasks)} tasks: give at least one of each")
    loaded = {str(folder): load_adapter(folder, base_model=base_model) for folder in adapters}
    how: dict[str, Any] = {"max_tokens": max_tokens, "max_examples": max_examples, "window": window}
    in_chat = _learned_in_chat(adapters, zoo)
    return _score_each([*loaded], loaded.values(), tasks, base_model, chat_template=in_chat, progress=progress, **how)


def evaluate_texts(
    generator: AdapterWriter,
    texts: Sequence[str],
    tasks: Sequence[Task],
    base_model: str | Path | None = None,
    *,
    max_tokens: int | None = None,
    max_examples: int | None = None,
    window: int = 512,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, TextScore]]:
    """Score a base model and the adapters that a generator writes for texts on every task's test split.

    No adapter is written to disk. Texts of the tasks are put into the chat template if the generator's adapters are
    used in it.

    Args:
        generator: Writes the adapters.
        texts: What each adapter is for.
        tasks: Tasks with test splits.
        base_model: Hub id or folder of the base model; default: the one that the generator names.
        max_tokens: As in `evaluate_adapters`.
        max_examples: As there.
        window: As there.
        progress: As there.

    Returns:
        Scores by model (``"base model"``, then the texts) and task name.

    Raises:
        LoraFactoryError: When a text is empty, or as `evaluate_adapters`.
    """
    texts = [*dict.fromkeys(as_texts(texts))]
    if not tasks:
        raise LoraFactoryError(f"{len(texts)} texts and no task: give at least one of each")
    made = ((generator.layout, state_dict) for state_dict in generator.generate_adapters(texts))
    in_chat = bool(generator.config.chat_template)
    how: dict[str, Any] = {"max_tokens": max_tokens, "max_examples": max_examples, "window": window}
    return _score_each(texts, made, tasks, base_model, chat_template=in_chat, progress=progress, **how)


def _score_each(
    names: Sequence[str],
    adapters: Iterable[tuple[AdapterLayout, dict[str, Tensor]]],
    tasks: Sequence[Task],
    base_model: str | Path | None,
    *,
    max_tokens: int | None,
    max_examples: int | None,
    window: int,
    chat_template: bool,
    progress: Callable[[str], None] | None,
) -> dict[str, dict[str, TextScore]]:
    """Scores of the base model and of adapters by name; see `evaluate_adapters`.

    Adapters are taken one by one, the first before the base model is loaded.
    """
    if BASE in names:
        raise LoraFactoryError(f"{BASE!r} names the row of the base model itself; name the adapter in another way")
    adapters = iter(adapters)
    first = next(adapters)
    layout = first[0]
    check_tasks(tasks, lambda task: task.examples("test"))
    name, revision = base_source(layout, base_model)
    model, tokenizer = load_base_model(name, revision=revision)
    if chat_template:
        check_tasks(tasks, lambda task: [render_chat(tokenizer, example) for example in task.examples("test")])

    def score(name: str, model: PreTrainedModel | PeftModel) -> dict[str, TextScore]:
        row = {}
        options: Any = {"window": window, "chat_template": chat_template}
        for task in tasks:
            if progress:
                progress(f"scoring {name} on {task.name}")
            text = score_task(model, tokenizer, task, max_tokens=max_tokens, **options)
            accuracy = task_accuracy(model, tokenizer, task, max_examples=max_examples, **options)
            row[task.name] = replace(text, accuracy=accuracy)
        return row

    scores = {BASE: score(BASE, model)}
    slot: AdapterSlot | None = None
    for name, (layout, state_dict) in zip(names, chain([first], adapters), strict=True):
        if slot is None or slot.layout.fingerprint() != layout.fingerprint():
            model = slot.model.unload() if slot else model
            slot = AdapterSlot(attach_adapter(model, layout, state_dict), layout)
        slot.load(state_dict)
        scores[name] = score(name, slot.model)
    return scores


@dataclass(frozen=True)
class _Text:
    """An example's token ids, the index of the first scored token, and how many characters are scored."""

    tokens: list[int]
    first: int
    characters: int


def _learned_in_chat(adapters: Sequence[str | Path], zoo: AdapterZoo | None) -> bool:
    """Read from the records of the zoo, its runs and generated adapters whether the chat template was used."""
    records = {str(zoo.folder): zoo.record(task, zoo.runs(task)[0]) for task in zoo.tasks[:1]} if zoo else {}
    given = {name: record.arguments.get("chat_template") for name, record in records.items()}
    for folder in (local_path(name).resolve() for name in adapters):
        if (folder / RECORD_FILE).is_file() and (folder.parent.parent / ZOO_FILE).is_file():
            record = AdapterZoo(folder.parent.parent).record(folder.parent.name, folder.name)
            given[str(folder)] = record.arguments.get("chat_template")
        elif (folder / GENERATION_FILE).is_file():
            given[str(folder)] = read_json_object(folder / GENERATION_FILE).get("chat_template")
    used = {name: value for name, value in given.items() if isinstance(value, bool)}
    if len(set(used.values())) > 1:
        told = ", ".join(f"{name}: {str(value).lower()}" for name, value in used.items())
        raise LoraFactoryError(f"records differ in chat_template ({told}); evaluate the two kinds one after the other")
    return any(used.values())


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example, budget: int | None, *, chat_template: bool) -> _Text:
    """Tokenise the prompt (with the special tokens that start a text) and the completion, cut to the token budget."""
    if chat_template:
        example = render_chat(tokenizer, example)
    context = text_tokens(tokenizer, example.prompt, begins=not chat_template)
    answer = example.completion
    completion = (
        following_tokens(tokenizer, answer) if example.prompt else text_tokens(tokenizer, answer, begins=False)
    )
    tokens = context + completion
    first = min(max(1, len(context)), len(tokens))
    scored = tokens[first:][:budget]
    if len(scored) == len(completion):
        return _Text(tokens, first, len(example.completion))
    return _Text(tokens[:first] + scored, first, len(tokenizer.decode(scored, clean_up_tokenization_spaces=False)))


def _windows(text: _Text, window: int, stride: int) -> Iterator[Window]:
    """Cut a text into overlapping windows; each scores the tokens that no earlier window scored."""
    first = text.first
    for start in range(0, len(text.tokens), stride):
        end = min(start + window, len(text.tokens))
        if first < end:
            yield Window(text.tokens[start:end], first - start)
            first = end
        if end == len(text.tokens):
            return
