# SPDX-License-Identifier: Apache-2.0
"""What `reasoning_merge.py` found: its rows of CSV, its tables in Markdown, and its plot."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from arms import mean_and_spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from reasoning_merge_arms import ARMS, CONSTANT, LAYER_WISE, Blend

from jai.evaluation.results import Item, paired_difference
from jai.reports import ReportTable, figure_style, series_color

MEASURES = {
    "right th": "right, Thai",
    "right en": "right, English",
    "language": "language accuracy",
    "think": "think accuracy",
    "instructions": "instructions",
}
MEAN = "mean of all"
_NAMED = {  # the recipe's ratios
    "M1": (CONSTANT, 0.25),
    "M2": (CONSTANT, 0.75),
    "M3": (LAYER_WISE, 0.75),
}
_INSIDE = (0.25, 0.5, 0.75)  # ratios at which a valley is looked for: chosen before anything was measured


@dataclass(frozen=True)
class Outcome:
    """The scores of a blend with one seed: by measure, for each question."""

    seed: int
    blend: Blend
    scores: dict[str, list[tuple[str, float]]]

    def mean(self, measure: str) -> float:
        if measure == MEAN:
            return statistics.fmean(map(self.mean, MEASURES))
        return statistics.fmean(score for _, score in self.scores[measure])

    def items(self, measure: str) -> list[Item]:
        """Scores in the form of the package's comparisons; a question is one group over all seeds."""
        names = MEASURES if measure == MEAN else (measure,)
        return [
            Item("reasoning", name, f"{self.seed} {question}", "score", score, group=question)
            for name in names
            for question, score in self.scores[name]
        ]


def csv_rows(found: Sequence[Outcome]) -> list[dict[str, str]]:
    """A row for each model of each seed."""
    return [
        {
            "seed": str(outcome.seed),
            "arm": outcome.blend.arm,
            "shape": outcome.blend.shape,
            "ratio": f"{outcome.blend.ratio:g}",
            **{measure: f"{outcome.mean(measure):.4f}" for measure in (*MEASURES, MEAN)},
        }
        for outcome in found
    ]


def write_report(found: Sequence[Outcome], out: Path) -> None:
    """Write `reasoning_merge.md` and `.png` into `out`."""
    parts = [_recipe_table(found), _valley_table(found), _curves_table(found)]
    text = "\n\n".join(table.markdown() for table in parts)
    (out / "reasoning_merge.md").write_text(text + "\n", encoding="utf-8")
    with figure_style():
        _figure(found).savefig(out / "reasoning_merge.png", dpi=130)


def _of(found: Iterable[Outcome], arm: str, shape: str, ratio: float) -> list[Outcome]:
    return [outcome for outcome in found if outcome.blend == Blend(arm, shape, ratio)]


def _cells(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        mean_and_spread([outcome.mean(measure) for outcome in outcomes], ".2f", ".2f") for measure in (*MEASURES, MEAN)
    ]


def _recipe_table(found: Sequence[Outcome]) -> ReportTable:
    """The parents and the three merges of the recipe."""
    first, second = ARMS
    rows = {
        "language model": (first, CONSTANT, 0.0),
        "reasoner": (first, CONSTANT, 1.0),
        "SFT only": (second, CONSTANT, 0.0),
    }
    rows |= {f"{arm}, {name}": (arm, *place) for arm in ARMS for name, place in _NAMED.items()}
    return ReportTable(
        ["model", *MEASURES.values(), MEAN],
        [[name, *_cells(outcomes)] for name, place in rows.items() if (outcomes := _of(found, *place))],
        numbers=True,
    )


def _curves_table(found: Sequence[Outcome]) -> ReportTable:
    """Every ratio of every arm."""
    blends = dict.fromkeys(outcome.blend for outcome in found)
    rows = [
        [f"{blend.arm}, {blend.shape}", f"{blend.ratio:g}", *_cells(_of(found, blend.arm, blend.shape, blend.ratio))]
        for blend in blends
    ]
    return ReportTable(["merge", "ratio", *MEASURES.values(), MEAN], rows, numbers=True)


def _valley_table(found: Sequence[Outcome]) -> ReportTable:
    """Merges against the worse of their parents, question by question."""
    measures = (*MEASURES, MEAN)
    rows = []
    for arm in ARMS:
        ends = [_of(found, arm, CONSTANT, ratio) for ratio in (0.0, 1.0)]
        places = {f"{ratio:g}": (CONSTANT, ratio) for ratio in _INSIDE} | {"M3": _NAMED["M3"]}
        for name, place in places.items():
            if inside := _of(found, arm, *place):
                rows.append([f"{arm}, {name}", *(_against_worse(ends, inside, measure) for measure in measures)])
    return ReportTable(["merge − worse parent", *MEASURES.values(), MEAN], rows, numbers=True)


def _against_worse(ends: Sequence[Sequence[Outcome]], inside: Sequence[Outcome], measure: str) -> str:
    worse = min(ends, key=lambda outcomes: statistics.fmean(outcome.mean(measure) for outcome in outcomes))
    weights = {name: 1 / len(MEASURES) for name in MEASURES} if measure == MEAN else None
    first, second = ([item for outcome in side for item in outcome.items(measure)] for side in (worse, inside))
    difference = paired_difference(first, second, weights=weights)
    assert difference is not None  # both were asked the same
    text = f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
    return f"**{text}**" if difference.high < 0 else text


def _figure(found: Sequence[Outcome]) -> Figure:
    """Each measure over the ratio: the mean of the seeds, each seed thinly beside it."""
    drawing = Figure(figsize=(12, 6.4), layout="constrained")
    measures = (*MEASURES, MEAN)
    for axes, measure in zip(drawing.subplots(2, 3).flat, measures):
        _draw(axes, found, measure)
        axes.set_title(MEASURES.get(measure, measure))
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return drawing


def _draw(axes: Axes, found: Sequence[Outcome], measure: str) -> None:
    for number, arm in enumerate(ARMS):
        color = series_color(number)
        for shape, style in ((CONSTANT, "-"), (LAYER_WISE, "--")):
            here = [outcome for outcome in found if outcome.blend.arm == arm and outcome.blend.shape == shape]
            ratios = sorted({outcome.blend.ratio for outcome in here})
            for seed in sorted({outcome.seed for outcome in here}):
                own = {outcome.blend.ratio: outcome.mean(measure) for outcome in here if outcome.seed == seed}
                axes.plot(ratios, [own[ratio] for ratio in ratios], style, color=color, linewidth=0.6, alpha=0.4)
            means = [
                statistics.fmean(outcome.mean(measure) for outcome in here if outcome.blend.ratio == ratio)
                for ratio in ratios
            ]
            label = f"{arm}, {shape}"
            axes.plot(ratios, means, style, color=color, marker="o", markersize=3.5, linewidth=1.8, label=label)
    axes.set_xlabel("share of the reasoner (layer-wise: of the early layers)")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y")
