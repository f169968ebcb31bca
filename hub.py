# SPDX-License-Identifier: Apache-2.0
"""What lies on the Hub, or in a folder of that name. Without a network everything here fails at once."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jai.errors import UserError

METADATA_PATTERNS = ("*.json", "*.jinja", "*.py", "*.model", "*.txt", "*.tiktoken")
WEIGHTS_PATTERN = "*.safetensors"
# The rules of the Hub's client, which takes 0.25 s of processor time to import (tests/test_files.py compares them).
_NAME = r"[a-zA-Z0-9_](?:[a-zA-Z0-9_.-]{0,94}[a-zA-Z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git\Z))(?:{_NAME}/)?{_NAME}", re.DOTALL)


def local_folder(name: str | Path, patterns: Sequence[str] = METADATA_PATTERNS, *, revision: str | None = None) -> Path:
    """A folder as it is; of a repository on the Hub, the cache's folder after download, or as it is where offline.

    Args:
        name: folder or Hub id.
        patterns: files to download.
        revision: commit, branch or tag on the Hub; None is the default branch.

    Raises:
        UserError: if it is neither, or the Hub refuses.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{name} is a file. Give the folder of a checkpoint, or a Hub id.{_gguf_hint([folder])}")
    if not is_hub_id(str(name)):
        raise UserError(f"{name} is neither a folder nor a Hub id. Give a folder that exists, or owner/name.")
    from huggingface_hub import snapshot_download

    try:
        # It asks for the commit, once. Where there is no network, a file by itself is asked for six times in 23 s.
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # of many kinds: the client is httpx or httpx2, depending on huggingface_hub's version
        raise hub_refusal(name, error) from error


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a repository on the Hub; nobody is asked whether it is there."""
    return _HUB_ID.fullmatch(name) is not None


def hub_refusal(name: str | Path, error: Exception) -> UserError:
    """What to tell the user when the Hub does not give a repository."""
    from huggingface_hub import constants  # its first caller has imported it

    if constants.HF_HUB_OFFLINE:
        return UserError(
            f"{name} is not a local folder, and it is not in the Hub cache. HF_HUB_OFFLINE is set: give a folder, or "
            "unset it to download the model."
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return UserError(
        f"{name} is not a local folder, and it cannot be downloaded from the Hub: {reason}. Check the name and the "
        "network; log in with `hf auth login` if the repository is private."
    )


def no_config(folder: str | Path, remedy: str) -> UserError:
    """What to tell the user of a folder without config.json."""
    return UserError(
        f"{folder} has no config.json, so it is not a checkpoint. {remedy}{_gguf_hint(Path(folder).iterdir())}"
    )


def _gguf_hint(paths: Iterable[Path]) -> str:
    is_gguf = any(path.suffix.lower() == ".gguf" for path in paths)
    return " GGUF is not supported: use the original model's safetensors files." if is_gguf else ""
