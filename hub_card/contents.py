# SPDX-License-Identifier: Apache-2.0
"""What of a folder may be published: the files that the manifest beside this file lists."""

import os
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from jai.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
_MANIFEST = Path(__file__).with_name("manifest")


class Kind(StrEnum):
    """What a folder holds: a whole model, or a PEFT adapter of one."""

    MODEL = "model"
    ADAPTER = "adapter"


@dataclass(frozen=True)
class Contents:
    """The files of a folder, as paths below it with forward slashes.

    Attributes:
        folder: the folder.
        kind: a whole model or an adapter.
        kept: size in bytes of every file that may be published, in order of path.
        left_out: size in bytes of what stays at home; a folder counts as one entry, its name ending in "/".
    """

    folder: Path
    kind: Kind
    kept: dict[str, int]
    left_out: dict[str, int]


@cache
def manifest(kind: Kind) -> tuple[str, ...]:
    """The glob patterns of what a published folder of this kind may hold."""
    patterns, section = [], ""
    for line in map(str.strip, _MANIFEST.read_text(encoding="utf-8").splitlines()):
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#") and section in (kind, "both"):
            patterns.append(line)
    return tuple(patterns)


def in_manifest(path: str, kind: Kind) -> bool:
    """Whether a path of a repository may be published."""
    return any(fnmatchcase(path, pattern) for pattern in manifest(kind))


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
        UserError: if there is no such folder, or a file to publish is a link that leads out of it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder. Give the folder of a checkpoint, as `jai convert` or `jai sft` wrote it."
        )
    alone = (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
    kind = Kind.ADAPTER if alone else Kind.MODEL
    kept: dict[str, int] = {}
    left_out: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if in_manifest(name, kind):
            _refuse_foreign_link(folder, path)
            kept[name] = path.stat().st_size
        else:
            top = name if "/" not in name else name.split("/")[0] + "/"
            left_out[top] = left_out.get(top, 0) + path.stat().st_size
    return Contents(folder, kind, kept, left_out)


def _refuse_foreign_link(folder: Path, path: Path) -> None:
    """A link to anywhere would publish what the user does not see in the folder."""
    home, target = folder.resolve(), path.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home  # huggingface_hub's own cache
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise UserError(
            f"{path} is a link out of the folder, to {target}. Put the file itself there if it is to be published, or "
            "remove the link."
        )
