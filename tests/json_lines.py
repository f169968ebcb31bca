# SPDX-License-Identifier: Apache-2.0
"""Files of rows, as tests make them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_rows(path: str | Path, rows: Iterable[Any]) -> Path:
    """Write JSON Lines, in a folder that is made where there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def turn(role: str, content: str) -> list[dict[str, str]]:
    """A message alone, as a prompt or an answer of a row."""
    return [{"role": role, "content": content}]
