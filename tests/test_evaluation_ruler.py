# SPDX-License-Identifier: Apache-2.0
"""lm-eval's thirteen tasks of RULER, on texts that stand in for those that they download."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
from evaluation_data import Constant, Knows, short_suite, write_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from jai.evaluation.kept_answers import ANSWERS_FILE, KeptAnswers
from jai.evaluation.measure import SuitePlan, measure_suite, plan_suite
from jai.evaluation.results import EvaluationRun, open_run
from jai.evaluation.suites import Suite, read_suite
from jai.evaluation.tasks import TaskLoader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Two of the suite's four, for lm-eval makes 500 questions of each. One is RULER's shortest: lm-eval gives it, and no
# other, to items of other lengths, as -1.
LENGTHS = {4096: 4096, 8192: 1536}
TASKS = 13
QUESTIONS = 500  # lm-eval makes so many of each task and length


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Essays, SQuAD and HotpotQA in their forms, and Punkt's parameters, of which there are none."""
    folder = tmp_path_factory.mktemp("texts")
    essay = " ".join(f"The cat number {n} sleeps on a chair in the house." for n in range(400))
    write_rows(folder, "baber/paul_graham_essays/train", [{"text": essay}])
    punkt = folder / "nltk/tokenizers/punkt_tab/english"
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).touch()
    paragraphs = [
        {
            "context": f"Town {n} lies by the river {n}. Its mayor is Anna {n}.",
            "qas": [
                {"question": f"Who is mayor of {n}?", "is_impossible": False, "answers": [{"text": f"Anna {n}"}]},
                {"question": "Who?", "is_impossible": True, "answers": []},
            ],
        }
        for n in range(QUESTIONS)
    ]
    squad = {"data": [{"paragraphs": paragraphs[n : n + 2]} for n in range(0, QUESTIONS, 2)]}
    filler = " It lies by the river and has a market." * 2  # where all documents fit, lm-eval mixes up their numbers
    hotpot = [
        {
            "question": f"Whose is {n}?",
            "answer": f"Anna {n}",
            "context": [[f"Town {n}", [f"It is Anna {n}'s.{filler}"]]],
        }
        for n in range(QUESTIONS)
    ]
    for name, content in {"dev-v2.0.json": squad, "hotpot_dev_distractor_v1.json": hotpot}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


class _Downloaded:
    """A response of a server."""

    def __init__(self, path: Path):
        self._path = path

    def raise_for_status(self) -> None:
        pass

    def json(self) -> dict:
        return json.loads(self._path.read_text())


@pytest.fixture
def load(texts, tmp_path, monkeypatch) -> Callable[..., SuitePlan]:
    pytest.importorskip("wonderwords", reason="needs lm-eval[ruler], which the extra eval brings")
    import nltk
    import requests

    monkeypatch.setattr(nltk.data, "path", [str(texts / "nltk")])
    monkeypatch.setattr(requests, "get", lambda url, **_: _Downloaded(texts / url.rpartition("/")[2]))
    monkeypatch.chdir(texts)
    # A word is a token: what lm-eval makes of a length in tokens then does not depend on a small vocabulary.
    words = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    whole = read_suite(str(short_suite("ruler", tmp_path, LENGTHS)))
    first, *others = names = [str(length) for length in LENGTHS.values()]
    means = [{**dataclasses.asdict(mean), "metrics": [name]} for mean, name in zip(whole.means, names)]
    means.append({"name": "mean", "metrics": names})
    folder = Path(lm_eval.tasks.__file__).parent / "ruler"  # else all of lm-eval's tasks are read
    metadata = {"max_seq_lengths": [*LENGTHS.values()], "tokenizer": str(tmp_path / "words")}

    def load(*tasks: str) -> SuitePlan:
        rows = [{"task": row.task, "metric": first, "also": others} for row in whole.tasks]
        rows = [row for row in rows if not tasks or row["task"] in tasks]
        suite = Suite(name="ruler", title="t", about="a", tasks=rows, means=means, metadata=metadata)
        return plan_suite(suite, TaskLoader(include_path=folder, metadata=metadata))

    return load


def measure(plan: SuitePlan, lm, folder: Path) -> EvaluationRun:
    with open_run(folder, model="m", revision="r") as run:
        model = KeptAnswers(lm, folder / ANSWERS_FILE, 8)
        measure_suite(plan, model, run, limit=2, seed=0, tell=lambda task: None)
        run.finish()
    return run


def test_a_model_that_knows_some_answers_gets_that_score(load, tmp_path):
    plan = load()
    run = measure(plan, Knows(), tmp_path / "run")
    by_length = {figure.name: figure for figure in run.results.figures if "tokens" in figure.name}
    assert by_length.keys() == {f"{length} tokens" for length in LENGTHS.values()}
    for figure in by_length.values():
        assert (figure.value, figure.items) == (pytest.approx(0.5), 2 * TASKS)
    (mean,) = [figure for figure in run.results.figures if figure.name == "mean"]
    assert (mean.value, mean.items) == (pytest.approx(0.5), len(LENGTHS) * 2 * TASKS)
    assert {figure.value for figure in measure(plan, Constant(), tmp_path / "constant").results.figures} == {0}


def test_what_is_asked_is_the_same_each_time(load, tmp_path):
    """So a run that was stopped can go on. Of the tasks that draw by Python's generator and by NumPy's."""
    for drawn_before in (0, 1):
        random.seed(drawn_before)
        np.random.seed(drawn_before)
        run = measure(load("niah_single_1", "ruler_vt"), Knows(), tmp_path / "run")  # refuses other questions
    assert len(run.items) == 2 * 2 * len(LENGTHS)
