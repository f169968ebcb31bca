# SPDX-License-Identifier: Apache-2.0
"""The demo's local Hub, grown to what tests of publishing need: several users, private and gated repositories,
branches, deletions, pull requests, Xet, and faults.
"""

import json
import re
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jai.demo.hub.http_server import HttpError, Request, Response, json_response
from jai.demo.hub.local_hub import LocalHub, Route, new_token
from jai.demo.hub.repo import Commit, Repo, StoredFile, now
from loopback_hub.faults import Fault, Faults
from loopback_hub.pulls import PullRequest
from loopback_hub.wire import SeenRequest, Wire, faulty_handler
from loopback_hub.xet import XetStore

_XET_TOKEN_SECONDS = 3600
_PULLS_PER_PAGE = 10


@dataclass
class OwnedRepo(Repo):
    """A repository that not everybody may read; its branches include `refs/pr/N`.

    Attributes:
        private: only its owner sees it.
        gated: its files are for its owner alone, though everybody sees that they are there.
        pulls: its pull requests.
    """

    private: bool = False
    gated: bool = False
    pulls: list[PullRequest] = field(default_factory=list)


class LoopbackHub(LocalHub):
    """A Hub that runs while the `with` block does.

    Args:
        root: folder for the bytes of files and for the caches of `environment()`; the caller removes it.
        token: the user's token, which may write; drawn at random if not given.
        user: name of that user, and the only namespace it may write to (`add_token` makes others).
        xet: whether large files go through Xet (needs the package `hf_xet`) or through plain LFS.
    """

    def __init__(self, root: str | Path, token: str | None = None, user: str = "loopback", xet: bool = True):
        self._wire = Wire()
        # Clients remember which chunks a store has by its address; a new store must not be taken for an old one.
        self._cas_path = f"/cas-{secrets.token_hex(8)}"
        super().__init__(root, token, user, handler=faulty_handler(self._wire))
        self.xet = xet
        self._users = {self.token: self.user}
        self._readers: set[str] = set()  # tokens that may not write
        self._xet = XetStore(self.root / "xorbs")
        self._xet_tokens: set[str] = set()

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "HF_HUB_DISABLE_XET": "0" if self.xet else "1"}

    def routes(self) -> list[Route]:
        return [
            ("GET", "/api/whoami-v2", self._whoami),
            ("DELETE", "/api/repos/delete", self._delete_repo),
            ("GET", "/api/models/R!/refs", self._refs),
            ("GET", "/api/models/R!/commits/([^/]+)", self._commits),
            ("POST", "/api/models/R!/branch/([^/]+)", self._create_branch),
            ("DELETE", "/api/models/R!/branch/([^/]+)", self._delete_branch),
            ("DELETE", "/api/models/R!/tag/([^/]+)", self._delete_tag),
            ("GET", "/api/models/R!/discussions", self._list_pulls),
            ("POST", "/api/models/R!/discussions", self._new_pull),
            ("GET", r"/api/models/R!/discussions/(\d+)", self._pull_details),
            ("POST", r"/api/models/R!/discussions/(\d+)/status", self._change_pull),
            ("POST", r"/api/models/R!/discussions/(\d+)/merge", self._merge_pull),
            ("GET", "/api/models/R!/xet-(read|write)-token/([^/]+)", self._xet_token),
            ("GET HEAD", "/xorbs/([0-9a-f]{64})", self._get_xorb),
            ("GET POST HEAD", f"{self._cas_path}/(.+)", self._cas),
            ("POST", "/v1/telemetry", lambda request: Response()),  # from Xet clients
            *super().routes(),
        ]

    # For tests

    def repo(self, repo_id: str) -> OwnedRepo | None:
        """The repository as the server holds it."""
        return self.repos.get(repo_id)

    def content(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Bytes of a file of a repository, read on the server's side."""
        return self.object_path(self.repos[repo_id].head(revision).files[path].sha256).read_bytes()

    @property
    def requests(self) -> list[SeenRequest]:
        """Every request so far, in order."""
        return self._wire.requests

    def add_token(self, user: str, may_write: bool = True) -> str:
        """Another token, of this user or of somebody else."""
        token = new_token()
        self._users[token] = user
        if not may_write:
            self._readers.add(token)
        return token

    @property
    def faults(self) -> Faults:
        """All that goes wrong on the way: planned for some requests, or by chance (`hub.faults.storm`)."""
        return self._wire.faults

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

    def user_of(self, request: Request) -> str | None:
        token = _token_of(request)
        if token is None or token in self._xet_tokens:
            return None
        if token not in self._users:
            raise HttpError(401, "Invalid credentials in Authorization header")
        return self._users[token]

    def writer_of(self, request: Request) -> str:
        user = super().writer_of(request)
        if _token_of(request) in self._readers:
            raise HttpError(403, "Forbidden: you must use a write token to upload to a repository.")
        return user

    def readable(self, request: Request, repo_id: str) -> OwnedRepo:
        repo = super().readable(request, repo_id)
        if repo.private and request.user != repo.owner:
            # The Hub does not tell strangers which private repositories there are.
            raise HttpError(401 if request.user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _check_gate(self, request: Request, repo: OwnedRepo) -> None:
        if repo.gated and request.user != repo.owner:
            status = 401 if request.user is None else 403
            raise HttpError(status, f"Access to model {repo.id} is restricted.", "GatedRepo")

    def committable(self, request: Request, repo_id: str, revision: str) -> OwnedRepo:
        """Who may read a repository may make a pull request, and go on with it."""
        user = self.writer_of(request)
        repo = self.readable(request, repo_id)
        own_pulls = {pull.ref for pull in repo.pulls if pull.author == user}
        if not (request.query.get("create_pr") or unquote(revision) in own_pulls):
            self.check_namespace(user, repo.owner)
        return repo

    # Accounts and repositories

    def _whoami(self, request: Request) -> Response:
        if request.user is None:
            raise HttpError(401, "Invalid username or password.")
        token = {"displayName": "loopback", "role": "read" if _token_of(request) in self._readers else "write"}
        who = {"type": "user", "id": "0" * 24, "name": request.user, "fullname": request.user, "orgs": []}
        return json_response({**who, "auth": {"type": "access_token", "accessToken": token}})

    def new_repo(self, repo_id: str, asked: dict[str, Any]) -> OwnedRepo:
        # `visibility` from newer clients, `private` from older ones
        return OwnedRepo(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))

    def _delete_repo(self, request: Request) -> Response:
        asked = request.json()
        repo_id = f"{asked.get('organization') or self.writer_of(request)}/{asked['name']}"
        with self.lock:
            self.writable(request, repo_id)
            del self.repos[repo_id]
        return Response()

    def repo_info(self, repo: OwnedRepo, commit: Commit) -> dict[str, Any]:
        gated = "manual" if repo.gated else False
        return {**super().repo_info(repo, commit), "private": repo.private, "gated": gated}

    # Branches, tags and history

    def _create_branch(self, request: Request, repo_id: str, branch: str) -> Response:
        repo = self.writable(request, repo_id)
        start = (json.loads(request.body() or b"{}")).get("startingPoint", "main")
        with self.lock:
            if unquote(branch) in repo.branches:
                raise HttpError(409, "Reference already exists")
            repo.branches[unquote(branch)] = repo.head(start).sha
        return Response()

    def _delete_branch(self, request: Request, repo_id: str, branch: str) -> Response:
        repo = self.writable(request, repo_id)
        with self.lock:
            if unquote(branch) == "main":
                raise HttpError(403, "main cannot be deleted")
            if repo.branches.pop(unquote(branch), None) is None:
                raise HttpError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return Response()

    def _delete_tag(self, request: Request, repo_id: str, tag: str) -> Response:
        repo = self.writable(request, repo_id)
        with self.lock:
            if repo.tags.pop(unquote(tag), None) is None:
                raise HttpError(404, f"Invalid rev id: {tag}", "RevisionNotFound")
        return Response()

    def _refs(self, request: Request, repo_id: str) -> Response:
        repo = self.readable(request, repo_id)
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
        return json_response(found)

    def _commits(self, request: Request, repo_id: str, revision: str) -> Response:
        repo = self.readable(request, repo_id)
        commits = []
        commit: Commit | None = repo.head(unquote(revision))
        while commit is not None:
            named = {"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date}
            commits.append({**named, "authors": [{"user": repo.owner}]})
            commit = repo.commits[commit.parent] if commit.parent else None
        return json_response(commits)

    # Commits

    def changed_file(self, key: str, value: dict[str, str]) -> StoredFile | None:
        return None if key in ("deletedFile", "deletedFolder") else super().changed_file(key, value)

    def changed_files(
        self, files: dict[str, StoredFile], changes: dict[str, StoredFile | None]
    ) -> dict[str, StoredFile]:
        deleted = [path for path, file in changes.items() if file is None]
        if missing := [d for d in deleted if not any(_is_in(path, d) for path in files)]:
            raise HttpError(404, f"A file with this name doesn't exist: {missing[0]}", "EntryNotFound")
        kept = {path: file for path, file in files.items() if not any(_is_in(path, d) for d in deleted)}
        return super().changed_files(kept, changes)

    def apply_commit(
        self,
        request: Request,
        repo: OwnedRepo,
        branch: str,
        header: dict[str, str],
        changes: dict[str, StoredFile | None],
    ) -> dict[str, Any]:
        if header.get("parentCommit") not in (None, repo.head(branch).sha):
            raise HttpError(412, "A commit has happened since. Please refresh and try again.")
        self.changed_files(repo.head(branch).files, changes)  # before a pull request is opened for it
        if request.query.get("create_pr"):
            branch = self._open_pull(repo, request.user, branch, header["summary"], "open").ref
        done = super().apply_commit(request, repo, branch, header, changes)
        pull = next((pull for pull in repo.pulls if pull.ref == branch), None)
        if pull is not None:
            commit = repo.head(branch)
            pull.happened("commit", commit.date, pull.author, {"subject": commit.title, "oid": commit.sha})
            done["pullRequestUrl"] = f"{self.endpoint}/{repo.id}/discussions/{pull.num}"
        return done

    # Pull requests

    def _open_pull(self, repo: OwnedRepo, author: str, base: str, title: str, status: str) -> PullRequest:
        pull = PullRequest(len(repo.pulls) + 1, title, author, base, now(), status)
        repo.pulls.append(pull)
        repo.branches[pull.ref] = repo.head(base).sha
        return pull

    def _pull(self, repo: OwnedRepo, num: str) -> PullRequest:
        if not 1 <= int(num) <= len(repo.pulls):
            raise HttpError(404, f"Discussion {num} not found")
        return repo.pulls[int(num) - 1]

    def _list_pulls(self, request: Request, repo_id: str) -> Response:
        repo = self.readable(request, repo_id)
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
        return json_response({"discussions": page, "count": len(found), "start": start})

    def _new_pull(self, request: Request, repo_id: str) -> Response:
        user = self.writer_of(request)
        repo = self.readable(request, repo_id)
        asked = request.json()
        if not asked.get("pullRequest"):
            raise HttpError(400, "this Hub has pull requests, but no other discussions")
        with self.lock:
            pull = self._open_pull(repo, user, "main", asked["title"], "draft")
            text = {"edited": False, "hidden": False, "latest": {"raw": asked["description"]}}
            pull.happened("comment", pull.created, user, text)
        return json_response({"num": pull.num})

    def _pull_details(self, request: Request, repo_id: str, num: str) -> Response:
        repo = self.readable(request, repo_id)
        return json_response(self._pull(repo, num).details(repo.id))

    def _change_pull(self, request: Request, repo_id: str, num: str) -> Response:
        user = self.writer_of(request)
        repo = self.readable(request, repo_id)
        pull, status = self._pull(repo, num), request.json()["status"]
        if pull.author != user:
            self.check_namespace(user, repo.owner)
        with self.lock:
            if pull.status == "merged":
                raise HttpError(400, "this pull request is merged")
            pull.status = status
            return json_response({"newStatus": pull.happened("status-change", now(), user, {"status": status})})

    def _merge_pull(self, request: Request, repo_id: str, num: str) -> Response:
        repo = self.writable(request, repo_id)
        pull = self._pull(repo, num)
        with self.lock:
            if pull.status != "open":
                raise HttpError(400, f"only an open pull request can be merged; this one is {pull.status}")
            theirs, base = repo.head(pull.ref), repo.head(pull.base)
            if self._fork_of(repo, pull).sha != base.sha:
                raise HttpError(409, f"{pull.base} has changed since; merge it into the pull request first")
            title = f"{pull.title} (#{pull.num})"
            pull.merge_commit = repo.add_commit(pull.base, title, "", theirs.files).sha
            pull.status = "merged"
            pull.happened("status-change", now(), request.user, {"status": "merged"})
        return Response()

    def _fork_of(self, repo: OwnedRepo, pull: PullRequest) -> Commit:
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

    # Large files by Xet: https://huggingface.co/docs/xet/api

    def file_entry(self, path: str, file: StoredFile) -> dict[str, Any]:
        entry = super().file_entry(path, file)
        xet_hash = self._xet.xet_hash(file.sha256) if file.large else None
        return entry if xet_hash is None else {**entry, "xetHash": xet_hash}

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        repo = self.readable(request, repo_id)
        self._check_gate(request, repo)
        answer = super().resolve(request, repo_id, revision, path)
        commit = repo.head(unquote(revision))
        file = commit.files[unquote(path)]
        if file.large and (xet_hash := self._xet.xet_hash(file.sha256)) is not None:
            route = f"{self.endpoint}/api/models/{repo.id}/xet-read-token/{commit.sha}"
            by_xet = {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
            answer.headers |= by_xet
        return answer

    def large_file(self, sha256: str) -> StoredFile:
        if not self.object_path(sha256).exists() and self._xet.xet_hash(sha256) is not None:
            self._unpack_xet(sha256)
        return super().large_file(sha256)

    def _unpack_xet(self, sha256: str) -> None:
        """Put a file that came through Xet together, for clients without Xet, and to know that it is whole."""
        from hf_xet import XetFileInfo, XetSession

        token, expires = self._new_xet_token("read")
        group = XetSession().new_download_stream_group(
            endpoint=self.endpoint + self._cas_path, token=token, token_expiry_unix_secs=expires
        )
        size = self._xet.size(sha256)
        self.write_object(sha256, group.download_stream(XetFileInfo(self._xet.xet_hash(sha256), size)))

    def _new_xet_token(self, scope: str) -> tuple[str, int]:
        token = f"xet_{scope}_{secrets.token_hex(16)}"
        self._xet_tokens.add(token)
        return token, int(time.time()) + _XET_TOKEN_SECONDS

    def _xet_token(self, request: Request, repo_id: str, scope: str, revision: str) -> Response:
        if scope == "write":
            repo = self.committable(request, repo_id, revision)
        else:
            repo = self.readable(request, repo_id)
            self._check_gate(request, repo)
        if not request.query.get("create_pr"):  # with it, the client names no branch
            repo.head(unquote(revision))
        if not self.xet:
            raise HttpError(400, "Xet is not enabled for this repository")
        url = self.endpoint + self._cas_path
        token, expires = self._new_xet_token(scope)
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        return json_response({"casUrl": url, "accessToken": token, "exp": expires}, headers)

    def _cas(self, request: Request, path: str) -> Response:
        """Of the content-addressed store, all that clients need of it."""
        kind, _, name = path.rpartition("/")
        token = _token_of(request) or ""
        if token not in self._xet_tokens:
            raise HttpError(401, "Invalid Xet token")
        if request.method == "GET" and kind == "v1/reconstructions":
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "bytes=0-")
            start, end = (int(asked[1]), int(asked[2]) + 1 if asked[2] else None) if asked else (0, None)
            answer = self._xet.reconstruction(name, start, end, lambda xorb: self.signed_url(f"xorbs/{xorb}"))
            if answer is None:
                raise HttpError(416 if start else 404, "no such file or range")
            return json_response(answer)
        if request.method == "POST" and "_write_" in token:
            try:
                if kind == "v1/xorbs/default":
                    return json_response({"was_inserted": self._xet.put_xorb(name, request.body())})
                if path == "v1/shards":
                    self._xet.put_shard(request.body())
                    return json_response({"result": 1})
            except ValueError as error:
                raise HttpError(400, str(error)) from error
        # No deduplication across repositories, and none of the protocol's later versions: clients fall back.
        raise HttpError(404, "not found")

    def _get_xorb(self, request: Request, name: str) -> Response:
        self.check_signature(request, f"xorbs/{name}")
        return Response(self._xet.xorb_path(name))


def _token_of(request: Request) -> str | None:
    authorization = request.headers.get("Authorization")
    return None if authorization is None else authorization.removeprefix("Bearer ")


def _is_in(path: str, deleted: str) -> bool:
    return path == deleted or path.startswith(deleted.rstrip("/") + "/")
