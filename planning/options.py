# SPDX-License-Identifier: Apache-2.0
"""How a planned training can be described on the command line."""

from dataclasses import dataclass, fields
from typing import Literal

from jai.errors import UserError
from jai.options import option


@dataclass(kw_only=True)
class PlanOptions:
    """A training, for `jai inspect --train`."""

    train: Literal["full", "lora", "qlora"] | None = option(
        None,
        help="Also estimate memory and time for training. full: every weight, in mixed precision; lora: LoRA on "
        "bf16 weights; qlora: LoRA on 4-bit weights. The options below apply only with --train.",
        shown_default="no estimate",
    )
    gpus: int = option(1, help="Number of GPUs.", at_least=1, at_most=100_000)
    gpu: Literal["A100", "H100", "H200", "B200"] = option("H100", help="GPU model (A100: the 80 GB one).")
    sharding: Literal["none", "fsdp", "hsdp"] = option(
        "fsdp",
        help="How weights, gradients and optimizer states are divided. none: not at all (DDP); fsdp: across all "
        "GPUs (FSDP2 or DeepSpeed ZeRO-3); hsdp: within groups of GPUs.",
    )
    group: int = option(8, help="With hsdp: GPUs per group.", at_least=1, at_most=100_000)
    batch_size: int = option(1, help="Sequences per GPU in each forward pass.", at_least=1, at_most=1_000_000)
    max_length: int = option(4096, help="Tokens per sequence.", at_least=1, at_most=100_000_000)
    gradient_checkpointing: bool = option(True, help="Recompute activations in the backward pass to save memory.")
    experts_implementation: Literal[
        "grouped_mm", "batched_mm", "eager", "jai_fused", "jai_fused_x", "jai_fused_fp8"
    ] = option("grouped_mm", help="Kernel for the experts.")
    loss: Literal["chunked", "logits"] = option(
        "chunked", help="chunked: TRL's chunked head and loss; logits: all logits at once."
    )
    optimizer: Literal["adamw", "adamw-8bit"] = option(
        "adamw", help="adamw: states in fp32; adamw-8bit: states in 8 bits."
    )
    lora_r: int = option(16, help="LoRA rank, on attention and experts.", at_least=1, at_most=100_000)
    new_rows: int = option(
        0, help="Rows of new tokens trained along with LoRA; 31,936 for JAI-1.", at_least=0, at_most=100_000_000
    )
    double_quant: bool = option(True, help="With qlora: quantize the scales to 8 bits too.")
    utilization: float = option(
        0.425,
        help="Expected model FLOPs utilization (MFU), as a fraction of peak. Trillion-7B reports 42.5 %.",
        above=0,
        at_most=1,
    )

    def check_plan(self) -> None:
        """Refuse options that do not go together, or do nothing.

        Raises:
            UserError: naming the option.
        """
        if self.train is None:
            self._refuse_given([each.name for each in fields(PlanOptions)], "there is no plan without --train")
        if self.train == "full":
            self._refuse_given(["new_rows", "lora_r"], "all weights learn with --train full")
        if self.train != "qlora":
            self._refuse_given(["double_quant"], "only --train qlora has weights in four bits")
        if self.gpus == 1:
            self._refuse_given(["sharding"], "one GPU has everything")
        if self.sharding != "hsdp":
            self._refuse_given(["group"], "only --sharding hsdp has groups")
        elif self.gpus % self.group:
            raise UserError(f"gpus is {self.gpus} and group is {self.group}: give a multiple of the group.")

    def _refuse_given(self, names: list[str], why: str) -> None:
        defaults = {each.name: each.default for each in fields(PlanOptions)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise UserError(f"{name} is {getattr(self, name)}, but {why}. Leave it out.")
