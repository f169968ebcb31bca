# SPDX-License-Identifier: Apache-2.0
"""What of a folder may be published: the files that the manifest here lists."""

import os
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path

from jai.errors import UserError
from jai.files import check_is_file

ADAPTER_CONFIG = "adapter_config.json"


class Kind(StrEnum):
    """What a folder holds: a whole model, or a PEFT adapter of one."""

    MODEL = "model"
    ADAPTER = "adapter"


_TOKENIZER_RECORDS_AND_CARD = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer_training.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "provenance.json",
    "training_logs/*.json",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.txt",
)
# What a published folder may hold, as glob patterns of paths below it ("*" also matches "/"). Everything else stays at
# home, and `jai publish` names it. So nothing is uploaded by accident: no optimizer state, no intermediate checkpoint,
# no pickle (pytorch_model.bin, training_args.bin), and no trainer_state.json, which names folders of the machine.
#
# A model and an adapter never share a repository: beside a whole model, an adapter_config.json makes transformers load
# the adapter's base model instead of the weights of the repository.
MANIFEST = {
    Kind.MODEL: (
        "config.json",
        "generation_config.json",
        "configuration_jai.py",
        "modeling_jai.py",
        "quantization_jai.py",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
        "evaluation.json",
        *_TOKENIZER_RECORDS_AND_CARD,
    ),
    Kind.ADAPTER: (ADAPTER_CONFIG, "adapter_model.safetensors", *_TOKENIZER_RECORDS_AND_CARD),
}


@dataclass(frozen=True)
class Contents:
    """The files of a folder, as paths below it with forward slashes.

    Attributes:
        folder: the folder.
        kind: a whole model or an adapter.
        kept: size in bytes of every file that may be published, in order of path.
        left_out: size in bytes of what stays at home; a folder counts as one entry, its name ending in "/".
    """

    folder: Path
    kind: Kind
    kept: dict[str, int]
    left_out: dict[str, int]


def in_manifest(path: str, kind: Kind) -> bool:
    """Whether a path of a repository may be published."""
    return any(fnmatchcase(path, pattern) for pattern in MANIFEST[kind])


def size_text(size: int) -> str:
    """A number of bytes for people: "1.23 GB"."""
    amount, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.3g} {unit}"


def read_contents(folder: str | os.PathLike) -> Contents:
    """Sort the files of a folder into what may be published and what stays.

    Raises:
        UserError: if there is no such folder, or what is to be published is no file, or a link that leads out of it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder. Give the folder of a checkpoint, as `jai convert` or `jai sft` wrote it."
        )
    alone = (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
    kind = Kind.ADAPTER if alone else Kind.MODEL
    kept: dict[str, int] = {}
    left_out: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if in_manifest(name, kind):
            check_is_file(path, "Put the file itself there, or remove it.")
            _refuse_foreign_link(folder, path)
            kept[name] = path.stat().st_size
        elif path.is_file():
            top = name if "/" not in name else name.split("/")[0] + "/"
            left_out[top] = left_out.get(top, 0) + path.stat().st_size
    return Contents(folder, kind, kept, left_out)


def _refuse_foreign_link(folder: Path, path: Path) -> None:
    """A link to anywhere would publish what the user does not see in the folder."""
    home, target = folder.resolve(), path.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home  # huggingface_hub's own cache
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise UserError(
            f"{path} is a link out of the folder, to {target}. Put the file itself there if it is to be published, or "
            "remove the link."
        )
