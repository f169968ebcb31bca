# SPDX-License-Identifier: Apache-2.0
"""Arithmetic problems as chats, in Thai and English, answered with a thought (`<think>`) or without one.

A program makes them and another checks them: `jai.evaluation.answers` reads the final answer, as it does in `jai eval`.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jai.evaluation.answers import STATED_FORMS, is_right_answer

_QUESTIONS = {
    "th": ("{} เท่ากับเท่าไร", "จงหาค่าของ {}", "{} ได้เท่าไร"),
    "en": ("What is {}?", "Work out {}.", "How much is {}?"),
}
_ANSWERS = {"th": "คำตอบคือ {}", "en": "The answer is {}."}
_LARGEST = 9


@dataclass(frozen=True)
class Problem:
    """A sum of two steps, such as 7 + 5 - 3.

    Attributes:
        language: "th" or "en", of the question and of the answer.
        question: what the user asks.
        steps: the lines of the thought.
        result: the right answer.
    """

    language: str
    question: str
    steps: tuple[str, str]
    result: int

    @property
    def prompt(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]

    def answer(self, *, thinks: bool) -> str:
        """What the assistant should say."""
        stated = _ANSWERS[self.language].format(self.result)
        return "<think>\n{}\n{}\n</think>\n\n{}".format(*self.steps, stated) if thinks else stated

    def is_answered_by(self, reply: str) -> bool:
        """Whether a reply states the right answer."""
        return is_right_answer(reply, str(self.result), question=self.question, forms=STATED_FORMS)

    def chat(self, *, thinks: bool, **columns: Any) -> dict[str, Any]:
        """A row for `jai sft`."""
        messages = [*self.prompt, {"role": "assistant", "content": self.answer(thinks=thinks)}]
        return {"messages": messages, "language": self.language, **columns}


def all_problems(language: str) -> Iterator[Problem]:
    """Every problem of a language, one wording each; no step leaves 0 to 18."""
    number = 0
    for first in range(_LARGEST + 1):
        for second in range(_LARGEST + 1):
            for sign in "+-":
                for third in range(_LARGEST + 1):
                    between = first + second
                    result = between + third if sign == "+" else between - third
                    if not 0 <= result <= 2 * _LARGEST:
                        continue
                    wording = _QUESTIONS[language][number % len(_QUESTIONS[language])]
                    number += 1
                    yield Problem(
                        language,
                        wording.format(f"{first} + {second} {sign} {third}"),
                        (f"{first} + {second} = {between}", f"{between} {sign} {third} = {result}"),
                        result,
                    )


def draw_problems(language: str, *, train: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on and to measure with, none in both.

    Raises:
        ValueError: if an answer of the program is not right for the checker.
    """
    problems = list(all_problems(language))
    random.Random(seed).shuffle(problems)
    for problem in problems:
        if not all(problem.is_answered_by(problem.answer(thinks=thinks)) for thinks in (False, True)):
            raise ValueError(f"{problem} is answered, and the checker does not see it")
    return problems[held_out : held_out + train], problems[:held_out]
