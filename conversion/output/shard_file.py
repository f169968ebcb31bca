# SPDX-License-Identifier: Apache-2.0
"""A file that is written once, from its start to its end, at little cost of processor time.

Written data normally goes through the page cache, and filling that costs more than all the rest of a conversion. So it
is written past the cache (O_DIRECT) where the file system can. Where it cannot, the kernel copies ranges from file to
file (copy_file_range) where it can do that, and else they go through a buffer.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType

from jai.errors import UnfinishableError

_BUFFER_BYTES = 4 << 20  # a multiple of any block size
_COPY_BYTES = 64 << 20  # between two looks at whether to stop
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_NO_COPY_FILE_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


class ShardFile:
    """A new file, for `with`. Its bytes are all there only when the block has ended."""

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._is_direct = bool(_O_DIRECT)
        try:
            self._descriptor = os.open(path, flags | _O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._is_direct = False
            self._descriptor = os.open(path, flags, 0o666)
        self._copies_in_kernel = hasattr(os, "copy_file_range")
        # Direct writes need memory that begins at a page.
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._used = 0

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._stop_direct()  # the rest fills no block
                self._flush()
        finally:
            os.close(self._descriptor)

    def write(self, data: bytes | memoryview) -> int:
        """Append data, and say how long it is."""
        view = memoryview(data).cast("B")
        left = view
        while left:
            size = min(len(left), _BUFFER_BYTES - self._used)
            self._buffer[self._used : self._used + size] = left[:size]
            self._advance(size)
            left = left[size:]
        return len(view)

    def copy(self, source: FileIO, start: int, length: int) -> Iterator[int]:
        """Append bytes `start` to `start + length` of another file, yielding how many were copied in each step.

        Raises:
            UnfinishableError: if the other file ends before.
        """
        done = 0
        while done < length:
            if self._is_direct or not self._copies_in_kernel:
                size = self._copy_through_buffer(source, start + done, length - done)
            else:
                size = self._copy_in_kernel(source, start + done, length - done)
            if not size:
                raise UnfinishableError(
                    f"{source.name!s} is shorter than it was. Let nothing write to the inputs; fetch it and start "
                    "again."
                )
            done += size
            yield size

    def _copy_through_buffer(self, source: FileIO, start: int, length: int) -> int:
        room = min(length, _BUFFER_BYTES - self._used)
        size = os.preadv(source.fileno(), [self._buffer[self._used : self._used + room]], start)
        self._advance(size)
        return size

    def _copy_in_kernel(self, source: FileIO, start: int, length: int) -> int:
        self._flush()
        try:
            return os.copy_file_range(source.fileno(), self._descriptor, min(_COPY_BYTES, length), start)
        except OSError as error:
            if error.errno not in _NO_COPY_FILE_RANGE:
                raise
            self._copies_in_kernel = False
            return self._copy_through_buffer(source, start, length)

    def _advance(self, size: int) -> None:
        self._used += size
        if self._used == _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        left = self._buffer[: self._used]
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._stop_direct()  # some file systems refuse the write and not the opening
        self._used = 0

    def _stop_direct(self) -> None:
        if self._is_direct:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_O_DIRECT)
            self._is_direct = False
