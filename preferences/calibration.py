# SPDX-License-Identifier: Apache-2.0
"""What a reward model's logits mean: probabilities, fitted to held-out pairs (Platt, 1999), beside its checkpoint.

The loss of a reward model sees differences alone, so its logits have no zero and no scale of their own. The JAI-1 paper
keeps what is above 0.88 "on logit values" (section 6.1.2) and says neither; here 0.88 is a probability.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jai.conversion.adapter.files import CALIBRATION_FILE
from jai.errors import UserError
from jai.files import read_json

PAPER_THRESHOLD = 0.88
_BINS = 10


@dataclass(frozen=True)
class Calibration:
    """From a logit to a probability: 1 / (1 + exp(-(slope * logit + intercept))).

    Attributes:
        slope, intercept: for an answer by itself: that it is a chosen one and no rejected one.
        pair_temperature: for two answers: the better one is that by sigmoid(difference / temperature).
        pairs: how many it is fitted to.
    """

    slope: float
    intercept: float
    pair_temperature: float
    pairs: int

    def probability(self, logit: float) -> float:
        """That an answer is one that would be chosen."""
        return float(_sigmoid(np.array(self.slope * logit + self.intercept)))

    def save(self, folder: Path, measured: dict[str, Any]) -> None:
        """Write it beside a checkpoint, with what was measured on the same pairs."""
        text = json.dumps({**asdict(self), **measured}, indent=2, ensure_ascii=False)
        (folder / CALIBRATION_FILE).write_text(text + "\n", encoding="utf-8")


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration of a checkpoint, None where it has none.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    names = ("slope", "intercept", "pair_temperature", "pairs")
    if not all(isinstance(content.get(name), int | float) for name in names):
        raise UserError(f"{path} is not a calibration; expected the numbers {', '.join(names)}. Train the model anew.")
    return Calibration(**{name: content[name] for name in names})


def fit_calibration(chosen: Sequence[float], rejected: Sequence[float]) -> Calibration:
    """Fit to the logits of pairs.

    Args:
        chosen, rejected: logits of both answers of each pair.
    """
    better, worse = np.asarray(chosen, dtype=float), np.asarray(rejected, dtype=float)
    count = len(better)
    # Platt's targets instead of 1 and 0: pairs that are told apart without a fault would have no finite slope.
    good, bad = (count + 1) / (count + 2), 1 / (count + 2)
    slope, intercept = _fit_logistic(np.concatenate([better, worse]), np.repeat([good, bad], count), with_offset=True)
    scale, _ = _fit_logistic(better - worse, np.full(count, good), with_offset=False)
    return Calibration(slope, intercept, 1 / scale if scale > 0 else math.inf, count)


def calibration_error(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """How far probabilities are from the shares that they promise, in ten bins, of pairs that they are not fitted to.

    Each half of the pairs is measured with the calibration of the other half. NaN for fewer than 4 pairs.
    """
    if len(chosen) < 4:
        return math.nan
    probabilities, outcomes = [], []
    for start in (0, 1):
        fitted = fit_calibration(chosen[1 - start :: 2], rejected[1 - start :: 2])
        for logits, outcome in ((chosen[start::2], 1), (rejected[start::2], 0)):
            probabilities += [fitted.probability(logit) for logit in logits]
            outcomes += [outcome] * len(logits)
    values, happened = np.array(probabilities), np.array(outcomes)
    bins = np.minimum((values * _BINS).astype(int), _BINS - 1)
    return float(sum(abs((values - happened)[bins == each].sum()) for each in range(_BINS)) / len(values))


def _fit_logistic(x: np.ndarray, targets: np.ndarray, *, with_offset: bool) -> tuple[float, float]:
    """Slope and intercept of the logistic regression with soft targets, by Newton's method with halved steps."""
    # In units of the logits' own spread, so that the ridge below is as small for every model.
    spread = float(np.abs(x - x.mean()).mean() if with_offset else np.abs(x).mean()) or 1.0
    center = float(x.mean()) if with_offset else 0.0
    columns = [(x - center) / spread] + ([np.ones_like(x)] if with_offset else [])
    design = np.stack(columns, axis=1)

    def loss(weights: np.ndarray) -> float:
        logits = design @ weights
        return float((np.logaddexp(0, logits) - targets * logits).sum())

    weights = np.zeros(design.shape[1])
    for _ in range(100):
        probabilities = _sigmoid(design @ weights)
        gradient = design.T @ (probabilities - targets)
        curvature = (design * (probabilities * (1 - probabilities))[:, None]).T @ design
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(weights)), gradient)
        size = 1.0
        while size > 1e-6 and loss(weights - size * step) > loss(weights):
            size /= 2
        weights = weights - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    slope = float(weights[0]) / spread
    return slope, float(weights[1] - slope * center) if with_offset else 0.0


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
