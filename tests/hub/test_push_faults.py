"""Every request of a push fails in every way: no hand-written word is lost, no half commit, one error."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from helpers.hub import ask, make_zoo, publish_base
from hub_server.local import LocalHub
from transformers import AutoConfig

from lora_factory.adapters.layout import AdapterLayout


@pytest.fixture
def folder(hub: LocalHub, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path) -> Path:
    """A generator's folder; the hub has the base model and the encoder that it names."""
    return publish_base(hub, pico_model_folder, pico_encoder_folder, tmp_path / "generator")


def test_every_request_of_a_push_fails_in_every_way(hub: LocalHub) -> None:
    code = f"""
import runpy, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
runpy.run_module("hub_server.faults", run_name="__main__")
"""
    done = hub.run(code, timeout=500.0)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == {}
    assert result["pushes"] == 312


def test_sets_of_adapters_and_zoos_arrive_whole_or_not_at_all(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    make_zoo(AdapterLayout.from_dict(AutoConfig.from_pretrained(folder).layout), tmp_path / "zoo")
    card = "# Mine\n\nWritten by hand.\n"
    old = {
        "README.md": card,
        "legal/README.md": card,
        "gone/README.md": card,
        **dict.fromkeys(("gone/adapter_config.json", "gone/generation.json", "gone/notes.txt"), "{}"),
        **dict.fromkeys(("gone/run/adapter_config.json", "gone/run/run.json", "gone/run/notes.txt"), "{}"),
    }
    requests = ("/tree/", "/resolve/", "/commit/")
    faults = ({"status": 403}, {"status": 500}, {"drop": "download"})
    cases = list(itertools.product(requests, faults, (1, None)))
    for kind in ("model", "dataset"):
        for number, (request, fault, times) in enumerate(cases):
            hub.add_repo(f"alice/{kind}-{number}", old, repo_type=kind)
            hub.fail(f"/alice/{kind}-{number}[./].*{request.strip('/')}", times=times, **fault)
    replies = ask(
        hub,
        f"""
from lora_factory import AdapterZoo
generator, zoo = CVAELoRAGenerator.from_pretrained({str(folder)!r}), AdapterZoo({str(tmp_path / "zoo")!r})
texts, result = {{"legal": "Legal notices", "code": "Python code"}}, {{}}
for number in range({len(cases)}):
    reply = attempt(generator.push_adapters, texts, f"alice/model-{{number}}")
    result[f"model-{{number}}"] = reply if isinstance(reply, str) and "cannot" in reply else None
    reply = attempt(zoo.push_to_hub, f"alice/dataset-{{number}}")
    result[f"dataset-{{number}}"] = reply if "cannot" in reply else None
""",
        waits=False,
    )
    added = {
        "model": [f"{name}/adapter_model.safetensors" for name in ("legal", "code")],
        "dataset": ["poems/seed-0/checkpoints.safetensors", "zoo.json"],
    }
    removed = {
        "model": {"gone/adapter_config.json", "gone/generation.json"},
        "dataset": {"gone/run/adapter_config.json", "gone/run/run.json"},
    }
    for name, reply in replies.items():
        kind, number = name.split("-")
        request, fault, times = cases[int(number)]
        repo = hub.repos[kind, f"alice/{name}"]
        files = hub.files(f"alice/{name}", repo_type=kind)
        case = f"{name}: {request} {fault} {times}: {reply}"
        assert all(path in files and b"Written by hand." in files[path] for path in old if "README" in path), case
        assert "gone/notes.txt" in files and "gone/run/notes.txt" in files, case
        arrived = all(path in files for path in added[kind]) and not removed[kind] & set(files)
        assert arrived or set(files) == set(old), case
        assert len(list(repo.history("main"))) == 2 + arrived, case
        if reply is None:
            assert arrived, case
        else:
            assert re.match(rf"cannot push to alice/{name}: \S", reply), case
            assert not (times == 1 and fault.get("status") != 403), case
            assert not arrived or "whether the commit has arrived is not known" in reply, case
