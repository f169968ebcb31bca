# SPDX-License-Identifier: Apache-2.0
"""Programs that a model writes: which pass, which do not, and the suite LiveCodeBench with a model that knows some."""

import base64
import json
import os
import pickle
import zlib

import pytest
from test_evaluation_generation import KnowingModel, write_rows

from jai.errors import UserError
from jai.evaluation.kept_answers import KeptAnswers
from jai.evaluation.measure import measure_suite, plan_suite
from jai.evaluation.programs import hidden_tests, passes, program_of, same_output
from jai.evaluation.results import open_run
from jai.evaluation.suites import read_suite
from jai.evaluation.tasks import TaskLoader

SUM = "print(sum(map(int, input().split())))"
METHOD = "class Solution:\n    def add(self, a: List[int], b: int) -> int:\n        return sum(a) + b"
STDIN_TESTS, CALL_TESTS = [["1 2\n", "3\n"], ["5 6", "11"]], [["[1, 2]\n3", "6"], ["[]\n0", "0"]]


@pytest.mark.parametrize(
    ("program", "function", "right"),
    [
        (SUM, "", True),
        (f"from __future__ import annotations\n{SUM}", "", True),
        ("print(3)", "", False),  # in the first test alone
        ("print(sum(map(int, input().split())) * 1.0)", "", True),  # 3.0 is 3
        ("raise SystemExit(1)", "", False),
        (f"{SUM}\nraise SystemExit(1)", "", False),
        ("while True: pass", "", False),
        ("x = bytearray(8 << 30)\n" + SUM, "", False),
        ("def (", "", False),
        (METHOD, "add", True),
        ("def add(a, b):\n    print('noise')\n    return sum(a) + b", "add", True),
        (METHOD.replace("+ b", "- b"), "add", False),
        (METHOD.replace("add", "plus"), "add", False),
        (METHOD.replace("return", "print('the value of the function: 6');"), "add", False),
    ],
)
def test_what_passes(program, function, right):
    assert passes(program, CALL_TESTS if function else STDIN_TESTS, function=function, seconds=3) is right


def test_without_a_test_nothing_passes():
    assert not passes("", [])


def test_a_program_works_in_an_empty_folder_without_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.chdir(tmp_path)
    assert passes("import os\nprint(os.listdir('.'), 'SECRET' in os.environ)", [["", "['program.py'] False"]])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [("1 2 \n\n", "1 2", True), ("1.0 2", "1 2.00", True), ("1\n2", "1 2", False), ("a", "A", False), ("", "", True)],
)
def test_same_output(printed, expected, same):
    assert same_output(printed, expected) is same


@pytest.mark.parametrize(
    ("reply", "program"),
    [
        ("```python\na\n```\nbetter:\n```\nb\n```", "b\n"),
        ("<think>\n```python\na\n```\n</think>\nnone", None),
        ("print(1)", None),
        ("```python\na", None),  # cut off
        ("Use `x`:\n```py\nx = '```'\n```", "x = '```'\n"),
    ],
)
def test_the_program_of_a_reply(reply, program):
    assert program_of(reply) == program


def packed(content: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(content))).decode()


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_hidden_tests_are_read_and_run_nothing():
    tests = [{"input": "1", "output": "2", "testtype": "stdin"}]
    assert hidden_tests(json.dumps(tests)) == hidden_tests(packed(json.dumps(tests))) == tests
    for text in (packed(Evil()), "no base64", packed(3), ""):
        with pytest.raises(ValueError, match="private_test_cases cannot be read"):
            hidden_tests(text)


def row(number: int) -> dict:
    """Each asks for the sum and one more; every other one is a function."""
    is_function = number % 2 == 1
    cases = [{"input": "[1, 2]\n3" if is_function else "1 2", "output": str((6 if is_function else 3) + number)}]
    return {
        "question_content": f"โจทย์ {number}",
        "starter_code": "class Solution:\n    def add(self, a, b):\n" if is_function else "",
        "public_test_cases": json.dumps(cases),
        "private_test_cases": packed(json.dumps(cases)),
        "metadata": json.dumps({"func_name": "add"} if is_function else {}),
        "contest_date": "2024-01-01",
    }


def reply(number: int) -> str:
    if number % 2 == 1:
        return f"```python\n{METHOD} + {number}\n```"
    return f"<think>hm</think>\n```python\nprint(sum(map(int, input().split())) + {number})\n```"


@pytest.fixture
def data(tmp_path):
    for language in ("en", "th"):
        write_rows(tmp_path / f"data/livecodebench_{language}.jsonl", [row(number) for number in range(4)])
    return tmp_path / "data"


@pytest.mark.parametrize(("known", "score"), [({0, 1, 2, 3}, 1), ({1}, 0.25), ({0, 3}, 0.5), (set(), 0)])
def test_a_model_that_knows_some_programs_gets_that_score(data, tmp_path, known, score):
    replies = {f"โจทย์ {n}\n": reply(n) if n in known else reply(n).replace("sum(", "-sum(") for n in range(4)}
    plan = plan_suite(read_suite("livecodebench"), TaskLoader(data=data))
    with open_run(tmp_path / "run", model="oracle", revision="0") as run:
        model = KeptAnswers(KnowingModel(replies, max_length=16384), run.folder / "answers.jsonl", 8)
        figures = measure_suite(plan, model, run, limit=None, seed=0, tell=lambda name: None)
    assert {figure.name: figure.value for figure in figures} == dict.fromkeys(
        ["livecodebench_en", "livecodebench_th", "mean"], score
    )


def test_a_malformed_row_is_named_by_file_and_line(data):
    path = data / "livecodebench_en.jsonl"
    path.write_text(path.read_text() + json.dumps(row(4) | {"private_test_cases": packed(Evil())}) + "\n")
    with pytest.raises(UserError, match=r"livecodebench_en\.jsonl, line 5, .*private_test_cases cannot be read"):
        TaskLoader(data=data).load("livecodebench_en")
