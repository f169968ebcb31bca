# SPDX-License-Identifier: Apache-2.0
"""`jai eval CKPT --suite …` from the command line's words to the run's files, by a real checkpoint and without a
network: every suite, on the shared data and, of what they do not have, on rows of the Hub's form."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation_data import CODE_EVAL, short_suite, write_rows, write_whole_data
from test_evaluation_generation import KnowingModel

from chat_endpoint import ChatEndpoint
from jai import cli
from jai.evaluation.kept_answers import KeptAnswers
from jai.evaluation.measure import measure_suite, plan_suite
from jai.evaluation.results import EvaluationResults, Item, open_run, read_run
from jai.evaluation.suites import JudgedSuite, Suite, read_suite, suite_names
from jai.evaluation.tasks import TaskLoader

ANSWER_TOKENS = 16  # of generated answers: half of what the model is said to take
DOWNLOADS = {"ruler"}  # lm-eval's thirteen tasks fetch essays, SQuAD and HotpotQA, and need packages of their own
LONG = {"ruler-en", "ruler-th", "thai-nlu"}  # their tasks want longer answers
SLOW = {"eng-h6-leaderboard", "eng-h6-trillion", "thai-h6-leaderboard", "thai-h6-trillion", "thai-knowledge"}
# Suites whose questions are all in the shared data: how many outcomes of the first metric a whole run has.
WHOLE = {
    "mgsm": 500,
    "ifeval-th": 105,
    "consistency": 250 * 2 + 1190 * 2,
    "thai-exam": 565,
    "onet": 334,
    "mt-bench-en": 160,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint: Callable) -> Path:
    """One for all suites: a JAI that knows nothing, in phi-3's chat form."""
    return tiny_checkpoint(
        tmp_path_factory.mktemp("checkpoint") / "tiny", block_repeats=[1, 1], max_position_embeddings=1024
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared_data) -> Path:
    return write_whole_data(tmp_path_factory.mktemp("data"), shared_data)


@pytest.fixture(scope="module")
def judge():
    with ChatEndpoint(lambda request, before: "Hm. [[7]]" if "grade" in str(request) else "[[true]]") as endpoint:
        yield endpoint


@pytest.fixture
def jai_eval(checkpoint, data, judge, tmp_path, monkeypatch, capsys) -> Callable:
    """`jai_eval(names, …)`: what the command leaves behind; it ends with exit code 0."""

    def run(names: list[str], *words: str) -> tuple[EvaluationResults, list[Item]]:
        shown = [str(short_suite(name, tmp_path)) if name.startswith("ruler") else name for name in names]
        lengths = ["--max-length", str(2 * ANSWER_TOKENS), "--max-new-tokens", str(ANSWER_TOKENS)]
        command = ["jai", "eval", str(checkpoint), "--suite", *shown, "--data", str(data), "--out", "run"]
        judging = ["--judge-url", judge.url, "--judge-model", "j"] if any(map(is_judged, names)) else []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [*command, *lengths, *judging, *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        assert exit_.value.code in (0, None), printed.err
        assert "Next: jai eval compare run" in printed.out
        results, items = read_run(tmp_path / "run")
        assert results.finished
        assert {figure.suite for figure in results.figures} == {item.suite for item in items} == set(names)
        return results, items

    return run


def is_judged(name: str) -> bool:
    return isinstance(read_suite(name), JudgedSuite)


def test_every_suite_runs_by_the_command_without_a_network(jai_eval):
    """But for those that take too long, which the tests below have."""
    names = [name for name in suite_names() if name not in LONG | SLOW | DOWNLOADS and not runs_code(name)]
    results, items = jai_eval(names, "--limit", "1")
    assert {item.suite for item in items if "answer" in item.texts} >= {"thai-exam", "onet", "mgsm", "reasoning"}
    assert {task.suite: task.judge for task in results.tasks} == {
        name: "j" if is_judged(name) else None for name in names
    }
    assert sum("answers end after 16 tokens" in note for note in results.notes) >= 6


def runs_code(name: str) -> bool:
    suite = read_suite(name)
    return isinstance(suite, Suite) and suite.runs_code


@pytest.mark.slow
def test_programs_run_where_that_is_allowed(jai_eval, data, tmp_path):
    """HumanEval and MBPP by lm-eval: programs of a checkpoint that writes none, and of a model that knows every other
    answer."""
    (tmp_path / "code_eval").mkdir()
    (tmp_path / "code_eval/code_eval.py").write_text(CODE_EVAL)
    check = "def check(f):\n  assert f() == 1"
    humaneval = [{"entry_point": "f", "prompt": f"def f():  # {n}\n", "test": check} for n in range(2)]
    mbpp = [{"text": f"Set x ({n}).", "code": "x = 1", "test_list": ["assert x == 1"] * 3} for n in range(4)]
    write_rows(data, "openai/openai_humaneval/test", humaneval)
    write_rows(data, "google-research-datasets/mbpp/full/test", mbpp)
    _, items = jai_eval(["code"], "--allow-code-execution", "--max-length", "1024")
    assert {(item.task, item.metric, item.score) for item in items} == {
        ("humaneval", "pass@1", 0.0),
        ("mbpp", "pass_at_1", 0.0),
    }
    knows = {"# 0": "    return 1\n", "# 1": "    return 2\n", "x (0)": "x = 1", "x (1)": "x = 1", "x (": "x = 2"}
    plan = plan_suite(read_suite("code"), TaskLoader(data=data))
    with open_run(tmp_path / "knows", model="m", revision="r") as run:
        model = KeptAnswers(KnowingModel(knows, max_length=None), tmp_path / "knows/answers.jsonl", 8)
        figures = measure_suite(plan, model, run, limit=None, seed=0, tell=lambda task: None)
    assert {figure.name: figure.value for figure in figures} == {"HumanEval": 0.5, "MBPP": 0.5, "mean": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_whole_suites_of_the_shared_data(jai_eval, name):
    results, items = jai_eval([name], "--batch-size", "32")
    first = {row.metric for row in read_suite(name).tasks} if not is_judged(name) else {"grade"}
    tasks = {task.task for task in results.tasks}
    assert sum(item.metric in first for item in items if item.task in tasks) == WHOLE[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reasoning", "hall-bench-small", "mt-bench-th", "hall-bench"])
def test_whole_suites_of_what_is_made(jai_eval, name):
    jai_eval([name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LONG | SLOW))
def test_suites_with_longer_answers_and_of_many_tasks(jai_eval, name):
    jai_eval([name], "--limit", "1", "--max-length", "1024")


def test_several_processes_are_refused_before_anything_is_measured(checkpoint, tmp_path, monkeypatch, capsys):
    for words in ([str(checkpoint), "--suite", "mgsm"], ["compare", str(tmp_path)]):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["jai", "eval", *words])
        with pytest.raises(SystemExit, match="1"):
            cli.main()
        said = " ".join(capsys.readouterr().err.split())
        assert "runs in one process, and a launcher has started 2 (WORLD_SIZE). Start it without" in said
        assert not (tmp_path / "eval").exists()


@pytest.mark.slow
def test_accelerates_launcher_gets_that_error(checkpoint, data, tmp_path):
    """Two processes of gloo's kind, as `accelerate launch` starts them; with one it measures."""
    for processes in (2, 1):
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        launcher += ["--multi_gpu"] if processes > 1 else ["--cpu"]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0", "-m", "jai", "eval", str(checkpoint), "--suite", "mgsm"]
        words = ["--data", str(data), "--limit", "1", "--max-length", "32", "--out", str(tmp_path / "run")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launcher, *words], env=environment, capture_output=True, text=True)
        assert (done.returncode != 0) == (processes > 1), done.stderr[-3000:]
        assert (tmp_path / "run/results.json").exists() == (processes == 1)
        said = " ".join(done.stderr.split())
        assert ("runs in one process, and a launcher has started 2" in said) == (processes > 1)


def test_no_suite_is_forgotten():
    slow = {name for name in suite_names() if runs_code(name)} | LONG | SLOW
    assert slow | DOWNLOADS < set(suite_names())
