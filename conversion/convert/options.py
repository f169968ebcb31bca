# SPDX-License-Identifier: Apache-2.0
"""What `jai convert` can be asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from jai.configuration_jai import plan_layers
from jai.errors import UserError
from jai.files import parse_size

PAPER_BLOCK_REPEATS = (1, 1, 1, 2, 3, 3, 2, 1, 1, 1)
PAPER_SKIP_ALPHA = 0.1


def check_choices(options: object) -> None:
    """Refuse a value that is none of its option's, where the option is a `Literal`; None stands for a default.

    Raises:
        UserError: with the choices.
    """
    for name, hint in get_type_hints(type(options)).items():
        kinds = (hint, *get_args(hint))
        choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        value = getattr(options, name)
        if choices and value not in (*choices, *([None] if type(None) in kinds else [])):
            raise UserError(f"{name} is {value!r}; expected one of {', '.join(choices)}.")


@dataclass(kw_only=True)
class ConvertOptions:
    """What `jai convert` does; also the keys of its YAML file.

    Attributes:
        base: folder or Hub id of a `Phi3ForCausalLM` checkpoint.
        out: folder to write; it must not exist.
        tokenizer: folder or Hub id of a tokenizer that extends the base's; None keeps the base's.
        init: rows of new tokens in `embed_tokens` and `lm_head`. `mean` is the mean of the rows of the token's pieces
            (paper, section 3.1.1); `mean-normed` is the same, scaled to the mean norm of those rows, which averaging
            makes shorter; `random` draws each column from a normal distribution with the mean and the standard
            deviation of that column over the base's rows. Tokens without pieces are always drawn so.
        method: `dus-v2` repeats blocks in place, with skip alphas (paper, section 3.1.2); `dus-v1` is SOLAR's: the
            first `k` layers, then the last `k`, a plain stack without alphas.
        k: layers of each of `dus-v1`'s two copies; the paper's comparison has 32 of 40.
        layers: a plan by hand: the base's layer for each layer of a plain stack, without alphas.
        block_size: layers of a block (paper, section 3.1.2).
        block_repeats: how often each block runs in place (paper, Table 2).
        skip_alpha: start value of the skip alphas; None is 0.1 with copied layers and 0 with identity layers.
        skip_alpha_normalize: divide by 1 + alpha after adding the anchor (ours, not the paper's).
        duplicate_init: `identity` zeroes the last matrix of each branch of later copies of a block, so that each starts
            as the identity and the function is kept exactly; `copy` gives them the block's weights (the paper's way; it
            changes the function). None is `identity`, which costs the least (docs/price-of-depth.md), and `copy` in a
            plain stack, which is nothing else.
        experts: experts of a layer; 1 makes the dense JAI.
        expert_init: `copy` starts all experts as the base's MLP (the function is kept exactly), `noise` adds seeded
            noise to experts 1 and up, `random` draws them fresh.
        expert_noise: for `noise`, its standard deviation relative to that of the matrix.
        rope_theta: RoPE base; None keeps the source's. The paper raises it to 1,000,000 for its long-context phase;
            without training that breaks the function.
        dtype: dtype of the output; None keeps the source's.
        seed: seed of routers, noise and random rows.
        max_shard_size: largest output shard, in bytes or as "5GB".
        workers: shards to write at a time.
        stream: of a base on the Hub, fetch one shard after the other and delete each when it is no longer needed.
    """

    base: str
    out: Path
    tokenizer: str | None = None
    init: Literal["mean", "random", "mean-normed"] = "mean"
    method: Literal["dus-v2", "dus-v1"] = "dus-v2"
    k: int | None = None
    layers: list[int] | None = None
    block_size: int = 4
    block_repeats: list[int] = field(default_factory=lambda: list(PAPER_BLOCK_REPEATS))
    skip_alpha: float | None = None
    skip_alpha_normalize: bool = False
    duplicate_init: Literal["copy", "identity"] | None = None
    experts: int = 4
    expert_init: Literal["copy", "noise", "random"] = "copy"
    expert_noise: float = 0.01
    rope_theta: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0
    max_shard_size: int | str = 5_000_000_000
    workers: int = 1
    stream: bool = False

    def __post_init__(self) -> None:
        """Refuse what a YAML may hold and the function would misread.

        Raises:
            UserError: for a value that is none of its option's.
        """
        check_choices(self)
        for name, numbers in (("block_repeats", self.block_repeats), ("layers", self.layers or [])):
            if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
                raise UserError(f"{name} is {numbers!r}; expected a list of whole numbers, as [1, 2, 1].")
        for name, number in (("k", self.k), ("workers", self.workers)):
            if number is not None and (type(number) is not int or number < 1):
                raise UserError(f"{name} is {number!r}; expected a whole number from 1.")
        if (self.method == "dus-v1") != (self.k is not None):
            raise UserError("dus-v1 needs k, the layers of each of its two copies, and only dus-v1 has it: --k 32.")
        if self.is_plain and self.layers and self.k:
            raise UserError("layers and dus-v1 are two plans. Give one of them.")
        if self.is_plain and (self.skip_alpha or self.skip_alpha_normalize):
            raise UserError("A plain stack (dus-v1, layers) has no skip alphas. Leave skip_alpha out, or use dus-v2.")
        self.max_shard_size = parse_size(str(self.max_shard_size))

    @property
    def is_plain(self) -> bool:
        """Whether the plan is a plain stack of layers, without blocks that repeat."""
        return self.method == "dus-v1" or self.layers is not None

    def origins(self, base_layers: int) -> list[int]:
        """The base's layer for each layer of the output.

        Raises:
            UserError: if the plan does not fit a base of `base_layers` layers.
        """
        if self.layers is not None:
            wrong = [layer for layer in self.layers if not 0 <= layer < base_layers]
            if wrong or not self.layers:
                raise UserError(
                    f"layers names {wrong[0] if wrong else 'no layer'}, but the base has layers 0 to {base_layers - 1}."
                )
            return self.layers
        if self.k is not None:
            if not base_layers <= 2 * self.k <= 2 * base_layers:
                raise UserError(
                    f"k is {self.k}, but of {base_layers} layers dus-v1 keeps {-(-base_layers // 2)} to {base_layers} "
                    "in each copy, or some would be lost."
                )
            return [*range(self.k), *range(base_layers - self.k, base_layers)]
        return [planned.origin for planned in plan_layers(self.block_size, self.block_repeats)]

    @property
    def start_alpha(self) -> float:
        if self.skip_alpha is not None:
            return self.skip_alpha
        return 0.0 if self.start_of_copies == "identity" else PAPER_SKIP_ALPHA

    @property
    def start_of_copies(self) -> Literal["copy", "identity"]:
        return self.duplicate_init or ("copy" if self.is_plain else "identity")
