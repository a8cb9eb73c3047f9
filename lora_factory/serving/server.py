"""The HTTP server: adapters, answers in OpenAI's form, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lora_factory.arguments import ServeArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.generator.generation import Order
from lora_factory.generator.modeling import CVAELoRAGenerator
from lora_factory.models.decoding import Answer
from lora_factory.serving.engine import Ask, Engine, Job, Make, Refused, too_late
from lora_factory.serving.forms import (
    AdapterRequest,
    ChatRequest,
    CompletionForm,
    CompletionRequest,
    PromptAndAnswer,
    error_body,
    usage_of,
)
from lora_factory.serving.gate import Gate
from lora_factory.serving.kept_adapters import KeptAdapters, WrittenAdapter, identifier_of
from lora_factory.serving.limits import MAX_TEXT, PREFIX
from lora_factory.serving.metrics import Metrics
from lora_factory.serving.trial import load_causal_model
from lora_factory.utils.safe_files import is_hub_id

_ARCHIVES = ("application/zip",)
_WEIGHTS = ("application/octet-stream", "application/vnd.safetensors")
_JSON = ("application/json", "application/*", "*/*")


def make_app(generator: CVAELoRAGenerator, arguments: ServeArguments, token: str | None = None) -> Gate:
    """The ASGI application; it loads the base model, and its engine ends with the server.

    Args:
        generator: Writes the adapters.
        arguments: Bounds.
        token: What clients must send; None: nothing.

    Raises:
        LoraFactoryError: When the base model cannot be loaded or continues no texts.
    """
    model, tokenizer = load_causal_model(generator, arguments.base_model or None)
    metrics = Metrics()
    adapters = KeptAdapters(generator, model, tokenizer, arguments.adapters, metrics)
    engine = Engine(
        adapters,
        metrics,
        batch_size=arguments.batch_size,
        queue=arguments.queue,
        max_new_tokens=arguments.max_new_tokens,
    )
    service = _Service(generator, engine, metrics, arguments.timeout)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="lora-factory", lifespan=lifespan, docs_url=None, redoc_url=None)
    routes: dict[str, tuple[Callable[..., Any], str]] = {
        "/adapters": (service.adapters, "POST"),
        "/v1/chat/completions": (service.chat, "POST"),
        "/v1/completions": (service.complete, "POST"),
        "/v1/models": (service.models, "GET"),
        "/healthz": (service.health, "GET"),
        "/metrics": (service.metrics, "GET"),
    }
    for path, (endpoint, method) in routes.items():
        app.add_api_route(path, endpoint, methods=[method], response_model=None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _failed)
    if token is None:  # a web page that calls itself by a name for this machine's address is not let in
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "::1"])
    return Gate(app, metrics, frozenset(routes), token)


class _Service:
    """The endpoints."""

    def __init__(self, generator: CVAELoRAGenerator, engine: Engine, metrics: Metrics, timeout: float) -> None:
        self._generator, self._engine, self._metrics, self._timeout = generator, engine, metrics, timeout
        name = generator.layout.base_model
        self._base = name if is_hub_id(name) else Path(name).name
        self._born = int(time.time())

    async def adapters(self, body: AdapterRequest, request: Request) -> Response:
        """Write an adapter: facts about it, its folder as a ZIP archive, or its weights, as ``Accept`` says."""
        kind = _accepted(request.headers.get("accept", "*/*"))
        examples: list[Any] | None = body.examples and [
            (one.prompt, one.completion) if isinstance(one, PromptAndAnswer) else one for one in body.examples
        ]
        order = _order(body.text, examples, seed=body.seed, temperature=body.temperature, rank=body.rank)
        identifier = identifier_of(order)
        job = self._submit(Make(identifier, order))
        written = await _event(job, request)
        assert isinstance(written, WrittenAdapter)
        headers = {"X-Adapter-Id": identifier}
        if kind in _ARCHIVES:
            headers["Content-Disposition"] = f'attachment; filename="{identifier}.zip"'
            return Response(written.archive(), media_type="application/zip", headers=headers)
        if kind in _WEIGHTS:
            return Response(written.weights, media_type=kind, headers=headers)
        made = written.generation
        nearest = [{"task": one["task"], "distance": round(1 - one["similarity"], 4)} for one in made["nearest_tasks"]]
        facts = {"id": identifier, "object": "adapter", "base_model": self._base, "nearest_tasks": nearest}
        names = (
            "text",
            "distance",
            "zoo_distance",
            "seed",
            "temperature",
            "rank",
            "rank_error",
            "refined_on",
            "sha256",
        )
        return JSONResponse(facts | {name: made[name] for name in names}, headers=headers)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        messages = [message.plain() for message in body.messages]
        return await self._completion(body, messages, CompletionForm(body.model, chat=True), request)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continue a text."""
        return await self._completion(body, body.prompt, CompletionForm(body.model, chat=False), request)

    async def models(self) -> dict[str, Any]:
        """The base model, and a name for each task that the generator knows; any other text is a model too."""
        known = [
            PREFIX + task["descriptions"][0] for task in self._generator.config.tasks or () if task["descriptions"]
        ]
        names = [self._base, *dict.fromkeys(known)]
        listed = [{"id": name, "object": "model", "created": self._born, "owned_by": "lora-factory"} for name in names]
        return {"object": "list", "data": listed}

    async def health(self) -> Response:
        """Say whether answers can be expected."""
        alive = self._engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, status_code=200 if alive else 503)

    async def metrics(self) -> Response:
        """Counts for Prometheus."""
        gauges = {"queue_length": len(self._engine), "adapters": len(self._engine.adapters)}
        return PlainTextResponse(self._metrics.text(gauges), media_type="text/plain; version=0.0.4")

    def _submit(self, work: Ask | Make, *, streams: bool = False) -> Job:
        job = Job(work, time.monotonic() + self._timeout, streams)
        self._engine.submit(job)
        return job

    async def _completion(
        self,
        body: ChatRequest | CompletionRequest,
        prompt: str | list[dict[str, str]],
        form: CompletionForm,
        request: Request,
    ) -> Response:
        if body.stream_options is not None and not body.stream:
            raise Refused("stream_options needs stream: true", 400, "invalid_request")
        adapter, order = self._model(body.model)
        job = self._submit(Ask(adapter, order, prompt, body.most, body.sampling()), streams=bool(body.stream))
        event = await _event(job, request)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(
                _chunks(job, event, form, with_usage=with_usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"},
            )
        assert isinstance(event, Answer)
        return JSONResponse(form.whole(event.text, event.finish or "stop", _usage(event)))

    def _model(self, name: str) -> tuple[str | None, Order | None]:
        """The adapter that a model's name stands for: its identifier, and what it is made of."""
        if name == self._base:
            return None, None
        if not name.startswith(PREFIX):
            return name, None  # what POST /adapters has made, if it is there
        text = name.removeprefix(PREFIX).strip()
        if len(text) > MAX_TEXT:
            raise Refused(f"the text of the model's name has more than {MAX_TEXT:,} characters", 413, "too_large")
        order = _order(text)
        return identifier_of(order), order


def _order(*words: Any, **options: Any) -> Order:  # noqa: ANN401
    """An order, or the answer that it is none."""
    try:
        order = Order(*words, **options)
        if order.text is None and order.examples is None:
            raise LoraFactoryError("nothing to make an adapter of; give text, examples or both")
        return order
    except LoraFactoryError as error:
        raise Refused(str(error), 400, "invalid_request") from error


async def _event(job: Job, request: Request) -> Any:  # noqa: ANN401
    """The next thing that happens to a job; it is no longer wanted when its client has gone."""
    event = asyncio.ensure_future(job.events.get())
    gone = asyncio.ensure_future(_gone(request))
    try:
        left = job.deadline - time.monotonic()
        await asyncio.wait({event, gone}, timeout=max(0, left), return_when=asyncio.FIRST_COMPLETED)
        if not event.done():
            raise Refused("the client has gone", 499, "cancelled") if gone.done() else too_late()
        if isinstance(result := event.result(), Exception):
            raise result
        return result
    except BaseException:
        job.wanted = False
        raise
    finally:
        event.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(job: Job, event: Any, form: CompletionForm, *, with_usage: bool) -> AsyncIterator[str]:  # noqa: ANN401
    """Server-sent events of an answer."""
    try:
        yield _sent(form.chunk("", first=True))
        while not isinstance(event, Answer):
            if isinstance(event, Refused):
                yield _sent(error_body(str(event), event.status, event.code))
                return
            yield _sent(form.chunk(event))
            event = await job.events.get()
        yield _sent(form.chunk(None, event.finish))
        if with_usage:
            yield _sent(form.last(_usage(event)))
        yield "data: [DONE]\n\n"
    finally:
        job.wanted = False


def _sent(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _usage(answer: Answer) -> dict[str, int]:
    return usage_of(len(answer.prompt.tokens), len(answer.tokens))


def _accepted(header: str) -> str:
    """The first media type of an ``Accept`` header that there is."""
    for part in header.split(","):
        kind = part.partition(";")[0].strip().lower()
        if kind in (*_ARCHIVES, *_WEIGHTS, *_JSON):
            return kind
    known = ", ".join(("application/json", *_ARCHIVES, *_WEIGHTS))
    raise Refused(f"Accept is {header[:100]!r}; choose one of {known}", 406, "not_acceptable")


async def _refused(request: Request, error: Any) -> Response:  # noqa: ANN401
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(error_body(str(error), error.status, error.code), error.status, headers)


async def _invalid(request: Request, error: Any) -> Response:  # noqa: ANN401
    first = error.errors()[0]
    where = _place(first, error.body)
    large = first["type"] in ("string_too_long", "too_long")
    said = "is not supported; leave it out" if first["type"] == "extra_forbidden" else str(first["msg"])
    if isinstance(error.body, bytes):
        said = "it was not sent as JSON; send Content-Type: application/json"
    message = f"{(where or 'the body')[:200]}: {said[:300]}"
    status = 413 if large else 400
    return JSONResponse(error_body(message, status, "too_large" if large else "invalid_request", where), status)


def _place(error: dict[str, Any], body: Any) -> str | None:  # noqa: ANN401
    """Where in a body an error is, such as ``messages.0.content``; None: it is all of the body.

    Pydantic names the types that it has tried too; these lead to nothing in the body and are left out.
    """
    kept, missing = [], error["type"] == "missing"
    for number, part in enumerate(error["loc"][1:], 2):
        inside = part in body if isinstance(body, dict) else isinstance(part, int) and isinstance(body, list)
        if inside or (missing and number == len(error["loc"])):
            kept.append(str(part))
            body = body[part] if inside else None
    return ".".join(kept) or None


async def _http_error(request: Request, error: Any) -> Response:  # noqa: ANN401
    return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body("the server failed; its log says why", 500), 500)
