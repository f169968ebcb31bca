# SPDX-License-Identifier: Apache-2.0
"""The page's HTML: how the text was split, and which experts each layer chose. All text is escaped."""

import unicodedata
from collections.abc import Sequence
from html import escape

from routing import Token, load_by_expert

_COLORS = ("#9ec5fe", "#ffc078", "#b2e5a8", "#e5b3f2", "#ffe066", "#96f2d7", "#ffa8a8", "#ced4da")
_MOST_ROWS = 200

CSS = """
.trace h3 { margin: 0 0 .2rem; font-size: 1rem; }
.trace h4 { margin: .6rem 0 .2rem; font-size: .8rem; font-weight: 600; opacity: .75; }
.trace p { margin: 0; font-size: .85rem; opacity: .75; }
.tokens span, .load span, .trace td, .trace td i { color: #1c2430 !important; }  /* on pale colours in dark mode too */
.tokens { line-height: 2; overflow-wrap: anywhere; }
.tokens span { border-radius: .25rem; padding: .1rem .25rem; margin-right: 2px; background: #e7f0fa;
  white-space: pre-wrap; }
.tokens span:nth-of-type(even) { background: #fbe9d9; }
.tokens span.special { background: #eceff2; font-size: .75rem; }
.tokens span.byte { font: .75rem ui-monospace, monospace; }
.load { display: flex; gap: .35rem; flex-wrap: wrap; }
.load span { border-radius: .25rem; padding: .1rem .5rem; font-size: .8rem; }
.scroll { overflow: auto; max-height: 32rem; }
.trace table { border-collapse: separate; border-spacing: 1px; font-size: .75rem; margin: 0; border: none; }
.trace th, .trace td { border: none !important; padding: .1rem .3rem !important; }
.trace th { font-weight: 500; text-align: right; position: sticky; background: var(--background-fill-primary); }
.trace thead th { top: 0; z-index: 1; text-align: center; opacity: .75; }
.trace tbody th { left: 0; white-space: pre; max-width: 11rem; overflow: hidden; }
.trace td { text-align: center; min-width: 2.1rem; border-radius: .2rem; }
.trace td i { font-style: normal; opacity: .7; font-size: .65rem; margin-left: .25rem; }
.trace tr.made th { font-weight: 700; }
""" + "\n".join(f".e{number} {{ background: {color}; }}" for number, color in enumerate(_COLORS))


def split_html(tokens: Sequence[Token]) -> str:
    """The tokens of prompt and reply, one box each."""
    parts = ["<h3>How the text was split</h3>"]
    if not tokens:
        parts.append("<p>Ask something; its tokens will appear here.</p>")
    for title, made in (("What the model read", False), ("What it wrote", True)):
        shown = [token for token in tokens if token.made == made]
        if shown:
            boxes = "".join(_box(token) for token in shown)
            parts.append(f'<h4>{title}: {len(shown)} tokens</h4><div class="tokens">{boxes}</div>')
    return f'<div class="trace">{"".join(parts)}</div>'


def routing_html(tokens: Sequence[Token], experts: int) -> str:
    """A row for each token, newest first, and in it the experts that each layer chose, the most weighty one large.

    Args:
        tokens: as `routing.reply` yields them.
        experts: experts of a layer.
    """
    parts = ["<h3>Which experts read each token</h3>"]
    routed = [token for token in tokens if token.choices]
    if routed:
        load = "".join(
            f'<span class="{_color(expert)}">expert {expert}: {100 * share:.0f} %</span>'
            for expert, share in enumerate(load_by_expert(routed, experts))
        )
        head = "".join(f"<th>{layer}</th>" for layer in range(len(routed[0].choices)))
        rows = "".join(_row(token) for token in reversed(routed[-_MOST_ROWS:]))
        parts += [
            "<p>Large: the expert with the most weight. Small: the others that ran.</p>",
            f'<h4>Share of all choices</h4><div class="load">{load}</div>',
            '<h4>By layer, newest token first</h4><div class="scroll"><table>',
            f"<thead><tr><th>layer</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>",
        ]
    elif experts == 1:
        parts.append("<p>This model is dense: it has no routers.</p>")
    return f'<div class="trace">{"".join(parts)}</div>'


def _row(token: Token) -> str:
    cells = []
    for choice in token.choices:
        first, *others = choice.experts
        small = "".join(f"<i>{expert}</i>" for expert in others)
        cells.append(f'<td class="{_color(first)}" title="{100 * choice.weights[0]:.0f} %">{first}{small}</td>')
    made = ' class="made"' if token.made else ""
    return f"<tr{made}><th>{escape(_spelling(token))}</th>{''.join(cells)}</tr>"


def _box(token: Token) -> str:
    kind = "special" if token.special else "byte" if _is_byte(token) else ""
    return f'<span class="{kind}" title="id {token.id}">{escape(_spelling(token))}</span>'


def _spelling(token: Token) -> str:
    """A token as people read it: a space as ␣, a byte as its two hexadecimal digits, a mark without its letter on ◌."""
    if token.piece == "<0x0A>":
        return "↵"
    if _is_byte(token):
        return token.piece[3:5]
    stands_alone = unicodedata.category(token.piece[0]) == "Mn"
    return ("◌" if stands_alone else "") + token.piece.replace("▁", "␣").replace("\n", "↵")


def _is_byte(token: Token) -> bool:
    return len(token.piece) == 6 and token.piece.startswith("<0x")


def _color(expert: int) -> str:
    return f"e{expert % len(_COLORS)}"
