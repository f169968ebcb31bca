# SPDX-License-Identifier: Apache-2.0
"""`jai eval language`: language and think accuracy of files of replies."""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from jai.errors import UserError
from jai.evaluation.data import parsed_rows
from jai.evaluation.language import FormCounts, count_form_faults
from jai.evaluation.options import LanguageOptions
from jai.evaluation.results import Item, mean_figure
from jai.files import check_is_file

# What tools call a reply: OpenAI and vLLM, TRL, Alpaca; chats; lm-eval's samples.
_USUAL_FIELDS = ("response", "completion", "generation", "output", "reply", "answer", "messages", "resps", "text")


def report_language(options: LanguageOptions, *, console: Console | None = None) -> dict[str, FormCounts]:
    """Count the faults of the replies in each file, and print the two accuracies with their intervals.

    Args:
        options: of the command line.
        console: where to print; None is standard output.

    Returns:
        The counts by file.

    Raises:
        UserError: as `read_replies`.
    """
    console = console or Console()
    counts = {}
    for path in options.files:
        field, replies = read_replies(Path(path), options.field)
        counts[path] = count_form_faults(replies, options.language)
        _print(console, f"{path}: {counts[path].replies} replies ({field})")
        for line in _lines(counts[path]):
            _print(console, line)
    return counts


def read_replies(path: Path, field: str | None = None) -> tuple[str, list[str]]:
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
    check_is_file(path, "Give a file of JSON Lines.")
    found = field

    def replies_of(row: Mapping[str, Any]) -> list[str]:
        nonlocal found
        found = found or next((name for name in _USUAL_FIELDS if name in row), None)
        if found is None:
            raise ValueError(f"it has none of {', '.join(_USUAL_FIELDS)}; name the reply's key with --field")
        return list(_replies(row, found))

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


def _lines(counts: FormCounts) -> Iterator[str]:
    for name, faults in (("language accuracy", counts.language), ("think accuracy", counts.think)):
        wrong = faults.total()
        items = [Item(name, "replies", str(number), name, float(number >= wrong)) for number in range(counts.replies)]
        figure = mean_figure(items, suite=name, name="replies", metric=name)
        assert figure is not None  # there is at least one reply, and each has a score
        listed = "; ".join(f"{fault.value}: {count}" for fault, count in faults.most_common())
        yield f"  {name} {figure.value:.4f} ({figure.low:.4f}–{figure.high:.4f})" + (f"  {listed}" if listed else "")


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
