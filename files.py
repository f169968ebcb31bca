# SPDX-License-Identifier: Apache-2.0
"""Folders that are complete or not there."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jai.errors import UserError


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
