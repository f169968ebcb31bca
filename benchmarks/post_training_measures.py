# SPDX-License-Identifier: Apache-2.0
"""What the chain of post-training measures of a checkpoint, each figure with its interval (percentile bootstrap)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jai.demo.measure import MeasuredModel
from jai.evaluation.answers import STATED_FORMS, is_right_answer
from jai.evaluation.language import language_fault, think_fault
from jai.evaluation.results import Figure, Item, mean_figure
from jai.preferences.reward_model import RewardModel

LONGEST_ANSWER = 96
_ROWS = 16


@dataclass(frozen=True)
class Measured:
    """A mean with the ends of its interval of 95 %."""

    value: float
    low: float
    high: float
    items: int

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def measured(figure: Figure) -> Measured:
    return Measured(figure.value, figure.low, figure.high, figure.items)


def mean_of(scores: Sequence[float], groups: Sequence[Any] | None = None) -> Measured:
    """The mean of scores; those of equal groups, such as of one prompt, are no independent ones."""
    named: Sequence[str | None] = [None] * len(scores) if groups is None else [json.dumps(each) for each in groups]
    items = [
        Item("chain", "rows", str(number), "score", score, group)
        for number, (score, group) in enumerate(zip(scores, named, strict=True))
    ]
    figure = mean_figure(items, suite="chain", name="rows", metric="score")
    assert figure is not None
    return measured(figure)


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def measure_checkpoint(folder: Path, data: Path, reward_model: RewardModel | None, rows: int) -> dict[str, Measured]:
    """Held-out loss by language, preference accuracy, reward, and what is right of answers to held-out problems.

    Args:
        folder: of the checkpoint.
        data: as `write_data` writes it.
        reward_model: that scores the answers to the held-out pairs' prompts; None leaves the reward out.
        rows: how many of each file are looked at.
    """
    model = MeasuredModel(folder)
    found: dict[str, Measured] = {}
    chats = read_rows(data / "heldout_chats.jsonl")
    for language in ("th", "en"):
        some = [chat["messages"] for chat in chats if chat["language"] == language][:rows]
        found[f"loss {language}"] = mean_of([-each for each in answer_log_probs(model, some)])
    pairs = read_rows(data / "heldout_pairs.jsonl")[:rows]
    better, worse = (
        answer_log_probs(model, [pair["prompt"] + pair[side] for pair in pairs]) for side in ("chosen", "rejected")
    )
    prompts = [pair["prompt"] for pair in pairs]
    found["preference"] = mean_of([float(first > second) for first, second in zip(better, worse)], prompts)
    if reward_model is not None:
        asked_once = list({json.dumps(prompt): prompt for prompt in prompts}.values())
        given = answers_of(model, asked_once, "th")
        asked = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(asked_once, given)]
        found["reward"] = mean_of(reward_model.scores(asked, batch_size=_ROWS))
    problems = read_rows(data / "heldout_problems.jsonl")
    right: list[float] = []
    spoken: list[float] = []
    thought: list[float] = []
    for language in ("th", "en"):
        some = [problem for problem in problems if problem["language"] == language][:rows]
        for problem, text in zip(some, answers_of(model, [each["prompt"] for each in some], language)):
            asked_text = problem["prompt"][-1]["content"]
            right.append(is_right_answer(text, problem["solution"], question=asked_text, forms=STATED_FORMS))
            spoken.append(language_fault(text, language) is None)
            thought.append(think_fault(text) is None)
    for name, scores in (("right answers", right), ("language", spoken), ("think", thought)):
        found[name] = mean_of([float(score) for score in scores])
    return found


@torch.inference_mode()
def answer_log_probs(model: MeasuredModel, chats: Sequence[list[dict[str, str]]]) -> list[float]:
    """For each chat the mean log-probability of a token of its last answer, the end of the turn included."""
    encoded = []
    for messages in chats:
        ids, asked = (
            model.tokenizer.apply_chat_template(turns, return_dict=True, add_generation_prompt=prompts)["input_ids"]
            for turns, prompts in ((messages, False), (messages[:-1], True))
        )
        if ids[: len(asked)] != asked:
            raise ValueError("the chat template changes a prompt when its answer is there")
        encoded.append((ids, len(asked)))
    found = []
    for ids, start in encoded:
        logits = model.model(torch.tensor([ids])).logits[0, start - 1 : -1]
        targets = torch.tensor(ids[start:])
        found.append(logits.float().log_softmax(-1).gather(1, targets[:, None]).mean().item())
    return found


def answers_of(
    model: MeasuredModel,
    prompts: Sequence[list[dict[str, str]]],
    language: str,
    longest: int = LONGEST_ANSWER,
    rows: int = _ROWS,
) -> list[str]:
    """Greedy answers to prompts, `rows` at a time, of at most `longest` tokens each."""
    unanswered = {"role": "assistant", "content": ""}
    chats = [{"messages": [*prompt, unanswered], "language": language} for prompt in prompts]
    given: list[str] = []
    for start in range(0, len(chats), rows):
        given += [answer.given for answer in model.answers(chats[start : start + rows], longest)]
    return given
