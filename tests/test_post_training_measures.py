# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of post-training measure with, and the chats that a program makes for them."""

import importlib
import random
from pathlib import Path

import pytest

from jai.evaluation.instructions.scoring import instruction_row, judge_instructions
from jai.evaluation.language import language_fault, think_fault


@pytest.fixture
def benchmark(monkeypatch):
    """The module of a name in benchmarks/."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module


def test_scores_of_one_prompt_are_one_draw(benchmark):
    mean_of = benchmark("post_training_measures").mean_of
    scores = [0.0, 1.0] * 50
    alone, of_two_prompts, of_pairs = (
        mean_of(scores, groups) for groups in (None, ["a", "b"] * 50, [number // 2 for number in range(100)])
    )
    assert alone.value == of_two_prompts.value == of_pairs.value == 0.5
    assert (of_two_prompts.low, of_two_prompts.high) == (0, 1)
    assert (of_pairs.low, of_pairs.high) == (0.5, 0.5)  # each prompt has one of both
    assert 0 < alone.low < 0.5 < alone.high < 1
    with pytest.raises(ValueError, match="zip"):
        mean_of(scores, ["a"])


@pytest.mark.parametrize("language", ["th", "en"])
@pytest.mark.parametrize("thinks", [True, False])
def test_a_chat_with_a_form_has_it_after_its_thought(benchmark, language, thinks):
    problems = list(benchmark("arithmetic_chats").all_problems(language))[::70]
    kinds = set()
    for problem in problems:
        made = benchmark("post_training_data").instruction_chat(
            problem.chat(thinks=thinks), language, random.Random(problem.question)
        )
        reply = made["messages"][-1]["content"]
        kinds.update(made["instruction_id_list"])
        assert problem.question in made["messages"][0]["content"]
        assert problem.is_answered_by(reply)
        assert language_fault(reply, language) is None
        assert (think_fault(reply) is None) == thinks
        assert reply.startswith("<think>") == thinks
        asked = {"key": "", "prompt": "", "instruction_id_list": made["instruction_id_list"], "kwargs": made["kwargs"]}
        row = instruction_row(asked, language)
        assert all(judge_instructions(row, reply).strict)
        assert not all(judge_instructions(row, problem.answer(thinks=thinks)).strict)
    assert len(kinds) == 3
