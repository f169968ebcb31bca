# SPDX-License-Identifier: Apache-2.0
"""Requests to chat models, their replies, and the replies on the disk: what was answered once is not asked again."""

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jai.errors import UserError
from jai.files import from_json

Message = Mapping[str, str]


@dataclass(frozen=True)
class ChatRequest:
    """What a chat model is asked.

    Attributes:
        messages: with `role` and `content`, as OpenAI's API has them.
        parameters: of the sampling, by that API's names, such as `temperature` and `max_tokens`.
        repeat: number of this asking, where the same is asked several times.
    """

    messages: Sequence[Message]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 0

    def key(self, model: str) -> str:
        """What tells this request to a model from all others: a SHA-256 of all that decides the reply."""
        content = {
            "model": model,
            "messages": list(map(dict, self.messages)),
            "parameters": dict(self.parameters),
            "repeat": self.repeat,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ChatReply:
    """What a chat model answered.

    Attributes:
        text: the answer; empty where the model says nothing.
        model: the model that answered, by its own word.
        finish_reason: why it ended, such as "stop" or "length".
        prompt_tokens, reply_tokens: as the endpoint counts them; None where it does not say.
    """

    text: str
    model: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    reply_tokens: int | None = None


class ReplyCache:
    """Replies in an SQLite file. Several processes may use one file.

    A reply outlives its process once `put` has returned. A machine that loses its power may lose the last ones: to wait
    for the disk takes 20 ms a reply, where a server nearby gives hundreds a second.

    Args:
        path: of the file; it is made where there is none.

    Raises:
        UserError: if it cannot be opened, or is something else.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # The client's event loop runs in a thread of its own; only one thread at a time comes here.
            self._database = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"{path} cannot be used as a cache of replies ({error}). Remove it, or give another place."
            ) from None

    def get(self, key: str) -> ChatReply | None:
        """The reply to a request, None where there is none.

        Raises:
            UserError: if the file is damaged.
        """
        try:
            row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            return None if row is None else from_json(ChatReply, json.loads(row[0]))
        except (sqlite3.Error, ValueError, TypeError) as error:
            raise UserError(f"The cache of replies {self.path} is damaged ({error}). Remove it.") from None

    def put(self, key: str, reply: ChatReply) -> None:
        """Keep a reply.

        Raises:
            UserError: if it cannot be written.
        """
        try:
            text = json.dumps(asdict(reply), ensure_ascii=True)  # a lone surrogate is no UTF-8
            self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, text))
        except sqlite3.Error as error:
            raise UserError(
                f"Replies cannot be written to {self.path} ({error}). Free some space, or give another place."
            ) from None

    def close(self) -> None:
        self._database.close()
