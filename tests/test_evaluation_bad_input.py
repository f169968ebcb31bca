# SPDX-License-Identifier: Apache-2.0
"""`jai eval` on the command line, given what cannot be measured or stopped in the middle: one clear error, an exit code
that is not 0, and all that came so far kept."""

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation_data import write_rows

from chat_endpoint import Answer, ChatEndpoint
from jai import cli
from jai.cli.app import INTERRUPTED
from jai.evaluation.results import read_run

VERDICT = "Yes. [[true]]"


@pytest.fixture
def jai_eval(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """`jai_eval(*words)`: the exit code, what is printed, and the error in one line."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["jai", "eval", *words])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err, printed.err
        return exit_.value.code or 0, printed.out, " ".join(printed.err.split())

    return run


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    facts = [{"id": number, "question": f"ข้อ {number}", "facts": f"จริง {number}"} for number in range(4)]
    write_rows(folder, "hall_bench_298", facts)
    for language in ("th", "en"):
        rows = [{"question": f"{number} + 1?", "answer": None, "answer_number": number + 1} for number in range(4)]
        write_rows(folder, f"juletxara/mgsm/{language}/test", rows)
    return folder


# --- The judge ---


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(status=429, headers={"Retry-After": "0"}), "429"),
        (Answer(status=500, body=b"{}"), "500"),
        (Answer(body=b""), "answered with nothing"),
        (Answer(hang_up=True), "connection|disconnected"),
        (Answer(body=b'{"choices": [{"mess'), "JSON"),
        (Answer(VERDICT, delay=3), "seconds|timed out|timeout"),
    ],
    ids=["429", "500", "nothing", "hangs up", "half JSON", "hangs"],
)
def test_a_judge_that_fails(jai_eval, data, tmp_path, answer, problem):
    """Two of its four verdicts came; the same command then asks for the other two."""
    broken = True

    def judge(request: dict, before: int) -> Answer | str:
        return answer if broken and len(endpoint.asked) > 3 else VERDICT

    with ChatEndpoint(judge) as endpoint, ChatEndpoint(lambda *_: "คำตอบ") as model:
        words = ["m", "--suite", "hall-bench-298", "--data", str(data), "--backend", "openai", "--out", "run"]
        words += ["--base-url", model.url, "--judge-url", endpoint.url, "--judge-model", "j"]
        words += ["--judge-concurrency", "1", "--judge-attempts", "1", "--judge-timeout", "0.5"]
        code, _, error = jai_eval(*words)
        assert code == 1
        assert re.search(problem, error, re.IGNORECASE), error
        assert re.search(r"2 of the 4 replies came and are kept in .*replies\.sqlite", error)
        assert not read_run(tmp_path / "run")[0].finished
        broken = False
        endpoint.asked.clear()
        assert jai_eval(*words)[0] == 0
        assert len(endpoint.asked) == 2
        assert len(model.asked) == 4
    assert read_run(tmp_path / "run")[0].figures[0].value == 1


@pytest.mark.parametrize("prose", ["Lovely!", "[[maybe]]", "[[true"])
def test_a_judge_that_talks_in_prose(jai_eval, data, tmp_path, prose):
    with ChatEndpoint(lambda *_: prose) as judge, ChatEndpoint(lambda *_: "คำตอบ") as model:
        words = ["m", "--suite", "hall-bench-298", "--data", str(data), "--backend", "openai", "--out", "run"]
        words += ["--base-url", model.url, "--judge-url", judge.url, "--judge-model", "j"]
        code, _, error = jai_eval(*words)
    assert code == 1
    assert "hall-bench-298 has no figure. 4 of the judge's replies hold no verdict that can be read" in error
    results, items = read_run(tmp_path / "run")
    assert (results.finished, results.figures) == (False, [])
    assert [item.score for item in items] == [None] * 4


# --- Interruption ---


@pytest.fixture
def interruptible():
    """Ctrl-C ends what runs, as in a terminal: a job in a shell's background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("part", [pytest.param("the model", marks=pytest.mark.slow), "the judge"])
def test_an_interruption(jai_eval, data, tmp_path, part):
    """Ctrl-C while the third reply is made; the same command goes on."""
    stops = True

    def behave(asked: list) -> str:
        if stops and len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return VERDICT

    is_model = part == "the model"
    with (
        ChatEndpoint(lambda *_: behave(model.asked) if is_model else "x") as model,
        ChatEndpoint(lambda *_: VERDICT if is_model else behave(judge.asked)) as judge,
    ):
        words = ["m", "--suite", "mgsm" if is_model else "hall-bench-298", "--data", str(data), "--out", "run"]
        words += ["--backend", "openai", "--base-url", model.url, "--batch-size", "1", "--judge-concurrency", "1"]
        words += ["--judge-url", judge.url, "--judge-model", "j"]
        assert jai_eval(*words)[0] == INTERRUPTED
        assert not read_run(tmp_path / "run")[0].finished
        stops = False
        assert jai_eval(*words)[0] == 0
    assert read_run(tmp_path / "run")[0].finished


# --- What is given ---


GOOD = {"question": "ก", "a": "1", "b": "2", "answer": "a"}


def write_exam(data: Path, broken: str = "") -> None:
    for subset in ("onet", "ic", "tgat", "tpat1", "a_level"):
        for split in ("train", "test"):
            write_rows(data, f"scb10x/thai_exam/{subset}/{split}", [GOOD] * 5)
    with (data / "scb10x/thai_exam/ic/test.jsonl").open("a") as file:
        file.write(broken)


CASES = {
    "a missing folder": (["--suite", "mgsm", "--data", "nowhere"], "--data nowhere is not a folder"),
    "a missing file": (["--suite", "hall-bench"], r"hall-bench are not published\. Put yours .*hall_bench\.jsonl"),
    "a missing suite file": (["--suite", "mine.yaml"], r"mine\.yaml"),
    "a malformed row": (["--suite", "thai-exam"], r"thai_exam/ic/test\.jsonl, line 6, is not a row"),
    "a malformed question": (["--suite", "mt-bench-th"], r"mt_bench_th\.jsonl, line 2, .*`turns`"),
    "no chat template": (["--suite", "mgsm"], "has no chat template, in which it is asked here"),
    "programs: code": (["--suite", "code"], "The suite code runs programs .*--allow-code-execution"),
    "programs: livecodebench": (["--suite", "livecodebench"], "The suite livecodebench runs programs"),
    "no judge": (["--suite", "hall-bench-298"], "--judge-url is not given"),
    "no such checkpoint": (["--suite", "thai-exam"], "no-such-folder"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_measured(jai_eval, data, tmp_path, tiny_checkpoint, case):
    words, problem = CASES[case]
    checkpoint = tiny_checkpoint(tmp_path / "tiny", block_repeats=[1, 1])
    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    write_exam(data, '{"question": "ก"}\n' if case == "a malformed row" else "")
    (data / "mt_bench_th.jsonl").write_text('{"id": 1, "turns": ["a"]}\n{"id": 2, "turns": []}\n')
    name = "./no-such-folder" if case == "no such checkpoint" else str(checkpoint)
    if "--data" not in words:
        words = [*words, "--data", str(data)]
    if "bench" in words[1] and case != "no judge":
        words = [*words, "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "j"]
        (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    code, _, error = jai_eval(name, *words, "--out", "run")
    assert code in (1, 2)
    assert re.search(problem, error), error
    assert not (tmp_path / "run").exists()
