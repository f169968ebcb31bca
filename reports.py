# SPDX-License-Identifier: Apache-2.0
"""What reports have in common: one palette, tables, the style of matplotlib's figures, and figures as plain SVG.

The SVG figures need nothing but a browser, so a model card has them without matplotlib.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

INK, MUTED, RULE = "#1c2430", "#66707f", "#dfe3e8"
BLUE, ORANGE = "#2563a8", "#b8560f"  # both dark enough to write with on white, 4.9 : 1 and more
GREY = "#8b96a3"
SERIES = (BLUE, ORANGE, "#3a8f5c", "#8a5ab0", "#b8476b", "#3d9fb3", "#a58b2a", "#5b4a3f")
_ONCE, _REPEATED = "#dbe6f3", "#f8e3d0"  # a block that is there once, a copy of one that is repeated
_THAI_FONTS = ("Noto Sans Thai", "Sarabun", "Thonburi", "Leelawadee UI", "Tahoma")
_NAMED_LINES = 11  # of a chart: what fits beside it


def series_color(number: int) -> str:
    """The colour of the series of that number, from 0; after the last one they begin again."""
    return SERIES[number % len(SERIES)]


# Tables


@dataclass(frozen=True)
class ReportTable:
    """A table of plain text.

    Attributes:
        header: the columns' names; empty for all where there are none.
        rows: as many cells in each.
        numbers: whether all columns but the first hold numbers, which stand right.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: bool = False

    def markdown(self) -> str:
        """In GitHub's form, without a line end after the last row."""
        rule = ["---", *["---:" if self.numbers else "---"] * (len(self.header) - 1)]
        lines = [list(map(markdown_text, self.header)), rule, *(map(markdown_text, row) for row in self.rows)]
        return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines)

    def html(self) -> str:
        """A `<table>`."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def markdown_text(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table: no bar ends the cell, no `<` begins a tag."""
    return " ".join(text.strip().replace("|", "\\|").replace("<", "&lt;").split("\n"))


# Figures by matplotlib


@contextmanager
def figure_style() -> Iterator[None]:
    """Let matplotlib draw and save in this palette while the block runs."""
    import matplotlib as mpl
    from cycler import cycler  # matplotlib's own
    from matplotlib.font_manager import get_font_names

    style: dict[Any, Any] = {
        # matplotlib's own font has no Thai, which names may hold; naming a font that is not there is a warning.
        "font.family": ["DejaVu Sans", *(name for name in _THAI_FONTS if name in get_font_names())],
        "font.size": 9,
        "axes.edgecolor": RULE,
        "axes.labelcolor": MUTED,
        "axes.prop_cycle": cycler(color=SERIES),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "axes.titlecolor": INK,
        "grid.color": RULE,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "text.color": INK,
        "svg.fonttype": "path",
        "svg.hashsalt": "jai",
    }
    with mpl.rc_context(style):
        yield


# Figures as plain SVG

_WIDTH, _MARGIN, _GAP = 960, 16, 4
_BOXES_IN_A_LINE = 16
_BOX_HEIGHT, _ARC_HEIGHT, _FOOT_HEIGHT = 46, 62, 34


@dataclass(frozen=True)
class BlockCopy:
    """A copy of a block in the layer plan.

    Attributes:
        block: the block, from 0.
        copy: which copy of it, from 0.
        copies: how many the block has.
        layers: its layers, as "4–7".
        origins: the layers of the base that these were made from, None where that is not known.
        alpha: the skip alpha with which its first layer adds the anchor, None where it does not.
    """

    block: int
    copy: int
    copies: int
    layers: str
    origins: str | None
    alpha: float | None


def layer_plan_svg(plan: Sequence[BlockCopy]) -> str:
    """The layers in the order in which they run; an arc leads from each anchor to each copy that adds it.

    Args:
        plan: the copies of all blocks, in order.
    """
    lines: list[list[BlockCopy]] = [[]]
    for part in plan:
        # A block is not cut, so that its arcs stay whole.
        if part.copy == 0 and lines[-1] and len(lines[-1]) + part.copies > _BOXES_IN_A_LINE:
            lines.append([])
        lines[-1].append(part)
    width = (_WIDTH - 2 * _MARGIN) / max(map(len, lines))
    above = _ARC_HEIGHT if any(part.copy > 0 for part in plan) else 8
    height = above + _BOX_HEIGHT + _FOOT_HEIGHT
    parts = [_plan_line(line, width, index * height + above) for index, line in enumerate(lines)]
    return _document(len(lines) * height + 8, "The layer plan", [part for line in parts for part in line])


def _plan_line(line: Sequence[BlockCopy], width: float, top: float) -> list[str]:
    parts, anchor = [], 0.0
    for index, part in enumerate(line):
        left = _MARGIN + index * width
        stroke = f' stroke="{ORANGE}" stroke-width="1.5"' if part.copy > 0 else ""
        parts.append(
            f'<rect x="{left + _GAP / 2:.1f}" y="{top}" width="{width - _GAP:.1f}" height="{_BOX_HEIGHT}" rx="6" '
            f'fill="{_ONCE if part.copies == 1 else _REPEATED}"{stroke}/>'
        )
        middle = left + width / 2
        parts.append(_text(middle, top + 20, part.layers, 13, INK))
        if part.origins is not None:
            parts.append(_text(middle, top + 36, f"of {part.origins}", 10, MUTED))
        if part.copy == 0:
            anchor = left + 10
            end = left + min(part.copies, len(line) - index) * width
            foot = top + _BOX_HEIGHT + 7
            parts.append(f'<path d="M{left + _GAP:.1f} {foot} H{end - _GAP:.1f}" stroke="{MUTED}" fill="none"/>')
            label = f"block {part.block + 1}" if width > 44 or part.copies > 1 else str(part.block + 1)
            parts.append(_text((left + end) / 2, foot + 15, label, 11, MUTED))
        else:
            end = left + 10
            peak = top - 30 - 14 * part.copy
            parts.append(
                f'<path d="M{anchor:.1f} {top - 2} C{anchor:.1f} {peak} {end:.1f} {peak} {end:.1f} {top - 3}" '
                f'fill="none" stroke="{ORANGE}" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
            alpha = "–" if part.alpha is None else f"{part.alpha:.4g}"
            parts.append(_text(end + 6, top - 8, f"α {alpha}", 11, ORANGE, anchor="start"))
    return parts


def router_load_svg(load: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """A map of layers by experts for each language; the darker, the more of the layer's choices an expert gets.

    Args:
        load: shares by language, layer and expert; each layer sums to 1.
    """
    layers = max(map(len, load.values()))
    experts = max(len(layer) for layers_of in load.values() for layer in layers_of)
    left, row = 84, 24
    cell = min(96.0, (_WIDTH - left - _MARGIN) / layers)
    parts: list[str] = []
    top = 8.0
    for language, shares in load.items():
        parts.append(_text(left, top + 14, language, 13, INK, anchor="start", weight=600))
        top += 24
        for expert in range(experts):
            y = top + expert * row
            parts.append(_text(left - 10, y + 16, f"expert {expert}", 11, MUTED, anchor="end"))
            for layer, of_layer in enumerate(shares):
                share = of_layer[expert]
                shade = min(1.0, 0.04 + 1.6 * share)
                x = left + layer * cell
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 2:.1f}" height="{row - 2}" rx="3" fill="{BLUE}" '
                    f'fill-opacity="{shade:.2f}"><title>layer {layer}, expert {expert}: '
                    f"{100 * share:.0f} %</title></rect>"
                )
                if cell >= 30:
                    ink = "#fff" if shade > 0.8 else INK
                    parts.append(_text(x + cell / 2 - 1, y + 15, f"{100 * share:.0f}", 11, ink))
        top += experts * row
        step = 1 if layers <= 24 else 4
        parts += [
            _text(left + layer * cell + cell / 2 - 1, top + 12, str(layer), 10, MUTED)
            for layer in range(0, layers, step)
        ]
        parts.append(_text(left - 10, top + 12, "layer", 10, MUTED, anchor="end"))
        top += 30
    return _document(top, "Share of choices that each expert gets, in percent", parts)


def line_chart_svg(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over steps, each named, with the smallest and the largest value at the left.

    Args:
        title: what is drawn.
        series: points (step, value) by name; at least one point in all. Values that are not finite are left out.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    xs = [x for points in finite.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    left, top, height, legend = 84.0, 34.0, 180.0, 210.0
    width = _WIDTH - left - legend
    low, high = min(ys), max(ys)
    wide, tall = max(xs) - min(xs) or 1, high - low or 1
    parts = [_text(left, 20, title, 13, INK, anchor="start", weight=600)]
    for y, value in ((top + height, low), (top, high)):
        parts.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" stroke="{RULE}"/>')
        parts.append(_text(left - 8, y + 4, f"{value:.4g}", 11, MUTED, anchor="end"))
    for x, step in ((left, min(xs)), (left + width, max(xs))):
        parts.append(_text(x, top + height + 18, f"{step:,.0f}", 11, MUTED))
    for number, (name, points) in enumerate(finite.items()):
        places = [(left + (x - min(xs)) / wide * width, top + (high - y) / tall * height) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        color = series_color(number)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"><title>{escape(name)}</title>'
            "</polyline>"
        )
        if len(places) == 1:
            parts.append(f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="2.5" fill="{color}"/>')
        if number < _NAMED_LINES:
            last = f"{name}: {points[-1][1]:.4g}" if points else f"{name}: no number"
            parts.append(_text(left + width + 12, top + 12 + 16 * number, last, 11, color, anchor="start"))
    if len(finite) > _NAMED_LINES:
        more = f"and {len(finite) - _NAMED_LINES} more"
        parts.append(_text(left + width + 12, top + 12 + 16 * _NAMED_LINES, more, 11, MUTED, anchor="start"))
    return _document(top + height + 34, title, parts)


def _text(
    x: float, y: float, text: str, size: int, color: str, *, anchor: str = "middle", weight: int | None = None
) -> str:
    bold = f' font-weight="{weight}"' if weight else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{bold}>'
        f"{escape(text)}</text>"
    )


def _document(height: float, title: str, parts: Sequence[str]) -> str:
    """On white, so that it can be read where the page around it is dark."""
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{ORANGE}"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f"height=\"{height:.0f}\" font-family=\"system-ui, 'Noto Sans', 'Noto Sans Thai', sans-serif\">"
        f'<title>{escape(title)}</title><defs>{tip}</defs><rect width="100%" height="100%" rx="8" fill="#fff"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )
