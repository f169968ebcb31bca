# SPDX-License-Identifier: Apache-2.0
"""Keep access tokens out of what is printed, raised and uploaded."""

import re
from pathlib import Path

# Access tokens of users and organisations, and the short-lived ones of Xet.
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|\bxet_(?:read|write)_[A-Za-z0-9]{16,}")
_HIDDEN = "hf_***"


def redact(text: str, *tokens: str | None) -> str:
    """`text` without these tokens, nor anything else that looks like one."""
    for token in tokens:
        if token:
            text = text.replace(token, _HIDDEN)
            text = text.replace(repr(token)[1:-1], _HIDDEN)  # as it looks inside the message of another exception
    return _TOKEN.sub(_HIDDEN, text)


def holds_token(path: Path, *tokens: str | None) -> bool:
    """Whether a text file holds one of these tokens or anything that looks like an access token."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return redact(text, *tokens) != text
