"""What is pushed besides weights: vectors, plots, what goes when it is out of date; and which base model is loaded."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import hub_fixtures
import pytest
import test_hub
from hub_fixtures import LocalHub
from hub_state import User
from huggingface_hub import ModelCard
from test_hub import ask, contents, publish_base
from test_report import make_comparison

hub = hub_fixtures.hub
folder = test_hub.folder
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_vectors_plots_and_what_is_out_of_date(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    (tmp_path / "comparison.json").write_text(json.dumps(make_comparison(base_model="alice/base")))
    result = ask(
        hub,
        f"""
from huggingface_hub import HfApi
from lora_factory import hub
generator = CVAELoRAGenerator.from_pretrained({str(folder)!r})
vector = torch.arange(64.0)
generator.push_adapter(None, "alice/vectors", conditions={{"hidden": vector}})
commit = generator.push_to_hub("alice/generator", comparison={str(tmp_path / "comparison.json")!r})
first = {{path: HfApi().hf_hub_download("alice/generator", path) for path in ("README.md", "headroom.svg")}}
first = {{path: Path(file).read_text() for path, file in first.items()}}
options = {{"push_to_hub": True, "repo_id": "alice/generator", "commit_message": "Two"}}
generator.save_pretrained({str(tmp_path / "copy")!r}, **options)

def raced(card, old):
    HfApi().upload_file(path_or_fileobj=b"# By hand", path_in_repo="README.md", repo_id="alice/vectors")
    return merge(card, old)

merge, hub.keep_handwritten = hub.keep_handwritten, raced
race = attempt(generator.push_adapter, TEXT, "alice/vectors")
hub.keep_handwritten = merge
generator.push_adapter(TEXT, "alice/vectors")
result = {{"first": first, "race": race}}
""",
    )
    card = result["first"]["README.md"]
    assert "![Headroom per method on seen and unseen tasks](headroom.svg)" in card
    assert result["first"]["headroom.svg"].lstrip().startswith("<?xml") and "</svg>" in result["first"]["headroom.svg"]
    assert ModelCard(card).data.eval_results
    assert hub.repos["model", "alice/generator"].find().title == "Two"
    now = hub.files("alice/generator")
    assert sorted(now) == ["README.md", "config.json", "model.safetensors"], "results of other weights are gone"
    assert not ModelCard(now["README.md"].decode()).data.eval_results
    assert sorted(contents(tmp_path / "copy")) == ["config.json", "model.safetensors"]
    commits = list(hub.repos["model", "alice/vectors"].history("main"))
    assert len(commits) == 4 and "412" in result["race"], "what came in between stops a push"
    assert "condition.safetensors" in commits[2].tree and "condition.safetensors" not in commits[0].tree
    before = commits[2].tree["README.md"].content.decode()
    assert 'conditions=load_file("condition.safetensors")' in before
    assert "# By hand" in commits[0].tree["README.md"].content.decode(), "a hand-written card survives"


def test_the_base_model_is_the_one_that_was_named(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    first = hub.repos["model", "alice/base"].find().oid
    second = hub.commit("alice/base", {"notes.txt": "newer"})
    files = {name: blob.content for name, blob in hub.repos["model", "alice/base"].find(first).tree.items()}
    hub.add_repo("bob/copy", files)
    hub.add_repo("bob/gated", files, gated="manual")
    copy = hub.repos["model", "bob/copy"].find().oid
    result = ask(
        hub,
        f"""
import logging
from lora_factory.adapters import attach_adapter, load_adapter
from lora_factory.base_models import load_base_model
from lora_factory.encoders import TextEncoder

class Notes(logging.Handler):
    def emit(self, record):
        notes.append(record.getMessage())

notes, result = [], {{}}
logging.getLogger("lora_factory").addHandler(Notes())
generator = CVAELoRAGenerator.from_pretrained({str(folder)!r})
generator.save_adapter(TEXT, {str(tmp_path / "adapter")!r})

def noted(name, function, *arguments):
    notes.clear()
    got = attempt(function, *arguments)
    result[name] = [list(notes), got if isinstance(got, str) else ""]

noted("named", generator.generate_adapter, TEXT)
noted("same id", generator.generate_adapter, TEXT, "alice/base")
newer, _ = load_base_model("alice/base")
noted("other commit", generator.generate_adapter, TEXT, newer)
another, _ = load_base_model("alice/base")
noted("adapter", attach_adapter, another, *load_adapter({str(tmp_path / "adapter")!r}))
noted("other id", generator.generate_adapter, TEXT, "bob/copy")
noted("gated", load_base_model, "bob/gated")
noted("no encoder", TextEncoder, "alice/none")
""",
    )
    announced = f"downloading the base model alice/base at commit {first}"
    assert announced in result["named"][0] and result["same id"] == [[], ""], "the named commit, announced once"
    here = f"the adapter is for alice/base at commit {first}, the base model is "
    assert result["other commit"][0] == [f"{here}alice/base at commit {second}; pass base_model='alice/base'"]
    assert result["adapter"][0] == result["other commit"][0]
    assert f"{here}bob/copy at commit {copy}; pass base_model='alice/base'" in result["other id"][0]
    assert "bob/gated is gated; ask for access on its page on the Hub" in result["gated"][1]
    assert "no repository alice/none" in result["no encoder"][1]


def test_the_readme_publishes_and_uses(
    hub: LocalHub, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path
) -> None:
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    hub.users[hub.token] = User("me")
    work = tmp_path / "work"
    (work / "evaluation").mkdir(parents=True)
    publish_base(hub, pico_model_folder, pico_encoder_folder, work / "generator", base)
    (work / "evaluation" / "comparison.json").write_text(json.dumps(make_comparison(base_model=base)))
    command = tmp_path / "bin" / "lora-factory"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m lora_factory.cli "$@"\n')
    command.chmod(0o755)
    section = README.split("\n## Publish and use\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```(python|bash)\n(.*?)```", section, flags=re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "python", "bash"]
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    code = f"import os, subprocess\nos.chdir({str(work)!r})\n"
    hub.run(code + blocks[0][1], timeout=300.0)
    hub.run(code + blocks[1][1], timeout=300.0, token=None)  # another machine, another account
    shell = f"subprocess.run(['bash', '-e', '-c', {blocks[2][1]!r}], check=True)"
    printed = hub.run(code + shell, timeout=500.0, PATH=path).stdout
    assert "would push to me/my-generator" in printed and "\nme/my-generator  " in printed
    assert {"README.md", "comparison.json", "model.safetensors"} <= set(hub.files("me/my-generator"))
    assert {"linux/adapter_model.safetensors", "law/README.md"} <= set(hub.files("me/loras"))
    assert (work / "my-adapter" / "adapter_model.safetensors").is_file()
