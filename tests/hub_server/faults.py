"""Pushes to a hub that fails at every request in every way; run by test_push_faults.py in a process of its own.

The hub runs in this process as well, so that what it holds after each push can be looked at. Prints one JSON object:
what was wrong, and how many pushes there were.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hub_server import http as hub_http
from hub_server.server import HubServer

PATIENCE = 0.25  # seconds that a client waits for an answer; what is slow here takes longer
real_sleep, hub_http.time = time.sleep, SimpleNamespace(sleep=time.sleep)
time.sleep = lambda seconds: None  # what the clients do between two requests, not how long they wait, is looked at
HUB = HubServer()
os.environ |= {"HF_ENDPOINT": HUB.endpoint, "HF_TOKEN": HUB.token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

import huggingface_hub  # noqa: E402
from huggingface_hub import constants, set_client_factory  # noqa: E402
from huggingface_hub.utils._http import default_client_factory  # noqa: E402

from lora_factory import LoraFactoryError  # noqa: E402
from lora_factory.hub import client as hub  # noqa: E402

REQUESTS = {  # of a push: method, and what the address holds
    "whoami": ("GET", "/api/whoami"),
    "create repository": ("POST", "/api/repos/create"),
    "create branch": ("POST", "/branch/"),
    "state": ("GET", "/api/models/alice/[^/]+/revision/"),
    "listing": ("GET", "/tree/"),
    "head of the card": ("HEAD", "/resolve/"),
    "card": ("GET", "/resolve/"),
    "check of the card": ("POST", "/validate-yaml"),
    "announcement": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/storage/"),
    "check of the upload": ("POST", "/objects/verify"),
    "commit": ("POST", "/commit/"),
}
FAULTS: dict[str, dict[str, Any]] = {
    **{str(status): {"status": status} for status in (401, 403, 404, 409, 412, 413, 429, 500, 503)},
    "dropped request": {"drop": "upload"},
    "dropped answer": {"drop": "download"},
    "no answer": {"delay": 1.5 * PATIENCE},
}
PASSING = ("429", "500", "503", "dropped request", "dropped answer", "no answer")
OLD = {
    "README.md": "---\nlicense: mit\n---\n# Mine\n\nWritten by hand.\n",
    "adapter_config.json": "{}",
    "generation.json": "{}",
    "condition.safetensors": "old",
    "notes.txt": "mine",
}
CARD = "---\nlicense: mit\ntags:\n- lora\n---\n\n<!-- written by lora-factory: -->\n# Card\n"


def client() -> Any:
    made = default_client_factory()
    made.timeout = PATIENCE
    return made


def one(number: int, method: str, pattern: str, times: int | None, fault: dict[str, Any]) -> str | None:
    """Push once into a repository of its own; says what is wrong afterwards."""
    name = f"case-{number}"
    repo = HUB.add_repo(f"alice/{name}", OLD)
    mine = {"README.md": CARD, "adapter_config.json": f'{{"n": {number}}}', "generation.json": f'{{"n": {number}}}'}
    mine |= {"adapter_model.safetensors": f"weights {number}"}

    def write(folder: Path, title: str) -> None:
        for path, text in mine.items():
            (folder / path).write_text(text, encoding="utf-8")

    programmed = HUB.fail(pattern, method, times=times, **fault)
    reply: object
    try:
        reply = hub.push(write, name, default_message="Push", revision="v1")
    except LoraFactoryError as error:
        reply = error
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    HUB.faults.clear()
    if programmed.times == 1:
        return "the request was not made"
    if fault.get("delay"):
        real_sleep(PATIENCE)  # what the hub still does when nobody waits for it
    history = list(repo.history("v1" if "v1" in repo.branches else "main"))
    files = {path: blob.content.decode() for path, blob in history[0].tree.items() if path != ".gitattributes"}
    new = {path for path in {**OLD, **mine} if path != "condition.safetensors"}
    arrived = set(files) == new and all(files[path] == text for path, text in mine.items() if path != "README.md")
    card = files["README.md"]
    arrived = arrived and card.endswith("# Mine\n\nWritten by hand.\n") and "# Card" in card
    if not (files == OLD or arrived) or files["notes.txt"] != "mine":
        return f"it is neither the old nor the new: {files}"
    if len(history) - len(list(repo.history("main"))) != arrived:
        return f"{len(history)} commits"
    if isinstance(reply, LoraFactoryError):
        if times == 1 and fault_name(fault) in PASSING:
            return f"it was given up: {reply}"
        if arrived and "whether the commit has arrived is not known" not in str(reply):
            return f"it arrived, and was said to fail: {reply}"
        return None if re.match(r"cannot push to (alice/)?case-\d+: \S", str(reply)) else f"unclear: {reply}"
    return None if arrived else "it was said to have arrived"


def fault_name(fault: dict[str, Any]) -> str:
    return next(name for name, value in FAULTS.items() if value is fault)


def both_at_once() -> list[str]:
    """Two first pushes into one new repository, the second within the first: the one that is later is refused."""

    def writer(name: str, inside: Callable[[], object] = lambda: None) -> hub.Writer:
        def write(folder: Path, title: str) -> None:
            for path in ("config.json", "model.safetensors", *(["comparison.json"] if name == "first" else [])):
                (folder / path).write_text(name)
            (folder / "README.md").write_text(CARD + name)

        return write

    upload, wrong = hub._upload, []

    def slow_upload(*arguments: Any) -> Any:
        preupload = huggingface_hub.HfApi.preupload_lfs_files
        hub._upload = upload

        def other_first(*given: Any, **options: Any) -> None:
            huggingface_hub.HfApi.preupload_lfs_files = preupload
            hub.push(writer("first"), "alice/both", default_message="First")
            preupload(*given, **options)

        huggingface_hub.HfApi.preupload_lfs_files = other_first
        return upload(*arguments)

    hub._upload = slow_upload
    try:
        hub.push(writer("second"), "alice/both", default_message="Second")
        wrong.append("the second push was not refused")
    except LoraFactoryError as error:
        if "somebody has committed since; try again" not in str(error):
            wrong.append(str(error))
    if {blob.decode()[-5:] for blob in HUB.files("alice/both").values()} != {"first"}:
        wrong.append("the two are mixed")
    return wrong


def main() -> None:
    set_client_factory(client)
    constants.HF_HUB_ETAG_TIMEOUT = constants.HF_HUB_DOWNLOAD_TIMEOUT = PATIENCE
    hub._REQUEST_SECONDS = PATIENCE
    wrong, number = {}, 0
    with HUB:
        for request, (method, pattern) in REQUESTS.items():
            for fault, how in FAULTS.items():
                for times in (1, None):
                    number += 1
                    began = time.perf_counter()
                    if trouble := one(number, method, pattern, times, how):
                        wrong[f"{request}, {fault}, {'once' if times else 'lasting'}"] = trouble
                    if len(sys.argv) > 1:
                        print(f"{time.perf_counter() - began:.2f} {request}, {fault}, {times}", file=sys.stderr)
        wrong |= {f"both at once {place}": text for place, text in enumerate(both_at_once())}
    wrong |= {f"hub {place}": text for place, text in enumerate(HUB.mistakes)}
    print(json.dumps({"wrong": wrong, "pushes": number}))


if __name__ == "__main__":
    main()
