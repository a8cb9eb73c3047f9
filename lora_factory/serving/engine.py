"""Answer requests with one model in one thread: what waits is answered together, each with its own adapter."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

from lora_factory.errors import LoraFactoryError
from lora_factory.generator.generation import Order
from lora_factory.models.decoding import BASE, Answer, Prompt, chat_tokens, check_prompt, decode
from lora_factory.models.inputs import positions, text_tokens
from lora_factory.serving.kept_adapters import KeptAdapters
from lora_factory.serving.metrics import Metrics

_LOGGER = logging.getLogger(__name__)


class Refused(LoraFactoryError):
    """A request that is not answered.

    Attributes:
        status: HTTP status.
        code: A word for programs.
    """

    def __init__(self, message: str, status: int, code: str) -> None:
        """Say why, and with which status."""
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Ask:
    """What a model is asked.

    Attributes:
        adapter: Identifier of the adapter; None: the base model alone.
        order: What the adapter is made of, if it is not there; None: it must be there.
        prompt: A text to continue, or the messages of a conversation.
        max_new_tokens: Tokens of the answer at most; None: as many as the limit and the model allow.
        sampling: ``temperature``, ``top_p``, ``seed`` and ``stop`` of `Prompt`.
    """

    adapter: str | None
    order: Order | None
    prompt: str | Sequence[Mapping[str, str]]
    max_new_tokens: int | None
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class Make:
    """An adapter that is wanted as a folder."""

    adapter: str
    order: Order


@dataclass(eq=False)
class Job:
    """A request on its way through the engine; made in the event loop that waits for it.

    Attributes:
        work: What is wanted.
        deadline: When it is given up, by ``time.monotonic``.
        events: What happens, for the event loop: texts as they come, and at the end an `Answer`, a
            ``WrittenAdapter`` or an exception.
        wanted: Set to False by whoever no longer waits.
    """

    work: Ask | Make
    deadline: float
    streams: bool = False
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    wanted: bool = True
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def tell(self, event: object) -> None:
        """Hand something to the event loop; called in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.deadline


class Engine:
    """A thread that owns the model: it alone generates adapters, puts them into the model and decodes.

    Args:
        adapters: The model with its adapters.
        metrics: Where work is counted.
        batch_size: Requests answered together at most.
        queue: Requests that may wait.
        max_new_tokens: Tokens of an answer at most.
    """

    def __init__(
        self, adapters: KeptAdapters, metrics: Metrics, *, batch_size: int, queue: int, max_new_tokens: int
    ) -> None:
        """Start the thread."""
        self.adapters, self._metrics = adapters, metrics
        self._batch_size, self._room, self._most = batch_size, queue, max_new_tokens
        self._positions = positions(adapters.model)
        self._waiting: deque[Job] = deque()
        self._changed, self._closing = Condition(), False
        self._thread = Thread(target=self._run, name="lora-factory-engine", daemon=True)
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Let jobs wait for their turn; those given together are answered together where that is possible.

        Raises:
            Refused: When as many wait as may, or the engine is closing.
        """
        with self._changed:
            if self._closing:
                raise Refused("the server is stopping; try again later", 503, "stopping")
            if len(self._waiting) + len(jobs) > self._room:
                raise Refused(f"{len(self._waiting)} requests wait already; try again later", 429, "queue_full")
            self._waiting.extend(jobs)
            self._changed.notify()

    def __len__(self) -> int:
        """The number of jobs that wait."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Answer what waits and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next():
            try:
                if isinstance(jobs[0].work, Make):
                    self._make(jobs[0], jobs[0].work)
                else:
                    self._answer(jobs)
            except Exception as error:  # such as no memory; the next requests are to be answered all the same
                _LOGGER.exception("a batch of %d requests failed", len(jobs))
                for job in jobs:
                    job.tell(Refused(f"the model failed: {type(error).__name__}", 500, "model_failed"))

    def _next(self) -> list[Job]:
        """Wait for jobs and take those that are done together; none when the engine is closed and nothing waits."""
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            return self._taken()

    def _taken(self) -> list[Job]:
        """The job that waits longest, and those that can be answered with it; the others keep their places."""
        jobs: list[Job] = []
        left: deque[Job] = deque()
        adapters: set[str | None] = {None}
        while self._waiting and len(jobs) < self._batch_size:
            job = self._waiting.popleft()
            work = job.work
            if isinstance(work, Make):
                if not jobs:
                    return [job]
                left.append(job)
            elif len(adapters | {work.adapter}) - 1 > self.adapters.capacity:
                left.append(job)  # one adapter of the batch would take another's place
            else:
                adapters.add(work.adapter)
                jobs.append(job)
        self._waiting.extendleft(reversed(left))
        return jobs

    def _make(self, job: Job, work: Make) -> None:
        with _told(job):
            _check(job)
            job.tell(self.adapters.write(work.adapter, work.order))

    def _answer(self, jobs: list[Job]) -> None:
        """Answer jobs in one batch; what cannot be answered is told so and left out."""
        ready: list[tuple[Job, Prompt, str]] = []
        for job in jobs:
            with _told(job):
                _check(job)
                assert isinstance(job.work, Ask)
                prompt = self._prompt(job.work)
                ready.append((job, prompt, self._slot(job.work)))
        if not ready:
            return
        self._metrics.count("batches_total")
        self._metrics.count("batched_requests_total", len(ready))
        self._metrics.count("prompt_tokens_total", sum(len(prompt.tokens) for _, prompt, _ in ready))
        told = [""] * len(ready)

        def watch(row: int, answer: Answer) -> bool:
            job = ready[row][0]
            if job.streams and (new := answer.settled[len(told[row]) :]):
                told[row] += new
                job.tell(new)
            if answer.finish is not None:
                job.tell(answer)
            elif job.late:
                job.tell(too_late())
                return False
            return job.wanted

        slots = [slot for *_, slot in ready]
        adapters = self.adapters
        plain = all(slot == BASE for slot in slots) and not len(adapters)
        answers = decode(
            adapters.model,
            adapters.tokenizer,
            [prompt for _, prompt, _ in ready],
            adapters=None if plain else slots,
            watch=watch,
        )
        self._metrics.count("generated_tokens_total", sum(len(answer.tokens) for answer in answers))

    def _prompt(self, work: Ask) -> Prompt:
        tokenizer = self.adapters.tokenizer
        if (work.max_new_tokens or 0) > self._most:
            raise LoraFactoryError(f"{work.max_new_tokens} tokens are too many; ask for {self._most} or less")
        self._check_length(work.prompt)
        if isinstance(work.prompt, str):
            tokens = text_tokens(tokenizer, work.prompt, begins=True)
        else:
            tokens = chat_tokens(tokenizer, work.prompt)
        room = max(1, self._positions - len(tokens)) if self._positions else self._most
        prompt = Prompt(tokens, work.max_new_tokens or min(self._most, room), **work.sampling)
        check_prompt(prompt, self._positions)
        return prompt

    def _check_length(self, prompt: str | Sequence[Mapping[str, str]]) -> None:
        """Refuse a prompt that is far too long by the tokens of its beginning, since others wait for all its tokens.

        Raises:
            LoraFactoryError: When its beginning has more than twice as many tokens as the model reads.
        """
        text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        size = 16 * (self._positions or len(text))
        while size < len(text):
            if len(text_tokens(self.adapters.tokenizer, text[:size], begins=False)) > 2 * (self._positions or 0):
                raise LoraFactoryError(
                    f"the prompt has {len(text):,} characters, and its first {size:,} are already more than twice the "
                    f"{self._positions} tokens that the model reads; give a shorter prompt"
                )
            size *= 2

    def _slot(self, work: Ask) -> str:
        if work.adapter is None:
            return BASE
        slot = self.adapters.slot(work.adapter, work.order)
        if slot is None:
            raise Refused(
                f"the model {work.adapter!r} is not here, or no longer; make it anew with POST /adapters",
                404,
                "model_not_found",
            )
        return slot


@contextlib.contextmanager
def _told(job: Job) -> Iterator[None]:
    """Tell a job the error that it meets; others go on."""
    try:
        yield
    except Refused as error:
        job.tell(error)
    except LoraFactoryError as error:
        job.tell(Refused(str(error), 400, "invalid_request"))


def _check(job: Job) -> None:
    if job.late:
        raise too_late()
    if not job.wanted:
        raise Refused("nobody waits for the answer", 499, "cancelled")


def too_late() -> Refused:
    """What a job is told whose time is over."""
    return Refused("the request took too long; try again later, or ask for fewer tokens", 504, "timeout")
