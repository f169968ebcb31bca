# SPDX-License-Identifier: Apache-2.0
"""Rewards, called as TRL calls them."""

import pickle
import sys

import pytest
from datasets import Dataset
from trl.rewards import accuracy_reward

from jai.cli.app import EXTRA_OF
from jai.errors import UserError
from jai.trainers.rewards import (
    REWARD_NAMES,
    check_reward_columns,
    final_answer_reward,
    instruction_reward,
    language_reward,
    reward_functions,
    think_reward,
)

# What TRL's trainer gives beside the columns of the data.
OF_THE_TRAINER = {"trainer_state": None, "log_extra": None, "log_metric": None, "environments": None}
FORMS = {
    "plain": lambda texts: list(texts),
    "conversational": lambda texts: [[{"role": "assistant", "content": text}] for text in texts],
    "in parts": lambda texts: [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts],
    "after a tool": lambda texts: [
        [
            {"role": "assistant", "content": None},
            {"role": "tool", "content": "9"},
            {"role": "assistant", "content": text},
        ]
        for text in texts
    ],
}


@pytest.fixture(params=FORMS)
def called(request):
    """Call a reward with completions in one of TRL's forms, and all that its trainer gives."""

    def call(reward, texts, **columns):
        completions = FORMS[request.param](texts)
        prompts = columns.pop("prompts", None) or ["โจทย์"] * len(texts)
        ids = [[1, 2, 3]] * len(texts)
        return reward(
            prompts=FORMS[request.param](prompts),
            completions=completions,
            completion_ids=ids,
            **columns,
            **OF_THE_TRAINER,
        )

    return call


def test_final_answers(called):
    texts = [r"\boxed{๔๒}", "คำตอบคือ 42 บาท", "42", "<think>\\boxed{42}</think>ไม่รู้", r"\boxed{43}", r"\boxed{1}", ""]
    solution = ["42", "๔๒", "42", "42", r"ดังนั้น \boxed{42}", None, "40 + 2 = 42\n#### 42"]
    assert called(final_answer_reward, texts, solution=solution) == [1, 1, 0, 0, 0, None, 0]
    assert called(final_answer_reward, ["#### 42"] * 2, solution=[r"so $\boxed{42}$ apples, not 7", "x\n#### 42"]) == [
        1,
        1,
    ]


def test_a_repeated_question_is_no_answer(called):
    prompts = ["คำตอบคือ 42 ใช่ไหม"]
    assert called(final_answer_reward, ["คำตอบคือ 42 ใช่ไหม"], prompts=prompts, solution=["42"]) == [0]
    assert called(final_answer_reward, ["คำตอบคือ 42 ใช่ไหม คำตอบคือ 42"], prompts=prompts, solution=["42"]) == [1]


def test_trls_own_reward_refuses_what_ours_takes():
    """The reason for ours: where this fails, TRL has learnt Thai."""
    completions = FORMS["conversational"]([r"\boxed{๔๒}", r"\boxed{42 บาท}", "คำตอบคือ 42"])
    assert accuracy_reward(completions, solution=["$42$"] * 3) == [0, 0, 0]
    assert accuracy_reward(completions[:1], solution=["๔๒"]) == [None]
    assert final_answer_reward(completions, solution=["$42$", "๔๒", "42"]) == [1, 1, 1]


def test_instructions(called):
    names = ["punctuation:no_comma", "keywords:existence"]
    arguments = [{}, {"keywords": ["มา"]}]
    columns = {
        "instruction_id_list": [names, names, names, names, None, [], names],
        "kwargs": [arguments, arguments, arguments, arguments, None, [], arguments],
        "language": ["th", "th", "th", "en", "th", "th", None],
    }
    texts = ["เขามา", "มากมาย", "มาก, ", "มาก", "x", "x", "เขามา"]
    assert called(instruction_reward, texts, **columns) == [1, 0.5, 0, 1, None, None, None]
    # As it stands: the loose reading, which leaves out the first line, would find no comma.
    one = {"instruction_id_list": [names], "kwargs": [arguments], "language": ["th"]}
    assert called(instruction_reward, ["ได้, ครับ\nเขามา"], **one) == [0.5]
    with pytest.raises(UserError, match="there is no instruction 'a:b'"):
        called(instruction_reward, ["x"], instruction_id_list=[["a:b"]], kwargs=[[{}]], language=["th"])


def test_language(called):
    texts = ["สวัสดี", "สวัสดี 你好", "Hello", "Hello", "<think>你好</think>สวัสดี"]
    assert called(language_reward, texts, language=["th", "th", "en", None, "th"]) == [1, 0, 1, None, 1]
    with pytest.raises(UserError, match="'de'"):
        called(language_reward, ["x"], language=["de"])


def test_thinking(called):
    texts = ["<think>ก</think>ข", "ก</think>ข", "<think>ก</think>", "<think></think>ข", "ข"]
    assert called(think_reward, texts) == [1, 1, 0, 0, 0]


def test_completions_without_a_text_have_no_reward():
    parts = [{"type": "image"}, {"type": "text", "text": "<think>ก</think>ข"}]
    completions = [[], [{"role": "assistant", "content": None}], [{"role": "assistant", "content": parts}]]
    assert think_reward(completions) == [0, 0, 1]


def test_data_that_a_reward_cannot_score_is_refused_before_anything_is_generated():
    asked = {"instruction_id_list": [["a:b"]], "kwargs": [[{}]], "language": ["th"]}
    for name, columns, message in (
        ("final_answer", {"solution": [None]}, "needs `solution`, which no row of data has"),
        ("language", {"text": ["x"]}, "needs `language`.* Set `language_column`"),
        ("instructions", asked, "there is no instruction 'a:b'"),
    ):
        with pytest.raises(UserError, match=message):
            check_reward_columns([name], Dataset.from_dict(columns), "data")
    check_reward_columns(["final_answer", "think"], Dataset.from_dict({"solution": [None, "42"]}), "data")


def test_an_empty_batch_has_no_rewards(called):
    assert called(think_reward, []) == []
    assert called(final_answer_reward, [], solution=[]) == []


def test_rewards_by_name():
    functions = reward_functions(REWARD_NAMES)
    assert [name for name in REWARD_NAMES if name in ("final_answer", "repetition")] == ["final_answer", "repetition"]
    assert functions[0] is final_answer_reward
    assert functions[-1]([[1, 2, 3, 4], [5] * 12], prompts=["x"] * 2) == [0, pytest.approx(-0.9)]
    assert pickle.loads(pickle.dumps(functions[:-1])) == functions[:-1]
    assert len({function.__name__ for function in functions[:-1]}) == len(functions) - 1  # TRL logs by name
    with pytest.raises(UserError, match="no reward 'thinking'; expected one of final_answer"):
        reward_functions(["thinking"])


def test_final_answers_are_not_rewarded_where_formulae_cannot_be_compared(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert len(reward_functions([name for name in REWARD_NAMES if name != "final_answer"])) == len(REWARD_NAMES) - 1
    with pytest.raises(ModuleNotFoundError, match="math_verify") as error:
        reward_functions(["final_answer"])
    assert error.value.name in EXTRA_OF


@pytest.mark.slow
def test_a_step_of_grpo_logs_each_reward(tmp_path, tiny_model, tiny_tokenizer):
    from trl import GRPOConfig, GRPOTrainer

    ask = [{"role": "user", "content": "หนึ่งบวกหนึ่ง"}]
    row = {
        "prompt": ask,
        "language": "th",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{"keywords": None}],
    }
    arguments = GRPOConfig(
        str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        tiny_model(vocab_size=len(tiny_tokenizer)),
        reward_functions(REWARD_NAMES),
        arguments,
        train_dataset=Dataset.from_list([row | {"solution": "2"}, row | {"solution": None}]),
        processing_class=tiny_tokenizer,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/final_answer_reward/mean"] == logged["rewards/think_reward/mean"] == 0
    assert 0 <= logged["rewards/instruction_reward/mean"] <= 1
    assert 0 <= logged["rewards/language_reward/mean"] <= 1
