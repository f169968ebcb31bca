# SPDX-License-Identifier: Apache-2.0
"""Suites of generated answers (IFEval, final answers): an oracle's text gets everything, its negation nothing."""

import gzip
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from lm_eval.api.model import LM
from pythainlp.tokenize import word_tokenize
from sacrebleu.metrics import BLEU
from test_instructions import oracle

from jai.errors import UserError
from jai.evaluation.instructions.scoring import instruction_row
from jai.evaluation.kept_answers import KeptAnswers
from jai.evaluation.measure import measure_suite, plan_suite
from jai.evaluation.results import FigureItems, Item, mean_figure, open_run, paired_difference, read_run
from jai.evaluation.suites import read_suite
from jai.evaluation.tasks import TaskLoader

SHARED = Path(__file__).parents[2] / "shared/data/eval"
needs_shared_data = pytest.mark.skipif(
    not SHARED.exists(), reason=f"{SHARED} is not there: it is no part of the repository"
)
STRICT, LOOSE = ("prompt_level_strict_acc", "inst_level_strict_acc"), ("prompt_level_loose_acc", "inst_level_loose_acc")


class KnowingModel(LM):
    """Gives the reply that it knows to a question that contains a text; in the chat form the question is the prompt."""

    def __init__(self, replies: dict[str, str], max_length: int | None):
        super().__init__()
        self.replies = replies
        self.max_length = max_length
        self.longest_answers: set[int] = set()

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return chat_history[-1]["content"]

    @property
    def tokenizer_name(self) -> str:
        return "none"

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests, **_):
        self.longest_answers |= {each.args[1]["max_gen_toks"] for each in requests if "max_gen_toks" in each.args[1]}
        return [next(reply for text, reply in self.replies.items() if text in each.args[0]) for each in requests]


@pytest.fixture
def measured(tmp_path):
    def measure(
        suite: str, data: Path, replies: dict[str, str], limit: int | None = None, max_length: int | None = None
    ) -> dict:
        plan = plan_suite(read_suite(suite), TaskLoader(data=data))
        number = len(list(tmp_path.iterdir()))
        with open_run(tmp_path / f"run {number}", model="oracle", revision="0") as run:
            knowing = KnowingModel(replies, max_length)
            model = KeptAnswers(knowing, run.folder / "answers.jsonl", 8)
            figures = measure_suite(plan, model, run, limit=limit, seed=0, tell=lambda name: None)
            measure.notes, measure.longest_answers = run.results.notes, knowing.longest_answers
        return {(figure.name, figure.metric): figure for figure in figures}

    return measure


def values(figures: dict) -> dict:
    return {key: round(figure.value, 9) for key, figure in figures.items()}


def rows_of(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@needs_shared_data
def test_thai_ifeval(measured):
    follows, fails = {}, {}
    for row in rows_of(SHARED / "ifeval_th.jsonl.gz"):
        (instruction,) = instruction_row(row, "th").instructions
        prompt = row["prompts"][0]["text"]
        follows[prompt], fails[prompt] = oracle(instruction.type, dict(instruction.arguments))
    metrics = [("ifeval_th", metric) for metric in (*STRICT, *LOOSE)]
    right = measured("ifeval-th", SHARED, follows)
    assert values(right) | dict.fromkeys(metrics, 1) == values(right)
    assert {right[key].items for key in metrics} == {105}
    known = dict(list(follows.items())[:21])
    some = values(measured("ifeval-th", SHARED, fails | known))
    assert [some["ifeval_th", metric] for metric in STRICT] == [round(21 / 105, 9)] * 2
    assert some["mean of the strict two", " / ".join(STRICT)] == round(21 / 105, 9)
    assert "Table 13" in read_suite("ifeval-th").title


ENGLISH_ROWS = [
    {
        "key": 1,
        "prompt": "Say it in quotes, without commas.",
        "instruction_id_list": ["startend:quotation", "punctuation:no_comma"],
        "kwargs": [{}, {}],
    },
    {
        "key": 2,
        "prompt": "Two bullets.",
        "instruction_id_list": ["detectable_format:number_bullet_lists"],
        "kwargs": [{"num_bullets": 2}],
    },
]


def test_english_ifeval(measured, tmp_path):
    write_rows(tmp_path / "data/google/IFEval/train.jsonl", ENGLISH_ROWS)
    replies = {"Say it": 'Sure:\n"a b"', "Two bullets": "* a\n* b"}
    figures = values(measured("ifeval-en", tmp_path / "data", replies))
    assert [figures["ifeval_en", metric] for metric in STRICT] == [0.5, round(2 / 3, 9)]
    assert [figures["ifeval_en", metric] for metric in LOOSE] == [1, 1]
    assert figures["mean of the strict two", " / ".join(STRICT)] == round((1 / 2 + 2 / 3) / 2, 9)


TWO = {"kwargs": [{"num_bullets": "2"}]}  # which should be a number


def test_answers_are_shorter_where_the_model_takes_less_and_that_is_said(measured, tmp_path):
    write_rows(tmp_path / "data/google/IFEval/train.jsonl", ENGLISH_ROWS)
    for max_length, longest, notes in ((1281, 1280, 0), (1280, 640, 1), (None, 1280, 0)):
        measured("ifeval-en", tmp_path / "data", {"": "x"}, max_length=max_length)
        assert measured.longest_answers == {longest}
        assert len(measured.notes) == notes
        assert all("ifeval_en: answers end after 640 tokens" in note for note in measured.notes)


def test_a_malformed_row_is_named_by_file_and_line(measured, tmp_path):
    text_for_number = ENGLISH_ROWS[1] | {"kwargs": [{"num_bullets": "2"}]}
    write_rows(tmp_path / "data/ifeval_en.jsonl", [ENGLISH_ROWS[0], text_for_number])
    with pytest.raises(UserError, match=r"ifeval_en.jsonl, line 2.*num_bullets.*'2'; expected a whole number"):
        measured("ifeval-en", tmp_path / "data", {})


def test_typhoons_rows_without_a_thai_meaning_are_left_out(tmp_path):
    capital = {"instruction_id_list": ["change_case:english_capital"], "kwargs": [{}]}
    write_rows(tmp_path / "scb10x/ifeval-th/train.jsonl", [*ENGLISH_ROWS, ENGLISH_ROWS[0] | capital])
    (task,) = TaskLoader(data=tmp_path).load("ifeval_th_typhoon")
    assert [doc["key"] for doc in task.eval_docs] == [1, 2]


@needs_shared_data
def test_final_answers_of_the_shared_problems(measured):
    def replies(form: str, language: str) -> dict[str, str]:
        return {row["question"]: form.format(row["answer"]) for row in rows_of(SHARED / f"mgsm_{language}.jsonl.gz")}

    figures = measured(
        "mgsm", SHARED, replies("<think>ลองดู</think>คำตอบคือ {} บาท", "th") | replies("The answer is {} dollars.", "en")
    )
    found = values(figures)
    for language in ("th", "en"):
        for metric in ("exact_match", "stated_match", "language_acc"):
            assert found[f"mgsm_final_{language}", metric] == 1
    assert (found["mgsm_final_th", "think_acc"], found["mgsm_final_en", "think_acc"]) == (1, 0)
    assert (found["language accuracy", "language_acc"], found["think accuracy", "think_acc"]) == (1, 0.5)
    assert found["mean", "exact_match"] == 1
    assert figures["mgsm_final_th", "exact_match"].items == 250
    found = values(measured("mgsm", SHARED, replies("คำตอบคือ -{}", "th") | replies("ได้ {} เหรียญ", "en"), limit=50))
    assert found["mgsm_final_th", "exact_match"] == found["mgsm_final_th", "stated_match"] == 0
    assert (found["mgsm_final_en", "exact_match"], found["mgsm_final_en", "stated_match"]) == (1, 0)
    assert (found["mgsm_final_th", "language_acc"], found["mgsm_final_en", "language_acc"]) == (1, 0)


PROBLEMS = [("โจทย์หนึ่ง", r"\frac{1}{2}"), ("โจทย์สอง", "042"), ("โจทย์สาม", r"\left( 3, \frac{\pi}{2} \right)")]


def test_math_and_aime_in_the_columns_of_the_hub(measured, tmp_path):
    data = tmp_path / "data"
    lower = [{"problem": problem, "answer": gold, "solution": "…"} for problem, gold in PROBLEMS]
    upper = [{"Problem": problem, "Answer": gold, "ID": "1"} for problem, gold in PROBLEMS]
    mgsm = [{"question": problem, "answer": None, "answer_number": 42} for problem, _ in PROBLEMS]
    for language in ("th", "en"):
        write_rows(data / f"juletxara/mgsm/{language}/test.jsonl", mgsm)
    for path in ("HuggingFaceH4/MATH-500/test", "iapp/math-500-th/test", "iapp/aime_2024-th/train"):
        write_rows(data / f"{path}.jsonl", lower)
    write_rows(data / "Maxwell-Jia/AIME_2024/train.jsonl", upper)
    replies = {"หนึ่ง": r"ได้ \boxed{0.5}", "สอง": "คำตอบคือ ๔๒", "สาม": r"\boxed{(3,\pi/2)}"}
    found = values(measured("reasoning", data, replies))
    for task in ("math500_final_th", "math500_final_en", "aime24_final_th", "aime24_final_en"):
        assert found[task, "exact_match"] == 1
    assert found["mgsm_final_th", "exact_match"] == round(1 / 3, 9)
    assert found["mean", "exact_match"] == round((4 + 2 / 3) / 6, 9)


THAI = {"cat": "แมวนอนอยู่บนเก้าอี้ในบ้าน", "dog": "หมาวิ่งเล่นอยู่ในสวน", "sky": "วันนี้อากาศดีมาก"}


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (lambda right: f"<think>hm</think> {right}\n", 1),
        (lambda right: right.replace("ำ", "ํา") + "\u200b", 1),
        (lambda right: "ไม่ทราบ", 0),
        (lambda right: f"<think>{right}", 0),
        (lambda right: right if "แมว" in right else "", 1 / 3),
    ],
)
def test_translations(measured, tmp_path, said, score):
    rows = [{"en": english, "th": thai} for english, thai in THAI.items()]
    for name in ("flores", "arc", "mmlu"):
        write_rows(tmp_path / f"data/translation/{name}/test.jsonl", rows)
    figures = measured("translation", tmp_path / "data", {english: said(thai) for english, thai in THAI.items()})
    assert {name for name, _ in figures} == {"FLORES", "ARC", "MMLU"}
    assert all(figure.value == pytest.approx(score, abs=0.03) for figure in figures.values())


SYSTEMS = (
    {"cat": "แมวนอนอยู่บนเตียงในบ้าน", "dog": "หมาวิ่งเล่นอยู่ในบ้าน", "sky": "วันนี้อากาศดีมากครับ", "sea": "ทะเล"},
    {"cat": "แมวนอนอยู่ในบ้าน", "dog": "", "sky": "วันนี้อากาศดีมาก", "sea": "เราไปเที่ยวทะเลกันเถอะ"},
)
SEA = {"sea": "เราไปเที่ยวทะเลกันในวันหยุดที่ยาวมาก"}


def sacrebleu_of(references: list[str], translations: list[str]) -> float:
    """By its own function of whole texts, of words in Thai."""

    def words(texts):
        return [" ".join(word_tokenize(text, keep_whitespace=False)) for text in texts]

    return BLEU(tokenize="none").corpus_score(words(translations), [words(references)]).score / 100


def test_bleu_is_that_of_the_whole_text_with_its_interval_and_its_paired_test(tmp_path):
    """Against sacrebleu's own function: the figure, the draws of the interval, and all swaps of two translations."""
    thai = THAI | SEA
    for name in ("flores", "arc", "mmlu"):
        write_rows(
            tmp_path / f"data/translation/{name}/test.jsonl", [{"en": each, "th": text} for each, text in thai.items()]
        )
    found = []
    for number, replies in enumerate(SYSTEMS):
        with open_run(tmp_path / f"run {number}", model="m", revision="r") as run:
            model = KeptAnswers(KnowingModel(replies, None), run.folder / "answers.jsonl", 8)
            plan = plan_suite(read_suite("translation"), TaskLoader(data=tmp_path / "data"))
            (figure, *_) = measure_suite(plan, model, run, limit=None, seed=3, tell=lambda name: None)
        found.append((figure, FigureItems(read_run(run.folder)[1]).of(figure)[0]))
    references, *translations = (list(each.values()) for each in (thai, *SYSTEMS))
    bleu = [sacrebleu_of(references, each) for each in translations]
    assert [figure.value for figure, _ in found] == bleu
    assert 0 < bleu[1] < bleu[0] < 1
    mean = sum(item.score for item in found[0][1]) / 4
    assert abs(bleu[0] - mean) > 0.05  # the mean over sentences is another figure
    draws = np.random.default_rng(3).integers(0, 4, (1000, 4))
    unique = {tuple(draw): 0.0 for draw in draws.tolist()}
    for draw in unique:
        unique[draw] = sacrebleu_of([references[n] for n in draw], [translations[0][n] for n in draw])
    ends = np.quantile([unique[tuple(draw)] for draw in draws.tolist()], [0.025, 0.975])
    assert (found[0][0].low, found[0][0].high) == pytest.approx(tuple(ends))
    difference = paired_difference(found[0][1], found[1][1])
    assert difference.value == bleu[1] - bleu[0]
    assert difference.low < difference.value < difference.high
    swaps = []
    for swap in product((0, 1), repeat=4):
        first, second = ([translations[side ^ each][n] for n, side in enumerate(swap)] for each in (0, 1))
        swaps.append(abs(sacrebleu_of(references, second) - sacrebleu_of(references, first)))
    share = np.mean(np.array(swaps) >= abs(difference.value) - 1e-12)
    assert 0.1 < share < 1
    assert difference.p_value == pytest.approx(share, abs=0.02)


def test_bleu_has_no_mean_with_other_scores_and_no_scale(measured, tmp_path):
    bleu = Item("s", "t", "0", "bleu", 0.5, bleu_counts=(1,) * 10)
    with pytest.raises(UserError, match="t, u: BLEU has no mean with other scores"):
        mean_figure([bleu, Item("s", "u", "0", "acc", 0.5)], suite="s", name="n", metric="m")
    write_rows(tmp_path / "data/translation/arc/test.jsonl", [{"en": "cat", "th": THAI["cat"]}])
    row = {"task": "translation_arc", "metric": "bleu", "scale": 100}
    (tmp_path / "mine.yaml").write_text(json.dumps({"title": "t", "about": "a", "tasks": [row]}))
    with pytest.raises(UserError, match="'bleu' of translation_arc is BLEU, from 0 to 1, and takes no scale"):
        measured(str(tmp_path / "mine.yaml"), tmp_path / "data", {"cat": "x"})


def test_a_problem_without_an_answer_is_one_error(measured, tmp_path):
    write_rows(tmp_path / "data/math-ai/aime25/test.jsonl", [{"problem": "p", "solution": "s"}])
    with pytest.raises(UserError, match=r"aime25_final_en.*answer_number, answer, Answer"):
        TaskLoader(data=tmp_path / "data").load("aime25_final_en")
