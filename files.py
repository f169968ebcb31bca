# SPDX-License-Identifier: Apache-2.0
"""Folders that are complete or not there, hashes of files, and sizes as people write them."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jai.errors import UserError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for kind, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that becomes `out` when the block ends well, and is removed otherwise.

    Raises:
        UserError: if `out` exists already (an empty folder is taken), or its parent cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already. Give another output folder, or remove this one first.")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"Cannot write to {out.parent}: {error.strerror}. Give a folder that you may write.") from error
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException as error:  # Ctrl-C too: nothing half-written stays behind
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise UserError(
                f"Could not write {out}: {error.strerror}. Free some space or choose another disk; nothing was kept."
            ) from error
        raise


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT}


def sha256(path: str | os.PathLike) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_size(text: str) -> int:
    """Bytes of a size such as `500MB` (1000 × 1000), `2GiB` (1024 × 1024 × 1024) or `1500000`.

    Raises:
        UserError: if it is no size, or less than a byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    units = {name.lower(): size for name, size in _UNITS.items()}
    if not found or found[2].lower() not in units or (size := int(float(found[1]) * units[found[2].lower()])) < 1:
        raise UserError(
            f"{text!r} is no size. Give a number of bytes, with a unit if you like, such as 500MB, 2GiB or 1500000 "
            f"(units: {', '.join(filter(None, _UNITS))})."
        )
    return size
