# SPDX-License-Identifier: Apache-2.0
"""Files: JSON that is checked when it is read, folders that are complete or not there, hashes, sizes, next commands.

A long work is gone on with where it was killed. Beside its output `OUT` lies `.OUT.partial` while work goes on:
`files/`, which becomes OUT by one rename at the end; `journal.json`, which says what is being made from what and which
files are finished and on the disk; and a lock.
"""

import dataclasses
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from jai.errors import UnfinishableError, UserError

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for kind, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_JSON_KINDS = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def check_is_file(path: Path, remedy: str = "Fetch or save it again.") -> None:
    """Refuse what is not a file, before it is opened: reading a named pipe waits for ever.

    Args:
        path: a file or a link to one, as the Hub's cache has them.
        remedy: what to do, for the message.

    Raises:
        UserError: if it is missing, a link to nothing, or something else than a file.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink():
            problem = f"is a link to {os.readlink(path)}, which cannot be followed ({error.strerror})"
        elif isinstance(error, FileNotFoundError):
            problem = "does not exist"
        else:
            problem = f"cannot be read ({error.strerror})"
    else:
        if stat.S_ISREG(mode):
            return
        problem = f"is {next((name for is_kind, name in _KINDS if is_kind(mode)), 'something else')}, not a file"
    raise UserError(f"{path} {problem}. {remedy}")


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, without the mark that some programs put before it.

    Raises:
        UserError: if it is no file, cannot be read, or is not UTF-8.
    """
    check_is_file(path, "Give a UTF-8 text file.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None


def read_json(path: str | os.PathLike, remedy: str = "Fetch or save it again.") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        remedy: what to do where it cannot be read, for the message.

    Raises:
        UserError: if it is no file, not UTF-8, no valid JSON, nested too deeply, or holds something else than an
            object.
    """
    path = Path(path)
    check_is_file(path, remedy)
    try:
        content = json.loads(path.read_bytes().decode())
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError as error:
        problem = f"is not JSON: it is not UTF-8 (byte {error.start})"
    except ValueError as error:
        problem = f"is not valid JSON ({error})"
    except RecursionError:
        problem = "is JSON that is nested too deeply"
    else:
        if isinstance(content, dict):
            return content
        problem = f"holds {_JSON_KINDS[type(content)]}, where a JSON object, {{…}}, was expected"
    raise UserError(f"{path} {problem}. {remedy}") from None


def from_json(kind: type[T], content: Any) -> T:
    """An instance of a dataclass from the JSON of its `dataclasses.asdict`.

    Args:
        kind: the dataclass; its fields may be dataclasses, lists, tuples and dictionaries in turn.
        content: what `json` read.

    Raises:
        TypeError: naming a field, at any depth, that is unknown, of another kind, or missing and without a default.
    """
    return _typed(kind, content, "it")


def _typed(hint: Any, given: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if given is None and type(None) in args:
            return None
        (hint,) = (each for each in args if each is not type(None))
        return _typed(hint, given, where)
    if hint is Any or (origin is Literal and given in args):
        return given
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(given, dict):
        hints = _hints(hint)
        if unknown := given.keys() - hints.keys():
            raise TypeError(f"{where} has the unknown field {min(unknown)!r}")
        return hint(**{name: _typed(hints[name], value, repr(name)) for name, value in given.items()})
    if origin in (list, tuple) and isinstance(given, list):
        return origin(_typed(args[0], each, f"an element of {where}") for each in given)
    if origin is dict and isinstance(given, dict):
        return {name: _typed(args[1], each, f"{name!r} of {where}") for name, each in given.items()}
    if type(given) is hint:
        return given
    if hint is float and type(given) is int and abs(given) < 2**1023:  # more is no float
        return float(given)
    raise TypeError(f"{where} is {_JSON_KINDS.get(type(given), 'an object')}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def print_next(console: "Console", *commands: Sequence[str | Path]) -> None:
    """Print commands that may come next, each given as its words, in a form that a shell takes."""
    for number, words in enumerate(commands):
        lead = "      " if number else "Next: "
        console.print(
            lead + shlex.join(os.fspath(word) for word in words), markup=False, highlight=False, soft_wrap=True
        )


@contextmanager
def new_folder(out: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `out` that becomes `out` when the block ends well, and is removed otherwise.

    Raises:
        UserError: if `out` exists already (an empty folder is taken), or its parent cannot be written.
    """
    out = Path(out)
    refuse_existing(out)
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
        if isinstance(error, KeyboardInterrupt):
            _say("Nothing was kept.")
        if problem := full_disk(error):
            raise UserError(
                f"Could not write {out}: {problem}. Free some space or choose another disk; nothing was kept."
            ) from error
        raise


def full_disk(error: BaseException) -> str | None:
    """What the system says, if an error comes of a full disk: a library in Rust has it in the message alone."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(found[1])
    return os.strerror(number) if number in _DISK_ERRORS else None


class _FileState(NamedTuple):
    """What tells a file that nothing wrote to: whoever shortens it or writes into it changes one of them."""

    size: int
    mtime_ns: int


class UnfinishedFolder:
    """Work on one output folder.

    Attributes:
        out: the folder that will be there at the end.
        work: the folder beside it that is there meanwhile.
        folder: where the output's files are written.
        finished: the files that are whole and on the disk, by name.
    """

    def __init__(self, out: Path, identity: dict[str, Any]):
        self.out = out
        self.work = work_folder(out)
        self.folder = self.work / "files"
        self.finished: dict[str, _FileState] = {}
        self._identity = identity
        self._journal = self.work / "journal.json"
        self._mutex = Lock()

    def has(self, name: str, size: int) -> bool:
        """Whether a file of this size is finished."""
        return name in self.finished and self.finished[name].size == size

    def finish(self, name: str) -> None:
        """Record that a file is written. It is flushed to the disk first, so the journal never says too much."""
        with (self.folder / name).open("rb") as file:
            os.fsync(file.fileno())
        with self._mutex:
            self.finished[name] = _file_state(self.folder / name)
            self._write_journal()

    def begin(self) -> None:
        """Read the journal of an earlier run, or start one. Files that changed since then are made again.

        Raises:
            UserError: if the earlier run had other inputs or options, or its journal cannot be read.
        """
        refuse_existing(self.out)  # another process may have finished it just before this one had the lock
        self.folder.mkdir(exist_ok=True)
        if not self._journal.exists():
            self._write_journal()
            return
        remedy = f"Remove {self.work} to start again."
        journal = read_json(self._journal, remedy)
        if not isinstance(finished := journal.get("finished"), dict) or "identity" not in journal:
            raise UserError(f"{self._journal} is not a journal of an unfinished folder. {remedy}")
        changes = list(differences(journal["identity"], json.loads(json.dumps(self._identity))))
        if changes:
            more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise UserError(
                f"{self.out} was begun with other inputs or options: {'; '.join(changes[:3])}{more}. Give the same "
                f"ones to resume it, or remove {self.work} to start again."
            )
        for path in self.folder.iterdir():
            state = _file_state(path)
            if finished.get(path.name) == [*state]:
                self.finished[path.name] = state
            else:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def complete(self) -> None:
        """Flush everything and rename the files to the output folder."""
        for path in self.folder.rglob("*"):
            if path.is_file() and path.name not in self.finished:
                _flush(path)
        _flush(self.folder)
        try:
            self.folder.rename(self.out)
        except OSError as error:
            raise UserError(
                f"{self.out} exists already, so the finished output stays in {self.folder}. Move one of them."
            ) from error
        _flush(self.out.parent)
        shutil.rmtree(self.work)

    def _write_journal(self) -> None:
        partial = self._journal.with_suffix(".new")
        content = {"identity": self._identity, "finished": self.finished}
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        _flush(partial)
        partial.rename(self._journal)
        _flush(self.work)


@contextmanager
def resumable_folder(out: Path, identity: dict[str, Any]) -> Iterator[UnfinishedFolder]:
    """Make the folder `out`: going on where an earlier run of the same work stopped, whole at the end.

    Where the block ends with an error, what is finished stays for the next run; where nothing is, or no run of the same
    work could end otherwise (`UnfinishableError`), nothing stays.

    Args:
        out: folder to make; it must not exist, or be empty.
        identity: what decides the bytes of the output: inputs and options, as JSON. An earlier run is gone on with only
            if its identity was the same.

    Raises:
        UserError: if `out` exists, cannot be written, is being made by another process, or was begun with another
            identity; and for a full disk.
    """
    refuse_existing(out)
    job = UnfinishedFolder(out, identity)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        job.work.mkdir(exist_ok=True)
        lock = lock_folder(job.work, out)
    except OSError as error:
        raise UserError(f"Cannot write to {out.parent}: {error.strerror}. Give a folder that you may write.") from error
    try:
        job.begin()
        try:
            yield job
            job.complete()
        except BaseException as error:
            if job.finished and not isinstance(error, UnfinishableError):
                count = (
                    "1 finished file stays" if len(job.finished) == 1 else f"{len(job.finished)} finished files stay"
                )
                kept = f"{count} in {job.work}: the same command goes on from there."
                _say(kept)
            else:
                shutil.rmtree(job.work, ignore_errors=True)
                if isinstance(error, KeyboardInterrupt):
                    _say("Nothing was kept.")
            if problem := full_disk(error):
                raise UserError(f"Could not write {out}: {problem}. Free some space or choose another disk.") from error
            raise
    finally:
        os.close(lock)


def _say(what_is_kept: str) -> None:
    from rich.console import Console  # here, for `jai --help` needs none

    Console(stderr=True).print(what_is_kept, highlight=False, markup=False, soft_wrap=True)


def work_folder(out: Path) -> Path:
    """Where an output is written until it is whole."""
    return out.with_name(f".{out.name}.partial")


def refuse_existing(out: Path) -> None:
    """Raise `UserError` if an output folder exists; an empty one is taken, but not `.`, on which a shell stands.

    Nor is a link, which no folder can be renamed to.
    """
    if not out.name:
        raise UserError(f"{out} is not a name that a folder can get. Give the path of a new folder.")
    if out.is_symlink():
        raise UserError(f"{out} is a link to {os.readlink(out)}. Give the folder that shall be made, not a link.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already. Give another output folder, or remove this one first.")


def refuse_overlap(out: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that would lie inside of an input, or be made where an input lies.

    Args:
        out: folder to make.
        inputs: folders that are read.

    Raises:
        UserError: naming both. An output in its input would be published with it; and what lies where an output is
            made, unknown to its journal, is removed.
    """
    made, work = out.resolve(), work_folder(out).resolve()
    for folder in map(Path.resolve, inputs):
        if made.is_relative_to(folder):
            raise UserError(f"The output {out} is inside the input {folder}. Give a folder outside of it.")
        if folder.is_relative_to(work) or folder.is_relative_to(made):
            raise UserError(f"The input {folder} lies where {out} is made. Give another output, or move the input.")


def lock_folder(work: Path, out: Path) -> int:
    """Lock a folder for this process; the lock ends with the process, however that ends.

    Args:
        work: the folder; the file `lock` in it is what is locked, and may be removed before the lock is closed.
        out: what is being made, for the message.

    Returns:
        The descriptor to close.

    Raises:
        UserError: if another process has the lock.
    """
    while True:
        path = work / "lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"Another process is making {out}. Wait for it, or give another output folder.") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:  # some network file systems have none
                os.close(lock)
                raise
        # A process that finished between our open and our lock has removed the file.
        if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
            return lock
        os.close(lock)
        work.mkdir(exist_ok=True)


def make_locked_folder(folder: Path) -> int:
    """Make a folder that may be there already, and lock it for this process.

    Returns:
        The descriptor to close, as of `lock_folder`.

    Raises:
        UserError: if another process has the lock, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock_folder(folder, folder)
    except OSError as error:
        raise UserError(f"Cannot write to {folder}: {error.strerror}. Give a folder that you may write.") from error


def write_whole(path: Path, content: str) -> None:
    """Write a text file that is there as a whole or not at all; one that is there is replaced."""
    partial = path.with_name(f"{path.name}.new")
    try:
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """What differs between two JSON values, a sentence each: "seed was 0 and is 1"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            yield from differences(old.get(key), new.get(key), f"{path} {key}".strip())
    elif old != new:
        yield f"{path} was {json.dumps(old, ensure_ascii=False)} and is {json.dumps(new, ensure_ascii=False)}"


def _file_state(path: Path) -> _FileState:
    status = path.lstat()
    return _FileState(status.st_size, status.st_mtime_ns)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | os.PathLike) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_each(names: Iterable[str], hash_of: Callable[[str], str]) -> dict[str, str]:
    """Hashes of files by name, in the names' order; several at a time, for hashing takes longer than reading.

    Args:
        names: of the files.
        hash_of: gives the hash of a name.
    """
    names = sorted(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(hash_of, names)))


def parse_size(text: str) -> int:
    """Bytes of a size such as `500MB` (1000 × 1000), `2GiB` (1024 × 1024 × 1024) or `1500000`.

    Raises:
        UserError: if it is no size, or less than a byte.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    units = {name.lower(): size for name, size in _UNITS.items()}
    if not found or found[2].lower() not in units or (size := int(float(found[1]) * units[found[2].lower()])) < 1:
        raise UserError(
            f"{text!r} is not a size. Give a number of bytes, with a unit if you like, such as 500MB, 2GiB or 1500000 "
            f"(units: {', '.join(filter(None, _UNITS))})."
        )
    return size
