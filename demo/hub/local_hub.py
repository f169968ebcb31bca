# SPDX-License-Identifier: Apache-2.0
"""A Hub on 127.0.0.1: the HTTP calls by which huggingface_hub makes a model repository, fills it and reads it.

It has one user and public repositories. Commits live in memory, the bytes of files on disk. As on the Hub, large files
are served from another host name, by a signed link and without the token.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import metadata_load

from jai.demo.hub.http_server import HttpError, HubHandler, HubServer, Request, Response, json_response
from jai.demo.hub.repo import Commit, Repo, StoredFile, git_oid, lfs_pointer

_LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf", ".model", ".msgpack", ".npy", ".npz", ".onnx", ".pt", ".pth", ".h5")
_LARGE_BYTES = 10 * 2**20  # the Hub refuses larger files as plain git blobs
_REPO_ID = "([^/]+/[^/]+)"  # revisions come with their slashes quoted

Route = tuple[str, str, Callable[..., Response]]  # methods, pattern of the path, what answers


class LocalHub:
    """A Hub that runs while the `with` block does.

    Args:
        root: folder for the bytes of files (`objects/`) and for the caches of `environment()`; the caller removes it.
        token: the user's token; drawn at random if not given.
        user: name of that user, and the only namespace it may write to.
        handler: what reads requests and sends answers.
    """

    def __init__(
        self, root: str | Path, token: str | None = None, user: str = "demo", handler: type[HubHandler] = HubHandler
    ):
        self.root = Path(root).resolve()  # the caches of `environment()` are for processes in any folder
        self.token = token or new_token()
        self.user = user
        self.server = HubServer(self.answer, handler)
        self._routes = [
            (methods.split(), re.compile(pattern.replace("R!", _REPO_ID)), route)
            for methods, pattern, route in self.routes()
        ]
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        self._secret = secrets.token_bytes(32)
        self._objects = self.root / "objects"
        self._objects.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "LocalHub":
        self.server.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.__exit__(*exception)

    @property
    def endpoint(self) -> str:
        """Address of the Hub, for `HF_ENDPOINT` or `HfApi(endpoint=…)`."""
        return f"http://127.0.0.1:{self.server.server_port}"

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
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def routes(self) -> list[Route]:
        """What answers which call; in patterns, `R!` stands for a repository's id. The first that fits is taken."""
        return [
            ("POST", "/api/repos/create", self._create_repo),
            ("POST", "/api/validate-yaml", self._validate_card),
            ("GET", "/api/models/R!", self._model_info),
            ("GET", "/api/models/R!/revision/([^/]+)", self._model_info),
            ("GET", "/api/models/R!/tree/([^/]+)(?:/(.+))?", self._tree),
            ("POST", "/api/models/R!/tag/([^/]+)", self._create_tag),
            ("POST", "/api/models/R!/preupload/([^/]+)", self._preupload),
            ("POST", "/api/models/R!/commit/([^/]+)", self._commit),
            ("POST", r"/R!\.git/info/lfs/objects/batch", self._lfs_batch),
            ("POST", r"/R!\.git/info/lfs/objects/verify", self._verify_object),
            ("GET HEAD", "/R!/resolve/([^/]+)/(.+)", self.resolve),
            ("PUT", "/uploads/([0-9a-f]{64})", self._put_object),
            ("GET HEAD", "/objects/([0-9a-f]{64})", self._get_object),
        ]

    def answer(self, request: Request) -> Response:
        """The answer to a request.

        Raises:
            HttpError: where the answer is an error.
        """
        request.user = self.user_of(request)
        for methods, pattern, route in self._routes:
            if request.method in methods and (match := pattern.fullmatch(request.path)):
                return route(request, *match.groups())
        if re.match(r"/api/models/|/.+/resolve/", request.path):
            raise HttpError(401 if request.user is None else 404, "Repository not found", "RepoNotFound")
        raise HttpError(404, f"no such route: {request.method} {request.path}")

    # Who may do what

    def user_of(self, request: Request) -> str | None:
        """Whose token a request brings, None where it brings none; HttpError 401 for a token of nobody."""
        authorization = request.headers.get("Authorization")
        if authorization is None:
            return None
        if hmac.compare_digest(authorization.encode(), f"Bearer {self.token}".encode()):
            return self.user
        raise HttpError(401, "Invalid credentials in Authorization header")

    def writer_of(self, request: Request) -> str:
        """The user, who has to be signed in."""
        if request.user is None:
            raise HttpError(401, "Invalid username or password.")
        return request.user

    def readable(self, request: Request, repo_id: str) -> Repo:
        """A repository that a request may read; HttpError where it is not there for it."""
        repo = self.repos.get(unquote(repo_id))
        if repo is None:
            raise HttpError(401 if request.user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: Request, repo_id: str) -> Repo:
        """A repository that a request may change."""
        user = self.writer_of(request)
        repo = self.readable(request, repo_id)
        self.check_namespace(user, repo.owner)
        return repo

    def committable(self, request: Request, repo_id: str, revision: str) -> Repo:
        """The repository, to a revision of which this request may add."""
        return self.writable(request, repo_id)

    def check_namespace(self, user: str, namespace: str) -> None:
        """Raise HttpError 403 if a user may not write to a namespace."""
        if namespace != user:
            raise HttpError(403, f"You don't have the rights to write models under the namespace {namespace!r}")

    def _signature(self, what: str) -> str:
        return hmac.new(self._secret, what.encode(), "sha256").hexdigest()

    def signed_url(self, what: str) -> str:
        """A link to a file of the server that needs no token."""
        return f"http://localhost:{self.server.server_port}/{what}?signature={self._signature(what)}"

    def check_signature(self, request: Request, what: str) -> None:
        """Raise HttpError 403 if a request did not come by the signed link to a file."""
        if not hmac.compare_digest(request.query.get("signature", ""), self._signature(what)):
            raise HttpError(403, "SignatureDoesNotMatch")

    # Repositories

    def _create_repo(self, request: Request) -> Response:
        user = self.writer_of(request)
        asked = request.json()
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        self.check_namespace(user, repo_id.split("/")[0])
        url = {"url": f"{self.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.lock:
            if repo_id in self.repos:
                return json_response({**url, "error": "You already created this model repo"}, status=409)
            attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in _LARGE_SUFFIXES).encode()
            repo = self.new_repo(repo_id, asked)
            repo.add_commit("main", "initial commit", "", {".gitattributes": self._store(attributes)})
            self.repos[repo_id] = repo
        return json_response(url)

    def new_repo(self, repo_id: str, asked: dict[str, Any]) -> Repo:
        """An empty repository as a client asked for it."""
        return Repo(repo_id)

    def _create_tag(self, request: Request, repo_id: str, revision: str) -> Response:
        repo = self.writable(request, repo_id)
        tag = request.json()["tag"]
        with self.lock:
            if tag in repo.tags:
                raise HttpError(409, f"Tag reference exists already: {tag}")
            repo.tags[tag] = repo.head(unquote(revision)).sha
        return Response()

    def _model_info(self, request: Request, repo_id: str, revision: str = "main") -> Response:
        repo = self.readable(request, repo_id)
        return json_response(self.repo_info(repo, repo.head(unquote(revision))))

    def repo_info(self, repo: Repo, commit: Commit) -> dict[str, Any]:
        """What the Hub's API says of a repository at a commit."""
        siblings = [self._sibling(path, file) for path, file in commit.files.items()]
        card = (
            metadata_load(self.object_path(commit.files["README.md"].sha256)) if "README.md" in commit.files else None
        )
        info = {"id": repo.id, "sha": commit.sha, "private": False, "siblings": siblings, "cardData": card}
        from_card = {key: (card or {}).get(key) for key in ("tags", "library_name", "pipeline_tag")}
        return {**info, **from_card, "lastModified": commit.date, "gated": False, "disabled": False}

    def _sibling(self, path: str, file: StoredFile) -> dict[str, Any]:
        sibling: dict[str, Any] = {"rfilename": path, "size": file.size, "blobId": file.oid}
        if file.large:
            pointer_size = len(lfs_pointer(file.sha256, file.size))
            sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": pointer_size}
        return sibling

    # Reading files

    def file_entry(self, path: str, file: StoredFile) -> dict[str, Any]:
        """A file as it stands in the list of a folder."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
        if file.large:
            pointer_size = len(lfs_pointer(file.sha256, file.size))
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": pointer_size}
        return entry

    def _tree(self, request: Request, repo_id: str, revision: str, folder: str | None = None) -> Response:
        commit = self.readable(request, repo_id).head(unquote(revision))
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
            entries[path] = self.file_entry(path, file)
        if request.query.get("recursive", "").lower() not in ("true", "1"):
            entries = {name: entry for name, entry in entries.items() if "/" not in name[len(prefix) :]}
        return json_response(list(entries.values()))

    def resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Response:
        """The content of a file, or for a large one the link to it."""
        repo = self.readable(request, repo_id)
        commit = repo.head(unquote(revision))
        file = commit.files.get(unquote(path))
        headers = {"X-Repo-Commit": commit.sha}
        if file is None:
            raise HttpError(404, "Entry not found", "EntryNotFound")
        if not file.large:
            return Response(self.object_path(file.sha256), {**headers, "ETag": f'"{file.oid}"'})
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = self.signed_url(f"objects/{file.sha256}")
        return Response(b"", headers, status=302)

    def _get_object(self, request: Request, sha256: str) -> Response:
        self.check_signature(request, f"objects/{sha256}")
        return Response(self.object_path(sha256), {"ETag": f'"{sha256}"'})

    # Writing files

    def object_path(self, sha256: str) -> Path:
        """Where the content with this hash lies, or would."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise HttpError(400, "not a SHA-256")
        return self._objects / sha256

    def _store(self, content: bytes) -> StoredFile:
        sha256 = hashlib.sha256(content).hexdigest()
        self.object_path(sha256).write_bytes(content)
        return StoredFile(sha256, len(content), git_oid(content), large=False)

    def _validate_card(self, request: Request) -> Response:
        content = request.json()["content"]
        head = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
        errors, warnings = [], []
        try:
            metadata = yaml.safe_load(head[1]) if head else None
        except yaml.YAMLError as error:
            metadata, errors = {}, [f"YAML: {error}"]
        if metadata is not None and not isinstance(metadata, dict):
            metadata, errors = {}, ["the metadata is not a mapping"]
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
        return json_response(found, status=400 if errors else 200)

    def _preupload(self, request: Request, repo_id: str, revision: str) -> Response:
        commit = self.committable(request, repo_id, revision).head(unquote(revision))
        files = []
        for asked in request.json()["files"]:
            binary = b"\0" in base64.b64decode(asked.get("sample", ""))
            large = binary or asked["size"] > _LARGE_BYTES or asked["path"].endswith(_LARGE_SUFFIXES)
            there = commit.files.get(asked["path"])
            oid = None if there is None else there.sha256 if there.large else there.oid
            mode = "lfs" if large else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return json_response({"files": files, "commitOid": commit.sha})

    def _lfs_batch(self, request: Request, repo_id: str) -> Response:
        self.writer_of(request)  # the batch does not say to which revision it goes
        repo = self.readable(request, repo_id)
        objects = []
        for asked in request.json()["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if not self.object_path(asked["oid"]).exists():
                upload = {"href": self.signed_url(f"uploads/{asked['oid']}")}
                verify = {"href": f"{self.endpoint}/{repo.id}.git/info/lfs/objects/verify"}
                answer["actions"] = {"upload": upload, "verify": verify}
            objects.append(answer)
        return json_response({"transfer": "basic", "objects": objects})

    def _put_object(self, request: Request, sha256: str) -> Response:
        self.check_signature(request, f"uploads/{sha256}")
        self.write_object(sha256, request.blocks)
        return Response()

    def write_object(self, sha256: str, blocks: Iterator[bytes]) -> None:
        """Keep content that must have this hash, whole or not at all."""
        partial = self._objects / f"{sha256}.{threading.get_ident()}"
        digest = hashlib.sha256()
        with partial.open("wb") as file:
            for block in blocks:
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != sha256:
            partial.unlink()
            raise HttpError(400, f"the content is not {sha256}")
        partial.rename(self.object_path(sha256))

    def _verify_object(self, request: Request, repo_id: str) -> Response:
        self.writer_of(request)
        self.readable(request, repo_id)
        asked = request.json()
        path = self.object_path(asked["oid"])
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise HttpError(404, f"{asked['oid']} was not uploaded")
        return Response()

    def _commit(self, request: Request, repo_id: str, revision: str) -> Response:
        repo = self.committable(request, repo_id, revision)
        header: dict[str, str] = {}
        changes: dict[str, StoredFile | None] = {}
        for line in request.body().splitlines():
            operation = json.loads(line)
            if operation["key"] == "header":
                header = operation["value"]
            else:
                changes[operation["value"]["path"]] = self.changed_file(operation["key"], operation["value"])
        with self.lock:  # all of it or nothing
            return json_response(self.apply_commit(request, repo, unquote(revision), header, changes))

    def changed_file(self, key: str, value: dict[str, str]) -> StoredFile | None:
        """The file of one operation of a commit."""
        if key == "file":
            return self._store(base64.b64decode(value["content"]))
        if key == "lfsFile":
            return self.large_file(value["oid"])
        raise HttpError(400, f"unknown operation {key!r}")

    def apply_commit(
        self, request: Request, repo: Repo, branch: str, header: dict[str, str], changes: dict[str, StoredFile | None]
    ) -> dict[str, Any]:
        """Commit changes to a branch; what the Hub says of it."""
        files = self.changed_files(repo.head(branch).files, changes)
        if branch not in repo.branches:
            raise HttpError(403, "commits go to a branch")
        commit = repo.add_commit(branch, header["summary"], header.get("description", ""), files)
        url = f"{self.endpoint}/{repo.id}/commit/{commit.sha}"
        return {"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""}

    def changed_files(
        self, files: dict[str, StoredFile], changes: dict[str, StoredFile | None]
    ) -> dict[str, StoredFile]:
        """The files of a repository after changes."""
        return {**files, **{path: file for path, file in changes.items() if file}}

    def large_file(self, sha256: str) -> StoredFile:
        """A large file whose content has come."""
        if not self.object_path(sha256).exists():
            raise HttpError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        size = self.object_path(sha256).stat().st_size
        return StoredFile(sha256, size, git_oid(lfs_pointer(sha256, size)), large=True)


def new_token() -> str:
    """An access token that nobody else has."""
    return f"hf_{secrets.token_hex(17)}"
