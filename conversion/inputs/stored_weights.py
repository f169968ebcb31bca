# SPDX-License-Identifier: Apache-2.0
"""The weights of a checkpoint folder, of any dtype: what their headers say, and single numbers of them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from jai.conversion.inputs.header import StoredTensor, read_header, stored_tensors
from jai.conversion.inputs.weight_files import INDEX_FILE, WEIGHTS_FILE, weight_files, weight_map
from jai.conversion.names import EMBEDDINGS, LM_HEAD
from jai.errors import UserError

_COMPARED_ROWS = 1024  # 10 MB of JAI-1's embeddings


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint folder, from all its weight files; quantised ones too.

    Raises:
        UserError: if files are missing, cut off or damaged, or the index does not fit them.
    """
    if (folder / INDEX_FILE).exists() and (folder / WEIGHTS_FILE).exists():
        raise UserError(
            f"{folder} has both {WEIGHTS_FILE} and {INDEX_FILE}, and transformers would load the former. Remove the "
            "one that is old."
        )
    headers = {path.name: read_header(path) for path in weight_files(folder)}
    return stored_tensors(headers, str(folder), weight_map(folder))


def read_number(folder: Path, name: str, tensor: StoredTensor) -> float:
    """The value of a tensor with one element."""
    with safe_open(folder / tensor.file, framework="pt") as file:
        return float(file.get_tensor(name).item())


def has_untied_head(folder: Path, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether there is an `lm_head` with other values than the embeddings.

    Where the configuration says that the two are one, transformers keeps both then.
    """
    if not {EMBEDDINGS, LM_HEAD} <= tensors.keys():
        return False
    shape = tensors[EMBEDDINGS].shape
    if tensors[LM_HEAD].shape != shape:
        return True
    with (
        safe_open(folder / tensors[EMBEDDINGS].file, framework="pt") as first,
        safe_open(folder / tensors[LM_HEAD].file, framework="pt") as second,
    ):
        embeddings, head = first.get_slice(EMBEDDINGS), second.get_slice(LM_HEAD)
        return not all(
            torch.equal(embeddings[at : at + _COMPARED_ROWS].float(), head[at : at + _COMPARED_ROWS].float())
            for at in range(0, shape[0], _COMPARED_ROWS)
        )
