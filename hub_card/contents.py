# SPDX-License-Identifier: Apache-2.0
"""What of a folder may be published: the files that the manifest beside this file lists."""

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from jai.errors import UserError

_MANIFEST = Path(__file__).with_name("manifest")


@dataclass(frozen=True)
class Contents:
    """The files of a folder, as paths below it with forward slashes.

    Attributes:
        folder: the folder.
        kept: size in bytes of every file that may be published, in order of path.
        left_out: size in bytes of what stays at home; a folder counts as one entry, its name ending in "/".
    """

    folder: Path
    kept: dict[str, int]
    left_out: dict[str, int]


@cache
def manifest() -> tuple[str, ...]:
    """The glob patterns of what a published folder may hold."""
    lines = (line.strip() for line in _MANIFEST.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def in_manifest(path: str) -> bool:
    """Whether a path of a repository may be published."""
    return any(fnmatchcase(path, pattern) for pattern in manifest())


def size_text(size: int) -> str:
    """A number of bytes for people: "1.23 GB"."""
    amount, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


def read_contents(folder: str | os.PathLike) -> Contents:
    """Sort the files of a folder into what may be published and what stays.

    Raises:
        UserError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder. Give the folder of a checkpoint, as `jai convert` or `jai sft` wrote it."
        )
    kept: dict[str, int] = {}
    left_out: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if in_manifest(name):
            kept[name] = path.stat().st_size
        else:
            top = name if "/" not in name else name.split("/")[0] + "/"
            left_out[top] = left_out.get(top, 0) + path.stat().st_size
    return Contents(folder, kept, left_out)
