"""The Hub: push a folder in one commit, fill collections, search; all that talks to ``HfApi`` besides loading."""

from __future__ import annotations

import glob
import json
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

import httpx2
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    is_offline_mode,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from safetensors import SafetensorError

from lora_factory._version import __version__
from lora_factory.errors import LoraFactoryError, StorageError
from lora_factory.hub.cards import CARD_FILE, has_handwriting, keep_handwritten
from lora_factory.hub.errors import LOG_IN, explain
from lora_factory.utils.files import share_file, write_text
from lora_factory.utils.safe_files import MAX_CONFIG_BYTES, checked_file, is_hub_id, reading

if TYPE_CHECKING:
    from lora_factory.adapters.layout import AdapterLayout


# Fills an empty folder, given the repository's full name, with a card in it; returns the names of the links that it
# made there and checked, if it made any.
Writer = Callable[[Path, str], Collection[str] | None]
Result = TypeVar("Result")
_REQUEST_SECONDS = 10.0
_WAITS = (1.0, 2.0, 4.0, 8.0, 8.0)  # seconds before each repetition of a request, as in huggingface_hub.utils
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_PASSING_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError, json.JSONDecodeError)


class PushOptions(TypedDict, total=False):
    """Options of a push.

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


@dataclass(frozen=True)
class OwnFiles:
    """The files of one kind of repository: what a push of that kind removes where it no longer holds them.

    Attributes:
        sign: Pattern of a file that a pushed folder of the kind holds.
        depth: How many folders below the repository's root the files are.
        marks: The files that a folder of the repository must all hold, to count as one that this package wrote.
        names: The files of such a folder that are this package's; all others are somebody else's.
    """

    sign: str
    depth: int
    marks: tuple[str, ...]
    names: tuple[str, ...]

    def found_in(self, files: Collection[str]) -> set[str]:
        """Select the files of a repository that a push of this kind wrote."""
        folders = {path[: -len(self.marks[0])] for path in files if path.count("/") == self.depth}
        ours = [folder for folder in folders if all(folder + mark in files for mark in self.marks)]
        return {folder + name for folder in ours for name in self.names if folder + name in files}


_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
OWN_FILES = (
    OwnFiles(
        "config.json", 0, ("model.safetensors", "config.json"), ("comparison.json", "headroom.svg", "training.json")
    ),
    OwnFiles("generation.json", 0, ("generation.json", "adapter_config.json"), ("condition.safetensors",)),
    OwnFiles(
        "[^/]+/generation.json",
        1,
        ("generation.json", "adapter_config.json"),
        (*_ADAPTER, "generation.json", "condition.safetensors", CARD_FILE),
    ),
    OwnFiles(
        "zoo.json",
        2,
        ("run.json", "adapter_config.json"),
        (*_ADAPTER, "checkpoints.safetensors", "run.json", "import.json"),
    ),
)


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
    """Write a folder and upload it in one commit, on top of the commit whose files were looked at.

    The same commit removes what earlier pushes of this kind left in the repository and this one does not hold, see
    `OWN_FILES`. What people wrote into cards stays.

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
        KeyboardInterrupt: With the folder, which is kept, when Ctrl-C ends the upload.
    """
    api = _api(token)
    if not is_hub_id(repo_id):
        raise LoraFactoryError(f"repo_id={repo_id!r} is no Hub id; write user/name")
    if create_pr and revision not in (None, "main"):
        raise LoraFactoryError(f"create_pr=True proposes a change of main; leave out revision={revision!r}")
    where: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
    if "/" not in repo_id:
        with _hub_errors(repo_id, "nothing was pushed"):
            where["repo_id"] = f"{_patiently(api.whoami)['name']}/{repo_id}"
    folder = _written(write, where["repo_id"])
    kept = f"a commit arrives whole or not at all; the files are kept in {folder}, the same call pushes them again"
    message = commit_message or f"{default_message} with lora-factory {__version__}"
    try:
        with _hub_errors(where["repo_id"], kept):
            if not create_pr:
                where["repo_id"] = _patiently(lambda: api.create_repo(**where, private=private, exist_ok=True)).repo_id
                if revision is not None and not revision.startswith("refs/"):
                    _patiently(lambda: api.create_branch(**where, branch=revision, exist_ok=True))
            commit = _upload(api, where, folder, message, private, revision, create_pr)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"the push to {where['repo_id']} was interrupted; {kept}") from error
    shutil.rmtree(folder.parent, ignore_errors=True)
    return commit


def preview(write: Writer, repo_id: str) -> tuple[dict[str, int], str]:
    """Make what a push would upload, without uploading it: the size in bytes of every file, and the card."""
    folder = _written(write, repo_id)
    try:
        files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        return dict(sorted(files.items())), (folder / CARD_FILE).read_text(encoding="utf-8")
    finally:
        shutil.rmtree(folder.parent, ignore_errors=True)


def _written(write: Writer, repo_id: str) -> Path:
    """A new folder, in one of its own, that ``write`` has filled.

    Raises:
        LoraFactoryError: When it cannot be written, or holds a link that ``write`` has not checked.
    """
    try:
        outer = Path(tempfile.mkdtemp(prefix="lora-factory-push-"))
    except OSError as error:
        raise LoraFactoryError(
            f"there is no folder for temporary files ({error}); set TMPDIR to one that can be written to"
        ) from error
    folder = outer / repo_id.split("/")[-1]
    try:
        folder.mkdir()
        links = set(write(folder, repo_id) or ())
        for path in folder.rglob("*"):
            if path.is_symlink():
                if path.relative_to(folder).as_posix() not in links:
                    raise LoraFactoryError(f"{path.relative_to(folder)} is a link to {path.resolve()}; not pushed")
            elif path.is_file():
                share_file(path)
    except (OSError, SafetensorError, StorageError) as error:
        shutil.rmtree(outer, ignore_errors=True)
        reason = error.__cause__ or error
        raise LoraFactoryError(
            f"cannot write the files to be pushed into {folder} ({reason}); free space there, or set TMPDIR to "
            "another folder; nothing was pushed"
        ) from error
    except BaseException:
        shutil.rmtree(outer, ignore_errors=True)
        raise
    return folder


def _upload(
    api: HfApi,
    where: Mapping[str, Any],
    folder: Path,
    message: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Commit a folder on top of the head of a branch, whose cards are merged and whose old files of ours go."""
    about: Any = _patiently(lambda: api.repo_info(**where, revision=revision, timeout=_REQUEST_SECONDS))
    if private and not about.private:
        warnings.warn(
            f"{where['repo_id']} is there already and public; private=True is for new repositories, so it stays public"
            " until you make it private in its settings",
            stacklevel=4,
        )
    parent = about.sha
    there = _files_of(api, where, parent) if parent else {}
    pushed = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    if lost := next((name for name, path in pushed.items() if not path.is_file()), None):  # a link to what is gone
        raise LoraFactoryError(f"{lost} was removed while it was being pushed; nothing is pushed; push again")
    kinds = [kind for kind in OWN_FILES if any(re.fullmatch(kind.sign, name) for name in pushed)]
    gone = {name for kind in kinds for name in kind.found_in(there)} - set(pushed)
    for name in sorted(name for name in {*pushed, *gone} & set(there) if name.split("/")[-1] == CARD_FILE):
        path = Path(_patiently(partial(api.hf_hub_download, **where, filename=name, revision=parent)))
        with reading(path, "mend it on the Hub"):
            old = checked_file(path.parent, CARD_FILE, MAX_CONFIG_BYTES).read_text(encoding="utf-8")
            if name in pushed:
                write_text(pushed[name], keep_handwritten(pushed[name].read_text(encoding="utf-8"), old))
            elif has_handwriting(old):
                gone.discard(name)
    additions = [CommitOperationAdd(name, str(path)) for name, path in sorted(pushed.items())]
    api.preupload_lfs_files(**where, additions=additions, free_memory=False, revision=revision, create_pr=create_pr)
    deletions = [CommitOperationDelete(name, is_folder=False) for name in sorted(gone)]
    return _Commit(api, where, (*deletions, *additions), message, parent, revision, create_pr).send()


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
    wanted = ["lora-factory", "adapter-generation", f"base_model:{base_model}"]
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
        collection = _patiently(
            lambda: api.create_collection(title, namespace=namespace, private=private, exists_ok=True)
        )
        for repo_id in repo_ids:
            _patiently(partial(api.add_collection_item, collection.slug, repo_id, "model", exists_ok=True))
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
    api, names, state = HfApi(token=token), [], "what has arrived is kept, the same call continues"
    with _hub_errors(repo_id, state, "download"):
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
    with _hub_errors(repo_id, state, "download"):
        return Path(snapshot_download(repo_id, allow_patterns=names, **where))


def about_model(model: str, token: str | bool | None = None) -> tuple[str | None, dict[str, Any] | None]:
    """The licence in the card of a model on the Hub, and the head of its configuration; None where that is unknown."""
    try:
        about = HfApi(token=token).model_info(model, timeout=_REQUEST_SECONDS)
    except (httpx2.HTTPError, OSError, ValueError):
        return None, None
    values = about.card_data.to_dict() if about.card_data else {}
    license = values.get("license_name") if values.get("license") == "other" else values.get("license")
    config = about.config if about.config and "model_type" in about.config else None
    return license if isinstance(license, str) else None, config


def _api(token: str | bool | None) -> HfApi:
    """A client that can write."""
    if is_offline_mode():
        raise LoraFactoryError("cannot push in offline mode; unset HF_HUB_OFFLINE")
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise LoraFactoryError(f"there is no access token to push with; {LOG_IN}")
    return HfApi(token=token, library_name="lora-factory", library_version=__version__)


def _patiently(request: Callable[[], Result]) -> Result:
    """Make a request that may be made twice, again after failures that pass, as the client does with most others."""
    for wait in _WAITS:
        try:
            return request()
        except (*_PASSING_ERRORS, HfHubHTTPError) as error:
            if not _passes(error):
                raise
            time.sleep(max(wait, _asked_wait(error)))
    return request()


def _passes(error: Exception) -> bool:
    """Return whether a request may succeed when it is made again."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING_STATUS
    return isinstance(error, _PASSING_ERRORS)


def _asked_wait(error: Exception) -> float:
    """The seconds that the Hub asks to wait before the next request."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(asked) if asked.isdecimal() else 0.0


def _files_of(api: HfApi, where: Mapping[str, Any], revision: str) -> dict[str, RepoFile]:
    """All files of a commit, by path; the client repeats these requests itself."""
    entries = api.list_repo_tree(**where, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


@dataclass(frozen=True)
class _Commit:
    """A commit that is to follow ``parent``."""

    api: HfApi
    where: Mapping[str, Any]
    operations: Sequence[CommitOperationAdd | CommitOperationDelete]
    message: str
    parent: str | None
    revision: str | None
    create_pr: bool

    def send(self) -> CommitInfo:
        """Commit once: after a failure that passes, see whether the commit has arrived before it is sent again.

        An answer that is lost says nothing of the commit. ``parent`` keeps a request that is still on its way from
        being carried out after the next one.
        """
        options: dict[str, Any] = {"operations": self.operations, "commit_message": self.message}
        options |= {"parent_commit": self.parent, "revision": self.revision, "create_pr": self.create_pr}
        maybe_there = False
        for wait in (*_WAITS, None):
            try:
                return self.api.create_commit(**self.where, **options)
            except (*_PASSING_ERRORS, HfHubHTTPError) as error:
                raced = isinstance(error, HfHubHTTPError) and error.response.status_code == 412
                maybe_there = maybe_there or _passes(error)
                if not (_passes(error) or (raced and maybe_there)):
                    raise
                try:
                    arrived = self._arrived()
                except (httpx2.HTTPError, OSError, ValueError) as unknown:
                    raise LoraFactoryError(
                        f"{explain(error, self.where['repo_id'])}; whether the commit has arrived is not known, since "
                        f"the Hub does not say; look at {self._url}/commits/{self.revision or 'main'} first"
                    ) from unknown
                if arrived is not None:
                    return arrived
                if raced or wait is None:
                    raise
                time.sleep(max(wait, _asked_wait(error)))
        raise AssertionError("unreachable")

    @property
    def _url(self) -> str:
        kind = self.where["repo_type"]
        return f"{self.api.endpoint}/{'' if kind == 'model' else kind + 's/'}{self.where['repo_id']}"

    def _arrived(self) -> CommitInfo | None:
        """The commit that follows ``parent``, if it leaves the repository as these operations do."""
        api, parent = self.api, self.parent
        branches: dict[str, str | None] = {self.revision or "main": None}
        if self.create_pr:
            discussions = api.get_repo_discussions(**self.where)
            pulls = [it for it in discussions if it.is_pull_request and it.title == self.message]
            branches = {f"refs/pr/{pull.num}": f"{self._url}/discussions/{pull.num}" for pull in pulls}
        for branch, pull_url in branches.items():
            history = [commit.commit_id for commit in api.list_repo_commits(**self.where, revision=branch)]
            if parent is not None and parent not in history:
                continue
            place = len(history) if parent is None else history.index(parent)
            if place > 0 and _holds(_files_of(api, self.where, history[place - 1]), self.operations):
                commit = history[place - 1]
                return CommitInfo(f"{self._url}/commit/{commit}", self.message, "", commit, api.endpoint, pull_url)
        return None


def _holds(files: Mapping[str, RepoFile], operations: Sequence[CommitOperationAdd | CommitOperationDelete]) -> bool:
    """Return whether a commit has all that these operations add, and nothing that they delete."""
    for operation in operations:
        file = files.get(operation.path_in_repo)
        if isinstance(operation, CommitOperationDelete):
            if file is not None:
                return False
        elif file is None:
            return False
        elif file.lfs is not None:
            if file.lfs.sha256 != operation.upload_info.sha256.hex():
                return False
        else:
            with operation.as_file() as content:
                if file.blob_id != git_hash(content.read()):
                    return False
    return True


@contextmanager
def _hub_errors(name: str, state: str, doing: str = "push to") -> Iterator[None]:
    """Turn whatever the Hub's client raises into our error, which says why, and what state things are in."""
    try:
        yield
    except Exception as error:  # also what the client stumbles over in an answer that it does not know
        raise LoraFactoryError(f"cannot {doing} {name}: {explain(error, name)}; {state}") from error


def _license_tag(tags: Sequence[str]) -> str:
    return next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), "unknown")


def check_base_model(layout: AdapterLayout) -> None:
    """Check that others can load the base model that adapters of a layout name.

    Raises:
        LoraFactoryError: When its name is no Hub id.
    """
    name = layout.base_model
    if not is_hub_id(name):
        raise LoraFactoryError(
            f"the adapters name {name!r} as their base model, which others cannot load; collect them with "
            "base_model_name= (--base-model-name) and the public Hub id of the base model"
        )
