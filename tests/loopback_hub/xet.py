# SPDX-License-Identifier: Apache-2.0
"""The Xet store behind the loopback Hub: xorbs (packed chunks) and shards (which chunks make up which file).

Only what a server needs of https://huggingface.co/docs/xet: it stores what clients send and tells them where the bytes
of a file lie. It never unpacks a chunk; clients chunk, compress, hash and verify.
"""

import re
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_ENTRY = 48  # bytes of every record of a shard, and of its header
_END = b"\xff" * 32
_HAS_VERIFICATION, _HAS_METADATA = 0x80000000, 0x40000000


@dataclass(frozen=True)
class Segment:
    """Some chunks of a xorb that are the next `length` bytes of a file."""

    xorb: str
    length: int
    first_chunk: int
    end_chunk: int


@dataclass(frozen=True)
class ShardFile:
    """One file, as a shard describes it."""

    xet_hash: str
    sha256: str | None
    segments: tuple[Segment, ...]


def hash_text(raw: bytes) -> str:
    """The Xet spelling of a 32-byte hash: four little-endian numbers, each as 16 hexadecimal digits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def shard_files(shard: bytes) -> Iterator[ShardFile]:
    """The files that a serialised shard describes.

    Raises:
        ValueError: if it is no shard.
    """
    if not shard.startswith(b"HFRepoMetaData\0"):
        raise ValueError("not a Xet shard")
    offset = _ENTRY
    while shard[offset : offset + 32] != _END:
        if offset + _ENTRY > len(shard):
            raise ValueError("the shard is cut off")
        name = hash_text(shard[offset : offset + 32])
        flags, count = struct.unpack_from("<II", shard, offset + 32)
        offset += _ENTRY
        segments = []
        for _ in range(count):
            _, length, first, end = struct.unpack_from("<IIII", shard, offset + 32)
            segments.append(Segment(hash_text(shard[offset : offset + 32]), length, first, end))
            offset += _ENTRY
        if flags & _HAS_VERIFICATION:
            offset += _ENTRY * count
        sha256 = None
        if flags & _HAS_METADATA:
            sha256 = hash_text(shard[offset : offset + 32])
            offset += _ENTRY
        yield ShardFile(name, sha256, tuple(segments))


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where each packed chunk of a xorb begins, and where the last one ends."""
    offsets = [0]
    # A chunk's header: version 0, packed size (3 bytes), kind of compression, unpacked size (3 bytes). What follows
    # the chunks, if anything, is a footer that begins with its own tag.
    while offsets[-1] + 8 <= len(xorb) and not xorb.startswith(b"XETBLOB", offsets[-1]):
        packed = int.from_bytes(xorb[offsets[-1] + 1 : offsets[-1] + 4], "little")
        offsets.append(offsets[-1] + 8 + packed)
    return offsets


class XetStore:
    """Xorbs on disk, files in memory."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._files: dict[str, ShardFile] = {}
        self._by_sha256: dict[str, ShardFile] = {}

    def put_xorb(self, name: str, body: bytes) -> bool:
        """Keep a xorb; whether it was new."""
        path = self.xorb_path(name)
        if path.exists():
            return False
        partial = path.with_suffix(f".{threading.get_ident()}")
        partial.write_bytes(body)
        partial.rename(path)
        return True

    def put_shard(self, shard: bytes) -> None:
        """Learn the files of a shard.

        Raises:
            ValueError: if it is no shard, or names a xorb that was never sent.
        """
        files = list(shard_files(shard))
        missing = {s.xorb for f in files for s in f.segments if not self.xorb_path(s.xorb).exists()}
        if missing:
            raise ValueError(f"xorbs that were never uploaded: {', '.join(sorted(missing))}")
        with self._lock:
            for file in files:
                self._files[file.xet_hash] = file
                if file.sha256 is not None:
                    self._by_sha256[file.sha256] = file

    def xet_hash(self, sha256: str) -> str | None:
        """Xet's name of the content with this SHA-256, if it was uploaded that way."""
        file = self._by_sha256.get(sha256)
        return file.xet_hash if file else None

    def size(self, sha256: str) -> int:
        """Bytes of the content with this SHA-256."""
        return sum(segment.length for segment in self._by_sha256[sha256].segments)

    def xorb_path(self, name: str) -> Path:
        """Where the xorb of that name lies, or would.

        Raises:
            ValueError: if that is no name of a xorb.
        """
        if not re.fullmatch("[0-9a-f]{64}", name):
            raise ValueError(f"{name!r} is no Xet hash")
        return self._folder / name

    def reconstruction(
        self, xet_hash: str, start: int, end: int | None, xorb_url: Callable[[str], str]
    ) -> dict[str, object] | None:
        """How to put bytes `start` to `end` (exclusive) of a file together: the CAS protocol's answer, version 1.

        `None` if the file is not known, or shorter than `start`.
        """
        file = self._files.get(xet_hash)
        if file is None:
            return None
        wanted: list[Segment] = []
        skipped = position = 0
        for segment in file.segments:
            begin, position = position, position + segment.length
            if position <= start or (end is not None and begin >= end):
                continue
            if not wanted:
                skipped = start - begin
            wanted.append(segment)
        if not wanted:
            return None
        terms = [
            {"hash": s.xorb, "unpacked_length": s.length, "range": {"start": s.first_chunk, "end": s.end_chunk}}
            for s in wanted
        ]
        # One entry for each xorb, from the first chunk to the last: clients lose count over entries that overlap.
        fetch = {}
        for xorb in {segment.xorb for segment in wanted}:
            first = min(segment.first_chunk for segment in wanted if segment.xorb == xorb)
            last = max(segment.end_chunk for segment in wanted if segment.xorb == xorb)
            offsets = chunk_offsets(self.xorb_path(xorb).read_bytes())
            where = {"start": offsets[first], "end": offsets[last] - 1}
            fetch[xorb] = [{"range": {"start": first, "end": last}, "url": xorb_url(xorb), "url_range": where}]
        return {"offset_into_first_range": skipped, "terms": terms, "fetch_info": fetch}
