# SPDX-License-Identifier: Apache-2.0
"""The log-probabilities of preference training's reference, computed once.

TRL keeps them in a file that is there when all of them are, under a name that another order of the rows changes. Here
each pair is kept as it comes, under its tokens: a run that was killed goes on, and so does one with more rows, another
mixture or another seed.
"""

import json
import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset

from jai.errors import UserError
from jai.files import lock_folder
from jai.version import __version__

_RECORD = np.dtype([("pair", "V16"), ("chosen", "<f4"), ("rejected", "<f4")])


def log_probs_folder(**identity: Any) -> Path:
    """Where log-probabilities are kept, in the cache of `datasets`: a folder for each reference and way to compute.

    Args:
        identity: all that decides the numbers but the tokens, as values of JSON.
    """
    text = json.dumps({**identity, "version": __version__}, sort_keys=True, default=str)
    name = blake2b(text.encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "jai_reference_log_probs" / name


def pair_keys(rows: Dataset) -> list[bytes]:
    """What pairs are known by: a hash of their tokens, 16 bytes each."""
    keys = []
    for row in rows.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
        hashed = blake2b(digest_size=_RECORD["pair"].itemsize)
        for ids in row.values():
            hashed.update(np.array([len(ids), *ids], dtype=np.int64).tobytes())
        keys.append(hashed.digest())
    return keys


class KeptLogProbs:
    """A file of pairs with both log-probabilities, to which is added until the process ends, however that ends.

    Args:
        folder: of `log_probs_folder`; it is made.

    Raises:
        UserError: if another process adds to it.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_folder(folder, folder)
        except UserError:
            raise UserError(
                f"Another run is computing log-probabilities of the same reference, in {folder}. Wait until it has "
                "them: both can use them."
            ) from None
        self._path = folder / "log_probs.bin"
        size = self._path.stat().st_size if self._path.exists() else 0
        if rest := size % _RECORD.itemsize:  # of a process that was killed while it wrote
            os.truncate(self._path, size - rest)

    def close(self) -> None:
        """Let others in."""
        os.close(self._lock)

    def read(self, keys: Sequence[bytes]) -> np.ndarray:
        """The log-probabilities of the chosen and the rejected answer, NaN where there are none. Shape (pairs, 2)."""
        records = np.fromfile(self._path, dtype=_RECORD) if self._path.exists() else np.zeros(0, dtype=_RECORD)
        place = {key.tobytes(): number for number, key in enumerate(records["pair"])}
        found = np.full((len(keys), 2), np.nan, dtype=np.float32)
        for number, key in enumerate(keys):
            if (at := place.get(key)) is not None:
                found[number] = records["chosen"][at], records["rejected"][at]
        return found

    def add(self, keys: Iterable[bytes], values: np.ndarray) -> None:
        """Keep the log-probabilities of pairs. Shape of the values: (pairs, 2)."""
        records = np.array([(key, *pair) for key, pair in zip(keys, values.tolist(), strict=True)], dtype=_RECORD)
        with self._path.open("ab") as file:
            file.write(records.tobytes())
