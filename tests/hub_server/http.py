"""The HTTP side of the hub of the tests: requests and replies, the request log, programmed failures, the handler."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import parse_qs, urlsplit

from hub_server.state import HubError, User

if TYPE_CHECKING:
    from hub_server.server import HubServer

# The client takes a 401 of these paths for a missing repository, but knows them behind https only: the code tells it.
REPO_PATH = re.compile(r"/api/(models|datasets|spaces)/.+|/.+/resolve/.+")


@dataclass
class Request:
    """One line of the request log; `status` is 0 until the answer is known, and stays 0 when the server hangs up."""

    method: str
    path: str
    user: str | None
    headers: Mapping[str, str]
    status: int = 0
    received: int = 0


class RequestLog(list[Request]):
    """All requests, in the order in which they came."""

    def matching(self, pattern: str, method: str | None = None) -> list[Request]:
        """Return the requests in whose path (with query) the regular expression is found."""
        return [line for line in self if method in (None, line.method) and re.search(pattern, line.path)]


@dataclass
class Fault:
    """A failure of the next `times` matching requests (None: all of them), after the first `skip` have passed.

    `delay` (seconds) alone makes an answer slow. `status` answers with that error and carries nothing out. `drop`
    hangs up: "upload" in the middle of the request's body, before it is carried out; "download" in the middle of the
    answer's body, after it was.
    """

    pattern: str
    method: str | None = None
    times: int | None = 1
    skip: int = 0
    delay: float = 0.0
    status: int | None = None
    code: str = ""
    message: str = "Injected failure"
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: Literal["upload", "download"] | None = None

    def strikes(self, method: str, path: str) -> bool:
        if self.times == 0 or self.method not in (None, method) or not re.search(self.pattern, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times = None if self.times is None else self.times - 1
        return True


@dataclass(frozen=True)
class Call:
    """A request as the routes see it."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: User | None

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        """Read a switch of the query, which clients write as `1` or `true`."""
        return self.query.get(name, [""])[0] in ("1", "true")


@dataclass(frozen=True)
class Reply:
    """An answer: JSON, unless the content is bytes."""

    content: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content, default=str).encode()


Route = Callable[..., Reply]
Access = Literal["see", "download", "propose", "write"]
ROUTES: list[tuple[str, re.Pattern[str], Access, Route]] = []


def route(method: str, pattern: str, access: Access = "see") -> Callable[[Route], Route]:
    """Register a method of the server for a path; it is passed the path's repository and its other named groups."""

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), access, function))
        return function

    return register


def error_reply(error: HubError, path: str) -> Reply:
    """Turn an error into the response that the clients recognise."""
    code = error.code
    if error.status == 401 and REPO_PATH.fullmatch(path) and not error.message.startswith("Invalid credentials"):
        code = code or "RepoNotFound"
    headers = error.headers | {"X-Error-Message": error.message.encode("ascii", "replace").decode().replace("\n", " ")}
    return Reply({"error": error.message}, error.status, headers | ({"X-Error-Code": code} if code else {}))


def ranged(content: bytes, call: Call, headers: Mapping[str, str]) -> Reply:
    """Send a content, or the part of it that a `Range` header asks for."""
    size = len(content)
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if not match or not any(match.groups()):
        return Reply(content, 200, {**headers, "Accept-Ranges": "bytes"})
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return Reply(b"", 416, {**headers, "Content-Range": f"bytes */{size}"})
    return Reply(content[start:stop], 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


class Handler(BaseHTTPRequestHandler):
    """Reads requests, lets the programmed failures happen, sends the answers of the hub and logs them."""

    hub: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def handle(self) -> None:
        """Serve until the client leaves, in whatever way it does."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def serve(self) -> None:
        fault, line = self.hub.strike(self.command, self.path), self.record()
        if fault.drop == "upload":
            self.read_body(fraction=0.5)
            return self.hang_up()
        body = self.read_body()
        time.sleep(fault.delay)
        if fault.status:
            reply = error_reply(HubError(fault.status, fault.message, fault.code, fault.headers), self.path)
        else:
            reply = self.reply(body, line.headers)
        line.status, line.received = reply.status, len(body)
        self.send(reply, fraction=0.5 if fault.drop == "download" else 1.0)
        return self.hang_up() if fault.drop == "download" else None

    do_DELETE = do_GET = do_HEAD = do_PATCH = do_POST = do_PUT = serve

    def record(self) -> Request:
        """Add the request to the log."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        user = self.hub.users.get(headers.get("authorization", "").removeprefix("Bearer "))
        line = Request(self.command, self.path, user.name if user else None, headers)
        self.hub.log.append(line)
        return line

    def reply(self, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Ask the hub, unless the token is unknown."""
        url, token = urlsplit(self.path), headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            return error_reply(HubError(401, "Invalid credentials in Authorization header"), url.path)
        user = self.hub.users.get(token)
        return self.hub.answer(Call(self.command, url.path, parse_qs(url.query), headers, body, user))

    def read_body(self, fraction: float = 1.0) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(iter(self.read_chunk, b"")) if fraction == 1.0 else self.read_chunk()
        length = int(int(self.headers.get("Content-Length", 0)) * fraction)
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError("The client hung up in the middle of its request.")
        return body

    def read_chunk(self) -> bytes:
        chunk = self.rfile.read(int(self.rfile.readline() or b"0", 16))
        self.rfile.readline()
        return chunk

    def send(self, reply: Reply, fraction: float) -> None:
        """Send an answer, or its head and the first part of its body."""
        body = reply.body
        kind = "application/octet-stream" if isinstance(reply.content, bytes) else "application/json; charset=utf-8"
        self.send_response(reply.status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: int(len(body) * fraction)])
        self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client was first
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the standard error of the tests clean."""
