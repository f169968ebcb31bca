# SPDX-License-Identifier: Apache-2.0
"""A small suite of the demo's own, measured by `jai eval` before chat training and after all of it."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jai.demo.results import SuiteScore
from jai.evaluation.command import evaluate_suites
from jai.evaluation.options import EvalOptions
from jai.evaluation.results import EvaluationRun, Figure, paired_difference
from jai.evaluation.suites import Suite, read_suite
from jai.hub_card.evaluation import record_run

_HERE = Path(__file__).parent
_QUESTIONS = 40  # of each language
_CHOICES = 4


def write_questions(chats: Sequence[dict[str, Any]], folder: Path, seed: int) -> None:
    """Write questions with four answers, of which one is theirs and three are other questions', as data of the suite.

    Args:
        chats: of one question and its only right answer, with their language.
        folder: for `jai eval --data`.
        seed: draws the other answers and their order.
    """
    rng = random.Random(seed)
    for language in sorted({chat["language"] for chat in chats}):
        pairs = [[message["content"] for message in chat["messages"]] for chat in chats if chat["language"] == language]
        answers = sorted({answer for _, answer in pairs})
        rows = []
        for question, answer in pairs[:_QUESTIONS]:
            choices = [answer, *rng.sample([other for other in answers if other != answer], _CHOICES - 1)]
            rng.shuffle(choices)
            rows.append({"question": question, "choices": choices, "answer": choices.index(answer)})
        path = folder / "jai-demo" / language / "test.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def measure_suite_of_demo(
    before: Path, after: Path, data: Path, out: Path, *, seed: int, console: Console
) -> list[SuiteScore]:
    """Measure two checkpoints, and write the figures of the second into the record that its card reads.

    Args:
        before, after: folders of the checkpoints.
        data: as `write_questions` wrote it.
        out: folder for the two runs.
        seed: of the intervals.
        console: where to print.
    """
    suite = read_suite(str(_HERE / "questions.yaml"))
    assert isinstance(suite, Suite)
    first, second = (
        evaluate_suites(
            EvalOptions(
                model=str(checkpoint),
                out=out / checkpoint.name,
                data=data,
                include_path=_HERE / "questions",
                device="cpu",
                batch_size=16,
                seed=seed,
            ),
            [suite],
            console=console,
        )
        for checkpoint in (before, after)
    )
    record_run(after, second.results, [suite])
    return [
        _score(suite, first, second, figure, seed) for figure in first.results.figures if figure.suite == suite.name
    ]


def _score(suite: Suite, first: EvaluationRun, second: EvaluationRun, figure: Figure, seed: int) -> SuiteScore:
    (later,) = (each for each in second.results.figures if each.name == figure.name)
    rows = [row.task for row in suite.tasks if figure.name in (row.label, *(mean.name for mean in suite.means))]
    difference = paired_difference(
        *([item for item in run.of(suite.name) if item.task in rows] for run in (first, second)),
        weights={row: 1 / len(rows) for row in rows},
        seed=seed,
    )
    assert difference is not None  # both were asked the same
    return SuiteScore(
        name=figure.name,
        items=figure.items,
        before=[figure.value, figure.low, figure.high],
        after=[later.value, later.low, later.high],
        p_value=difference.p_value,
    )
