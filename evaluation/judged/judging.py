# SPDX-License-Identifier: Apache-2.0
"""Asking a judge, several times if that is wanted, and what came of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from jai.errors import UserError
from jai.evaluation.endpoint import EndpointClient, FailedRequest
from jai.evaluation.judged.options import JUDGE_PARAMETERS
from jai.evaluation.judged.prompts import JudgePrompt
from jai.evaluation.reply_cache import ChatRequest
from jai.evaluation.results import ITEMS_FILE, Figure

Verdict = TypeVar("Verdict")


@dataclass(frozen=True)
class Case(Generic[Verdict]):
    """One thing to judge.

    Attributes:
        prompt: what the judge is told.
        parts: titles and texts of what is judged.
        read: reads the verdict in a reply.
    """

    prompt: JudgePrompt
    parts: tuple[tuple[str, str], ...]
    read: Callable[[str], Verdict | None]


@dataclass(frozen=True)
class Judgement(Generic[Verdict]):
    """What a judge said of a case.

    Attributes:
        verdicts: of each repeat; None where it could not be read, or there was no reply.
        replies: of each repeat, or why there is none.
        failed: how many repeats have no reply.
    """

    verdicts: tuple[Verdict | None, ...]
    replies: tuple[str, ...]
    failed: int

    @property
    def readable(self) -> list[Verdict]:
        """The verdicts that could be read."""
        return [verdict for verdict in self.verdicts if verdict is not None]

    @property
    def unreadable(self) -> int:
        """How many replies held no verdict."""
        return len(self.verdicts) - len(self.readable) - self.failed


def requests_of(cases: Sequence[Case], parameters: Mapping[str, Any], repeats: int) -> list[ChatRequest]:
    """The requests to a judge, `repeats` for each case, one after the other."""
    return [
        ChatRequest(case.prompt.messages(case.parts), parameters, repeat) for case in cases for repeat in range(repeats)
    ]


def judge_cases(
    cases: Sequence[Case[Verdict]],
    judge: EndpointClient,
    *,
    parameters: Mapping[str, Any] = JUDGE_PARAMETERS,
    repeats: int = 1,
) -> list[Judgement[Verdict]]:
    """Have all cases judged.

    Args:
        cases: what to judge.
        judge: whom to ask.
        parameters: of the judge's sampling.
        repeats: how often each case is judged.

    Raises:
        UserError: as `EndpointClient.ask`.
    """
    outcomes = judge.ask(requests_of(cases, parameters, repeats), "Judging")
    judgements = []
    for number, case in enumerate(cases):
        of_case = outcomes[number * repeats : (number + 1) * repeats]
        replies = tuple(each.reason if isinstance(each, FailedRequest) else each.text for each in of_case)
        verdicts = tuple(None if isinstance(each, FailedRequest) else case.read(each.text) for each in of_case)
        failed = sum(isinstance(each, FailedRequest) for each in of_case)
        judgements.append(Judgement(verdicts, replies, failed))
    return judgements


def judgement_notes(judgements: Sequence[Judgement]) -> list[str]:
    """How many replies of a judge count for nothing, and why, for those who read the figures."""
    said = [
        (
            sum(each.unreadable for each in judgements),
            "of the judge's replies hold no verdict that can be read; they count for nothing",
        ),
        (sum(each.failed for each in judgements), "judgements have no reply; they count for nothing"),
    ]
    return [f"{count:,} {what}." for count, what in said if count]


def refuse_unjudged(suite: str, figures: Sequence[Figure], notes: Sequence[str], folder: Path) -> None:
    """Refuse to end as if all were well where there is no figure.

    Args:
        suite, figures, notes: what was judged, and what a reader must know.
        folder: of the run, which keeps what was said.

    Raises:
        UserError: if there is no figure.
    """
    if not figures:
        raise UserError(
            f"{suite} has no figure. {' '.join(notes)} What was said is kept in {folder / ITEMS_FILE}; give a judge "
            "that keeps to the form of its prompt."
        )


def judge_name_notes(judge: EndpointClient) -> list[str]:
    """By what name a judge calls itself, where that is another than it was asked by, or changed on the way."""
    served = judge_names(judge)
    if served == (judge.endpoint.model,):
        return []
    if len(served) < 2:
        return [f"The judge calls itself {', '.join(served) or 'nothing'}."]
    counted = [f"{name or 'nothing'} in {judge.counts.models[name]:,} replies" for name in served]
    return [f"The judge changed while it judged: it calls itself {', '.join(counted)}."]


def judge_names(judge: EndpointClient) -> tuple[str, ...]:
    """What a judge calls itself in its replies."""
    return tuple(sorted(judge.counts.models))
