# SPDX-License-Identifier: Apache-2.0
"""Cross-lingual consistency: the three shares by hand, of a model that knows some answers, and what is refused."""

import pytest
from test_evaluation_generation import SHARED, KnowingModel, needs_shared_data, rows_of, write_rows

from jai.errors import UserError
from jai.evaluation.consistency import parallel_answers
from jai.evaluation.kept_answers import KeptAnswers
from jai.evaluation.measure import measure_suite, plan_suite
from jai.evaluation.results import Item, open_run, read_run
from jai.evaluation.suites import read_suite
from jai.evaluation.tasks import TaskLoader

SHARES = ("E(T)→T(T)", "T(F)→E(T)", "E(F)→T(T)")


def answers(scores, **columns):
    """Outcomes with their rows; a column is given as its cells."""
    cells = [dict(zip(columns, row)) for row in zip(*columns.values())] or [{}] * len(scores)
    return [
        (Item("s", "t", str(number), "exact_match", score, f"paragraph {number // 2}"), row)
        for number, (score, row) in enumerate(zip(scores, cells))
    ]


def shares(items):
    return {
        name: [item.score for item in items if item.metric == name]
        for name in dict.fromkeys(item.metric for item in items)
    }


def test_the_shares_are_those_of_the_formulae():
    english, thai = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    items = list(parallel_answers(answers(english), answers(thai), key=None, same=None).items("pair"))
    assert shares(items) == {"E(T)→T(T)": [1, 0, 1], "T(F)→E(T)": [1, 0, 0, 0], "E(F)→T(T)": [1, 0, 0, 0]}
    assert {item.task for item in items} == {"pair"}
    assert [item.group for item in items if item.metric == "E(T)→T(T)"] == ["paragraph 0", "paragraph 0", "paragraph 1"]


def test_questions_are_paired_by_their_key():
    english = answers([1.0, 0.0, 1.0], id=["a", "b", "c"])
    thai = answers([0.0, 1.0, None, 1.0], id=["b", "a", "c", "d"])
    pairs = parallel_answers(english, thai, key="id", same=None)
    assert pairs.unpaired == 2  # c has no score in Thai, d is not there in English
    assert shares(list(pairs.items("pair"))) == {"E(T)→T(T)": [1], "T(F)→E(T)": [0], "E(F)→T(T)": [0]}


def test_what_is_not_parallel_is_refused():
    english, thai = (
        answers([1.0, 0.0], id=["a", "b"], gold=["1", "2"]),
        answers([1.0, 0.0], id=["a", "a"], gold=["1", "3"]),
    )
    with pytest.raises(UserError, match="Two questions have the id 'a'"):
        parallel_answers(english, thai, key="id", same=None)
    with pytest.raises(UserError, match="Question 1 has the gold '2' in English and '3' in Thai"):
        parallel_answers(english, thai, key=None, same="gold")
    with pytest.raises(UserError, match=r"no column 'number' to pair them by\. They have: id, gold"):
        parallel_answers(english, thai, key="number", same=None)
    with pytest.raises(UserError, match="takes answers that are right or wrong, and 0 scores"):
        list(parallel_answers(answers([0.5]), answers([1.0]), key=None, same=None).items("pair"))


def test_pairs_of_a_suite_name_rows_and_metrics(tmp_path):
    task = "title: t\nabout: a\ntasks: [{task: x, metric: acc}, {task: y, metric: f1}]\npairs: [{name: p, "
    for pair, message in [
        ("english: x, thai: z, metric: acc}]", "the pair 'p' is of 'z', which is not a row"),
        ("english: x, thai: y, metric: acc}]", "the pair 'p' takes 'acc', which 'y' does not have"),
        ("english: x, thai: y}]", "pair 1 lacks 'metric'"),
    ]:
        (tmp_path / "s.yaml").write_text(task + pair)
        with pytest.raises(UserError, match=message):
            read_suite(str(tmp_path / "s.yaml"))


def xquad_row(number: int, question: str, answer: str) -> dict:
    answers = {"text": [answer], "answer_start": [0]}
    return {"id": f"q{number}", "context": f"{answer} {number // 2}", "question": question, "answers": answers}


@pytest.fixture
def data(tmp_path):
    """Four questions each; the Thai ones of XQuAD in the reverse order."""
    folder = tmp_path / "data"
    for language, word in (("en", "how many"), ("th", "เท่าไร")):
        rows = [{"question": f"{word} {number}", "answer": None, "answer_number": number} for number in range(4)]
        write_rows(folder / f"juletxara/mgsm/{language}/test.jsonl", rows)
        asked = [xquad_row(number, f"{word} q{number}", f"the {number}0 men") for number in range(4)]
        write_rows(folder / f"google/xquad/xquad.{language}/validation.jsonl", asked[:: -1 if language == "th" else 1])
    return folder


def measured(folder, data, replies, limit=None):
    plan = plan_suite(read_suite("consistency"), TaskLoader(data=data))
    with open_run(folder, model="oracle", revision="0") as run:
        model = KeptAnswers(KnowingModel(replies, max_length=16384), folder / "answers.jsonl", 8)
        measure_suite(plan, model, run, limit=limit, seed=0, tell=lambda name: None)
        run.finish()
    return read_run(folder)[0]


def test_a_model_that_knows_some_answers(data, tmp_path):
    right = {"how many 0", "how many 1", "how many 2", "เท่าไร 0", "เท่าไร 3", "how many q0", "เท่าไร q0", "เท่าไร q1"}
    replies = {}
    for word in ("how many", "เท่าไร"):
        for number in range(4):
            replies[f"{word} {number}"] = f"\\boxed{{{number if f'{word} {number}' in right else 99}}}"
            count = f"{number}๐" if f"{word} q{number}" in right else "no"
            replies[f"{word} q{number}"] = f"<think>\nfirst</think>{count} men."
    results = measured(tmp_path / "run", data, replies)
    found = {(figure.name, figure.metric): figure for figure in results.figures}
    assert [round(found["MGSM", name].value, 9) for name in SHARES] == [round(1 / 3, 9), 1.0, 1.0]
    assert [found["MGSM", name].items for name in SHARES] == [3, 2, 1]
    assert [found["MGSM", name].higher_is_better for name in SHARES] == [True, False, False]
    assert found["mgsm_final_en", "exact_match"].value == 0.75
    assert [round(found["XQuAD", name].value, 9) for name in SHARES] == [1.0, 0.0, round(1 / 3, 9)]
    assert found["xquad_short_th", "exact_match"].value == 0.5
    assert results.notes == []
    no_answer = dict.fromkeys(replies, "no")
    results = measured(tmp_path / "none", data, no_answer, limit=2)
    unpaired, *empty = results.notes
    assert unpaired == "consistency, XQuAD: 4 questions have an outcome in one language only."
    assert empty == [
        "consistency, MGSM: no E(T)→T(T), for no question in both is right in English.",
        "consistency, XQuAD: no E(T)→T(T), for no question in both is right in English.",
        "consistency, XQuAD: no T(F)→E(T), for no question in both is wrong in Thai.",
        "consistency, XQuAD: no E(F)→T(T), for no question in both is wrong in English.",
    ]


@needs_shared_data
def test_the_shared_sets_are_parallel():
    english, thai = (rows_of(SHARED / f"xquad_{language}.jsonl.gz") for language in ("en", "th"))
    assert {row["id"] for row in english} == {row["id"] for row in thai}
    golds = [[row["answer"] for row in rows_of(SHARED / f"mgsm_{language}.jsonl.gz")] for language in ("en", "th")]
    assert golds[0] == golds[1]
