# SPDX-License-Identifier: Apache-2.0
"""Rows of instructions, read from the data's two forms, and what replies score on them.

A row of google/IFEval has `key`, `prompt`, `instruction_id_list` and `kwargs`; one of SEA-IFEval, which has one
instruction a prompt, has `id`, `prompts`, `metadata.subcategory` and `kwargs`.
"""

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from jai.errors import UserError
from jai.evaluation.instructions.checks import INSTRUCTION_SETS, Check, InstructionSet
from jai.evaluation.instructions.counting import check_language_code
from jai.evaluation.text import split_thought

if TYPE_CHECKING:
    from datasets import Dataset

_SEA_SENTENCE_DIVIDER = "***"  # which each of its prompts on the number of sentences asks for


@dataclass(frozen=True)
class Instruction:
    """An instruction that can be checked.

    Attributes:
        type: such as "length_constraints:number_words".
        arguments: of its check.
        instruction_set: the types it is one of.
    """

    type: str
    arguments: Mapping[str, Any]
    instruction_set: InstructionSet

    def is_followed_by(self, text: str) -> bool:
        """Whether a text follows it, as it stands; a blank one follows none."""
        text = self.instruction_set.normalize(text)
        return bool(text.strip()) and self.instruction_set.checks[self.type](text, **self.arguments)


@dataclass(frozen=True)
class InstructionRow:
    """A prompt and the instructions in it.

    Attributes:
        key: its number or name in the data.
        prompt: what the model is asked.
        instructions: at least one.
    """

    key: str
    prompt: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class InstructionVerdict:
    """Which instructions of a row a reply follows.

    Attributes:
        strict: for each, whether the reply follows it as it stands.
        loose: for each, whether it does without its first line, its last, both, or asterisks.
    """

    strict: tuple[bool, ...]
    loose: tuple[bool, ...]


@dataclass(frozen=True)
class InstructionFigures:
    """The four figures of IFEval (arXiv:2311.07911, section 3), from 0 to 1.

    Attributes:
        prompt_strict, prompt_loose: share of prompts of which every instruction is followed.
        instruction_strict, instruction_loose: share of instructions that are followed.
    """

    prompt_strict: float
    instruction_strict: float
    prompt_loose: float
    instruction_loose: float

    @property
    def strict_mean(self) -> float:
        """The mean of the two strict figures, which Trillion-7B reports (its appendix C)."""
        return (self.prompt_strict + self.instruction_strict) / 2


def judge_instructions(row: InstructionRow, reply: str) -> InstructionVerdict:
    """Check a reply against the instructions of its row. What it thought (`<think>`) is no part of it."""
    reply = split_thought(reply).answer
    loose = _loose_forms(reply)
    return InstructionVerdict(
        tuple(each.is_followed_by(reply) for each in row.instructions),
        tuple(any(each.is_followed_by(form) for form in loose) for each in row.instructions),
    )


def _loose_forms(reply: str) -> list[str]:
    lines = reply.split("\n")
    forms = [reply, *("\n".join(lines[part]).strip() for part in (slice(1, None), slice(-1), slice(1, -1)))]
    return list(dict.fromkeys([*forms, *(form.replace("*", "") for form in forms)]))


def instruction_figures(verdicts: Sequence[InstructionVerdict]) -> InstructionFigures:
    """The figures of at least one reply."""
    strict, loose = [each.strict for each in verdicts], [each.loose for each in verdicts]
    return InstructionFigures(
        _prompt_level(strict), _instruction_level(strict), _prompt_level(loose), _instruction_level(loose)
    )


def _prompt_level(followed: Sequence[tuple[bool, ...]]) -> float:
    return sum(map(all, followed)) / len(followed)


def _instruction_level(followed: Sequence[tuple[bool, ...]]) -> float:
    return sum(map(sum, followed)) / sum(map(len, followed))


# --- Rows ---


def instruction_row(row: Mapping[str, Any], language: str) -> InstructionRow:
    """A row of data in either of its forms, checked.

    Args:
        row: as it is in the file; arguments that are null are absent.
        language: "en" or "th".

    Raises:
        UserError: naming the row, and what is wrong with it.
    """
    if language not in INSTRUCTION_SETS:
        raise UserError(f"The language is {language!r}; expected one of {', '.join(INSTRUCTION_SETS)}.")
    key = row.get("key", row.get("id"))
    try:
        prompt, names, arguments = _google_form(row) if "instruction_id_list" in row else _sea_form(row)
        instructions = [_instruction(INSTRUCTION_SETS[language], *each) for each in zip(names, arguments, strict=True)]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"The row {key!r} is not a row of IFEval ({type(error).__name__}: {error}). It needs key, prompt, "
            "instruction_id_list and kwargs."
        ) from None
    except ValueError as error:
        raise UserError(f"The row {key!r}: {error}") from None
    if not instructions:
        raise UserError(f"The row {key!r} has no instruction.")
    return InstructionRow(str(key), prompt, tuple(instructions))


def _google_form(row: Mapping[str, Any]) -> tuple[str, list[str], list[Mapping[str, Any]]]:
    names, arguments = row["instruction_id_list"], row["kwargs"]
    if len(names) != len(arguments):
        raise ValueError(f"it has {len(names)} instructions and {len(arguments)} kwargs; expected as many.")
    return row["prompt"], names, arguments


def _sea_form(row: Mapping[str, Any]) -> tuple[str, list[str], list[Mapping[str, Any]]]:
    type_ = row["metadata"]["subcategory"]
    (arguments,) = row["kwargs"]
    if type_ == "length_constraints:number_sentences":
        arguments = {**arguments, "divider": _SEA_SENTENCE_DIVIDER}
    return row["prompts"][0]["text"], [type_], [arguments]


def _instruction(instruction_set: InstructionSet, type_: str, given: Mapping[str, Any]) -> Instruction:
    check = instruction_set.checks.get(type_)
    if check is None:
        why = " Thai has no letter case." if type_.startswith("change_case:") else ""
        raise ValueError(f"there is no instruction {type_!r} in {instruction_set.language!r}. Leave the row out.{why}")
    given = {instruction_set.renamed.get(name, name): value for name, value in given.items() if value is not None}
    kinds = _arguments_of(check)
    for name in sorted(given.keys() - kinds.keys()):
        raise ValueError(f"{type_} takes no {name!r}; expected {', '.join(kinds) or 'no argument'}.")
    arguments = {}
    for name, (kind, is_required) in kinds.items():
        if name in given:
            arguments[name] = _argument(type_, name, kind, given[name], instruction_set)
        elif is_required:
            raise ValueError(f"{type_} needs {name!r}.")
    if "language" in arguments:
        check_language_code(arguments["language"])
    if len(arguments.get("letter", "x").strip()) != 1:
        raise ValueError(f"letter of {type_} is {arguments['letter']!r}; expected one character.")
    return Instruction(type_, arguments, instruction_set)


@cache
def _arguments_of(check: Check) -> dict[str, tuple[Any, bool]]:
    """Kind of each argument, without None, and whether it must be given."""
    hints = {name: hint for name, hint in get_type_hints(check).items() if name not in ("text", "return")}
    defaults = check.__kwdefaults__ or {}
    return {name: (_without_null(hint), name not in defaults) for name, hint in hints.items()}


def _without_null(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    return hint


def _argument(type_: str, name: str, kind: Any, value: Any, instruction_set: InstructionSet) -> Any:
    if kind is int:
        if isinstance(value, float) and value.is_integer():  # as tables with empty cells have whole numbers
            value = int(value)
        if type(value) is int and value >= 0:
            return value
        expected = "a whole number from 0"
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        expected = f"one of {', '.join(get_args(kind))}"
    elif kind is str:
        if isinstance(value, str) and value.strip():
            return instruction_set.normalize(value)
        expected = "text"
    else:
        if isinstance(value, list) and value and all(isinstance(each, str) and each.strip() for each in value):
            return [instruction_set.normalize(each) for each in value]
        expected = "a list of words"
    raise ValueError(f"{name} of {type_} is {value!r}; expected {expected}.")


# --- As lm-eval's tasks take them (evaluation/tasks/ifeval) ---


def english_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, bool | list[bool]]:
    """The scores of a reply by lm-eval's names of the four figures."""
    return _scores(doc, results[0], "en")


def thai_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, bool | list[bool]]:
    """The scores of a reply by lm-eval's names of the four figures."""
    return _scores(doc, results[0], "th")


def _scores(doc: Mapping[str, Any], reply: str, language: str) -> dict[str, bool | list[bool]]:
    verdict = judge_instructions(instruction_row(doc, language), reply)
    return {
        "prompt_level_strict_acc": all(verdict.strict),
        "inst_level_strict_acc": list(verdict.strict),
        "prompt_level_loose_acc": all(verdict.loose),
        "inst_level_loose_acc": list(verdict.loose),
    }


def mean_of_lists(lists: Sequence[Sequence[bool]]) -> float:
    """The mean over all entries."""
    return _instruction_level([tuple(each) for each in lists])


def with_thai_types(dataset: "Dataset") -> "Dataset":
    """The rows in google/IFEval's form of which every instruction has a meaning in Thai."""
    known = INSTRUCTION_SETS["th"].checks.keys()
    return dataset.filter(lambda row: all(name in known for name in row["instruction_id_list"]))
