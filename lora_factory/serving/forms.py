"""Bodies of requests and answers: OpenAI's form, and that of ``POST /adapters``."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from lora_factory.serving.limits import MAX_EXAMPLE, MAX_EXAMPLES, MAX_TEXT

MAX_MESSAGES, MAX_STOPS, MAX_STOP = 256, 8, 200


def _whole(text: str) -> str:
    """A text that can be written to a file.

    Raises:
        ValueError: When it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Zero = Annotated[float, Field(ge=0, le=0)]  # settings that are taken as long as they change nothing
One = Annotated[int, Field(ge=1, le=1)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP)]
Tokens = Annotated[int, Field(ge=1)]


class Body(BaseModel):
    """A body of JSON: no field is guessed, converted or left unread."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream holds besides the answer."""

    include_usage: bool = False


class _Sampling(Body):
    """What both kinds of completions share; fields that only have one value are those that change nothing."""

    model: Annotated[Text, Field(min_length=1)]
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None
    n: One | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None

    def sampling(self) -> dict[str, Any]:
        """The settings of a `Prompt`; OpenAI's default temperature is 1."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": secrets.randbits(63) if self.seed is None else self.seed,
            "stop": tuple(stops),
        }


class TextPart(Body):
    """A part of a message; only texts are read."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)]

    def plain(self) -> dict[str, str]:
        """The turn as chat templates read it."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "".join(parts)}


class ChatRequest(_Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Tokens | None = None
    logprobs: Literal[False] | None = None

    @property
    def most(self) -> int | None:
        """Tokens of the answer at most, by either name of the field."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Sampling):
    """``POST /v1/completions``; 16 tokens are OpenAI's default."""

    prompt: Text
    best_of: One | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def most(self) -> int:
        """Tokens of the answer at most."""
        return self.max_tokens or 16


class PromptAndAnswer(Body):
    """An example of a task."""

    prompt: Annotated[Text, Field(max_length=MAX_EXAMPLE)]
    completion: Annotated[Text, Field(max_length=MAX_EXAMPLE)]


class AdapterRequest(Body):
    """``POST /adapters``."""

    text: Annotated[Text, Field(max_length=MAX_TEXT)] | None = None
    examples: (
        Annotated[
            list[Annotated[Text, Field(max_length=MAX_EXAMPLE)] | PromptAndAnswer],
            Field(min_length=1, max_length=MAX_EXAMPLES),
        ]
        | None
    ) = None
    rank: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    temperature: Annotated[float, Field(ge=0)] = 0.0


class CompletionForm:
    """Writes one answer in OpenAI's form, whole or in chunks.

    Args:
        model: The model's name in the request.
        chat: Whether it is the answer of a conversation.
    """

    def __init__(self, model: str, *, chat: bool) -> None:
        """Give the answer a name and a time."""
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer as one body."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self._head, "choices": [choice], "usage": usage}

    def chunk(self, text: str | None, finish: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """A part of the answer."""
        if self._chat:
            role = {"role": "assistant"} if first else {}
            said: dict[str, Any] = {"delta": role if text is None else {**role, "content": text}}
        else:
            said = {"text": text or ""}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self._chunk_head, "choices": [choice]}

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The part that says how many tokens there were."""
        return {**self._chunk_head, "choices": [], "usage": usage}

    @property
    def _chunk_head(self) -> dict[str, Any]:
        return self._head | ({"object": "chat.completion.chunk"} if self._chat else {})


def usage_of(prompt: int, answer: int) -> dict[str, int]:
    """Numbers of tokens in OpenAI's form."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def error_body(message: str, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
