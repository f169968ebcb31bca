# SPDX-License-Identifier: Apache-2.0
"""`jai eval`: it tells right from wrong in every suite, agrees with lm-eval, goes on where it was stopped, and says
what is wrong with what it is given."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from evaluation_data import (
    CODE_EVAL,
    ITEMS,
    LENGTHS,
    RIGHT,
    WRONG,
    Constant,
    Knows,
    mmlu_subjects,
    share_of_first,
    short_suite,
    write_data,
    write_rows,
)
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from jai.auto import load_causal_model
from jai.errors import UserError
from jai.evaluation.command import evaluate_suites
from jai.evaluation.kept_answers import ANSWERS_FILE, KeptAnswers
from jai.evaluation.long_context import long_context_results
from jai.evaluation.measure import measure_suite, plan_suite
from jai.evaluation.models import load_answering_model
from jai.evaluation.options import EvalOptions
from jai.evaluation.prefix_sharing import PrefixSharingLM
from jai.evaluation.results import (
    ITEMS_FILE,
    RESULTS_FILE,
    EvaluationResults,
    EvaluationRun,
    Figure,
    TaskRecord,
    open_run,
    read_run,
)
from jai.evaluation.suites import JudgedSuite, Suite, read_suite, suite_names
from jai.evaluation.tasks import TASKS_FOLDER, TaskLoader
from jai.hub_card.evaluation import Evaluation, Score, read_evaluation, record_run, write_evaluation

# All that lm-eval measures but its own RULER, which test_evaluation_ruler.py has; judged suites are in
# test_judged_command.py.
LM_EVAL_SUITES = [name for name in suite_names() if isinstance(read_suite(name), Suite) and name != "ruler"]
# 57 subjects of MMLU, and 14; long contexts; programs, of which each test is a process; and what others are like.
SLOW = {"eng-h6-leaderboard", "eng-h6-trillion", "thai-knowledge", "ruler-en", "code", "livecodebench"}
SLOW |= {"mgsm", "onet", "thai-h6-trillion"}
EACH_SUITE = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in LM_EVAL_SUITES]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), mmlu_subjects())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_model: Callable, tiny_tokenizer) -> Path:
    """A JAI with a tokenizer and without a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="session")
def plan_of(data, checkpoint, tmp_path_factory) -> Callable:
    """`plan_of(name)`: a suite with its tasks loaded, once; long contexts are shorter and fewer."""
    plans = {}

    def plan(name):
        if name not in plans:
            suite = read_suite(str(short_suite(name, tmp_path_factory.mktemp("suite"))) if "ruler" in name else name)
            metadata = {**(suite.metadata or {}), "haystack_folder": str(data), "pretrained": str(checkpoint)}
            plans[name] = plan_suite(suite, TaskLoader(data=data, metadata=metadata))
        return plans[name]

    return plan


def measure(plan, lm, folder, limit=None) -> EvaluationRun:
    with open_run(folder, model="m", revision="r") as run:
        model = KeptAnswers(lm, folder / ANSWERS_FILE, 8)
        measure_suite(plan, model, run, limit=limit, seed=0, tell=lambda task: None)
        run.finish()
    return run


def figure_of(run, name, metric=None):
    (figure,) = [each for each in run.results.figures if each.name == name and metric in (None, each.metric)]
    return figure


# --- Right and wrong ---


@pytest.fixture
def programs_may_run(tmp_path, monkeypatch) -> None:
    """The metric of HumanEval and MBPP, which is downloaded else, lies in the working folder."""
    (tmp_path / "code_eval").mkdir()
    (tmp_path / "code_eval/code_eval.py").write_text(CODE_EVAL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


@pytest.mark.parametrize("name", EACH_SUITE)
@pytest.mark.usefixtures("programs_may_run")
def test_a_model_gets_what_it_knows(plan_of, tmp_path, name):
    """All of the answers, none of them, and some: each question has the score that it should have."""
    plan = plan_of(name)
    pairs = {pair.name for pair in plan.suite.pairs}
    for part, known in {
        "oracle": lambda number: True,
        "negation": lambda number: False,
        "some": lambda number: number % 2 == 0,
    }.items():
        run = measure(plan, Knows(known), tmp_path / part)
        items = [item for item in run.items.values() if item.task not in pairs]
        expected = [float(known(int(item.id.partition(".")[0]))) for item in items]
        assert [item.score for item in items] == pytest.approx(expected, abs=1e-9)
        figures = [figure for figure in run.results.figures if figure.name not in pairs]
        assert len({figure.name for figure in figures}) >= len(plan.suite.tasks)
        for figure in figures:
            assert figure.low <= figure.value <= figure.high
            assert {"oracle": figure.value > 1 - 1e-9, "negation": figure.value < 1e-9}.get(part, 0 < figure.value < 1)
        for figure in run.results.figures:  # what it knows it knows in both languages
            assert figure.name not in pairs or figure.value == (figure.metric == "E(T)→T(T)")


SIX = {"ARC": 1 / 4, "HellaSwag": share_of_first(3, 4), "MMLU": share_of_first(2, 4), "TruthfulQA": 1 / 3}
SIX |= {"WinoGrande": 1 / 2, "GSM8K": 0}
# Shares of the questions whose first choice is right. What is answered in words has no chance.
CHANCE = {
    **{f"{language}-h6-{shots}": SIX for language in ("eng", "thai") for shots in ("leaderboard", "trillion")},
    "onet": {row.label: share_of_first(ITEMS["onet"], 4) for row in read_suite("onet").tasks},
    "thai-exam": {row.label: 1 / 5 for row in read_suite("thai-exam").tasks},
    "thai-knowledge": {"MMLU-ProX": 0, "Global PIQA parallel": 1 / 4, "Global PIQA": 1 / 2},
    "thai-nlu": {"belebele_tha_Thai": 1 / 4, "xcopa_th": 1 / 2, "xquad_th": 0},
}


@pytest.mark.parametrize("name", EACH_SUITE)
@pytest.mark.usefixtures("programs_may_run")
def test_a_model_that_always_says_the_same_gets_chance(plan_of, tmp_path, name):
    plan = plan_of(name)
    run = measure(plan, Constant(), tmp_path / "run")
    for row in plan.suite.tasks:
        chance = CHANCE.get(name, {}).get(row.label, 0)
        kinds = {task.OUTPUT_TYPE for task in plan.tasks[row.label]}
        assert kinds == {"multiple_choice" if chance else "generate_until"}  # each suite of choices is in the table
        for metric in row.metrics:
            for figure in (each for each in run.results.figures if (each.name, each.metric) == (row.label, metric)):
                assert figure.value == pytest.approx(chance)


def six_scores():
    return [
        -(-ITEMS[name] // 2) / ITEMS[name] for name in ("arc", "hellaswag", "mmlu", "truthfulqa", "winogrande", "gsm8k")
    ]


def test_the_mean_of_h6_is_over_the_six(plan_of, tmp_path):
    run = measure(plan_of("thai-h6-leaderboard"), Knows(), tmp_path / "run")
    assert figure_of(run, "mean").value == pytest.approx(sum(six_scores()) / 6)


@pytest.mark.slow
def test_the_mean_of_mmlu_is_over_its_subjects(plan_of, tmp_path):
    run = measure(plan_of("eng-h6-leaderboard"), Knows(), tmp_path / "run")
    assert figure_of(run, "MMLU").items == 57 * ITEMS["mmlu"]
    assert figure_of(run, "mean").value == pytest.approx(sum(six_scores()) / 6)


def test_means_over_tasks_and_over_questions_differ_where_tasks_have_other_sizes(data, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data / "scb10x", folder / "scb10x")
    path = folder / "scb10x/thai_exam/onet/test.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    plan = plan_suite(read_suite("thai-exam"), TaskLoader(data=folder))
    run = measure(plan, Knows(), tmp_path / "run")
    assert figure_of(run, "mean over subsets").value == pytest.approx((1 + 4 * 3 / 5) / 5)
    assert figure_of(run, "mean over questions").value == pytest.approx((1 + 4 * 3) / (1 + 4 * 5))


@pytest.mark.parametrize(("over", "mean"), [("tasks", (1 + 3 / 5) / 2), ("items", (1 + 3) / 6)])
def test_the_mean_of_a_group_is_over_its_tasks_or_its_questions(data, tmp_path, over, mean):
    """Alone, and in the mean of the suite: of one question that is known, and of five of which three are."""
    folder = tmp_path / "data"
    shutil.copytree(data / "scb10x", folder / "scb10x")
    path = folder / "scb10x/thai_exam/onet/test.jsonl"
    path.write_text(path.read_text().split("\n")[0] + "\n")
    (tmp_path / "exams.yaml").write_text("group: exams\ntask: [thai_exam_onet, thai_exam_ic]\n")
    rows = [{"task": "exams", "metric": "acc", "mean": over}]
    suite = Suite(name="s", title="t", about="a", tasks=rows, means=[{"name": "all", "over": "tasks"}])
    run = measure(plan_suite(suite, TaskLoader(data=folder, include_path=tmp_path)), Knows(), tmp_path / "run")
    assert figure_of(run, "exams").value == pytest.approx(mean)
    assert figure_of(run, "all").value == pytest.approx(mean)


def test_questions_on_one_passage_are_one_for_the_interval(plan_of, tmp_path):
    run = measure(plan_of("thai-nlu"), Knows(), tmp_path / "run")
    figure = figure_of(run, "belebele_tha_Thai")
    assert (figure.value, figure.low, figure.high) == (0.5, 0.5, 0.5)  # one of the two on each passage is known
    apart = figure_of(run, "xcopa_th")
    assert apart.low < 0.5 < apart.high


def test_a_figure_for_each_length_beside_the_mean(plan_of, tmp_path):
    run = measure(plan_of("ruler-th"), Knows(), tmp_path / "run")
    for name in [*(f"{length} tokens" for length in LENGTHS.values()), "mean"]:
        assert figure_of(run, name).value == pytest.approx(0.5)
    assert figure_of(run, "mean").items == 4 * figure_of(run, "1536 tokens").items == 4 * 6 * 2


def test_thai_digits_are_digits_in_long_contexts():
    doc = {"outputs": ["1234567", "7654321"], "max_length": 4096}
    assert long_context_results(doc, ["คือ ๑๒๓๔๕๖๗"]) == {"4096": 0.5}
    assert long_context_results(doc, ["๗๖๕๔๓๒๑ และ 1234567"]) == {"4096": 1}
    assert long_context_results(doc, ["123\u200b4567 และ 76543210"]) == {"4096": 1}
    words = {"outputs": ["น้ำ", "ทำ"], "max_length": 4096}
    assert long_context_results(words, ["น\u0e4d\u0e49าและท\u0e4dา"]) == {"4096": 1}  # sara am in its other form


class KnowsFewer(Knows):
    """Finds one of what was asked for in the shortest context, one more in the next, and so on."""

    def generate_until(self, requests):
        found = {length: number for number, length in enumerate(LENGTHS.values(), 1)}
        return [" ".join(request.doc["outputs"][: found[request.doc["max_length"]]]) for request in requests]


def test_each_length_has_its_own_figure_in_each_task(plan_of, tmp_path):
    """Of the six kinds by what they ask for: one needle or four, five variables, ten words."""
    run = measure(plan_of("ruler-th"), KnowsFewer(), tmp_path / "run")
    asked = {"single": 1, "multikey": 1, "multivalue": 4, "multiquery": 4, "chain": 5, "common": 10}
    for number, length in enumerate(LENGTHS.values(), 1):
        shares = {kind: min(number, count) / count for kind, count in asked.items()}
        for kind, share in shares.items():
            assert figure_of(run, f"ruler_th_{kind}", str(length)).value == pytest.approx(share)
        assert figure_of(run, f"{length} tokens").value == pytest.approx(sum(shares.values()) / 6)


def test_a_limit_takes_questions_of_each_length(plan_of, tmp_path):
    whole = measure(plan_of("ruler-th"), Knows(), tmp_path / "whole")
    some = measure(plan_of("ruler-th"), Knows(), tmp_path / "some", limit=1)
    assert len(some.items) == len(whole.items) / 2 == 6 * 4
    assert {item.id for item in some.items.values()} == {"0", "2", "4", "6"}  # the first of the two of each length
    for key, item in some.items.items():
        assert whole.items[key].texts["expected"] == item.texts["expected"]


# --- Agreement with lm-eval ---


@pytest.fixture(scope="session")
def lm(checkpoint) -> HFLM:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=8, backend="causal")


def test_scores_are_those_of_lm_eval_to_the_last_digit(data, plan_of, lm, tmp_path):
    """Of our tasks as lm-eval loads them by --include_path, with the data named in their YAML."""
    subsets = ("onet", "ic", "tgat", "tpat1", "a_level")
    for subset in subsets:
        folder = data / "scb10x/thai_exam" / subset
        (tmp_path / f"{subset}.yaml").write_text(
            f"include: {TASKS_FOLDER}/thai_exam/thai_exam_{subset}.yaml\ntask: plain_{subset}\n"
            f"dataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}\n"
        )
    theirs = simple_evaluate(
        model=lm,
        tasks=[f"plain_{subset}" for subset in subsets],
        task_manager=TaskManager(include_path=tmp_path, include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    run = measure(plan_of("thai-exam"), lm, tmp_path / "run")
    for subset in subsets:
        assert figure_of(run, f"thai_exam_{subset}").value == theirs[f"plain_{subset}"]["acc,none"]


def test_a_checkpoint_end_to_end(checkpoint, data, tmp_path, capsys):
    """By the function of the command, with the shared prefixes; what lm-eval's loop gives is the same."""
    out = tmp_path / "run"
    options = EvalOptions(model=str(checkpoint), out=out, data=data, limit=3, batch_size=4)
    evaluate_suites(options, [read_suite("thai-exam"), read_suite("thai-nlu")])
    results, items = read_run(out)
    assert results.finished
    assert {(task.suite, task.task, task.shots) for task in results.tasks} >= {
        ("thai-exam", "thai_exam_onet", 5),
        ("thai-nlu", "belebele_tha_Thai", 0),
    }
    assert results.conditions["limit"] == 3
    assert len(results.revision) == 64
    assert {"jai-llm", "lm-eval", "torch", "transformers"} <= results.versions.keys()
    assert len({task.prompt_hash for task in results.tasks}) == 4  # the five exams ask the same here
    assert len(items) == 5 * 3 + 3 + 3 + 2 * 3
    assert all(item.texts["expected"] for item in items)
    printed = capsys.readouterr().out
    assert "mean over subsets" in printed
    assert f"jai eval compare {out}" in printed


def test_the_choice_of_the_shared_prefixes_is_that_of_lm_evals_loop(checkpoint, lm, plan_of, data, tmp_path):
    options = EvalOptions(model=str(checkpoint), out=tmp_path / "ours", data=data, batch_size=4)
    ours = evaluate_suites(options, [read_suite("thai-exam")])
    theirs = measure(plan_of("thai-exam"), lm, tmp_path / "theirs")
    assert {key: (item.score, item.texts) for key, item in ours.items.items()} == {
        key: (item.score, item.texts) for key, item in theirs.items.items()
    }


@pytest.mark.slow
def test_whole_suites_on_the_shared_data(checkpoint, shared_data, tmp_path):
    options = EvalOptions(model=str(checkpoint), out=tmp_path / "run", data=shared_data / "eval", max_length=512)
    run = evaluate_suites(options, [read_suite("thai-exam"), read_suite("onet")])
    assert figure_of(run, "mean over subsets").items == 565
    (questions,) = [each for each in run.results.figures if each.suite == "onet" and each.name == "M6"]
    assert questions.items + figure_of(run, "M3").items == 334
    options = EvalOptions(model=str(checkpoint), out=tmp_path / "nlu", data=shared_data / "eval", limit=20)
    run = evaluate_suites(options, [read_suite("thai-nlu")])
    assert figure_of(run, "mean").items == 3 * 20


# --- Interruption ---


class Stops(Knows):
    """Stops after some calls."""

    def __init__(self, calls: int):
        super().__init__()
        self.calls = calls

    def loglikelihood(self, requests):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        return super().loglikelihood(requests)


def test_a_stopped_run_goes_on_with_what_is_there(plan_of, tmp_path):
    whole = measure(plan_of("thai-nlu"), Knows(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measure(plan_of("thai-nlu"), Stops(1), tmp_path / "stopped")
    results, items = read_run(tmp_path / "stopped")
    assert not results.finished
    assert len(items) == 8  # of Belebele, and none of the tasks after it
    lm = Stops(1)
    measure(plan_of("thai-nlu"), lm, tmp_path / "stopped")
    assert lm.calls == 0  # XCOPA alone was asked
    for name in (ITEMS_FILE, RESULTS_FILE):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert whole.results.finished


def test_other_questions_do_not_mix_with_those_of_an_earlier_run(plan_of, data, tmp_path):
    plan = plan_of("thai-exam")
    measure(plan, Knows(), tmp_path / "run")
    folder = tmp_path / "data"
    shutil.copytree(data / "scb10x", folder / "scb10x")
    path = folder / "scb10x/thai_exam/onet/test.jsonl"
    path.write_text(path.read_text().replace("ข้อ 0", "ข้อ ศูนย์"))
    changed = plan_suite(read_suite("thai-exam"), TaskLoader(data=folder))
    with pytest.raises(UserError, match="has thai_exam_onet with other questions"):
        measure(changed, Knows(), tmp_path / "run")


def test_answers_are_kept_by_batches(tmp_path, data):
    """A run that stops within a task asks only the batches again that were not answered."""
    rows = [
        {"premise": f"เรื่อง {n}.", "choice1": "ก", "choice2": "ข", "question": "cause", "label": 0} for n in range(40)
    ]
    write_rows(tmp_path / "data", "cambridgeltl/xcopa/th/test", rows)
    suite = Suite(name="s", title="t", about="a", tasks=[{"task": "xcopa_th", "metric": "acc"}])
    plan = plan_suite(suite, TaskLoader(data=tmp_path / "data"))
    with pytest.raises(KeyboardInterrupt):
        measure(plan, Stops(1), tmp_path / "run")
    kept = (tmp_path / "run" / ANSWERS_FILE).read_text().splitlines()
    assert len(kept) == 64  # eight batches of eight
    with (tmp_path / "run" / ANSWERS_FILE).open("a") as file:
        file.write('["torn')
    lm = Stops(1)
    run = measure(plan, lm, tmp_path / "run")
    assert len(run.items) == 40
    assert lm.calls == 0


def test_an_answer_is_kept_for_its_question_and_its_choice(tmp_path):
    """Data whose choices have changed is asked anew."""

    def asked(choice):
        return Instance("loglikelihood", {}, ("ข้อ 1", choice), 0, ("task", 0, 1))

    for model, choice, expected in ((Knows(), RIGHT, -1), (Constant(), WRONG, -1), (Knows(), WRONG, -1)):
        kept = KeptAnswers(model, tmp_path / ANSWERS_FILE, 8)
        assert kept.loglikelihood([asked(choice)]) == [(expected, False)]
    assert len((tmp_path / ANSWERS_FILE).read_text().splitlines()) == 2


def test_sampled_answers_go_on_as_they_would_have_been(tmp_path):
    """Each batch draws by the seed and its own questions, whichever were answered before it."""

    class Draws(Constant):
        def generate_until(self, requests):
            return [f"{torch.rand(1, dtype=torch.float64).item():.15f}" for _ in requests]

    def answers(path, seed):
        kept = KeptAnswers(Draws(), path, 1)
        kept.seed = seed
        return kept.generate_until([Instance("generate_until", {}, (f"{n:02}", {}), 0, ("t", n, 1)) for n in range(20)])

    whole = answers(tmp_path / "whole", 1)
    assert len(set(whole)) == 20
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    for kept in (3, 8, 13):  # killed inside of a batch of eight, and after one
        (tmp_path / "killed").write_text("".join(lines[:kept]))
        assert answers(tmp_path / "killed", 1) == whole
    assert not {*answers(tmp_path / "other", 2)} & {*whole}


def test_what_was_answered_stays_when_its_batch_is_asked_again(tmp_path):
    """As that of sampled answers, which a model may give anew."""

    class Moody(Knows):
        def generate_until(self, requests):
            Moody.calls += 1
            return [f"{request.args[0]} in call {Moody.calls}" for request in requests]

    def ask(*contexts):
        kept = KeptAnswers(Moody(), tmp_path / ANSWERS_FILE, 8)
        return kept.generate_until(
            [Instance("generate_until", {}, (each, {"max_gen_toks": 4}), 0) for each in contexts]
        )

    Moody.calls = 0
    assert ask("a") == ["a in call 1"]
    assert ask("a", "b") == ["a in call 1", "b in call 2"]
    assert ask("b", "a") == ["b in call 2", "a in call 1"]
    assert len((tmp_path / ANSWERS_FILE).read_text().splitlines()) == 2


def test_questions_on_one_passage_are_asked_together(tmp_path):
    asked = []

    class Notes(Knows):
        def loglikelihood(self, requests):
            asked.append({request.args[0][0] for request in requests})
            return [(0.0, False)] * len(requests)

    pairs = [(f"{passage} {number}", choice) for number in range(8) for passage in "abcd" for choice in "xy"]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    KeptAnswers(Notes(), tmp_path / ANSWERS_FILE, 2).loglikelihood(requests)  # sixteen at a time
    assert asked == [{"a"}, {"b"}, {"c"}, {"d"}]


@pytest.mark.slow
def test_a_killed_process_goes_on_and_ends_as_one_that_was_not(checkpoint, data, tmp_path):
    """By the command line, whose first word after `eval` is the checkpoint."""

    def start(out):
        command = [sys.executable, "-m", "jai", "eval", str(checkpoint), "--suite", "thai-exam", "--data", str(data)]
        return subprocess.Popen([*command, "--out", str(out), "--batch-size", "1"], stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    process = start(tmp_path / "killed")
    answers = tmp_path / "killed" / ANSWERS_FILE
    deadline = time.monotonic() + 120
    while not (answers.exists() and len(answers.read_bytes().splitlines()) > 20):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not read_run(tmp_path / "killed")[0].finished
    assert start(tmp_path / "killed").wait() == 0
    for name in (ITEMS_FILE, RESULTS_FILE):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- What is wrong with what is given ---


SERVER = {"backend": "openai", "base_url": "http://h/v1"}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"backend": "openai"}, "needs --base-url"),
        ({"base_url": "http://h/v1"}, "--base-url is for --backend openai; the backend is hf"),
        ({"tokenizer": "t"}, "--tokenizer does nothing with --backend hf"),
        ({**SERVER, "device": "cpu"}, "--device does nothing with --backend openai"),
        ({**SERVER, "dtype": "float16"}, "--dtype does nothing with --backend openai"),
        ({**SERVER, "parallelize": True}, "--parallelize does nothing with --backend openai"),
        ({"backend": "vllm", "device": "cuda:1"}, "--device does nothing with --backend vllm"),
        ({"parallelize": True, "device": "cuda:1"}, "--parallelize takes all GPUs, and --device cuda:1 is one"),
        ({"card": True}, "--card writes into the checkpoint's folder, and owner/name is none"),
        ({"data": Path("nowhere")}, "--data nowhere is not a folder"),
        ({"include_path": Path("nowhere")}, "--include-path nowhere is not a folder"),
    ],
)
def test_options_that_do_nothing_or_do_not_go_together(options, problem):
    with pytest.raises(UserError, match=problem):
        EvalOptions(model="owner/name", **options).check()
    EvalOptions(model="owner/name", **SERVER, tokenizer="t").check()


def test_options_reach_the_model(checkpoint):
    options = EvalOptions(model=str(checkpoint), dtype="bfloat16", max_length=77, batch_size=3, device="meta")
    loaded = load_answering_model(options, chat=False)
    assert (loaded.model.dtype, loaded.max_length, loaded.batch_size) == (torch.bfloat16, 77, 3)
    assert loaded.model.device.type == "meta"


def test_parallelize_limit_and_seed_are_passed_on(checkpoint, data, tmp_path, monkeypatch):
    given = {}

    def noting(real: Callable) -> Callable:
        return lambda *args, **options: given.update(options) or real(*args, **options)

    monkeypatch.setattr("jai.evaluation.models.load_causal_model", noting(load_causal_model))
    monkeypatch.setattr("jai.evaluation.command.measure_suite", noting(measure_suite))
    options = options_of(checkpoint, tmp_path, parallelize=True, data=data, limit=1, seed=7)
    evaluate_suites(options, [read_suite("thai-exam")])
    assert (given["device_map"], given["limit"], given["seed"]) == ("auto", 1, 7)


def options_of(checkpoint, tmp_path, **given):
    return EvalOptions(model=str(checkpoint), out=tmp_path / "run", **given)


def test_a_missing_file_is_named(checkpoint, tmp_path, data):
    folder = tmp_path / "data"
    shutil.copytree(data / "scb10x", folder / "scb10x")
    (folder / "scb10x/thai_exam/ic/train.jsonl").unlink()
    with pytest.raises(UserError, match=r"5 examples from its train split.*scb10x/thai_exam/ic/train"):
        evaluate_suites(options_of(checkpoint, tmp_path, data=folder), [read_suite("thai-exam")])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 2"),
        ('["a"]', "not a JSON object"),
        ('{"question": "ก", "choices": {"a": "1"}}', "without 'answer'"),
        ('{"question": "ก", "choices": {"a": "1"}, "answer": "\udcff"}', "line 2"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, problem):
    good = json.dumps({"question": "ก", "choices": {"a": "1", "b": "2"}, "answer": "a"})
    path = tmp_path / "thai_exam_onet_test.jsonl"
    path.write_bytes(f"{good}\n{line}\n".encode(errors="surrogateescape"))
    (tmp_path / "thai_exam_onet_train.jsonl").write_text(good + "\n")
    with pytest.raises(UserError, match=rf"thai_exam_onet_test.jsonl, line 2, .*{problem}|{problem}, "):
        TaskLoader(data=tmp_path).load("thai_exam_onet", shots=0)


def test_programs_run_only_where_that_is_allowed(checkpoint, tmp_path):
    with pytest.raises(UserError, match="--allow-code-execution"):
        evaluate_suites(options_of(checkpoint, tmp_path), [read_suite("code")])


def test_a_chat_suite_needs_a_chat_template(checkpoint, tmp_path, data):
    suite = Suite(name="s", title="t", about="a", chat=True, tasks=[{"task": "xquad_th", "metric": "f1"}])
    with pytest.raises(UserError, match="has no chat template"):
        evaluate_suites(options_of(checkpoint, tmp_path, data=data), [suite])


@pytest.mark.slow
def test_a_task_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="There is no task 'thai_exma'"):
        TaskLoader(include_path=tmp_path).load("thai_exma")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"metric": "f1"}, r"xcopa_th has no metric 'f1'\. It has: acc"),
        ({"metric": "acc", "also": ["f1"]}, r"xcopa_th has no metric 'f1'\. It has: acc"),
        ({"metric": "acc", "filter": "strict"}, r"xcopa_th has no filter 'strict'\. It has: none"),
        ({"metric": "acc", "shots": 9}, "xcopa_th takes 9 examples"),
        (
            {"metric": "acc", "settings": {"doc_to_txt": "x"}},
            r"xcopa_th cannot .*the settings \(doc_to_txt\)",
        ),
    ],
)
def test_what_a_task_does_not_have_is_refused_before_the_model_answers(data, row, problem):
    suite = Suite(name="s", title="t", about="a", tasks=[{"task": "xcopa_th", **row}])
    with pytest.raises(UserError, match=problem):
        plan_suite(suite, TaskLoader(data=data))


def test_a_task_takes_no_more_examples_than_there_are(data):
    loader = TaskLoader(data=data)
    assert loader.load("thai_exam_onet", shots=5)
    with pytest.raises(UserError, match="thai_exam_onet takes 6 examples before a question, of 5 that there are"):
        loader.load("thai_exam_onet", shots=6)
    questions = len(loader.load("belebele_tha_Thai", shots=0)[0].eval_docs)
    assert loader.load("belebele_tha_Thai", shots=questions - 1)  # a question is no example of its own
    with pytest.raises(UserError, match=f"of {questions} that there are"):
        loader.load("belebele_tha_Thai", shots=questions)


def test_a_setting_that_the_model_does_not_know(lm, data, tmp_path):
    settings = {"generation_kwargs": {"max_gen_tokens": 5}}
    suite = Suite(name="s", title="t", about="a", tasks=[{"task": "xquad_th", "metric": "f1", "settings": settings}])
    model = PrefixSharingLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=8, backend="causal")
    with pytest.raises(UserError, match=r"xquad_th cannot be asked: .*max_gen_tokens.* Fix its generation_kwargs"):
        measure(plan_suite(suite, TaskLoader(data=data)), model, tmp_path / "run", limit=1)


def test_a_tokenizer_without_begin_and_end(checkpoint, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": None, "eos_token": None}))
    with pytest.raises(UserError, match="has neither a token that begins a text nor one that ends it"):
        load_answering_model(EvalOptions(model=str(folder)), chat=False)


def test_a_metric_that_a_tasks_own_function_does_not_give(data, tmp_path):
    suite = Suite(name="s", title="t", about="a", tasks=[{"task": "xquad_th", "metric": "bleu"}])
    plan = plan_suite(suite, TaskLoader(data=data))
    with pytest.raises(UserError, match=r"xquad_th has no metric 'bleu'\. It has: exact_match, f1"):
        measure(plan, Knows(), tmp_path / "run")


def test_choices_that_are_alike_are_counted(data, tmp_path):
    folder = tmp_path / "data"
    rows = [
        {"premise": f"{number}", "choice1": "a", "choice2": "ab"[number % 2], "question": "cause", "label": 1}
        for number in range(4)
    ]
    for split in ("validation", "test"):
        write_rows(folder, f"cambridgeltl/xcopa/th/{split}", rows)
    suite = Suite(name="s", title="t", about="a", tasks=[{"task": "xcopa_th", "metric": "acc"}])
    run = measure(plan_suite(suite, TaskLoader(data=folder)), Knows(), tmp_path / "run")
    assert run.results.notes == ["xcopa_th: questions with two choices alike, of which the first counts as chosen: 2."]


def test_a_metric_that_is_no_mean(data, tmp_path):
    """Its figure would be another than lm-eval's."""
    (tmp_path / "middle.yaml").write_text(
        f"include: {TASKS_FOLDER}/thai_exam/thai_exam_onet.yaml\ntask: middle\n"
        "metric_list: [{metric: acc, aggregation: median, higher_is_better: true}]\n"
    )
    suite = Suite(name="s", title="t", about="a", tasks=[{"task": "middle", "metric": "acc"}])
    plan = plan_suite(suite, TaskLoader(data=data, include_path=tmp_path))
    with pytest.raises(UserError, match="The metric 'acc' of middle is not a mean over its items"):
        measure(plan, Knows(), tmp_path / "run")


@pytest.mark.parametrize(("name", "value"), [("filter", "second"), ("scale", 2.0), ("version", None)])
def test_a_run_does_not_go_on_where_its_suite_scores_otherwise(data, tmp_path, name, value):
    """The outcomes that are there would stay, under the new suite's name."""
    task = f"include: {TASKS_FOLDER}/reasoning/mgsm_final_th.yaml\ntask: read_twice\nfilter_list:\n"
    task += "".join(f"  - {{name: {each}, filter: [{{function: take_first}}]}}\n" for each in ("first", "second"))
    row = {"task": "read_twice", "metric": "exact_match"}

    def run(version: int, **changes) -> EvaluationRun:
        (tmp_path / "read_twice.yaml").write_text(f"{task}metadata: {{version: {version}}}\n")
        suite = Suite(name="s", title="t", about="a", tasks=[{**row, **changes}])
        return measure(plan_suite(suite, TaskLoader(data=data, include_path=tmp_path)), Knows(), tmp_path / "run")

    assert run(1).results.tasks[0].filter == "first"
    with pytest.raises(UserError, match=f"has read_twice with another {name}: it was"):
        run(1, **{name: value}) if value else run(2)


def test_rows_that_are_left_out_are_counted(plan_of, tmp_path):
    run = measure(plan_of("onet"), Knows(), tmp_path / "run")
    assert "onet_m3_thai leaves out 1 of the 4 rows of its data." in run.results.notes


def test_what_is_too_long_is_counted_or_refused(lm, plan_of, tmp_path):
    short = PrefixSharingLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=8, backend="causal", max_length=128)
    run = measure(plan_of("thai-exam"), short, tmp_path / "run", limit=1)
    assert (
        "thai_exam_onet: requests that are longer than the model takes and lost their beginning: 5."
        in run.results.notes
    )
    with pytest.raises(UserError, match="xquad_th lets the model write 256 tokens, and the model takes 128"):
        measure(plan_of("thai-nlu"), short, tmp_path / "nlu", limit=1)


# --- The card ---


def test_the_card_shows_the_figures_with_their_intervals(plan_of, tmp_path):
    before = Score("acc", "something", "owner/data", "Other data", "en", True, {"tiny": 0.5})
    (tmp_path / "tiny").mkdir()
    write_evaluation(tmp_path / "tiny", Evaluation("tiny", ["tiny"], [before]))
    run = measure(plan_of("thai-exam"), Knows(), tmp_path / "run")
    for _ in range(2):  # again, the figures take the place of their own
        record_run(tmp_path / "tiny", run.results, [read_suite("thai-exam")])
    evaluation = read_evaluation(tmp_path / "tiny")
    assert len(evaluation.scores) == 1 + 5 + 2
    (mean,) = [score for score in evaluation.scores if score.metric_name.endswith("mean over questions")]
    figure = figure_of(run, "mean over questions")
    assert (mean.values, mean.intervals) == ({"tiny": figure.value}, {"tiny": [figure.low, figure.high]})
    assert {score.dataset for score in evaluation.scores} == {"owner/data", "scb10x/thai_exam", "thai-exam"}
    assert len(evaluation.results()) == 8


def card_of(folder: Path, suite: Suite | JudgedSuite, figures, task="t", limit=None, **record) -> dict[str, Score]:
    """The scores that a run writes for a card, by their names."""
    results = EvaluationResults("m", "r", {"limit": limit})
    results.tasks = [TaskRecord(suite.name, task, "1", "0", **record)]
    results.figures = [Figure(suite.name, *name, 0.5, 0.25, 0.75, 9) for name in figures]
    folder.mkdir(exist_ok=True)
    record_run(folder, results, [suite])
    return {score.metric_name: score for score in read_evaluation(folder).scores}


def test_the_card_says_whose_judgement_it_is_and_how_many_questions_there_were(tmp_path):
    suite = read_suite("mt-bench-th")
    title, figures = suite.title, [("all turns", "grade"), ("math", "grade")]
    hub = {"task": "math", "judge": "gpt-x", "data": f"{suite.dataset}, split train"}
    cards = card_of(tmp_path / "c", suite, figures, limit=20, **hub)
    assert list(cards) == [
        f"{title}, {name}, judged by gpt-x, the first 20 questions" for name in ("all turns", "math")
    ]
    assert {score.dataset for score in cards.values()} == {suite.dataset}
    whole = card_of(tmp_path / "c", suite, figures, task="math", judge="gpt-x", data="mt_bench_th.jsonl")
    assert list(whole) == [f"{title}, {name}, judged by gpt-x" for name in ("all turns", "math")]  # in their place
    assert {score.dataset for score in whole.values()} == {"mt-bench-th"}
    exam = card_of(tmp_path / "e", read_suite("thai-exam"), [("mean over questions", "acc")], limit=3)
    assert [name.partition(", mean over questions, ")[2] for name in exam] == ["the first 3 questions of each task"]


@pytest.mark.parametrize(
    ("suite", "name", "metrics"),
    [("hall-bench", "all questions", ("correct", "facts")), ("consistency", "MGSM", ("E(T)→T(T)", "T(F)→E(T)"))],
)
def test_figures_of_one_name_are_told_apart_on_the_card(tmp_path, suite, name, metrics):
    cards = card_of(tmp_path / "c", read_suite(suite), [(name, metric) for metric in metrics])
    assert list(cards) == [f"{read_suite(suite).title}, {name}, {metric}" for metric in metrics]


# --- Suites ---


def suite_errors() -> Iterator:
    row = {"task": "t", "metric": "acc"}
    base = {"title": "t", "about": "a", "tasks": [row]}
    yield {**base, "taks": []}, "'taks'"
    yield {"title": "t", "about": "a"}, "lacks 'tasks'"
    yield {**base, "tasks": []}, "has no tasks"
    yield {**base, "tasks": [{"task": "t"}]}, "task 1 lacks 'metric'"
    yield {**base, "tasks": [{**row, "shots": -1}]}, "shots is -1"
    yield {**base, "tasks": [row, row]}, "two rows are named 't'"
    yield {**base, "tasks": ["t"]}, "task 1 is 't'"
    yield {**base, "means": [{"name": "m", "over": "subsets"}]}, "over is 'subsets'"
    yield {**base, "means": [{"name": "m", "rows": ["u"]}]}, "'u', which is not a row"
    yield {**base, "means": [{"name": "m", "metrics": ["f1"]}]}, "'f1', which the row 't'"


@pytest.mark.parametrize(("content", "problem"), suite_errors(), ids=lambda each: each if isinstance(each, str) else "")
def test_what_is_wrong_in_a_suite_is_named(tmp_path, content, problem):
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"In .*mine\.yaml, .*{problem}"):
        read_suite(str(path))


def test_a_suite_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("title: t\nabout: a\ntasks: [{task: xcopa_th, metric: acc}]\n")
    assert read_suite(str(path)).name == "mine"
    with pytest.raises(UserError, match="There is no suite 'thai-exma'"):
        read_suite("thai-exma")
