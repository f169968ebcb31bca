# SPDX-License-Identifier: Apache-2.0
"""What `jai upcycle` and `jai snapshot` can be asked for."""

from dataclasses import dataclass
from typing import Any, Literal

from jai.conversion.output.options import Dtype, WriteOptions
from jai.errors import UserError
from jai.options import argument, check_values, option

_EXPERTS = 4
_EXPERT_NOISE = 0.01


@dataclass(kw_only=True)
class UpcycleOptions(WriteOptions):
    """What `jai upcycle` does (paper, section 3.1.3)."""

    dense: str = argument("DENSE", help="Folder or Hub id of the dense JAI before its training (step 0).")
    snapshots: list[str] = option(
        [],
        help="Checkpoints from the dense model's training, one per added expert, in order: full checkpoints or the "
        "output of `jai snapshot`.",
        metavar="CKPT...",
        spread=True,
    )
    base_weights: str = option(
        "last",
        help="Source of all weights that are not experts. last: the last snapshot (DENSE if there are none); "
        "first: DENSE; or the folder or Hub id of a checkpoint.",
        metavar="CKPT",
    )
    expert_init: Literal["snapshots", "copy", "noise", "random"] = option(
        "snapshots",
        help="How all experts but the first start. snapshots: as the snapshots' FFNs (as in the paper), any "
        "further ones as noisy copies of these; copy: as DENSE's FFN, so the model still computes what DENSE "
        "does; noise: as DENSE's FFN plus noise; random: from scratch.",
    )
    experts: int | None = option(
        None, help="Experts per layer.", shown_default="snapshots + 1, or 4 without snapshots", at_least=2
    )
    expert_noise: float | None = option(
        None,
        help="Standard deviation of the noise added to copied experts, relative to that of the weight matrix.",
        shown_default=f"{_EXPERT_NOISE:g}",
        at_least=0,
    )
    dtype: Dtype | None = option(None, help="Data type of the weights.", shown_default="DENSE's")
    seed: int = option(0, help="Random seed for routers, noise and random experts.")

    def __post_init__(self) -> None:
        """Check every value, and refuse options that contradict each other or would do nothing.

        Raises:
            UserError: naming the option.
        """
        check_values(self)
        if self.expert_init == "snapshots" and not self.snapshots:
            raise UserError(
                "No snapshots are given. Give checkpoints of the dense model's training with --snapshots, or choose "
                "--expert-init copy, noise or random, which need none."
            )
        if self.expert_init != "snapshots" and self.snapshots:
            raise UserError(
                f"--expert-init {self.expert_init} uses no snapshots, but {len(self.snapshots)} are given. Leave them "
                "out (--base-weights names a checkpoint for the weights outside of the experts), or leave out "
                "--expert-init."
            )
        if self.num_experts <= len(self.snapshots):
            raise UserError(
                f"{len(self.snapshots)} snapshots and DENSE make {len(self.snapshots) + 1} experts, but experts is "
                f"{self.experts}. Leave out some of the snapshots, or the option."
            )
        if self.expert_noise is not None and not self.has_noise:
            raise UserError(f"No expert is a noisy copy, but expert_noise is {self.expert_noise:g}. Leave it out.")

    @property
    def num_experts(self) -> int:
        if self.experts is not None:
            return self.experts
        return len(self.snapshots) + 1 if self.snapshots else _EXPERTS

    @property
    def has_noise(self) -> bool:
        """Whether some expert is a copy that gets noise."""
        return self.expert_init == "noise" or (
            self.expert_init == "snapshots" and self.num_experts > len(self.snapshots) + 1
        )

    @property
    def noise(self) -> float:
        return _EXPERT_NOISE if self.expert_noise is None else self.expert_noise

    def recorded(self) -> dict[str, Any]:
        """What decides the values of the output, beside the inputs and the dtype."""
        return {
            "base_weights": self.base_weights,
            "expert_init": self.expert_init,
            "experts": self.num_experts,
            "expert_noise": self.noise,
            "seed": self.seed,
        }


@dataclass(kw_only=True)
class SnapshotOptions(WriteOptions):
    """What `jai snapshot` does."""

    checkpoint: str = argument("CKPT", help="Folder or Hub id of a dense JAI, such as a Trainer's checkpoint-2000.")

    def __post_init__(self) -> None:
        check_values(self)
