# SPDX-License-Identifier: Apache-2.0
"""What `jai merge` can be asked for."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jai.conversion.convert.options import check_choices
from jai.conversion.merge.curves import Curve, parse_curve
from jai.errors import UserError
from jai.files import parse_size

Method = Literal["linear", "slerp", "task-arithmetic", "ties", "dare-linear", "dare-ties"]
_WITH_BASE = ("task-arithmetic", "ties", "dare-linear", "dare-ties")
_WITH_DENSITY = ("ties", "dare-linear", "dare-ties")
_RANDOM = ("dare-linear", "dare-ties")
_NORMALIZED = ("linear", "ties")


@dataclass(kw_only=True)
class MergeOptions:
    """What `jai merge` does; also the keys of its YAML file.

    Attributes:
        models: folders or Hub ids of the checkpoints. The first gives the configuration, the tokenizer and the dtype.
        out: folder to write; it must not exist.
        method: `linear`, the weighted mean of any number of models; `slerp`, along the arc between two;
            `task-arithmetic`, `ties`, `dare-linear`, `dare-ties`, changes since a common base.
        weights: of each model; None weighs all alike (1 each). A weight is a number or points over the depth, such as
            `[{at: 0, value: 1}, {at: 53/79, value: 0.5}, {at: 1, value: 0}]`: straight lines between, `at` 0 is the
            first layer and 1 the last; `layer` in the place of `at` takes the number of a layer. Embeddings have the
            weight of the first layer, final norm and head that of the last.
        t: for `slerp`, the way from the first model (0) to the second (1): a number or points; None is 0.5.
        base: for the methods that merge changes, the checkpoint that the models were trained from.
        density: for `ties` and `dare-*`, the share of changes that is kept; None is 0.5.
        normalize: divide by the sum of the weights; `ties` and `dare-ties` by that of the models that agree. None does
            so for `linear` and `ties`.
        scale: factor of the merged change, for the methods with a base; None is 1.
        dtype: dtype of the output; None keeps the first model's.
        seed: seed of what DARE drops.
        max_shard_size: largest output shard, in bytes or as "5GB".
        workers: shards to write at a time.
    """

    models: list[str]
    out: Path
    method: Method = "linear"
    weights: list[Any] | None = None
    t: Any = None
    base: str | None = None
    density: float | None = None
    normalize: bool | None = None
    scale: float | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = 0
    max_shard_size: int | str = 5_000_000_000
    workers: int = 1

    def __post_init__(self) -> None:
        """Refuse what a YAML may hold and the function would misread.

        Raises:
            UserError: for a value that is none of its option's, and options that do not fit each other.
        """
        if not isinstance(self.models, list) or not all(isinstance(name, str) for name in self.models):
            raise UserError(f"models is {self.models!r}; expected a list of folders or Hub ids.")
        check_choices(self)
        if self.normalize not in (None, True, False):
            raise UserError(f"normalize is {self.normalize!r}; expected true or false.")
        for name, low, high in (("density", 0.0, 1.0), ("scale", -math.inf, math.inf)):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and low < value <= high and math.isfinite(value)):
                raise UserError(f"{name} is {value!r}; expected a number{' above 0, up to 1' if high == 1 else ''}.")
        if type(self.seed) is not int:
            raise UserError(f"seed is {self.seed!r}; expected a whole number.")
        if type(self.workers) is not int or self.workers < 1:
            raise UserError(f"workers is {self.workers!r}; expected a whole number from 1.")
        self.max_shard_size = parse_size(str(self.max_shard_size))
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

    def recorded(self) -> dict[str, Any]:
        """What decides the values of the output, beside the models."""
        values: dict[str, Any] = {"method": self.method, "dtype": self.dtype}
        if self.method == "slerp":
            return values | {"t": 0.5 if self.t is None else self.t}
        values |= {"weights": self.weights or [1.0] * len(self.models), "normalize": self.normalizes}
        if self.has_base:
            values["scale"] = self.factor
        if self.method in _WITH_DENSITY:
            values["density"] = self.kept
        if self.method in _RANDOM:
            values["seed"] = self.seed
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
