# SPDX-License-Identifier: Apache-2.0
"""Judged suites, with judges on this machine that are right, wrong, biased, or answer no question."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import jai.evaluation.suites
from chat_endpoint import Answer, ChatEndpoint
from jai.errors import UserError
from jai.evaluation.endpoint import Endpoint, EndpointClient
from jai.evaluation.judged.answers import ChatAnswers, answer_chats, chat_answers, write_answers
from jai.evaluation.judged.hall_bench import CRITERIA
from jai.evaluation.judged.judging import judge_cases
from jai.evaluation.judged.measure import Judge, measure_hall_bench, measure_mt_bench
from jai.evaluation.judged.mt_bench import conversation_parts
from jai.evaluation.judged.pairwise import (
    CONSISTENT,
    FIRST_SHOWN,
    WIN,
    comparison_cases,
    pair_answers,
    pairwise_figures,
    pairwise_items,
)
from jai.evaluation.judged.prompts import FACTS, FLUENCY, LATER_TURN_GRADE, SINGLE_GRADE
from jai.evaluation.judged.questions import ChatQuestion, FactQuestion, chat_question, check_questions, fact_question
from jai.evaluation.judged.verdicts import agreement, mean_distance, read_comparison, read_grade, read_yes_no
from jai.evaluation.reply_cache import ChatReply, ChatRequest, ReplyCache

CHATS = [
    ChatQuestion("81", "writing", ("เขียนกลอน", "เขียนใหม่ให้สั้นลง"), ("not shown", "not shown")),
    ChatQuestion("111", "math", ("1 + 1 = ?", "และ 2 + 2 = ?"), ("2", "4")),
    ChatQuestion("161", "Knowledge III", ("Who wrote it?", "And when?"), ("He did.", "In 1999.")),
]
FACT_QUESTIONS = [
    FactQuestion(
        str(number), None if number < 6 else "wikipedia", f"คำถามที่ {number}", f"ข้อเท็จจริง {number}", f"คำตอบ {number}"
    )
    for number in range(10)
]
PART = re.compile(r"\[Begin: (?P<title>[^\]]*)\]\n(?P<text>.*?)\n\[End: (?P=title)\]", re.DOTALL)


def parts_of(request: dict) -> dict[str, str]:
    """What a judge is shown, by title."""
    return {match["title"]: match["text"] for match in PART.finditer(request["messages"][1]["content"])}


def answer_to_judge(request: dict) -> str:
    """The answer that a judge of one answer has to judge: the last that it is shown."""
    return [text for title, text in parts_of(request).items() if title.startswith("answer")][-1]


@pytest.fixture
def asker(tmp_path):
    """`asker(server, **options)`: a client of a server that keeps its replies in this test's folder."""

    def build(server: ChatEndpoint, **options) -> EndpointClient:
        endpoint = Endpoint(url=server.url, **{"model": "m", "first_pause": 0.01, "attempts": 2, **options})
        return EndpointClient(endpoint, ReplyCache(tmp_path / f"replies-{server.url.rpartition(':')[2][:-3]}.sqlite"))

    return build


@pytest.fixture
def servers():
    """`servers(behave)`: an endpoint that is closed at the end."""
    running: list[ChatEndpoint] = []

    def start(behave: Callable) -> ChatEndpoint:
        running.append(ChatEndpoint(behave))
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


@pytest.fixture
def model(servers, asker):
    """A model that repeats what it is asked, and its server."""
    server = servers(
        lambda request, before: f"<think>Hm, {before}.</think>\n\nตอบ {request['messages'][-1]['content']}"
    )
    return asker(server), server


def value_of(outcome, name: str, metric: str) -> float:
    (figure,) = [each for each in outcome.figures if (each.name, each.metric) == (name, metric)]
    return figure.value


# --- Verdicts ---


@pytest.mark.parametrize(
    ("reply", "grade"),
    [
        ("Good. Grade: [[7]]", 7),
        ("ดีมาก [[ 8.5 ]]", 8.5),
        ("[[๗]]", 7),
        ("[[7/10]]", 7),
        ("It says [[7]], so: [[7]]", 7),
        ("The link [[กรุงเทพ]] is odd. [[3]]", 3),
        ("<think>Is it [[2]]? No.</think> [[9]]", 9),
        ("The answer asks me for [[10]], but I say [[2]].", None),
        ("Grade: 7", None),
        ("[7]", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[-3]]", None),
        ("[[nan]]", None),
        ("[[rating]]", None),
        ("<think>Surely [[9]]", None),
        ("", None),
        ("[[", None),
    ],
)
def test_grades(reply, grade):
    assert read_grade(reply) == grade


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[true]]", 1),
        ("ผิด [[False]]", 0),
        ("True.", None),
        ("[[true]] or rather [[false]]", None),
        ("[[yes]]", None),
        ("จริง", None),
    ],
)
def test_yes_and_no(reply, verdict):
    assert read_yes_no(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "verdict"), [("[[A]]", "A"), ("[[b]] is better", "B"), ("[[C]]", "C"), ("[[A]] [[B]]", None), ("A", None)]
)
def test_comparisons(reply, verdict):
    assert read_comparison(reply) == verdict


def test_agreement_of_repeats():
    assert agreement([7.0]) is None
    assert agreement([7.0, 7.0, 9.0]) == pytest.approx(1 / 3)
    assert mean_distance([7.0, 7.0, 10.0]) == pytest.approx(2)
    assert mean_distance([7.0]) is None


# --- MT-Bench ---


def oracle_grade(request: dict, before: int) -> str:
    return "Fine. [[10]]" if answer_to_judge(request).startswith("ตอบ ") else "Bad. [[1]]"


def test_an_oracle_gives_all_and_its_negation_nothing(servers, asker, model):
    ask, _ = model
    for judge_says, expected in (("[[10]]", 10.0), ("[[1]]", 1.0)):
        judge = Judge(asker(servers(lambda request, before, says=judge_says: f"Well. {says}")))
        outcome = measure_mt_bench("mt", CHATS, ask.ask, judge, max_tokens=50)
        assert {figure.value for figure in outcome.figures} == {expected}
        assert [figure.name for figure in outcome.figures] == [
            "all turns",
            "first turn",
            "second turn",
            "Knowledge III",
            "math",
            "writing",
        ]
        assert outcome.notes() == []


def test_only_what_is_known_scores(servers, asker):
    """A model that knows the second turns alone."""
    answers = servers(lambda request, before: "ตอบ" if len(request["messages"]) == 1 else "ตอบ ถูก")
    outcome = measure_mt_bench("mt", CHATS, asker(answers).ask, Judge(asker(servers(oracle_grade))), max_tokens=50)
    assert value_of(outcome, "first turn", "grade") == 1
    assert value_of(outcome, "second turn", "grade") == 10
    assert value_of(outcome, "all turns", "grade") == 5.5
    assert {item.group for item in outcome.items} == {"mt 81", "mt 111", "mt 161"}


def test_what_the_model_and_the_judge_are_shown(servers, asker, model):
    ask, server = model
    judge = servers(oracle_grade)
    measure_mt_bench("mt", CHATS, ask.ask, Judge(asker(judge)), max_tokens=50)
    writing = [request for request in server.asked if request["messages"][0]["content"] == "เขียนกลอน"]
    assert [request["temperature"] for request in writing] == [0.7, 0.7]
    assert writing[1]["messages"][1:] == [
        {"role": "assistant", "content": "ตอบ เขียนกลอน"},  # the thought is not part of the conversation
        {"role": "user", "content": "เขียนใหม่ให้สั้นลง"},
    ]
    math = [request for request in server.asked if request["messages"][0]["content"] == "1 + 1 = ?"]
    assert [request["temperature"] for request in math] == [0, 0]
    shown = sorted((parts_of(request) for request in judge.asked), key=len)
    assert {"question of the user": "เขียนกลอน", "answer of the assistant": "ตอบ เขียนกลอน"} in shown
    assert {
        "question 1 of the user": "1 + 1 = ?",
        "reference answer 1": "2",
        "answer 1 of the assistant": "ตอบ 1 + 1 = ?",
        "question 2 of the user": "และ 2 + 2 = ?",
        "reference answer 2": "4",
        "answer 2 of the assistant": "ตอบ และ 2 + 2 = ?",
    } in shown
    assert not any("not shown" in text for each in shown for text in each.values())  # MT-Bench: three categories
    prompts = {len(parts_of(request)): request["messages"][0]["content"] for request in judge.asked}
    assert prompts[2] == prompts[3] == SINGLE_GRADE.messages([])[0]["content"]
    assert prompts[4] == prompts[6] == LATER_TURN_GRADE.messages([])[0]["content"]
    assert {request["temperature"] for request in judge.asked} == {0}


def test_each_category_has_mt_benchs_temperature():
    """FastChat's `temperature_config`; what it does not name is answered with 0.7."""
    expected = {"Writing": 0.7, "roleplay": 0.7, "extraction": 0, "Math": 0, "coding": 0, "reasoning": 0, "stem": 0.1}
    expected |= {"humanities": 0.1, "Knowledge III": 0.7, None: 0.7}
    questions = [ChatQuestion(str(number), category, ("q",)) for number, category in enumerate(expected)]
    asked: list[ChatRequest] = []

    def ask(requests, what):
        asked.extend(requests)
        return [ChatReply("x", "m")] * len(requests)

    answer_chats(questions, ask, max_tokens=5, seed=3)
    assert [each.parameters for each in asked] == [
        {"temperature": value, "max_tokens": 5, "seed": 3} for value in expected.values()
    ]
    asked.clear()
    answer_chats(questions, ask, max_tokens=5, temperature=1.0)
    assert all(each.parameters == {"temperature": 1.0, "max_tokens": 5} for each in asked)


def unreadable(outcome) -> int:
    return sum(each.unreadable for each in outcome.judgements)


def test_what_cannot_be_read_is_counted_and_no_score(servers, asker, model):
    def judge(request: dict, before: int) -> Answer | str:
        return {"ตอบ เขียนกลอน": "I like it.", "ตอบ 1 + 1 = ?": Answer(status=400)}.get(
            answer_to_judge(request), "[[6]]"
        )

    outcome = measure_mt_bench("mt", CHATS, model[0].ask, Judge(asker(servers(judge), max_failed=1)), max_tokens=50)
    assert (unreadable(outcome), sum(each.failed for each in outcome.judgements)) == (1, 1)
    scores = {item.id: item.score for item in outcome.items}
    assert scores["81 turn 1"] is None
    assert scores["111 turn 1"] is None
    assert [score for score in scores.values() if score is not None] == [6.0] * 4
    (figure,) = [each for each in outcome.figures if each.name == "all turns"]
    assert (figure.value, figure.items, figure.unscored) == (6.0, 4, 2)
    assert [note[:30] for note in outcome.notes()] == [
        "1 of the judge's replies hold ",
        "1 judgements have no reply; th",
    ]


def test_a_judge_that_talks_in_prose_has_no_figure(servers, asker, model):
    outcome = measure_mt_bench("mt", CHATS, model[0].ask, Judge(asker(servers(lambda *_: "Lovely!"))), max_tokens=50)
    assert outcome.figures == []
    assert unreadable(outcome) == 6


def test_a_turn_without_an_answer_is_none(servers, asker):
    model = servers(lambda request, before: Answer(status=400) if "1 + 1" in str(request) else "ตอบ ได้")
    outcome = measure_mt_bench(
        "mt", CHATS, asker(model, max_failed=1).ask, Judge(asker(servers(oracle_grade))), max_tokens=50
    )
    assert outcome.unanswered == 2
    assert {item.id: item.score for item in outcome.items}["111 turn 2"] is None
    assert value_of(outcome, "all turns", "grade") == 10
    assert "2 turns have no answer; they count for nothing." in outcome.notes()


def test_repeated_judgements_and_their_agreement(servers, asker, model):
    def judge(request: dict, before: int) -> str:
        return f"[[{[6, 6, 9][before] if 'writing' in str(request) or 'เขียน' in str(request) else 4}]]"

    server = servers(judge)
    client = asker(server, concurrency=1)
    outcome = measure_mt_bench("mt", CHATS, model[0].ask, Judge(client, repeats=3), max_tokens=50)
    assert len(server.asked) == 18
    assert value_of(outcome, "writing", "grade") == 7
    assert value_of(outcome, "math", "grade") == 4
    assert value_of(outcome, "repeated judgements", "agreement") == pytest.approx((2 * (1 / 3) + 4) / 6)
    assert value_of(outcome, "repeated judgements", "distance") == pytest.approx(2 * 2 / 6)
    assert [figure.metric for figure in outcome.figures if not figure.higher_is_better] == ["distance"]
    again = measure_mt_bench("mt", CHATS, model[0].ask, Judge(client, repeats=3), max_tokens=50)
    assert again.items == outcome.items
    assert len(server.asked) == 18


def test_missing_references_are_said(servers, asker, model):
    bare = [ChatQuestion("1", "math", ("1 + 1 = ?",)), ChatQuestion("2", "writing", ("เขียน",))]
    outcome = measure_mt_bench("mt", bare, model[0].ask, Judge(asker(servers(oracle_grade))), max_tokens=50)
    assert outcome.without_reference == 1
    half = ChatQuestion("3", "math", ("1 + 1 = ?", "Why?"), ("2", ""))
    assert half.lacks_reference
    titles = [title for title, _ in conversation_parts(half, ("a", "b"), 1)]
    assert titles == [
        "question 1 of the user",
        "reference answer 1",
        "answer 1 of the assistant",
        "question 2 of the user",
        "answer 2 of the assistant",
    ]
    assert any("questions of one right answer come without it" in note for note in outcome.notes())


# --- JAI-Hall-Bench ---


def hall_judge(facts: Callable[[str], bool], fluency: Callable[[str], bool]) -> Callable:
    """A judge that decides each criterion by the answer."""

    def judge(request: dict, before: int) -> str:
        says = facts if request["messages"][0]["content"] == FACTS.messages([])[0]["content"] else fluency
        return f"[[{str(says(answer_to_judge(request))).lower()}]]"

    return judge


@pytest.mark.parametrize("criteria", [("facts",), ("facts", "fluency")])
def test_hall_bench_knows_right_from_wrong(servers, asker, model, criteria):
    def knows(answer: str) -> bool:
        return int(answer[-1]) < 3

    for decide, expected in ((lambda _: True, 1.0), (lambda _: False, 0.0), (knows, 0.3)):
        judge = Judge(asker(servers(hall_judge(decide, decide))))
        outcome = measure_hall_bench("hall", FACT_QUESTIONS, model[0].ask, judge, criteria=criteria, max_tokens=50)
        headline = "correct" if len(criteria) > 1 else "facts"
        assert value_of(outcome, "all questions", headline) == expected
        assert outcome.figures[0].metric == headline


def test_right_only_where_both_are(servers, asker, model):
    """Table 13: an answer that is right but clumsy, or fluent but wrong, is not correct."""
    server = servers(hall_judge(lambda answer: int(answer[-1]) < 6, lambda answer: int(answer[-1]) % 2 == 0))
    outcome = measure_hall_bench(
        "hall", FACT_QUESTIONS, model[0].ask, Judge(asker(server)), criteria=tuple(CRITERIA), max_tokens=50
    )
    assert value_of(outcome, "all questions", "facts") == 0.6
    assert value_of(outcome, "all questions", "fluency") == 0.5
    assert value_of(outcome, "all questions", "correct") == 0.3
    assert value_of(outcome, "questions", "correct") == 0.5
    assert value_of(outcome, "wikipedia", "correct") == 0
    shown = [(request["messages"][0]["content"], parts_of(request)) for request in server.asked]
    facts = next(
        parts for system, parts in shown if system.startswith(FACTS.instructions) and "ตอบ คำถามที่ 3" in str(parts)
    )
    assert facts == {
        "question of the user": "คำถามที่ 3",
        "facts": "ข้อเท็จจริง 3",
        "right answer": "คำตอบ 3",
        "answer of the assistant": "ตอบ คำถามที่ 3",
    }
    fluency = next(parts for system, parts in shown if system.startswith(FLUENCY.instructions))
    assert fluency.keys() == {"question of the user", "answer of the assistant"}


def test_correct_needs_both_verdicts(servers, asker, model):
    def judge(request: dict, before: int) -> str:
        is_facts = request["messages"][0]["content"].startswith(FACTS.instructions)
        return "[[true]]" if is_facts else "Fluent!"

    outcome = measure_hall_bench(
        "hall", FACT_QUESTIONS, model[0].ask, Judge(asker(servers(judge))), criteria=tuple(CRITERIA), max_tokens=50
    )
    assert value_of(outcome, "all questions", "facts") == 1
    assert {figure.metric for figure in outcome.figures} == {"facts"}
    assert unreadable(outcome) == 10
    assert {item.score for item in outcome.items if item.metric in ("fluency", "correct")} == {None}


# --- Two models side by side ---


FIRST = [ChatAnswers("81", ("first", "first")), ChatAnswers("111", ("first",)), ChatAnswers("161", ("second", "x"))]
SECOND = [ChatAnswers("81", ("second", "second")), ChatAnswers("111", ("second", "second")), ChatAnswers("9", ("x",))]


def compare(servers, asker, judge: Callable) -> tuple[dict[str, float], list, ChatEndpoint]:
    server = servers(judge)
    pairs = pair_answers(CHATS, FIRST, SECOND)
    judgements = judge_cases([case for pair in pairs for case in comparison_cases(pair)], asker(server))
    items = pairwise_items("pair", pairs, judgements)
    figures = {figure.metric: figure.value for figure in pairwise_figures("pair", items) if figure.name != "writing"}
    return figures, items, server


def shown_answers(request: dict) -> list[str]:
    """The last answers of A and B."""
    parts = parts_of(request)
    last = "2 " if "question 2 of the user" in parts else ""
    return [parts[f"answer {last}of assistant {name}"] for name in "AB"]


def test_both_orders_are_judged(servers, asker):
    def prefers_first(request: dict, before: int) -> str:
        return "[[A]]" if shown_answers(request) == ["first", "second"] else "[[B]]"

    figures, items, server = compare(servers, asker, prefers_first)
    assert {item.group for item in items} == {"pair 81", "pair 111"}  # a conversation stands or falls as one
    assert len(server.asked) == 6  # two turns of 81 and one of 111, in two orders; 161 has one model's answers alone
    assert sorted(shown_answers(request)[0] for request in server.asked) == ["first"] * 3 + ["second"] * 3
    assert figures == {WIN: 1.0, CONSISTENT: 1.0, FIRST_SHOWN: 0.5}
    opposite = compare(
        servers, asker, lambda request, before: {"[[A]]": "[[B]]", "[[B]]": "[[A]]"}[prefers_first(request, 0)]
    )
    assert opposite[0] == {WIN: 0.0, CONSISTENT: 1.0, FIRST_SHOWN: 0.5}


def test_a_judge_that_prefers_a_place_decides_nothing(servers, asker):
    for verdict, place in (("[[A]]", 1.0), ("[[B]]", 0.0)):
        figures, _, _ = compare(servers, asker, lambda *_, says=verdict: says)
        assert figures == {WIN: 0.5, CONSISTENT: 0.0, FIRST_SHOWN: place}
    figures, _, _ = compare(servers, asker, lambda *_: "[[C]]")
    assert figures == {WIN: 0.5, CONSISTENT: 1.0, FIRST_SHOWN: 0.5}


def test_half_a_comparison_is_none(servers, asker):
    figures, items, _ = compare(
        servers, asker, lambda request, before: "[[A]]" if shown_answers(request)[0] == "first" else "Hm."
    )
    assert figures == {}
    assert {item.score for item in items} == {None}


# --- Files ---


def test_questions_in_their_forms():
    row = {"question_id": 81, "category": "math", "turns": ["a", "b"], "reference": ["c", "d"]}
    assert chat_question(row) == ChatQuestion("81", "math", ("a", "b"), ("c", "d"))
    assert chat_question({"prompt_id": 3, "prompt": ["a"], "reference": []}) == ChatQuestion("3", None, ("a",))
    row = {"id": "x", "question": "ใคร", "context": "ข้อความ", "answer": "เขา"}
    assert fact_question(row) == FactQuestion("x", None, "ใคร", "ข้อความ", "เขา")


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (chat_question, {"id": 1, "turns": "a"}, "`turns` is not a list of texts"),
        (chat_question, {"id": 1, "turns": []}, "`turns` is not a list of texts"),
        (chat_question, {"id": 1, "turns": ["a", " "]}, "`turns` is not a list of texts"),
        (chat_question, {"id": 1, "turns": ["\ud800"]}, "`turns` is not a list of texts"),
        (chat_question, {"id": 1, "turns": ["a"], "reference": ["a", "b"]}, "`reference` is not a list of 1 texts"),
        (chat_question, {"turns": ["a"]}, "no id"),
        (chat_question, {"id": True, "turns": ["a"]}, "no id"),
        (chat_question, {"id": 1, "turns": ["a"], "category": 5}, "`category` is not text"),
        (fact_question, {"id": 1, "question": None, "facts": "x"}, "`question` is not text"),
        (fact_question, {"id": 1, "question": "a", "facts": " "}, "no answer can be checked"),
        (fact_question, {"id": 1, "question": "a", "facts": "x", "answer": 5}, "no answer can be checked"),
        (chat_answers, {"id": 1, "answers": "a"}, "list of texts `answers`"),
        (chat_answers, {"answers": ["a"]}, "`id`"),
    ],
)
def test_malformed_rows(read, row, message):
    with pytest.raises(ValueError, match=message):
        read(row)


def test_questions_are_there_and_each_once():
    with pytest.raises(UserError, match="file has no questions"):
        check_questions([], "file")
    with pytest.raises(UserError, match="file has the id 81 2 times"):
        check_questions([*CHATS, CHATS[0]], "file")
    check_questions(CHATS, "file")


def test_answers_are_written_and_read(tmp_path):
    write_answers(tmp_path / "answers.jsonl", CHATS, FIRST)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert list(map(chat_answers, rows)) == FIRST
    assert rows[0]["turns"] == list(CHATS[0].turns)
    fastchat = {"question_id": 81, "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"]}]}
    assert chat_answers(fastchat) == ChatAnswers("81", ("a", "b"))


def test_our_questions_are_whole():
    path = Path(jai.evaluation.suites.__file__).parent / "hall_bench_small.jsonl"
    questions = [fact_question(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    check_questions(questions, path.name)
    assert len(questions) == 26
    assert all(question.answer and question.category for question in questions)
    assert len({question.question for question in questions}) == 26


def test_the_shared_mt_bench_is_read(shared_data):
    import gzip

    with gzip.open(shared_data / "eval" / "mt_bench_en.jsonl.gz", "rt", encoding="utf-8") as file:
        questions = [chat_question(json.loads(line)) for line in file]
    check_questions(questions, "mt_bench_en")
    assert len(questions) == 80
    assert sum(question.wants_reference for question in questions) == 30
    # Of coding, one has no reference; of the rest, some have none to their second turn.
    assert [each.id for each in questions if each.lacks_reference] == ["103", "108", "110", "123"]


def test_an_answer_is_asked_for_once_a_turn(servers, asker):
    server = servers(lambda request, before: "<think>no end")
    answers = answer_chats(CHATS[:1], asker(server).ask, max_tokens=7, seed=3)
    assert answers == [ChatAnswers("81", ("", ""))]
    assert [(request["max_tokens"], request["seed"]) for request in server.asked] == [(7, 3), (7, 3)]
