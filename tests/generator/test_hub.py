"""What is pushed besides weights: vectors, plots, what goes when it is out of date; and which base model is loaded."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.comparisons import make_comparison
from helpers.hub import HAND_WRITTEN, ask, contents, make_zoo, publish_base
from helpers.models import random_adapter
from hub_server.local import LocalHub
from huggingface_hub import ModelCard
from transformers import AutoConfig

from lora_factory import CVAELoRAGenerator
from lora_factory.adapters.layout import AdapterLayout
from lora_factory.zoo.store import AdapterZoo


@pytest.fixture
def folder(hub: LocalHub, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path) -> Path:
    """A generator's folder; the hub has the base model and the encoder that it names."""
    return publish_base(hub, pico_model_folder, pico_encoder_folder, tmp_path / "generator")


def test_vectors_plots_and_what_is_out_of_date(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (tmp_path / "comparison.json").write_text(json.dumps(make_comparison(base_model="alice/base")))
    result = ask(
        hub,
        f"""
from huggingface_hub import HfApi
from lora_factory.hub import client as hub
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
    assert result["first"]["headroom.svg"].startswith("<svg") and "</svg>" in result["first"]["headroom.svg"]
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
    assert 'conditions=load_file("vectors/condition.safetensors")' in before
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
from lora_factory.adapters.attach import attach_adapter
from lora_factory.adapters.folder import load_adapter
from lora_factory.models.loading import load_base_model
from lora_factory.models.text_encoders import TextEncoder

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


def test_what_is_dropped_goes_and_what_is_not_ours_stays(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    layout = AdapterLayout.from_dict(AutoConfig.from_pretrained(folder).layout)
    make_zoo(layout, tmp_path / "zoo")
    zoo = AdapterZoo(tmp_path / "zoo")
    record = zoo.record("poems", "seed-0")
    weights = torch.stack([random_adapter(layout, seed) for seed in (2, 3)])
    for task, run in (("poems", "seed-1"), ("letters", "seed-0")):
        zoo.add_run(replace(record, task=task, run=run), weights, extra_files={"import.json": "{}\n"})
    common = f"""
from lora_factory import AdapterZoo
from lora_factory.zoo.tools import prune
zoo, generator = AdapterZoo({str(tmp_path / "zoo")!r}), CVAELoRAGenerator.from_pretrained({str(folder)!r})
"""
    ask(
        hub,
        common
        + """
zoo.push_to_hub("alice/zoo")
generator.push_adapters({"legal": "Legal notices", "code": "Python code", "old": "Old text"}, "alice/both")
result = None
""",
    )
    words = "\n## Thanks\n\nTo the caterpillar.\n"
    cards = {path: hub.files("alice/both")[path].decode() + words for path in ("legal/README.md", "code/README.md")}
    mine = {"mine/adapter_config.json": "{}", "mine/README.md": "# Mine", "data.csv": "1", "generation.json": "{}"}
    hub.commit("alice/both", {**cards, **mine})
    hub.commit("alice/zoo", {"poems/seed-1/notes.txt": "mine", "a/b/c.json": "{}"}, repo_type="dataset")
    pushed = ask(
        hub,
        common
        + """
prune(zoo, runs=["seed-1"])
prune(zoo, tasks=["letters"])
zoo.push_to_hub("alice/zoo")
generator.push_adapters({"legal": "Legal notices"}, "alice/both")
result = [AdapterZoo.from_hub("alice/zoo").fingerprint(), zoo.fingerprint()]
""",
    )
    assert pushed[0] == pushed[1], "pruned runs do not come back"
    run = {"adapter_config.json", "adapter_model.safetensors", "checkpoints.safetensors", "run.json"}
    left = {f"poems/seed-0/{name}" for name in run} | {"poems/seed-1/notes.txt", "a/b/c.json"}
    assert set(hub.files("alice/zoo", repo_type="dataset")) == left | {"README.md", "zoo.json"}
    files = hub.files("alice/both")
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors", "generation.json"}
    assert set(files) == {f"legal/{name}" for name in adapter} | {*mine, "README.md", "code/README.md"}
    assert files["code/README.md"].decode() == cards["code/README.md"], (
        "what somebody wrote there outlives the adapter"
    )
    assert files["legal/README.md"].decode().count(words) == 1
    assert len(list(hub.repos["model", "alice/both"].history("main"))) == 4, "one commit a push"


def test_a_push_publishes_no_file_that_a_link_leads_to(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"key": "PRIVATE"}')
    hostile = shutil.copytree(folder, tmp_path / "hostile")
    (hostile / "training.json").symlink_to(secret)
    (folder / "training.json").write_text('{"history": [1.5]}')
    zoo = tmp_path / "zoo"
    make_zoo(AdapterLayout.from_dict(AutoConfig.from_pretrained(folder).layout), zoo)
    config = zoo / "poems" / "seed-0" / "adapter_config.json"
    shutil.copyfile(config, tmp_path / "same")
    config.unlink()
    config.symlink_to(tmp_path / "same")
    result = ask(
        hub,
        f"""
import os, warnings
from lora_factory import AdapterZoo
os.chdir({str(folder.parent)!r})
generator = CVAELoRAGenerator.from_pretrained({folder.name!r})
os.chdir("/")
generator.push_to_hub("alice/first")
generator.push_to_hub("alice/second")
CVAELoRAGenerator.from_pretrained("alice/second").push_to_hub("alice/third")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    hostile = CVAELoRAGenerator.from_pretrained({str(hostile)!r})
hostile.push_to_hub("alice/hostile")
hostile.push_to_hub("alice/first")
result = [str(warning.message) for warning in caught if "training.json" in str(warning.message)]
result += [attempt(AdapterZoo({str(zoo)!r}).push_to_hub, "alice/zoo")]
""",
    )
    assert len(result) == 2 and "outside of its folder" in result[0]
    assert "adapter_config.json is a link to" in result[1] and ("dataset", "alice/zoo") not in hub.repos
    for name in ("second", "third"):
        assert json.loads(hub.files(f"alice/{name}")["training.json"]) == {"history": [1.5]}, name
    assert "training.json" not in hub.files("alice/hostile") | hub.files("alice/first"), "nor one of other weights"
    contents = [
        blob.content for repo in hub.repos.values() for it in repo.commits.values() for blob in it.tree.values()
    ]
    assert not any(b"PRIVATE" in content for content in contents)


def test_what_a_failing_push_and_a_failing_load_say(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    hub.add_repo("alice/open", {"a": "1"})
    hub.add_repo("bob/closed", contents(folder))
    hub.add_repo("bob/adapter", {"adapter_config.json": "{}"})
    hub.add_repo("bob/zoo", {"zoo.json": "{}"}, repo_type="dataset")
    hub.fail("^/storage/", "PUT", status=403, message="No space for you", times=1)
    hub.fail("/bob/closed/", status=403, times=None)
    hub.fail("/alice/forbidden-card/resolve/", status=403, times=None)
    hub.add_repo("alice/forbidden-card", {"README.md": HAND_WRITTEN})
    make_zoo(AdapterLayout.from_dict(AutoConfig.from_pretrained(folder).layout), tmp_path / "zoo")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    result = ask(
        hub,
        f"""
import os, resource, signal, warnings
from huggingface_hub import HfApi
load, here = CVAELoRAGenerator.from_pretrained, Path({str(tmp_path)!r})
generator = load({str(folder)!r})
adapter = generator.push_adapter
result = {{"refused upload": attempt(adapter, TEXT, "alice/refused")}}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    adapter(TEXT, "alice/open", private=True)
result["private"] = [str(warning.message) for warning in caught if "private" in str(warning.message)]
result["card"] = attempt(adapter, TEXT, "alice/forbidden-card")
result["read"] = attempt(load, "bob/closed")
result["branch of a pull request"] = attempt(adapter, TEXT, "alice/open", create_pr=True, revision="v1")

upload = HfApi.preupload_lfs_files
def interrupted(*_, **__):
    raise KeyboardInterrupt
HfApi.preupload_lfs_files = interrupted
try:
    adapter(TEXT, "alice/interrupted")
except KeyboardInterrupt as error:
    result["Ctrl-C"] = str(error)
HfApi.preupload_lfs_files = upload

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file that cannot grow, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
result["full disk"] = attempt(adapter, TEXT, "alice/full")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
kept = Path(result["Ctrl-C"].split("kept in ")[1].split(",")[0])
result["modes"] = [oct(path.stat().st_mode) for path in kept.iterdir()]
result |= {{
    "zoo": attempt(load, here / "zoo"),
    "adapter": attempt(load, here / "adapter"),
    "zoo on the Hub": attempt(load, "bob/zoo"),
    "adapter on the Hub": attempt(load, "bob/adapter"),
    "file": attempt(load, here / "adapter" / "adapter_config.json"),
    "nothing": attempt(load, "bob/no-folder"),
}}
""",
        waits=False,
    )
    offline = ask(
        hub,
        "result = attempt(CVAELoRAGenerator.from_pretrained, 'my-generator')",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    assert "adapter_model.safetensors" in result["refused upload"] and "403 (" in result["refused upload"]
    assert len(result["private"]) == 1 and "stays public" in result["private"][0]
    assert "403" in result["card"] and hub.files("alice/forbidden-card") == {"README.md": HAND_WRITTEN.encode()}
    for name in ("read", "card"):
        assert "you may not read it" in result[name] and "write" not in result[name].split("kept in")[0]
    assert "leave out revision='v1'" in result["branch of a pull request"]
    assert "was interrupted" in result["Ctrl-C"] and set(result["modes"]) == {"0o100644"}
    assert "set TMPDIR to another folder; nothing was pushed" in result["full disk"]
    assert "is a zoo, not a generator; train a generator on it" in result["zoo"]
    assert "'bob/zoo' is a zoo, not a generator; train a generator on it" in result["zoo on the Hub"]
    assert "is an adapter, not a generator" in result["adapter"]
    assert "'bob/adapter' is an adapter, not a generator" in result["adapter on the Hub"]
    assert "is a file; name the generator's folder" in result["file"]
    assert "no folder of that name here, and there is no repository bob/no-folder" in result["nothing"]
    assert "no folder of that name here, and the connection to the Hub failed" in offline


def test_zoos_adapters_and_generators_can_be_shared(folder: Path, tmp_path: Path) -> None:
    generator = CVAELoRAGenerator.from_pretrained(folder)
    make_zoo(generator.layout, tmp_path / "zoo")
    generator.save_adapter(None, tmp_path / "adapter", conditions={"text": torch.ones(32)})
    generator.save_pretrained(tmp_path / "copy")
    umask = os.umask(0)
    os.umask(umask)
    files = [path for name in ("zoo", "adapter", "copy") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 8
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
