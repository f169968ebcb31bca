# SPDX-License-Identifier: Apache-2.0
"""What `jai merge` can be asked for."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from jai.conversion.merge.curves import Curve, parse_curve
from jai.conversion.output.options import Dtype, WriteOptions
from jai.errors import UserError
from jai.options import check_values, option, parse_numbers

_WITH_BASE = ("task-arithmetic", "ties", "dare-linear", "dare-ties")
_WITH_DENSITY = ("ties", "dare-linear", "dare-ties")
_RANDOM = ("dare-linear", "dare-ties")
_NORMALIZED = ("linear", "ties")


@dataclass(kw_only=True)
class MergeOptions(WriteOptions):
    """What `jai merge` does (paper, section 6.3)."""

    models: list[str] = option(
        help="Folders or Hub ids of the models. Configuration, tokenizer and data type come from the first.",
        metavar="CKPT...",
        spread=True,
    )
    method: Literal["linear", "slerp", "task-arithmetic", "ties", "dare-linear", "dare-ties"] = option(
        "linear",
        help="linear: weighted mean; slerp: spherical interpolation of two models; task-arithmetic, ties, "
        "dare-linear and dare-ties: merge the changes since --base.",
    )
    weights: list[Any] | None = option(
        None,
        help="One weight per model, such as 0.5,0.5. In YAML, a weight can vary by layer: a list of points such as "
        "[{at: 0, value: 1}, {at: 53/79, value: 0.5}, {at: 1, value: 0}], interpolated linearly. `at` runs "
        "from 0 (first layer) to 1 (last layer); `layer` takes a layer number instead. Embeddings use the "
        "first layer's weight; the final norm and the head use the last layer's.",
        metavar="W,W,…",
        shown_default="equal weights",
        parse=parse_numbers,
    )
    t: Any = option(
        None,
        help="With slerp: position between the first model (0) and the second (1). In YAML, it can vary by layer "
        "like --weights.",
        metavar="T",
        shown_default="0.5",
        parse=float,
    )
    place_by: Literal["depth", "origin"] = option(
        "depth",
        help="What the position of a layer means, for weights that vary by layer. depth: its position in the "
        "model; origin: the position of the base layer it was copied from, so that all copies of a layer get "
        "the same weight.",
    )
    base: str | None = option(None, help="Checkpoint that the models were fine-tuned from.", metavar="CKPT")
    density: float | None = option(
        None, help="With ties and dare: fraction of the changes to keep.", shown_default="0.5", above=0, at_most=1
    )
    normalize: bool | None = option(
        None,
        help="Divide by the sum of the weights (ties and dare-ties: of the models that agree in sign).",
        shown_default="on for linear and ties",
    )
    scale: float | None = option(None, help="Factor applied to the merged change.", shown_default="1")
    dtype: Dtype | None = option(None, help="Data type of the weights.", shown_default="the first model's")
    seed: int | None = option(None, help="With dare: random seed for what is dropped.", shown_default="0")

    def __post_init__(self) -> None:
        """Check every value, and refuse options that contradict each other or would do nothing.

        Raises:
            UserError: naming the option.
        """
        check_values(self)
        self._check_fit()
        self._check_weights()

    @property
    def has_base(self) -> bool:
        return self.method in _WITH_BASE

    @property
    def normalizes(self) -> bool:
        return self.method in _NORMALIZED if self.normalize is None else self.normalize

    @property
    def kept(self) -> float:
        """The density in force."""
        return 0.5 if self.density is None else self.density

    @property
    def factor(self) -> float:
        """The scale in force."""
        return 1.0 if self.scale is None else self.scale

    @property
    def drawn_with(self) -> int:
        """The seed in force."""
        return self.seed or 0

    @property
    def places_by_origin(self) -> bool:
        return self.place_by == "origin"

    def recorded(self) -> dict[str, Any]:
        """What decides the values of the output, beside the models."""
        values: dict[str, Any] = {"method": self.method, "dtype": self.dtype}
        if self.places_by_origin:
            values["place_by"] = self.place_by
        if self.method == "slerp":
            return values | {"t": 0.5 if self.t is None else self.t}
        values |= {"weights": self.weights or [1.0] * len(self.models), "normalize": self.normalizes}
        if self.has_base:
            values["scale"] = self.factor
        if self.method in _WITH_DENSITY:
            values["density"] = self.kept
        if self.method in _RANDOM:
            values["seed"] = self.drawn_with
        return values

    def _check_fit(self) -> None:
        least = 1 if self.has_base else 2
        if len(self.models) < least:
            raise UserError(f"{self.method} needs at least {least} models, but got {len(self.models)}: --models A B.")
        if self.has_base != (self.base is not None):
            raise UserError(
                f"{self.method} merges changes since a base: name the checkpoint that the models were trained from "
                "with --base."
                if self.has_base
                else f"base is given, but {self.method} has none. Leave it out, or choose {', '.join(_WITH_BASE)}."
            )
        if self.method == "slerp" and len(self.models) != 2:
            raise UserError(f"slerp is between two models, but got {len(self.models)}. Use linear for more.")
        unused = {
            "weights": self.method == "slerp",
            "normalize": self.method == "slerp",
            "t": self.method != "slerp",
            "density": self.method not in _WITH_DENSITY,
            "scale": not self.has_base,
            "seed": self.method not in _RANDOM,
        }
        for name, is_unused in unused.items():
            if is_unused and getattr(self, name) is not None:
                raise UserError(f"{name} is given, but {self.method} does not use it. Leave it out.")

    @cached_property
    def curves(self) -> list[Curve]:
        """The weight of each model by layer; of `slerp`, only t."""
        if self.method == "slerp":
            return [parse_curve("t", 0.5 if self.t is None else self.t)]
        weights = [1.0] * len(self.models) if self.weights is None else self.weights
        if not isinstance(weights, list) or len(weights) != len(self.models):
            count = len(weights) if isinstance(weights, list) else 1
            raise UserError(f"{len(self.models)} models but {count} weights are given. Give one weight for each model.")
        return [parse_curve(f"weight {number}", weight) for number, weight in enumerate(weights, 1)]

    def _check_weights(self) -> None:
        curves = self.curves  # parsed, or refused
        if self.method == "slerp" and not all(0 <= value <= 1 for _, value in curves[0].points):
            raise UserError(f"t is {self.t!r}; expected 0 (the first model) to 1 (the second).")
        if self.method in ("ties", "dare-ties") and self.normalizes:
            for number, curve in enumerate(curves, 1):
                if any(value < 0 for _, value in curve.points):
                    raise UserError(
                        f"weight {number} is negative, but {self.method} divides by the weights that agree. Give "
                        "weights from 0, or --no-normalize."
                    )
