"""A server that makes processes of Python with PyTorch imported, which is most of what a client does to come up.

Nothing of Hugging Face is imported before a process is made: its libraries read the environment when they are.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from typing import Any

PRELOADED = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torchvision.transforms.v2",
    "scipy.stats",
    "httpx2",
    "jinja2",
    "PIL.Image",
    "safetensors.torch",
)


def serve() -> str:
    """Answer every line of the input with the exit status of a new process; in that process, return its code."""
    for line in sys.stdin:
        request = json.loads(line)
        if not (child := os.fork()):
            become(request)
            return request["code"]
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    raise SystemExit  # the tests have ended


def become(request: dict[str, Any]) -> None:
    """Be like a new process of Python: with its own environment, folder, streams and time."""
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # so that TMPDIR is looked at again
    os.chdir(request["folder"])
    sys.stdin = open(os.devnull)
    for stream, path in ((1, request["stdout"]), (2, request["stderr"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    sys.path.insert(0, "")
    sys.argv = ["-c"]
    signal.alarm(request["seconds"])  # ends the process


def run(code: str) -> int:
    """Run code as the main module; the status that its process ends with."""
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    assert "huggingface_hub" not in sys.modules
    gc.freeze()  # a collection would write into all memory that the processes share
    code = serve()
    status = run(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # taking PyTorch's modules down one by one takes longer than a client
