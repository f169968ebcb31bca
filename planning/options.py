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
        help="Also plan memory and time of training: every weight (in mixed precision: fp32 with bf16 products), LoRA "
        "on weights in bf16, or on weights in four bits. The options that follow say how.",
        shown_default="no plan",
    )
    gpus: int = option(1, help="Number of GPUs.", at_least=1, at_most=100_000)
    gpu: Literal["A100", "H100", "H200", "B200"] = option("H100", help="What they are; an A100 is one of 80 GB.")
    sharding: Literal["none", "fsdp", "hsdp"] = option(
        "fsdp",
        help="How weights, gradients and optimiser states are cut: not at all (DDP), over all GPUs (FSDP2, or ZeRO-3 "
        "of DeepSpeed), or over the GPUs of a group (HSDP).",
    )
    group: int = option(8, help="GPUs of a group, with hsdp.", at_least=1, at_most=100_000)
    batch: int = option(1, help="Sequences that a GPU computes at once.", at_least=1, at_most=1_000_000)
    length: int = option(4096, help="Tokens of a sequence.", at_least=1, at_most=100_000_000)
    checkpointing: bool = option(True, help="Compute activations again in the backward pass.")
    experts_implementation: Literal["grouped_mm", "eager", "jai_fused", "jai_fused_x", "jai_fused_fp8"] = option(
        "grouped_mm", help="How the experts are computed."
    )
    loss: Literal["chunked", "logits"] = option("chunked", help="TRL's head in chunks, or all logits at once.")
    optimizer: Literal["adamw", "adamw-8bit"] = option("adamw", help="AdamW's states in fp32, or in eight bits.")
    lora_r: int = option(16, help="Rank of LoRA, on attention and experts.", at_least=1, at_most=100_000)
    new_rows: int = option(
        0, help="Rows of new tokens that learn beside LoRA; 31,936 for JAI-1.", at_least=0, at_most=100_000_000
    )
    double_quant: bool = option(True, help="With qlora: the scales of four bits in eight bits.")
    utilization: float = option(
        0.425,
        help="Share of the GPUs' peak at which is computed (model FLOPs utilisation); Trillion-7B reached 42.5 %.",
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
