# SPDX-License-Identifier: Apache-2.0
"""Means of figures over batches, steps and processes, for the logs."""

from collections.abc import Callable

import torch


class MeanFigures:
    """Weighted sums of figures by their names in the logs, on the device, until `pop` makes means of them."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, total: torch.Tensor, weight: torch.Tensor) -> None:
        """Add to a figure's sum and to what it is divided by. All processes must name the same figures."""
        sums = torch.stack([total.detach().double(), weight.double().to(total.device)])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means since the last call, of figures that have some weight. All processes must call it together.

        Args:
            reduce: sums a tensor over the processes.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = reduce(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums.clear()
        return {name: total / weight for name, (total, weight) in zip(names, totals) if weight}
