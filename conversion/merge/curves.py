# SPDX-License-Identifier: Apache-2.0
"""Weights by layer: a number for all layers, or straight lines between points over the depth."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from jai.errors import UserError
from jai.options import is_number

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FORM = (
    "Give a number, or points over the depth such as [{at: 0, value: 1}, {at: 53/79, value: 0.5}, {at: 1, value: 0}], "
    "where `at` is 0 for the first layer and 1 for the last; or `layer` in its place, with the number of a layer"
)


@dataclass(frozen=True)
class Curve:
    """A value for each layer.

    Attributes:
        points: positions and values, straight lines between them, constant beyond them.
        by_layer: whether positions are numbers of layers; else the first layer is 0 and the last is 1.
    """

    points: tuple[tuple[float, float], ...]
    by_layer: bool = False

    @property
    def is_constant(self) -> bool:
        return len({value for _, value in self.points}) == 1

    def at(self, layer: int, layers: int) -> float:
        """Value for layer `layer` of `layers`."""
        position = layer if self.by_layer else layer / max(layers - 1, 1)
        if position < self.points[0][0]:
            return self.points[0][1]
        for (start, first), (stop, last) in pairwise(self.points):
            if position < stop:
                return first + (last - first) * (position - start) / (stop - start)
        return self.points[-1][1]


def parse_curve(option: str, given: Any) -> Curve:
    """A curve as YAML writes it: a number, or a list of points.

    Raises:
        UserError: if it is none of these.
    """
    if is_number(given):
        return Curve(((0.0, float(given)),))
    if not isinstance(given, list) or not given or not all(isinstance(point, dict) for point in given):
        raise UserError(f"{option} is {given!r}. {_FORM}.")
    kinds = {frozenset(point) for point in given}
    if kinds not in ({frozenset({"at", "value"})}, {frozenset({"layer", "value"})}):
        raise UserError(
            f"{option} is {given!r}: each point has `at` and `value`, or each `layer` and `value`. {_FORM}."
        )
    by_layer = "layer" in given[0]
    points = tuple((_position(option, point, by_layer), _value(option, point)) for point in given)
    if any(first >= second for (first, _), (second, _) in pairwise(points)):
        raise UserError(f"{option} is {given!r}: the points must come in order, each at its own place.")
    return Curve(points, by_layer)


def layer_of(name: str) -> int | None:
    """Index of the layer that a tensor belongs to, None where it belongs to none, or to one after the last.

    >>> layer_of("model.layers.12.mlp.down_proj.weight")
    12
    """
    found = _LAYER.search(name)
    return int(found[1]) if found and not name.startswith("mtp.") else None


def value_for(curve: Curve, name: str, places: Sequence[int]) -> float:
    """Value of a curve for a tensor: embeddings take that of the first layer, final norm and head that of the last.

    Args:
        curve: of the weight.
        name: of the tensor.
        places: where each layer lies: its own index, or that of the base's layer that it was copied from. The curve
            ends at the largest of them.
    """
    layer = layer_of(name)
    last = max(places, default=-1)
    place = places[layer] if layer is not None else 0 if "embed" in name else last
    return curve.at(place, last + 1)


def _position(option: str, point: dict[str, Any], by_layer: bool) -> float:
    if by_layer:
        layer = point["layer"]
        if type(layer) is int and layer >= 0 and is_number(layer):
            return float(layer)
        raise UserError(f"{option} has layer {layer!r}; expected a whole number from 0.")
    at = point["at"]
    try:
        position = float(Fraction(str(at)))
    except (ValueError, ZeroDivisionError, OverflowError):
        position = -1.0
    if isinstance(at, bool) or not 0 <= position <= 1:
        raise UserError(f"{option} has a point at {at!r}; expected 0 (first layer) to 1 (last), such as 0.5 or 53/79.")
    return position


def _value(option: str, point: dict[str, Any]) -> float:
    if not is_number(point["value"]):
        raise UserError(f"{option} has the value {point['value']!r}; expected a number.")
    return float(point["value"])
