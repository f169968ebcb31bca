# SPDX-License-Identifier: Apache-2.0
"""`jai eval` with judged suites: a tiny checkpoint or a server answers, a server on this machine judges."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from chat_endpoint import Answer, ChatEndpoint
from jai.errors import UserError
from jai.evaluation.command import evaluate_suites
from jai.evaluation.endpoint import Endpoint
from jai.evaluation.judged.checkpoint import CheckpointAsker
from jai.evaluation.judged.options import PairwiseOptions
from jai.evaluation.judged.prompts import FACTS
from jai.evaluation.judged.side_by_side import compare_answers
from jai.evaluation.kept_answers import KeptAnswers
from jai.evaluation.models import load_answering_model
from jai.evaluation.options import EvalOptions
from jai.evaluation.reply_cache import ChatRequest
from jai.evaluation.results import read_run
from jai.evaluation.suites import JudgedSuite, read_suite, read_suites, suite_names

ANSWER = re.compile(r"\[Begin: (answer[^\]]*)\]\n(.*?)\n\[End: \1\]", re.DOTALL)


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A JAI that knows nothing, in phi-3's chat form."""
    tokenizer = tiny_tokenizer
    model = tiny_model(
        vocab_size=len(tokenizer),
        block_repeats=[1, 1],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=512,
    )
    folder = tmp_path_factory.mktemp("judged") / "tiny-jai"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with three questions of MT-Bench's form and of JAI-Hall-Bench's."""
    folder = tmp_path / "data"
    folder.mkdir()
    chats = [
        {"question_id": number, "category": category, "turns": [f"{category}?", "And then?"], "reference": ["a", "b"]}
        for number, category in enumerate(["math", "writing", "stem"])
    ]
    facts = [{"id": number, "question": f"ข้อ {number}", "facts": f"จริง {number}"} for number in range(3)]
    for name, rows in (("mt_bench_th", chats), ("hall_bench_298", facts), ("hall_bench", facts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(*suites: str, judge: ChatEndpoint, **options) -> tuple[str, EvalOptions]:
    """Run `jai eval`; gives what it prints, and the options."""
    values = {"judge_url": judge.url, "judge_model": "judge", "max_new_tokens": 8, "judge_attempts": 1, **options}
    given = EvalOptions(suite=list(suites), **values)
    given.check()
    given.check_judge()
    output = io.StringIO()
    evaluate_suites(given, read_suites(given.suite), console=Console(file=output, width=200))
    return output.getvalue(), given


def always(text: str):
    return lambda request, before: text


def test_a_checkpoint_is_judged(checkpoint, data, tmp_path):
    with ChatEndpoint(always("Hm. [[7]]"), model="judge-2025") as judge:
        printed, options = evaluate(
            "mt-bench-th", judge=judge, model=str(checkpoint), data=data, out=tmp_path / "run", judge_price=[2.5, 10]
        )
    results, items = read_run(options.folder)
    assert results.finished
    assert [(figure.name, figure.value, figure.items) for figure in results.figures][:3] == [
        ("all turns", 7.0, 6),
        ("first turn", 7.0, 3),
        ("second turn", 7.0, 3),
    ]
    assert {(task.judge, task.data, task.version) for task in results.tasks} == {("judge", "mt_bench_th.jsonl", "1")}
    assert {task.task for task in results.tasks} == {item.task for item in items} == {"math", "writing", "stem"}
    assert {task.judge_names for task in results.tasks} == {("judge-2025",)}
    assert all(task.judge_prompt_hash and task.prompt_hash for task in results.tasks)
    assert "mt-bench-th: The judge calls itself judge-2025." in results.notes
    assert "mt-bench-th: 3 questions of mt_bench_th.jsonl; the published set has 91." in results.notes
    # The cost is known before: six judgements of at most 2,048 tokens each, at 10 a million.
    assert re.search(
        r"if every answer is as long as may be: 6 requests, 0 answered already; .* at most 0\.1\d", printed
    )
    assert re.search(r"Judging \(judge\): 6 requests, 0 answered already", printed)
    assert "Judge: 6 replies in 6 tries" in printed
    answers = [json.loads(line) for line in (options.folder / "answers-mt-bench-th.jsonl").read_text().splitlines()]
    assert [row["id"] for row in answers] == ["0", "1", "2"]
    assert all(len(row["answers"]) == 2 for row in answers)
    asked = [request["messages"][1]["content"] for request in judge.asked if len(request["messages"]) == 2]
    shown = {match[2] for prompt in asked for match in ANSWER.finditer(prompt)}
    assert shown == {answer for row in answers for answer in row["answers"]}


def test_a_run_that_is_there_costs_nothing(checkpoint, data, tmp_path):
    with ChatEndpoint(always("[[true]]")) as judge:
        run = {"judge": judge, "model": str(checkpoint), "data": data, "out": tmp_path / "run"}
        evaluate("hall-bench-298", **run)
        asked = len(judge.asked)
        before = (tmp_path / "run" / "items.jsonl").read_text()
        printed, _ = evaluate("hall-bench-298", **run)
        assert len(judge.asked) == asked == 4  # three facts and a probe
        assert (tmp_path / "run" / "items.jsonl").read_text() == before
        assert "Judge: 0 replies in 0 tries, 3 from the cache" in printed
        with pytest.raises(UserError, match="holds hall-bench-298 as judge judged it; the judge is now other"):
            evaluate("hall-bench-298", **run, judge_model="other")


def test_a_judge_that_stops_answering(checkpoint, data, tmp_path):
    """What came is kept, and the same command asks for the rest."""
    with ChatEndpoint(lambda request, before: Answer(status=401) if len(judge.asked) == 5 else "[[true]]") as judge:
        run = {"judge": judge, "model": str(checkpoint), "data": data, "out": tmp_path / "run", "judge_concurrency": 1}
        with pytest.raises(UserError, match=r"3 of the 6 replies came and are kept in .*replies\.sqlite"):
            evaluate("hall-bench", **run)
        assert not read_run(tmp_path / "run")[0].finished
        evaluate("hall-bench", **run)
    prompts = list(map(json.dumps, judge.asked))
    assert sorted(prompts.count(prompt) for prompt in set(prompts)) == [1] * 6 + [2]  # the one that was refused
    figures = {(figure.name, figure.metric): figure.value for figure in read_run(tmp_path / "run")[0].figures}
    assert figures == {("all questions", metric): 1.0 for metric in ("correct", "facts", "fluency")}


def test_a_wrong_key_is_found_before_the_model_answers(data, tmp_path):
    with ChatEndpoint(always("[[7]]"), key="sk-right") as judge, pytest.raises(UserError, match="without a key"):
        evaluate(
            "mt-bench-th",
            judge=judge,
            model="no/such-model",
            data=data,
            out=tmp_path / "run",
            backend="openai",
            base_url="http://127.0.0.1:9/v1",
            judge_key="NO_SUCH_KEY",
        )


def test_a_server_answers_and_ours_are_there(tmp_path):
    """Our own questions need no data; the judge finds facts right and Thai clumsy."""
    with (
        ChatEndpoint(lambda request, before: "คำตอบ") as model,
        ChatEndpoint(
            lambda request, before: (
                "[[true]]" if request["messages"][0]["content"].startswith(FACTS.instructions) else "[[false]]"
            )
        ) as judge,
    ):
        printed, options = evaluate(
            "hall-bench-small", judge=judge, model="tiny", out=tmp_path / "run", backend="openai", base_url=model.url
        )
    assert len(model.asked) == 26
    assert {request["model"] for request in model.asked} == {"tiny"}
    figures = {(figure.name, figure.metric): figure.value for figure in read_run(options.folder)[0].figures}
    assert figures["all questions", "facts"] == 1
    assert figures["all questions", "fluency"] == figures["all questions", "correct"] == 0
    assert figures["wrong assumption", "correct"] == 0
    assert "Answers: 26 replies in 26 tries" in printed


def test_options_reach_the_judge(data, tmp_path):
    with ChatEndpoint(always("x")) as model, ChatEndpoint(always("[[true]]")) as judge:
        _, options = evaluate(
            "hall-bench-298",
            judge=judge,
            model="tiny",
            data=data,
            out=tmp_path / "run",
            backend="openai",
            base_url=model.url,
            limit=2,
            repeats=3,
            max_new_tokens=77,
            judge_parameters=["temperature=1", "max_tokens=null", 'reasoning_effort="low"'],
            judge_timeout=9.0,
            judge_attempts=3,
            judge_concurrency=2,
            judge_max_failed=5,
            judge_key="JUDGE_KEY",
            judge_price=[1, 2],
        )
    assert len(judge.asked) == 7
    assert {request["temperature"] for request in judge.asked} == {1}
    assert not any("max_tokens" in request for request in judge.asked)
    assert {request["reasoning_effort"] for request in judge.asked} == {"low"}
    assert {request["max_tokens"] for request in model.asked} == {77}
    assert options.endpoint_of_judge() == Endpoint(
        url=judge.url,
        model="judge",
        key_variable="JUDGE_KEY",
        concurrency=2,
        timeout=9.0,
        attempts=3,
        max_failed=5,
        prices=(1.0, 2.0),
    )
    results, items = read_run(options.folder)
    assert results.tasks[0].judge_parameters == {"temperature": 1, "reasoning_effort": "low"}
    assert results.tasks[0].answer_tokens == 77
    assert "hall-bench-298: Everything was judged 3 times; a score is the mean." in results.notes
    assert {item.score for item in items if item.metric == "agreement"} == {1.0}


RIGHT, WRONG = "เขารู้", "เขาไม่ทราบ"


@pytest.mark.parametrize("known", [{"0", "2"}, {"0", "1", "2"}, set()], ids=["some", "oracle", "negation"])
@pytest.mark.parametrize("suite", [name for name in suite_names() if isinstance(read_suite(name), JudgedSuite)])
def test_a_model_that_knows_some_answers_gets_that_score(data, tmp_path, suite, known):
    """By a judge that can tell: it finds what is right right, and gives it a 10."""
    for source, copy in (("hall_bench", "hall_bench_small"), ("mt_bench_th", "mt_bench_en")):
        text = (data / f"{source}.jsonl").read_text()
        (data / f"{copy}.jsonl").write_text(text)
    numbers = {"math": "0", "writing": "1", "stem": "2"}

    def answers(request: dict, before: int) -> str:
        asked = request["messages"][0]["content"].strip("?")
        return RIGHT if numbers.get(asked, asked.removeprefix("ข้อ ")) in known else WRONG

    def judges(request: dict, before: int) -> str:
        if len(request["messages"]) < 2:
            return "[[7]]"  # whether it is there
        is_right = ANSWER.findall(request["messages"][1]["content"])[-1][1] == RIGHT
        return f"[[{10 if is_right else 1}]]" if "mt-" in suite else f"[[{str(is_right).lower()}]]"

    with ChatEndpoint(answers) as model, ChatEndpoint(judges) as judge:
        server = {"backend": "openai", "base_url": model.url}
        _, options = evaluate(suite, judge=judge, model="m", data=data, out=tmp_path / "run", **server)
    figure = read_run(options.folder)[0].figures[0]
    share = len(known) / 3
    assert figure.value == pytest.approx(1 + 9 * share if "mt-" in suite else share)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--judge-url is not given"),
        ({"judge_url": "https://host/v1"}, "--judge-model is not given"),
        ({"judge_url": "host", "judge_model": "m"}, "is not an address of an endpoint"),
        ({"judge_url": "https://host/v1", "judge_model": "m", "judge_price": [1.0]}, "judge_price has 1 numbers"),
        ({"judge_url": "https://host/v1", "judge_model": "m", "judge_parameters": ["x"]}, "expected NAME=JSON"),
        ({"judge_url": "https://host/v1", "judge_model": "m", "judge_parameters": ["x={"]}, "expected NAME=JSON"),
    ],
)
def test_a_judge_is_needed(options, message):
    with pytest.raises(UserError, match=message):
        EvalOptions(model="m", **options).check_judge()


def test_malformed_questions_are_named_by_file_and_line(checkpoint, data, tmp_path):
    with (data / "mt_bench_th.jsonl").open("a") as file:
        file.write('\n{"question_id": 9, "turns": []}\n')
    with ChatEndpoint(always("[[7]]")) as judge:
        with pytest.raises(UserError, match=r"mt_bench_th\.jsonl, line 5, .*`turns` is not a list of texts"):
            evaluate("mt-bench-th", judge=judge, model=str(checkpoint), data=data, out=tmp_path / "run")
        with pytest.raises(UserError, match=r"questions of hall-bench are not published\. Put yours"):
            evaluate("hall-bench", judge=judge, model=str(checkpoint), out=tmp_path / "run")
        assert judge.asked == []


def test_a_checkpoint_without_a_chat_template(checkpoint, data, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    with (
        ChatEndpoint(always("[[7]]")) as judge,
        pytest.raises(UserError, match="has no chat template, in which it is asked"),
    ):
        evaluate("mt-bench-th", judge=judge, model=str(bare), data=data, out=tmp_path / "run")


def test_prompts_that_are_cut_are_counted(checkpoint, data, tmp_path):
    with ChatEndpoint(always("[[7]]")) as judge:
        run = {"judge": judge, "model": str(checkpoint), "data": data, "out": tmp_path / "run", "max_length": 20}
        _, options = evaluate("mt-bench-th", **run)
        assert any("prompts were longer than the model takes" in note for note in read_run(options.folder)[0].notes)
        with pytest.raises(UserError, match=r"takes 20 tokens, and an answer may have 20: .* smaller --max-new-tokens"):
            evaluate("mt-bench-th", **{**run, "out": tmp_path / "other", "max_new_tokens": 20})


def test_suites_of_ones_own(tmp_path, data):
    (tmp_path / "mine.jsonl").write_text('{"id": 1, "question": "ใคร", "answer": "เขา"}\n')
    (tmp_path / "mine.yaml").write_text(
        "title: Mine\nabout: Mine.\njudged: hall-bench\ncriteria: [facts]\nfile: x\nbeside: mine.jsonl\n"
    )
    with ChatEndpoint(always("x")) as model, ChatEndpoint(always("[[false]]")) as judge:
        run = {"model": "tiny", "out": tmp_path / "run", "backend": "openai", "base_url": model.url}
        _, options = evaluate(str(tmp_path / "mine.yaml"), judge=judge, **run)
    assert [figure.value for figure in read_run(options.folder)[0].figures] == [0.0]
    for line, message in (("criteria: [taste]", "'taste'; expected some of facts, fluency"), ("", "has no criteria")):
        (tmp_path / "bad.yaml").write_text(f"title: x\nabout: x\njudged: hall-bench\nfile: x\n{line}\n")
        with pytest.raises(UserError, match=message):
            read_suites([str(tmp_path / "bad.yaml")])


def test_the_papers_suites_ask_what_its_tables_do():
    """Table 11 judges facts alone, Table 13 both."""
    suites = {name: suite for name in ("hall-bench-298", "hall-bench", "mt-bench-th") for suite in read_suites([name])}
    assert all(isinstance(suite, JudgedSuite) for suite in suites.values())
    assert (suites["hall-bench-298"].criteria, suites["hall-bench-298"].questions) == (["facts"], 298)
    assert (suites["hall-bench"].criteria, suites["hall-bench"].questions) == (["facts", "fluency"], 1298)
    assert suites["mt-bench-th"].dataset == "ThaiLLM-Leaderboard/mt-bench-thai"


# --- Two files of answers side by side ---


@pytest.fixture
def answer_files(tmp_path) -> tuple[Path, Path]:
    """Answers of two models; the second one did not answer question 2."""
    files = (tmp_path / "first.jsonl", tmp_path / "second.jsonl")
    for path, said, count in zip(files, ("good", "bad"), (3, 2)):
        rows = [{"id": str(number), "answers": [f"{said} {number}", f"{said} then"]} for number in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def compare(first: Path, second: Path, judge: ChatEndpoint, **options):
    output = io.StringIO()
    given = PairwiseOptions(first=first, second=second, judge_url=judge.url, judge_model="judge", **options)
    run = compare_answers(given, console=Console(file=output, width=200))
    return output.getvalue(), run


def test_two_files_are_compared_in_both_orders(answer_files, data, tmp_path):
    def prefers_good(request: dict, before: int) -> str:
        answers = [text for _, text in ANSWER.findall(request["messages"][1]["content"])]
        last_of_a = answers[len(answers) // 2 - 1]
        return "[[A]]" if last_of_a.startswith("good") else "[[B]]"

    with ChatEndpoint(prefers_good) as judge:
        printed, run = compare(*answer_files, judge, data=data, out=tmp_path / "pair")
        assert len(judge.asked) == 8
        compare(*answer_files, judge, data=data, out=tmp_path / "pair")
        assert len(judge.asked) == 8
        with pytest.raises(UserError, match="holds another evaluation: judge"):
            compare_answers(
                PairwiseOptions(
                    first=answer_files[0],
                    second=answer_files[1],
                    judge_url=judge.url,
                    judge_model="x",
                    data=data,
                    out=tmp_path / "pair",
                )
            )
    figures = {(figure.name, figure.metric): figure.value for figure in run.results.figures}
    assert figures["all turns", "win"] == 1
    assert figures["judge", "consistent"] == 1
    assert "mt-bench-th-pairwise: 2 of 6 turns lack an answer in one of the files and were not compared." in printed
    assert read_run(tmp_path / "pair")[0].tasks[0].judge == "judge"


def test_comparisons_that_fail_or_cannot_be_read_are_counted(answer_files, data, tmp_path):
    """Of the first two questions: each turn of the first has one verdict of two, the other turns have both."""
    answers = iter(["[[A]]", Answer(status=500), "Hm.", "[[A]]", *["[[A]]"] * 4])
    with ChatEndpoint(lambda request, before: next(answers), model="judge-2025") as judge:
        options = {"judge_attempts": 1, "judge_max_failed": 1, "judge_concurrency": 1, "limit": 2}
        parameters = ["temperature=1"]
        printed, run = compare(
            *answer_files, judge, data=data, out=tmp_path / "pair", judge_parameters=parameters, **options
        )
    notes = run.results.notes
    assert notes == [
        "mt-bench-th-pairwise: The judge calls itself judge-2025.",
        "mt-bench-th-pairwise: 1 of the judge's replies hold no verdict that can be read; they count for nothing.",
        "mt-bench-th-pairwise: 1 judgements have no reply; they count for nothing.",
    ]
    assert all(note in printed for note in notes)
    assert {(figure.items, figure.unscored) for figure in run.results.figures if figure.name == "all turns"} == {(2, 2)}
    assert {request["temperature"] for request in judge.asked} == {1}
    assert run.results.tasks[0].judge_parameters == {"temperature": 1, "max_tokens": 2048}


def test_options_reach_the_judge_of_pairs(answer_files, data, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-right")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    options = {
        "judge_key": "JUDGE_KEY",
        "judge_parameters": ["max_tokens=64", 'reasoning_effort="low"'],
        "judge_attempts": 3,
        "judge_concurrency": 2,
        "judge_price": [1, 2],
        "repeats": 2,
        "limit": 1,
        "seed": 5,
    }
    failures = iter([Answer(status=500)] * 2)

    def fails_twice(request: dict, before: int) -> Answer | str:
        if len(request["messages"]) < 2:
            return "yes"
        return next(failures, None) or Answer(text="[[A]]", delay=0.05)

    with ChatEndpoint(fails_twice, key="sk-right") as judge:
        printed, run = compare(*answer_files, judge, data=data, out=tmp_path / "pair", **options)
        with pytest.raises(UserError, match="WRONG_KEY"):
            compare(*answer_files, judge, data=data, out=tmp_path / "other", **options | {"judge_key": "WRONG_KEY"})
    assert not list(failures)
    assert re.search(r"8 requests, 0 answered already; .* at most 0\.00", printed)
    assert (
        len(judge.asked) == 1 + 2 * 2 * 2 + 2 + 1
    )  # a word first; turns, orders, repeats; failures; a word without key
    assert {(request["max_tokens"], request["reasoning_effort"]) for request in judge.asked} == {(64, "low")}
    assert judge.most_at_once == 2
    assert run.results.seeds == {"bootstrap": 5}


def test_a_judge_that_changes_on_the_way_is_said(answer_files, data, tmp_path):
    """As an alias such as gpt-4o does when a new model takes its place."""

    def behave(request, before):
        judge.model = "judge-2024" if len(judge.asked) <= 2 else "judge-2025"
        return "[[A]]"

    with ChatEndpoint(behave) as judge:
        options = {"data": data, "judge_concurrency": 1, "limit": 2}
        _, run = compare(*answer_files, judge, out=tmp_path / "pair", **options)
        compare(*answer_files, judge, out=tmp_path / "pair", **options)  # from the cache
    said = "it calls itself judge-2024 in 2 replies, judge-2025 in 6 replies."
    assert run.results.notes == [f"mt-bench-th-pairwise: The judge changed while it judged: {said}"]
    results, _ = read_run(tmp_path / "pair")
    assert results.notes == run.results.notes
    assert {task.judge_names for task in results.tasks} == {("judge-2024", "judge-2025")}


def test_a_comparison_without_a_verdict_is_no_run(answer_files, data, tmp_path):
    with (
        ChatEndpoint(always("Both are lovely.")) as judge,
        pytest.raises(UserError, match=r"pairwise has no figure\. 8 of the judge's replies hold no verdict"),
    ):
        compare(*answer_files, judge, data=data, out=tmp_path / "pair")
    results, items = read_run(tmp_path / "pair")
    assert not results.finished
    assert items


def test_the_seed_decides_what_is_sampled(checkpoint, data, tmp_path):
    answers = []
    with ChatEndpoint(always("[[7]]")) as judge:
        for seed in (0, 1):
            out = tmp_path / f"run {seed}"
            evaluate("mt-bench-th", judge=judge, model=str(checkpoint), data=data, out=out, seed=seed)
            answers.append((out / "answers-mt-bench-th.jsonl").read_text())
    assert answers[0] != answers[1]


def test_top_p_of_nothing_but_the_likeliest_is_greedy(checkpoint, tmp_path):
    model = load_answering_model(EvalOptions(model=str(checkpoint), device="cpu"), chat=True)
    asker = CheckpointAsker(KeptAnswers(model, tmp_path / "answers.jsonl", 8), "tiny")
    messages = [{"role": "user", "content": "สวัสดี"}]
    sampling = [{"temperature": 0.0}, {"temperature": 20.0, "top_p": 1e-6}, {"temperature": 20.0}]
    greedy, likeliest, sampled = asker.ask([ChatRequest(messages, {"max_tokens": 8, **each}) for each in sampling])
    assert greedy.text == likeliest.text != sampled.text


def test_files_that_cannot_be_compared(answer_files, data, tmp_path):
    first, second = answer_files
    with ChatEndpoint(always("[[A]]")) as judge:
        with pytest.raises(UserError, match="has no conversations to compare"):
            compare(first, second, judge, data=data, suite="hall-bench-small")
        with pytest.raises(UserError, match=r"nothing\.jsonl does not exist"):
            compare(tmp_path / "nothing.jsonl", second, judge, data=data)
        second.write_text('{"id": 99, "answers": ["x"]}\n')
        with pytest.raises(UserError, match="have no answers to the same questions"):
            compare(first, second, judge, data=data, out=tmp_path / "pair")
        second.write_text('{"id": 0, "answers": ["x"]}\n{"id": 1}\n')
        with pytest.raises(UserError, match=r"second\.jsonl, line 2, .*list of texts `answers`"):
            compare(first, second, judge, data=data, out=tmp_path / "pair")


@pytest.mark.slow
def test_the_shared_mt_bench_killed_and_gone_on_with(checkpoint, shared_data, tmp_path):
    """All eighty questions on the command line; SIGKILL in the middle of the judging."""
    with ChatEndpoint(lambda request, before: Answer("[[5]]", delay=0.05)) as judge:
        command = [sys.executable, "-m", "jai", "eval", str(checkpoint), "--suite", "mt-bench-en"]
        command += ["--data", str(shared_data / "eval"), "--out", str(tmp_path / "run"), "--max-new-tokens", "8"]
        command += ["--judge-url", judge.url, "--judge-model", "judge", "--judge-concurrency", "2"]
        process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL)
        while len(judge.asked) < 40:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run(command, check=True, env=os.environ, stdout=subprocess.DEVNULL)
    prompts = list(map(json.dumps, judge.asked))
    assert len(set(prompts)) == 161
    assert len(prompts) <= 163
    results, items = read_run(tmp_path / "run")
    assert results.finished
    assert results.figures[0].value == 5
    assert len(items) == 160


@pytest.mark.slow
def test_transformers_own_server_answers(checkpoint, data, tmp_path):
    """A real server: the same answers at temperature 0 as the checkpoint itself gives."""
    pytest.importorskip("fastapi", reason="needs transformers[serving]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "jai.serve", str(checkpoint), "--device", "cpu", "--port", str(port)]
    with (tmp_path / "log").open("w") as log, ChatEndpoint(always("[[true]]")) as judge:
        server = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=log, stderr=log
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
            shared = {"judge": judge, "model": str(checkpoint), "data": data}
            _, served = evaluate(
                "hall-bench-298",
                **shared,
                out=tmp_path / "served",
                backend="openai",
                base_url=f"http://127.0.0.1:{port}/v1",
            )
        finally:
            server.kill()
            server.wait()
        _, itself = evaluate("hall-bench-298", **shared, out=tmp_path / "itself")
    answers = [(run.folder / "answers-hall-bench-298.jsonl").read_text() for run in (served, itself)]
    assert answers[0] == answers[1]
    assert all(json.loads(line)["answers"][0] for line in answers[0].splitlines())
    assert read_run(served.folder)[0].figures[0].value == 1


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer from {address}:\n{log.read_text()}")
