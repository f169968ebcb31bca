# SPDX-License-Identifier: Apache-2.0
"""The better and the worse answer to a prompt, and how far length decides which it is."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jai.preferences.candidates import Candidate
from jai.preferences.prompts import PreferencePrompt

TOO_FEW, TIE, CLOSE, NO_RIGHT, NO_WRONG = (
    "fewer than two answers with a score",
    "all answers have one score",
    "best and worst too close",
    "no right answer",
    "no wrong answer",
)
LENGTHS = "lengths too different"


@dataclass(frozen=True)
class PairingRule:
    """When two answers make a pair.

    Attributes:
        margin: the smallest difference of their scores.
        right_and_wrong: whether the chosen answer must have the score 1, and the rejected one less.
        max_length_ratio: of the longer answer's characters to the shorter one's.
    """

    margin: float = 0.0
    right_and_wrong: bool = False
    max_length_ratio: float = math.inf


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to a prompt.

    Attributes:
        prompt: what was asked.
        chosen, rejected: the better and the worse answer.
        chosen_score, rejected_score: by which they are.
    """

    prompt: PreferencePrompt
    chosen: Candidate
    rejected: Candidate
    chosen_score: float
    rejected_score: float

    @property
    def length_ratio(self) -> float:
        """Characters of the chosen answer to those of the rejected one."""
        return len(self.chosen.answer) / len(self.rejected.answer)


def pair_best_and_worst(
    prompt: PreferencePrompt,
    candidates: Sequence[Candidate],
    scores: Sequence[float | None],
    rule: PairingRule,
) -> PreferencePair | str:
    """The best answer and the worst; of several that are equally good, the two whose lengths are most alike.

    Args:
        prompt: what was asked.
        candidates: the answers.
        scores: of each; None where it has none.
        rule: what makes a pair; lengths are not looked at.

    Returns:
        The pair, or why there is none.
    """
    scored = [(score, each) for score, each in zip(scores, candidates) if score is not None]
    if len(scored) < 2:
        return TOO_FEW
    best, worst = max(score for score, _ in scored), min(score for score, _ in scored)
    if rule.right_and_wrong and best < 1:
        return NO_RIGHT
    if best == worst:
        return NO_WRONG if rule.right_and_wrong else TIE
    if best - worst < rule.margin:
        return CLOSE
    pairs = [
        PreferencePair(prompt, chosen, rejected, best, worst)
        for of_best, chosen in scored
        if of_best == best
        for of_worst, rejected in scored
        if of_worst == worst
    ]
    return min(pairs, key=lambda pair: abs(math.log(pair.length_ratio)))


@dataclass(frozen=True)
class LengthBias:
    """In how far the chosen answers are the longer ones.

    Attributes:
        pairs: how many.
        longer: share of pairs whose chosen answer is the longer one; equal lengths count half.
        ratio: geometric mean of the chosen answer's length to the rejected one's, in characters.
    """

    pairs: int
    longer: float
    ratio: float


def length_bias(pairs: Sequence[PreferencePair]) -> LengthBias | None:
    """The bias of pairs, None where there are none."""
    if not pairs:
        return None
    ratios = [pair.length_ratio for pair in pairs]
    longer = sum((ratio > 1) + (ratio == 1) / 2 for ratio in ratios) / len(ratios)
    return LengthBias(len(pairs), longer, math.exp(sum(map(math.log, ratios)) / len(ratios)))


def make_preference_pairs(
    prompts: Sequence[PreferencePrompt],
    candidates: Sequence[Sequence[Candidate]],
    scores: Sequence[Sequence[float | None]],
    rule: PairingRule,
    dropped: Counter[str],
) -> tuple[list[PreferencePair], LengthBias | None, LengthBias | None]:
    """A pair for each prompt that has one.

    Args:
        prompts, candidates, scores: of each prompt, the answers and what they are worth.
        rule: what makes a pair.
        dropped: is told how many prompts were dropped, by reason.

    Returns:
        The pairs, and the length bias before and after pairs of very different lengths were dropped.
    """
    pairs = []
    for prompt, some, of_some in zip(prompts, candidates, scores):
        result = pair_best_and_worst(prompt, some, of_some, rule)
        if isinstance(result, str):
            dropped[result] += 1
        else:
            pairs.append(result)
    alike = [pair for pair in pairs if abs(math.log(pair.length_ratio)) <= math.log(rule.max_length_ratio) + 1e-12]
    dropped[LENGTHS] += len(pairs) - len(alike)
    return alike, length_bias(pairs), length_bias(alike)
