# SPDX-License-Identifier: Apache-2.0
"""The models of `reasoning_merge.py`: what is merged with what, by which weights, and how much each parent learns."""

from dataclasses import dataclass, field
from typing import Any

from reasoning_merge_data import DataSizes
from records import ROOT

from jai.conversion.merge.options import MergeOptions
from jai.options import read_options_file

M3 = ROOT / "recipes" / "merge_m3.yaml"
ARMS = {"merge only": "language", "SFT then merge": "aligned"}  # and what is merged with the reasoner
REASONER = "reasoner"
CONSTANT, LAYER_WISE = "constant", "layer-wise"


@dataclass(frozen=True)
class Blend:
    """A model between a parent (of ARMS) and the reasoner.

    Attributes:
        arm: of ARMS.
        shape: "constant", or "layer-wise" in the shape of M3.
        ratio: of the reasoner; layer-wise that of the early layers.
    """

    arm: str
    shape: str
    ratio: float

    @property
    def is_parent(self) -> bool:
        return self.shape == CONSTANT and self.ratio in (0, 1)

    @property
    def name(self) -> str:
        if self.is_parent:
            return REASONER if self.ratio else ARMS[self.arm]
        return f"{ARMS[self.arm]}, {self.shape}, {self.ratio:g}"


@dataclass(frozen=True)
class Settings:
    """Sizes of a whole run.

    Attributes:
        data: how many rows of each kind.
        vocabulary: entries.
        base_steps: of the base, from nothing, 1,024 tokens each.
        language_steps, reasoner_steps, aligned_steps: of SFT, 16 chats each.
        ratios: of the reasoner, between 0 and 1; constant, and at the start of a curve over the layers.
    """

    data: DataSizes = field(default_factory=DataSizes)
    vocabulary: int = 1536
    base_steps: int = 800
    language_steps: int = 100
    reasoner_steps: int = 800
    aligned_steps: int = 60
    ratios: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    curve_ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)


QUICK = Settings(
    DataSizes(base=20, traces=40, aligned=10, questions=4), base_steps=4, language_steps=2, reasoner_steps=2,
    aligned_steps=2, ratios=(0.5,), curve_ratios=(0.75,),
)  # fmt: skip


def blends(settings: Settings) -> list[Blend]:
    """Every model that is measured with each seed, the parents among them."""
    shapes = {CONSTANT: (0.0, *settings.ratios, 1.0), LAYER_WISE: settings.curve_ratios}
    return [Blend(arm, shape, ratio) for arm in ARMS for shape, ratios in shapes.items() for ratio in ratios]


def merge_weights(blend: Blend) -> list[Any]:
    """What `jai merge` is told: the weight of the language model and of the reasoner, constant or over the layers.

    Over the layers it is M3 with another height: the ratio up to two thirds of the depth, a sixth of it at the end.
    """
    if blend.shape == CONSTANT:
        return [1 - blend.ratio, blend.ratio]
    curve = read_options_file(M3, MergeOptions)["weights"][1]
    height = max(point["value"] for point in curve)
    share = [{"at": point["at"], "value": point["value"] * blend.ratio / height} for point in curve]
    return [[{**point, "value": 1 - point["value"]} for point in share], share]
