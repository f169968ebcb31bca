# SPDX-License-Identifier: Apache-2.0
"""The figures of the model card, as SVG that needs nothing but a browser."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_INK, _MUTED, _BLUE, _ORANGE = "#1c2430", "#66707f", "#2563a8", "#b8560f"
_ONCE, _REPEATED = "#dbe6f3", "#f8e3d0"
_WIDTH, _MARGIN, _GAP = 960, 16, 4
_PER_ROW = 16
_BOX_HEIGHT, _ARC_HEIGHT, _FOOT_HEIGHT = 46, 62, 34


@dataclass(frozen=True)
class PlanRow:
    """One run of a block: `run` of `runs`, its layers, the base layers that these come from, and its skip alpha.

    The last two are "–" where they are not known or there is none.
    """

    block: int
    run: int
    runs: int
    layers: str
    origins: str
    alpha: str


def plan_svg(rows: Sequence[PlanRow]) -> str:
    """The layers in the order in which they run; an arc leads from each anchor to each run that adds it.

    Args:
        rows: the runs of all blocks, in order.
    """
    lines: list[list[PlanRow]] = [[]]
    for row in rows:
        rest_of_block = row.runs - row.run  # a block is not cut, so that its arcs stay whole
        if row.run == 1 and lines[-1] and len(lines[-1]) + 1 + rest_of_block > _PER_ROW:
            lines.append([])
        lines[-1].append(row)
    width = (_WIDTH - 2 * _MARGIN) / max(map(len, lines))
    has_arcs = any(row.run > 1 for row in rows)
    above = _ARC_HEIGHT if has_arcs else 8
    height = above + _BOX_HEIGHT + _FOOT_HEIGHT
    parts = [_line(line, width, index * height + above) for index, line in enumerate(lines)]
    total = len(lines) * height + 8
    return _document(total, "The layer plan", [part for line in parts for part in line])


def _line(line: Sequence[PlanRow], width: float, top: float) -> list[str]:
    parts, anchor = [], 0.0
    for index, row in enumerate(line):
        left = _MARGIN + index * width
        if row.run == 1:
            anchor = left + 10
        parts.append(
            f'<rect x="{left + _GAP / 2:.1f}" y="{top}" width="{width - _GAP:.1f}" height="{_BOX_HEIGHT}" rx="6" '
            f'fill="{_ONCE if row.runs == 1 else _REPEATED}"{_stroke(row)}/>'
        )
        middle = left + width / 2
        parts.append(_text(middle, top + 20, row.layers, 13, _INK))
        if row.origins != "–":
            parts.append(_text(middle, top + 36, f"of {row.origins}", 10, _MUTED))
        if row.run > 1:
            end = left + 10
            peak = top - 16 - 14 * row.run
            parts.append(
                f'<path d="M{anchor:.1f} {top - 2} C{anchor:.1f} {peak} {end:.1f} {peak} {end:.1f} {top - 3}" '
                f'fill="none" stroke="{_ORANGE}" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
            parts.append(_text(end + 6, top - 8, f"α {row.alpha}", 11, _ORANGE, anchor="start"))
        if row.run == 1:
            end = left + (min(row.runs, len(line) - index)) * width
            foot = top + _BOX_HEIGHT + 7
            parts.append(f'<path d="M{left + _GAP:.1f} {foot} H{end - _GAP:.1f}" stroke="{_MUTED}" fill="none"/>')
            label = f"block {row.block}" if width > 44 or row.runs > 1 else str(row.block)
            parts.append(_text((left + end) / 2, foot + 15, label, 11, _MUTED))
    return parts


def _stroke(row: PlanRow) -> str:
    return f' stroke="{_ORANGE}" stroke-width="1.5"' if row.run > 1 else ""


def router_svg(load: Mapping[str, Sequence[Sequence[float]]]) -> str:
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
        parts.append(_text(left, top + 14, language, 13, _INK, anchor="start", weight=600))
        top += 24
        for expert in range(experts):
            y = top + expert * row
            parts.append(_text(left - 10, y + 16, f"expert {expert}", 11, _MUTED, anchor="end"))
            for layer, of_layer in enumerate(shares):
                share = of_layer[expert]
                shade = min(1.0, 0.04 + 1.6 * share)
                x = left + layer * cell
                parts.append(
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{cell - 2:.1f}" height="{row - 2}" rx="3" fill="{_BLUE}" '
                    f'fill-opacity="{shade:.2f}"><title>layer {layer}, expert {expert}: '
                    f"{100 * share:.0f} %</title></rect>"
                )
                if cell >= 30:
                    ink = "#fff" if shade > 0.8 else _INK
                    parts.append(_text(x + cell / 2 - 1, y + 15, f"{100 * share:.0f}", 11, ink))
        top += experts * row
        step = 1 if layers <= 24 else 4
        parts += [
            _text(left + layer * cell + cell / 2 - 1, top + 12, str(layer), 10, _MUTED)
            for layer in range(0, layers, step)
        ]
        parts.append(_text(left - 10, top + 12, "layer", 10, _MUTED, anchor="end"))
        top += 30
    return _document(top, "Share of choices that each expert gets, in percent", parts)


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
        f'<path d="M0 0 L8 4 L0 8 z" fill="{_ORANGE}"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f"height=\"{height:.0f}\" font-family=\"system-ui, 'Noto Sans', 'Noto Sans Thai', sans-serif\">"
        f'<title>{escape(title)}</title><defs>{tip}</defs><rect width="100%" height="100%" rx="8" fill="#fff"/>'
        + "\n".join(parts)
        + "</svg>\n"
    )
