"""A server on a free loopback port, in a thread of the test."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn

from lora_factory import CVAELoRAGenerator
from lora_factory.arguments import ServeArguments
from lora_factory.serving.launch import server_config
from lora_factory.serving.server import make_app


class Running:
    """A server that answers; `stop` asks it to end, as SIGTERM does."""

    def __init__(self, generator: Path, token: str | None, options: dict[str, Any]) -> None:
        arguments = ServeArguments(**{"timeout": 60.0} | options)
        self.app = make_app(CVAELoRAGenerator.from_pretrained(generator), arguments, token)
        config = server_config(self.app, arguments)
        config.port = 0
        logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx2.Client(base_url=self.url, headers=headers, timeout=60)

    def stop(self) -> None:
        self.server.should_exit = True

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@contextmanager
def running(generator: Path, token: str | None = None, **options: Any) -> Iterator[Running]:
    """A server with a generator; `options` are those of `ServeArguments`."""
    server = Running(generator, token, options)
    try:
        yield server
    finally:
        server.client.close()
        server.stop()
        server.thread.join()
