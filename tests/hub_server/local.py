"""The fixture `hub`: a hub on loopback, and real clients of it in processes of their own."""

from __future__ import annotations

import atexit
import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hub_server.server import HubServer

# Retries of the client wait up to 23 seconds; what they do, and not how long they wait, is what tests look at.
NO_WAITING = "import time\ntime.sleep = lambda seconds: None\n"


@cache
def fork_server() -> subprocess.Popen[str]:
    """The server that makes the clients' processes; it ends with this process."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("forks.py"))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


class LocalHub(HubServer):
    """A hub with a folder for the caches of its clients.

    The clients read `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME` when they are imported, so each runs in a new process.
    """

    def __init__(self, folder: Path) -> None:
        """Make an empty hub; `folder` is where the clients' homes are made."""
        super().__init__()
        self.folder = folder

    def home(self) -> Path:
        """Make a new, empty `HF_HOME`."""
        return Path(tempfile.mkdtemp(prefix="home-", dir=self.folder))

    def environment(self, *, token: str | None = "", home: Path | None = None, **extra: str) -> dict[str, str]:
        """Return the environment of a client: `token` "" is alice's, None is anonymous; `home` is new by default."""
        ours = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(ours)}
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home or self.home()), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
        settings |= {"HF_TOKEN": token or self.token} if token is not None else {}
        temporary = self.folder / "tmp"  # failed pushes keep their folder there
        temporary.mkdir(exist_ok=True)
        settings["TMPDIR"] = str(temporary)
        return kept | settings | extra

    def run(
        self, code: str, *, check: bool = True, waits: bool = True, timeout: float = 120.0, **environment: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in a new process; see `environment` for the keywords.

        `check` fails the test with the code's standard error when it fails. `waits=False` makes `time.sleep` return at
        once, so that the client's retries take no time.
        """
        source = ("" if waits else NO_WAITING) + textwrap.dedent(code)
        streams = [Path(tempfile.mkstemp(dir=self.folder, prefix=name)[1]) for name in ("stdout-", "stderr-")]
        request = {
            "code": source,
            "environment": self.environment(**environment),
            "folder": os.getcwd(),
            "stdout": str(streams[0]),
            "stderr": str(streams[1]),
            "seconds": math.ceil(timeout),
        }
        forks = fork_server()
        assert forks.stdin and forks.stdout
        print(json.dumps(request), file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
        done = subprocess.CompletedProcess(source, status, *(path.read_text(encoding="utf-8") for path in streams))
        if check and done.returncode:
            pytest.fail(f"The client failed with {done.returncode}.\n{done.stdout}\n{done.stderr}")
        return done

    def evaluate(self, code: str, **how: Any) -> Any:
        """Run Python code as `run` does, and return what it leaves in the variable `result`, through JSON."""
        ending = "\nimport json as _json\nprint()\nprint(_json.dumps(result))"
        return json.loads(self.run(textwrap.dedent(code) + ending, **how).stdout.splitlines()[-1])


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """An empty hub on a free port, for one test; a mistake inside of it fails the test."""
    with LocalHub(tmp_path) as server:
        yield server
    assert not server.mistakes, "\n".join(server.mistakes)
