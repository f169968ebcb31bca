# SPDX-License-Identifier: Apache-2.0
"""Pull requests of the loopback Hub: a branch `refs/pr/N` with a title, an author and a state."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class PullRequest:
    """A pull request against `base`.

    Attributes:
        num: its number, counted from 1 in each repository.
        status: "draft", "open", "closed" or "merged".
        events: what happened, as the Hub's API tells it.
    """

    num: int
    title: str
    author: str
    base: str
    created: str
    status: str = "open"
    merge_commit: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"

    def happened(self, kind: str, date: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
        """Add an event; the event."""
        event = {"id": f"{self.num}-{len(self.events)}", "type": kind, "createdAt": date}
        self.events.append({**event, "author": {"name": author}, "data": data})
        return self.events[-1]

    def summary(self, repo_id: str) -> dict[str, Any]:
        """As in the list of a repository's discussions."""
        return {
            "num": self.num,
            "title": self.title,
            "author": {"name": self.author},
            "createdAt": self.created,
            "status": self.status,
            "repo": {"name": repo_id, "type": "model"},
            "isPullRequest": True,
        }

    def details(self, repo_id: str) -> dict[str, Any]:
        """As the Hub answers for one pull request."""
        changes = {"base": f"refs/heads/{self.base}", "mergeCommitId": self.merge_commit}
        return {**self.summary(repo_id), "events": self.events, "changes": changes, "filesWithConflicts": []}
