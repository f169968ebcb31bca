# SPDX-License-Identifier: Apache-2.0
"""`jai pairs`: models and judges on this machine, a tiny checkpoint and a tiny reward model."""

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from json_lines import write_rows
from rich.console import Console

import jai.recipes
from chat_endpoint import Answer, ChatEndpoint
from jai import JaiForSequenceClassification
from jai.errors import UserError
from jai.evaluation.endpoint import Endpoint
from jai.evaluation.judged.prompts import LATER_TURN_GRADE, SINGLE_GRADE
from jai.options import read_options_file
from jai.preferences.calibration import Calibration
from jai.preferences.candidates import Candidate
from jai.preferences.command import make_pairs
from jai.preferences.options import PairsOptions
from jai.preferences.pairing import (
    CLOSE,
    LENGTHS,
    NO_RIGHT,
    NO_WRONG,
    TIE,
    TOO_FEW,
    PairingRule,
    length_bias,
    make_preference_pairs,
    pair_best_and_worst,
)
from jai.preferences.prompts import PreferencePrompt, number_prompts, preference_prompt
from jai.preferences.reward_model import RewardModel

ANSWER = re.compile(r"\[Begin: answer of the assistant\]\n(.*?)\n\[End: ", re.DOTALL)
SERVER = {"backend": "openai", "base_url": "http://h/v1"}
PROMPT = PreferencePrompt("1", ({"role": "user", "content": "q"},), None)


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(text, "on-policy") for text in texts]


# --- Pairing ---


def test_best_and_worst_are_paired():
    pair = pair_best_and_worst(PROMPT, candidates("aaaa", "bbbb", "cccc", "dddd"), [3, 9, None, 1], PairingRule())
    assert (pair.chosen.text, pair.rejected.text) == ("bbbb", "dddd")
    assert (pair.chosen_score, pair.rejected_score) == (9, 1)


def test_of_equals_those_of_like_lengths_are_paired():
    texts = candidates("a" * 40, "b" * 9, "c" * 10, "d" * 100)
    pair = pair_best_and_worst(PROMPT, texts, [1, 1, 0, 0], PairingRule())
    assert (pair.chosen.text, pair.rejected.text) == ("b" * 9, "c" * 10)


@pytest.mark.parametrize(
    ("scores", "rule", "reason"),
    [
        ([5, None], PairingRule(), TOO_FEW),
        ([5, 5], PairingRule(), TIE),
        ([5, 5.5], PairingRule(margin=1), CLOSE),
        ([0.5, 0], PairingRule(right_and_wrong=True), NO_RIGHT),
        ([1, 1], PairingRule(right_and_wrong=True), NO_WRONG),
    ],
)
def test_prompts_without_a_pair(scores, rule, reason):
    assert pair_best_and_worst(PROMPT, candidates("a", "b"), scores, rule) == reason


def test_a_margin_that_is_just_met_makes_a_pair():
    assert pair_best_and_worst(PROMPT, candidates("a", "b"), [6, 5], PairingRule(margin=1)).chosen.text == "a"
    assert pair_best_and_worst(PROMPT, candidates("a", "b"), [0.5, 1], PairingRule(0, True)).chosen.text == "b"


def test_length_bias_before_and_after():
    """Chosen to rejected: 4:1, 1:1, 1:2 and 3:2 in characters; what thoughts are long is not looked at."""
    dropped: Counter[str] = Counter()
    texts = [("a" * 4, "b"), ("a", "b"), ("<think>" + "x" * 90 + "</think>a", "bb"), ("aaa", "bb")]
    pairs, before, after = make_preference_pairs(
        [PROMPT] * 4, [candidates(*both) for both in texts], [[1, 0]] * 4, PairingRule(max_length_ratio=2), dropped
    )
    assert (before.pairs, before.longer) == (4, (1 + 0.5 + 0 + 1) / 4)
    assert before.ratio == pytest.approx((4 * 1 * 0.5 * 1.5) ** 0.25)
    assert (after.pairs, after.longer) == (3, 0.5)
    assert after.ratio == pytest.approx((0.5 * 1.5) ** (1 / 3))
    assert dropped == {LENGTHS: 1}
    assert len(pairs) == 3
    assert length_bias([]) is None


@pytest.mark.parametrize("scores", [[1, 0], [0, 1]])
def test_the_longer_answer_is_too_long_whichever_it_is(scores):
    some, rule = [candidates("aaaa", "b")], PairingRule(max_length_ratio=2)
    assert make_preference_pairs([PROMPT], some, [scores], rule, Counter())[0] == []


# --- Prompts ---


def test_prompts_in_their_forms():
    user = {"role": "user", "content": "q"}
    assert preference_prompt({"prompt": "q", "category": "chat"}).messages == (user,)
    assert preference_prompt({"question": "q", "key": 5}).id == "5"
    assert preference_prompt({"prompts": [{"text": "q"}]}).messages == (user,)
    answered = [user, {"role": "assistant", "content": "a"}]
    assert preference_prompt({"messages": answered}).messages == (user,)
    assert preference_prompt({"messages": [*answered, user]}).messages == (*answered, user)
    system, other = {"role": "system", "content": "s"}, {"role": "system", "content": "t"}
    for column in ("system", "system_prompt"):
        assert preference_prompt({"prompt": "q", column: "s"}).messages == (system, user)
        assert preference_prompt({"prompt": [other, user], column: "s"}).messages == (other, user)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"prompt": " "},
        {"prompt": 5},
        {"prompt": "\ud800"},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "human", "content": "a"}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": ["a"]},
    ],
)
def test_malformed_prompts(row):
    with pytest.raises(ValueError, match=r"no `prompt`, `messages`, `question` or `problem`|no message of a user"):
        preference_prompt(row)


def test_prompts_have_an_id_each():
    bare = PreferencePrompt("", PROMPT.messages, None)
    assert [each.id for each in number_prompts([bare, bare], "file")] == ["1", "2"]
    with pytest.raises(UserError, match="file has the id 1 twice"):
        number_prompts([PROMPT, PROMPT], "file")
    with pytest.raises(UserError, match="file has no prompts"):
        number_prompts([], "file")


# --- Pairs from servers ---


@pytest.fixture
def prompts(tmp_path) -> Path:
    rows = [{"id": f"p{number}", "prompt": f"คำถาม {number}", "category": "chat"} for number in range(4)]
    return write_rows(tmp_path / "prompts.jsonl", rows)


def numbered(request: dict, before: int) -> str:
    """A model whose answers to one prompt are numbered from 0."""
    return f"{request['messages'][-1]['content']}, ตอบ {before}"


def grade_by_number(request: dict, before: int) -> str:
    answer = ANSWER.search(request["messages"][1]["content"]) if len(request["messages"]) == 2 else None
    return f"Well. [[{int(answer[1][-1]) * 2 + 1}]]" if answer else "yes"


def run(prompts: Path, out: Path, model: ChatEndpoint | None = None, judge: ChatEndpoint | None = None, **options):
    """Run `jai pairs`; gives what it prints, the rows and the record."""
    values = {"model": "m", "judge_attempts": 1, **options}
    if model is not None:
        values |= {"backend": "openai", "base_url": model.url}
    if judge is not None:
        values |= {"judge_url": judge.url, "judge_model": "judge"}
    output = io.StringIO()
    path = make_pairs(PairsOptions(prompts=prompts, out=out, **values), console=Console(file=output, width=300))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return output.getvalue(), rows, json.loads((out / "pairs.json").read_text())


def test_five_answers_are_graded_and_best_and_worst_paired(prompts, tmp_path):
    with ChatEndpoint(numbered) as model, ChatEndpoint(grade_by_number, model="judge-2024-11-20") as judge:
        printed, rows, record = run(prompts, tmp_path / "pairs", model, judge, judge_price=[1, 2])
        assert len(model.asked) == 20
        assert len(judge.asked) == 21  # and one word first
        asked_with = {(each["temperature"], each["top_p"], each["max_tokens"]) for each in model.asked}
        assert asked_with == {(0.8, 0.95, 1024)}
    with ChatEndpoint(numbered) as model, ChatEndpoint(grade_by_number) as judge:  # on other ports
        _, rows_again, record_again = run(prompts, tmp_path / "pairs", model, judge, judge_price=[1, 2])
        assert model.asked == judge.asked == []
        assert record_again == {**record, "base_url": model.url}
    assert rows_again == rows
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "คำถาม 0"}],
        "chosen": [{"role": "assistant", "content": "คำถาม 0, ตอบ 4"}],
        "rejected": [{"role": "assistant", "content": "คำถาม 0, ตอบ 0"}],
        "id": "p0",
        "category": "chat",
        "judge": "judge",
        "score_chosen": 9.0,
        "score_rejected": 1.0,
        "chosen_from": "on-policy",
        "rejected_from": "on-policy",
    }
    assert len(rows) == record["pairs"] == 4
    assert record["judge_calls_itself"] == ["judge-2024-11-20"]
    assert record["judge_prompt_hash"]
    assert (record["min_margin"], record["max_length_ratio"], record["prompts"]) == (1.0, 2.0, 4)
    assert record["length_bias_after"] == {"pairs": 4, "longer": 0.5, "ratio": 1.0}
    assert "4 pairs of 4 prompts and 20 answers." in printed
    assert "the chosen answer is the longer one in 50 % of 4 pairs" in printed
    assert re.search(r"Judging \(judge\): 20 requests, 0 answered already; .* at most 0\.\d", printed)


def test_a_later_answer_is_graded_in_the_light_of_what_came_before(tmp_path):
    earlier = [{"role": role, "content": text} for role, text in (("user", "หนึ่ง"), ("assistant", "สอง"))]
    rows = [{"prompt": "คำถาม 0"}, {"messages": [*earlier, {"role": "user", "content": "คำถาม 1"}]}]
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    with ChatEndpoint(numbered) as model, ChatEndpoint(grade_by_number) as judge:
        run(file, tmp_path / "pairs", model, judge)
        told = {
            request["messages"][0]["content"]: request["messages"][1]["content"]
            for request in judge.asked
            if len(request["messages"]) == 2
        }
    first, later = (prompt.messages([])[0]["content"] for prompt in (SINGLE_GRADE, LATER_TURN_GRADE))
    assert told.keys() == {first, later}
    assert "สอง" in told[later]
    assert "สอง" not in told[first]


def test_other_thresholds_pair_anew_for_nothing(prompts, tmp_path):
    with ChatEndpoint(numbered) as model, ChatEndpoint(grade_by_number) as judge:
        run(prompts, tmp_path / "pairs", model, judge)
        asked = len(model.asked) + len(judge.asked)
        with pytest.raises(UserError, match=r"No prompt has a pair; .*pairs\.json says why"):
            run(prompts, tmp_path / "pairs", model, judge, min_margin=9)
        assert json.loads((tmp_path / "pairs" / "pairs.json").read_text())["dropped"] == {CLOSE: 4}
        _, rows, _ = run(prompts, tmp_path / "pairs", model, judge, min_margin=8)
        assert len(rows) == 4
        with pytest.raises(UserError, match="begun with other inputs or options: candidates_each was 5 and is 3"):
            run(prompts, tmp_path / "pairs", model, judge, candidates=3)
        assert len(model.asked) + len(judge.asked) == asked


def test_only_the_first_prompts_are_asked(prompts, tmp_path):
    with ChatEndpoint(numbered) as model, ChatEndpoint(grade_by_number) as judge:
        _, rows, record = run(prompts, tmp_path / "pairs", model, judge, limit=2)
        assert ([row["id"] for row in rows], record["prompts"], len(model.asked)) == (["p0", "p1"], 2, 10)


def test_a_folder_of_other_answers_is_not_gone_on_with(prompts, tmp_path):
    changes = {
        "top_p": (0.5, "top_p was 0.95 and is 0.5"),
        "temperature": (0.5, "temperature was 0.8 and is 0.5"),
        "max_new_tokens": (9, "max_new_tokens was 1024 and is 9"),
        "limit": (2, "limit was 1 and is 2"),
    }
    with ChatEndpoint(numbered) as model, ChatEndpoint(grade_by_number) as judge:
        run(prompts, tmp_path / "pairs", model, judge, limit=1)
        for name, (value, said) in changes.items():
            with pytest.raises(UserError, match=f"begun with other inputs or options: {re.escape(said)}"):
                run(prompts, tmp_path / "pairs", model, judge, **{"limit": 1, name: value})


def test_what_is_dropped_is_counted(prompts, tmp_path):
    def model(request: dict, before: int) -> Answer | str:
        number = request["messages"][-1]["content"][-1]
        if number == "0":
            return "same 1"
        if number == "1":
            return "" if before else "ตอบ 3"
        if number == "2":
            content = {"model": "m", "choices": [{"finish_reason": "length", "message": {"content": f"ตอบ {before}"}}]}
            return Answer(body=json.dumps(content).encode())
        return "ตอบ 0" if before else f"ตอบ{'ย' * 40} 4"

    with ChatEndpoint(model) as server, ChatEndpoint(grade_by_number) as judge:
        with pytest.raises(UserError, match="No prompt has a pair"):
            run(prompts, tmp_path / "pairs", server, judge, candidates=2)
        record = json.loads((tmp_path / "pairs" / "pairs.json").read_text())
        assert record["dropped"] == {
            "answers that came before": 1,
            "answers cut off at --max-new-tokens": 2,
            "blank answers": 1,
            "fewer than two answers with a score": 3,
            LENGTHS: 1,
        }
        printed, rows, _ = run(prompts, tmp_path / "pairs", server, judge, candidates=2, max_length_ratio=20.0)
    assert [row["id"] for row in rows] == ["p3"]
    assert "dropped: 3 (fewer than two answers with a score)" in printed


def test_a_judge_that_talks_in_prose(prompts, tmp_path):
    with (
        ChatEndpoint(numbered) as model,
        ChatEndpoint(lambda *_: "Very good!") as judge,
        pytest.raises(UserError, match="No prompt has a pair"),
    ):
        run(prompts, tmp_path / "pairs", model, judge)
    dropped = json.loads((tmp_path / "pairs" / "pairs.json").read_text())["dropped"]
    assert dropped == {"judgements that cannot be read": 20, TOO_FEW: 4}


def test_an_answer_that_is_judged_again_has_the_mean_of_its_grades(prompts, tmp_path):
    def grades(request: dict, before: int) -> str:
        answer = ANSWER.search(request["messages"][1]["content"]) if len(request["messages"]) == 2 else None
        return f"[[{((1, 2) if answer[1][-1] == '0' else (9, 4))[before]}]]" if answer else "yes"

    with ChatEndpoint(numbered) as model, ChatEndpoint(grades) as judge:
        _, rows, _ = run(prompts, tmp_path / "pairs", model, judge, candidates=2, repeats=2)
    assert {(row["score_chosen"], row["score_rejected"]) for row in rows} == {(6.5, 1.5)}


def test_a_judge_that_fails_keeps_what_came(prompts, tmp_path):
    with ChatEndpoint(numbered) as model:
        with ChatEndpoint(
            lambda request, before: Answer(status=500) if len(judge.asked) == 8 else grade_by_number(request, 0)
        ) as judge:
            with pytest.raises(UserError, match=r"A request to judge .* HTTP 500: .*6 of the 20 replies came"):
                run(prompts, tmp_path / "pairs", model, judge, judge_concurrency=1)
            assert not (tmp_path / "pairs" / "pairs.jsonl").exists()
            _, rows, _ = run(prompts, tmp_path / "pairs", model, judge, judge_concurrency=1)
        assert len(judge.asked) == 22
    assert len(model.asked) == 20
    assert len(rows) == 4


FAULTS = {
    "429": (Answer(status=429, headers={"Retry-After": "0"}, body=b'{"error": "slow down"}'), "HTTP 429"),
    "500": (Answer(status=500, body=b"oops"), "HTTP 500"),
    "hanging": (Answer("late", delay=0.5), "timeout"),
    "nothing": (Answer(body=b""), "empty body"),
    "hung up": (Answer(hang_up=True), "connection"),
    "half a JSON": (Answer(body=b'{"choices": [{"message": {"content": "8'), "no JSON"),
}


@pytest.mark.parametrize("by", ["judge", "facts"])
def test_options_reach_the_judge(prompts, tmp_path, monkeypatch, by):
    """One of eight judgements fails whenever it is asked for, which is tolerated, and not one more."""
    monkeypatch.setenv("JUDGE_KEY", "sk-right")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    rows = [{"prompt": f"ข้อ {number}", "facts": "จริง"} for number in range(2)]
    options = {
        "by": by,
        "candidates": 4,
        "judge_key": "JUDGE_KEY",
        "judge_parameters": ["temperature=1"],
        "judge_attempts": 2,
        "judge_concurrency": 1,
        "judge_max_failed": 1,
    }

    failing = {"ข้อ 1, ตอบ 3"}

    def judges(request: dict, before: int) -> Answer | str:
        if len(request["messages"]) < 2:
            return "yes"
        answer = ANSWER.search(request["messages"][1]["content"])[1]
        if answer in failing:
            return Answer(status=500)
        return f"[[{int(answer[-1]) * 2 + 1}]]" if by == "judge" else f"[[{str(answer.endswith('2')).lower()}]]"

    file = write_rows(tmp_path / "qa.jsonl", rows)
    with ChatEndpoint(numbered) as model, ChatEndpoint(judges, key="sk-right") as judge:
        failing.add("ข้อ 0, ตอบ 3")
        with pytest.raises(UserError, match="HTTP 500"):
            run(file, tmp_path / "pairs", model, judge, **options)
        failing.remove("ข้อ 0, ตอบ 3")
        _, rows, record = run(file, tmp_path / "pairs", model, judge, **options)
        with pytest.raises(UserError, match="WRONG_KEY"):
            run(file, tmp_path / "other", model, judge, **options | {"judge_key": "WRONG_KEY"})
    assert record["dropped"] == {"judgements that failed": 1}
    assert len(rows) == 2
    assert {request["temperature"] for request in judge.asked} == {1}
    assert judge.most_at_once == 1


@pytest.mark.parametrize("who", ["model", "judge"])
@pytest.mark.parametrize(
    "fault", [name if name == "half a JSON" else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_a_server_that_fails_loses_nothing(prompts, tmp_path, fault, who, monkeypatch):
    """What never answers is one error, and what came is kept; what stumbles once is asked again and counted."""
    broken, word = FAULTS[fault]
    quick = {"timeout": 0.3, "first_pause": 0.01, "attempts": 2}
    build = Endpoint.__init__
    monkeypatch.setattr(Endpoint, "__init__", lambda self, **options: build(self, **{**options, **quick}))
    answered: Counter[str] = Counter()
    stumbles = False

    def behaving(name: str) -> Callable[[dict, int], Answer | str]:
        def behave(request: dict, before: int) -> Answer | str:
            asked = len(servers[name].asked)
            if name == who and (asked == 1 if stumbles else asked > 3):
                return broken
            if name == "judge":
                return grade_by_number(request, before)
            answered[question := request["messages"][-1]["content"]] += 1
            return f"{question}, ตอบ {answered[question]}"

        return behave

    servers = {name: ChatEndpoint(behaving(name)) for name in ("model", "judge")}
    options = {"candidates": 2, "judge_concurrency": 1, "batch_size": 1}
    with servers["model"], servers["judge"]:
        with pytest.raises(UserError, match=r"failed; the last one after 2 tries: ") as error:
            run(prompts, tmp_path / "pairs", **servers, **options)
        came = 3 if who == "model" else 2  # the judge's first request is whether it is there
        assert f"{came} of the 8 replies came and are kept" in str(error.value)
        assert not (tmp_path / "pairs" / "pairs.jsonl").exists()
        servers[who].asked.clear()
        stumbles = True
        printed, rows, _ = run(prompts, tmp_path / "pairs", **servers, **options)
        assert len(servers[who].asked) == 8 - came + 1
        assert f"{word} 1×" in printed
    assert len(rows) == 4


def test_off_policy_answers_compete(prompts, tmp_path):
    others = write_rows(
        tmp_path / "others.jsonl",
        [{"id": "p0", "answers": ["คนอื่นตอบดี 9"]}, {"prompt": "คำถาม 1", "answers": ["คนอื่นตอบดี 9", "คำถาม 1, ตอบ 0"]}],
    )
    judge_by_last = lambda request, before: grade_by_number(request, before).replace("[[19]]", "[[10]]")  # noqa: E731
    with ChatEndpoint(numbered) as model, ChatEndpoint(judge_by_last) as judge:
        printed, rows, record = run(prompts, tmp_path / "pairs", model, judge, off_policy=others)
        assert [(row["chosen_from"], row["rejected_from"]) for row in rows] == [
            ("off-policy", "on-policy"),
            ("off-policy", "on-policy"),
            ("on-policy", "on-policy"),
            ("on-policy", "on-policy"),
        ]
        assert record["off_policy_candidates"] == 2
        assert record["dropped"] == {"answers that came before": 1}
        assert "off-policy over on-policy: 2" in printed
        write_rows(others, [{"id": "nobody", "answers": ["x"]}])
        with pytest.raises(UserError, match="None of the off-policy answers is to one of the prompts"):
            run(prompts, tmp_path / "other", model, judge, off_policy=others)


def test_hallucinations_are_rejected(tmp_path):
    """Section 7.2.3: answers to questions with facts; what the judge finds wrong is the rejected one."""
    rows = [{"id": n, "question": f"คำถาม {n}", "context": f"ข้อเท็จจริง {n}", "answer": f"คำตอบ {n}"} for n in range(3)]

    def finds(request: dict, before: int) -> str:
        answer = ANSWER.search(str(request["messages"][-1]["content"]))
        wrong = {"0": "0", "1": "01234", "2": ""}[answer[1].partition(",")[0][-1]] if answer else ""
        return f"[[{str(answer is None or answer[1][-1] not in wrong).lower()}]]"

    with ChatEndpoint(numbered) as model, ChatEndpoint(finds) as judge:
        _, pairs, record = run(write_rows(tmp_path / "qa.jsonl", rows), tmp_path / "pairs", model, judge, by="facts")
        assert all("ข้อเท็จจริง" not in str(request) for request in model.asked)
        assert any("ข้อเท็จจริง 1" in str(request) for request in judge.asked)
        with pytest.raises(UserError, match="Prompt 9 cannot be judged by facts"):
            run(
                write_rows(tmp_path / "bare.jsonl", [{"id": 9, "prompt": "x"}]),
                tmp_path / "x",
                model,
                judge,
                by="facts",
            )
    assert [pair["rejected"][0]["content"] for pair in pairs] == ["คำถาม 0, ตอบ 0"]
    assert record["dropped"] == {NO_RIGHT: 1, NO_WRONG: 1}


def test_what_fails_a_check_is_rejected(tmp_path):
    """Section 7.2.2, without a judge."""
    instruction = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    file = write_rows(tmp_path / "if.jsonl", [{"key": 1, "prompt": "No commas", **instruction}])
    with ChatEndpoint(lambda request, before: "one, two" if before == 1 else f"one and {before}") as model:
        _, pairs, record = run(file, tmp_path / "pairs", model, by="checks", language="en")
        assert pairs[0]["rejected"][0]["content"] == "one, two"
        assert (pairs[0]["score_chosen"], pairs[0]["score_rejected"]) == (1, 0)
        assert pairs[0]["judge"] == record["judge"] == "jai.evaluation.instructions (en)"
        both = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {}]}
        write_rows(file, [{"key": 1, "prompt": "No commas, in quotes", **both}])
        with pytest.raises(UserError, match="No prompt has a pair"):  # a half is better than nothing, and not right
            run(file, tmp_path / "half", model, by="checks", language="en")
        assert json.loads((tmp_path / "half" / "pairs.json").read_text())["dropped"] == {NO_RIGHT: 1}
        write_rows(file, [{"key": 1, "prompt": "No commas", "instruction_id_list": ["no:such"], "kwargs": [{}]}])
        before = len(model.asked)
        with pytest.raises(UserError, match="The row 1"):
            run(file, tmp_path / "other", model, by="checks", language="en")
        assert len(model.asked) == before


# --- A checkpoint and a reward model ---


def saved(model, tokenizer, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config_values(tokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "block_repeats": [1, 1],
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 512,
    }


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A JAI that says a few random tokens and ends its turn."""
    model = tiny_model(**tiny_config_values(tiny_tokenizer))
    with torch.no_grad():
        model.lm_head.weight[tiny_tokenizer.convert_tokens_to_ids("<|end|>")] *= 8  # now likely, now unlikely
    return saved(model, tiny_tokenizer, tmp_path_factory.mktemp("pairs") / "tiny-jai")


@pytest.fixture(scope="module")
def reward_model(tiny_config, tiny_tokenizer, tmp_path_factory) -> Path:
    torch.manual_seed(1)
    config = tiny_config(**tiny_config_values(tiny_tokenizer), num_labels=1)
    return saved(JaiForSequenceClassification(config), tiny_tokenizer, tmp_path_factory.mktemp("pairs") / "reward")


def test_a_checkpoint_answers_and_a_reward_model_decides(checkpoint, reward_model, prompts, tmp_path):
    options = {"by": "reward", "reward_model": str(reward_model)}
    _, rows, _ = run_checkpoint(checkpoint, prompts, tmp_path / "pairs", **options)
    assert rows
    reward = RewardModel(str(reward_model))
    for row in rows:
        both = [[*row["prompt"], *row["chosen"]], [*row["prompt"], *row["rejected"]]]
        # One at a time: a batch with padding gives the same.
        alone = [reward.scores([each], batch_size=1)[0] for each in both]
        assert alone == pytest.approx([row["score_chosen"], row["score_rejected"]], abs=1e-4)
        assert row["score_chosen"] > row["score_rejected"]
        assert row["judge"] == str(reward_model)
    assert run_checkpoint(checkpoint, prompts, tmp_path / "pairs", **options)[1] == rows
    for changed, said in (({"seed": 1}, "seed was 0 and is 1"), ({"dtype": "bfloat16"}, 'dtype was "?auto"? and is')):
        with pytest.raises(UserError, match=f"begun with other inputs or options: {said}"):
            run_checkpoint(checkpoint, prompts, tmp_path / "pairs", **options, **changed)


def test_a_calibrated_reward_model_gives_probabilities(checkpoint, reward_model, prompts, tmp_path):
    """By the numbers that `jai reward` writes beside it; the record has them, and margins are of probabilities."""
    calibrated = tmp_path / "calibrated"
    shutil.copytree(reward_model, calibrated)
    calibration = Calibration(slope=0.5, intercept=0.25, pair_temperature=2.0, pairs=9)
    plain, options = ({"by": "reward", "reward_model": str(each)} for each in (reward_model, calibrated))
    said, by_logit, record = run_checkpoint(checkpoint, prompts, tmp_path / "logits", **plain)
    assert "has no calibration: scores and --min-margin are in logits" in " ".join(said.split())
    assert (record["score"], record["calibration"]) == ("logit", None)

    calibration.save(calibrated, {"held_out": {}})
    said, rows, record = run_checkpoint(checkpoint, prompts, tmp_path / "pairs", **options)
    assert "Scores and --min-margin are calibrated probabilities." in " ".join(said.split())
    assert record["score"] == "calibrated probability"
    assert record["calibration"] == {"slope": 0.5, "intercept": 0.25, "pair_temperature": 2.0, "pairs": 9}
    assert [row["chosen"] for row in rows] == [row["chosen"] for row in by_logit]
    for row, other in zip(rows, by_logit, strict=True):
        for name in ("score_chosen", "score_rejected"):
            assert row[name] == pytest.approx(1 / (1 + math.exp(-0.5 * other[name] - 0.25)), abs=1e-5)
    margins = sorted(row["score_chosen"] - row["score_rejected"] for row in rows)
    _, left, _ = run_checkpoint(checkpoint, prompts, tmp_path / "pairs", min_margin=margins[-1], **options)
    assert len(left) == 1

    dataclasses.replace(calibration, slope=0.6).save(calibrated, {})
    with pytest.raises(UserError, match=r"calibration slope was 0\.5 and is 0\.6"):
        run_checkpoint(checkpoint, prompts, tmp_path / "pairs", **options)
    for slope in (-0.1, 0.0):
        dataclasses.replace(calibration, slope=slope).save(calibrated, {})
        with pytest.raises(UserError, match=rf"has the slope {slope:.3g}: .* gave the rejected answers the higher log"):
            run_checkpoint(checkpoint, prompts, tmp_path / "other", **options)
    calibration.save(calibrated, {})
    weights = calibrated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")  # trained anew under the same name
    with pytest.raises(UserError, match=r"begun with other inputs or options: reward_model_revision was"):
        run_checkpoint(checkpoint, prompts, tmp_path / "pairs", **options)


def test_a_reward_model_that_its_tokenizer_does_not_fit(reward_model, tmp_path):
    shutil.copytree(reward_model, tmp_path / "small")
    config = json.loads((reward_model / "config.json").read_text())
    (tmp_path / "small" / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(UserError, match=r"has ids up to \d+, and the reward model a vocabulary of 100"):
        RewardModel(str(tmp_path / "small"))
    (tmp_path / "small" / "config.json").rename(tmp_path / "small" / "adapter_config.json")
    with pytest.raises(UserError, match="is a LoRA adapter without its model"):
        RewardModel(str(tmp_path / "small"))


def test_prompts_that_are_cut_are_counted_once_each(checkpoint, tmp_path):
    """Of 512 tokens 480 are the answer's, and 32 are too few for the second prompt and the third."""
    instruction = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    rows = [{"prompt": f"{number}{text}", **instruction} for number, text in enumerate(("?", "?" * 90, "?" * 99))]
    file = write_rows(tmp_path / "if.jsonl", rows)
    answers = [{"prompt": row["prompt"], "answers": ["A.", "A, B."]} for row in rows]  # a pair, whatever is drawn
    options = {"by": "checks", "max_new_tokens": 480, "off_policy": write_rows(tmp_path / "other.jsonl", answers)}
    printed, _, record = run_checkpoint(checkpoint, file, tmp_path / "pairs", **options)
    assert (record["prompts"], record["cut_prompts"]) == (3, 2)
    assert "2 prompts were longer than the model takes and lost their beginning." in printed
    assert not any("beginning" in reason for reason in record["dropped"])


def test_a_checkpoint_without_a_chat_template(checkpoint, prompts, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template, in which it is asked"):
        run_checkpoint(bare, prompts, tmp_path / "pairs", by="checks")
    assert not (tmp_path / "pairs").exists()


def run_checkpoint(checkpoint: Path, prompts: Path, out: Path, **options):
    values = {"max_new_tokens": 40, "max_length_ratio": 100.0, "temperature": 1.5, "top_p": 1.0, **options}
    output = io.StringIO()
    path = make_pairs(
        PairsOptions(prompts=prompts, out=out, model=str(checkpoint), **values), console=Console(file=output, width=300)
    )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return output.getvalue(), rows, json.loads((out / "pairs.json").read_text())


def test_rewards_that_are_no_numbers(tiny_config, tiny_tokenizer, tmp_path):
    config = tiny_config(**tiny_config_values(tiny_tokenizer), num_labels=1)
    model = JaiForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    broken = RewardModel(str(saved(model, tiny_tokenizer, tmp_path / "reward")))
    with pytest.raises(UserError, match="rewards that are not finite"):
        broken.scores([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], batch_size=1)


def test_a_classifier_is_no_reward_model(tiny_config, tiny_tokenizer, tmp_path):
    config = tiny_config(**tiny_config_values(tiny_tokenizer), num_labels=3)
    folder = saved(JaiForSequenceClassification(config), tiny_tokenizer, tmp_path / "classifier")
    with pytest.raises(UserError, match="has 3 labels, where a reward model has one"):
        RewardModel(str(folder))


# --- Options and files ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "openai"}, "needs --base-url"),
        ({"base_url": "http://h/v1"}, "--base-url is for --backend openai"),
        ({**SERVER, "dtype": "float16"}, "--dtype does nothing with --backend openai"),
        ({**SERVER, "seed": 1}, "--seed does nothing with --backend openai"),
        ({**SERVER, "by": "checks", "device": "cpu"}, "--device does nothing with --backend openai"),
        ({"by": "reward"}, "--by reward needs --reward-model"),
        ({"by": "checks", "reward_model": "x"}, "--by reward needs --reward-model, and nothing else does"),
        ({}, "--judge-url is not given"),
        ({"by": "checks", "judge_url": "http://h/v1"}, "There is no judge in --by checks"),
        ({"by": "checks", "candidates": 1}, "One answer makes no pair"),
        ({"by": "checks", "repeats": 2}, "--repeats is how often one judges"),
        ({"by": "reward", "reward_model": "x", "language": "en"}, "--language does nothing with --by reward"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        PairsOptions(prompts=Path("p"), out=Path("o"), model="m", **options).check()


def test_the_device_of_a_reward_model_is_no_servers(prompts, reward_model):
    options = {**SERVER, "by": "reward", "reward_model": str(reward_model), "device": "cpu"}
    PairsOptions(prompts=prompts, out=Path("o"), model="m", **options).check()


def test_the_recipe_is_of_today(prompts):
    recipe = read_options_file(Path(jai.recipes.__file__).parent / "pairs.yaml", PairsOptions)
    options = PairsOptions(prompts=prompts, out=Path("o"), model="m", **SERVER, **recipe)
    options.check()
    assert (options.by, options.candidates, options.margin, options.judge_price) == ("judge", 5, 1, [2.5, 10])


def test_files_that_are_wrong(prompts, tmp_path):
    with ChatEndpoint(numbered) as model, ChatEndpoint(grade_by_number) as judge:
        with pytest.raises(UserError, match="nowhere does not exist"):
            run(tmp_path / "nowhere", tmp_path / "pairs", model, judge)
        bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}, {"text": "a"}])
        with pytest.raises(UserError, match=r"bad\.jsonl, line 2, .*no `prompt`"):
            run(bad, tmp_path / "pairs", model, judge)
        others = write_rows(tmp_path / "others.jsonl", [{"id": 1, "answers": "x"}])
        with pytest.raises(UserError, match=r"others\.jsonl, line 1, .*`answers` is not a list"):
            run(prompts, tmp_path / "pairs", model, judge, off_policy=others)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        with pytest.raises(UserError, match="full exists already and holds no pairs"):
            run(prompts, tmp_path / "full", model, judge)
        assert model.asked == judge.asked == []


@pytest.mark.slow
def test_killed_on_the_command_line_and_trained_on(checkpoint, prompts, tmp_path):
    """SIGKILL in the middle of the judging; the same command goes on, and `jai dpo` takes what it makes."""
    with (
        ChatEndpoint(numbered) as model,
        ChatEndpoint(lambda request, before: Answer(grade_by_number(request, before), delay=0.1)) as judge,
    ):
        command = [sys.executable, "-m", "jai", "pairs", str(prompts), str(tmp_path / "pairs"), "--model", "m"]
        command += ["--backend", "openai", "--base-url", model.url, "--judge-url", judge.url, "--judge-model", "judge"]
        command += ["--judge-concurrency", "1"]
        process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL)
        while len(judge.asked) < 8:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
        assert len(model.asked) == 20
        assert len(judge.asked) <= 22
    config = {
        "model_name_or_path": str(checkpoint),
        "dataset_name": str(tmp_path / "pairs" / "pairs.jsonl"),
        "output_dir": str(tmp_path / "dpo"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }
    (tmp_path / "dpo.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items()))
    subprocess.run(
        [sys.executable, "-m", "jai", "dpo", "--config", str(tmp_path / "dpo.yaml")], check=True, env=os.environ
    )
    assert (tmp_path / "dpo" / "model.safetensors").exists()
