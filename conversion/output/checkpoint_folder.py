# SPDX-License-Identifier: Apache-2.0
"""What every verb ends with: planned tensors become a complete checkpoint folder, or none."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from jai.conversion.output.shards import compare_checkpoint, write_checkpoint
from jai.conversion.output.tensors import PlannedTensor
from jai.files import resumable_folder
from jai.provenance import Input, versions, write_step
from jai.version import __version__


@dataclass(frozen=True, kw_only=True)
class Output:
    """A checkpoint to be written.

    Attributes:
        step: the verb.
        out: folder to make.
        tensors: the weights, in order.
        options: what decides their values, as JSON; goes into the provenance.
        identity: what tells the inputs from others (`CheckpointReader.identity`).
        max_shard_bytes: largest data of a shard.
        workers: shards to write at a time.
    """

    step: str
    out: Path
    tensors: list[PlannedTensor]
    options: dict[str, Any]
    identity: dict[str, Any]
    max_shard_bytes: int
    workers: int = 1

    @property
    def parameters(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    def write(
        self,
        beside: Callable[[Path], object],
        inputs: Callable[[], list[Input]],
        result: dict[str, Any],
        *,
        verify_bytes: bool = False,
        console: Console,
    ) -> None:
        """Make the folder, or go on where an earlier run of the same work stopped.

        Args:
            beside: writes what lies beside the weights into the folder that it is given.
            inputs: what the provenance names as inputs. It reads them all for their hashes, and refuses what is not
                finite.
            result: what the provenance says of the result, beside its parameters and bytes.
            verify_bytes: read every byte again and compare it with its source before the folder is there.
            console: where progress is shown.

        Raises:
            UserError: as `resumable_folder` and `write_checkpoint`.
        """
        identity = {
            "step": self.step,
            "version": __version__,
            "options": self.options | {"max_shard_size": self.max_shard_bytes},
            "inputs": self.identity,
        }
        with resumable_folder(self.out, identity) as job:
            # Bad values are refused before hours of writing. Where shards are finished, an earlier run has looked.
            read_first = not job.finished
            if read_first:
                with console.status("Reading the inputs: hashes, NaN and infinity"):
                    hashed_inputs = inputs()
            write_checkpoint(job, self.tensors, self.max_shard_bytes, self.workers, console=console)
            if verify_bytes:
                size = compare_checkpoint(job.folder, self.tensors, self.max_shard_bytes, console=console)
                console.print(f"Verified: {size:,} bytes are what their sources give.", highlight=False)
            beside(job.folder)
            step = {
                "step": self.step,
                "inputs": hashed_inputs if read_first else inputs(),
                "options": self.options,
                "versions": versions("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub"),
                "result": {"parameters": self.parameters, "bytes": self.bytes} | result,
            }
            write_step(job.folder, step)
