"""Turn errors of the Hub into sentences that say what to do."""

from __future__ import annotations

import httpx2
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LOG_IN = "log in with: hf auth login, or set HF_TOKEN"
_BY_STATUS = {
    401: f"the access token is missing or not valid; {LOG_IN}",
    403: "the access token may not do this; use a token with the role 'write' of a member of that namespace, or "
    "propose the change with create_pr=True",
    404: "there is no such repository, or it is private and the access token may not see it; check the id",
    409: "it collides with what is there already; choose another name, or try again",
    412: "somebody has committed since; try again",
    413: "it is too large for the Hub; see its limits on the size of files and repositories",
    429: "too many requests; wait a few minutes and try again",
}


def explain(error: BaseException, repo_id: str) -> str:
    """Say why a call of huggingface_hub failed and what fixes it.

    Args:
        error: What it raised.
        repo_id: The repository that it was about.
    """
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "offline mode is on; unset HF_HUB_OFFLINE, or leave out local_files_only"
    if isinstance(error, LocalTokenNotFoundError):
        return f"there is no access token; {LOG_IN}"
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated; ask for access on its page on the Hub, and {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision; name a branch, tag or commit of it"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return f"{_first_line(error)} {explain(error.__cause__, repo_id)}"  # the client says what failed, and not why
    if isinstance(error, LocalEntryNotFoundError):
        if isinstance(error.__cause__, HfHubHTTPError):
            return explain(error.__cause__, repo_id)
        return f"it is not in the cache and the Hub cannot be reached ({error.__cause__ or error}); check the network"
    if isinstance(error, EntryNotFoundError):
        return f"{repo_id} lacks a file ({_first_line(error)})"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {repo_id}, or it is private; check the id, or {LOG_IN}"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hint = _BY_STATUS.get(status, "the Hub has a problem; try again later" if status >= 500 else "")
        if status == 403 and error.response.request.method in ("GET", "HEAD"):
            hint = f"you may not read it; ask its owner for access, and {LOG_IN}"
        return f"the Hub answers {status} ({error.server_message or _first_line(error)}); {hint}".rstrip("; ")
    if isinstance(error, httpx2.HTTPError | ConnectionError):
        return f"the connection to the Hub failed ({_first_line(error) or type(error).__name__}); check the network"
    if isinstance(error, LookupError | TypeError | AttributeError):
        return f"the Hub gave an answer that is not understood ({type(error).__name__}: {error}); try again later"
    return " ".join(str(error).split())[:1000] or type(error).__name__


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
