# SPDX-License-Identifier: Apache-2.0
"""Planned tensors become safetensors shards, at the speed of the disk and in bounded memory.

The form of every tensor is known, so a shard begins with its finished header. Ranges of source files are copied, what
is computed comes in chunks; `shard_file` says how they get to the disk. The output's bytes do not depend on the number
of workers, on where an earlier run stopped, or on how the bytes were copied.
"""

import json
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from jai.conversion.inputs.header import read_header
from jai.conversion.inputs.parts import Copied, Part
from jai.conversion.inputs.values import STORED_NAMES, bytes_of
from jai.conversion.inputs.weight_files import INDEX_FILE, WEIGHTS_FILE
from jai.conversion.inputs.weight_sources import WeightFiles
from jai.conversion.output.shard_file import ShardFile
from jai.conversion.output.tensors import PlannedTensor
from jai.errors import UnfinishableError, UserError
from jai.files import UnfinishedFolder

_COMPARED_BYTES = 1 << 20


@dataclass(frozen=True)
class OutputShard:
    """One file of the output."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def header(self) -> bytes:
        """The file's beginning: the length of the header, and the header as safetensors has it."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            entries[tensor.name] = {
                "dtype": STORED_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.bytes],
            }
            offset += tensor.bytes
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return struct.pack("<Q", len(encoded)) + encoded

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.bytes for tensor in self.tensors)

    @property
    def reads(self) -> set[tuple[WeightFiles, str]]:
        return {read for tensor in self.tensors for part in tensor.parts for read in part.reads}


def plan_shards(tensors: list[PlannedTensor], max_shard_bytes: int) -> list[OutputShard]:
    """Cut the tensors into files of at most `max_shard_bytes` of data each, a larger tensor alone in its own."""
    groups: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        if not groups or tensor.bytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= tensor.bytes
    count = len(groups)
    names = [WEIGHTS_FILE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return [OutputShard(name, tuple(group)) for name, group in zip(names, groups)]


def write_shards(
    job: UnfinishedFolder,
    tensors: list[PlannedTensor],
    max_shard_bytes: int,
    workers: int = 1,
    *,
    console: Console | None = None,
) -> None:
    """Write `tensors` into the folder of `job` as safetensors shards with an index, in the form of transformers.

    Shards that the job has finished already are left as they are.

    Args:
        job: where to write, from `resumable_folder`.
        tensors: what to write, in this order.
        max_shard_bytes: largest data of a shard.
        workers: shards to write at a time.
        console: where to show the progress; None is standard output.

    Raises:
        UserError: if the disk has too little room.
        UnfinishableError: if a source is cut short or changed while it is read, or a value that is computed is NaN,
            infinite, or too large for its dtype.
    """
    console = console or Console()
    shards = plan_shards(tensors, max_shard_bytes)
    todo = [shard for shard in shards if not job.has(shard.name, shard.size)]
    total, left = sum(shard.size for shard in shards), sum(shard.size for shard in todo)
    if (free := shutil.disk_usage(job.folder).free) < left:
        raise UserError(
            f"{job.out} needs {filesize.decimal(left)} more, but its disk has {filesize.decimal(free)}. Free some "
            "space or choose another disk."
        )
    if left < total:
        console.print(f"Going on: {len(shards) - len(todo)} of {len(shards)} shards are finished.", highlight=False)
    inputs = _InputFiles(todo)
    errors: list[BaseException] = []
    with _progress(console) as progress, _one_thread(), ThreadPoolExecutor(max(workers, 1)) as pool:
        task = progress.add_task("writing", total=total, completed=total - left)

        def advance(size: int) -> None:
            if errors:
                raise InterruptedError("another shard failed")
            progress.advance(task, size)

        def write(shard: OutputShard) -> None:
            try:
                _write_shard(job.folder / shard.name, shard, advance)
                for files, name in shard.reads:
                    files.check_unchanged(name)
                job.finish(shard.name)
                inputs.release(shard)
            except BaseException as error:  # the first one is raised below, and ends the others
                errors.append(error)

        for shard in todo:
            pool.submit(write, shard)
        try:
            pool.shutdown()
        except KeyboardInterrupt as interrupt:
            errors.append(interrupt)
    if errors:
        raise errors[0]
    if len(shards) > 1:
        index = {
            "metadata": {
                "total_parameters": sum(tensor.parameters for tensor in tensors),
                "total_size": sum(tensor.bytes for tensor in tensors),
            },
            "weight_map": {tensor.name: shard.name for shard in shards for tensor in shard.tensors},
        }
        (job.folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def compare_shards(folder: Path, tensors: list[PlannedTensor], max_shard_bytes: int, *, console: Console) -> int:
    """Read every byte of a written checkpoint again and compare it with its source, or with what is computed for it.

    Returns:
        The bytes compared, headers aside.

    Raises:
        UnfinishableError: naming the first tensor that differs.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    total, inputs = sum(tensor.bytes for tensor in tensors), _InputFiles(shards)
    with _progress(console) as progress, _one_thread():
        task = progress.add_task("verifying", total=total)
        for shard in shards:
            path = folder / shard.name
            header = read_header(path)
            with path.open("rb") as file:
                if file.read(header.data_start) != shard.header:
                    raise UnfinishableError(f"{path} does not hold the tensors that were planned. Convert again.")
                for tensor in shard.tensors:
                    for part in tensor.parts:
                        for expected in _chunks(tensor, part):
                            if file.read(len(expected)) != expected:
                                raise UnfinishableError(
                                    f"{tensor.name} in {path} is not what its source gives. The disk or the source has "
                                    "changed: convert again."
                                )
                            progress.advance(task, len(expected))
            inputs.release(shard)
    return total


class _InputFiles:
    """The files that some shards are made from, each released when the last shard that reads it is done."""

    def __init__(self, shards: list[OutputShard]):
        self._readers = Counter(read for shard in shards for read in shard.reads)
        self._mutex = Lock()

    def release(self, shard: OutputShard) -> None:
        with self._mutex:
            self._readers.subtract(shard.reads)
            unneeded = [read for read in shard.reads if not self._readers[read]]
        for files, name in unneeded:
            files.release(name)


def _chunks(tensor: PlannedTensor, part: Part) -> Iterator[bytes]:
    if not isinstance(part, Copied):
        yield from (bytes(bytes_of(tensor.rounded(part, chunk))) for chunk in part.make())
        return
    with part.files.path(part.file).open("rb") as source:
        source.seek(part.start)
        left = part.length
        while left:
            chunk = source.read(min(_COMPARED_BYTES, left))
            if not chunk:
                raise UnfinishableError(f"{source.name} is shorter than it was. Fetch it and start again.")
            left -= len(chunk)
            yield chunk


def _write_shard(path: Path, shard: OutputShard, advance: Callable[[int], object]) -> None:
    with ShardFile(path) as file:
        advance(file.write(shard.header))
        for tensor in shard.tensors:
            for part in tensor.parts:
                written = 0
                for size in _write_part(file, tensor, part):
                    advance(size)
                    written += size
                if written != part.length:
                    raise AssertionError(f"{tensor.name}: planned {part.length} bytes, made {written}")


def _write_part(file: ShardFile, tensor: PlannedTensor, part: Part) -> Iterator[int]:
    if isinstance(part, Copied):
        with part.files.path(part.file).open("rb", buffering=0) as source:
            yield from file.copy(source, part.start, part.length)
    else:
        for chunk in part.make():
            yield file.write(bytes_of(tensor.rounded(part, chunk)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums must not depend on the number of processors; shards are written in parallel, not parts of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
