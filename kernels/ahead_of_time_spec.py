# SPDX-License-Identifier: Apache-2.0
"""What an ahead-of-time compiler needs to know of a Triton kernel."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AheadOfTime:
    """One variant of a kernel, to be compiled without a GPU.

    Attributes:
        name: unique over all variants; the key of the stored table of registers, shared memory and spills.
        kernel: the `@triton.jit` function.
        signature: Triton type of each argument that is not a `constexpr`: "*bf16", "i32", "fp32",
            "tensordesc<bf16[128,64]>". Pointers are taken to be aligned to 16 bytes.
        constexprs: value of each `tl.constexpr` argument.
        num_warps, num_stages: launch options.
        hot: a spill in this variant is an error.
        targets: compute capabilities, times ten, of the GPUs that it is meant for.
        multiples_of_16: integer arguments that are, as Triton sees by itself at launch; without it accesses are narrow.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    hot: bool
    targets: tuple[int, ...] = (80, 90, 100)
    multiples_of_16: tuple[str, ...] = ()
