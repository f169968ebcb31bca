# SPDX-License-Identifier: Apache-2.0
"""`jai eval language`: language and think accuracy of files of replies."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from jai.errors import UserError
from jai.evaluation.data import parsed_rows
from jai.evaluation.language import FormCounts, LanguageFault, ThinkFault, form_counts, language_fault, think_fault
from jai.evaluation.options import LanguageOptions
from jai.evaluation.results import Figure, Item, TaskRecord, mean_figure, open_run
from jai.files import print_next, sha256
from jai.provenance import versions

# What tools call a reply: OpenAI and vLLM, TRL, Alpaca; chats; lm-eval's samples.
_USUAL_FIELDS = ("response", "completion", "generation", "output", "reply", "answer", "messages", "resps", "text")
_QUESTION_FIELDS = ("prompt", "question", "instruction", "arguments")  # and what they call what was asked
_METRICS = {"language_acc": "language accuracy", "think_acc": "think accuracy"}  # as of the suites, and for people
_TASK = "replies"
_VERSION = "1"  # of the two definitions

_Faults = tuple[LanguageFault | None, ThinkFault | None]


@dataclass(frozen=True)
class FileReply:
    """A reply in a file.

    Attributes:
        row: number of its row, from 1.
        text: the reply.
        question: what was asked, as far as the row says.
    """

    row: int
    text: str
    question: str = ""


def report_language(options: LanguageOptions, *, console: Console | None = None) -> dict[str, FormCounts]:
    """Count the faults of the replies in each file, and print the two accuracies with their intervals.

    Args:
        options: of the command line; with `out`, the figures and the outcome of each reply are kept there as a run.
        console: where to print; None is standard output.

    Returns:
        The counts by file.

    Raises:
        UserError: as `read_replies`, and as `open_run` where the figures are kept.
    """
    options.check()
    console = console or Console()
    counts = {}
    for path in options.files:
        field, replies = read_replies(Path(path), options.field)
        faults = [(language_fault(reply.text, options.language), think_fault(reply.text)) for reply in replies]
        counts[path] = form_counts(faults)
        items = _items(f"language-{options.language}", replies, faults)
        figures = _figures(items)
        _print(console, f"{path}: {counts[path].replies} replies ({field})")
        for figure, listed in zip(figures, (_listed(counts[path].language), _listed(counts[path].think))):
            score = f"{_METRICS[figure.metric]} {figure.value:.4f} ({figure.low:.4f}–{figure.high:.4f})"
            _print(console, f"  {score}" + (f"  {listed}" if listed else ""))
        if options.out is not None:
            _keep(options.out, Path(path), {"language": options.language, "field": field}, items, figures)
            _print(console, f"The run is in {options.out}.")
            print_next(console, ["jai", "eval", "compare", options.out])
    return counts


def read_replies(path: Path, field: str | None = None) -> tuple[str, list[FileReply]]:
    """The replies in a file of JSON Lines, gzipped or not.

    Args:
        path: the file.
        field: the key that holds a row's reply: text, messages of which the last is the reply, or a list of replies, as
            lm-eval's samples have; None is the first that is usual.

    Returns:
        The key, and the replies in order.

    Raises:
        UserError: if the file or a row is damaged or has no reply, naming the file and the line.
    """
    found = field
    number = 0

    def replies_of(row: Mapping[str, Any]) -> list[FileReply]:
        nonlocal found, number
        number += 1
        found = found or next((name for name in _USUAL_FIELDS if name in row), None)
        if found is None:
            raise ValueError(f"it has none of {', '.join(_USUAL_FIELDS)}; name the reply's key with --field")
        question = _question(row, found)
        return [FileReply(number, text, question) for text in _replies(row, found)]

    replies = list(chain.from_iterable(parsed_rows(path, replies_of)))
    if not replies or found is None:
        raise UserError(f"{path} has no replies. Give a file with a JSON object on each line.")
    return found, replies


def _replies(row: Mapping[str, Any], field: str) -> Iterator[str]:
    value = row.get(field)
    if isinstance(value, str):
        yield value
    elif isinstance(value, list) and value and isinstance(last := value[-1], dict):
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            raise ValueError(f"{field} does not end with a message of the assistant")
        yield last["content"]
    elif isinstance(value, list) and value:
        for part in value:
            yield from _replies({field: part}, field)
    else:
        raise ValueError(f"{field} is {value!r:.100}; expected text, messages, or a list of texts")


def _question(row: Mapping[str, Any], field: str) -> str:
    """What was asked: the messages before the reply, or what tools call the prompt; empty where there is neither."""
    value = row[field] if isinstance(row.get(field), list) else []
    asked = value[:-1] if value and isinstance(value[-1], dict) else []
    asked = asked or next((row[name] for name in _QUESTION_FIELDS if row.get(name) and name != field), "")
    return asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False)


# --- Figures and the run ---


def _items(suite: str, replies: Sequence[FileReply], faults: Sequence[_Faults]) -> list[Item]:
    """An outcome of each metric for each reply. Replies to one question stand or fall together."""
    in_row = Counter(reply.row for reply in replies)
    seen: Counter[int] = Counter()
    items = []
    for reply, found in zip(replies, faults):
        seen[reply.row] += 1
        several = in_row[reply.row] > 1
        for metric, fault in zip(_METRICS, found):
            texts = {"question": reply.question, "answer": reply.text, "fault": fault.value if fault else ""}
            items.append(
                Item(
                    suite,
                    _TASK,
                    f"{reply.row}.{seen[reply.row]}" if several else str(reply.row),
                    metric,
                    float(fault is None),
                    f"row {reply.row}" if several else None,
                    {name: text for name, text in texts.items() if text},
                )
            )
    return items


def _listed(faults: Counter[LanguageFault] | Counter[ThinkFault]) -> str:
    return "; ".join(f"{fault.value}: {count}" for fault, count in faults.most_common())


def _figures(items: Sequence[Item]) -> list[Figure]:
    figures = [
        mean_figure([item for item in items if item.metric == metric], suite=items[0].suite, name=_TASK, metric=metric)
        for metric in _METRICS
    ]
    return [figure for figure in figures if figure is not None]  # there is a reply, and each has a score


def _keep(
    folder: Path, path: Path, conditions: Mapping[str, str], items: Sequence[Item], figures: Sequence[Figure]
) -> None:
    """Write a run as of `jai eval`; that of the same file is written anew."""
    asked = json.dumps([(item.id, item.texts.get("question", "")) for item in items], ensure_ascii=False)
    with open_run(folder, model=str(path), revision=sha256(path), conditions=conditions) as run:
        run.results.versions = versions()
        run.results.seeds = {"bootstrap": 0}
        suite = items[0].suite
        run.replace_items(suite, items)
        run.replace_figures(suite, figures)
        run.replace_task(TaskRecord(suite, _TASK, _VERSION, hashlib.sha256(asked.encode()).hexdigest()))
        run.finish()


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
