# SPDX-License-Identifier: Apache-2.0
"""A Hub on 127.0.0.1: the HTTP calls of huggingface_hub for model repositories, with plain LFS and with Xet.

For the demo and the tests, which push to it and pull from it through the real client. Commits live in memory, the bytes
of files on disk. As on the Hub, large files are served from another host name, by a signed link and without the token.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import metadata_load

from jai.hub_card.loopback_faults import Fault, Faults
from jai.hub_card.loopback_http import Answer, HttpError, LoopbackServer, Request, SeenRequest, json_answer
from jai.hub_card.loopback_pulls import PullRequest
from jai.hub_card.loopback_xet import XetStore

_LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model", ".msgpack", ".npy", ".npz", ".onnx", ".pt", ".pth", ".h5")
_LARGE_BYTES = 10 * 2**20  # the Hub refuses larger files as plain git blobs
_TOKEN_SECONDS = 3600
_PULLS_PER_PAGE = 10


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit. `oid` is git's name of the blob; for a large file that is its LFS pointer."""

    sha256: str
    size: int
    oid: str
    large: bool


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    message: str
    date: str
    parent: str | None
    files: dict[str, StoredFile]


@dataclass(frozen=True)
class Account:
    """Whose a token is, and whether it may write."""

    user: str
    may_write: bool


@dataclass
class Repo:
    """A model repository: its commits by hash, and what its branches (with `refs/pr/N`) and tags point to.

    Attributes:
        gated: its files are for its owner alone, though everybody sees that they are there.
    """

    id: str
    private: bool
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: list[PullRequest] = field(default_factory=list)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def head(self, revision: str = "main") -> Commit:
        """The commit that a branch, a tag, `refs/pr/N` or a hash names."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]


class LoopbackHub:
    """A Hub that runs while the `with` block does.

    Args:
        root: folder for the bytes of files and for the caches of `environment()`; the caller removes it.
        token: the user's token, which may write; drawn at random if not given.
        user: name of that user, and the only namespace it may write to (`add_token` makes others).
        xet: whether large files go through Xet (needs the package `hf_xet`) or through plain LFS.
    """

    def __init__(self, root: str | Path, token: str | None = None, user: str = "loopback", xet: bool = True):
        self.root = Path(root).resolve()  # the caches of `environment()` are for processes in any folder
        self.token = token or f"hf_{secrets.token_hex(17)}"
        self.user = user
        self.xet = xet
        self._accounts = {self.token: Account(user, may_write=True)}
        self._http = LoopbackServer(self._answer)
        self._repos: dict[str, Repo] = {}
        self._lock = threading.RLock()
        self._secret = secrets.token_bytes(32)
        self._objects = self.root / "objects"
        self._objects.mkdir(parents=True, exist_ok=True)
        self._xet = XetStore(self.root / "xorbs")
        self._xet_tokens: set[str] = set()
        # Clients remember which chunks a store has by its address; a new store must not be taken for an old one.
        self._cas_path = f"/cas-{secrets.token_hex(8)}"

    def __enter__(self) -> "LoopbackHub":
        self._http.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.__exit__(*exception)

    @property
    def endpoint(self) -> str:
        """Address of the Hub, for `HF_ENDPOINT` or `HfApi(endpoint=…)`."""
        return f"http://127.0.0.1:{self._http.port}"

    def environment(self) -> dict[str, str]:
        """Environment variables that lead a process of huggingface_hub or transformers here, with caches of its own."""
        home = self.root / "home"
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def repo(self, repo_id: str) -> Repo | None:
        """The repository as the server holds it, for tests and reports."""
        return self._repos.get(repo_id)

    def content(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Bytes of a file of a repository, read on the server's side."""
        return self._object(self._repos[repo_id].head(revision).files[path].sha256).read_bytes()

    @property
    def requests(self) -> list[SeenRequest]:
        """Every request so far, in order."""
        return self._http.requests

    def add_token(self, user: str, may_write: bool = True) -> str:
        """Another token, of this user or of somebody else."""
        token = f"hf_{secrets.token_hex(17)}"
        self._accounts[token] = Account(user, may_write)
        return token

    # What goes wrong

    @property
    def faults(self) -> Faults:
        """All that goes wrong on the way: planned for some requests, or by chance (`hub.faults.storm`)."""
        return self._http.faults

    def fail_next(
        self, n: int = 1, status: int = 500, match: str = "", delay: float = 0.0, retry_after: int | None = None
    ) -> None:
        """Answer the next `n` requests whose `"METHOD /path"` contains `match` with `status`, after `delay` seconds."""
        self.faults.plan(Fault("status", status, delay, retry_after), n, match)

    def hang_up_next(self, n: int = 1, match: str = "", after_work: bool = False) -> None:
        """Close the connection of the next `n` matching requests without an answer.

        With `after_work` the request takes effect first, as when an answer is lost on its way back.
        """
        self.faults.plan(Fault("lose answer" if after_work else "hang up"), n, match)

    def stop_faults(self) -> None:
        """Forget the faults that have not happened yet."""
        self.faults.stop()

    # Who may do what

    def _account_of(self, authorization: str | None) -> Account | None:
        if authorization is None:
            return None
        for token, account in self._accounts.items():
            if hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
                return account
        raise HttpError(401, "Invalid credentials in Authorization header")

    def _signed_in(self, request: Request) -> Account:
        if request.account is None:
            raise HttpError(401, "Invalid username or password.")
        return request.account

    def _may_write(self, request: Request) -> Account:
        account = self._signed_in(request)
        if not account.may_write:
            raise HttpError(403, "Forbidden: you must use a write token to upload to a repository.")
        return account

    def _readable(self, request: Request, repo_id: str) -> Repo:
        repo = self._repos.get(unquote(repo_id))
        account: Account | None = request.account
        if repo is None or (repo.private and (account is None or account.user != repo.owner)):
            # The Hub does not tell strangers which private repositories there are.
            raise HttpError(401 if account is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _check_gate(self, request: Request, repo: Repo) -> None:
        account: Account | None = request.account
        if repo.gated and (account is None or account.user != repo.owner):
            status = 401 if account is None else 403
            raise HttpError(status, f"Access to model {repo.id} is restricted.", "GatedRepo")

    def _writable(self, request: Request, repo_id: str) -> Repo:
        account = self._may_write(request)
        repo = self._readable(request, repo_id)
        self._check_namespace(account, repo.owner)
        return repo

    def _writable_at(self, request: Request, repo_id: str, revision: str) -> Repo:
        """A repository to which this request may add: who may read it may make a pull request, and go on with it."""
        account = self._may_write(request)
        repo = self._readable(request, repo_id)
        own_pulls = {pull.ref for pull in repo.pulls if pull.author == account.user}
        if not (request.query.get("create_pr") or unquote(revision) in own_pulls):
            self._check_namespace(account, repo.owner)
        return repo

    def _check_namespace(self, account: Account, namespace: str) -> None:
        if namespace != account.user:
            raise HttpError(403, f"You don't have the rights to write models under the namespace {namespace!r}")

    def _signature(self, what: str) -> str:
        return hmac.new(self._secret, what.encode(), "sha256").hexdigest()

    def _signed_url(self, what: str) -> str:
        return f"http://localhost:{self._http.port}/{what}?signature={self._signature(what)}"

    def _check_signature(self, request: Request, what: str) -> None:
        if not hmac.compare_digest(request.query.get("signature", ""), self._signature(what)):
            raise HttpError(403, "SignatureDoesNotMatch")

    # Accounts and repositories

    def _whoami(self, request: Request) -> Answer:
        account = self._signed_in(request)
        token = {"displayName": "loopback", "role": "write" if account.may_write else "read"}
        who = {"type": "user", "id": "0" * 24, "name": account.user, "fullname": account.user, "orgs": []}
        return json_answer({**who, "auth": {"type": "access_token", "accessToken": token}})

    def _create_repo(self, request: Request) -> Answer:
        account = self._may_write(request)
        asked = request.json()
        repo_id = f"{asked.get('organization') or account.user}/{asked['name']}"
        self._check_namespace(account, repo_id.split("/")[0])
        url = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        with self._lock:
            if repo_id in self._repos:
                return json_answer({**url, "error": "You already created this model repo"}, status=409)
            # `visibility` from newer clients, `private` from older ones
            repo = Repo(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
            attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in _LARGE_SUFFIXES).encode()
            files = {".gitattributes": self._store(attributes)}
            self._repos[repo_id] = repo
            self._add_commit(repo, "main", "initial commit", "", files)
        return json_answer(url)

    def _delete_repo(self, request: Request) -> Answer:
        asked = request.json()
        repo_id = f"{asked.get('organization') or self._signed_in(request).user}/{asked['name']}"
        with self._lock:
            self._writable(request, repo_id)
            del self._repos[repo_id]
        return Answer()

    def _create_branch(self, request: Request, repo_id: str, branch: str) -> Answer:
        repo = self._writable(request, repo_id)
        start = (json.loads(request.body() or b"{}")).get("startingPoint", "main")
        with self._lock:
            if unquote(branch) in repo.branches:
                raise HttpError(409, "Reference already exists")
            repo.branches[unquote(branch)] = repo.head(start).sha
        return Answer()

    def _delete_branch(self, request: Request, repo_id: str, branch: str) -> Answer:
        repo = self._writable(request, repo_id)
        with self._lock:
            if unquote(branch) == "main":
                raise HttpError(403, "main cannot be deleted")
            if repo.branches.pop(unquote(branch), None) is None:
                raise HttpError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return Answer()

    def _create_tag(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self._writable(request, repo_id)
        tag = request.json()["tag"]
        with self._lock:
            if tag in repo.tags:
                raise HttpError(409, f"Tag reference exists already: {tag}")
            repo.tags[tag] = repo.head(unquote(revision)).sha
        return Answer()

    def _delete_tag(self, request: Request, repo_id: str, tag: str) -> Answer:
        repo = self._writable(request, repo_id)
        with self._lock:
            if repo.tags.pop(unquote(tag), None) is None:
                raise HttpError(404, f"Invalid rev id: {tag}", "RevisionNotFound")
        return Answer()

    def _refs(self, request: Request, repo_id: str) -> Answer:
        repo = self._readable(request, repo_id)
        pulls = {pull.ref for pull in repo.pulls}

        def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": sha} for n, sha in sorted(refs.items())]

        found = {
            "branches": listed({n: sha for n, sha in repo.branches.items() if n not in pulls}, "refs/heads/"),
            "converts": [],
            "tags": listed(repo.tags, "refs/tags/"),
        }
        if request.query.get("include_prs"):
            found["pullRequests"] = listed({n: sha for n, sha in repo.branches.items() if n in pulls}, "")
        return json_answer(found)

    def _commits(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self._readable(request, repo_id)
        commits = []
        commit: Commit | None = repo.head(unquote(revision))
        while commit is not None:
            named = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
            commits.append({**named, "authors": [{"user": repo.owner}]})
            commit = repo.commits[commit.parent] if commit.parent else None
        return json_answer(commits)

    def _model_info(self, request: Request, repo_id: str, revision: str = "main") -> Answer:
        repo = self._readable(request, repo_id)
        commit = repo.head(unquote(revision))
        siblings = [self._sibling(path, file) for path, file in commit.files.items()]
        card = metadata_load(self._object(commit.files["README.md"].sha256)) if "README.md" in commit.files else None
        info = {"id": repo.id, "sha": commit.sha, "private": repo.private, "siblings": siblings, "cardData": card}
        from_card = {key: (card or {}).get(key) for key in ("tags", "library_name", "pipeline_tag")}
        gated = "manual" if repo.gated else False
        return json_answer({**info, **from_card, "lastModified": commit.date, "gated": gated, "disabled": False})

    def _sibling(self, path: str, file: StoredFile) -> dict[str, Any]:
        sibling: dict[str, Any] = {"rfilename": path, "size": file.size, "blobId": file.oid}
        if file.large:
            pointer_size = len(_pointer(file.sha256, file.size))
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": pointer_size}
        return sibling

    # Reading files

    def _file_entry(self, path: str, file: StoredFile) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
        if file.large:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(_pointer(file.sha256, file.size))}
            if (xet_hash := self._xet.xet_hash(file.sha256)) is not None:
                entry["xetHash"] = xet_hash
        return entry

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str | None = None) -> Answer:
        commit = self._readable(request, repo_id).head(unquote(revision))
        prefix = f"{unquote(folder)}/" if folder else ""
        below = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if prefix and not below:
            raise HttpError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(below.items()):
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(f"{commit.sha} {name}".encode()).hexdigest()
                entries[name] = {"type": "directory", "path": name, "oid": oid, "size": 0}
            entries[path] = self._file_entry(path, file)
        if request.query.get("recursive", "").lower() not in ("true", "1"):
            entries = {name: entry for name, entry in entries.items() if "/" not in name[len(prefix) :]}
        return json_answer(list(entries.values()))

    def _resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Answer:
        repo = self._readable(request, repo_id)
        self._check_gate(request, repo)
        commit = repo.head(unquote(revision))
        file = commit.files.get(unquote(path))
        headers = {"X-Repo-Commit": commit.sha}
        if file is None:
            raise HttpError(404, "Entry not found", "EntryNotFound")
        if not file.large:
            return Answer(self._object(file.sha256), {**headers, "ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if (xet_hash := self._xet.xet_hash(file.sha256)) is not None:
            route = f"{self.endpoint}/api/models/{repo.id}/xet-read-token/{commit.sha}"
            headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
        return Answer(b"", {**headers, "Location": self._signed_url(f"objects/{file.sha256}")}, status=302)

    def _get_object(self, request: Request, sha256: str) -> Answer:
        self._check_signature(request, f"objects/{sha256}")
        return Answer(self._object(sha256), {"ETag": f'"{sha256}"'})

    # Writing files

    def _object(self, sha256: str) -> Path:
        """Where the content with this hash lies, or would."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise HttpError(400, "not a SHA-256")
        return self._objects / sha256

    def _store(self, content: bytes) -> StoredFile:
        sha256 = hashlib.sha256(content).hexdigest()
        self._object(sha256).write_bytes(content)
        return StoredFile(sha256, len(content), _git_oid(content), large=False)

    def _validate_card(self, request: Request) -> Answer:
        content = request.json()["content"]
        head = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
        errors, warnings = [], []
        try:
            metadata = yaml.safe_load(head[1]) if head else None
        except yaml.YAMLError as error:
            metadata, errors = {}, [f"YAML: {error}"]
        if metadata is not None and not isinstance(metadata, dict):
            metadata, errors = {}, ["the metadata is no mapping"]
        if metadata is None:
            metadata, warnings = {}, ["empty or missing yaml metadata in repo card"]
        kinds = {"tags": list, "license": str, "library_name": str, "pipeline_tag": str, "base_model_relation": str}
        for key, kind in kinds.items():
            if key in metadata and not isinstance(metadata[key], kind):
                errors.append(f'"{key}" must be a {"list" if kind is list else "string"}')
        base = metadata.get("base_model")
        for name in base if isinstance(base, list) else [base] if base is not None else []:
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                errors.append(f'"base_model" must be the id of a model on the Hub, not {name!r}')
        found = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
        return json_answer(found, status=400 if errors else 200)

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Answer:
        commit = self._writable_at(request, repo_id, revision).head(unquote(revision))
        files = []
        for asked in request.json()["files"]:
            binary = b"\0" in base64.b64decode(asked.get("sample", ""))
            large = binary or asked["size"] > _LARGE_BYTES or asked["path"].endswith(_LARGE_SUFFIXES)
            there = commit.files.get(asked["path"])
            oid = None if there is None else there.sha256 if there.large else there.oid
            mode = "lfs" if large else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return json_answer({"files": files, "commitOid": commit.sha})

    def _lfs_batch(self, request: Request, repo_id: str) -> Answer:
        self._may_write(request)  # the batch does not say whether it is for a pull request
        repo = self._readable(request, repo_id)
        objects = []
        for asked in request.json()["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if not self._object(asked["oid"]).exists():
                upload = {"href": self._signed_url(f"uploads/{asked['oid']}")}
                verify = {"href": f"{self.endpoint}/{repo.id}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return json_answer({"transfer": "basic", "objects": objects})

    def _put_object(self, request: Request, sha256: str) -> Answer:
        self._check_signature(request, f"uploads/{sha256}")
        self._write_object(sha256, request.blocks)
        return Answer()

    def _write_object(self, sha256: str, blocks: Iterator[bytes]) -> None:
        partial = self._objects / f"{sha256}.{threading.get_ident()}"
        digest = hashlib.sha256()
        with partial.open("wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != sha256:
            partial.unlink()
            raise HttpError(400, f"the content is not {sha256}")
        partial.rename(self._object(sha256))

    def _verify_object(self, request: Request, repo_id: str) -> Answer:
        self._may_write(request)
        self._readable(request, repo_id)
        asked = request.json()
        path = self._object(asked["oid"])
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise HttpError(404, f"{asked['oid']} was not uploaded")
        return Answer()

    def _commit(self, request: Request, repo_id: str, revision: str) -> Answer:
        repo = self._writable_at(request, repo_id, revision)
        header: dict[str, str] = {}
        added: dict[str, StoredFile] = {}
        deleted: set[str] = set()
        for line in request.body().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                header = value
            elif key == "file":
                added[value["path"]] = self._store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                added[value["path"]] = self._large_file(value["oid"])
            elif key in ("deletedFile", "deletedFolder"):
                deleted.add(value["path"])
            else:
                raise HttpError(400, f"unknown operation {key!r}")
        with self._lock:  # all of it or nothing
            head = repo.head(unquote(revision))
            if unquote(revision) not in repo.branches:
                raise HttpError(403, "commits go to a branch")
            if header.get("parentCommit") not in (None, head.sha):
                raise HttpError(412, "A commit has happened since. Please refresh and try again.")
            kept = {p: f for p, f in head.files.items() if not any(_is_in(p, d) for d in deleted)}
            if missing := {d for d in deleted if not any(_is_in(p, d) for p in head.files)}:
                raise HttpError(404, f"A file with this name doesn't exist: {missing.pop()}", "EntryNotFound")
            branch = unquote(revision)
            if request.query.get("create_pr"):
                branch = self._open_pull(repo, request.account.user, branch, header["summary"], "open").ref
            commit = self._add_commit(repo, branch, header["summary"], header.get("description", ""), {**kept, **added})
            pull = next((pull for pull in repo.pulls if pull.ref == branch), None)
            if pull is not None:
                pull.happened("commit", commit.date, pull.author, {"subject": commit.title, "oid": commit.sha})
        url = f"{self.endpoint}/{repo.id}"
        answer = {"success": True, "commitOid": commit.sha, "commitUrl": f"{url}/commit/{commit.sha}", "hookOutput": ""}
        if pull is not None:
            answer["pullRequestUrl"] = f"{url}/discussions/{pull.num}"
        return json_answer(answer)

    # Pull requests

    def _open_pull(self, repo: Repo, author: str, base: str, title: str, status: str) -> PullRequest:
        pull = PullRequest(len(repo.pulls) + 1, title, author, base, _now(), status)
        repo.pulls.append(pull)
        repo.branches[pull.ref] = repo.head(base).sha
        return pull

    def _pull(self, repo: Repo, num: str) -> PullRequest:
        if not 1 <= int(num) <= len(repo.pulls):
            raise HttpError(404, f"Discussion {num} not found")
        return repo.pulls[int(num) - 1]

    def _list_pulls(self, request: Request, repo_id: str) -> Answer:
        repo = self._readable(request, repo_id)
        wanted = {"all": None, "open": ("open", "draft"), "closed": ("closed", "merged")}[
            request.query.get("status", "all")
        ]
        author = request.query.get("author")
        found = [
            pull.summary(repo.id)
            for pull in reversed(repo.pulls)
            if (wanted is None or pull.status in wanted) and author in (None, pull.author)
        ]
        start = int(request.query.get("p", 0)) * _PULLS_PER_PAGE
        page = found[start : start + _PULLS_PER_PAGE]
        return json_answer({"discussions": page, "count": len(found), "start": start})

    def _new_pull(self, request: Request, repo_id: str) -> Answer:
        account = self._may_write(request)
        repo = self._readable(request, repo_id)
        asked = request.json()
        if not asked.get("pullRequest"):
            raise HttpError(400, "this Hub has pull requests, but no other discussions")
        with self._lock:
            pull = self._open_pull(repo, account.user, "main", asked["title"], "draft")
            text = {"edited": False, "hidden": False, "latest": {"raw": asked["description"]}}
            pull.happened("comment", pull.created, account.user, text)
        return json_answer({"num": pull.num})

    def _pull_details(self, request: Request, repo_id: str, num: str) -> Answer:
        repo = self._readable(request, repo_id)
        return json_answer(self._pull(repo, num).details(repo.id))

    def _change_pull(self, request: Request, repo_id: str, num: str) -> Answer:
        account = self._may_write(request)
        repo = self._readable(request, repo_id)
        pull, status = self._pull(repo, num), request.json()["status"]
        if pull.author != account.user:
            self._check_namespace(account, repo.owner)
        with self._lock:
            if pull.status == "merged":
                raise HttpError(400, "this pull request is merged")
            pull.status = status
            return json_answer({"newStatus": pull.happened("status-change", _now(), account.user, {"status": status})})

    def _merge_pull(self, request: Request, repo_id: str, num: str) -> Answer:
        repo = self._writable(request, repo_id)
        pull = self._pull(repo, num)
        with self._lock:
            if pull.status != "open":
                raise HttpError(400, f"only an open pull request can be merged; this one is {pull.status}")
            theirs, base = repo.head(pull.ref), repo.head(pull.base)
            if self._fork_of(repo, pull).sha != base.sha:
                raise HttpError(409, f"{pull.base} has changed since; merge it into the pull request first")
            title = f"{pull.title} (#{pull.num})"
            pull.merge_commit = self._add_commit(repo, pull.base, title, "", theirs.files).sha
            pull.status = "merged"
            pull.happened("status-change", _now(), request.account.user, {"status": "merged"})
        return Answer()

    def _fork_of(self, repo: Repo, pull: PullRequest) -> Commit:
        """The commit of the base that a pull request began at."""
        before, commit = set(), repo.head(pull.base)
        while True:
            before.add(commit.sha)
            if commit.parent is None:
                break
            commit = repo.commits[commit.parent]
        commit = repo.head(pull.ref)
        while commit.sha not in before and commit.parent is not None:
            commit = repo.commits[commit.parent]
        return commit

    def _large_file(self, sha256: str) -> StoredFile:
        if not self._object(sha256).exists():
            if self._xet.xet_hash(sha256) is None:
                raise HttpError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
            self._unpack_xet(sha256)
        size = self._object(sha256).stat().st_size
        return StoredFile(sha256, size, _git_oid(_pointer(sha256, size)), large=True)

    def _unpack_xet(self, sha256: str) -> None:
        """Put a file that came through Xet together, for clients without Xet, and to know that it is whole."""
        from hf_xet import XetFileInfo, XetSession

        token, expires = self._new_xet_token("read")
        group = XetSession().new_download_stream_group(
            endpoint=self.endpoint + self._cas_path, token=token, token_expiry_unix_secs=expires
        )
        size = self._xet.size(sha256)
        self._write_object(sha256, group.download_stream(XetFileInfo(self._xet.xet_hash(sha256), size)))

    def _add_commit(self, repo: Repo, branch: str, title: str, message: str, files: dict[str, StoredFile]) -> Commit:
        parent, date = repo.branches.get(branch), _now()
        listing = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(repr((parent, title, message, time.time_ns(), listing)).encode()).hexdigest()
        commit = Commit(sha, title, message, date, parent, files)
        repo.commits[sha] = commit
        repo.branches[branch] = sha
        return commit

    # Xet: https://huggingface.co/docs/xet/api

    def _new_xet_token(self, scope: str) -> tuple[str, int]:
        token = f"xet_{scope}_{secrets.token_hex(16)}"
        self._xet_tokens.add(token)
        return token, int(time.time()) + _TOKEN_SECONDS

    def _xet_token(self, request: Request, repo_id: str, scope: str, revision: str) -> Answer:
        if scope == "write":
            repo = self._writable_at(request, repo_id, revision)
        else:
            repo = self._readable(request, repo_id)
            self._check_gate(request, repo)
        if not request.query.get("create_pr"):  # with it, the client names no branch
            repo.head(unquote(revision))
        if not self.xet:
            raise HttpError(400, "Xet is not enabled for this repository")
        url = self.endpoint + self._cas_path
        token, expires = self._new_xet_token(scope)
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        return json_answer({"casUrl": url, "accessToken": token, "exp": expires}, headers)

    def _cas(self, request: Request, path: str) -> Answer:
        kind, _, name = path.rpartition("/")
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self._xet_tokens:
            raise HttpError(401, "Invalid Xet token")
        if request.method == "GET" and kind == "v1/reconstructions":
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "bytes=0-")
            start, end = (int(asked[1]), int(asked[2]) + 1 if asked[2] else None) if asked else (0, None)
            answer = self._xet.reconstruction(name, start, end, lambda xorb: self._signed_url(f"xorbs/{xorb}"))
            if answer is None:
                raise HttpError(416 if start else 404, "no such file or range")
            return json_answer(answer)
        if request.method == "POST" and "_write_" in token:
            try:
                if kind == "v1/xorbs/default":
                    return json_answer({"was_inserted": self._xet.put_xorb(name, request.body())})
                if path == "v1/shards":
                    self._xet.put_shard(request.body())
                    return json_answer({"result": 1})
            except ValueError as error:
                raise HttpError(400, str(error)) from error
        # No deduplication across repositories, and none of the protocol's later versions: clients fall back.
        raise HttpError(404, "not found")

    def _get_xorb(self, request: Request, name: str) -> Answer:
        self._check_signature(request, f"xorbs/{name}")
        return Answer(self._xet.xorb_path(name))

    def _answer(self, request: Request) -> Answer:
        if request.path == "/v1/telemetry":  # from Xet clients
            return Answer()
        if not request.path.startswith((self._cas_path, "/objects/", "/uploads/", "/xorbs/")):
            request.account = self._account_of(request.headers.get("Authorization"))
        for methods, pattern, route in _ROUTES:
            if request.method in methods and (match := pattern.fullmatch(request.path)):
                return route(self, request, *match.groups())
        if request.path.startswith(self._cas_path + "/"):
            return self._cas(request, request.path[len(self._cas_path) + 1 :])
        if re.match(r"/api/models/|/.+/resolve/", request.path):
            raise HttpError(401 if request.account is None else 404, "Repository not found", "RepoNotFound")
        raise HttpError(404, f"no such route: {request.method} {request.path}")


_R = r"([^/]+/[^/]+)"  # a repository's id; revisions come with their slashes quoted
_ROUTES: list[tuple[list[str], re.Pattern[str], Callable[..., Answer]]] = [
    (methods.split(), re.compile(pattern.replace("R!", _R)), route)
    for methods, pattern, route in (
        ("GET", "/api/whoami-v2", LoopbackHub._whoami),
        ("POST", "/api/repos/create", LoopbackHub._create_repo),
        ("DELETE", "/api/repos/delete", LoopbackHub._delete_repo),
        ("POST", "/api/validate-yaml", LoopbackHub._validate_card),
        ("GET", "/api/models/R!", LoopbackHub._model_info),
        ("GET", "/api/models/R!/revision/([^/]+)", LoopbackHub._model_info),
        ("GET", "/api/models/R!/tree/([^/]+)(?:/(.+))?", LoopbackHub._tree),
        ("GET", "/api/models/R!/refs", LoopbackHub._refs),
        ("GET", "/api/models/R!/commits/([^/]+)", LoopbackHub._commits),
        ("POST", "/api/models/R!/branch/([^/]+)", LoopbackHub._create_branch),
        ("DELETE", "/api/models/R!/branch/([^/]+)", LoopbackHub._delete_branch),
        ("POST", "/api/models/R!/tag/([^/]+)", LoopbackHub._create_tag),
        ("DELETE", "/api/models/R!/tag/([^/]+)", LoopbackHub._delete_tag),
        ("GET", "/api/models/R!/discussions", LoopbackHub._list_pulls),
        ("POST", "/api/models/R!/discussions", LoopbackHub._new_pull),
        ("GET", r"/api/models/R!/discussions/(\d+)", LoopbackHub._pull_details),
        ("POST", r"/api/models/R!/discussions/(\d+)/status", LoopbackHub._change_pull),
        ("POST", r"/api/models/R!/discussions/(\d+)/merge", LoopbackHub._merge_pull),
        ("POST", "/api/models/R!/preupload/([^/]+)", LoopbackHub._preupload),
        ("POST", "/api/models/R!/commit/([^/]+)", LoopbackHub._commit),
        ("GET", "/api/models/R!/xet-(read|write)-token/([^/]+)", LoopbackHub._xet_token),
        ("POST", r"/R!\.git/info/lfs/objects/batch", LoopbackHub._lfs_batch),
        ("POST", r"/R!\.git/info/lfs/objects/verify", LoopbackHub._verify_object),
        ("GET HEAD", "/R!/resolve/([^/]+)/(.+)", LoopbackHub._resolve),
        ("PUT", "/uploads/([0-9a-f]{64})", LoopbackHub._put_object),
        ("GET HEAD", "/objects/([0-9a-f]{64})", LoopbackHub._get_object),
        ("GET HEAD", "/xorbs/([0-9a-f]{64})", LoopbackHub._get_xorb),
    )
]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _is_in(path: str, deleted: str) -> bool:
    return path == deleted or path.startswith(deleted.rstrip("/") + "/")


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
