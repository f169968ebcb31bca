# SPDX-License-Identifier: Apache-2.0
"""What `jai convert` can be asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jai.conversion.output.options import Dtype, WriteOptions
from jai.errors import UserError
from jai.files import read_text
from jai.options import argument, check_values, option

EmbeddingInit = Literal["mean", "random", "mean-normed"]

PAPER_BLOCK_SIZE = 4
PAPER_BLOCK_REPEATS = (1, 1, 1, 2, 3, 3, 2, 1, 1, 1)
PAPER_SKIP_ALPHA = 0.1
_EXPERT_NOISE = 0.01
_SHOWN_LAYERS = 100  # a plan for more is too long for a message


def _plan_for(layers: int) -> str:
    """Options that repeat the middle blocks of a base, as the paper's plan does."""
    size = max(size for size in (1, 2, 3, 4) if layers % size == 0 and (size == 1 or layers // size >= 4))
    blocks = layers // size
    repeats = [2 if blocks // 4 <= block < blocks - blocks // 4 else 1 for block in range(blocks)]
    return f"--block-size {size} --block-repeats {','.join(map(str, repeats))}"


@dataclass(kw_only=True)
class ConvertOptions(WriteOptions):
    """What `jai convert` does (paper, section 3.1)."""

    base: str = argument("BASE", help="Folder or Hub id of a Phi3ForCausalLM checkpoint.")
    tokenizer: str | None = option(
        None,
        help="Folder or Hub id of a tokenizer that extends the base's.",
        shown_default="the base's",
        metavar="TOKENIZER",
    )
    init: EmbeddingInit | None = option(
        None,
        help="How the embedding and head rows of new tokens start. mean: the mean of the rows of the token's "
        "pieces (as in the paper); mean-normed: the same, scaled to the mean norm of those rows; random: "
        "drawn with each column's mean and standard deviation over the base's rows.",
        shown_default="mean",
    )
    method: Literal["dus-v2", "dus-v1"] = option(
        "dus-v2",
        help="dus-v2: repeat blocks of layers in place, with skip alphas (as in the paper); dus-v1: stack the "
        "first K and the last K layers (as in SOLAR).",
    )
    k: int | None = option(None, help="With dus-v1: layers in each of the two copies, such as 32 (of 40).", at_least=1)
    layers: list[int] | None = option(
        None,
        help="Stack these base layers, in this order, such as 0-31,8-39.",
        metavar="LAYERS",
        at_least=0,
    )
    block_size: int | None = option(None, help="Layers per block.", shown_default="4", at_least=1)
    block_repeats: list[int] | None = option(
        None,
        help="How many times each block runs.",
        metavar="N,N,…",
        shown_default=",".join(map(str, PAPER_BLOCK_REPEATS)),
        at_least=1,
    )
    skip_alpha: float | None = option(
        None, help="Initial value of the skip alphas.", shown_default="0, or 0.1 with --duplicate-init copy"
    )
    skip_alpha_normalize: bool = option(False, help="Divide by 1 + alpha after adding the skip (not in the paper).")
    duplicate_init: Literal["identity", "copy"] | None = option(
        None,
        help="How the added copies of a block start. identity: as layers that change nothing, so the model still "
        "computes what its base does; copy: with the block's weights (as in the paper), so it does not.",
        shown_default="identity, or copy with --layers and dus-v1",
    )
    experts: int = option(4, help="Experts per layer; 1 makes a dense JAI.", at_least=1)
    expert_init: Literal["copy", "noise", "random"] | None = option(
        None,
        help="How all experts but the first start. copy: as the base's MLP, so the model still computes what its "
        "base does; noise: as the MLP plus noise; random: from scratch.",
        shown_default="copy",
    )
    expert_noise: float | None = option(
        None,
        help="With --expert-init noise: standard deviation of the noise, relative to that of the weight matrix.",
        shown_default=f"{_EXPERT_NOISE:g}",
        above=0,
    )
    rope_theta: float | None = option(
        None,
        help="RoPE base frequency. Changing it breaks the model until it is trained with the new value.",
        shown_default="the base's",
        above=0,
    )
    dtype: Dtype | None = option(
        None, help="Data type of the weights.", shown_default="the base's; if mixed, one that holds every value exactly"
    )
    seed: int = option(0, help="Random seed for routers, noise and random rows.")
    stream: bool = option(
        False, help="Download the base from the Hub one weight file at a time, and delete each after use."
    )
    verify_text: Path | None = option(
        None,
        help="UTF-8 text file on which --verify compares the logits of base and result (not with --stream).",
        shown_default="a short Thai and English text",
    )

    def __post_init__(self) -> None:
        """Check every value, and refuse options that contradict each other or would do nothing.

        Raises:
            UserError: naming the option.
        """
        check_values(self)
        if (self.method == "dus-v1") != (self.k is not None):
            raise UserError("dus-v1 needs k, the layers of each of its two copies, and only dus-v1 has it: --k 32.")
        if self.layers is not None and self.k is not None:
            raise UserError("layers and dus-v1 are two plans. Give one of them.")
        if self.is_plain:
            plan = "layers" if self.layers is not None else "dus-v1"
            self._refuse_given(("block_size", "block_repeats"), f"{plan} makes a plain stack, which has no blocks")
            self._refuse_given(("skip_alpha",), f"{plan} makes a plain stack, which has no skip alphas")
            if self.skip_alpha_normalize:
                raise UserError(f"{plan} makes a plain stack, without skip alphas. Leave skip_alpha_normalize out.")
        if self.layers == []:
            raise UserError("layers is empty. Name the base's layers in order, such as 0-31,8-39.")
        if self.tokenizer is None:
            self._refuse_given(("init",), "Without a tokenizer there are no new rows")
        if self.experts == 1:
            self._refuse_given(("expert_init",), "A dense JAI (experts: 1) has one MLP a layer")
        if self.expert_init != "noise":
            self._refuse_given(("expert_noise",), "Only expert_init noise adds noise")
        if self.verify_text is not None and not self.verify:
            raise UserError("verify_text is for --verify, which is not given. Give both or neither.")
        if self.verify_text is not None and not read_text(self.verify_text).strip():  # now: converting takes hours
            raise UserError(f"{self.verify_text} has no text to compare the logits on. Give a UTF-8 text file.")

    def _refuse_given(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise UserError(f"{why}, but {name} is {getattr(self, name)!r}. Leave it out.")

    def check_fits(self, base_layers: int) -> None:
        """Refuse a layer plan for a base of another depth.

        Args:
            base_layers: how many layers the base has.

        Raises:
            UserError: saying what would fit.
        """
        if self.layers is not None:
            wrong = [layer for layer in self.layers if layer >= base_layers]
            if wrong:
                raise UserError(
                    f"layers names {wrong[0]}, but the base has layers 0 to {base_layers - 1}. Name layers of the base."
                )
        elif self.k is not None:
            if not base_layers <= 2 * self.k <= 2 * base_layers:
                raise UserError(
                    f"k is {self.k}, but for {base_layers} layers it must be from {-(-base_layers // 2)} to "
                    f"{base_layers}: each of the two copies keeps k, and together they must have every layer."
                )
        else:
            block_size, repeats = self.blocks
            if block_size * len(repeats) != base_layers:
                raise UserError(
                    f"The base has {base_layers} layers, but {len(repeats)} blocks of {block_size} (--block-repeats, "
                    f"--block-size) are {block_size * len(repeats)}. Give a plan for {base_layers} layers"
                    + (f", such as {_plan_for(base_layers)}." if 0 < base_layers <= _SHOWN_LAYERS else ".")
                )

    @property
    def is_plain(self) -> bool:
        """Whether the plan is a plain stack of layers, without blocks that repeat."""
        return self.method == "dus-v1" or self.layers is not None

    @property
    def blocks(self) -> tuple[int, list[int]]:
        """Layers of a block, and how often each block runs."""
        return self.block_size or PAPER_BLOCK_SIZE, self.block_repeats or [*PAPER_BLOCK_REPEATS]

    @property
    def start_alpha(self) -> float:
        if self.skip_alpha is not None:
            return self.skip_alpha
        return 0.0 if self.start_of_copies == "identity" else PAPER_SKIP_ALPHA

    @property
    def start_of_copies(self) -> Literal["copy", "identity"]:
        return self.duplicate_init or ("copy" if self.is_plain else "identity")

    @property
    def start_of_rows(self) -> EmbeddingInit:
        return self.init or "mean"

    @property
    def start_of_experts(self) -> Literal["copy", "noise", "random"]:
        return self.expert_init or "copy"

    @property
    def noise(self) -> float:
        return _EXPERT_NOISE if self.expert_noise is None else self.expert_noise

    def recorded(self) -> dict[str, Any]:
        """What decides the values of the output, beside the inputs, the layer plan and the dtype."""
        return {
            "tokenizer": Path(self.tokenizer).name if self.tokenizer else None,
            "init": self.start_of_rows,
            "method": self.method,
            "k": self.k,
            "layers": self.layers,
            "skip_alpha": None if self.is_plain else self.start_alpha,
            "skip_alpha_normalize": self.skip_alpha_normalize,
            "duplicate_init": self.start_of_copies,
            "experts": self.experts,
            "expert_init": self.start_of_experts,
            "expert_noise": self.noise,
            "rope_theta": self.rope_theta,
            "seed": self.seed,
        }
