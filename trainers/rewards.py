# SPDX-License-Identifier: Apache-2.0
"""Rewards that can be verified, with the signature of TRL's: `f(completions, **columns) -> list[float | None]`.

They are the checks of `jai.evaluation`, so what is trained for is what is measured. The columns are the data set's, and
None skips a row, which another reward may be for. Repetition is TRL's own: it counts n-grams of tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from jai.errors import UserError
from jai.evaluation.answers import require_math_verify, states_right_answer
from jai.evaluation.instructions.scoring import instruction_row, judge_instructions
from jai.evaluation.language import language_fault, think_fault

Completion = str | list[dict[str, Any]]
Rewards = list[float | None]


def final_answer_reward(
    completions: Sequence[Completion],
    solution: Sequence[str | None],
    prompts: Sequence[Completion] | None = None,
    **_: Any,
) -> Rewards:
    r"""1 where the final answer is right, else 0. It must be stated: a last number may stand for anything.

    Args:
        completions: text, or messages.
        solution: the right answer, or a text that states it by `\boxed{}` or `####`, as MATH and GSM8K have it.
        prompts: what was asked; a completion that repeats it does not answer with it.
    """
    asked = [""] * len(completions) if prompts is None else [_text(prompt) for prompt in prompts]
    rewards: Rewards = []
    for text, each, question in zip(completions, solution, asked, strict=True):
        if each is None:
            rewards.append(None)
        else:
            rewards.append(float(states_right_answer(_text(text), each, question=question)))
    return rewards


def instruction_reward(
    completions: Sequence[Completion],
    instruction_id_list: Sequence[list[str] | None],
    kwargs: Sequence[list[dict[str, Any]] | None],
    language: Sequence[str | None],
    **_: Any,
) -> Rewards:
    """The share of a row's instructions that a completion follows, as it stands.

    Args:
        completions: text, or messages.
        instruction_id_list, kwargs: as in google/IFEval.
        language: "en" or "th", which says how words and sentences are counted.

    Raises:
        UserError: if there is no such instruction, or its arguments are wrong.
    """
    rewards: Rewards = []
    for number, (text, names, arguments, each) in enumerate(
        zip(completions, instruction_id_list, kwargs, language, strict=True)
    ):
        if not names or each is None:
            rewards.append(None)
            continue
        row = {"key": number, "prompt": "", "instruction_id_list": names, "kwargs": arguments}
        followed = judge_instructions(instruction_row(row, each), _text(text)).strict
        rewards.append(sum(followed) / len(followed))
    return rewards


def language_reward(completions: Sequence[Completion], language: Sequence[str | None], **_: Any) -> Rewards:
    """1 where the answer is in its language, else 0; see `jai.evaluation.language`.

    Args:
        completions: text, or messages.
        language: "th" or "en".

    Raises:
        UserError: for another language.
    """
    return [
        None if each is None else float(language_fault(_text(text), each) is None)
        for text, each in zip(completions, language, strict=True)
    ]


def think_reward(completions: Sequence[Completion], **_: Any) -> Rewards:
    """1 where there is one thought, closed and not blank, and an answer follows, else 0.

    Unlike TRL's `think_format_reward` it wants an answer, and no opening tag where the chat template has it.
    """
    return [float(think_fault(_text(text)) is None) for text in completions]


_OWN: Mapping[str, Callable[..., Rewards]] = {
    "final_answer": final_answer_reward,
    "instructions": instruction_reward,
    "language": language_reward,
    "think": think_reward,
}
REWARD_NAMES = (*_OWN, "repetition")
# What a row needs besides its prompt.
_COLUMNS = {
    "final_answer": ("solution",),
    "instructions": ("instruction_id_list", "kwargs", "language"),
    "language": ("language",),
}
_ADVICE = {"language": " Set `language_column`, or give each of `datasets` a `language`."}


def reward_functions(names: Sequence[str]) -> list[Callable[..., Rewards]]:
    """Rewards by their names.

    Raises:
        UserError: for a name that there is not.
        ModuleNotFoundError: for `final_answer` without math-verify, which would give right formulae no reward.
    """
    if "final_answer" in names:
        require_math_verify()
    return [_reward_function(name) for name in names]


def check_reward_columns(names: Sequence[str], rows: Dataset, source: str) -> None:
    """Refuse data that a reward could not score, before anything is generated.

    Args:
        names: of the rewards.
        rows: the prompts, with the columns of `jai.trainers.rows`.
        source: what they are called in messages.

    Raises:
        UserError: for a column that no row has, and for instructions or languages that the checks do not know.
    """
    for name in names:
        needed = _COLUMNS.get(name, ())
        columns = {column: rows[column][:] if column in rows.column_names else [] for column in needed}
        for column, values in columns.items():
            if all(value is None for value in values):
                raise UserError(
                    f"The reward {name} needs `{column}`, which no row of {source} has.{_ADVICE.get(column, '')}"
                )
        if needed:
            _reward_function(name)(completions=[""] * len(rows), **columns)  # its own checks of the rows


def _reward_function(name: str) -> Callable[..., Rewards]:
    if name in _OWN:
        return _OWN[name]
    if name == "repetition":
        from trl.rewards import get_repetition_penalty_reward

        return get_repetition_penalty_reward()
    raise UserError(f"There is no reward {name!r}; expected one of {', '.join(REWARD_NAMES)}.")


def _text(completion: Completion) -> str:
    """A text, or the content of the last message."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""
