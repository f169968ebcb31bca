# SPDX-License-Identifier: Apache-2.0
"""What a run of the demo found, in the form that the report reads."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Answer:
    """One question, what the model said to it, and what was expected."""

    language: str
    question: str
    expected: str
    given: str

    @property
    def correct(self) -> bool:
        return self.given.strip() == self.expected.strip()

    @property
    def in_language(self) -> bool:
        """Whether it is in Thai exactly where the expected answer is."""
        return bool(self.given.strip()) and _has_thai(self.given) == _has_thai(self.expected)


def _has_thai(text: str) -> bool:
    return any("\u0e00" <= character <= "\u0e7f" for character in text)


@dataclass
class Command:
    """A command of the run, as one would type it, and the seconds that it took."""

    line: str
    seconds: float


@dataclass
class StageResult:
    """A checkpoint on the way, with bits per character on held-out text; by language, as all that follows.

    Of its answers to questions that are in no training chat: the share that is exactly right, and the share that is in
    the language in which it should be. Both are None for a stage that was not asked.
    """

    name: str
    folder: str
    bits: dict[str, float]
    correct: dict[str, float] | None = None
    in_language: dict[str, float] | None = None


@dataclass
class StartResult:
    """One way to begin the later copies of a block, and its price before any training.

    Attributes:
        name: of the way.
        kl: KL(base ‖ JAI) in nats a token.
        bits: bits per character of held-out text by language.
    """

    name: str
    kl: float
    bits: dict[str, float]


@dataclass
class MetricCurve:
    """One metric over the steps of a stage."""

    stage: str
    metric: str
    steps: list[float]
    values: list[float]


@dataclass
class Fertility:
    """Tokens per character on held-out text, by tokenizer and language, and one sentence cut by both."""

    base: dict[str, float]
    extended: dict[str, float]
    example: str
    base_pieces: list[str]
    extended_pieces: list[str]


@dataclass(frozen=True)
class SuiteScore:
    """A figure of the demo's suite.

    Attributes:
        name: of the figure.
        items: how many questions it is of.
        before, after: share of right answers before chat training and after all of it, with the ends of its interval.
        p_value: of the difference, question by question.
    """

    name: str
    items: int
    before: list[float]
    after: list[float]
    p_value: float


@dataclass
class Results:
    """Everything that the report shows; `results.json` holds it."""

    seed: int
    seconds: float
    versions: dict[str, str]
    base_parameters: int
    jai_parameters: int
    jai_active: int
    config: dict[str, Any]
    stages: list[StageResult]
    starts: list[StartResult]
    curves: list[MetricCurve]
    fertility: Fertility
    router_load: dict[str, list[list[float]]]
    alphas_before: dict[int, float]
    alphas_after: dict[int, float]
    answers_before: list[Answer]
    answers_after: list[Answer]
    suite: list[SuiteScore]
    checks: dict[str, str]
    commands: list[Command] = field(default_factory=list)
    peak_memory_mb: float = 0.0

    def save(self, folder: Path) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        (folder / RESULTS_FILE).write_text(text + "\n", encoding="utf-8")
