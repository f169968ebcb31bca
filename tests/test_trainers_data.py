# SPDX-License-Identifier: Apache-2.0
"""Training data: what is read, which rows are refused, and how many tokens are cut off."""

import bz2
import copy
import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl import DPOConfig, GRPOConfig, KTOConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from jai.errors import UserError
from jai.provenance import read_step
from jai.trainers import data as data_module
from jai.trainers import sft
from jai.trainers.arguments import JaiTrainingArguments, StageArguments
from jai.trainers.data import CATEGORY, CHOOSING_COLUMNS, LANGUAGE, TrainingData, load_training_data
from jai.trainers.data_arguments import DataArguments
from jai.trainers.dpo import JaiDPOTrainer
from jai.trainers.faults import FaultyRow, refuse_faults
from jai.trainers.prepare import prepare_rows
from jai.trainers.rows import DatasetType
from jai.trainers.sft import JaiSFTTrainer
from jai.trainers.tokens import count_tokens

SFT_TYPES = (DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION)
DPO_TYPES = (DatasetType.PREFERENCE,)


pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.fixture(scope="module")
def model(tiny_model, tiny_tokenizer):
    return tiny_model(
        vocab_size=len(tiny_tokenizer),
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def write(name: str, *rows: Any) -> str:
    """A file of these rows, each a JSON value or a line as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return name


def stage_arguments(
    config: type, *, script: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **training
):
    return StageArguments(
        ScriptArguments(**(script or {})),
        config("out", bf16=False, report_to="none", **training),
        ModelConfig(),
        JaiTrainingArguments(),
        DataArguments(**(data or {})),
    )


def load(
    name: str | None,
    types: tuple[DatasetType, ...] = SFT_TYPES,
    *,
    streaming: bool = False,
    data: dict[str, Any] | None = None,
    **training: Any,
) -> TrainingData:
    """The rows as they are read, before any is chosen."""
    config = SFTConfig if types is SFT_TYPES else DPOConfig
    script = {"dataset_name": name, "dataset_streaming": streaming}
    return load_training_data(stage_arguments(config, script=script, data=data, **training), types)


def contents(rows: Any) -> list[dict[str, Any]]:
    """Rows without the columns that they are chosen by, and without what is empty."""
    hidden = (*CHOOSING_COLUMNS, CATEGORY, LANGUAGE)
    return [{key: value for key, value in row.items() if key not in hidden and value is not None} for row in rows]


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CHAT = {"messages": [user("hi"), assistant("hello")]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "a"]}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}


# --- rows that are refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([CHAT, "null", CHAT], r"Row 2 of .*it is null; expected columns"),
        ([CHAT, "{", CHAT], r"Row 2 of .*it is not valid JSON"),
        ([CHAT, {"messages": None}, {"messages": None}], r"Row 2 of .*`messages` is null\. Rows like it: 3\."),
        ([{"text": "a"}, {"text": None}], r"Row 2 of .*`text` is null"),
        ([{"text": None}, {"text": "a"}], r"Row 1 of .*`text` is null"),
        ([{"text": "a"}, {"text": " \n"}], r"Row 2 of .*`text` is empty"),
        ([{"text": "a"}, {"text": 5}], r"Row 2 of .*`text` is 5; expected a string"),
        ([{"text": "a"}, '{"text": "\\ud800"}'], r"Row 2 of .*half of a surrogate pair"),
        ([CHAT, '{"messages": ["\\ud800"]}'], r"Row 2 of .*has \? as message 1"),
        ([CHAT, {"text": "a"}], r"Row 2 of .*`messages` is null"),
        ([CHAT, {"messages": [user("hi"), assistant(None)]}], r"Row 2 of .*`messages` has no content in message 2"),
        (
            [CHAT, {"messages": [user(IMAGE), assistant("x")]}],
            r"Row 2 of .*part of content that is not text in message 1 \(image_url\)",
        ),
        ([CHAT, {"messages": []}], r"Row 2 of .*`messages` has no messages"),
        ([{"messages": "hi"}], r"Row 1 of .*`messages` is hi; expected a list of messages"),
        ([{"messages": ["hi", "ho"]}], r"Row 1 of .*`messages` has hi as message 1; expected a message such as"),
        ([{"messages": [{"role": None, "content": "x"}]}], r"Row 1 of .*has no role in message 1"),
        ([CHAT, {"messages": [user("a"), assistant("  ")]}], r"Row 2 of .*has an empty answer in message 2"),
        (
            [CHAT, {"messages": [user("a"), user("b"), assistant("c")]}],
            r"Row 2 of .*has a turn of the user after one of the user \(message 2\)",
        ),
        ([CHAT, {"messages": [assistant("c"), user("b")]}], r"a turn of the assistant at the beginning \(message 1\)"),
        (
            [CHAT, {"messages": [user("a"), assistant("b"), assistant("c")]}],
            r"after one of the assistant \(message 3\)",
        ),
        (
            [CHAT, {"messages": [user("a"), {"role": "tool", "content": "c"}]}],
            r"a turn of the tool after one of the user",
        ),
        (
            [CHAT, {"messages": [user("a"), assistant("b", weight=0.5)]}],
            r"has the weight 0.5 in message 2; expected 0 or 1",
        ),
        (
            [CHAT, {"messages": [user("a"), assistant("b", train="no")]}],
            r"`train: no` in message 2; expected true or false",
        ),
        (
            [CHAT, {"messages": [user("a"), assistant(None, tool_calls=[{"function": {"arguments": {}}}])]}],
            r"Row 2 of .* as a tool call of message 2; expected",
        ),
        (
            [CHAT, {"messages": [user("a"), assistant("", tool_calls=[{"name": "f", "arguments": "{"}])]}],
            r"Row 2 of .*arguments of a call that are not valid JSON in message 2",
        ),
        (
            [CHAT, {"messages": [user("a"), assistant("", tool_calls=[CALL]), assistant("b")]}],
            r"Row 2 of .*has a turn of the assistant after a call \(message 3\)",
        ),
        ([{"conversations": [{"from": "human", "value": None}]}], r"Row 1 of .*has no content in message 1"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], r"Row 2 of .*`completion` is null"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], r"Row 2 of .*`completion` is empty"),
        ([{**CHAT, "tools": "[{"}], r"Row 1 of .*`tools` is not valid JSON"),
        ([{**CHAT, "tools": ["f"]}], r"Row 1 of .*`tools` is \['f'\]; expected a list of functions"),
        ([{**CHAT, "chat_template_kwargs": 5}], r"Row 1 of .*`chat_template_kwargs` is 5; expected a mapping"),
        (
            [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "output": ""}],
            r"Row 2 of .*`output` is empty",
        ),
        (["5"], r"cannot be read: of row 1, it is 5"),
        (["null"], r"cannot be read: of row 1, it is null"),
        (["{"], r"cannot be read: of row 1, it is not valid JSON"),
        ([{"text": "a"}] * 3 + [{"text": None}] * 8, r"Row 4 of .*Rows like it: 5, 6, 7, 8, 9 and 2 more\."),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        load(write("rows.jsonl", *rows))


def test_a_stream_ends_at_its_first_faulty_row():
    with pytest.raises(UserError, match=r"Row 2 of .*`messages` is null\. 1 of 2 rows are faulty"):
        list(load(write("rows.jsonl", CHAT, {"messages": None}, {"messages": None}), streaming=True).train)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, {**PAIR, "chosen": None}], r"Row 2 of .*`chosen` is null"),
        ([PAIR, {**PAIR, "prompt": None}], r"Row 2 of .*`prompt` is null"),
        ([PAIR, {**PAIR, "chosen": "c"}], r"Row 2 of .*`chosen` and `rejected` are the same"),
        ([PAIR, {**PAIR, "chosen": "c "}], r"Row 2 of .*`chosen` and `rejected` are the same"),
        ([PAIR, {**PAIR, "rejected": " "}], r"Row 2 of .*`rejected` is empty"),
        (
            [{"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}],
            r"Row 1 of .*begin differently",
        ),
        (
            [
                {
                    "chosen": [user("s"), assistant("b"), user("c"), assistant("d")],
                    "rejected": [user("s"), assistant("b"), user("x"), assistant("d")],
                }
            ],
            r"differ in message 3, which is not an answer",
        ),
        ([{"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}], r"is the beginning of the other"),
        (
            [{"prompt": "x", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}],
            r"Row 1 of .*`chosen` and `rejected` begin from `prompt`",
        ),
        (
            [{"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant(" b\n")]}],
            r"Row 1 of .*`chosen` and `rejected` are the same",
        ),
        ([{"chosen": "b", "rejected": "c"}], r"Row 1 of .*begin differently"),
        ([{"chosen": "Q: b", "rejected": "Q: b c"}], r"is the beginning of the other"),
        (
            [{"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant(" ")]}],
            r"`rejected` has an empty answer in message 2",
        ),
        (
            [{"instruction": "a", "completions": [{"response": "b", "overall_score": 4}]}],
            r"expected two answers or more",
        ),
        (
            [{"instruction": "a", "completions": [{"response": "b", "score": 4}, {"response": "c", "score": "N/A"}]}],
            r"has no score in answer 2",
        ),
        (
            [{"instruction": "a", "completions": [{"response": "b", "score": 10**400}, {"response": "c", "score": 1}]}],
            r"has no score in answer 1",
        ),
        (
            [{"instruction": "a", "completions": [{"response": "b", "score": 4}, {"response": "c", "score": 4}]}],
            r"all `completions` have the score 4",
        ),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        load(write("rows.jsonl", *rows), DPO_TYPES)


def test_cells_that_cannot_be_trained_on_are_named():
    with pytest.raises(UserError, match=r"Row 2 of rows.csv .*`chosen` is null"):
        load(write("rows.csv", "prompt,chosen,rejected", "a,b,c", "d,,f"), DPO_TYPES)
    with pytest.raises(UserError, match=r"Row 2 of rows.csv .*more cells than the header"):
        load(write("rows.csv", "prompt,completion", "a,b", "d,e,f"))


def test_rows_to_evaluate_on_are_checked_too():
    Path("data").mkdir()
    write("data/train.jsonl", CHAT)
    write("data/test.jsonl", CHAT, {"messages": None})
    assert load("data").evaluation is None
    with pytest.raises(UserError, match=r"Row 2 of data \(split test\)"):
        load("data", eval_strategy="epoch")
    write("data/test.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r"split train\) has messages in messages, and data .* strings in text"):
        load("data", eval_strategy="epoch")


FAULTY = [CHAT, {"messages": None}, CHAT, {"messages": [user("a"), assistant("")]}, {"messages": None}]


@pytest.mark.parametrize("limit", [3, 0.6])
def test_faulty_rows_are_left_out_up_to_a_limit(limit):
    data = load(write("rows.jsonl", *FAULTY), data={"max_faulty_rows": limit})
    assert contents(data.train) == [CHAT, CHAT]
    assert data.faulty == 3
    (note,) = data.notes
    assert note.startswith("Left out 3 of 5 rows, which are faulty. Row 2 of rows.jsonl (split train)")
    assert "is null. Rows like it: 5. Row 4 of" in note


@pytest.mark.parametrize("limit", [0, 2, 0.59])
def test_more_faulty_rows_are_refused_with_each_kind(limit):
    with pytest.raises(UserError) as error:
        load(write("rows.jsonl", *FAULTY), data={"max_faulty_rows": limit})
    assert "Row 2 of rows.jsonl (split train) cannot be trained on: `messages` is null. Rows like it: 5." in str(
        error.value
    )
    assert "Also row 4 of rows.jsonl (split train) cannot be trained on: `messages` has an empty answer" in str(
        error.value
    )
    assert f"3 of 5 rows are faulty. Fix these rows or leave them out, or raise `max_faulty_rows` ({limit})" in str(
        error.value
    )


def test_faults_of_each_source_are_named():
    """Two sources with the same fault: the rows of both are found."""
    faulty = [FaultyRow(where, row, "null", "it is null") for where, row in (("a", 3), ("a", 5), ("b", 7))]
    (said,) = refuse_faults(faulty, 10, 3)
    assert said.startswith("Left out 3 of 10 rows, which are faulty. Row 3 of a cannot be trained on: it is null.")
    assert "Row 7 of b cannot be trained on" in said
    with pytest.raises(UserError, match=r"Row 3 of a .* Rows like it: 5\. Also row 7 of b"):
        refuse_faults(faulty, 10, 2)


def test_a_stream_leaves_out_as_many():
    name = write("rows.jsonl", *FAULTY)
    stream = load(name, streaming=True, data={"max_faulty_rows": 3}).train
    assert contents(stream) == contents(stream) == [CHAT, CHAT]
    with pytest.raises(UserError, match=r"Row 2 of .* Also row 4 of .*empty answer.* 2 of 4 rows are faulty"):
        list(load(name, streaming=True, data={"max_faulty_rows": 1}).train)


@pytest.mark.parametrize("module", ["messages_module", "rows_module"])
def test_what_another_reader_has_read_is_read_again(monkeypatch, module):
    """The code that reads decides what comes out: after it has changed, what it made before is no longer taken."""
    fingerprint, made, source = data_module._SourceSplit.fingerprint, [], inspect.getsource

    def recorded(split: Any) -> str:
        made.append(fingerprint(split))
        return made[-1]

    def changed(each: Any) -> str:
        return source(each) + ("#" if each is getattr(data_module, module) else "")

    name = write("rows.jsonl", CHAT)
    monkeypatch.setattr(data_module._SourceSplit, "fingerprint", recorded)
    load(name)
    load(name)
    monkeypatch.setattr(inspect, "getsource", changed)
    load(name)
    assert made[0] == made[1] != made[2]


def test_changed_files_are_read_again_and_others_are_not(capfd):
    name = write("rows.jsonl", CHAT)
    assert load(name).rows == 1
    capfd.readouterr()
    assert load(name).rows == 1
    assert "Generating" not in capfd.readouterr().err
    write("rows.jsonl", CHAT, {**CHAT, "lang": "th"})
    assert load(name).train[LANGUAGE][:] == [None, None]
    assert load(name, data={"language_column": "lang"}).train[LANGUAGE][:] == [None, "th"]


# --- forms that are read

SYSTEM = {"role": "system", "content": "s"}
CALLED = assistant("", tool_calls=[CALL])
RESULT = {"role": "tool", "content": "9", "tool_call_id": "1"}
FORMS = {
    "messages": (CHAT, CHAT),
    "conversations": ({"conversations": CHAT["messages"]}, CHAT),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "id": "1"},
        CHAT,
    ),
    "sharegpt-roles": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": [1, "a"]}}'},
                {"from": "observation", "value": "9"},
                {"from": "gpt", "value": "hello"},
            ]
        },
        {
            "messages": [
                SYSTEM,
                user("hi"),
                assistant("", tool_calls=[{key: CALL[key] for key in ("type", "function")}]),
                {"role": "tool", "content": "9"},
                assistant("hello"),
            ]
        },
    ),
    "sharegpt-system": (
        {"system": "s", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "o"}]},
        {"messages": [SYSTEM, user("hi"), assistant("o")]},
    ),
    "from-value": (
        {"messages": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}], "prompt": "stray"},
        CHAT,
    ),
    "capybara": (
        {"conversation": [{"input": "hi", "output": "hello"}, {"input": "a", "output": "b"}]},
        {"messages": [*CHAT["messages"], user("a"), assistant("b")]},
    ),
    "alpaca": ({"instruction": "hi", "input": "", "output": "hello"}, CHAT),
    "alpaca-input": (
        {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["x", "y"]]},
        {"messages": [SYSTEM, user("x"), assistant("y"), user("a\n\nb"), assistant("c")]},
    ),
    "openai-parts": ({"messages": [user(PARTS), assistant([{"type": "text", "text": "hello"}])]}, CHAT),
    "openai-weights": (
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)]},
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]},
    ),
    "train-false": (
        {"messages": [user("a"), assistant("b", train=False), user("c"), assistant("d", train=True)]},
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]},
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "s"}, *CHAT["messages"]]},
        {"messages": [SYSTEM, *CHAT["messages"]]},
    ),
    "empty-left-out": (
        {"messages": [user("a"), assistant("", weight=0), user("c"), assistant("d")]},
        {"messages": [user("a"), assistant("", weight=0), user("c"), assistant("d")]},
    ),
    "thoughts": (
        {"messages": [user("a"), assistant("b", reasoning="hm")]},
        {"messages": [user("a"), assistant("b", reasoning_content="hm")]},
    ),
    "stratos": (
        {
            "system": "s",
            "conversations": [
                {"from": "user", "value": "a"},
                {
                    "from": "assistant",
                    "value": "<|begin_of_thought|>\n\nhm\n\n<|end_of_thought|>\n\n"
                    "<|begin_of_solution|>\n\nb\n\n<|end_of_solution|>",
                },
            ],
        },
        {"messages": [SYSTEM, user("a"), assistant("b", reasoning_content="hm")]},
    ),
    "openai-tools": (
        {
            "messages": [
                user("hi"),
                assistant(
                    None,
                    tool_calls=[{**CALL, "function": {"name": "f", "arguments": json.dumps({"x": [1, "a"]})}}],
                    refusal=None,
                ),
                RESULT,
                assistant("hello"),
            ],
            "tools": json.dumps([TOOL]),
            "parallel_tool_calls": False,
        },
        {"messages": [user("hi"), CALLED, RESULT, assistant("hello")], "tools": [TOOL]},
    ),
    "openai-function": (
        {
            "messages": [
                user("hi"),
                assistant(None, function_call={"name": "f", "arguments": "{}"}),
                {"role": "function", "name": "f", "content": "9"},
            ]
        },
        {
            "messages": [
                user("hi"),
                assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {}}}]),
                {"role": "tool", "content": "9", "name": "f"},
            ]
        },
    ),
    "prompt-completion": ({"prompt": "a", "completion": "b", "id": 1}, {"prompt": "a", "completion": "b"}),
    "prompt-string": (
        {"prompt": "a", "completion": [assistant("b")]},
        {"prompt": [user("a")], "completion": [assistant("b")]},
    ),
    "completion-string": (
        {"prompt": [user("a")], "completion": "b"},
        {"prompt": [user("a")], "completion": [assistant("b")]},
    ),
    "text": ({"text": "NA", "source": 5}, {"text": "NA"}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_become_trls(form):
    row, expected = FORMS[form]
    data = load(write("rows.jsonl", row), streaming=form == "openai-tools")
    assert contents(data.train) == [expected]
    assert data.conversational == ("text" not in row and not isinstance(expected.get("prompt"), str))
    assert {*data.columns} == expected.keys() - {"tools"}


def test_rows_of_unlike_kinds_stand_in_one_file():
    """Arrow has one type for a column; rows that users have do not."""
    expected = [FORMS[form][1] for form in ("messages", "openai-parts", "openai-tools", "openai-weights", "thoughts")]
    rows = [FORMS[form][0] for form in ("messages", "openai-parts", "openai-tools", "openai-weights", "thoughts")]
    assert contents(load(write("rows.jsonl", *rows)).train) == expected
    Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
    assert contents(load("rows.json").train) == expected


CHOSEN, REJECTED = [user("a"), assistant("b")], [user("a"), assistant("c")]
EXPLICIT = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
ANSWERS = [
    {"response": text, "fine-grained_score": score, "overall_score": 10 - score}
    for text, score in zip("xbyc", (3, 5, 2, 1))
]
PAIRS = {
    "strings": (PAIR, PAIR),
    "implicit-strings": ({"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a c"}),
    "explicit": (EXPLICIT, EXPLICIT),
    "whole": ({"chosen": CHOSEN, "rejected": REJECTED}, EXPLICIT),
    "ultrafeedback-binarized": (
        {"prompt": "a", "prompt_id": "1", "messages": CHOSEN, "chosen": CHOSEN, "rejected": REJECTED, "score": 3.5},
        EXPLICIT,
    ),
    "prompt-string": ({"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}, EXPLICIT),
    "prompt-list-twice": ({"prompt": [user("a")], "chosen": CHOSEN, "rejected": REJECTED}, EXPLICIT),
    "answer-strings": ({"prompt": [user("a")], "chosen": "b", "rejected": "c"}, EXPLICIT),
    "system-inside": (
        {"prompt": "a", "chosen": [SYSTEM, *CHOSEN], "rejected": [SYSTEM, *REJECTED]},
        {**EXPLICIT, "prompt": [SYSTEM, user("a")]},
    ),
    "system-beside": (
        {"system": "s", "chosen": CHOSEN, "rejected": REJECTED},
        {**EXPLICIT, "prompt": [SYSTEM, user("a")]},
    ),
    "sharegpt": (
        {
            "chosen": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "rejected": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}],
        },
        EXPLICIT,
    ),
    "ultrafeedback": ({"instruction": "a", "completions": ANSWERS}, EXPLICIT),
    "longer": (
        {"chosen": [*CHOSEN, user("d"), assistant("e")], "rejected": [*REJECTED, user("d"), assistant("e")]},
        {
            "prompt": [user("a")],
            "chosen": [assistant("b"), user("d"), assistant("e")],
            "rejected": [assistant("c"), user("d"), assistant("e")],
        },
    ),
}


@pytest.mark.parametrize("form", PAIRS)
def test_forms_of_pairs_become_trls(form):
    row, expected = PAIRS[form]
    data = load(write("rows.jsonl", row), DPO_TYPES)
    assert contents(data.train) == [expected]
    assert data.conversational == isinstance(expected["chosen"], list)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_turn_may_stand_in_a_column(column):
    """Of chats, pairs and prompts; a turn that is there already stands, and a blank one is none."""
    system = {"role": "system", "content": "Be brief."}
    for row, types, read in (
        ({"conversations": [user("a"), assistant("b")]}, SFT_TYPES, "messages"),
        ({"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}, DPO_TYPES, "prompt"),
        ({"question": "a"}, (DatasetType.PROMPT,), "prompt"),
    ):
        (given,) = load(write("rows.jsonl", {**row, column: "Be brief."}), types).train
        assert given[read][:2] == [system, user("a")]
        (blank,) = load(write("rows.jsonl", {**row, column: " "}), types).train
        assert blank[read][0] == user("a")
    chat = {"messages": [{"role": "system", "content": "mine"}, user("a"), assistant("b")], column: "Be brief."}
    (own,) = load(write("rows.jsonl", chat)).train
    assert [message["content"] for message in own["messages"]] == ["mine", "a", "b"]


@pytest.mark.parametrize("key", ["tool_calls", "reasoning_content"])
def test_answers_may_differ_by_a_call_or_a_thought_alone(key):
    """What both say is the same, and still one is preferred; with the same call or thought they are the same answer."""
    calls = [[{"type": "function", "function": {"name": name, "arguments": {}}}] for name in ("add", "subtract")]
    one, other = {"tool_calls": calls, "reasoning_content": ["hm", "so"]}[key]
    pair = {
        "prompt": [user("a")],
        "chosen": [assistant("b", **{key: one})],
        "rejected": [assistant("b", **{key: other})],
    }
    (row,) = load(write("pairs.jsonl", pair), DPO_TYPES).train
    assert (row["chosen"][0][key], row["rejected"][0][key]) == (one, other)
    with pytest.raises(UserError, match="`chosen` and `rejected` are the same"):
        load(write("same.jsonl", {**pair, "rejected": pair["chosen"]}), DPO_TYPES)


def test_single_answers_with_labels_are_read():
    types = (DatasetType.UNPAIRED_PREFERENCE,)
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, "false", 1)]
    assert [row["label"] for row in load(write("rows.jsonl", *rows), types).train] == [True, False, True]
    with pytest.raises(UserError, match=r"Row 1 of .*`label` is perhaps; expected true"):
        load(write("rows.jsonl", {**rows[0], "label": "perhaps"}), types)


def test_csv_is_read_as_text():
    assert contents(load(write("rows.csv", "text,source", "กขค,web", "NA,web", "12,web")).train) == [
        {"text": "กขค"},
        {"text": "NA"},
        {"text": "12"},
    ]
    Path("pairs.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\na,b,c\n"))
    assert contents(load("pairs.csv.gz", DPO_TYPES).train) == [PAIR]
    cell = json.dumps(CHAT["messages"]).replace('"', '""')
    assert contents(load(write("chats.csv", "id,messages", f'1,"{cell}"')).train) == [CHAT]


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", '{"text": "a"}\n\n'), ("rows.json", '[{"text": "a"}]'), ("rows.csv", "text\na\n")],
)
def test_a_byte_order_mark_is_no_part_of_a_row(name, content):
    Path(name).write_text(content, encoding="utf-8-sig")
    assert contents(load(name).train) == [{"text": "a"}]


def test_one_row_over_many_lines_is_a_row():
    Path("row.json").write_text(json.dumps(CHAT, indent=2))
    assert contents(load("row.json").train) == [CHAT]


def test_cells_are_as_long_as_they_are_and_keep_their_line_ends():
    cells = ["a" * 200_000, "a\r\nb"]  # the csv module takes 131,072 characters by itself
    name = write("rows.csv", "text", *(f'"{cell}"' for cell in cells))
    Path(name).write_bytes("".join(f'"{cell}"\n' for cell in ("text", *cells)).encode())
    assert contents(load(name).train) == [{"text": cell} for cell in cells]


def test_data_that_arrow_holds_is_read_the_same(tmp_path):
    rows = [FORMS["messages"][0], FORMS["openai-weights"][0]]
    whole = Dataset.from_list(rows)
    whole.to_parquet("rows.parquet")
    whole.save_to_disk("saved")
    for name in ("rows.parquet", "saved"):
        assert contents(load(name).train) == [FORMS["messages"][1], FORMS["openai-weights"][1]]


def test_chats_that_nobody_answers_teach_nothing(tiny_tokenizer):
    """Without `assistant_only_loss`, too, where TRL learns to ask."""
    system = {"role": "system", "content": "s"}
    rows = [CHAT, {"messages": [system]}, {"messages": [system, user("a")]}]
    data = prepared(tiny_tokenizer, write("rows.jsonl", *rows))
    assert len(data.train) == 1
    assert data.notes == [
        "Left out 2 of 3 examples: they have no assistant's turn that is trained "
        "(row 2 of rows.jsonl, row 3 of rows.jsonl)."
    ]


def test_files_of_a_folder_that_no_split_has_are_said():
    """`datasets` takes the format of most files, or those that are named as splits, and passes over the rest."""
    folders = {"formats": ("a.parquet", "b.parquet", "c.jsonl"), "names": ("train.jsonl", "extra.jsonl")}
    for folder, files in folders.items():
        Path(folder).mkdir()
        for file in files:
            rows = Dataset.from_list([{"text": file}])
            (rows.to_parquet if file.endswith("parquet") else rows.to_json)(f"{folder}/{file}")
    Path("formats/README.md").touch()
    Path("names/_hidden.jsonl").touch()
    for folder, read in (("formats", ["a.parquet", "b.parquet"]), ("names", ["train.jsonl"])):
        data = load(folder)
        assert [row["text"] for row in data.train] == read
        assert data.notes == [f"Files of data in {folder} that are not read: {folders[folder][-1]}."]
    Path("formats/c.jsonl").unlink()
    assert load("formats").notes == []
    for number in range(7):
        write(f"names/{number}.jsonl", {"text": "a"})
    said = "Files of data in names that are not read: 0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl and 3 more."
    assert load("names").notes == [said]


def test_a_folder_of_files_that_are_not_read_here_is_left_to_datasets():
    Path("both").mkdir()
    line = json.dumps({"text": "a"}) + "\n"
    Path("both/a.jsonl").write_text(line)
    Path("both/b.jsonl.bz2").write_bytes(bz2.compress(line.encode()))
    assert len(load("both").train) == 2


def test_columns_that_nothing_reads_are_known():
    chat = {"messages": CHAT["messages"], "prompt": "a", "completion": "b", "tools": None, "system": "s", "kind": "k"}
    assert load(write("chats.jsonl", chat)).unread == ("prompt", "completion", "kind")
    assert load("chats.jsonl", data={"category_column": "kind"}).unread == ("prompt", "completion")
    alpaca = {"instruction": "a", "input": "", "output": "b", "history": None, "system": "s"}
    assert load(write("alpaca.jsonl", alpaca)).unread == ()
    assert load(write("pairs.jsonl", {**PAIR, "question": "q", "score": 1}), DPO_TYPES).unread == ("question", "score")
    assert load(write("text.jsonl", {"text": "a", "url": "b"})).unread == ("url",)


def test_what_a_pair_answers_may_be_a_question():
    """Orca's pairs: a system turn, a question, and two strings."""
    pair = {"system": "s", "question": "a", "chosen": "b", "rejected": "c"}
    assert contents(load(write("strings.jsonl", pair), DPO_TYPES).train) == [PAIR]
    (row,) = load(write("chats.jsonl", {**pair, "chosen": [assistant("b")]}), DPO_TYPES).train
    assert [message["content"] for message in row["prompt"]] == ["s", "a"]


def test_the_prompt_of_a_chat_is_what_its_last_answer_answers():
    """As `jai difficulty` and `jai pairs` take it, whose rows `jai grpo` goes on with."""
    chats = [[user("a")], [user("a"), assistant("b")], [user("a"), assistant("b"), user("c"), assistant("d")]]
    rows = [{"messages": chat, "answer": "1"} for chat in chats]
    data = load(write("rows.jsonl", *rows), (DatasetType.PROMPT,))
    assert [len(row["prompt"]) for row in data.train] == [1, 1, 3]
    with pytest.raises(UserError, match="ends with an answer"):
        load(write("rows.jsonl", {"messages": [assistant("b")]}), (DatasetType.PROMPT,))
    with pytest.raises(UserError, match="`prompt` ends with an answer"):
        load(write("rows.jsonl", {"prompt": chats[1]}), (DatasetType.PROMPT,))


def test_a_blank_answer_is_no_solution():
    """As an empty cell of a CSV file: a reward for it could never be had."""
    Path("rows.csv").write_text("question,answer\na, 4\nb,\nc,0\n")
    assert load("rows.csv", (DatasetType.PROMPT,)).train["solution"][:] == [" 4", None, "0"]


def test_a_configuration_of_a_file_is_refused():
    Dataset.from_list([{"text": "a"}]).save_to_disk("saved")
    for name in (write("rows.jsonl", CHAT), "saved"):
        arguments = stage_arguments(SFTConfig, script={"dataset_name": name, "dataset_config": "en"})
        with pytest.raises(UserError, match=f"The configuration en of {name} is asked for, and only"):
            load_training_data(arguments, SFT_TYPES)


def test_files_that_break_off_are_named():
    Path("rows.jsonl.gz").write_bytes(gzip.compress(json.dumps(CHAT).encode() * 50)[:-20])
    with pytest.raises(UserError, match=r"rows.jsonl.gz cannot be read"):
        load("rows.jsonl.gz")
    Path("rows.csv").write_bytes("text\nก".encode("tis-620"))
    with pytest.raises(UserError, match=r"rows.csv cannot be read: it is not UTF-8 text.* Save it as UTF-8"):
        load("rows.csv")


def test_options_that_need_all_rows_are_refused_of_a_stream():
    name = write("rows.jsonl", CHAT)
    for option, value in {"test_split_size": 1, "drop_duplicates": True, "max_faulty_rows": 0.5}.items():
        with pytest.raises(UserError, match=rf"`dataset_streaming` is on, and `{option}`.* needs all rows"):
            load(name, streaming=True, data={option: value})


# --- tokens


LONG = 40  # tokens of a sequence in these tests


@pytest.fixture(scope="module")
def documents(sentences) -> list[dict[str, str]]:
    """Documents from a third of a sequence to twelve of them."""
    return [{"text": " ".join(sentences[i : i + 1] * length)} for i, length in ((0, 1), (1, 2), (2, 8), (3, 1), (4, 5))]


def prepared(tokenizer: Any, name: str, *, data: dict[str, Any] | None = None, **training: Any) -> TrainingData:
    """The rows as they are trained on."""
    arguments = stage_arguments(SFTConfig, script={"dataset_name": name}, data=data, **training)
    return prepare_rows(load_training_data(arguments, SFT_TYPES), arguments, tokenizer)


def tokens_of(trainer: SFTTrainer, part: str = "train") -> list[tuple[list[int], list[int]]]:
    rows = trainer.train_dataset if part == "train" else trainer.eval_dataset
    return [(row["input_ids"], row["labels"]) for row in rows]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": None},
        {"truncation_mode": "keep_end"},
        {"packing": True, "packing_strategy": "bfd"},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "bfd_split", "eval_packing": False},
    ],
    ids=["one-by-one", "unlimited", "keep_end", "bfd", "bfd_split", "wrapped", "evaluated-unpacked"],
)
def test_tokens_of_plain_text_are_trls_and_counted(model, tiny_tokenizer, documents, options):
    """Against what TRL makes of the same rows, to the token."""
    Path("data").mkdir()
    write("data/train.jsonl", *documents)
    write("data/test.jsonl", documents[2])
    options = {"max_length": LONG, "eval_strategy": "epoch", **options}
    data = prepared(tiny_tokenizer, "data", **options)
    training = SFTConfig("out", bf16=False, report_to="none", **options)
    train, evaluation = count_tokens(data, tiny_tokenizer, training)
    whole = [len(tiny_tokenizer(row["text"] + tiny_tokenizer.eos_token)["input_ids"]) for row in documents]
    trainers = [
        SFTTrainer(model, training, train_dataset=rows, eval_dataset=held_out, processing_class=tiny_tokenizer)
        for rows, held_out in (
            (data.train, data.evaluation),
            (Dataset.from_list(documents), Dataset.from_list(documents[2:3])),
        )
    ]
    for part in ("train", "test"):
        ours, theirs = (tokens_of(trainer, part) for trainer in trainers)
        assert ours == theirs
    assert (train.rows, train.is_sample, train.tokens) == (5, False, sum(whole))
    assert sum(len(ids) for ids, _ in tokens_of(trainers[0])) == train.tokens - train.cut
    assert sum(len(ids) for ids, _ in tokens_of(trainers[0], "test")) == evaluation.tokens - evaluation.cut
    keeps_all = options.get("packing_strategy") in ("bfd_split", "wrapped") or options["max_length"] is None
    cut = sum(max(length - LONG, 0) for length in whole)
    assert cut > train.tokens / 2
    assert train.cut == (0 if keeps_all else cut)
    assert evaluation.cut == (0 if keeps_all and "eval_packing" not in options else whole[2] - LONG)


def test_bfd_split_keeps_every_token_of_more_rows_than_it_packs_at_a_time(tiny_tokenizer, model, sentences):
    name = write("rows.jsonl", *({"text": " ".join(sentences[i % 6 : i % 6 + 2])} for i in range(1500)))
    options = {"max_length": LONG, "packing": True, "packing_strategy": "bfd_split"}
    data = prepared(tiny_tokenizer, name, **options)
    training = SFTConfig("out", bf16=False, report_to="none", **options)
    trainer = JaiSFTTrainer(model, training, train_dataset=data.train, processing_class=tiny_tokenizer)
    assert sum(map(len, trainer.train_dataset["input_ids"])) == count_tokens(data, tiny_tokenizer, training)[0].tokens


@pytest.fixture
def bos_tokenizer(tiny_tokenizer):
    """A tokenizer that begins text with <s>, as Llama's does; a chat template writes its special tokens itself."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))])
    tokenizer.backend_tokenizer.post_processor = begin
    assert tokenizer("a")["input_ids"][0] == tokenizer.convert_tokens_to_ids("<s>")
    return tokenizer


@pytest.mark.parametrize(
    "kind", ["chats", "chats-whole", "tools", "completions", "completions-whole", "turns", "turns-assistant"]
)
def test_tokens_and_labels_are_trls(model, bos_tokenizer, sentences, kind):
    """What we make of rows and give to TRL as tokens, against what TRL itself makes of the same rows."""
    answers = ["yes", *(sentences[i] * (i + 1) for i in range(3))]
    chats = [{"messages": [user("hi"), assistant(answer), user("ho"), assistant("yes")]} for answer in answers]
    call = [user("hi"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "9"}, assistant("yes")]
    turns = [{"prompt": chat["messages"][:1], "completion": chat["messages"][1:2]} for chat in chats]
    rows = {
        "chats": chats,
        "tools": [{"messages": call, "tools": [TOOL]}],
        "completions": [{"prompt": "Q: ", "completion": f" {answer}"} for answer in answers],
        "turns": turns,
    }[kind.split("-")[0]]
    options = {"max_length": 60} if "tools" not in kind else {"max_length": None}
    options |= {"assistant_only_loss": kind in ("chats", "tools", "turns-assistant")}
    options |= {"completion_only_loss": False} if kind == "completions-whole" else {}
    training = SFTConfig("out", bf16=False, report_to="none", **options)
    data = prepared(bos_tokenizer, write("rows.jsonl", *rows), **options)
    theirs = Dataset.from_list(rows, on_mixed_types="use_json")
    trainers = [
        SFTTrainer(model, training, train_dataset=dataset, processing_class=bos_tokenizer)
        for dataset in (data.train, theirs)
    ]
    ours, theirs = (tokens_of(trainer) for trainer in trainers)
    assert ours == theirs
    counted, _ = count_tokens(data, bos_tokenizer, training)
    assert sum(len(ids) for ids, _ in ours) == counted.tokens - counted.cut
    assert (counted.cut > 0) == ("tools" not in kind)
    if kind == "tools":
        taught = bos_tokenizer.decode([label for label in ours[0][1] if label != -100])
        assert '<tool_call> {"name": "f", "arguments": {"x": [1, "a"]}} </tool_call>' in " ".join(taught.split())


def test_tokens_of_pairs_are_counted_as_they_are_trained(checkpoint, tiny_tokenizer, sentences):
    pairs = [{"prompt": "Q: ", "chosen": sentences[i] * (i + 1), "rejected": sentences[i + 1]} for i in range(4)]
    chats = [
        {
            "prompt": [user(pair["prompt"])],
            "chosen": [assistant(pair["chosen"])],
            "rejected": [assistant(pair["rejected"])],
        }
        for pair in pairs
    ]
    whole = [{side: [*chat["prompt"], *chat[side]] for side in ("chosen", "rejected")} for chat in chats]
    for rows in (pairs, chats, whole):
        training = DPOConfig("out", bf16=False, report_to="none", max_length=60)
        dataset = Dataset.from_list(rows)
        data = TrainingData("rows", DatasetType.PREFERENCE, tuple(rows[0]), rows is not pairs, dataset, None)
        counted, _ = count_tokens(data, tiny_tokenizer, training)
        trainer = JaiDPOTrainer(str(checkpoint), args=training, train_dataset=dataset, processing_class=tiny_tokenizer)
        collated = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        assert int(collated["attention_mask"].sum()) == counted.tokens - counted.cut
        assert counted.cut > 0


def test_rows_that_do_not_fit_the_template_are_faulty(tiny_tokenizer):
    name = write(
        "rows.jsonl", CHAT, {"messages": [{"role": "robot", "content": "x"}, assistant("b")]}, {"messages": None}
    )
    fault = r"Row 2 of rows.jsonl \(split train\) .* does not fit the chat template: .*'robot'"
    for limit in (1, 0.5):  # those that were found before count
        with pytest.raises(UserError, match=rf"{fault}.* 2 of 3 rows are faulty.* `max_faulty_rows` \({limit}\)"):
            prepared(tiny_tokenizer, name, data={"max_faulty_rows": limit})
    data = prepared(tiny_tokenizer, name, data={"max_faulty_rows": 2})
    assert (data.rows, data.faulty, len(data.notes)) == (1, 2, 2)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"messages": [user("a"), assistant("b", reasoning_content="c")]}, "reasoning_content"),
        ({**CHAT, "tools": [TOOL]}, "tools"),
        ({"messages": [user("a"), assistant("b", tool_calls=[CALL])]}, "tool_calls"),
        ({"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]}, "weight"),
    ],
)
def test_what_a_template_would_leave_out_in_silence_is_a_fault(tiny_tokenizer, row, word):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    name = write("rows.jsonl", row)
    prepared(tokenizer, name, assistant_only_loss=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.role + m.content }}{% endgeneration %}{% endfor %}"
    )
    with pytest.raises(UserError, match=rf"Row 1 of .*it has `{word}`, which the chat template does not know"):
        prepared(tokenizer, name, assistant_only_loss=True)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"chosen": [assistant("b", reasoning_content="c")]}, "reasoning_content"),
        ({"rejected": [assistant("b", tool_calls=[CALL])]}, "tool_calls"),
        ({"tools": [TOOL]}, "tools"),
    ],
)
def test_what_a_template_would_leave_out_of_pairs_is_a_fault(tiny_tokenizer, row, word):
    pair = {"prompt": [user("a")], "chosen": [assistant("x")], "rejected": [assistant("y")]}
    data, config = load(write("rows.jsonl", {**pair, **row}), DPO_TYPES), DPOConfig("out", bf16=False)
    count_tokens(data, tiny_tokenizer, config)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    with pytest.raises(UserError, match=rf"Row 1 of .*it has `{word}`, which the chat template does not know"):
        count_tokens(data, tokenizer, config)


def test_both_answers_of_a_pair_are_trained(tiny_tokenizer):
    earlier = [user("a"), assistant("b", weight=0), user("c")]
    config = DPOConfig("out", bf16=False)
    pair = {"prompt": earlier, "chosen": [assistant("x")], "rejected": [assistant("y")]}
    count_tokens(load(write("rows.jsonl", pair), DPO_TYPES), tiny_tokenizer, config)
    for name in ("chosen", "rejected"):
        file = write("left_out.jsonl", {**pair, name: [assistant("z", weight=0)]})
        with pytest.raises(UserError, match=r"Row 1 of .*an answer is not to be trained \(`weight: 0`\), and a pair"):
            load(file, DPO_TYPES)
    single = {"prompt": earlier, "completion": [assistant("x")], "label": True}
    types = (DatasetType.UNPAIRED_PREFERENCE,)
    count_tokens(load(write("single.jsonl", single), types), tiny_tokenizer, KTOConfig("out", bf16=False))
    file = write("untrained.jsonl", {**single, "completion": [assistant("x", weight=0)]})
    with pytest.raises(UserError, match=r"not to be trained \(`weight: 0`\), and all with a label are"):
        load(file, types)


def test_earlier_answers_of_a_prompt_need_no_loss_on_turns(tiny_tokenizer):
    """Where the loss is taken on what follows the prompt alone, `weight: 0` in it leaves out nothing."""
    earlier = [user("a"), assistant("b", weight=0), user("c")]
    asked = load(write("prompts.jsonl", {"prompt": earlier, "answer": "1"}), (DatasetType.PROMPT,))
    counted, _ = count_tokens(asked, tiny_tokenizer, GRPOConfig("out", bf16=False))
    assert counted.longest == counted.tokens > 0
    name = write("completions.jsonl", {"prompt": earlier, "completion": [assistant("d")]})
    (row,) = prepared(tiny_tokenizer, name).train
    assert tiny_tokenizer.decode([label for label in row["labels"] if label != -100]).split("<|end|>")[0].strip() == "d"
    with pytest.raises(UserError, match=r"needs `assistant_only_loss: true`"):
        prepared(tiny_tokenizer, name, completion_only_loss=False)


def test_single_answers_are_counted(tiny_tokenizer):
    rows = [{"prompt": "a", "completion": " b", "label": True}]
    data = load(write("rows.jsonl", *rows), (DatasetType.UNPAIRED_PREFERENCE,))
    counted, _ = count_tokens(data, tiny_tokenizer, SFTConfig("out", bf16=False))
    assert counted.tokens == len(tiny_tokenizer("a b" + tiny_tokenizer.eos_token)["input_ids"])


def test_turns_left_out_of_the_loss_need_a_loss_on_turns(tiny_tokenizer):
    name = write("rows.jsonl", {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]})
    (row,) = prepared(tiny_tokenizer, name, assistant_only_loss=True).train
    assert tiny_tokenizer.decode([label for label in row["labels"] if label != -100]).split("<|end|>")[0].strip() == "d"
    with pytest.raises(UserError, match=r"not to be trained \(`weight: 0`\), which needs `assistant_only_loss: true`"):
        prepared(tiny_tokenizer, name)


def test_plain_text_is_never_cut_and_the_plan_says_what_is(checkpoint, tiny_tokenizer, documents, capsys):
    name = write("documents.jsonl", *documents)
    whole = [len(tiny_tokenizer(row["text"] + tiny_tokenizer.eos_token)["input_ids"]) for row in documents]
    total, cut = sum(whole), sum(max(length - LONG, 0) for length in whole)

    def plan(out: str, **options: Any) -> str:
        options = {
            "model_name_or_path": checkpoint,
            "dataset_name": name,
            "output_dir": out,
            "max_steps": 1,
            "max_length": LONG,
            "save_strategy": "no",
            "disable_tqdm": True,
            **options,
        }
        sft.main([part for key, value in options.items() for part in (f"--{key}", str(value))])
        return " ".join(capsys.readouterr().out.split("{")[0].split())

    printed = plan("packed", packing=True)
    assert f"5 rows, {total:,} tokens; packed (longer documents continue in another sequence)" in printed
    assert "cut off nothing" in printed
    assert read_step(Path("packed"))["options"]["packing_strategy"] == "bfd_split"
    printed = plan("bfd", packing=True, packing_strategy="bfd")
    assert f"cut off {cut:,} of {total:,} tokens ({cut / total:.1%}): beyond {LONG} in their sequence" in printed
    assert "`packing_strategy: bfd_split`" in printed
    printed = plan("wrapped", packing=True, packing_strategy="wrapped")
    assert "wrapped: documents see the end of the one before them" in printed
    assert f"cut off {cut:,} of {total:,} tokens" in plan("alone")
    name = write("chats.jsonl", CHAT, CHAT)
    plan("chats", packing=True, assistant_only_loss=True)
    assert read_step(Path("chats"))["options"]["packing_strategy"] == "bfd"
