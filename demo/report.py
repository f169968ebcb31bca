# SPDX-License-Identifier: Apache-2.0
"""The demo's report: one self-contained HTML page, and the same as Markdown with its figures beside it."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from jai.configuration_jai import JaiConfig
from jai.demo.results import Answer, Results
from jai.hub_card.card import layer_plan
from jai.reports import BLUE, GREY, INK, MUTED, ORANGE, RULE, ReportTable, figure_style, layer_plan_svg, router_load_svg

LANGUAGES = {"en": "English", "th": "Thai"}
COLORS = {"en": BLUE, "th": ORANGE}


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph that says what to see, and what there is to see: figures by name, code, a table."""

    title: str
    text: str
    figures: tuple[str, ...] = ()
    table: ReportTable | None = None
    code: str = ""


def write_demo_report(results: Results, folder: Path) -> Path:
    """Write `report.html`, `report.md` and `figures/` into `folder`; returns the page."""
    with figure_style():
        figures = {name: draw(results) for name, draw in FIGURES.items()}
    (folder / "figures").mkdir(exist_ok=True)
    for name, svg in figures.items():
        (folder / "figures" / f"{name}.svg").write_text(svg, encoding="utf-8")
    sections = _sections(results)
    (folder / "report.md").write_text(_markdown(results, sections), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_page(results, sections, figures), encoding="utf-8")
    return page


# Figures


def _plan(results: Results) -> str:
    config = JaiConfig.from_dict(results.config)
    return layer_plan_svg(layer_plan(config, results.alphas_after, [planned.origin for planned in config.running_plan]))


def _router(results: Results) -> str:
    return router_load_svg({name: results.router_load[language] for language, name in LANGUAGES.items()})


def _stages(results: Results) -> str:
    """Bits per character at each stage."""
    figure = Figure(figsize=(9.2, 2.7), layout="constrained")
    for axes, (language, name) in zip(figure.subplots(1, 2), LANGUAGES.items()):
        names = [stage.name for stage in results.stages]
        bits = [stage.bits[language] for stage in results.stages]
        bars = axes.bar(names, bits, color=COLORS[language], width=0.62)
        axes.bar_label(bars, fmt="%.2f", padding=2, color=INK)
        axes.set_title(f"{name}: bits per character, held-out text")
        _bare(axes)
    return _svg(figure)


def _curves(results: Results) -> str:
    """Training loss of each stage."""
    names = {"base": "phi-3 base", "pretrained": "continued pre-training", "sft": "SFT", "dpo": "DPO"}
    losses = [curve for curve in results.curves if curve.metric == "loss"]
    figure = Figure(figsize=(9.2, 2.3), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(losses)), losses):
        axes.plot(curve.steps, curve.values, color=BLUE, linewidth=1.4)
        axes.set_title(f"{names[curve.stage]}: loss")
        axes.set_xlabel("step")
        axes.grid(axis="y")
    return _svg(figure)


def _dpo(results: Results) -> str:
    """How DPO comes to prefer the chosen answer."""
    titles = {
        "rewards/accuracies": "DPO: share of pairs in which the chosen answer wins",
        "rewards/margins": "DPO: reward margin, chosen − rejected",
    }
    figure = Figure(figsize=(9.2, 2.1), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2), titles.items()):
        (curve,) = (curve for curve in results.curves if curve.metric == metric)
        axes.plot(curve.steps, curve.values, color=BLUE, linewidth=1.4)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(axis="y")
    return _svg(figure)


def _fertility(results: Results) -> str:
    """Tokens per character before and after the vocabulary grew."""
    figure = Figure(figsize=(5.2, 2.2), layout="constrained")
    axes = figure.subplots()
    for offset, (label, values, color) in enumerate(
        (("base tokenizer", results.fertility.base, GREY), ("extended", results.fertility.extended, BLUE))
    ):
        positions = [i + (offset - 0.5) * 0.36 for i in range(len(LANGUAGES))]
        bars = axes.bar(positions, [values[language] for language in LANGUAGES], width=0.34, color=color, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=2, color=INK)
    axes.set_xticks(range(len(LANGUAGES)), LANGUAGES.values())
    axes.set_title("tokens per character, held-out text")
    axes.legend(loc="upper left")
    _bare(axes)
    return _svg(figure)


FIGURES: dict[str, Callable[[Results], str]] = {
    "plan": _plan,
    "stages": _stages,
    "curves": _curves,
    "dpo": _dpo,
    "router": _router,
    "fertility": _fertility,
}
CAPTIONS = {
    "plan": "Layers of the JAI in the order in which they run; 'of n' is the base layer it was made from. "
    "An arc is a skip connection with its trained alpha.",
    "stages": "Lower is better. Bits per character can be compared between tokenizers, the loss of a token cannot.",
    "curves": "Training loss, in nats per token (SFT: only the assistant's turns).",
    "dpo": "Preference training.",
    "router": "How often each layer chooses each expert, in percent, after all training; 25 is even.",
    "fertility": "Fewer tokens per character mean longer contexts and faster generation. The English text has a few "
    "Thai words.",
}


def _bare(axes) -> None:
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.18)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


# Sections


def _sections(results: Results) -> list[Section]:
    config, stages = results.config, results.stages
    base, converted, pretrained, sft, final = stages
    own, paper = results.starts
    th, en = "th", "en"
    return [
        Section(
            "The layer plan",
            f"{max(layer.origin for layer in JaiConfig.from_dict(config).layer_plan) + 1} layers of phi-3 become "
            f"{config['num_hidden_layers']}, as in the paper's Table 2: blocks in the middle run two or "
            "three times in place, each copy with its own weights. Equation 1 adds what entered the first copy of a "
            "block to the input of its later copies, times alpha.",
            ("plan",),
        ),
        Section(
            "What each step did",
            f"Conversion changed Thai from {base.bits[th]:.2f} to {converted.bits[th]:.2f} bits per character and "
            f"English from {base.bits[en]:.2f} to {converted.bits[en]:.2f}: the new layers and experts change nothing "
            "yet, but Thai is now read in tokens that the model has never seen. Continued pre-training brought them "
            f"to {pretrained.bits[th]:.2f} and {pretrained.bits[en]:.2f}. Chat training moves a model away from plain "
            "text, so bits per character rise again after it; its benefit shows in the answers below.",
            ("stages",),
        ),
        Section(
            "Two starts",
            "How do the copies of a block start? By default as the identity, which preserves the base's function "
            f"exactly: KL(base ‖ JAI) {own.kl:.2g} nats per token. The paper copies the weights and adds α times the "
            f"anchor, which costs {paper.kl:.2g}; docs/price-of-depth.md compares both after training. This "
            "run continues from the first row.",
            table=ReportTable(
                ["start of the copies", "KL", *(f"{name}, bits/char" for name in LANGUAGES.values())],
                [
                    [start.name, f"{start.kl:.2g}", *(f"{start.bits[name]:.3f}" for name in LANGUAGES)]
                    for start in results.starts
                ],
                numbers=True,
            ),
        ),
        Section("Training", "With TRL's trainers.", ("curves", "dpo")),
        Section(
            "Router load",
            "All experts begin as copies of the base's MLP, so the routers' first choices are arbitrary; "
            "training and the load-balancing loss then correct them.",
            ("router",),
        ),
        Section(
            "Skip alphas",
            "Each alpha is a single trained number, without weight decay.",
            table=ReportTable(
                ["layer", *map(str, results.alphas_after)],
                [
                    ["before", *(f"{alpha:.4f}" for alpha in results.alphas_before.values())],
                    ["after", *(f"{alpha:.4f}" for alpha in results.alphas_after.values())],
                ],
            ),
        ),
        Section(
            "Vocabulary",
            f"Thai text takes {results.fertility.base[th]:.2f} tokens per character in the base and "
            f"{results.fertility.extended[th]:.2f} in the JAI; text without Thai keeps its ids exactly. One sentence, "
            "split by both tokenizers:",
            ("fertility",),
            code=f"base\n{_pieces(results.fertility.base_pieces)}\n\n"
            f"extended\n{_pieces(results.fertility.extended_pieces)}",
        ),
        Section(
            "Answers",
            "Questions that are not in the training chats, answered greedily before and after chat training. A "
            "model of this size learns the form of answers in minutes, but few facts: answers in the right "
            f"language {_share(pretrained.in_language, th)} → {_share(sft.in_language, th)} (SFT) → "
            f"{_share(final.in_language, th)} (DPO) for Thai questions, {_share(pretrained.in_language, en)} → "
            f"{_share(sft.in_language, en)} → {_share(final.in_language, en)} for English ones; exactly right answers "
            f"{_share(pretrained.correct, th)} → {_share(sft.correct, th)} → {_share(final.correct, th)} and "
            f"{_share(pretrained.correct, en)} → {_share(sft.correct, en)} → {_share(final.correct, en)}.",
            table=ReportTable(["question", "expected", "before", "after"], _answer_rows(results)),
        ),
        Section(
            "Evaluation",
            "Questions with four choices, by jai eval: right answers with their 95 % intervals, and the probability "
            "of such a difference by chance alone. Guessing gets 25 %.",
            table=ReportTable(
                ["questions", "count", "before", "after", "p"],
                [
                    [
                        score.name,
                        str(score.items),
                        _interval(score.before),
                        _interval(score.after),
                        f"{score.p_value:.2g}",
                    ]
                    for score in results.suite
                ],
                numbers=True,
            ),
        ),
        Section(
            "Checks",
            "What was checked during the run; any failure stops the demo.",
            table=ReportTable(["check", "finding"], [[name, finding] for name, finding in results.checks.items()]),
        ),
        Section(
            "Every command",
            "As run, in the folder of this report.",
            table=ReportTable(["command", "seconds"], [[c.line, f"{c.seconds:.1f}"] for c in results.commands]),
        ),
        Section(
            "Versions",
            f"Seed {results.seed}; {results.seconds:.0f} s in all; at most {results.peak_memory_mb:,.0f} MB in one "
            "process.",
            table=ReportTable(list(results.versions), [list(results.versions.values())]),
        ),
    ]


def _share(correct: dict[str, float] | None, language: str) -> str:
    return "–" if correct is None else f"{100 * correct[language]:.0f} %"


def _interval(score: Sequence[float]) -> str:
    value, low, high = (100 * part for part in score)
    return f"{value:.0f} % ({low:.0f}–{high:.0f})"


def _pieces(pieces: list[str]) -> str:
    return "·".join(pieces)


def _answer_rows(results: Results, each: int = 6) -> list[list[str]]:
    rows = []
    for language in ("th", "en"):
        pairs = [
            (before, after)
            for before, after in zip(results.answers_before, results.answers_after)
            if after.language == language
        ]
        # Evenly spread, so that no kind of question is picked for its success.
        for before, after in pairs[:: max(len(pairs) // each, 1)][:each]:
            rows.append(
                [after.question, after.expected, _shown(before), f"{'✓' if after.correct else '✗'} {_shown(after)}"]
            )
    return rows


def _shown(answer: Answer, longest: int = 60) -> str:
    text = " ".join(answer.given.split())
    return (text[: longest - 1] + "…" if len(text) > longest else text) or "(nothing)"


# Output


def _tiles(results: Results) -> list[tuple[str, str]]:
    first, pretrained, last = results.stages[0], results.stages[2], results.stages[-1]
    return [
        ("parameters", f"{results.base_parameters / 1e6:.1f} M → {results.jai_parameters / 1e6:.1f} M"),
        ("active for a token", f"{results.jai_active / 1e6:.1f} M"),
        ("Thai, bits per character", f"{first.bits['th']:.2f} → {pretrained.bits['th']:.2f}"),
        ("Thai, tokens per character", f"{results.fertility.base['th']:.2f} → {results.fertility.extended['th']:.2f}"),
        ("Thai questions answered in Thai", _share(last.in_language, "th")),
        ("time", f"{results.seconds / 60:.1f} min"),
    ]


TITLE = "From phi-3 to JAI"
LEAD = (
    "A small phi-3 was given a Thai vocabulary, scaled in depth with skip alphas, made a mixture of four experts, "
    "trained on Thai and English text, chats and preferences, pushed to a Hub and pulled back. Everything here was "
    "measured in this run."
)


def _markdown(results: Results, sections: list[Section]) -> str:
    lines = [f"# {TITLE}", "", LEAD, ""]
    lines += [f"- **{name}**: {value}" for name, value in _tiles(results)]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.text]
        for name in section.figures:
            lines += ["", f"![{CAPTIONS[name]}](figures/{name}.svg)"]
        if section.code:
            lines += ["", "```", section.code, "```"]
        if section.table:
            lines += ["", section.table.markdown()]
    return "\n".join(lines) + "\n"


def _page(results: Results, sections: list[Section], figures: dict[str, str]) -> str:
    tiles = "".join(
        f"<div class=tile><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in _tiles(results)
    )
    body = "".join(_section(section, figures) for section in sections)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{TITLE}</title><style>{STYLE}</style><main><h1>{TITLE}</h1><p class=lead>{LEAD}</p>"
        f"<div class=tiles>{tiles}</div>{body}</main></html>\n"
    )


def _section(section: Section, figures: dict[str, str]) -> str:
    parts = [f"<section><h2>{html.escape(section.title)}</h2><p>{_inline(section.text)}</p>"]
    for name in section.figures:
        image = base64.b64encode(figures[name].encode()).decode()
        caption = html.escape(CAPTIONS[name])
        parts.append(
            f"<figure><img src='data:image/svg+xml;base64,{image}' alt='{caption}'>"
            f"<figcaption>{caption}</figcaption></figure>"
        )
    if section.code:
        parts.append(f"<pre>{html.escape(section.code)}</pre>")
    if section.table:
        parts.append(f"<div class=scroll>{section.table.html()}</div>")
    return "".join(parts) + "</section>"


def _inline(text: str) -> str:
    """Escape, and set `code` between backticks."""
    pieces = html.escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


STYLE = f"""
body {{ margin: 0; background: #fff; color: {INK};
  font: 15px/1.55 system-ui, "Segoe UI", "Noto Sans", "Noto Sans Thai", Sarabun, sans-serif; }}
main {{ max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }}
h1 {{ font-size: 2rem; margin: 0 0 .4rem; letter-spacing: -.01em; }}
h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .3rem; }}
.lead {{ font-size: 1.05rem; color: {MUTED}; max-width: 46rem; margin: 0; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin-top: 1.6rem; }}
.tile {{ border: 1px solid {RULE}; border-radius: .5rem; padding: .7rem .8rem; }}
.tile b {{ display: block; font-size: 1.05rem; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.tile span {{ color: {MUTED}; font-size: .8rem; }}
section p {{ max-width: 46rem; margin: .2rem 0 .8rem; }}
figure {{ margin: .8rem 0; }} figure img {{ width: 100%; }}
figure img[alt^="Fewer"] {{ width: 56%; }}
figcaption {{ color: {MUTED}; font-size: .82rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }}
th {{ text-align: left; font-weight: 600; color: {MUTED}; border-bottom: 1px solid {RULE}; padding: .35rem .6rem; }}
td {{ border-bottom: 1px solid {RULE}; padding: .35rem .6rem; vertical-align: top; overflow-wrap: anywhere; }}
code, pre {{ font: .85em/1.7 ui-monospace, "DejaVu Sans Mono", "Noto Sans Thai", monospace; }}
pre {{ background: #f6f7f9; border-radius: .5rem; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
code {{ background: #f1f3f5; border-radius: .25rem; padding: .05em .3em; }}
"""
