"""A model hub in memory, served over HTTP on loopback, for the real client libraries to talk to.

It speaks the part of the protocol that `huggingface_hub` 2.4, `transformers`, `peft` and `datasets` use: accounts,
repositories, commits, pull requests, large files, downloads, cards, listings and collections. Large files have another
host name than the API, as on the real Hub, so that redirects and withheld credentials are exercised too. Tests prepare
and inspect it with `HubServer.add_repo`, `commit`, `files`, `fail` and `log`.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
import traceback
from collections.abc import Iterable, Mapping
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode

from hub_server.http import ROUTES, Access, Call, Fault, Handler, Reply, RequestLog, error_reply, ranged, route
from hub_server.state import Blob, Commit, HubError, Repo, User, card_problems, is_large, is_wanted, now

API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo_id>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>dataset|space)s/)?(?P<repo_id>[^/]+/[^/]+?)"
REVISION = r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)"
PULL = rf"{API}/discussions/(?P<number>[0-9]+)"
COLLECTION = "/api/collections/(?P<slug>[^/]+/[^/]+)"
OBJECT = "/storage/(?P<sha256>[0-9a-f]{64})"
DETAILS = ("siblings", "sha", "cardData", "config", "model-index")
Files = Mapping[str, bytes | str | None]


class HubServer:
    """The hub: `with HubServer() as hub:` serves it; its public methods prepare and inspect it without a request."""

    def __init__(self) -> None:
        """Make a hub with no repositories and three tokens: two of alice's, one of bob's, who is a stranger to her."""
        self.token, self.read_token, self.other_token = "hf_alice_write", "hf_alice_read", "hf_bob_write"
        alice = {"name": "alice", "organizations": ("wonderland",)}
        users = (User(**alice), User(**alice, role="read"), User("bob"))
        self.users = dict(zip((self.token, self.read_token, self.other_token), users, strict=True))
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.log = RequestLog()
        self.mistakes: list[str] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self.storage = f"http://localhost:{self._http.server_port}/storage"

    def __enter__(self) -> HubServer:
        """Start to serve, on a free port."""
        threading.Thread(target=partial(self._http.serve_forever, poll_interval=0.01), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop serving and free the port."""
        self._http.shutdown()
        self._http.server_close()

    def add_repo(self, repo_id: str, files: Files | None = None, *, repo_type: str = "model", **state: Any) -> Repo:
        """Create a repository with `files` on top of its first commit; `state` is `private`, `gated`, `granted`."""
        repo = self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, **state)
        if files:
            self.commit(repo_id, files, repo_type=repo_type)
        return repo

    def commit(self, repo_id: str, files: Files, *, repo_type: str = "model", revision: str = "main") -> str:
        """Commit files (None deletes) and return the id; nothing is checked, so hostile names can be planted."""
        changes: dict[str, Blob | None] = dict.fromkeys(files)
        for path, value in files.items():
            if value is not None:
                blob = changes[path] = Blob(value.encode() if isinstance(value, str) else value, is_large(path))
                self.large_files[blob.sha256] = blob.content
        repo = self.repos[repo_type, repo_id]
        return repo.commit(revision, changes, "Add files", author=repo.namespace).oid

    def files(self, repo_id: str, *, repo_type: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Return what a revision holds, without the `.gitattributes` that every repository starts with."""
        tree = self.repos[repo_type, repo_id].find(revision).tree
        return {path: blob.content for path, blob in tree.items() if path != ".gitattributes"}

    def fail(self, pattern: str, method: str | None = None, **how: Any) -> Fault:
        """Program a failure of the requests in whose path (with query) `pattern` is found; see `Fault`."""
        self.faults.append(Fault(pattern, method, **how))
        return self.faults[-1]

    def strike(self, method: str, path: str) -> Fault:
        """Return the programmed failure that hits a request, or one that does nothing."""
        with self.lock:
            return next((fault for fault in self.faults if fault.strikes(method, path)), Fault(""))

    def answer(self, call: Call) -> Reply:
        """Answer a request through its route; every error becomes the response that the clients know."""
        method = "GET" if call.method == "HEAD" else call.method
        matches = ((pattern.fullmatch(call.path), *rest) for verb, pattern, *rest in ROUTES if verb == method)
        match, access, function = next((found for found in matches if found[0]), (None, "see", None))
        if match is None:
            return Reply({"error": f"The hub of the tests has no route {call.method} {call.path}"}, 404)
        values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        try:
            with self.lock:
                if "repo_id" in values:
                    kind, repo_id = values.pop("kind", "model"), values.pop("repo_id")
                    return function(self, call, self.find(call, kind, repo_id, access), **values)
                return function(self, call, **values)
        except HubError as error:
            return error_reply(error, call.path)
        except Exception:  # a mistake in here must reach the test, with a status that no client retries
            self.mistakes.append(traceback.format_exc())
            return Reply({"error": self.mistakes[-1]}, 501)

    def find(self, call: Call, kind: str, repo_id: str, access: Access) -> Repo:
        """Return a repository that the caller has this access to; else 401, 403 or 404."""
        repo = self.repos.get((kind, repo_id))
        if repo is None or not may_see(call.user, repo):
            raise HubError(404 if call.user else 401, "Repository not found", "RepoNotFound")
        if access == "download" and repo.gated and not (is_member(call.user, repo) or caller(call) in repo.granted):
            text = f"Access to {kind} {repo_id} is restricted and you are not in the authorized list."
            raise HubError(403 if call.user else 401, text, "GatedRepo")
        if access in ("propose", "write"):
            check_writer(call.user, None if access == "propose" or call.flag("create_pr") else repo.namespace)
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Reply:
        if call.user is None:
            raise HubError(401, "Invalid username or password.")
        organizations = [{"type": "org", "name": name, "fullname": name} for name in call.user.organizations]
        access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": call.user.role}}
        return Reply({"type": "user", "name": call.user.name, "orgs": organizations, "auth": access})

    @route("GET", "/api/agent-harnesses")
    def harnesses(self, call: Call) -> Reply:
        """Name no harness: the client asks once for every fresh `HF_HOME`."""
        return Reply({"standardEnvVars": [], "harnesses": {}})

    @route("POST", "/api/repos/create")
    def create(self, call: Call) -> Reply:
        kind, namespace = call.json.get("type", "model"), call.json.get("organization") or caller(call)
        check_writer(call.user, namespace)
        repo = Repo(f"{namespace}/{call.json['name']}", kind, private=call.json.get("visibility") == "private")
        url = f"{self.endpoint}/{repo.address}"
        if (kind, repo.repo_id) in self.repos:
            return Reply({"error": f"You already created this {kind} repo", "url": url}, 409)
        self.repos[kind, repo.repo_id] = repo
        return Reply({"url": url, "name": repo.repo_id})

    @route("DELETE", "/api/repos/delete")
    def delete(self, call: Call) -> Reply:
        repo_id = f"{call.json['organization'] or caller(call)}/{call.json['name']}"
        repo = self.find(call, call.json.get("type", "model"), repo_id, "write")
        del self.repos[repo.kind, repo_id]
        return Reply()

    @route("GET", f"{API}/auth-check", "download")
    @route("GET", f"{API}/auth-check/write", "write")
    def auth_check(self, call: Call, repo: Repo) -> Reply:
        """Confirm that the caller has the access that the route asks for."""
        return Reply()

    @route("GET", "/api/(?P<kind>model|dataset|space)s")
    def search(self, call: Call, kind: str) -> Reply:
        """List repositories by author, filter (all the tags), search and pipeline_tag, in pages of `limit`."""
        visible = (repo for repo in self.repos.values() if repo.kind == kind and may_see(call.user, repo))
        found = [about for about in (repo.describe() for repo in visible) if is_wanted(about, call.query)]
        hidden = [name for name in DETAILS if not call.flag("full") and not call.flag(name)]
        start, size = int(call.query.get("cursor", ["0"])[0]), int(call.query.get("limit", ["1000"])[0])
        page = [narrowed(about, call, hidden) for about in found[start : start + size]]
        following = urlencode({**call.query, "cursor": [str(start + size)]}, doseq=True)
        link = {"Link": f'<{self.endpoint}{call.path}?{following}>; rel="next"'} if len(found) > start + size else {}
        return Reply(page, headers=link)

    @route("GET", API)
    @route("GET", f"{API}/revision/{REVISION}")
    def info(self, call: Call, repo: Repo, revision: str = "main") -> Reply:
        return Reply(narrowed(repo.describe(revision, blobs=call.flag("blobs")), call))

    @route("GET", f"{API}/tree/{REVISION}(?:/(?P<folder>.+))?")
    def tree(self, call: Call, repo: Repo, revision: str, folder: str = "") -> Reply:
        below = f"{folder}/" if folder else ""
        entries = {path: entry for path, entry in repo.entries(revision).items() if path.startswith(below)}
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        recursive = call.flag("recursive")
        return Reply([entry for path, entry in entries.items() if recursive or "/" not in path.removeprefix(below)])

    @route("POST", f"{API}/paths-info/{REVISION}")
    def paths_info(self, call: Call, repo: Repo, revision: str) -> Reply:
        """Describe those paths of a form that exist."""
        entries = repo.entries(revision)
        return Reply([entries[path] for path in parse_qs(call.body.decode()).get("paths", []) if path in entries])

    @route("GET", f"{PAGE}/resolve/{REVISION}/(?P<path>.+)", "download")
    def resolve(self, call: Call, repo: Repo, revision: str, path: str) -> Reply:
        """Send a small file, or the way to a large one."""
        commit = repo.find(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.tree:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.tree[path]
        if not blob.large:
            return ranged(blob.content, call, headers | {"ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.sha256}"'}
        return Reply(b"", 302, headers | {"Location": f"{self.storage}/{blob.sha256}"})

    @route("POST", "/api/validate-yaml")
    def validate(self, call: Call) -> Reply:
        errors, warnings = ([{"message": text} for text in texts] for texts in card_problems(call.json["content"]))
        return Reply({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    @route("POST", f"{API}/preupload/{REVISION}", "write")
    def preupload(self, call: Call, repo: Repo, revision: str) -> Reply:
        """Say of each file whether it is large, and which content the revision has under its name."""
        tree, files = repo.find(revision).tree, []
        for file in call.json["files"]:
            mode = "lfs" if is_large(file["path"], base64.b64decode(file["sample"]), file["size"]) else "regular"
            current = {"oid": tree[file["path"]].etag} if file["path"] in tree else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **current})
        return Reply({"files": files})

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/batch", "propose")
    def batch(self, call: Call, repo: Repo) -> Reply:
        """Say where to put each large file that is not here yet."""
        verify = {"href": f"{self.endpoint}{call.path.removesuffix('batch')}verify"}
        objects = []
        for item in call.json["objects"]:
            actions = {"upload": {"href": f"{self.storage}/{item['oid']}"}, "verify": verify}
            objects.append(item if item["oid"] in self.large_files else item | {"actions": actions})
        return Reply({"transfer": "basic", "objects": objects})

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/verify", "propose")
    def verify(self, call: Call, repo: Repo) -> Reply:
        if len(self.large_files.get(call.json["oid"], b"")) != call.json["size"]:
            raise HubError(422, "The large file is missing or has another size.")
        return Reply()

    @route("PUT", OBJECT)
    def store(self, call: Call, sha256: str) -> Reply:
        """Take a large file; to know its address is to be allowed."""
        if Blob(call.body).sha256 != sha256:
            raise HubError(400, "The content is not what its address says.")
        self.large_files[sha256] = call.body
        return Reply(b"")

    @route("GET", OBJECT)
    def fetch(self, call: Call, sha256: str) -> Reply:
        return ranged(self.large_files[sha256], call, {"ETag": f'"{sha256}"'})

    @route("POST", f"{API}/commit/{REVISION}", "write")
    def receive(self, call: Call, repo: Repo, revision: str) -> Reply:
        """Carry out a commit, all of it or nothing, on a branch or as a new pull request."""
        header, *lines = (json.loads(line) for line in call.body.splitlines())
        title, text, parent = (header["value"].get(name, "") for name in ("summary", "description", "parentCommit"))
        head, propose = repo.find(revision), call.flag("create_pr")
        if not head.oid.startswith(parent):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        if not propose and revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        changes = self.changes(lines, head)
        pull = repo.open_pull(title, text, caller(call), revision) if propose else None
        commit = repo.commit(pull.ref if pull else revision, changes, title, text, caller(call))
        url = f"{self.endpoint}/{repo.address}"
        reply = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}"}
        return Reply(reply | ({"pullRequestUrl": f"{url}/discussions/{pull.number}"} if pull else {}))

    def changes(self, lines: Iterable[Mapping[str, Any]], head: Commit) -> dict[str, Blob | None]:
        """Read the lines of a commit, and refuse what the real Hub refuses."""
        changes: dict[str, Blob | None] = {}
        for key, value in ((line["key"], line["value"]) for line in lines):
            path = value["path"]
            if path.startswith("/") or {"..", ".git"} & set(path.split("/")):
                raise HubError(400, f"Invalid path in commit: {path!r}")
            if key == "file":
                changes[path] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.large_files:
                    raise HubError(400, f"The large file {path!r} has not been uploaded.")
                changes[path] = Blob(self.large_files[value["oid"]], large=True)
            else:
                gone = [name for name in head.tree if name == path or name.startswith(f"{path.rstrip('/')}/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                changes |= dict.fromkeys(gone)
        card = changes.get("README.md")
        if card and (errors := card_problems(card.content.decode())[0]):
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        return changes

    @route("GET", f"{API}/commits/{REVISION}")
    def commits(self, call: Call, repo: Repo, revision: str) -> Reply:
        return Reply([commit.describe() for commit in repo.history(revision)])

    @route("GET", f"{API}/refs")
    def refs(self, call: Call, repo: Repo) -> Reply:
        pulls = {pull.ref: repo.branches[pull.ref] for pull in repo.pulls.values()}
        branches = {name: commit for name, commit in repo.branches.items() if name not in pulls}
        content: dict[str, list[dict[str, str]]] = {"converts": []}
        groups = (
            ("branches", "refs/heads/", branches),
            ("tags", "refs/tags/", repo.tags),
            ("pullRequests", "", pulls),
        )
        for group, prefix, heads in groups:
            about = ({"name": name, "ref": prefix + name, "targetCommit": head.oid} for name, head in heads.items())
            content[group] = list(about)
        return Reply(content)

    @route("POST", f"{API}/branch/{REVISION}", "write")
    def create_branch(self, call: Call, repo: Repo, revision: str) -> Reply:
        return Reply(repo.refer(repo.branches, revision, call.json.get("startingPoint", "main")))

    @route("POST", f"{API}/tag/{REVISION}", "write")
    def create_tag(self, call: Call, repo: Repo, revision: str) -> Reply:
        return Reply(repo.refer(repo.tags, call.json["tag"], revision))

    @route("GET", f"{API}/discussions")
    def discussions(self, call: Call, repo: Repo) -> Reply:
        pulls = [pull.describe() for pull in repo.pulls.values()]
        return Reply({"discussions": pulls, "count": len(pulls), "start": 0})

    @route("GET", PULL)
    def discussion(self, call: Call, repo: Repo, number: str) -> Reply:
        return Reply(repo.find_pull(number).describe())

    @route("POST", f"{PULL}/merge", "write")
    def merge(self, call: Call, repo: Repo, number: str) -> Reply:
        repo.merge(repo.find_pull(number), caller(call))
        return Reply()

    @route("GET", "/api/collections")
    def list_collections(self, call: Call) -> Reply:
        owners = call.query.get("owner")
        found = [item for item in self.collections.values() if owners is None or item["owner"]["name"] in owners]
        return Reply([{name: value for name, value in item.items() if name != "position"} for item in found])

    @route("POST", "/api/collections")
    def create_collection(self, call: Call) -> Reply:
        title, owner = call.json["title"], call.json["namespace"]
        check_writer(call.user, owner)
        for slug, collection in self.collections.items():
            if (collection["title"], collection["owner"]["name"]) == (title, owner):
                return Reply({"error": "This collection exists already", "slug": slug}, 409)
        slug = f"{owner}/{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}-{secrets.token_hex(12)}"
        about = {"slug": slug, "owner": {"name": owner}, "items": [], "lastUpdated": now(), "theme": "green"}
        self.collections[slug] = {"position": 0, "upvotes": 0, "description": None} | call.json | about
        return Reply(self.collections[slug])

    @route("GET", COLLECTION)
    def get_collection(self, call: Call, slug: str) -> Reply:
        if slug not in self.collections:
            raise HubError(404, "Collection not found")
        return Reply(self.collections[slug])

    @route("POST", f"{COLLECTION}/items")
    def add_item(self, call: Call, slug: str) -> Reply:
        collection, item = self.get_collection(call, slug).content, call.json["item"]
        check_writer(call.user, collection["owner"]["name"])
        self.find(call, item["type"], item["id"], "see")
        if any((known["type"], known["id"]) == (item["type"], item["id"]) for known in collection["items"]):
            raise HubError(409, "This item is in the collection already")
        entry = item | {"_id": secrets.token_hex(12), "position": len(collection["items"])}
        collection["items"].append(entry | ({"note": {"text": call.json["note"]}} if "note" in call.json else {}))
        return Reply(collection)


def caller(call: Call) -> str:
    """Return the name of the caller, empty when unknown."""
    return call.user.name if call.user else ""


def is_member(user: User | None, repo: Repo) -> bool:
    """Tell whether a repository is the user's own or that of an organization of theirs."""
    return user is not None and user.belongs_to(repo.namespace)


def may_see(user: User | None, repo: Repo) -> bool:
    """Tell whether a repository exists for the user."""
    return not repo.private or is_member(user, repo)


def check_writer(user: User | None, namespace: str | None) -> None:
    """Refuse a caller who may not write in a namespace, or (None) may not write at all."""
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if user.role != "write":
        raise HubError(403, "You must use a token with the role 'write'")
    if namespace is not None and not user.belongs_to(namespace):
        raise HubError(403, f"You have no rights to write under the namespace {namespace!r} without `create_pr=1`")


def narrowed(about: Mapping[str, Any], call: Call, hidden: Iterable[str] = ()) -> dict[str, Any]:
    """Keep what `expand` names, or else what is not hidden."""
    names = {"_id", "id", *call.query["expand"]} if "expand" in call.query else set(about) - set(hidden)
    return {name: value for name, value in about.items() if name in names}
