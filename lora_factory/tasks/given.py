"""What a user hands in to generate an adapter, checked and brought into one form: texts, examples, images, numbers."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_factory.errors import LoraFactoryError
from lora_factory.tasks.examples import Example, ImageExample
from lora_factory.tasks.image_files import ImageLike
from lora_factory.utils.paths import local_path, task_names
from lora_factory.utils.precision import own_precision
from lora_factory.utils.safe_files import read_text
from lora_factory.utils.yaml_files import read_values

_EXAMPLES = 'a text, a pair (prompt, completion), {"prompt": ..., "completion": ...} or {"text": ...}'


def as_examples(examples: Any) -> list[Example | ImageExample]:  # noqa: ANN401
    """A user's examples, whatever they come in; see `read_example`.

    Raises:
        LoraFactoryError: When there is none, one is of another kind, or a single one stands for a list of them.
    """
    values = _listed(examples, "examples", _EXAMPLES)
    if isinstance(examples, Example):
        raise LoraFactoryError("examples is a single example; give a list of them")
    read = []
    for number, value in enumerate(values):
        noun = f"example {number} of {len(values)}"
        one = read_example(value, noun)
        if not isinstance(one, ImageExample) and not "".join(one).strip():
            raise LoraFactoryError(f"{noun} is empty; give {_EXAMPLES}")
        read.append(one)
    return read


def read_example(value: Any, noun: str) -> Example | ImageExample:  # noqa: ANN401
    """One of a user's examples: a pair, a dictionary or a text, which has an empty prompt; it may be blank.

    Args:
        value: What the user gives.
        noun: Names it in errors.

    Raises:
        LoraFactoryError: When it is of another kind, or no text that can be written to a file.
    """
    if isinstance(value, ImageExample):
        return value
    parts: Any = value
    if isinstance(value, Mapping):
        names = ("text",) if "text" in value and "completion" not in value else ("prompt", "completion")
        parts = [value.get(name) for name in names]
    elif isinstance(value, str):
        parts = [value]
    if not (isinstance(parts, list | tuple) and len(parts) in (1, 2) and all(isinstance(part, str) for part in parts)):
        raise LoraFactoryError(f"{noun} is {str(value)[:80]!r}; give {_EXAMPLES}")
    _check_text("".join(parts), noun)
    return Example("", *parts) if len(parts) == 1 else Example(*parts)


def as_images(images: Any, name: str = "images") -> list[ImageLike]:  # noqa: ANN401
    """A user's images as a list; ``name`` names them in errors.

    Raises:
        LoraFactoryError: When there is none, or a single one stands for a list of them.
    """
    return _listed(images, name, "a file or an image")


def as_text(text: object) -> str | None:
    """A user's description, checked.

    Raises:
        LoraFactoryError: When it is blank, no string, or no text that can be written to a file.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        raise LoraFactoryError(
            f"text is a {type(text).__name__}; one text makes one adapter: give a string, and call once for each text "
            "(generate_adapters, save_adapters and push_adapters take several)"
        )
    if not text.strip():
        raise LoraFactoryError("text is empty; give a sentence that says what the adapter is for")
    return _check_text(text, "text")


def as_texts(texts: Any) -> list[str]:  # noqa: ANN401
    """A user's descriptions, one for each adapter.

    Raises:
        LoraFactoryError: When there is none, one is blank, or a single one stands for a list of them.
    """
    return [as_text(text) or "" for text in _listed(texts, "texts", "a description")]


def as_named_texts(texts: object) -> dict[str, str]:
    """A user's descriptions by the names of their adapters.

    Raises:
        LoraFactoryError: When there is none, one is blank, or they have no names.
    """
    if not isinstance(texts, Mapping) or not texts:
        raise LoraFactoryError(
            f'texts is {str(texts)[:80]!r}; give at least one description by its name: {{"legal": "Legal notices"}}'
        )
    if blank := [name for name, text in texts.items() if text is None or (isinstance(text, str) and not text.strip())]:
        raise LoraFactoryError(f"the text of {blank[0]!r} is empty; describe what that adapter is for")
    return {name: as_text(text) or "" for name, text in texts.items()}


def read_named_texts(file: str | Path) -> dict[str, str]:
    """A user's file of descriptions: one a line, each named after itself, or a YAML or JSON mapping of names to them.

    Raises:
        LoraFactoryError: When it cannot be read, holds no description, or one twice.
    """
    path = local_path(file)
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        return as_named_texts(read_values(path, "file of descriptions"))
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if doubled := [line for line, count in Counter(lines).items() if count > 1]:
        raise LoraFactoryError(f"{path} has the line {doubled[0][:80]!r} twice; give each description once")
    if not lines:
        raise LoraFactoryError(f"{path} holds no description; write one a line")
    return as_named_texts({name: text for text, name in task_names(lines).items()})


def as_mixture(text: object) -> str | dict[str, float] | None:
    """A user's description, or several with a weight each.

    Raises:
        LoraFactoryError: As `as_text`, and when there is no text or a weight is no finite number.
    """
    if not isinstance(text, Mapping):
        return as_text(text)
    if not text:
        raise LoraFactoryError('text is empty; give texts with their weights: {"legal notices": 0.7, "poems": 0.3}')
    mixture = {}
    for one, weight in text.items():
        number = _number(weight)
        if not math.isfinite(number):
            raise LoraFactoryError(f"the weight of {str(one)[:80]!r} is {_shown(weight)}; give a finite number")
        mixture[as_text(one) or ""] = number
    return mixture


@own_precision()
def as_vectors(conditions: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """A user's task vectors by modality, as tensors.

    Raises:
        LoraFactoryError: When they are no mapping from names to numbers.
    """
    if conditions is None:
        return {}
    if not isinstance(conditions, Mapping):
        raise LoraFactoryError(
            f"conditions is a {type(conditions).__name__}; give task vectors by modality, as encode_examples returns "
            "them: {'hidden': vector}"
        )
    try:
        return {str(name): torch.as_tensor(vector) for name, vector in conditions.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise LoraFactoryError(
            f"conditions hold no task vectors ({error}); give a tensor for each modality"
        ) from error


def as_whole_number(value: object, name: str, most: int | None = None, *, least: int = 0) -> int:
    """An integer of any library, from ``least`` on.

    Raises:
        LoraFactoryError: When it is none, or out of range.
    """
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < least or (most is not None and number > most):
        wanted = f"an integer from {least} {'on' if most is None else f'to {most}'}"
        raise LoraFactoryError(f"{name}={_shown(value)}; give {wanted}")
    return number


def as_temperature(value: object) -> float:
    """A temperature as a float.

    Raises:
        LoraFactoryError: When it is no number, not finite or below 0.
    """
    number = _number(value)
    if not (math.isfinite(number) and number >= 0):
        raise LoraFactoryError(
            f"temperature={_shown(value)}; give a number from 0 (the most likely adapter) on, such as 1.0"
        )
    return number


def _number(value: object) -> float:
    """A number of any library as a float: NaN when it is none, infinity when it is larger than any float."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def _shown(value: object) -> str:
    """The beginning of a value for a message; Python prints no integer of more than 4,300 digits."""
    try:
        return repr(value[:50]) if isinstance(value, str) else str(value)[:50]
    except ValueError:
        return "(thousands of digits)"


def _listed(values: Any, name: str, kinds: str) -> list[Any]:  # noqa: ANN401
    """Any iterable but a single value as a list that is not empty."""
    single = isinstance(values, str | bytes | Path | Mapping | ImageExample) or not hasattr(values, "__iter__")
    if single:
        raise LoraFactoryError(f"{name} is {str(values)[:80]!r}; give a list, each of it {kinds}")
    if not (listed := list(values)):
        raise LoraFactoryError(f"{name}=[] is empty; give one or more, each {kinds}")
    return listed


def _check_text(text: str, noun: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LoraFactoryError(
            f"{noun} holds half of a surrogate pair (character {error.start}), which is no text; remove it"
        ) from error
    return text
