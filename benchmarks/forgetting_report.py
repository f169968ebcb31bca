# SPDX-License-Identifier: Apache-2.0
"""What `forgetting.py` found: its CSV, its tables in Markdown, and its plot."""

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from arms import mean_and_spread
from forgetting_arms import GROUPS, Settings, equal_flops_step
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jai.reports import ReportTable, figure_style, series_color

_BACK = 0.01  # bits per character of English that a start may be behind the model that was not upscaled


@dataclass(frozen=True)
class Point:
    """What was measured on held-out text after some steps of training.

    Attributes:
        step, tokens, flops: of training since the conversion.
        english, thai: bits per character.
        translation_gain: bits a character of Thai that are saved if its own English sentence stands before it, and not
            another's.
    """

    step: int
    tokens: int
    flops: float
    english: float
    thai: float
    translation_gain: float


@dataclass(frozen=True)
class ArmResult:
    """One arm of a group, trained with one seed; `origin` says on what and with what."""

    group: str
    name: str
    seed: int
    points: list[Point]
    origin: dict[str, str]

    def at(self, step: int) -> Point:
        """What was measured after a step."""
        return next(point for point in self.points if point.step == step)


def csv_rows(runs: Sequence[ArmResult]) -> list[dict[str, str]]:
    """A row for each point of each run, in the order of the runs."""
    return [
        {
            "group": run.group,
            "arm": run.name,
            "seed": str(run.seed),
            "step": str(point.step),
            "tokens": str(point.tokens),
            "flops": f"{point.flops:.4g}",
            "english_bits_per_character": f"{point.english:.5f}",
            "thai_bits_per_character": f"{point.thai:.5f}",
            "translation_gain": f"{point.translation_gain:.5f}",
            **run.origin,
        }
        for run in runs
        for point in run.points
    ]


def write_report(runs: Sequence[ArmResult], settings: Settings, out: Path) -> None:
    """Write `forgetting.csv`, `.md` and `.png` into `out`; arms may still lack seeds."""
    rows = csv_rows(runs)
    with (out / "forgetting.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (out / "forgetting.md").write_text(markdown(runs, settings), encoding="utf-8")
    with figure_style():
        figure(runs).savefig(out / "forgetting.png", dpi=130)


def markdown(runs: Sequence[ArmResult], settings: Settings) -> str:
    """The tables: means of the seeds ± their standard deviation."""
    lines: list[str] = []
    for group in GROUPS:
        arms = _by_arm(runs, group)
        if not arms:
            continue
        lines += [f"## {group}", "", _table(arms, settings.steps), ""]
        if group == "forgetting":
            lines += [_equal_flops(arms, settings), ""]
        if group == "starts":
            lines += [_english_over_tokens(arms), ""]
    return "\n".join(lines)


def _table(arms: dict[str, list[ArmResult]], steps: int) -> str:
    columns: list[tuple[str, Callable[[ArmResult], float], str]] = [
        ("English before", lambda run: run.at(0).english, ".3f"),
        ("English after", lambda run: run.at(steps).english, ".3f"),
        ("English lost", lambda run: run.at(steps).english - run.at(0).english, "+.3f"),
        ("Thai before", lambda run: run.at(0).thai, ".3f"),
        ("Thai after", lambda run: run.at(steps).thai, ".3f"),
        ("gain of translations", lambda run: run.at(steps).translation_gain, "+.4f"),
    ]
    return ReportTable(
        ["arm", *(name for name, *_ in columns), "seeds"],
        [
            [
                arm,
                *(mean_and_spread([value(run) for run in found], form) for _, value, form in columns),
                str(len(found)),
            ]
            for arm, found in arms.items()
        ],
        numbers=True,
    ).markdown()


def _equal_flops(arms: dict[str, list[ArmResult]], settings: Settings) -> str:
    """Each arm beside plain training at the step at which it has spent the same, seed by seed."""
    table = []
    for name, found in arms.items():
        kind, share = name.rsplit(", ", 1)
        plain = {run.seed: run for run in arms.get(f"plain, {share}", [])}
        pairs = [(run, plain[run.seed]) for run in found if run.seed in plain]
        if kind == "plain" or not pairs:
            continue
        group = GROUPS["forgetting"]
        step = equal_flops_step(group[f"plain, {share}"], group[name], settings)
        last = settings.steps
        table.append(
            [
                name,
                str(step),
                *(
                    mean_and_spread(
                        [getattr(run.at(last), text) - getattr(base.at(at), text) for run, base in pairs], "+.3f"
                    )
                    for at in (last, step)
                    for text in ("english", "thai")
                ),
            ]
        )
    header = ["arm − plain", "plain's step of equal FLOPs"]
    header += [f"{text}, equal {what}" for what in ("tokens", "FLOPs") for text in ("English", "Thai")]
    return ReportTable(header, table, numbers=True).markdown()


def _english_over_tokens(arms: dict[str, list[ArmResult]]) -> str:
    """English behind the model that was not upscaled and is trained on alike, seed by seed, at each point."""
    plain = {run.seed: run for run in arms.get("not upscaled", [])}
    tokens = [point.tokens for point in next(iter(arms.values()))[0].points]
    rows = []
    for arm, found in arms.items():
        behind = [
            [point.english - base.english for point, base in zip(run.points, plain[run.seed].points)]
            for run in found
            if run.seed in plain
        ]
        if behind and arm != "not upscaled":
            spreads = [mean_and_spread(values, "+.3f") for values in zip(*behind)]
            rows.append([arm, *spreads, ", ".join(_tokens_until_back(tokens, values) for values in behind)])
    header = ["start − not upscaled", *(f"{count:,} tokens" for count in tokens), f"tokens until below {_BACK}"]
    return ReportTable(header, rows, numbers=True).markdown()


def _tokens_until_back(tokens: Sequence[int], behind: Sequence[float]) -> str:
    """Tokens after which English is less than `_BACK` behind, between two points in a straight line."""
    if behind[0] < _BACK:
        return "0"
    for number in range(1, len(tokens)):
        if behind[number] < _BACK:
            before, after = behind[number - 1 : number + 1]
            part = (before - _BACK) / (before - after)
            return f"{tokens[number - 1] + part * (tokens[number] - tokens[number - 1]):,.0f}"
    return "not yet"


def figure(runs: Sequence[ArmResult]) -> Figure:
    """Thai gained against English lost, as curves over training: mean of the seeds, each seed thinly beside it."""
    drawing = Figure(figsize=(12, 4.6), layout="constrained")
    left, middle, right = drawing.subplots(1, 3)
    arms = _by_arm(runs, "forgetting")
    for axes, share in ((left, "100 % Thai"), (middle, "27 % Thai")):
        _draw_trade(axes, share, {name: found for name, found in arms.items() if name.endswith(share)})
    _draw_starts(right, _by_arm(runs, "starts"))
    return drawing


def _draw_trade(axes: Axes, title: str, arms: dict[str, list[ArmResult]]) -> None:
    for number, (name, found) in enumerate(arms.items()):
        color = series_color(number)
        gained = [[run.points[0].thai - point.thai for point in run.points] for run in found]
        lost = [[point.english - run.points[0].english for point in run.points] for run in found]
        for x, y in zip(gained, lost):
            axes.plot(x, y, color=color, linewidth=0.6, alpha=0.5)
        means = [[statistics.mean(values) for values in zip(*rows)] for rows in (gained, lost)]
        axes.plot(*means, color=color, marker="o", markersize=3, linewidth=1.6, label=name.rsplit(", ", 1)[0])
    axes.set_title(title)
    axes.set_xlabel("Thai gained, bits per character")
    axes.set_ylabel("English lost, bits per character")
    axes.grid(axis="y")
    if arms:
        axes.legend(fontsize=7)


def _draw_starts(axes: Axes, arms: dict[str, list[ArmResult]]) -> None:
    for number, (name, found) in enumerate(arms.items()):
        tokens = [point.tokens / 1000 for point in found[0].points]
        values = [[run.points[i].english for run in found] for i in range(len(tokens))]
        color = series_color(number)
        axes.plot(tokens, list(map(statistics.mean, values)), color=color, marker="o", markersize=3, label=name)
        axes.fill_between(tokens, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15, linewidth=0)
    axes.set_title("English alone: until it is back")
    axes.set_xlabel("thousand tokens after conversion")
    axes.set_ylabel("bits per character, English")
    axes.grid(axis="y")
    if arms:
        axes.legend(fontsize=7)


def _by_arm(runs: Sequence[ArmResult], group: str) -> dict[str, list[ArmResult]]:
    arms: dict[str, list[ArmResult]] = {}
    for run in runs:
        if run.group == group:
            arms.setdefault(run.name, []).append(run)
    return arms
