"""Generators and adapters on a local hub, through the real clients: there and back, and every failure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.hub import HAND_WRITTEN, ask, contents, make_zoo, publish_base
from hub_server.local import LocalHub
from huggingface_hub import ModelCard
from transformers import AutoConfig

from lora_factory.adapters.layout import AdapterLayout


@pytest.fixture
def folder(hub: LocalHub, pico_model_folder: Path, pico_encoder_folder: Path, tmp_path: Path) -> Path:
    """A generator's folder; the hub has the base model and the encoder that it names."""
    return publish_base(hub, pico_model_folder, pico_encoder_folder, tmp_path / "generator")


def test_there_and_back(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    there = ask(
        hub,
        f"""
generator = CVAELoRAGenerator.from_pretrained({str(folder)!r})
commits = [generator.push_to_hub("alice/generator", tags=["pico"])]
commits += [generator.push_adapter(TEXT, "alice/adapter", seed=3, temperature=0.7, private=False)]
commits += [generator.push_to_hub("alice/generator", revision="v1", commit_message="One", tags=["v1"])]
commits += [generator.push_to_hub("alice/generator", create_pr=True, tags=["more"])]
model = generator.generate_adapter(TEXT, seed=3, temperature=0.7)
result = {{"oids": [commit.oid for commit in commits], "pull": commits[-1].pr_url, "logits": fingerprint(model)}}
""",
    )
    assert sorted(hub.files("alice/generator")) == ["README.md", "config.json", "model.safetensors"]
    repo = hub.repos["model", "alice/generator"]
    assert [commit.title for commit in repo.history("main")][1:] == ["initial commit"], "one commit a push"
    assert repo.find("v1").title == "One"
    assert there["pull"].endswith("/alice/generator/discussions/1")
    card = hub.files("alice/adapter")["README.md"].decode()
    again = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    assert f'revision="{there["oids"][0]}"' in again

    back = ask(
        hub,
        f"""
import os
os.chdir({str(tmp_path)!r})
from peft import AutoPeftModelForCausalLM
from transformers import AutoModel
from huggingface_hub import ModelCard
result = {{"logits": []}}
for name, how in [("alice/generator", {{"revision": "v1"}}), ("alice/generator", {{}})]:
    generator = CVAELoRAGenerator.from_pretrained(name, **how)
    result["logits"].append(fingerprint(generator.generate_adapter(TEXT, seed=3, temperature=0.7)))
auto = AutoModel.from_pretrained("alice/generator", dtype=torch.float32, device_map="cpu")
result["logits"].append(fingerprint(auto.generate_adapter(TEXT, seed=3, temperature=0.7)))
result["logits"].append(fingerprint(AutoPeftModelForCausalLM.from_pretrained("alice/adapter").eval()))
result["dtype"] = str(CVAELoRAGenerator.from_pretrained("alice/generator", dtype=torch.bfloat16).dtype)
exec({again!r})
result["again"] = hashlib.sha256(Path("again/adapter_model.safetensors").read_bytes()).hexdigest()
cards = [ModelCard.load(name) for name in ("alice/generator", "alice/adapter")]
result["cards"] = [card.validate() for card in cards]
""",
        token=None,
    )
    assert back["logits"] == [there["logits"]] * 4
    assert back["dtype"] == "torch.bfloat16"
    assert f"SHA-256 {back['again']}" in card
    assert back["cards"] == [None, None]
    assert ModelCard(card).data.base_model == "alice/base"
    tags = hub.repos["model", "alice/adapter"].describe()["tags"]
    assert {"lora-factory", "base_model:adapter:alice/base", "license:unknown", "peft"} <= set(tags)


def test_offline_mode_asks_nobody(hub: LocalHub, folder: Path) -> None:
    hub.add_repo("alice/generator", contents(folder))
    home = hub.home()
    code = """
calls = []
network = ("socket.connect", "socket.getaddrinfo", "socket.sendto")
sys.addaudithook(lambda event, arguments: calls.append(event) if event in network else None)
generator = CVAELoRAGenerator.from_pretrained("alice/generator")
result = fingerprint(generator.generate_adapter(TEXT))
"""
    online = ask(hub, code, home=home)
    hub.log.clear()
    offline = ask(
        hub,
        code
        + """
before = time.monotonic()
result = [result, attempt(CVAELoRAGenerator.from_pretrained, "alice/other"), attempt(generator.push_to_hub, "alice/x")]
result += [time.monotonic() - before, len(calls)]
""",
        home=home,
        HF_HUB_OFFLINE="1",
    )
    assert not hub.log and offline[4] == 0, "no call to the hub or to anybody else"
    assert offline[0] == online
    assert "alice/other" in offline[1] and "offline mode" in offline[1]
    assert "unset HF_HUB_OFFLINE" in offline[2]
    assert offline[3] < 20, "the clients' own retries take 25 seconds and more"


def test_failures_are_explained_and_nothing_is_half_pushed(hub: LocalHub, folder: Path) -> None:
    hub.add_repo("alice/generator", contents(folder))
    hub.add_repo("bob/gated", contents(folder), gated="manual")
    hub.add_repo("bob/open", {"a": "1"})
    hub.add_repo("alice/existing", {"README.md": HAND_WRITTEN})
    hub.add_repo("alice/broken-card", {"README.md": "---\n[1, 2\n---\n# Title\n"})
    hub.fail("/alice/dropped/commit/", drop="upload", times=6)  # as often as a push tries it
    hub.fail("/alice/down/commit/", status=503, times=6)
    hub.fail("/alice/taken/commit/", status=409, message="Conflict")
    hub.fail("/alice/raced/commit/", status=412)
    hub.fail("/alice/slow/commit/", delay=1.5)
    hub.fail("/alice/existing/preupload/", status=500)
    hub.fail("^/storage/", "PUT", drop="upload")
    hub.fail("/alice/unreachable/", drop="upload", times=None)
    hub.fail("/alice/refused/", status=500, times=None)
    result = ask(
        hub,
        f"""
generator = CVAELoRAGenerator.from_pretrained("alice/generator")
push, load = generator.push_to_hub, CVAELoRAGenerator.from_pretrained
adapter = generator.push_adapter
result = {{name: attempt(adapter, TEXT, f"alice/{{name}}") for name in ("dropped", "down", "taken", "raced")}}
result |= {{
    "again": adapter(TEXT, "alice/dropped").oid,
    "slow": push("alice/slow").oid,
    "existing": push("alice/existing").oid,
    "broken card": attempt(adapter, TEXT, "alice/broken-card"),
    "wrong token": attempt(adapter, TEXT, "alice/x", token="hf_wrong"),
    "read token": attempt(adapter, TEXT, "alice/x", token={hub.read_token!r}),
    "token=False": attempt(adapter, TEXT, "alice/x", token=False),
    "not a member": attempt(adapter, TEXT, "bob/x"),
    "not mine": attempt(adapter, TEXT, "bob/open"),
    "pull to nowhere": attempt(adapter, TEXT, "alice/nowhere", create_pr=True),
    "bad id": attempt(adapter, TEXT, "alice/x/y"),
    "short id": adapter(TEXT, "short").repo_url.repo_id,
    "pull": adapter(TEXT, "bob/open", create_pr=True).pr_url,
    "gated": attempt(load, "bob/gated"),
    "unknown": attempt(load, "alice/unknown"),
    "no generator": attempt(load, "alice/base"),
    "no config": attempt(load, "bob/open"),
    "no revision": attempt(load, "alice/generator", revision="v7"),
    "unreachable": attempt(load, "alice/unreachable"),
    "refused": attempt(load, "alice/refused"),
}}
""",
        waits=False,
    )
    for name, words in {
        "dropped": "connection to the Hub failed.*a commit arrives whole or not at all",
        "down": "503.*try again later",
        "taken": "409.*collides",
        "raced": "412.*somebody has committed since",
        "broken card": "head of the card is no YAML",
        "wrong token": "401.*token is missing or not valid",
        "read token": "403.*role 'write'",
        "token=False": "no access token.*hf auth login",
        "not a member": "403.*create_pr=True",
        "not mine": "403.*create_pr=True",
        "pull to nowhere": "no repository alice/nowhere",
        "bad id": "'alice/x/y' is no Hub id",
        "gated": "bob/gated is gated; ask for access",
        "unknown": "no repository alice/unknown",
        "no generator": "model_type 'llama', expected 'cvae_lora'",
        "no config": "lacks a file",
        "no revision": "no such revision",
        "unreachable": "connection to the Hub failed",
        "refused": "500.*try again later",
    }.items():
        assert re.search(words, result[name], re.DOTALL), f"{name}: {result[name]}"
    assert not hub.files("alice/down") and not hub.files("alice/taken")
    assert ("model", "alice/x") not in hub.repos and ("model", "bob/x") not in hub.repos
    assert set(hub.files("alice/dropped")) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation.json",
    }
    assert result["short id"] == "alice/short" and result["pull"].endswith("/bob/open/discussions/1")
    assert len(hub.log.matching("/alice/unreachable/")) == 1, "one question, no repetitions"
    kept = Path(re.search(r"kept in (\S+),", result["down"])[1])
    assert set(contents(kept)) == set(hub.files("alice/dropped"))
    assert kept.is_relative_to(hub.folder), "nothing is left in the machine's own folder"

    card = hub.files("alice/existing")["README.md"].decode()
    assert "Written by hand.\n" in card and "To the caterpillar.\n" in card and "## no heading" in card
    assert "Old words" not in card
    head = ModelCard(card).data
    assert (head.license, head["thumbnail"], head.base_model) == ("apache-2.0", "picture.png", "alice/base")
    assert {"mine", "lora-factory"} <= set(head.tags)


def test_batches_zoos_search_and_the_command_line(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    layout = AutoConfig.from_pretrained(folder).layout
    make_zoo(AdapterLayout.from_dict(layout), tmp_path / "zoo")
    (folder / "training.json").write_text("{}")
    result = ask(
        hub,
        f"""
import contextlib, io
from huggingface_hub import HfApi, snapshot_download
from lora_factory import AdapterZoo
from lora_factory.cli import commands as cli
from lora_factory.hub.client import search_generators

def command(*words):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = cli.main(words)
    return [code, output.getvalue()]

folder, zoo = {str(folder)!r}, AdapterZoo({str(tmp_path / "zoo")!r})
generator = CVAELoRAGenerator.from_pretrained(folder)
texts = {{"legal": "Legal notices", "code": "Python code"}}
result = {{
    "dry": command("push", "--generator", folder, "--repo-id", "alice/cli", "--dry-run"),
    "repositories": [repo.id for repo in HfApi().list_models(author="alice")],
    "cli": command("push", "--generator", folder, "--repo-id", "alice/cli", "--tag", "x", "--private"),
    "cli adapter": command("push", "--generator", "alice/cli", "--text", "Poems", "--repo-id", "alice/poems"),
    "search": command("search", "--base-model", "alice/base"),
    "found": [found.repo_id for found in search_generators("alice/base")],
    "none": command("search", "--base-model", "alice/other"),
    "one": [len(generator.push_adapters(texts, "alice/both"))],
    "each": [it.repo_url.repo_id for it in generator.push_adapters(texts, "alice/a", collection="Mine", seed=1)],
    "../": attempt(generator.push_adapters, {{"../x": "text"}}, "alice/bad"),
    "zoo": zoo.push_to_hub("alice/zoo").oid,
}}
copy = AdapterZoo(snapshot_download("alice/zoo", repo_type="dataset"))
result["copy"] = [copy.verify(), copy.fingerprint() == zoo.fingerprint()]
""",
    )
    files = ["README.md", "config.json", "model.safetensors", "training.json"]
    code, shown = result["dry"]
    assert code == 0 and re.findall(r"(?m)^ +[\d,]+  (\S+)$", shown) == files
    assert "# alice/cli" in shown and "license: unknown" in shown
    assert result["repositories"] == ["alice/encoder", "alice/base"], "a dry run pushes nothing"
    assert re.fullmatch(r"pushed \S+/alice/cli/commit/\w+\n", result["cli"][1])
    assert sorted(hub.files("alice/cli")) == files and hub.repos["model", "alice/cli"].private
    assert result["cli adapter"][0] == 0 and "alice/cli" in hub.files("alice/poems")["README.md"].decode()
    assert result["found"] == ["alice/cli"] and result["search"][1].startswith("alice/cli  ")
    assert result["none"] == [0, "no generator for alice/other on the Hub\n"]
    both = hub.files("alice/both")
    assert {"README.md", "legal/adapter_model.safetensors", "code/README.md"} <= set(both)
    assert 'PeftModel.from_pretrained(base, "alice/both", subfolder="legal")' in both["legal/README.md"].decode()
    assert result["each"] == ["alice/a-legal", "alice/a-code"]
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == result["each"]
    assert "'../x' cannot be a file name" in result["../"] and ("model", "alice/bad") not in hub.repos
    assert result["copy"] == [[], True]
    assert "| poems | 1 | Continue a poem | mit |" in hub.files("alice/zoo", repo_type="dataset")["README.md"].decode()


def test_a_run_that_is_removed_while_its_zoo_is_pushed(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    layout = AutoConfig.from_pretrained(folder).layout
    make_zoo(AdapterLayout.from_dict(layout), tmp_path / "zoo")
    result = ask(
        hub,
        f"""
from huggingface_hub import HfApi
from lora_factory import AdapterZoo
from lora_factory.hub import client
from lora_factory.zoo.tools import prune

zoo, upload = AdapterZoo({str(tmp_path / "zoo")!r}), client._upload

def late(*words, **options):
    prune(zoo, tasks=zoo.tasks[:1])
    return upload(*words, **options)

client._upload = late
result = {{"push": attempt(zoo.push_to_hub, "alice/zoo")}}
result["files"] = HfApi().list_repo_files("alice/zoo", repo_type="dataset")
""",
    )
    assert "was removed while it was being pushed; nothing is pushed; push again" in str(result["push"])
    assert set(result["files"]) <= {".gitattributes"}
