# SPDX-License-Identifier: Apache-2.0
"""What the papers publish, figure by figure, each with its source (`published.yaml`)."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jai.evaluation.results import Figure
from jai.options import read_yaml

PUBLISHED_FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class PublishedFigure:
    """A number of a table.

    Attributes:
        paper, arxiv, date: its name, its id and the month in which it came out.
        table: number of the table.
        model, name: of the row and of the column, as they are printed.
        value: as it is printed, in the paper's unit.
        suites: that measure the same; none where none does.
        ours: names of figures there; none is any.
        metric: of the figure there; None is any.
        scale: what ours is multiplied by to be in the paper's unit.
        judge: that the paper names, None where none judges or is named.
        note: what a reader must know before setting the two side by side.
    """

    paper: str
    arxiv: str
    date: str
    table: str
    model: str
    name: str
    value: float
    suites: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    metric: str | None = None
    scale: float = 1.0
    judge: str | None = None
    note: str = ""

    def matches(self, figure: Figure) -> bool:
        """Whether a figure of a run measures the same."""
        return (
            figure.suite in self.suites
            and (not self.ours or figure.name in self.ours)
            and self.metric in (None, figure.metric)
        )


@cache
def published_figures() -> tuple[PublishedFigure, ...]:
    """All of them, in the order of the papers and their tables."""
    content = read_yaml(PUBLISHED_FILE)
    return tuple(
        PublishedFigure(
            paper=paper["title"],
            arxiv=paper["arxiv"],
            date=paper["date"],
            table=table["table"],
            model=model,
            name=name,
            value=float(value),
            **_counterpart(column or {}),
        )
        for table in content["tables"]
        for paper in [content["papers"][table["paper"]]]
        for model, values in table["models"].items()
        for (name, column), value in zip(table["figures"].items(), values, strict=True)
        if value is not None
    )


def _counterpart(column: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in column.items()}
