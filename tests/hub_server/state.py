"""What the hub of the tests holds: users, files, commits, branches, pull requests, and what a card says about them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from types import MappingProxyType
from typing import Any

import yaml

LARGE_SUFFIXES = (".arrow", ".bin", ".gguf", ".gz", ".npz", ".onnx", ".parquet", ".png", ".safetensors", ".zip")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES).encode()
MODEL_ID = r"\w[\w.-]*(/\w[\w.-]*)?"
CARD_FIELDS = {"license": r"[a-z0-9.+-]+", "library_name": r"[\w.+-]+", "pipeline_tag": r"[a-z0-9-]+"}
CARD_LISTS = {
    "base_model": MODEL_ID,
    "datasets": MODEL_ID,
    "tags": r"[^\n]+",
    "language": r"[a-z]{2,3}|code|multilingual",
}


class HubError(Exception):
    """An answer that is not a success: HTTP status, message, and the code that the clients turn into an exception."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


@dataclass(frozen=True)
class User:
    """The owner of a token."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    def belongs_to(self, namespace: str) -> bool:
        """Tell whether the namespace is the user's own or that of an organization of theirs."""
        return namespace == self.name or namespace in self.organizations


@dataclass(frozen=True)
class Blob:
    """A file's content; git holds a pointer in place of a large one."""

    content: bytes
    large: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def stored(self) -> bytes:
        pointer = f"version lfs/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode() if self.large else self.content

    @cached_property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.stored) + self.stored).hexdigest()

    @property
    def etag(self) -> str:
        """What names the content for the caches of the clients."""
        return self.sha256 if self.large else self.oid

    def describe(self, path: str) -> dict[str, Any]:
        """Return the file's entry of a tree listing."""
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.stored)}
        about = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        return about | ({"lfs": lfs} if self.large else {})


@dataclass(frozen=True)
class Commit:
    """A state of all files, with the commit it came from."""

    oid: str
    parent: Commit | None
    tree: Mapping[str, Blob]
    title: str
    message: str
    author: str
    date: str

    def describe(self) -> dict[str, Any]:
        """Return the commit's entry of a history."""
        about = {"id": self.oid, "title": self.title, "message": self.message, "date": self.date}
        return about | {"authors": [{"user": self.author}]}


@dataclass
class Pull:
    """A pull request; its commits are on the branch `ref`."""

    repo: Repo
    number: int
    title: str
    text: str
    author: str
    base: str
    start: Commit
    date: str
    status: str = "open"
    ref: str = field(init=False)

    def __post_init__(self) -> None:
        self.ref = f"refs/pr/{self.number}"

    def describe(self) -> dict[str, Any]:
        """Return the pull request's page."""
        origin = {"author": {"name": self.author}, "createdAt": self.date}
        comment = {"edited": False, "hidden": False, "latest": {"raw": self.text}}
        about = {"num": self.number, "title": self.title, "status": self.status, "isPullRequest": True, **origin}
        about |= {"repo": {"name": self.repo.repo_id, "type": self.repo.kind}, "changes": {"base": self.base}}
        return about | {
            "events": [{"id": "0", "type": "comment", "data": comment, **origin}],
            "filesWithConflicts": [],
        }


@dataclass
class Repo:
    """A repository of models, data or apps, which starts with one commit as on the real Hub."""

    repo_id: str
    kind: str = "model"
    private: bool = False
    gated: str | bool = False
    granted: set[str] = field(default_factory=set)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.namespace = self.repo_id.split("/")[0]
        self.address = self.repo_id if self.kind == "model" else f"{self.kind}s/{self.repo_id}"
        self.commit("main", {".gitattributes": Blob(GIT_ATTRIBUTES)}, "initial commit", author=self.namespace)

    def find(self, revision: str = "main") -> Commit:
        """Return the commit of a branch, tag, pull request or commit id."""
        for place in (self.branches, self.tags, self.commits):
            if revision in place:
                return place[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def refer(self, references: dict[str, Commit], name: str, revision: str) -> None:
        """Add a branch or tag; 409 where there is one."""
        if name in references:
            raise HubError(409, f"Reference already exists: {name}")
        references[name] = self.find(revision)

    def commit(
        self, branch: str, changes: Mapping[str, Blob | None], title: str, message: str = "", author: str = ""
    ) -> Commit:
        """Put changes (None deletes) on a branch."""
        parent = self.branches.get(branch)
        tree = {
            path: blob for path, blob in {**(parent.tree if parent else {}), **changes}.items() if blob is not None
        }
        names = [f"{path} {blob.oid}" for path, blob in sorted(tree.items())]
        seed = json.dumps([self.kind, self.repo_id, len(self.commits), parent.oid if parent else "", title, names])
        oid = hashlib.sha1(seed.encode()).hexdigest()
        commit = Commit(oid, parent, MappingProxyType(tree), title, message, author, now())
        self.commits[oid] = self.branches[branch] = commit
        return commit

    def history(self, revision: str) -> Iterator[Commit]:
        """Walk from a revision back to the first commit."""
        commit: Commit | None = self.find(revision)
        while commit is not None:
            yield commit
            commit = commit.parent

    def open_pull(self, title: str, text: str, author: str, base: str) -> Pull:
        """Open a pull request, with a branch that starts where its base is now."""
        start = self.find(base)
        pull = Pull(self, len(self.pulls) + 1, title, text, author, base, start, now())
        self.pulls[pull.number] = pull
        self.branches[pull.ref] = start
        return pull

    def find_pull(self, number: str) -> Pull:
        """Return a pull request."""
        if int(number) not in self.pulls:
            raise HubError(404, "Discussion not found")
        return self.pulls[int(number)]

    def merge(self, pull: Pull, author: str) -> None:
        """Carry over what a pull request changed to its base."""
        old, new = pull.start.tree, self.branches[pull.ref].tree
        changes = {path: new.get(path) for path in {**old, **new} if old.get(path) != new.get(path)}
        self.commit(pull.base, changes, pull.title, author=author)
        pull.status = "merged"

    def entries(self, revision: str) -> dict[str, dict[str, Any]]:
        """Describe every file and folder of a revision, by path."""
        tree = self.find(revision).tree
        folders = {path[: mark.start()] for path in tree for mark in re.finditer("/", path)}
        described = {path: blob.describe(path) for path, blob in tree.items()}
        for path in folders:
            inside = "".join(
                f"{name} {blob.oid}" for name, blob in sorted(tree.items()) if name.startswith(f"{path}/")
            )
            oid = hashlib.sha1(inside.encode()).hexdigest()
            described[path] = {"type": "directory", "path": path, "size": 0, "oid": oid}
        return dict(sorted(described.items()))

    def describe(self, revision: str = "main", *, blobs: bool = False) -> dict[str, Any]:
        """Return what the Hub tells about a repository: state, files, and what it reads from the card."""
        commit = self.find(revision)
        first = next(iter(self.commits.values()))
        card = card_data(text_of(commit.tree, "README.md"))
        about = {"_id": hashlib.sha1(self.address.encode()).hexdigest()[:24], "id": self.repo_id, "sha": commit.oid}
        about |= {"author": self.namespace, "createdAt": first.date, "lastModified": self.find().date}
        about |= {"private": self.private, "gated": self.gated, "disabled": False, "downloads": 0, "likes": 0}
        about |= {"siblings": [sibling(path, blob, blobs) for path, blob in sorted(commit.tree.items())]}
        about |= {"cardData": card} if card else {}
        if self.kind == "model":
            known = {"adapter_config.json": "peft", "config.json": "transformers"}
            library = next((name for file, name in known.items() if file in commit.tree), None)
            about |= {"library_name": card.get("library_name", library)}
            about |= {"pipeline_tag": card.get("pipeline_tag"), "model-index": card.get("model-index")}
            about |= {"modelId": self.repo_id, "config": model_config(commit.tree)}
        about["tags"] = card_tags(card, about, commit.tree)
        return {name: value for name, value in about.items() if value is not None}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_large(path: str, sample: bytes = b"", size: int = 0) -> bool:
    """Tell whether a file goes to the storage for large files, by name, content or size."""
    return path.endswith(LARGE_SUFFIXES) or b"\0" in sample or size > 10_000_000


def is_wanted(about: Mapping[str, Any], query: Mapping[str, list[str]]) -> bool:
    """Tell whether a listing's query asks for a repository."""
    return (
        set(query.get("filter", [])) <= set(about["tags"])
        and about["author"] in query.get("author", [about["author"]])
        and about.get("pipeline_tag") in query.get("pipeline_tag", [about.get("pipeline_tag")])
        and all(word.lower() in about["id"].lower() for word in query.get("search", []))
    )


def text_of(tree: Mapping[str, Blob], path: str) -> str:
    return tree[path].content.decode(errors="replace") if path in tree else ""


def sibling(path: str, blob: Blob, blobs: bool) -> dict[str, Any]:
    """Return a file's entry of a repository's description, in full when `blobs`."""
    lfs = {"sha256": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.stored)} if blob.large else None
    return {"rfilename": path} | ({"size": len(blob.content), "blobId": blob.oid, "lfs": lfs} if blobs else {})


def model_config(tree: Mapping[str, Blob]) -> dict[str, Any]:
    """Return the few entries of the configuration files that the Hub shows."""
    try:
        config, adapter = (json.loads(text_of(tree, name) or "{}") for name in ("config.json", "adapter_config.json"))
    except json.JSONDecodeError:
        return {}
    shown = {name: config[name] for name in ("architectures", "model_type") if name in config}
    peft = {name: adapter[name] for name in ("base_model_name_or_path", "task_type") if name in adapter}
    return shown | ({"peft": peft} if peft else {})


def as_list(value: Any) -> list[Any]:
    """Return a card's value, which may be one item or several, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def front_matter(text: str) -> str | None:
    """Return the YAML block of a card, if it has one."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    return match[1] if match else None


def card_data(text: str) -> dict[str, Any]:
    """Return the metadata of a card; empty where there is none that can be read."""
    try:
        data = yaml.safe_load(front_matter(text) or "")
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Return the errors and warnings of a card's metadata, for the mistakes that the real Hub refuses."""
    block = front_matter(text)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not isinstance(data, dict):
        return ['"metadata" must be a mapping'], []
    errors = [f'"{name}" must be a string' for name in CARD_FIELDS if not isinstance(data.get(name, ""), str)]
    for name, pattern in {**CARD_FIELDS, **CARD_LISTS}.items():
        wrong = [
            item for item in as_list(data.get(name)) if not isinstance(item, str) or not re.fullmatch(pattern, item)
        ]
        errors += [f'"{name}" with value "{item}" is not valid' for item in wrong]
    for number, model in enumerate(as_list(data.get("model-index"))):
        results = model.get("results") if isinstance(model, dict) else None
        if not isinstance(results, list) or "name" not in model:
            errors.append(f'"model-index[{number}]" needs a name and a list of results')
            continue
        for place, result in enumerate(results):
            missing = [name for name in ("task", "dataset", "metrics") if name not in result]
            errors += [f'"model-index[{number}].results[{place}].{name}" is required' for name in missing]
    return errors, []


def card_tags(card: Mapping[str, Any], about: Mapping[str, Any], tree: Mapping[str, Blob]) -> list[str]:
    """Return the tags of a repository: those of the card and those that the Hub derives."""
    relation = card.get("base_model_relation") or ("adapter" if about.get("library_name") == "peft" else "finetune")
    tags = [
        about.get("library_name"),
        *as_list(card.get("tags")),
        about.get("pipeline_tag"),
        *as_list(card.get("language")),
    ]
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in tree) else []
    for base in as_list(card.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    tags += [f"dataset:{name}" for name in as_list(card.get("datasets"))]
    tags += [f"license:{card['license']}"] if "license" in card else []
    return list(dict.fromkeys(str(tag) for tag in [*tags, "region:us"] if tag))
