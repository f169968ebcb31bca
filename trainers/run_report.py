# SPDX-License-Identifier: Apache-2.0
"""`jai report`: one page of a training run from its logs, with alarms. It needs neither a model nor PyTorch.

The alarms are for what reports of upscaled models describe as failures: a run that turns unstable after upscaling, a
router that collapses, an old language that does not come back. Their limits are ours.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.markup import escape as escape_markup

from jai.errors import UserError
from jai.files import read_json
from jai.reports import ReportTable, line_chart_svg, router_load_svg
from jai.trainers.run_report_options import RunReportOptions

Log = Mapping[str, Any]

JUMP = 10  # a gradient norm of so many times the median of those before it
RISE = 0.3  # nats that the loss may stand above its lowest, as a mean of logs
STARVED = 0.1  # share of what an expert would get if all got as much
RETURN = 0.05  # nats that the old language may be worse at the end than at the start
WINDOW = 3  # logs of a mean

_LOAD = re.compile(r"router/load/(language/(?P<language>.+)/)?layer_(?P<layer>\d+)/expert_(?P<expert>\d+)")


@dataclass(frozen=True)
class RunAlarm:
    """Something that went wrong.

    Attributes:
        kind: "instability", "router" or "language".
        text: what, where and from when.
    """

    kind: str
    text: str


def report_run(options: RunReportOptions, console: Console | None = None) -> Path:
    """Write the page of a run.

    Returns:
        The HTML file.

    Raises:
        UserError: for a folder without the logs of a run, and a file in no folder.
    """
    console = console or Console()
    logs = read_logs(options.run)
    alarms = find_alarms(logs, options.language)
    not_watched = _not_watched(logs, options.language)
    out = options.out or options.run / "report.html"
    if not out.parent.is_dir():
        raise UserError(f"The folder {out.parent} of `--out` does not exist. Make it, or give another file.")
    out.write_text(_page(options.run.name, logs, alarms, not_watched), encoding="utf-8")
    for alarm in alarms:
        console.print(f"[bold yellow]{alarm.kind}:[/] {alarm.text}")
    if not alarms:
        console.print("No alarms.")
    if not_watched is not None:
        console.print(f"[yellow]{escape_markup(not_watched)}[/]")
    console.print(f"[bold green]Report written to[/] {out}", highlight=False)
    return out


def read_logs(run: Path) -> list[Log]:
    """The logs of a run's training steps, from its trainer_state.json or that of its last whole checkpoint.

    Raises:
        UserError: if there are none.
    """
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name), reverse=True)
    for folder in (run, *checkpoints):
        path = folder / "trainer_state.json"
        try:
            history = read_json(path).get("log_history") if path.exists() else None
        except UserError:  # the checkpoint that was being written when the run was killed
            continue
        if logs := _losses(history or [], path):
            return logs
    raise UserError(
        f"{run} has no logs of training: neither it nor a checkpoint-N in it has a trainer_state.json with losses. "
        "Give the output folder of `jai pretrain`, `jai sft` or `jai dpo`."
    )


def _losses(history: Any, path: Path) -> list[Log]:
    """The logs that have a loss, and of each what is a number."""
    logs: list[Log] = []
    for log in history if isinstance(history, list) else [None]:
        if not isinstance(log, dict):
            raise UserError(f"{path} is damaged: its log_history is not a list of logs. Give another run.")
        numbers = {key: value for key, value in log.items() if _is_number(value)}
        if "loss" in log:
            if "loss" not in numbers or type(numbers.get("step")) is not int:
                raise UserError(f"{path} is damaged: a log has no number for its loss or its step. Give another run.")
            logs.append(numbers)
    return logs


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)  # more is no float to draw


def find_alarms(logs: Sequence[Log], language: str) -> list[RunAlarm]:
    """What a run's logs give cause to look at."""
    return [
        *_instability(logs),
        *_starved_experts(logs),
        *_collapsed_routers(logs),
        *_lost_language(logs, language),
    ]


def _instability(logs: Sequence[Log]) -> Iterator[RunAlarm]:
    for log in logs:
        if not math.isfinite(log["loss"]):
            yield RunAlarm("instability", f"the loss is {log['loss']} at step {log['step']:,}")
            break
    norms = [(log["step"], log["grad_norm"]) for log in logs if "grad_norm" in log]
    for number, (step, norm) in enumerate(norms):
        before = [each for _, each in norms[:number]]
        if len(before) >= WINDOW and not norm <= JUMP * median(before):
            yield RunAlarm(
                "instability",
                f"the gradient norm is {norm:.3g} at step {step:,}, more than {JUMP} times the median before it "
                f"({median(before):.3g})",
            )
            break
    means = _means([(log["step"], log["loss"]) for log in logs])
    lowest = math.inf
    for step, value in means:
        lowest = min(lowest, value)
        if value > lowest + RISE:
            yield RunAlarm("instability", f"the loss has risen to {value:.3f} by step {step:,}, from {lowest:.3f}")
            break


def _starved_experts(logs: Sequence[Log]) -> Iterator[RunAlarm]:
    load = _router_load(logs[-1])
    for layer, shares in load.items():
        expert = min(range(len(shares)), key=shares.__getitem__)
        if shares[expert] < STARVED / len(shares):
            yield RunAlarm(
                "router",
                f"expert {expert} of layer {layer} gets {shares[expert]:.2%} of the tokens at step "
                f"{logs[-1]['step']:,}; if all got as much it would be {1 / len(shares):.0%}",
            )


def _collapsed_routers(logs: Sequence[Log]) -> Iterator[RunAlarm]:
    """Languages that half of a layer's experts do not see, over the last logs that have them."""
    for language in _languages(logs):
        by_log = [load for log in logs if (load := _router_load(log, language))][-WINDOW:]
        if len(by_log) < WINDOW:
            continue
        for layer in by_log[-1]:
            shares = [mean(each) for each in zip(*(load[layer] for load in by_log if layer in load))]
            starved = [expert for expert, share in enumerate(shares) if share < STARVED / len(shares)]
            if len(starved) * 2 >= len(shares):
                listed = ", ".join(map(str, starved))
                yield RunAlarm(
                    "router",
                    f"layer {layer} has collapsed for {language}: of {len(shares)} experts, {listed} together get "
                    f"{sum(shares[expert] for expert in starved):.2%} of its tokens at the end",
                )


def _languages(logs: Sequence[Log]) -> list[str]:
    """That routers were told apart by."""
    matches = (_LOAD.fullmatch(key) for log in logs[-WINDOW:] for key in log)
    return sorted({match["language"] for match in matches if match and match["language"]})


def _lost_language(logs: Sequence[Log], language: str) -> Iterator[RunAlarm]:
    name = f"loss/language/{language}"
    losses = [(log["step"], log[name]) for log in logs if name in log]
    if len(losses) < 2 * WINDOW:
        return
    means = _means(losses)
    (_, first), (step, last) = means[0], means[-1]
    if last > first + RETURN:
        yield RunAlarm(
            "language",
            f"the loss on {language} is {last:.3f} at step {step:,}, and was {first:.3f} at the start: it has not come "
            "back",
        )


def _not_watched(logs: Sequence[Log], language: str) -> str | None:
    """Why nothing can be said of the old language, where the logs tell languages apart."""
    prefix = "loss/language/"
    counts = Counter(key.removeprefix(prefix) for log in logs for key in log if key.startswith(prefix))
    if not counts:
        return None
    if language not in counts:
        return (
            f"Whether {language} recovers is not known: the logs have losses on {', '.join(sorted(counts))}. "
            "`--language` says which is the base's."
        )
    least = 2 * WINDOW
    if counts[language] < least:
        return (
            f"Whether {language} recovers is not known: that takes {least} logs with a loss on it, and there are "
            f"{counts[language]}."
        )
    return None


def _means(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over a window that ends at each step, from the first whole one on."""
    return [
        (points[end][0], mean(value for _, value in points[end + 1 - WINDOW : end + 1]))
        for end in range(WINDOW - 1, len(points))
    ]


def _router_load(log: Log, language: str | None = None) -> dict[int, list[float]]:
    """Shares of the experts by layer: of all tokens, or of a language's."""
    found: dict[int, dict[int, float]] = {}
    for key, value in log.items():
        if (match := _LOAD.fullmatch(key)) and match["language"] == language:
            found.setdefault(int(match["layer"]), {})[int(match["expert"])] = value
    return {layer: [shares[expert] for expert in sorted(shares)] for layer, shares in sorted(found.items())}


# Title of each chart, and the keys of the logs that it draws.
_CHARTS = (
    ("Loss", r"loss|loss/(next|second)_token"),
    ("Loss by language, in nats a token", r"loss/language/(?P<name>.+)"),
    ("Loss by category, in nats a token", r"loss/category/(?P<name>.+)"),
    ("Margin of the chosen answer's reward over the rejected one's", r"rewards/margins"),
    ("Margin by category", r"rewards/margins/category/(?P<name>.+)"),
    ("Margin by language", r"rewards/margins/language/(?P<name>.+)"),
    ("Share of pairs whose chosen answer has the higher reward", r"rewards/accuracies"),
    ("The same share by category", r"rewards/accuracies/category/(?P<name>.+)"),
    ("The same share by language", r"rewards/accuracies/language/(?P<name>.+)"),
    ("Gradient norm", r"grad_norm"),
    ("Learning rate", r"learning_rate"),
    ("Tokens seen", r"tokens_seen(/(?P<name>.+))?"),
    ("Tokens a second", r"tokens_per_second"),
    ("Load-balancing loss of each layer", r"router/aux_loss/layer_(?P<name>\d+)"),
    ("z-loss of each layer", r"router/z_loss/layer_(?P<name>\d+)"),
    ("Entropy of each layer's router, in nats", r"router/entropy/layer_(?P<name>\d+)"),
    ("Entropy of routers by language, mean of layers, in nats", r"router/entropy/language/(?P<name>.+)/mean"),
    ("Largest share of an expert by language, mean of layers", r"router/load_max/language/(?P<name>.+)/mean"),
    ("Skip alphas, by layer", r"skip_alpha/layer_(?P<name>\d+)"),
)


def _page(name: str, logs: Sequence[Log], alarms: Sequence[RunAlarm], not_watched: str | None) -> str:
    last = logs[-1]
    facts = ReportTable(
        ("", ""),
        [("steps", f"{last['step']:,}"), ("loss", f"{last['loss']:.4f}")]
        + ([("tokens seen", f"{last['tokens_seen']:,}")] if "tokens_seen" in last else []),
    )
    warned = "".join(f"<li><b>{escape(each.kind)}</b>: {escape(each.text)}</li>" for each in alarms)
    unknown = f"<p>{escape(not_watched)}</p>" if not_watched is not None else ""
    parts = [f"<ul>{warned}</ul>" if alarms else "<p>No alarms.</p>", unknown, facts.html(), *_charts(logs)]
    load = _router_load(last)
    if load:
        groups = {"all tokens": list(load.values())}
        groups |= {each: list(_router_load(last, each).values()) for each in _languages([last])}
        parts += [f"<p>Routers at step {last['step']:,}.</p>", router_load_svg(groups)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{escape(name)}</title><style>body{{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
        "padding:0 1rem}svg{max-width:100%;height:auto}</style>"
        f"<h1>{escape(name)}</h1>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _charts(logs: Sequence[Log]) -> Iterator[str]:
    for title, pattern in _CHARTS:
        series: dict[str, list[tuple[float, float]]] = {}
        for log in logs:
            for key, value in log.items():
                if match := re.fullmatch(pattern, key):
                    series.setdefault(match.groupdict().get("name") or key, []).append((log["step"], value))
        series = {each: points for each, points in series.items() if any(math.isfinite(value) for _, value in points)}
        if series:
            yield line_chart_svg(title, series)
