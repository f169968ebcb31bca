# SPDX-License-Identifier: Apache-2.0
"""Candidates: several answers of the model to each prompt, and other models' beside them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jai.errors import UserError
from jai.evaluation.reply_cache import ChatReply
from jai.evaluation.text import is_blank, split_thought
from jai.preferences.prompts import PreferencePrompt

ON_POLICY, OFF_POLICY = "on-policy", "off-policy"


@dataclass(frozen=True)
class Candidate:
    """An answer that competes with others.

    Attributes:
        text: all of it, thoughts too.
        origin: `ON_POLICY`, of the model that is to be trained, or `OFF_POLICY`, of others.
    """

    text: str
    origin: str

    @property
    def answer(self) -> str:
        """What a reader sees."""
        return split_thought(self.text).answer.strip()


@dataclass(frozen=True)
class OtherAnswers:
    """Answers of other models to a prompt, which is known by its id or by its text."""

    id: str | None
    prompt: str | None
    answers: tuple[str, ...]


def other_answers(row: Mapping[str, Any]) -> OtherAnswers:
    """A row of a file of off-policy answers.

    Raises:
        ValueError: if it is something else.
    """
    id_, prompt, answers = row.get("id"), row.get("prompt"), row.get("answers")
    if id_ is None and not isinstance(prompt, str):
        raise ValueError("neither `id` nor a text `prompt`")
    if not isinstance(answers, list) or not all(isinstance(each, str) for each in answers):
        raise ValueError("`answers` is not a list of texts")
    return OtherAnswers(None if id_ is None else str(id_), prompt if isinstance(prompt, str) else None, tuple(answers))


def keep_candidates(replies: Sequence[ChatReply], dropped: Counter[str]) -> list[Candidate]:
    """The model's answers to a prompt that compete: no blank one, none that was cut off, and none twice.

    Args:
        replies: to the prompt.
        dropped: is told how many answers were dropped, by reason.
    """
    kept: dict[str, Candidate] = {}
    for reply in replies:
        if reply.finish_reason == "length":
            dropped["answers cut off at --max-new-tokens"] += 1
        else:
            _keep(Candidate(reply.text, ON_POLICY), kept, dropped)
    return list(kept.values())


def add_off_policy(
    prompts: Sequence[PreferencePrompt],
    candidates: Sequence[list[Candidate]],
    others: Iterable[OtherAnswers],
    dropped: Counter[str],
) -> int:
    """Put other models' answers beside the model's own.

    Returns:
        How many were added.

    Raises:
        UserError: if none of them is to any of the prompts.
    """
    by_name: dict[str, list[str]] = defaultdict(list)
    for each in others:
        by_name[f"id {each.id}" if each.id is not None else f"prompt {each.prompt}"] += each.answers
    added = 0
    for prompt, own in zip(prompts, candidates):
        kept = {each.text: each for each in own}
        for text in [*by_name[f"id {prompt.id}"], *by_name[f"prompt {prompt.text}"]]:
            _keep(Candidate(text, OFF_POLICY), kept, dropped)
        added += len(kept) - len(own)
        own[:] = kept.values()
    if not added:
        raise UserError("None of the off-policy answers is to one of the prompts. Give their ids or texts.")
    return added


def _keep(candidate: Candidate, kept: dict[str, Candidate], dropped: Counter[str]) -> None:
    if is_blank(candidate.answer):
        dropped["blank answers"] += 1
    elif candidate.text in kept:
        dropped["answers that came before"] += 1
    else:
        kept[candidate.text] = candidate
