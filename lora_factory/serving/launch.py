"""Start the HTTP server: where it may listen, what it needs, and how it stops."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from pathlib import Path
from typing import Any

from lora_factory.arguments import ServeArguments
from lora_factory.errors import LoraFactoryError
from lora_factory.utils.extras import require

TOKEN_VARIABLE = "LORA_FACTORY_TOKEN"
CONNECTIONS = 512  # at most; more are answered with status 503


def serve(generator: str | Path, arguments: ServeArguments | None = None, *, revision: str | None = None) -> None:
    """Load a generator and its base model, and serve them until the process is told to stop.

    SIGINT and SIGTERM end it: no new connection is taken, and requests that were taken are answered.

    Args:
        generator: Folder or Hub id.
        arguments: Where to listen, and bounds; default: the defaults of `ServeArguments`.
        revision: Branch, tag or commit of a generator on the Hub.

    Raises:
        LoraFactoryError: When generator or base model cannot be loaded, the address is no loopback and the environment
            holds no token, or a package is missing.
    """
    arguments = arguments or ServeArguments()
    token = os.environ.get(TOKEN_VARIABLE) or None
    check_address(arguments.host, token)
    require("serve", "the server", "fastapi", "uvicorn")
    import uvicorn

    from lora_factory.generator.modeling import CVAELoRAGenerator
    from lora_factory.serving.server import make_app

    app = make_app(CVAELoRAGenerator.from_pretrained(generator, revision=revision), arguments, token)
    uvicorn.Server(server_config(app, arguments)).run()


def server_config(app: Any, arguments: ServeArguments) -> Any:  # noqa: ANN401
    """How uvicorn serves an application of `make_app`."""
    import uvicorn

    return uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        timeout_graceful_shutdown=int(arguments.timeout) + 5,
        limit_concurrency=CONNECTIONS,
        server_header=False,
        log_level="info",
    )


def check_address(host: str, token: str | None) -> None:
    """Refuse to listen to other machines without a token.

    Raises:
        LoraFactoryError: When the host is no loopback address and there is no token, or no header can hold the token.
    """
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise LoraFactoryError(f"{TOKEN_VARIABLE} must consist of printable ASCII characters without blanks")
    if not is_loopback(host) and token is None:
        raise LoraFactoryError(
            f"host={host!r} lets other machines in; set the environment variable {TOKEN_VARIABLE} to a secret that "
            "clients send as Authorization: Bearer …, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
