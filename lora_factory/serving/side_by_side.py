"""Compare a base model with and without a generated adapter, for the app: one model, both answers as they grow."""

from __future__ import annotations

import asyncio
import contextlib
import time
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load

from lora_factory.adapters.folder import CONDITION_FILE, Generation
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.generation import Order
from lora_factory.generator.hub import origins_of
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.hub.cards import CARD_FILE, AdapterCard
from lora_factory.hub.client import about_model, check_base_model, push
from lora_factory.models.decoding import Answer
from lora_factory.models.inputs import positions
from lora_factory.serving.engine import Ask, Engine, Job, Make
from lora_factory.serving.kept_adapters import KeptAdapters, WrittenAdapter, identifier_of
from lora_factory.serving.limits import MAX_EXAMPLE, MAX_EXAMPLES, MAX_TEXT
from lora_factory.serving.metrics import Metrics
from lora_factory.serving.trial import load_causal_model
from lora_factory.tasks.given import as_text
from lora_factory.utils.files import write_text
from lora_factory.utils.safe_files import read_bytes

MAX_PROMPT = 8_000  # characters
MAX_IMAGES, MAX_IMAGE_BYTES = 16, 10 << 20
MAX_NEW_TOKENS = 512
_KEPT, _QUEUE, _SECONDS = 8, 32, 600.0  # adapters in the model; jobs that wait; seconds of a job


@dataclass(frozen=True)
class Wish:
    """What a user fills in to get an adapter.

    Attributes:
        text: What it is for.
        second: A second text that is mixed in.
        share: The second text's weight, from 0 to 1; the first has the rest.
        examples: Examples of the task, separated by blank lines, or one a line where there is no blank line.
        images: Image files, as the app has stored them.
        rank: Rank; None: the generator's.
        temperature: Scale of the latent noise.
        seed: Of the noise.
    """

    text: str = ""
    second: str = ""
    share: float = 0.5
    examples: str = ""
    images: Sequence[Path] = ()
    rank: int | None = None
    temperature: float = 0.0
    seed: int = 0

    def order(self) -> Order:
        """What is asked of the generator.

        Raises:
            LoraFactoryError: When there is nothing to go by, or something is too large.
        """
        if len(self.images) > MAX_IMAGES:
            raise LoraFactoryError(f"{len(self.images)} images are too many; give {MAX_IMAGES} or fewer")
        order = Order(
            self.mixture(),
            split_examples(self.examples) or None,
            [read_bytes(path, MAX_IMAGE_BYTES) for path in self.images] or None,
            seed=self.seed,
            temperature=self.temperature,
            rank=self.rank,
        )
        if order.text is None and order.examples is None and order.images is None:
            raise LoraFactoryError("nothing to go by yet; describe the task in a sentence, or give examples of it")
        return order

    def mixture(self) -> str | dict[str, float] | None:
        """The text, or both with their weights; None where there is none.

        Raises:
            LoraFactoryError: When a text is too long, or the share is not between 0 and 1.
        """
        texts = [one.strip() for one in (self.text, self.second)]
        for text in texts:
            if len(text) > MAX_TEXT:
                raise LoraFactoryError(f"the text has {len(text):,} characters; give {MAX_TEXT:,} or fewer")
        first, second = (as_text(text or None) for text in texts)
        if first is None or second is None or first == second:
            return first or second
        if not 0 <= self.share <= 1:
            raise LoraFactoryError(f"share={self.share} is the second text's weight; give a number from 0 to 1")
        return {first: round(1 - self.share, 4), second: round(self.share, 4)}


@dataclass(frozen=True)
class Closeness:
    """How far a condition is from the tasks that a generator knows.

    Attributes:
        verdict: "near", "between" or "far".
        sentence: The verdict in words.
        nearest: The nearest tasks with their cosine distances, nearest first.
        use: Size of what the condition changes, in units of its median over the known tasks.
    """

    verdict: str
    sentence: str
    nearest: tuple[tuple[str, float], ...]
    use: float


class SideBySide:
    """A generator, its base model, and the thread that works with both.

    Args:
        generator: Writes the adapters.
        base_model: Folder or Hub id of the base model; default: the one that the generator names.

    Raises:
        LoraFactoryError: When the base model cannot be loaded or continues no texts.
    """

    def __init__(self, generator: CVAELoRAGenerator, base_model: str | Path | None = None) -> None:
        """Load the base model and the text encoder, and start the thread."""
        model, self.tokenizer = load_causal_model(generator, base_model)
        self.generator = generator
        self.hears = frozenset(generator.config.modalities or ())
        if "text" in self.hears:
            _ = generator.text_encoder  # loaded here, not in the first request
        self.rank = generator.layout.rank
        self.longest = min(MAX_NEW_TOKENS, (positions(model) or MAX_NEW_TOKENS) // 2)
        metrics = Metrics()
        kept = KeptAdapters(generator, model, self.tokenizer, _KEPT, metrics)
        self._engine = Engine(kept, metrics, batch_size=_KEPT, queue=_QUEUE, max_new_tokens=self.longest)

    def close(self) -> None:
        """Answer what waits and end the thread."""
        self._engine.close()

    def closeness(self, text: Any, made: WrittenAdapter | None = None) -> Closeness:  # noqa: ANN401
        """How far a text, or what an adapter was made of, is from the known tasks.

        Args:
            text: A text, or several with their weights.
            made: An adapter that was made of the text and of examples or images.

        Raises:
            LoraFactoryError: When the text is empty and no examples or images were used.
        """
        vectors = load(made.files[CONDITION_FILE]) if made and CONDITION_FILE in made.files else None
        found = self.generator.explain(text, conditions=vectors)
        nearest = tuple((one["task"], max(0.0, round(1 - one["similarity"], 4))) for one in found["nearest"])
        return Closeness(found["verdict"], found["sentence"], nearest, found["use"])

    async def make(self, order: Order) -> WrittenAdapter:
        """Generate an adapter as a PEFT folder and put it into the model.

        Raises:
            LoraFactoryError: When the generator refuses the order, or too many wait.
        """
        job = Job(Make(identifier_of(order), order), time.monotonic() + _SECONDS)
        with _awaited(job):
            self._engine.submit(job)
            event = await job.events.get()
            if isinstance(event, Exception):
                raise event
            assert isinstance(event, WrittenAdapter)
            return event

    async def answers(
        self, order: Order, prompt: str, max_new_tokens: int, *, chat: bool
    ) -> AsyncIterator[tuple[str, str]]:
        """Answer a prompt with the base model and with an adapter that was made; both take the most likely tokens.

        Args:
            order: What the adapter was made of.
            prompt: A question, or the beginning of a text.
            max_new_tokens: Tokens of an answer at most.
            chat: Whether the prompt is put into the tokenizer's chat template.

        Yields:
            Both answers, as far as they are there.

        Raises:
            LoraFactoryError: When the prompt is empty or too long, or too many wait.
        """
        if not prompt.strip():
            raise LoraFactoryError("the prompt is empty; ask a question, or begin a text")
        if len(prompt) > MAX_PROMPT:
            raise LoraFactoryError(f"the prompt has {len(prompt):,} characters; give {MAX_PROMPT:,} or fewer")
        if not 1 <= max_new_tokens <= self.longest:
            raise LoraFactoryError(f"max_new_tokens={max_new_tokens} must be from 1 to {self.longest}")
        asked = [{"role": "user", "content": prompt}] if chat else prompt
        jobs = [
            Job(Ask(name, it, asked, max_new_tokens, {}), time.monotonic() + _SECONDS, streams=True)
            for name, it in ((None, None), (identifier_of(order), order if order.examples is None else None))
        ]
        told = ["", ""]
        with _awaited(*jobs):
            self._engine.submit(*jobs)
            waiting = {asyncio.ensure_future(job.events.get()): row for row, job in enumerate(jobs)}
            try:
                while waiting:
                    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    for ready in done:
                        row, event = waiting.pop(ready), ready.result()
                        if isinstance(event, Exception):
                            raise event
                        if isinstance(event, Answer):
                            told[row] = event.text
                        else:
                            told[row] += event
                            waiting[asyncio.ensure_future(jobs[row].events.get())] = row
                    yield told[0], told[1]
            finally:
                for one in waiting:
                    one.cancel()

    def push(self, made: WrittenAdapter, repo_id: str, *, private: bool) -> str:
        """Push an adapter that was made, as it is, with the stored access token.

        Args:
            made: The adapter.
            repo_id: Hub id, ``user/name``.
            private: Whether a new repository is private.

        Returns:
            Address of the commit.

        Raises:
            LoraFactoryError: When the adapter's base model is none that others can load, or the Hub refuses.
        """
        repo_id = repo_id.strip()
        if not repo_id:
            raise LoraFactoryError("the repository is not named; give user/name, which is made if it is not there")
        check_base_model(self.generator.layout)
        origins = origins_of(self.generator, *about_model(self.generator.layout.base_model, None))

        def write(folder: Path, title: str) -> None:
            for name, content in made.files.items():
                (folder / name).write_bytes(content)
            card = AdapterCard(title=title, origins=origins, generations={"": Generation(**made.generation)})
            write_text(folder / CARD_FILE, card.text)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a repository that is public already stays so; its page says it
            commit = push(write, repo_id, default_message="Push generated adapter", private=private or None)
        return str(commit.commit_url)


@contextlib.contextmanager
def _awaited(*jobs: Job) -> Iterator[None]:
    """Mark jobs as no longer wanted when the block ends, however it ends."""
    try:
        yield
    finally:
        for job in jobs:
            job.wanted = False


def split_examples(text: str) -> list[str]:
    """Examples of a text: its paragraphs, or its lines where it has no blank line.

    Raises:
        LoraFactoryError: When there are too many, or one is too long.
    """
    lines = [line.rstrip() for line in text.strip().splitlines()]
    parts = "\n".join(lines).split("\n\n") if "" in lines else lines
    examples = [part.strip("\n") for part in parts if part.strip()]
    if len(examples) > MAX_EXAMPLES:
        raise LoraFactoryError(f"{len(examples)} examples are too many; give {MAX_EXAMPLES} or fewer")
    if longest := max((len(example) for example in examples if len(example) > MAX_EXAMPLE), default=0):
        raise LoraFactoryError(f"an example has {longest:,} characters; give {MAX_EXAMPLE:,} or fewer")
    return examples
