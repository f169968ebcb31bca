# SPDX-License-Identifier: Apache-2.0
"""Weights that stay on the Hub: headers are read over the network, shards fetched when needed and then deleted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download

from jai.conversion.checkpoint import WEIGHTS_FILE, Header, hub_refusal, parse_header, read_header, weight_map
from jai.errors import UserError


class HubShards:
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
