# SPDX-License-Identifier: Apache-2.0
"""What `price_of_depth.py` found: its CSV, its tables in Markdown, and its plot."""

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from arms import mean_and_spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jai.reports import ReportTable, figure_style, series_color

BASE, DEPTH, EXPERTS = "base", "depth", "experts"
REFERENCES = {DEPTH: "base", EXPERTS: "dense"}  # the arm without the conversion, by part
_POINTS_IN_TABLES = (1 / 20, 1 / 3, 1)  # parts of the steps that all arms of a part have in common


@dataclass(frozen=True)
class Measurement:
    """What was measured on held-out text after some steps of training.

    Attributes:
        step, tokens: of training since the conversion (of the base: since its first weights).
        nats: loss in nats per token, all texts together.
        bits: bits per character, all texts together.
        bits_by_text: bits per character of each text.
        alphas: the skip alphas, from the first layer to the last.
        load_entropy: for each layer the entropy of its experts' shares of the tokens, 1 where all have the same.
        expert_distance: mean over layers and pairs of experts of |a - b| / sqrt((|a|² + |b|²) / 2), where an expert is
            one vector of all its weights: 0 for copies, 1.41 for strangers.
    """

    step: int
    tokens: int
    nats: float
    bits: float
    bits_by_text: dict[str, float]
    alphas: list[float] = field(default_factory=list)
    load_entropy: list[float] = field(default_factory=list)
    expert_distance: float | None = None


@dataclass(frozen=True)
class ArmResult:
    """One arm trained with one seed; `origin` says on what and with what."""

    part: str
    arm: str
    seed: int
    points: list[Measurement]
    origin: dict[str, str]

    @property
    def last_step(self) -> int:
        return self.points[-1].step

    def at(self, step: int) -> Measurement:
        """What was measured after a step."""
        return next(point for point in self.points if point.step == step)


def csv_rows(runs: Sequence[ArmResult]) -> list[dict[str, str]]:
    """A row for each point of each run, in the order of the runs."""
    return [
        {
            "part": run.part,
            "arm": run.arm,
            "seed": str(run.seed),
            "step": str(point.step),
            "tokens": str(point.tokens),
            "nats_per_token": f"{point.nats:.5f}",
            "bits_per_character": f"{point.bits:.5f}",
            **{f"bits_per_character_{name}": f"{bits:.5f}" for name, bits in point.bits_by_text.items()},
            "skip_alphas": " ".join(f"{alpha:.4f}" for alpha in point.alphas),
            "load_entropy_mean": f"{statistics.mean(point.load_entropy):.4f}" if point.load_entropy else "",
            "load_entropy_min": f"{min(point.load_entropy):.4f}" if point.load_entropy else "",
            "expert_distance": "" if point.expert_distance is None else f"{point.expert_distance:.4f}",
            **run.origin,
        }
        for run in runs
        for point in run.points
    ]


def write_report(runs: Sequence[ArmResult], out: Path) -> None:
    """Write `price_of_depth.csv`, `.md` and `.png` into `out`; arms may still lack seeds."""
    rows = csv_rows(runs)
    with (out / "price_of_depth.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (out / "price_of_depth.md").write_text(markdown(runs), encoding="utf-8")
    with figure_style():
        figure(runs).savefig(out / "price_of_depth.png", dpi=130)


def markdown(runs: Sequence[ArmResult]) -> str:
    """The tables: means of the seeds ± their standard deviation, differences seed by seed."""
    lines = []
    for part in (DEPTH, EXPERTS):
        arms = _by_arm(runs, part)
        if REFERENCES[part] not in arms:
            continue
        steps = _common_steps(arms)
        shown = sorted({min(steps, key=lambda step: abs(step - f * steps[-1])) for f in (0, *_POINTS_IN_TABLES)})
        reference = {run.seed: run for run in arms[REFERENCES[part]]}
        lines += [f"## {part}: nats per token", ""]
        table = ReportTable(
            ["start", "before", "after", f"step {steps[-1]}"]
            + [f"− {REFERENCES[part]}, step {step}" for step in shown]
            + ["seeds"],
            [
                [
                    arm,
                    mean_and_spread([reference[run.seed].at(0).nats for run in found], ".3f"),
                    *(mean_and_spread([run.at(step).nats for run in found], ".3f") for step in (0, steps[-1])),
                    *(
                        mean_and_spread(
                            [run.at(step).nats - reference[run.seed].at(step).nats for run in found], "+.3f"
                        )
                        for step in shown
                    ),
                    str(len(found)),
                ]
                for arm, found in arms.items()
            ],
            numbers=True,
        )
        lines.append(table.markdown())
        found = arms[REFERENCES[part]]
        lines += ["", f"{REFERENCES[part]} with the compute of the others: step {found[0].last_step}, "]
        lines[-1] += mean_and_spread([run.points[-1].nats for run in found], ".3f")
        gained = mean_and_spread([run.points[-1].nats - run.at(steps[-1]).nats for run in found], "+.3f")
        lines[-1] += f"; {gained} against itself at step {steps[-1]}"
        lines += ["", f"## {part}: bits per character", ""]
        texts = list(found[0].points[0].bits_by_text)
        ends = [(step, name) for name in texts for step in (shown[0], shown[-1])]
        table = ReportTable(
            ["start", *(f"{name}, step {step}" for step, name in ends)],
            [
                [arm, *(mean_and_spread([r.at(step).bits_by_text[name] for r in found], ".3f") for step, name in ends)]
                for arm, found in arms.items()
            ],
            numbers=True,
        )
        lines.append(table.markdown())
        lines += ["", *(_alphas(arms) if part == DEPTH else _experts(arms, shown)), ""]
    return "\n".join(lines)


def _alphas(arms: dict[str, list[ArmResult]]) -> list[str]:
    learned = {arm: found for arm, found in arms.items() if any(_moved(run) for run in found)}
    copies = max((len(run.points[-1].alphas) for found in learned.values() for run in found), default=0)
    return [
        "## depth: learned alphas at the end",
        "",
        ReportTable(
            ["start", *(f"copy {i + 1}" for i in range(copies)), "mean"],
            [
                [
                    arm,
                    *(mean_and_spread([run.points[-1].alphas[i] for run in found], "+.2f") for i in range(copies)),
                    mean_and_spread([statistics.mean(run.points[-1].alphas) for run in found], "+.2f"),
                ]
                for arm, found in learned.items()
            ],
            numbers=True,
        ).markdown(),
    ]


def _moved(run: ArmResult) -> bool:
    return run.points[0].alphas != run.points[-1].alphas


def _experts(arms: dict[str, list[ArmResult]], shown: Sequence[int]) -> list[str]:
    mixtures = {arm: found for arm, found in arms.items() if found[0].points[0].load_entropy}
    columns: list[tuple[str, Callable[[Measurement], float]]] = [
        ("load entropy, mean of layers", lambda point: statistics.mean(point.load_entropy)),
        ("load entropy, least of layers", lambda point: min(point.load_entropy)),
        ("distance of experts", lambda point: point.expert_distance or 0.0),
    ]
    return [
        "## experts: router load and distance",
        "",
        ReportTable(
            ["start", *(f"{name}, step {step}" for name, _ in columns for step in (shown[0], shown[1], shown[-1]))],
            [
                [
                    arm,
                    *(
                        mean_and_spread([measure(run.at(step)) for run in found], ".3f")
                        for _, measure in columns
                        for step in (shown[0], shown[1], shown[-1])
                    ),
                ]
                for arm, found in mixtures.items()
            ],
            numbers=True,
        ).markdown(),
    ]


def figure(runs: Sequence[ArmResult]) -> Figure:
    """Loss against the control's, alphas and experts, by start: mean of the seeds, band from the least to the most."""
    depth, experts = _by_arm(runs, DEPTH), _by_arm(runs, EXPERTS)
    alphas = {arm: found for arm, found in depth.items() if arm.startswith("alpha-")}
    others = {arm: found for arm, found in depth.items() if arm not in (*alphas, REFERENCES[DEPTH])}
    learned = {arm: found for arm, found in depth.items() if any(_moved(run) for run in found)}
    mixtures = {arm: found for arm, found in experts.items() if found[0].points[0].load_entropy}
    controls = {(run.part, run.seed): run for run in runs if run.arm == REFERENCES.get(run.part)}

    def behind(run: ArmResult, point: Measurement) -> float:
        return point.nats - controls[run.part, run.seed].at(point.step).nats

    drawing = Figure(figsize=(13, 7.4), layout="constrained")
    (top, bottom) = drawing.subplots(2, 3)
    label = "nats per token behind the {}"
    _draw(top[0], "Depth: copies with a skip alpha", alphas, label.format("base"), behind, linear=0.01)
    _draw(top[1], "Depth: other starts", others, label.format("base"), behind, linear=0.01)
    _draw(top[2], "Mean of the learned alphas", learned, "alpha", lambda run, point: statistics.mean(point.alphas))
    _draw(bottom[0], "Experts", mixtures, label.format("dense model"), behind, linear=0.01)
    _draw(
        bottom[1],
        "Load of the least even layer",
        mixtures,
        "entropy, 1 is even",
        lambda run, point: min(point.load_entropy),
    )
    _draw(
        bottom[2],
        "Distance between experts",
        mixtures,
        "relative to their size",
        lambda run, point: point.expert_distance or 0.0,
    )
    return drawing


def _draw(
    axes: Axes,
    title: str,
    arms: dict[str, list[ArmResult]],
    label: str,
    measure: Callable[[ArmResult, Measurement], float],
    linear: float | None = None,
) -> None:
    plain = [arm for arm in arms if not arm.endswith("-frozen")]
    colors = {arm: series_color(i) for i, arm in enumerate(plain)}
    for arm, found in arms.items():
        steps = [point.step for point in found[0].points]
        values = [[measure(run, run.at(step)) for run in found] for step in steps]
        color = colors[arm.removesuffix("-frozen")]
        style = "--" if arm.endswith("-frozen") else "-"
        axes.plot(steps, list(map(statistics.mean, values)), style, color=color, label=arm, linewidth=1.3)
        axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15, linewidth=0)
    axes.set_title(title)
    axes.set_xscale("symlog", linthresh=10)
    axes.set_xlim(left=0)
    if linear is not None:
        axes.set_yscale("symlog", linthresh=linear)
    axes.set_xlabel("steps after conversion")
    axes.set_ylabel(label)
    axes.grid(axis="y")
    if arms:
        axes.legend(fontsize=7)


def _by_arm(runs: Sequence[ArmResult], part: str) -> dict[str, list[ArmResult]]:
    arms: dict[str, list[ArmResult]] = {}
    for run in runs:
        if run.part == part:
            arms.setdefault(run.arm, []).append(run)
    return arms


def _common_steps(arms: dict[str, list[ArmResult]]) -> list[int]:
    """Steps at which every run has a point; the reference has one more, at the compute of the others."""
    return sorted(set.intersection(*({point.step for point in run.points} for found in arms.values() for run in found)))
