"""The Hub: push a folder in one commit, fill collections, search; all that talks to ``HfApi`` besides loading."""

from __future__ import annotations

import glob
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import httpx2
from huggingface_hub import CommitInfo, HfApi, get_token, is_offline_mode, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from lora_factory import __version__
from lora_factory.errors import LoraFactoryError
from lora_factory.files import write_text
from lora_factory.hub_errors import LOG_IN, explain
from lora_factory.model_card import keep_handwritten
from lora_factory.safe_files import MAX_CONFIG_BYTES, checked_file, is_hub_id

CARD_FILE = "README.md"
OPTIONAL_FILES = ("comparison.json", "headroom.svg", "condition.safetensors")  # a push without them removes old ones
Writer = Callable[[Path, str], None]  # fills an empty folder, given the repository's full name, with a card in it
_REQUEST_SECONDS = 10.0


class PushOptions(TypedDict, total=False):
    """How something is pushed.

    Attributes:
        private: Whether a new repository is private; default: what its namespace says.
        revision: Branch to push to, made if it is not there; default: main.
        commit_message: First line of the commit.
        create_pr: Propose the commit as a pull request; the repository must exist.
        token: Access token; default: the one that ``hf auth login`` stored.
    """

    private: bool | None
    revision: str | None
    commit_message: str | None
    create_pr: bool
    token: str | bool | None


def push(
    write: Writer,
    repo_id: str,
    *,
    default_message: str,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> CommitInfo:
    """Write a folder and upload it in one commit.

    Args:
        write: Fills the folder.
        repo_id: Hub id; without a namespace it is put into the user's own.
        default_message: First line of the commit, if ``commit_message`` is None.
        repo_type: "model" or "dataset".
        private: See `PushOptions`, also for the rest.
        revision: Branch.
        commit_message: First line of the commit.
        create_pr: Propose it as a pull request.
        token: Access token.

    Returns:
        The commit.

    Raises:
        LoraFactoryError: With the reason and, once it is written, the folder, which is kept.
    """
    api = _api(token)
    if not is_hub_id(repo_id):
        raise LoraFactoryError(f"repo_id={repo_id!r} is no Hub id; write user/name")
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
    if "/" not in repo_id:
        with _hub_errors(repo_id, "nothing was pushed"):
            where["repo_id"] = f"{api.whoami()['name']}/{repo_id}"
    folder = Path(tempfile.mkdtemp(prefix="lora-factory-push-"))
    try:
        write(folder, where["repo_id"])
    except BaseException:
        shutil.rmtree(folder)
        raise
    again = f"hf upload {where['repo_id']} {folder} --repo-type {repo_type}"
    kept = f"a commit arrives whole or not at all; the files are kept in {folder}, push them again with: {again}"
    with _hub_errors(where["repo_id"], kept):
        if not create_pr:
            where["repo_id"] = api.create_repo(**where, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(**where, branch=revision, exist_ok=True)
        old = _current_card(api, where, revision)
        if old is not None:
            card = folder / CARD_FILE
            write_text(card, keep_handwritten(card.read_text(encoding="utf-8"), old.read_text(encoding="utf-8")))
        commit = api.upload_folder(
            **where,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message or f"{default_message} with lora-factory {__version__}",
            create_pr=create_pr,
            parent_commit=old.parent.name if old else None,  # what others wrote into the card since is not lost
            delete_patterns=list(OPTIONAL_FILES),
        )
    shutil.rmtree(folder)
    return commit


def preview(write: Writer, repo_id: str) -> tuple[dict[str, int], str]:
    """What a push would upload: the size in bytes of every file, and the card."""
    with tempfile.TemporaryDirectory(prefix="lora-factory-") as name:
        folder = Path(name)
        write(folder, repo_id)
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        return dict(sorted(files.items())), (folder / CARD_FILE).read_text(encoding="utf-8")


@dataclass(frozen=True)
class FoundGenerator:
    """A generator on the Hub.

    Attributes:
        repo_id: Its Hub id.
        commit: The newest commit.
        downloads: Downloads in the last 30 days.
        license: Its licence, as its card says.
    """

    repo_id: str
    commit: str | None
    downloads: int
    license: str


def search_generators(base_model: str, *, token: str | bool | None = None) -> list[FoundGenerator]:
    """Find the generators for a base model, those with the most downloads first.

    Args:
        base_model: Hub id of the base model.
        token: Access token, for private ones.

    Raises:
        LoraFactoryError: When the Hub cannot be asked.
    """
    if not is_hub_id(base_model):
        raise LoraFactoryError(f"base_model={base_model!r} is no Hub id; write user/name")
    wanted = ["lora-factory", "adapter-generation", f"base_model:adapter:{base_model}"]
    with _hub_errors(base_model, "nothing was searched", "search for generators for"):
        found = list(HfApi(token=token).list_models(filter=wanted, full=True))
    return sorted(
        (FoundGenerator(model.id, model.sha, model.downloads or 0, _license_tag(model.tags or [])) for model in found),
        key=lambda generator: (-generator.downloads, generator.repo_id),
    )


def collect_repositories(title: str, repo_ids: Sequence[str], **options: Unpack[PushOptions]) -> str:
    """Put repositories of models into a collection, made if it is not there; returns its address."""
    api, namespace = _api(options.get("token")), repo_ids[0].split("/")[0]
    with _hub_errors(title, f"the repositories {', '.join(repo_ids)} are there", "fill the collection"):
        private = bool(options.get("private"))
        collection = api.create_collection(title, namespace=namespace, private=private, exists_ok=True)
        for repo_id in repo_ids:
            api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
    return collection.slug


def download_files(
    repo_id: str,
    limit_of: Callable[[str], int],
    *,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
) -> Path:
    """Download the files of a repository that are wanted, all of one commit; their sizes are checked before.

    Args:
        repo_id: Hub id.
        limit_of: The most bytes that the file of a name may have; 0 when it is not wanted.
        repo_type: "model" or "dataset".
        revision: Branch, tag or commit.
        token: Access token.

    Returns:
        Their folder in the Hub's cache, which has the commit as its name.

    Raises:
        LoraFactoryError: When a file is too large, none is wanted, or the Hub refuses or cannot be reached.
    """
    if not is_hub_id(repo_id):
        raise LoraFactoryError(f"{repo_id!r} is neither a folder nor a Hub id; write user/name")
    api, names = HfApi(token=token), []
    with _hub_errors(repo_id, "what has arrived is kept, the same call continues", "download"):
        about: Any = api.repo_info(repo_id, repo_type=repo_type, revision=revision, files_metadata=True)
        for file in about.siblings or []:
            if limit := limit_of(file.rfilename):
                if file.size is None or file.size > limit:
                    raise LoraFactoryError(
                        f"{repo_id}: {file.rfilename} has {file.size} bytes, at most {limit} are expected; "
                        "nothing is downloaded"
                    )
                names.append(glob.escape(file.rfilename))
        if not names:
            raise LoraFactoryError(f"{repo_id} has none of the files that are expected; check the id and the revision")
        where: dict[str, Any] = {"repo_type": repo_type, "revision": about.sha, "token": token}
        return Path(snapshot_download(repo_id, allow_patterns=names, **where))


def license_of(model: str, token: str | bool | None = None) -> str | None:
    """The licence in the card of a model on the Hub; None if there is none or the Hub does not tell."""
    try:
        card = HfApi(token=token).model_info(model, timeout=_REQUEST_SECONDS).card_data
    except (httpx2.HTTPError, OSError, ValueError):
        return None
    values = card.to_dict() if card else {}
    license = values.get("license_name") if values.get("license") == "other" else values.get("license")
    return license if isinstance(license, str) else None


def _api(token: str | bool | None) -> HfApi:
    """A client that can write."""
    if is_offline_mode():
        raise LoraFactoryError("cannot push in offline mode; unset HF_HUB_OFFLINE")
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise LoraFactoryError(f"there is no access token to push with; {LOG_IN}")
    return HfApi(token=token, library_name="lora-factory", library_version=__version__)


def _current_card(api: HfApi, where: Mapping[str, Any], revision: str | None) -> Path | None:
    """The card that a push would replace, in the folder of its commit."""
    try:
        path = Path(api.hf_hub_download(**where, filename=CARD_FILE, revision=revision))
    except EntryNotFoundError:
        return None
    return checked_file(path.parent, CARD_FILE, MAX_CONFIG_BYTES)


@contextmanager
def _hub_errors(name: str, state: str, doing: str = "push to") -> Iterator[None]:
    """Turn whatever the Hub's client raises into our error, which says why, and what state things are in."""
    try:
        yield
    except LoraFactoryError:
        raise
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise LoraFactoryError(f"cannot {doing} {name}: {explain(error, name)}; {state}") from error


def _license_tag(tags: Sequence[str]) -> str:
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "unknown")
