"""The conditions that a generator is trained on: wordings as people write them, examples, images, noise, and none."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence, Sized

import torch
from torch import Tensor

from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.hidden_states import FEATURE_EXAMPLES
from lora_factory.models.text_encoders import TextEncoder

# Noise on a task vector, as a share of the typical length of one, in every dimension; 0.025 is half a standard
# deviation of a 384-wide sentence vector. On 32 sets of benchmarks/digits.py that are kept from 192 others, 0.0125,
# 0.025 and 0.05 have an accuracy of 0.942, 0.943 and 0.946 from texts, 0.943, 0.943 and 0.940 from images.
CONDITION_NOISE = 0.025
MAX_SUPPORT = 32  # examples in the largest support set
VARIANTS = 32  # damaged wordings per task; with 8, on the same sets, 0.945 from texts and 0.841 from new words
FRAMES = ("{}", "{}, please", "I need an adapter for this: {}", "text like this: {}", "the task: {}", "adapt to {}")
UNRELATED = (
    *("My grandmother bakes apple pies on Sundays.", "The train to the coast is late.", "Buy milk, eggs and bread."),
    *("Who won the match last night?", "The cat sleeps on the warm roof.", "A recipe for lentil soup", "x"),
    *("qwrx blorp zint fuddle", "zzzz 1234 #### ??", "lorem flarn gibbet okto", "mnbvc lkjhg poiuy"),
)


def wordings(descriptions: Sequence[str], count: int, source: random.Random) -> list[str]:
    """Descriptions as people might write them: in a frame, without some words, with typos; ``count`` in all."""
    made = []
    for number in range(count):
        description = descriptions[number % len(descriptions)]
        words = source.choice(FRAMES).format(description).split()
        if len(words) > 2 and source.random() < 0.5:
            start, gone = source.randrange(len(words)), source.randrange(1, 1 + max(1, len(words) // 3))
            words[start : start + gone] = []
        if source.random() < 0.3 and len(word := words[place := source.randrange(len(words))]) > 3:
            cut = source.randrange(len(word) - 1)
            words[place] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
        made.append(" ".join(words) or description)
    return made


def text_features(encoder: TextEncoder, descriptions: Mapping[str, Sequence[str]], seed: int) -> dict[str, Tensor]:
    """Vectors of every task's descriptions, and after them of variants of these: ``(n, width)`` by the task's name."""
    source, features = random.Random(seed), {}
    for task, texts in descriptions.items():
        rows = encoder.encode([*texts, *wordings(texts, VARIANTS, source)])
        # Half of all draws are descriptions as they are: one without some of its words may say something else.
        again = rows[: len(texts)].repeat(math.ceil(VARIANTS / len(texts)), 1)
        features[task] = torch.cat([rows[: len(texts)], again[: max(0, VARIANTS - len(texts))], rows[len(texts) :]])
    return features


def draw_conditions(
    generator: CVAELoRAGenerator,
    features: Mapping[str, Mapping[str, Tensor]],
    tasks: Sequence[str],
    source: torch.Generator,
    modalities: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Draw a task vector of each of some tasks, in these modalities or in a random subset of all.

    A task vector is one of the task's wordings, the mean over a random support set of its images (Eq. 1), or what
    the hidden states of such a set say of the mean. Noise on them makes their neighbours valid conditions too.

    Returns:
        Conditions ``(tasks, width)``, on the generator's device.
    """
    conditions = {}
    for name in _random_subset(list(features), source) if modalities is None else modalities:
        support = {"text": 1, "image": FEATURE_EXAMPLES}.get(name, MAX_SUPPORT)
        sets = [_support(features[name][task], support, source) for task in tasks]
        means = torch.stack([rows.mean(0) for rows in sets])
        vectors = generator.standardiser.expected(name, means, [len(rows) for rows in sets])
        noise = CONDITION_NOISE * generator.standardiser.length(name)
        conditions[name] = (vectors + noise * torch.randn(vectors.shape, generator=source)).to(generator.device)
    return conditions


def draw_present(modalities: Sequence[str], rows: int, unheard: Tensor, source: torch.Generator) -> dict[str, Tensor]:
    """Draw which rows have which modalities: at least one each, none where ``unheard``, all bool ``(rows, 1)``."""
    subsets = torch.randint(1, 2 ** len(modalities), (rows, 1), generator=source)
    return {name: (subsets >> bit & 1).bool() & ~unheard for bit, name in enumerate(modalities)}


def unrelated_texts(descriptions: Iterable[str], seed: int) -> list[str]:
    """Texts that mean no task: sentences about other things, and descriptions with their letters in disorder."""
    source = random.Random(seed)
    return [*UNRELATED, *("".join(source.sample(text, len(text))) for text in descriptions)]


def index_of(rows: Sized, source: torch.Generator) -> int:
    """The index of one of some rows, at random."""
    return int(torch.randint(len(rows), (), generator=source))


def _random_subset(modalities: Sequence[str], source: torch.Generator) -> list[str]:
    """Some of the modalities, at least one, so that training makes every subset a valid condition."""
    drawn = int(torch.randint(1, 2 ** len(modalities), (), generator=source))
    return [name for bit, name in enumerate(modalities) if drawn >> bit & 1]


def _support(rows: Tensor, largest: int, source: torch.Generator) -> Tensor:
    """One to ``largest`` rows, drawn without replacement."""
    count = int(torch.randint(1, min(largest, len(rows)) + 1, (), generator=source))
    return rows[torch.randperm(len(rows), generator=source)[:count]]
