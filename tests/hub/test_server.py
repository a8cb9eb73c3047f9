"""The hub of the tests, driven by the real clients: every route, every error, every programmed failure."""

from __future__ import annotations

import http.client
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hub_server.local import LocalHub

CARD = "---\nlicense: mit\nlibrary_name: peft\nbase_model: alice/base\ntags: [lora, lora-factory]\n---\n# Card\n"
# What a test's code may use: `attempt` names the error of a call, so that one process can try many.
HEAD = """
from pathlib import Path
from huggingface_hub import HfApi, HfFileSystem, ModelCard, hf_hub_download, snapshot_download
api = HfApi()

def attempt(function, *arguments, **keywords):
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, response.status_code if response is not None else None]
"""


def ask(hub: LocalHub, code: str, **how: Any) -> Any:
    """Run a test's code after `HEAD`."""
    return hub.evaluate(HEAD + code, **how)


def test_accounts_and_new_repositories(hub: LocalHub) -> None:
    result = ask(
        hub,
        f"""
who = api.whoami()
result = {{
    "who": [who["name"], who["orgs"][0]["name"], who["auth"]["accessToken"]["role"]],
    "wrong token": attempt(api.whoami, token="hf_wrong"),
    "wrong token, repository": attempt(api.model_info, "alice/model", token="hf_wrong"),
    "new": str(api.create_repo("alice/model", private=True)),
    "again": attempt(api.create_repo, "alice/model"),
    "exist_ok": api.create_repo("alice/model", exist_ok=True).repo_id,
    "own name": api.create_repo("short").repo_id,
    "data": api.create_repo("wonderland/data", repo_type="dataset").repo_id,
    "elsewhere": attempt(api.create_repo, "bob/model"),
    "read token": attempt(api.create_repo, "alice/other", token="{hub.read_token}"),
    "no token": attempt(api.create_repo, "alice/other", token=False),
    "exists": [api.repo_exists("alice/model"), api.repo_exists("alice/none")],
    "private": attempt(api.model_info, "alice/model", token="{hub.other_token}"),
    "may write": [attempt(api.auth_check, "alice/short", write=True, token=token)
                  for token in ("{hub.token}", "{hub.read_token}", "{hub.other_token}", False)],
    "deleted": [api.delete_repo("alice/short"), attempt(api.delete_repo, "alice/short")],
}}
""",
    )
    assert result == {
        "who": ["alice", "wonderland", "write"],
        "wrong token": ["HfHubHTTPError", 401],
        "wrong token, repository": ["HfHubHTTPError", 401],
        "new": f"{hub.endpoint}/alice/model",
        "again": ["HfHubHTTPError", 409],
        "exist_ok": "alice/model",
        "own name": "alice/short",
        "data": "wonderland/data",
        "elsewhere": ["HfHubHTTPError", 403],
        "read token": ["HfHubHTTPError", 403],
        "no token": ["HfHubHTTPError", 401],
        "exists": [True, False],
        "private": ["RepositoryNotFoundError", 404],
        "may write": [None, ["HfHubHTTPError", 403], ["HfHubHTTPError", 403], ["RepositoryNotFoundError", 401]],
        "deleted": [None, ["RepositoryNotFoundError", 404]],
    }
    assert hub.repos["model", "alice/model"].private


def test_a_folder_is_pushed_in_one_commit(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    contents = {
        "README.md": CARD.encode(),
        "deep/a.json": b"{}",
        "model.safetensors": bytes(range(256)) * 500,
        "e": b"",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    hub.add_repo("alice/model")
    result = ask(
        hub,
        f"""
folder = {str(folder)!r}
first = api.upload_folder(repo_id="alice/model", folder_path=folder, commit_message="One")
again = api.upload_folder(repo_id="alice/model", folder_path=folder)
removed = api.delete_file("deep/a.json", "alice/model")
result = [
    [commit.title for commit in api.list_repo_commits("alice/model")],
    first.oid == again.oid != removed.oid,
    attempt(api.upload_file, repo_id="alice/model", path_or_fileobj=b"1", path_in_repo="x", parent_commit=first.oid),
    attempt(api.upload_file, repo_id="alice/model", path_or_fileobj=b"1", path_in_repo="x", revision="none"),
    attempt(api.upload_file, repo_id="alice/none", path_or_fileobj=b"1", path_in_repo="x"),
    attempt(api.delete_file, "none", "alice/model"),
    attempt(api.upload_file, repo_id="alice/model", path_in_repo="README.md",
            path_or_fileobj=b"---\\nbase_model: /tmp/base\\n---\\n"),
]
""",
    )
    assert result == [
        ["Delete deep/a.json with huggingface_hub", "One", "initial commit"],
        True,
        ["HfHubHTTPError", 412],
        ["RevisionNotFoundError", 404],
        ["RepositoryNotFoundError", 404],
        ["RemoteEntryNotFoundError", 404],
        ["ValueError", None],
    ]
    first, last = contents, {name: content for name, content in contents.items() if name != "deep/a.json"}
    history = list(hub.repos["model", "alice/model"].history("main"))
    assert hub.files("alice/model") == last
    assert hub.files("alice/model", revision=history[1].oid) == first
    (put,) = hub.log.matching("^/storage/", "PUT")
    assert put.received == 128_000
    assert "authorization" not in put.headers, "the credentials went to the storage"
    assert len(hub.log.matching("/objects/verify", "POST")) == 1


def test_pull_requests(hub: LocalHub) -> None:
    hub.add_repo("alice/model", {"a": "1", "b": "1"})
    result = ask(
        hub,
        f"""
alice = HfApi(token="{hub.token}")
change = {{"repo_id": "alice/model", "path_in_repo": "a"}}
refused = attempt(api.upload_file, **change, path_or_fileobj=b"2")
pull = api.upload_file(**change, path_or_fileobj=b"2", create_pr=True, commit_message="Better", commit_description="!")
alice.upload_file(repo_id="alice/model", path_in_repo="c", path_or_fileobj=b"3", revision=pull.pr_revision)
(listed,) = api.get_repo_discussions("alice/model")
before = api.get_discussion_details("alice/model", pull.pr_num)
at_pull = Path(hf_hub_download("alice/model", "a", revision="refs/pr/1")).read_text()
alice.merge_pull_request("alice/model", pull.pr_num)
after = api.get_discussion_details("alice/model", pull.pr_num)
result = [refused, pull.pr_url, pull.pr_revision, listed.title, before.status, before.author, before.target_branch,
          before.events[0].content, at_pull, after.status, attempt(api.get_discussion_details, "alice/model", 7),
          [ref.ref for ref in api.list_repo_refs("alice/model", include_pull_requests=True).pull_requests]]
""",
        token=hub.other_token,
    )
    url = f"{hub.endpoint}/alice/model/discussions/1"
    assert result[:7] == [["HfHubHTTPError", 403], url, "refs/pr/1", "Better", "open", "bob", "main"]
    assert result[7:] == ["!", "2", "merged", ["HfHubHTTPError", 404], ["refs/pr/1"]]
    assert hub.files("alice/model") == {"a": b"2", "b": b"1", "c": b"3"}


def test_branches_tags_and_revisions(hub: LocalHub) -> None:
    hub.add_repo("alice/model", {"a": "1"})
    result = ask(
        hub,
        """
name = "alice/model"
api.create_tag(name, tag="v1")
api.create_branch(name, branch="dev/next")
api.create_branch(name, branch="dev/next", exist_ok=True)
commit = api.upload_file(repo_id=name, path_in_repo="a", path_or_fileobj=b"2", revision="dev/next")
refs = api.list_repo_refs(name)
result = [
    attempt(api.create_tag, name, tag="v1"), attempt(api.create_branch, name, branch="dev/next"),
    attempt(api.create_branch, name, branch="x", revision="none"),
    [ref.name for ref in refs.branches], [ref.name for ref in refs.tags],
    [ref.target_commit == commit.oid for ref in refs.branches],
    [Path(hf_hub_download(name, "a", revision=revision)).read_text() for revision in ("v1", "dev/next", commit.oid)],
    api.model_info(name, revision="dev/next").sha == commit.oid, api.revision_exists(name, "none"),
    attempt(hf_hub_download, name, "a", revision="none"), attempt(snapshot_download, name, revision="none"),
]
""",
    )
    assert result == [
        *[["HfHubHTTPError", 409], ["HfHubHTTPError", 409], ["RevisionNotFoundError", 404]],
        *[["main", "dev/next"], ["v1"], [False, True], ["1", "2", "2"], True, False],
        *[["RevisionNotFoundError", 404], ["RevisionNotFoundError", 404]],
    ]


def test_reading_a_repository(hub: LocalHub) -> None:
    weights = bytes(range(256))
    hub.add_repo("alice/base", {"config.json": json.dumps({"model_type": "llama"})})
    files = {"README.md": CARD, "model.safetensors": weights, "deep/er/a.txt": "abcdef", "deep/é 1.txt": "é"}
    hub.add_repo("alice/model", files)
    hub.commit("alice/model", {"../outside.txt": "x"}, revision="hostile")
    result = ask(
        hub,
        """
name = "alice/model"
info, fs = api.model_info(name, files_metadata=True), HfFileSystem()
weights = next(file for file in info.siblings if file.rfilename == "model.safetensors")
with fs.open(f"{name}/model.safetensors", block_size=16) as stream:
    stream.seek(100)
    middle = list(stream.read(5))
result = {
    "tags": info.tags, "library": info.library_name, "card": info.card_data.to_dict(),
    "weights": [weights.size, weights.lfs.sha256, weights.blob_id != weights.lfs.sha256],
    "expand": [api.model_info(name, expand=["tags"]).siblings, api.model_info("alice/base").config],
    "files": api.list_repo_files(name),
    "tree": [entry.path for entry in api.list_repo_tree(name, "deep")],
    "no tree": attempt(lambda: list(api.list_repo_tree(name, "none"))),
    "paths": [type(entry).__name__ for entry in api.get_paths_info(name, ["deep", "README.md", "none"])],
    "exists": [api.file_exists(name, "README.md"), api.file_exists(name, "none")],
    "middle": middle, "glob": fs.glob(f"{name}/**/a.txt"),
    "unicode": Path(hf_hub_download(name, "deep/é 1.txt")).read_text(),
    "snapshot": sorted(path.name for path in Path(snapshot_download(name)).rglob("*") if path.is_file()),
    "missing": [attempt(hf_hub_download, name, "none"), attempt(hf_hub_download, "alice/none", "a")],
    "hostile": attempt(snapshot_download, name, revision="hostile")[0],
}
""",
    )
    lfs = hub.repos["model", "alice/model"].find().tree["model.safetensors"].sha256
    tags = ["peft", "lora", "lora-factory", "safetensors", "base_model:alice/base", "base_model:adapter:alice/base"]
    assert result["tags"] == [*tags, "license:mit", "region:us"]
    assert (result["library"], result["card"]["base_model"]) == ("peft", "alice/base")
    assert result["weights"] == [256, lfs, True]
    assert result["expand"] == [None, {"model_type": "llama"}]
    assert result["files"] == sorted([".gitattributes", *files])
    assert result["tree"] == ["deep/er", "deep/é 1.txt"]
    assert result["no tree"] == ["RemoteEntryNotFoundError", 404]
    assert result["paths"] == ["RepoFolder", "RepoFile"]
    assert result["exists"] == [True, False]
    assert result["middle"] == [100, 101, 102, 103, 104]
    assert result["glob"] == ["alice/model/deep/er/a.txt"]
    assert result["unicode"] == "é"
    assert result["snapshot"] == sorted([".gitattributes", "README.md", "a.txt", "model.safetensors", "é 1.txt"])
    assert result["missing"] == [["RemoteEntryNotFoundError", 404], ["RepositoryNotFoundError", 404]]
    assert isinstance(result["hostile"], str)
    assert not list(hub.folder.rglob("outside.txt"))
    assert {line.status for line in hub.log.matching("/storage/", "GET") if "range" in line.headers} == {206}


@pytest.mark.parametrize("who", ["stranger", "anonymous", "granted", "owner"])
def test_gated_and_private_repositories(hub: LocalHub, who: str) -> None:
    hub.add_repo("alice/gated", {"a": "1"}, gated="manual", granted={"bob"} if who == "granted" else set())
    hub.add_repo("alice/private", {"a": "1"}, private=True)
    token = {"anonymous": None, "owner": hub.token}.get(who, hub.other_token)
    code = """
from huggingface_hub import list_models
names = "alice/gated", "alice/private"
result = [attempt(lambda: Path(hf_hub_download(name, "a")).read_text()) for name in names]
result += [attempt(lambda: api.model_info("alice/gated").gated), attempt(api.auth_check, "alice/gated")]
result += [[model.id for model in list_models()]]
"""
    gated, private, state, check, listed = ask(hub, code, token=token)
    allowed, refused = who in ("granted", "owner"), ["GatedRepoError", 401 if who == "anonymous" else 403]
    missing = ["RepositoryNotFoundError", 401 if who == "anonymous" else 404]
    assert gated == ("1" if allowed else refused)
    assert private == ("1" if who == "owner" else missing)
    assert (state, check) == ("manual", None if allowed else refused)
    assert listed == ["alice/gated", *(["alice/private"] if who == "owner" else [])]


def test_listings_and_collections(hub: LocalHub) -> None:
    for number in range(5):
        hub.add_repo(f"alice/adapter-{number}", {"README.md": CARD})
    hub.add_repo("bob/generator", {"README.md": CARD.replace("peft", "lora-factory")})
    hub.add_repo("alice/zoo", {"README.md": "---\ntags: [lora-factory]\n---\n"}, repo_type="dataset")
    result = ask(
        hub,
        """
def models(**query):
    return [model.id for model in api.list_models(**query)]

made = api.create_collection("My LoRAs!", namespace="alice", description="d", private=False)
added = api.add_collection_item(made.slug, "bob/generator", "model", note="n")
api.add_collection_item(made.slug, "alice/zoo", "dataset")
api.add_collection_item(made.slug, "alice/zoo", "dataset", exists_ok=True)
full = api.get_collection(made.slug)
result = {
    "all": len(models()), "author": models(author="bob"), "search": models(search="GENER"),
    "filter": models(filter=["base_model:adapter:alice/base", "lora-factory"], search="3"),
    "library": models(filter="lora-factory", author="bob"), "none": models(filter="none"),
    "limit": len(models(limit=2)),
    "card": next(iter(api.list_models(cardData=True))).card_data.license,
    "plain": next(iter(api.list_models())).card_data,
    "data": [data.id for data in api.list_datasets(filter="lora-factory")],
    "items": [[item.item_id, item.item_type, item.note, item.position] for item in full.items],
    "slug": made.slug.startswith("alice/my-loras-"), "owned": [c.title for c in api.list_collections(owner="alice")],
    "again": attempt(api.create_collection, "My LoRAs!", namespace="alice"),
    "same": api.create_collection("My LoRAs!", namespace="alice", exists_ok=True).slug == made.slug,
    "twice": attempt(api.add_collection_item, made.slug, "alice/zoo", "dataset"),
    "missing": [attempt(api.get_collection, "alice/none"),
                attempt(api.add_collection_item, made.slug, "alice/none", "model")],
}
""",
    )
    assert (result["all"], result["author"], result["search"]) == (6, ["bob/generator"], ["bob/generator"])
    assert (result["filter"], result["library"], result["none"]) == (["alice/adapter-3"], ["bob/generator"], [])
    assert (result["limit"], result["card"], result["plain"], result["data"]) == (2, "mit", None, ["alice/zoo"])
    assert result["items"] == [["bob/generator", "model", "n", 0], ["alice/zoo", "dataset", None, 1]]
    assert (result["slug"], result["owned"], result["same"]) == (True, ["My LoRAs!"], True)
    assert result["again"] == result["twice"] == ["HfHubHTTPError", 409]
    assert [status for _, status in result["missing"]] == [404, 404]


def test_pages_follow_their_links(hub: LocalHub) -> None:
    for number in range(5):
        hub.add_repo(f"alice/model-{number}")
    result = hub.evaluate(
        """
        import os
        from huggingface_hub.utils import build_hf_headers
        from huggingface_hub.utils._pagination import paginate
        url, query = os.environ["HF_ENDPOINT"] + "/api/models", {"limit": 2, "author": "alice"}
        result = [model["id"] for model in paginate(url, query, build_hf_headers())]
        """
    )
    assert result == [f"alice/model-{number}" for number in range(5)]
    assert len(hub.log.matching("/api/models")) == 3


def test_cards_are_checked(hub: LocalHub) -> None:
    hub.add_repo("alice/model")
    index = "model-index: [{name: m, results: [{task: {type: t}, dataset: {type: d, name: d}, metrics: []}]}]\n"
    bad = ["a: [", "license: Apache License 2.0", "base_model: ./base", "tags: {a: b}", index.replace("task", "tsk")]
    result = ask(
        hub,
        f"""
from huggingface_hub import metadata_update
good = ModelCard({CARD!r}.replace("tags:", {index!r} + "tags:"))
good.validate()
good.push_to_hub("alice/model")
metadata_update("alice/model", {{"tags": ["more"]}}, overwrite=True)
class Raw(ModelCard):
    def __init__(self, text):
        self.text = text
    def __str__(self):
        return self.text
result = [attempt(Raw(f"---\\n{{text}}\\n---\\n").validate) for text in {bad!r}]
result += [sorted(ModelCard.load("alice/model").data.tags)]
""",
    )
    assert result == [["ValueError", None]] * 5 + [["more"]]


def test_failures_that_pass(hub: LocalHub, tmp_path: Path) -> None:
    weights = bytes(1_000_000)
    (tmp_path / "w.safetensors").write_bytes(weights)
    hub.add_repo("alice/model")
    hub.fail("/storage/", "PUT", drop="upload", times=2)
    hub.fail("/objects/batch", status=500, times=2)
    hub.fail("/resolve/", "HEAD", status=503)
    result = ask(
        hub,
        f"""
file = {str(tmp_path / "w.safetensors")!r}
api.upload_file(repo_id="alice/model", path_or_fileobj=file, path_in_repo="w.safetensors")
result = Path(hf_hub_download("alice/model", "w.safetensors")).read_bytes() == bytes(1_000_000)
""",
        waits=False,
    )
    assert result
    assert hub.files("alice/model") == {"w.safetensors": weights}
    assert [line.status for line in hub.log.matching("/storage/", "PUT")] == [0, 0, 200]
    assert [line.status for line in hub.log.matching("/objects/batch")] == [500, 500, 200]
    assert [line.status for line in hub.log.matching("/resolve/", "HEAD")] == [503, 302]


def test_a_broken_download_is_resumed(hub: LocalHub) -> None:
    content = bytes(range(256)) * 100_000  # the client keeps what it has in pieces of 10 MiB
    hub.add_repo("alice/model", {"w.safetensors": content})
    hub.fail("/storage/", "GET", drop="download")
    code = "result = Path(hf_hub_download('alice/model', 'w.safetensors')).read_bytes() == bytes(range(256)) * 100_000"
    assert ask(hub, f"{code}", waits=False)
    first, second = hub.log.matching("/storage/", "GET")
    assert "range" not in first.headers
    assert second.headers["range"] == f"bytes={10 * 2**20}-"


def test_failures_that_last(hub: LocalHub) -> None:
    hub.add_repo("alice/model", {"a": "1"})
    push = "attempt(api.upload_file, repo_id='alice/model', path_or_fileobj=bytes(9000), path_in_repo='w.bin')"
    for how in ({"pattern": "/storage/", "drop": "upload"}, {"pattern": "/commit/", "status": 500}):
        fault = hub.fail(**how, times=None)
        error, _ = ask(hub, f"result = {push}", waits=False)
        assert error in ("RuntimeError", "HfHubHTTPError")
        assert hub.files("alice/model") == {"a": b"1"}, "half of it was pushed"
        hub.faults.remove(fault)
    hub.fail("/commit/", drop="download")
    assert ask(hub, f"result = {push}") == ["RemoteProtocolError", None]
    assert set(hub.files("alice/model")) == {"a", "w.bin"}, "only the answer was to be lost"
    hub.fail("/resolve/", status=403, code="GatedRepo", times=None)
    assert ask(hub, "result = attempt(hf_hub_download, 'alice/model', 'a')") == ["GatedRepoError", 403]


def test_slow_answers_and_offline_mode_use_the_cache(hub: LocalHub) -> None:
    hub.add_repo("alice/model", {"a": "1"})
    home, code = hub.home(), "result = Path(hf_hub_download('alice/model', 'a')).read_text()"
    assert ask(hub, code, home=home) == "1"
    hub.commit("alice/model", {"a": "2"})
    hub.fail("/resolve/", "HEAD", delay=1.5)
    assert ask(hub, code, home=home, HF_HUB_ETAG_TIMEOUT="1") == "1"
    hub.log.clear()
    assert ask(hub, code, home=home, HF_HUB_OFFLINE="1") == "1"
    assert not hub.log
    assert ask(hub, code, home=home) == "2"


def test_the_storage_checks_what_it_takes_and_sends_parts(hub: LocalHub) -> None:
    hub.add_repo("alice/model", {"w.bin": b"abcdef"})
    address = f"/storage/{next(iter(hub.large_files))}"

    def request(method: str, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(hub.endpoint.removeprefix("http://"))
        connection.request(method, address, b"other" if method == "PUT" else None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    assert request("PUT")[0] == 400
    parts = [request("GET", Range=f"bytes={part}") for part in ("1-2", "4-", "-3", "2-99", "6-")]
    assert parts == [(206, b"bc"), (206, b"ef"), (206, b"def"), (206, b"cdef"), (416, b"")]
    assert request("GET") == (200, b"abcdef")


@pytest.mark.slow
def test_data_sets_load(hub: LocalHub) -> None:
    import pyarrow
    from pyarrow import parquet

    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), table)
    hub.add_repo("alice/parquet", {"data/train-0.parquet": table.getvalue()}, repo_type="dataset")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in "abc")
    card = "---\nconfigs:\n- config_name: x\n  data_files: [{split: train, path: x/*.jsonl}]\n---\n"
    hub.add_repo("alice/lines", {"x/1.jsonl": lines, "README.md": card}, repo_type="dataset")
    result = hub.evaluate(
        """
        from datasets import Dataset, load_dataset
        Dataset.from_dict({"text": ["d"]}).push_to_hub("alice/pushed", private=True)
        streamed = load_dataset("alice/lines", "x", split="train", streaming=True)
        whole = [load_dataset(*name)["train"] for name in (["alice/parquet"], ["alice/lines", "x"], ["alice/pushed"])]
        result = [[row["text"] for row in rows] for rows in (*whole, streamed)]
        """
    )
    assert result == [["a", "b"], ["a", "b", "c"], ["d"], ["a", "b", "c"]]


@pytest.mark.slow
def test_models_and_adapters_come_back_to_the_bit(hub: LocalHub) -> None:
    code = """
    import torch
    from huggingface_hub import HfApi
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = torch.arange(8)[None]
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    model.push_to_hub("alice/base")
    model.push_to_hub("alice/base", revision="dev", create_pr=False)
    pull = model.push_to_hub("alice/base", create_pr=True, tags=["new"])
    base = AutoModelForCausalLM.from_pretrained("alice/base", revision="dev")
    adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")).eval()
    adapted.push_to_hub("alice/adapter")
    again = AutoPeftModelForCausalLM.from_pretrained("alice/adapter").eval()
    with torch.no_grad():
        result = [
            torch.equal(AutoModelForCausalLM.from_pretrained("alice/base")(tokens).logits, model(tokens).logits),
            torch.equal(again(tokens).logits, adapted(tokens).logits),
            torch.equal(again(tokens).logits, model(tokens).logits),
            pull.pr_revision, HfApi().model_info("alice/adapter").config,
            HfApi().model_info("alice/base").library_name,
        ]
    """
    same_base, same_adapter, adapter_is_base, pull, config, library = hub.evaluate(code)
    assert (same_base, same_adapter, adapter_is_base) == (True, True, False)
    assert (pull, library) == ("refs/pr/1", "transformers")
    assert config["peft"]["base_model_name_or_path"] == "alice/base"
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("alice/adapter"))
    assert {"main", "dev", "refs/pr/1"} == set(hub.repos["model", "alice/base"].branches)
