# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's folder, complete or not there: its weights, what lies beside them, and what it was made from."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from transformers import GenerationConfig, PreTrainedConfig

from jai.conversion.inputs.checkpoint import Checkpoint, hashes_beside
from jai.conversion.inputs.tokenizer import TOKENIZER_CONFIG_FILE, check_tokenizer_files, tokenizer_files
from jai.conversion.names import EMBEDDINGS
from jai.conversion.output.shards import compare_shards, write_shards
from jai.conversion.output.tensors import PlannedTensor
from jai.files import print_next, read_json, refuse_overlap, resumable_folder
from jai.provenance import versions, write_step
from jai.version import __version__

_CODE = ("jai.configuration_jai", "jai.modeling_jai", "jai.quantization_jai")

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")


@dataclass(frozen=True, kw_only=True)
class PlannedCheckpoint:
    """A checkpoint to be written.

    Attributes:
        step: the verb.
        out: folder to make.
        tensors: the weights, in order.
        options: what decides their values, as JSON; goes into the provenance.
        inputs: what it is made from, each with its role; goes into the provenance.
        tokenizer: folder of the tokenizer that it gets, None for none.
        result: what the provenance says of the result, beside its parameters and bytes.
        max_shard_bytes: largest data of a shard.
        workers: shards to write at a time.
        packages: whose versions the provenance gets, beside those that every conversion uses.

    Raises:
        UserError: if `out` lies inside of an input, or an input where `out` is made, or the tokenizer is damaged or has
            tokens without a row in the embeddings.
    """

    step: str
    out: Path
    tensors: list[PlannedTensor]
    options: dict[str, Any]
    inputs: list[tuple[str, Checkpoint]]
    tokenizer: Path | None = None
    result: dict[str, Any] = field(default_factory=dict)
    max_shard_bytes: int
    workers: int = 1
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_overlap(self.out, [checkpoint.folder for _, checkpoint in self.inputs])
        if self.tokenizer:
            refuse_overlap(self.out, [self.tokenizer])
            rows = {tensor.name: tensor.shape[0] for tensor in self.tensors if tensor.name == EMBEDDINGS}
            check_tokenizer_files(self.tokenizer, rows.get(EMBEDDINGS))

    @property
    def parameters(self) -> int:
        return sum(tensor.parameters for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the output, as JSON: an earlier run is gone on with only if it had the same."""
        roles = [role for role, _ in self.inputs]
        return {
            "step": self.step,
            "version": __version__,
            "options": self.options | {"max_shard_size": self.max_shard_bytes},
            "inputs": {
                role if roles.count(role) == 1 else f"{role} {roles[:number].count(role) + 1}": checkpoint.identity()
                for number, (role, checkpoint) in enumerate(self.inputs)
            },
            "tokenizer": hashes_beside(self.tokenizer) if self.tokenizer else {},
        }


@contextmanager
def checkpoint_folder(planned: PlannedCheckpoint, *, verify_bytes: bool = False, console: Console) -> Iterator[Path]:
    """Make a checkpoint's folder, or go on where an earlier run of the same work stopped.

    The weights are written first. The block writes what lies beside them into the folder that it is given; then comes
    the provenance, and the folder is renamed to what it shall be.

    Args:
        planned: what to write.
        verify_bytes: read every byte again and compare it with its source before the folder is there.
        console: where progress is shown.

    Raises:
        UserError: as `resumable_folder` and `write_shards`.
    """
    with resumable_folder(planned.out, planned.identity()) as job:
        # Bad values are refused before hours of writing. Where shards are finished, an earlier run has looked.
        if not job.finished:
            with console.status("Reading the inputs: hashes, NaN and infinity"):
                for role, checkpoint in planned.inputs:
                    checkpoint.as_input(role)
        write_shards(job, planned.tensors, planned.max_shard_bytes, planned.workers, console=console)
        if verify_bytes:
            size = compare_shards(job.folder, planned.tensors, planned.max_shard_bytes, console=console)
            console.print(f"Verified: {size:,} bytes are what their sources give.", highlight=False)
        yield job.folder
        step = {
            "step": planned.step,
            "inputs": [checkpoint.as_input(role) for role, checkpoint in planned.inputs],
            "options": planned.options,
            "versions": versions(*_PACKAGES, *planned.packages),
            "result": {"parameters": planned.parameters, "bytes": planned.bytes} | planned.result,
        }
        write_step(job.folder, step)


def write_beside(
    folder: Path, config: PreTrainedConfig, *, tokenizer: Path | None, generation: GenerationConfig | None
) -> None:
    """Write what lies beside the weights of a checkpoint: configuration, settings of generation and tokenizer.

    Args:
        folder: the checkpoint's folder.
        config: its configuration.
        tokenizer: folder with the tokenizer's files; None writes none.
        generation: how to generate; None makes it from the configuration.
    """
    config.save_pretrained(folder)
    (generation or GenerationConfig.from_model_config(config)).save_pretrained(folder)
    if tokenizer:
        copy_tokenizer(folder, tokenizer)


def copy_code(folder: Path) -> None:
    """Write a JAI's code into a checkpoint's folder, without importing it."""
    for module in _CODE:
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        shutil.copyfile(spec.origin, folder / Path(spec.origin).name)


def copy_tokenizer(folder: Path, source: Path) -> None:
    """Copy the tokenizer's files, so that they load without a question about remote code."""
    for name in tokenizer_files(source):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    path = folder / TOKENIZER_CONFIG_FILE
    if path.exists():
        # Its class is one that every transformers 5 knows; an auto_map of its own would still ask.
        tokenizer_config = read_json(path)
        tokenizer_config.pop("auto_map", None)
        path.write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def print_note(console: Console, text: str) -> None:
    """What a plan does not say in its table."""
    console.print(f"[yellow]Note:[/] {escape(text)}", highlight=False, soft_wrap=True)


def print_written(console: Console, what: str, out: Path, *next_commands: Sequence[str | Path]) -> None:
    """Say where a checkpoint lies, and which commands may come next."""
    console.print(f"[bold green]{what} written to[/] {escape(str(out))}", soft_wrap=True, highlight=False)
    print_next(console, *next_commands)
