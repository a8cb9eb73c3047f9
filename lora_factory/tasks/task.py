"""A task: a name, descriptions in natural language, and examples in three splits."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.given import read_example
from lora_factory.tasks.image_sources import CocoSource, ImageRows
from lora_factory.tasks.text import SPLITS, DataSource, Split, carve, with_text
from lora_factory.utils.paths import safe_name
from lora_factory.utils.printable import facts_html, facts_line

METRICS = ("exact_match", "multiple_choice")
MAX_CHOICES_FOUND = 20


@dataclass(frozen=True)
class Task:
    """One thing that an adapter learns.

    Attributes:
        name: Short name, also the name of the task's folder in a zoo.
        descriptions: What the task is, in natural language; at least one, better several paraphrases.
        data: Where the examples come from, texts or images; None when they were given to `from_examples`.
        license: Licence of the data, if known.
        metric: How an answer is judged, beside its likelihood: "exact_match", "multiple_choice" or not at all.
        choices: The answers to choose from with "multiple_choice"; default: the completions seen in training.
    """

    name: str
    descriptions: tuple[str, ...]
    data: DataSource | CocoSource | ImageRows | None
    license: str | None = None
    metric: str | None = None
    choices: tuple[str, ...] = ()
    _examples: dict[Split, list[Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check every value at birth; a single description may come as a text."""
        if not isinstance(self.name, str):
            raise LoraFactoryError(f"name={self.name!r} of a task must be a text; put it in quotes")
        safe_name(self.name)
        given = (self.descriptions,) if isinstance(self.descriptions, str) else self.descriptions
        if not given:
            raise LoraFactoryError(
                f"task {self.name!r} has no descriptions; say in a sentence or more what its text is, for example"
                " descriptions: [Continue a rhymed poem about nature.]"
            )
        if not isinstance(given, Sequence) or not all(isinstance(text, str) and text.strip() for text in given):
            raise LoraFactoryError(f"task {self.name!r}: descriptions={given!r} must be texts that are not empty")
        if not isinstance(self.license, str | None):
            raise LoraFactoryError(f"task {self.name!r}: license={self.license!r} must be a text; put it in quotes")
        object.__setattr__(self, "descriptions", tuple(text.strip() for text in given))
        if self.metric is not None and self.metric not in METRICS:
            raise LoraFactoryError(
                f"task {self.name!r}: metric={self.metric!r}: choose one of {', '.join(METRICS)}, or leave it out"
            )
        object.__setattr__(self, "choices", _checked_choices(self.choices, self.metric, self.name))

    def __repr__(self) -> str:
        """Say on one line what the task is and where its examples come from."""
        return facts_line("Task", self._facts())

    def _repr_html_(self) -> str:
        return facts_html("Task", self._facts())

    def _facts(self) -> dict[str, object]:
        more = len(self.descriptions) - 1
        given = ", ".join(f"{len(examples)} {split}" for split, examples in self._examples.items())
        facts = {
            "name": self.name,
            "description": self.descriptions[0] + (f" (and {more} more)" if more else ""),
            "data": f"{given} examples" if self.data is None else self.data.path,
            "licence": self.license,
            "metric": self.metric,
        }
        return {name: value for name, value in facts.items() if value is not None}

    @classmethod
    def from_examples(
        cls,
        name: str,
        descriptions: tuple[str, ...] | list[str],
        train: Sequence[Example | ImageExample | str],
        validation: Sequence[Example | ImageExample | str] = (),
        test: Sequence[Example | ImageExample | str] = (),
        *,
        license: str | None = None,
        metric: str | None = None,
        choices: tuple[str, ...] = (),
    ) -> Task:
        """A task whose examples are already in memory; texts become examples with an empty prompt.

        Args:
            name: Short name.
            descriptions: What the task is; at least one sentence.
            train: Examples to learn from.
            validation: Examples for choosing; carved out of `train` when empty.
            test: Examples for the final evaluation; carved out of `train` when empty.
            license: Licence of the data, if known.
            metric: "exact_match" or "multiple_choice", if answers are right or wrong.
            choices: The answers to choose from with "multiple_choice"; default: the completions seen in training.

        Raises:
            LoraFactoryError: No description, a bad name, metric or choices, or no example with text.
        """
        several = descriptions if isinstance(descriptions, str) else tuple(descriptions)
        task = cls(name, several, None, license, metric, choices)
        given = dict(zip(SPLITS, (train, validation, test), strict=True))
        found: dict[Split, list[Any]] = {}
        for split, examples in given.items():
            if isinstance(examples, str | bytes | Mapping | Example | ImageExample) or not isinstance(
                examples, Iterable
            ):
                raise LoraFactoryError(f"{split}={str(examples)[:80]!r} of task {name!r} must be a list of examples")
            nouns = (f"{split} example {number} of task {name!r}" for number in itertools.count())
            read: list[Any] = [read_example(one, noun) for one, noun in zip(examples, nouns, strict=False)]
            if read:
                found[split] = with_text(read)
        task._examples.update(carve(found, name))
        return task

    @property
    def dataset(self) -> str | None:
        """The id on the Hub of the data set that the examples come from; None for local and given ones."""
        return self.data.hub_id if self.data else None

    def examples(self, split: Split) -> list[Any]:
        """The examples of one split (`Example` or `ImageExample`), loaded on first use; none is without an answer.

        A missing validation or test split is carved out of train, a tenth of its rows each, always the same ones;
        equal rows stay on one side.

        Args:
            split: "train", "validation" or "test".

        Raises:
            LoraFactoryError: The data cannot be found or read, a column is missing, or a split has no text.
        """
        if split not in SPLITS:
            raise LoraFactoryError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
        if not self._examples:
            if self.data is None:
                raise LoraFactoryError(f"task {self.name!r} has neither data nor examples; use Task.from_examples")
            self._examples.update(carve(self.data.load(self.name), self.name))
        return self._examples[split]

    @property
    def has_images(self) -> bool:
        """Return whether the examples are images with prompt and answer."""
        if self.data is None:
            return isinstance(self.examples("train")[0], ImageExample)
        return not isinstance(self.data, DataSource)

    def answer_choices(self) -> tuple[str, ...]:
        """The answers to choose from: those given, else the different completions of the training split, sorted.

        Raises:
            LoraFactoryError: None are given, and the training split has fewer than 2 or more than 20 of them.
        """
        if self.choices:
            return self.choices
        found = sorted({example.completion.strip() for example in self.examples("train")})
        if not 2 <= len(found) <= MAX_CHOICES_FOUND:
            raise LoraFactoryError(
                f"task {self.name!r} has no choices, and its training split has {len(found)} different completions,"
                f" which are choices only when there are 2 to {MAX_CHOICES_FOUND}; list its choices, or take"
                ' metric="exact_match"'
            )
        return tuple(found)

    def fingerprint(self) -> str:
        """SHA-256 of all examples of all splits: equal exactly when the data is."""
        digest = hashlib.sha256()
        for split in SPLITS:
            facts = json.dumps([split, self.examples(split)], ensure_ascii=True, default=ImageExample.facts)
            digest.update(facts.encode())
        return digest.hexdigest()


def _checked_choices(given: object, metric: str | None, task: str) -> tuple[str, ...]:
    """The choices without the blanks around them."""
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) and text.strip() for text in given):
        raise LoraFactoryError(
            f"task {task!r}: choices={given!r} must be a list of texts that are not empty; put each in quotes, since"
            " YAML reads yes and no as true and false"
        )
    choices = tuple(text.strip() for text in given)
    if choices and metric != "multiple_choice":
        raise LoraFactoryError(f"task {task!r} has choices, but metric={metric!r}; write metric: multiple_choice")
    if len(choices) == 1 or len(set(choices)) < len(choices):
        raise LoraFactoryError(f"task {task!r}: choices={choices!r} must be two or more, all different")
    return choices
