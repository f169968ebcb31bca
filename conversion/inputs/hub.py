# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on the Hub: fetched whole, or read where they are, one shard at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download

from jai.conversion.inputs.header import Header, parse_header, read_header
from jai.conversion.inputs.values import refuse_not_finite
from jai.conversion.inputs.weight_files import WEIGHTS_FILE, weight_map
from jai.errors import UserError
from jai.hub import METADATA_PATTERNS, WEIGHTS_PATTERN, hub_refusal, local_folder


def resolve_checkpoint(name: str, *, weights: bool = True) -> Path:
    """Folder of a checkpoint: a local folder as it is, a Hub id after download.

    Args:
        name: folder or Hub id.
        weights: whether to download the weights too.

    Raises:
        UserError: if it is neither, or the Hub refuses.
    """
    return local_folder(name, [*METADATA_PATTERNS, *([WEIGHTS_PATTERN] if weights else [])])


class HubFiles:
    """The weight files of a Hub repository at one commit, of which only those that are needed are here.

    Args:
        repo_id: owner/name.
        metadata: folder with the files of the repository beside the weights, from the Hub's cache.
        downloads: folder for the shards; a shard that is there whole, from an earlier run, is not fetched again.

    Raises:
        UserError: if the Hub refuses.
    """

    def __init__(self, repo_id: str, metadata: Path, downloads: Path):
        self.repo_id = self.place = repo_id
        self.downloads = downloads
        with _asking(repo_id):
            info = HfApi().model_info(repo_id, files_metadata=True)
        assert info.sha is not None  # the Hub always names the commit
        self._revision = info.sha
        files = {sibling.rfilename: sibling for sibling in info.siblings or []}
        self.names = [WEIGHTS_FILE] if WEIGHTS_FILE in files else sorted(set((weight_map(metadata) or {}).values()))
        missing = [name for name in self.names if name not in files]
        if missing:
            raise UserError(f"{repo_id} lacks {', '.join(missing)}, which its index names. It cannot be converted.")
        self._files = {name: files[name] for name in self.names}
        self._locks = {name: Lock() for name in self.names}
        self._checked: set[str] = set()

    def header(self, name: str) -> Header:
        path = self.downloads / name
        if path.exists():
            return read_header(path)
        with (
            _asking(self.repo_id),
            HfFileSystem().open(f"{self.repo_id}@{self._revision}/{name}", block_size=1 << 20) as file,
        ):
            return parse_header(file, self._files[name].size or 0, f"{self.repo_id}/{name}")

    def path(self, name: str) -> Path:
        path = self.downloads / name
        with self._locks[name]:
            if not path.exists():
                with _asking(self.repo_id):
                    hf_hub_download(self.repo_id, name, revision=self._revision, local_dir=self.downloads)
            if name not in self._checked:  # nor is a shard that an earlier run fetched, which may have died before
                refuse_not_finite(path, read_header(path))
                self._checked.add(name)
        return path

    def release(self, name: str) -> None:
        with self._locks[name]:
            (self.downloads / name).unlink(missing_ok=True)

    def identity(self) -> dict[str, list]:
        return {name: [self._revision, self._files[name].size] for name in self.names}

    def sha256(self, name: str) -> str:
        lfs = self._files[name].lfs
        return lfs.sha256 if lfs else ""

    def check_unchanged(self, name: str) -> None:
        """Nothing: a commit does not change."""


@contextmanager
def _asking(repo_id: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds: the client is httpx or httpx2, depending on huggingface_hub's version
        raise hub_refusal(repo_id, error) from None
