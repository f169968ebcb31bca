# SPDX-License-Identifier: Apache-2.0
"""The tokenizer ablation's result: JSON, Markdown tables, and a plot."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from jai.reports import ReportTable, figure_style, series_color
from jai.version import __version__

EQUAL_CHARACTERS = "equal characters"
EQUAL_TOKENS = "equal tokens"
EQUAL_COMPUTE = "equal compute with the head"
MEANING = {
    EQUAL_CHARACTERS: "Each arm has read the same text, up to the characters that the arm with the most tokens reads "
    "in a whole run.",
    EQUAL_TOKENS: "Each arm has trained on the same number of tokens, which is the same compute in the layers.",
    EQUAL_COMPUTE: "Each arm has spent the same floating-point operations, those of the head over its vocabulary "
    "included.",
}


@dataclass(frozen=True)
class Point:
    """What was measured after some rows of a run.

    Attributes:
        rows, tokens, characters: what the model was trained on.
        flops: of the training so far: layers, attention and head.
        bits: bits per held-out character, by language.
        seconds: of training so far, on whatever the machine was doing beside it.
    """

    rows: int
    tokens: int
    characters: float
    flops: float
    bits: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class ArmRun:
    """One arm trained with one seed.

    Attributes:
        entries: size of the vocabulary.
        tokens_per_character: on held-out text, by language.
        readouts: rows at which the arms are compared, by name.
        points: what was measured, in the order of training.
        setup: what the run was made with.
    """

    arm: str
    seed: int
    entries: int
    tokens_per_character: dict[str, float]
    readouts: dict[str, int]
    points: list[Point]
    setup: dict[str, Any]

    def at(self, readout: str) -> Point:
        """What was measured at a readout."""
        return next(point for point in self.points if point.rows == self.readouts[readout])


def write_report(runs: Sequence[ArmRun], arms: Sequence[str], out: Path) -> Path:
    """Write `ablation.json`, `ablation.md` and `ablation.png` into `out`; returns the Markdown.

    Args:
        runs: in any order; arms may still lack runs.
        arms: names in the order of the tables; the first is the reference.
        out: folder.
    """
    by_arm = {arm: [run for run in runs if run.arm == arm] for arm in arms}
    by_arm = {arm: sorted(found, key=lambda run: run.seed) for arm, found in by_arm.items() if found}
    versions = {"jai": __version__} | {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, PyTorch {torch.backends.cpu.get_cpu_capability()}"
    (out / "ablation.json").write_text(
        json.dumps({"versions": versions, "machine": machine, "runs": [asdict(run) for run in runs]}, indent=1) + "\n",
        encoding="utf-8",
    )
    with figure_style():
        _figure(by_arm).savefig(out / "ablation.png", dpi=150)
    report = out / "ablation.md"
    report.write_text(_markdown(by_arm, arms[0], versions, machine), encoding="utf-8")
    return report


def _markdown(by_arm: dict[str, list[ArmRun]], reference: str, versions: dict[str, str], machine: str) -> str:
    languages = list(next(iter(by_arm.values()))[0].tokens_per_character)
    lines = ["# Tokenizer ablation", ""]
    lines += ["Bits per character of held-out text, lower is better: mean of the seeds ± their standard deviation.", ""]
    arms = ReportTable(
        ["arm", "entries", *(f"tokens/char {name}" for name in languages), "seeds"],
        [
            [
                arm,
                f"{runs[0].entries:,}",
                *(f"{runs[0].tokens_per_character[name]:.4f}" for name in languages),
                ", ".join(str(run.seed) for run in runs),
            ]
            for arm, runs in by_arm.items()
        ],
    )
    lines.append(arms.markdown())
    for readout, meaning in MEANING.items():
        lines += ["", f"## At {readout}", "", meaning, ""]
        table = ReportTable(
            [
                "arm",
                *languages,
                *(f"{name} − {reference}" for name in languages),
                "characters (M)",
                "tokens (M)",
                "TFLOP",
            ],
            [
                [
                    arm,
                    *(_spread([run.at(readout).bits[name] for run in runs], ".3f") for name in languages),
                    *(_spread(_differences(runs, by_arm, reference, readout, name), "+.3f") for name in languages),
                    f"{statistics.mean(run.at(readout).characters for run in runs) / 1e6:.3f}",
                    f"{statistics.mean(run.at(readout).tokens for run in runs) / 1e6:.3f}",
                    f"{statistics.mean(run.at(readout).flops for run in runs) / 1e12:.1f}",
                ]
                for arm, runs in by_arm.items()
            ],
        )
        lines.append(table.markdown())
    lines += ["", f"Differences are taken seed by seed, to {reference}.", "", "![Bits per character](ablation.png)", ""]
    lines += [", ".join(f"{name} {number}" for name, number in versions.items()) + f"; {machine}."]
    return "\n".join(lines) + "\n"


def _differences(
    runs: list[ArmRun], by_arm: dict[str, list[ArmRun]], reference: str, readout: str, language: str
) -> list[float]:
    other = {run.seed: run.at(readout).bits[language] for run in by_arm.get(reference, [])}
    return [run.at(readout).bits[language] - other[run.seed] for run in runs if run.seed in other]


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    mean = format(statistics.mean(values), form)
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def _figure(by_arm: dict[str, list[ArmRun]]) -> Figure:
    """Bits per character against characters and against tokens: mean of the seeds, and from the least to the most."""
    languages = list(next(iter(by_arm.values()))[0].tokens_per_character)
    measures: dict[str, Callable[[Point], float]] = {
        "characters (millions)": lambda point: point.characters / 1e6,
        "tokens (millions)": lambda point: point.tokens / 1e6,
    }
    figure = Figure(figsize=(9.2, 3.3 * len(languages)), layout="constrained")
    grid = figure.subplots(len(languages), len(measures), squeeze=False, sharex="col", sharey="row")
    for row, language in zip(grid, languages):
        for axes, (label, measure) in zip(row, measures.items()):
            for number, (arm, runs) in enumerate(by_arm.items()):
                # Seeds read other text, so their points differ a little in characters.
                points = list(zip(*(run.points for run in runs)))
                bits = [[point.bits[language] for point in same] for same in points]
                places = [statistics.mean(map(measure, same)) for same in points]
                color = series_color(number)
                axes.plot(places, [statistics.mean(b) for b in bits], color=color, label=arm, linewidth=1.4)
                axes.fill_between(places, [min(b) for b in bits], [max(b) for b in bits], color=color, alpha=0.2)
            axes.set_title(f"{language}: bits per character")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(label)
            axes.grid(axis="y")
    grid[0][0].legend(fontsize=8)
    return figure
