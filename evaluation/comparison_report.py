# SPDX-License-Identifier: Apache-2.0
"""A comparison of runs for people: tables as text and Markdown, and a picture."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jai.errors import UserError
from jai.evaluation.comparison import ComparedFigure, ComparedRun, Comparison, compare_runs
from jai.evaluation.options import CompareOptions
from jai.evaluation.published import PublishedFigure, published_figures
from jai.evaluation.results import Figure
from jai.reports import ReportTable, figure_style, series_color

if TYPE_CHECKING:
    from rich.console import Console

_NOTHING = "–"
_MOST_AXES = 12  # of a radar; more cannot be read
_FEWEST_AXES = 3
_INDENT, _GAP = 2, 1  # columns of the console


def report_comparison(options: CompareOptions, *, console: "Console | None" = None) -> Comparison:
    """Print runs beside each other, and write what the options ask for.

    Raises:
        UserError: as `compare_runs`, and where a file cannot be written.
    """
    from rich.console import Console

    console = console or Console()
    comparison = compare_runs([Path(run) for run in options.runs])
    sections = [("Runs", runs_table(comparison)), ("Figures", figures_table(comparison))]
    if options.paper:
        sections.append(("Published", published_table(comparison)))
    print_table(*sections[0], console)
    for title, table in sections[1:]:
        if table.rows:
            _print_groups(title, table, console)
    notes = [*comparison.notes, *_obstacle_notes(comparison)]
    if options.paper and not sections[-1][1].rows:
        notes.append("No paper publishes any of these figures.")
    for note in notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)
    if options.markdown is not None:
        _write(options.markdown, lambda path: path.write_text(_markdown(sections, notes), encoding="utf-8"))
    if options.figure is not None:
        _write(options.figure, lambda path: draw_comparison(comparison, path))
    for path in (options.markdown, options.figure):
        if path is not None:
            console.print(f"Written: {path}", markup=False, highlight=False, soft_wrap=True)
    return comparison


def runs_table(comparison: Comparison) -> ReportTable:
    """What the runs are of."""
    rows = [
        [run.name, run.results.model, run.results.revision[:12], str(run.folder), _said(run.results.conditions)]
        for run in comparison.runs
    ]
    return ReportTable(["run", "model", "revision", "folder", "conditions"], rows)


def _said(conditions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in conditions.items() if value is not None)


def figures_table(comparison: Comparison) -> ReportTable:
    """Under each figure the runs: the value with its interval, and what lies between the run and the first."""
    rows: list[list[str]] = []
    for row in comparison.rows:
        title = f"{row.suite}: {row.name}, {row.metric}" + ("" if row.higher_is_better else " (less is better)")
        for number, run in enumerate(comparison.runs):
            score, remarks = _score(row.figures[number]), _remarks(row, number)
            rows.append(["" if number else title, run.name, *score, *_difference(row, number), "; ".join(remarks)])
    return ReportTable(["figure", "run", "score", "95 %", "items", "− first", "95 %", "p", "remark"], rows)


def _score(figure: Figure | None) -> list[str]:
    if figure is None:
        return [_NOTHING, "", ""]
    return [f"{figure.value:.4f}", f"{figure.low:.4f}–{figure.high:.4f}", str(figure.items)]


def _difference(row: ComparedFigure, number: int) -> list[str]:
    difference = row.differences[number]
    if difference is None:
        return [_NOTHING if number else "", "", ""]
    ends = f"[{difference.low:+.4f}, {difference.high:+.4f}]"
    return [f"{difference.value:+.4f}", ends, f"{difference.p_value:.2g}"]


def _remarks(row: ComparedFigure, number: int) -> Iterator[str]:
    """What must be known of a run's figure, or of its test."""
    figure, difference = row.figures[number], row.differences[number]
    if figure is not None and figure.unscored:
        yield f"{figure.unscored} more without a score"
    if row.obstacles[number]:
        yield f"not tested: {row.obstacles[number]}"
    if difference is not None and difference.unpaired:
        yield f"tested on the {difference.items} that both have; {difference.unpaired} are in one run only"


def _value(figure: Figure, scale: float) -> str:
    ends = f"{figure.low * scale:.2f}–{figure.high * scale:.2f}"
    unscored = f", {figure.unscored} unscored" if figure.unscored else ""
    return f"{figure.value * scale:.2f} [{ends}] n={figure.items}{unscored}"


def _obstacle_notes(comparison: Comparison) -> Iterator[str]:
    """How many figures were not tested, by why."""
    for number, run in enumerate(comparison.runs):
        reasons = [row.obstacles[number] for row in comparison.rows if row.obstacles[number]]
        for reason in dict.fromkeys(reasons):
            count = reasons.count(reason)
            yield f"{count} figure{'s' * (count > 1)} of {run.name} not tested against the first run: {reason}."


def published_table(comparison: Comparison) -> ReportTable:
    """The runs' figures in the papers' units, and under each what the papers publish for the same."""
    rows: list[list[str]] = []
    for row in comparison.rows:
        published = _published_of(row)
        for scale in dict.fromkeys(each.scale for each in published):
            title = f"{row.suite}: {row.name} ({row.metric})" + (f" × {scale:g}" if scale != 1 else "")
            ours = [
                ["", run.name, _value(figure, scale), str(run.folder), _judges_of(run, figure), _cut(run)]
                for run, figure in zip(comparison.runs, row.figures)
                if figure is not None
            ]
            theirs = [
                ["", f"{each[0].model}, {each[0].name}", f"{each[0].value:g}", _source(each), *_conditions(each[0])]
                for each in _printed_alike([each for each in published if each.scale == scale])
            ]
            ours[0][0] = title
            rows += _without_repeated_notes(ours + theirs)
    return ReportTable(["figure", "model", "value", "source", "judge", "note"], rows)


def _without_repeated_notes(rows: Sequence[list[str]]) -> Iterator[list[str]]:
    """Rows whose last column is blank where it says what the row above says."""
    before = None
    for *cells, note in rows:
        yield [*cells, "" if note == before else note]
        before = note


def _published_of(row: ComparedFigure) -> list[PublishedFigure]:
    figure = next(figure for figure in row.figures if figure is not None)
    return [each for each in published_figures() if each.matches(figure)]


def _printed_alike(published: Sequence[PublishedFigure]) -> list[list[PublishedFigure]]:
    """A paper's figures of one model; those that several tables repeat are together."""
    groups: dict[tuple[str, str, str, float], list[PublishedFigure]] = {}
    for each in published:
        groups.setdefault((each.paper, each.model, each.name, each.value), []).append(each)
    return list(groups.values())


def _source(alike: Sequence[PublishedFigure]) -> str:
    tables = ", ".join(each.table for each in alike)
    return f"{alike[0].paper}, Table{'s' * (len(alike) > 1)} {tables} ({alike[0].date})"


def _conditions(published: PublishedFigure) -> tuple[str, str]:
    return published.judge or "", published.note


def _cut(run: ComparedRun) -> str:
    limit = run.results.conditions.get("limit")
    return "" if limit is None else f"the first {limit} questions of each task alone"


def _judges_of(run: ComparedRun, figure: Figure) -> str:
    judges = {record.judge for record in run.records(figure).values() if record.judge is not None}
    return ", ".join(sorted(judges))


def print_table(title: str, table: ReportTable, console: "Console") -> None:
    """Print a report's table; cells that are too long for the console go on in another line."""
    from rich.markup import escape
    from rich.table import Column, Table

    columns = [
        Column(escape(name), overflow="fold", justify="right" if table.numbers and number else "left")
        for number, name in enumerate(table.header)
    ]
    shown = Table(*columns, title=title, title_justify="left", box=None)
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def _print_groups(title: str, table: ReportTable, console: "Console") -> None:
    """Print a table of which each group of rows has a heading in its first column, and remarks in its last.

    Both get lines of their own, and what is left fits a console of 80 columns however many runs there are.
    """
    from rich.cells import cell_len
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Column, Table

    _, *names, _ = table.header
    cells = [names, *(row[1:-1] for row in table.rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells)]
    while sum(widths) > max(console.width - _INDENT - _GAP * (len(widths) - 1), len(widths)):
        widths[widths.index(max(widths))] -= 1

    def show(row: Sequence[str]) -> None:
        columns = [Column(width=width, overflow="fold") for width in widths]
        line = Table(*columns, box=None, show_header=False, pad_edge=False, padding=(0, _GAP, 0, 0))
        line.add_row(*map(escape, row))
        console.print(Padding(line, (0, 0, 0, _INDENT)))

    console.print(title, style="italic", markup=False, highlight=False)
    show(names)
    for heading, *shown, remark in table.rows:
        if heading:
            console.print(heading, style="bold", markup=False, highlight=False, soft_wrap=True)
        show(shown)
        if remark:
            console.print(Padding(escape(remark), (0, 0, 0, 2 * _INDENT)), highlight=False)


def _markdown(sections: Sequence[tuple[str, ReportTable]], notes: Sequence[str]) -> str:
    parts = [f"## {title}\n\n{table.markdown()}" for title, table in sections if table.rows]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _write(path: Path, write: Any) -> None:
    """Write a file whole or not at all; one that is there is replaced."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}. Give another path.") from None


# --- The picture ---


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw every figure as bars with their intervals, and those that all runs have as a radar.

    A radar needs three figures and has at most twelve: of more, the mean of each suite, which is the first of those
    with the most items. All are shares of the largest value that they may have: 1, 10 or 100. Figures of which less is
    better are left out of it.

    Args:
        comparison: what to draw.
        path: file to write; its ending decides its form.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    axes = radar_rows(comparison)
    has_radar = len(axes) >= _FEWEST_AXES
    height = 1.2 + len(comparison.rows) * (0.16 * len(comparison.runs) + 0.14)
    with figure_style():
        canvas = Canvas(figsize=(14 if has_radar else 8, max(height, 5 if has_radar else 2)), layout="constrained")
        FigureCanvasAgg(canvas)
        columns = canvas.add_gridspec(1, 2 if has_radar else 1)
        _draw_bars(canvas.add_subplot(columns[0, 0]), comparison)
        if has_radar:
            _draw_radar(canvas.add_subplot(columns[0, 1], projection="polar"), comparison, axes)
        canvas.savefig(path, format=path.suffix[1:], dpi=150, bbox_inches="tight")


def radar_rows(comparison: Comparison) -> list[ComparedFigure]:
    """The axes of the radar."""
    rows = [row for row in comparison.rows if row.higher_is_better and None not in row.figures]
    if len(rows) > _MOST_AXES:
        suites = dict.fromkeys(row.suite for row in rows)
        rows = [max((row for row in rows if row.suite == suite), key=_most_items) for suite in suites][:_MOST_AXES]
    return rows


def _most_items(row: ComparedFigure) -> int:
    return max(figure.items for figure in row.figures if figure is not None)


def _full_scale(row: ComparedFigure) -> float:
    largest = max(figure.high for figure in row.figures if figure is not None)
    return next((bound for bound in (1.0, 10.0, 100.0) if largest <= bound), largest)


def _label(row: ComparedFigure) -> str:
    scale = _full_scale(row)
    return f"{row.suite}: {row.name}, {row.metric}" + (f" (of {scale:g})" if scale != 1 else "")


def _draw_bars(axis: Any, comparison: Comparison) -> None:
    width = 0.8 / len(comparison.runs)
    for number, run in enumerate(comparison.runs):
        places = [(place, row) for place, row in enumerate(comparison.rows) if row.figures[number] is not None]
        figures = [(place, row.figures[number], _full_scale(row)) for place, row in places]
        values = [figure.value / scale for _, figure, scale in figures if figure]
        # A percentile interval may lie beside the mean, to which a bar of matplotlib's has no negative distance.
        low = [max(0.0, (figure.value - figure.low) / scale) for _, figure, scale in figures if figure]
        high = [max(0.0, (figure.high - figure.value) / scale) for _, figure, scale in figures if figure]
        heights = [place + (number + 0.5) * width - 0.4 for place, _, _ in figures]
        axis.barh(
            heights, values, width, xerr=[low, high], color=series_color(number), label=run.name, ecolor="#1c2430"
        )
    axis.set_yticks(range(len(comparison.rows)), [_label(row) for row in comparison.rows])
    axis.set_ylim(len(comparison.rows) - 0.4, -0.6)  # from above, without an empty margin
    axis.set_xlim(0, 1)
    axis.grid(axis="x")
    axis.set_axisbelow(True)
    axis.set_title("Figures with their 95 % intervals")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.02), ncols=3)


def _draw_radar(axis: Any, comparison: Comparison, rows: Sequence[ComparedFigure]) -> None:
    turn = 2 * math.pi
    angles = [turn * number / len(rows) for number in range(len(rows))]
    for number, run in enumerate(comparison.runs):
        figures = [(row.figures[number], _full_scale(row)) for row in rows]
        values = [figure.value / scale for figure, scale in figures if figure]
        axis.plot([*angles, turn], [*values, values[0]], color=series_color(number), label=run.name)
        axis.fill(angles, values, color=series_color(number), alpha=0.1)
    axis.set_xticks(angles, [""] * len(rows))
    axis.set_ylim(0, 1)
    for angle, row in zip(angles, rows):
        label = _label(row).replace(": ", ":\n", 1).replace(", ", ",\n", 1).replace(" / ", " /\n")
        across, up = math.cos(angle), math.sin(angle)
        axis.text(
            angle,
            1.05,
            label,
            fontsize=8,
            ha="center" if abs(across) < 0.3 else "left" if across > 0 else "right",  # away from the circle
            va="center" if abs(up) < 0.3 else "bottom" if up > 0 else "top",
        )
    axis.set_title("What all runs have", pad=60)
