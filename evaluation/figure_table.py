# SPDX-License-Identifier: Apache-2.0
"""Figures as a table on the console."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jai.evaluation.results import Figure

if TYPE_CHECKING:
    from rich.console import Console


def print_figures(title: str, figures: Sequence[Figure], console: "Console") -> None:
    """Print figures with their intervals, and how many outcomes each is the mean of."""
    from rich.table import Table

    table = Table("", "metric", "score", "95 %", "items", title=title, title_justify="left", box=None)
    for figure in figures:
        table.add_row(
            figure.name,
            figure.metric,
            f"{figure.value:.4f}",
            f"{figure.low:.4f}–{figure.high:.4f}",
            str(figure.items) + (f" (+{figure.unscored} without a score)" if figure.unscored else ""),
        )
    console.print(table)
