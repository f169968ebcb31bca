# SPDX-License-Identifier: Apache-2.0
"""A repository of the local Hub, as git and the Hub's API name its parts."""

import hashlib
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from jai.demo.hub.http_server import HttpError


@dataclass(frozen=True)
class StoredFile:
    """A file of a commit. `oid` is git's name of the blob; for a large file that is its LFS pointer."""

    sha256: str
    size: int
    oid: str
    large: bool


@dataclass(frozen=True)
class Commit:
    """A commit with all files of the repository at it; `parent` is None for the first one."""

    sha: str
    title: str
    message: str
    date: str
    parent: str | None
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """A model repository: its commits by hash, and what its branches and tags point to."""

    id: str
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def head(self, revision: str = "main") -> Commit:
        """The commit that a branch, a tag or a hash names.

        Raises:
            HttpError: 404 if none does.
        """
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def add_commit(self, branch: str, title: str, message: str, files: dict[str, StoredFile]) -> Commit:
        """A commit with exactly these files, to which `branch` then points."""
        parent = self.branches.get(branch)
        listing = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(repr((parent, title, message, time.time_ns(), listing)).encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, message, now(), parent, files)
        self.branches[branch] = sha
        return self.commits[sha]


def now() -> str:
    """The time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
