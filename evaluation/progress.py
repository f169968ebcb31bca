# SPDX-License-Identifier: Apache-2.0
"""How far a work is, and the time that it has left."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def counted_progress(console: "Console | None", what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; nothing where there is no console, or it is no terminal.

    Args:
        console: where.
        what: name of the work.
        total: how much it is.

    Yields:
        A function that is told how much is done.
    """
    if console is None or not console.is_terminal:
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def quiet_libraries() -> None:
    """There is one bar, ours: `datasets` and `transformers` would show one for each task and each file. And lm-eval
    warns of what is meant so, such as a model that is loaded before it."""
    from datasets import disable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bars()
    disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
