# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint was made from: one file beside the weights, which holds its last step and, in it, all before.

A step names its inputs, and each input carries the step that made it. So the steps of a merge form a tree, and a folder
needs no other folder to say where it comes from. Records travel to the Hub; `redact` keeps access tokens out of them,
and out of all else that is printed, raised and uploaded.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from jai.errors import UserError
from jai.files import hash_each, read_json, sha256
from jai.hub import METADATA_PATTERNS, WEIGHTS_PATTERN, is_hub_id, local_folder
from jai.version import __version__

PROVENANCE_FILE = "provenance.json"
_PIECES, _PIECE_BYTES = 64, 4096  # of a weight file that is not read whole

# "step" is the verb or the stage ("convert", "upcycle", "merge", "sft", …), "inputs" is a list of `input_of`, and there
# may be "options", "versions" and "result"; of training also "dataset", "metrics", "steps", "hardware" and
# "log_history", the name of a file.
Step = dict[str, Any]
Input = dict[str, Any]
_MAPPINGS = ("options", "versions", "result", "metrics", "hardware")

# Access tokens of users and organisations, and the short-lived ones of Xet.
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|\bxet_(?:read|write)_[A-Za-z0-9]{16,}")
_HIDDEN = "hf_***"


def read_step(folder: Path) -> Step | None:
    """The step that made a checkpoint folder, or None where it has no record.

    A record by others may name paths; they are shortened as `write_step` does it.

    Raises:
        UserError: if its `provenance.json` is damaged.
    """
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return None
    remedy = "Fetch the checkpoint again, or remove the file to begin a new history."
    try:
        step = _portable(read_json(path, remedy))
        wrong = _wrong_step(step)
    except RecursionError:
        wrong = "it is nested too deeply"
    if wrong:
        raise UserError(f"{path} is not a record of how the checkpoint was made ({wrong}). {remedy}")
    return step


def write_step(folder: Path, step: Step) -> None:
    """Write the step that made a checkpoint folder.

    The record travels to the Hub, and paths say more than their owner may want to: of paths that stand alone, only the
    last part is written. Access tokens are hidden.
    """
    text = json.dumps(_portable(step), indent=2, ensure_ascii=False)
    (folder / PROVENANCE_FILE).write_text(redact(text) + "\n", encoding="utf-8")


def input_of(role: str, name: str | os.PathLike, *, files: Mapping[str, str], made_by: Step | None) -> Input:
    """An input of a step.

    Args:
        role: what it was in the step: "base", "model", "snapshot".
        name: folder or Hub id.
        files: SHA-256 of the files that were read, by name.
        made_by: the input's own step (`read_step`), None where it has no record.
    """
    is_from_hub = not Path(name).exists() and is_hub_id(os.fspath(name))
    return {
        "role": role,
        "name": os.fspath(name) if is_from_hub else Path(os.path.abspath(name)).name,
        "is_hub_id": is_from_hub,
        "files": dict(files),
        "made_by": made_by,
    }


def file_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files by name."""
    path_of = {path.name: path for path in paths}
    return hash_each(path_of, lambda name: sha256(path_of[name]))


def checkpoint_revision(model: str, revision: str | None = None, *, reads_weights: bool = True) -> str:
    """What tells a checkpoint from others: the Hub's commit, or a hash of the files in a folder.

    Args:
        model: folder or Hub id, which is downloaded.
        revision: commit, branch or tag on the Hub; None is the default branch.
        reads_weights: whether the weights of a folder are hashed whole; else 64 pieces of each file are, which
            takes no time however large they are. Training of a few rows may miss them all; then `provenance.json`
            tells.

    Raises:
        UserError: as `local_folder`.
    """
    patterns = [*METADATA_PATTERNS, WEIGHTS_PATTERN] if reads_weights else METADATA_PATTERNS
    folder = local_folder(model, patterns, revision=revision)
    if not Path(model).is_dir():
        return folder.name  # in the Hub's cache: snapshots/COMMIT
    paths = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".jinja", ".model")]
    paths = [path for path in paths if path.name != "evaluation.json"]  # which evaluations write
    is_hashed = {path: reads_weights or path.suffix != ".safetensors" for path in paths}
    hashes = file_hashes(path for path in paths if is_hashed[path])
    hashes |= {path.name: _hash_of_pieces(path) for path in paths if not is_hashed[path]}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _hash_of_pieces(path: Path) -> str:
    """SHA-256 of a file's size and of pieces that are spread evenly over it."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_PIECES):
            file.seek(max(size - _PIECE_BYTES, 0) * number // (_PIECES - 1))
            found.update(file.read(_PIECE_BYTES))
    return found.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Versions of JAI, of Python and of these packages."""
    return {
        "jai-llm": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def chain(step: Step | None) -> list[Step]:
    """All steps that led to a checkpoint, each after those that it needed, `step` itself last.

    Inputs come in their order, each with its whole history first. A step that several inputs share comes once; it is
    known by all that is recorded of it.
    """
    if step is None:
        return []
    steps: list[Step] = []
    for entry in step["inputs"]:
        steps += [earlier for earlier in chain(entry["made_by"]) if earlier not in steps]
    return [*steps, step]


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


def _wrong_step(step: Any) -> str | None:
    """What is wrong with a record, None where nothing is."""
    if not isinstance(step, dict) or not isinstance(step.get("step"), str):
        return "it names no step"
    if not isinstance(step.get("inputs"), list):
        return f"its step {step['step']!r} has no list of inputs"
    for key in _MAPPINGS:
        if not isinstance(step.get(key, {}), dict):
            return f"{key!r} of its step {step['step']!r} is not a mapping"
    if not isinstance(step.get("log_history", ""), str):
        return f"'log_history' of its step {step['step']!r} is not a name of a file"
    for entry in step["inputs"]:
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("role"), str)
            and isinstance(entry.get("name"), str)
            and isinstance(entry.get("is_hub_id"), bool)
            and isinstance(entry.get("files"), dict)
            and "made_by" in entry
        ):
            return f"an input of its step {step['step']!r} lacks role, name, is_hub_id, files or made_by"
        if entry["made_by"] is not None and (wrong := _wrong_step(entry["made_by"])):
            return wrong
    return None


def _portable(value: Any) -> Any:
    """A value as JSON holds it, without the folders of the machine that it was made on."""
    if isinstance(value, Mapping):
        return {_portable(str(key)): _portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    if isinstance(value, os.PathLike):
        return Path(value).name
    if isinstance(value, str):
        for kind in (PurePosixPath, PureWindowsPath):
            if value.startswith(("~", "./", "../")) or kind(value).is_absolute():
                return kind(value).name or value
    return value
