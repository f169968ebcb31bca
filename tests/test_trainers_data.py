# SPDX-License-Identifier: Apache-2.0
"""Training data: what is read, which rows are refused, and how many tokens are cut off."""

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

from jai.errors import UserError
from jai.provenance import read_step
from jai.trainers import sft
from jai.trainers.arguments import JaiTrainingArguments, StageArguments
from jai.trainers.data import DatasetType, TrainingData, load_training_data
from jai.trainers.dpo import JaiDPOTrainer
from jai.trainers.sft import JaiSFTTrainer
from jai.trainers.tokens import count_tokens

SFT_TYPES = (DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION)
DPO_TYPES = (DatasetType.PREFERENCE,)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


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


def load(name: str, types: tuple[DatasetType, ...] = SFT_TYPES, *, streaming: bool = False, **training) -> TrainingData:
    script = ScriptArguments(dataset_name=name, dataset_streaming=streaming)
    config = SFTConfig if types is SFT_TYPES else DPOConfig
    options = StageArguments(script, config("out", bf16=False, **training), ModelConfig(), JaiTrainingArguments())
    return load_training_data(options, types)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


CHAT = {"messages": [user("hi"), assistant("hello")]}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
PARTS = [{"type": "text", "text": "hi"}]


# --- rows that are refused


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([CHAT, "null", CHAT], r"Row 2 of .*`messages` is null"),
        ([CHAT, {"messages": None}, {"messages": None}], r"Row 2 of .*`messages` is null\. Rows like it: 3\."),
        ([{"text": "a"}, {"text": None}], r"Row 2 of .*`text` is null"),
        ([{"text": None}, {"text": "a"}], r"Row 1 of .*`text` is null"),
        ([{"text": None}], r"Row 1 of .*`text` is null"),
        ([{"text": 5}], r"Row 1 of .*`text` is 5; expected a string"),
        ([CHAT, {"text": "a"}], r"Row 2 of .*`messages` is null"),
        ([CHAT, {"messages": [user("hi"), assistant(None)]}], r"Row 2 of .*`messages` has no content in message 2"),
        ([{"messages": [user(PARTS), assistant(PARTS)]}], r"Row 1 of .*content in parts in message 1"),
        ([CHAT, {"messages": [user(PARTS), assistant("x")]}], r"Row 2 of .*content in parts in message 1"),
        ([CHAT, {"messages": []}], r"Row 2 of .*`messages` has no messages"),
        ([{"messages": "hi"}], r"Row 1 of .*`messages` is hi; expected a list of messages"),
        ([{"messages": ["hi", "ho"]}], r"Row 1 of .*`messages` has hi as message 1; expected a message such as"),
        ([{"messages": [{"role": None, "content": "x"}]}], r"Row 1 of .*has no role in message 1"),
        ([{"conversations": [{"from": "human", "value": None}]}], r"Row 1 of .*has no content in message 1"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], r"Row 2 of .*`completion` is null"),
        ([{"prompt": "a", "completion": [assistant("b")]}], r"`completion` is .*; expected a string, like `prompt`"),
        ([{"prompt": [user("a")], "completion": "b"}], r"`completion` is b; expected a list .*, like `prompt`"),
        ([{**CHAT, "tools": "[{"}], r"Row 1 of .*`tools` is no valid JSON"),
        ([{**CHAT, "chat_template_kwargs": {"a": 1}}, {**CHAT, "chat_template_kwargs": None}],
         r"Row 2 of .*`chat_template_kwargs` is null; expected a mapping"),
        ([{"instruction": "a", "input": "", "output": "b"}], r"columns instruction, input, output; .*Alpaca's form"),
        (["5"], r"cannot be read"),
        ([{"text": "a"}] * 3 + [{"text": None}] * 8, r"Row 4 of .*Rows like it: 5, 6, 7, 8, 9 and 2 more\."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_rows_that_cannot_be_trained_on_are_named(rows, message, streaming):
    name = write("rows.jsonl", *rows)
    if not streaming:
        with pytest.raises(UserError, match=message):
            load(name)
        return
    first = message.split("Rows like it")[0].rstrip(r"\. ")  # a stream ends at the first
    with pytest.raises(UserError, match=first):
        list(load(name, streaming=True).train)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, {**PAIR, "chosen": None}], r"Row 2 of .*`chosen` is null"),
        ([PAIR, {**PAIR, "prompt": None}], r"Row 2 of .*`prompt` is null"),
        ([PAIR, {**PAIR, "chosen": "c"}], r"Row 2 of .*`chosen` and `rejected` are the same"),
        ([{"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}],
         r"Row 1 of .*begin differently"),
        ([{"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}], r"is the beginning of the other"),
        ([{"chosen": "b", "rejected": "c"}], r"Row 1 of .*begin differently"),
        ([{"chosen": "Q: b", "rejected": "Q: b c"}], r"is the beginning of the other"),
        ([{"chosen": "", "rejected": "c"}], r"begin differently"),
        ([{"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}], r"begin differently"),
        ([{**PAIR, "rejected": [assistant("b")]}], r"`rejected` is .*; expected a string, like `chosen`"),
    ],
)  # fmt: skip
def test_pairs_that_cannot_be_trained_on_are_named(rows, message):
    with pytest.raises(UserError, match=message):
        load(write("rows.jsonl", *rows), DPO_TYPES)


def test_a_cell_that_is_empty_is_named():
    with pytest.raises(UserError, match=r"Row 2 of rows.csv .*`chosen` is null"):
        load(write("rows.csv", "prompt,chosen,rejected", "a,b,c", "d,,f"), DPO_TYPES)


def test_rows_to_evaluate_on_are_checked_too():
    Path("data").mkdir()
    write("data/train.jsonl", CHAT)
    write("data/test.jsonl", CHAT, {"messages": None})
    assert load("data").evaluation is None
    with pytest.raises(UserError, match=r"Row 2 of data \(split test\)"):
        load("data", eval_strategy="epoch")
    write("data/test.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r"(split test of data lacks messages|cannot be loaded|cannot be read)"):
        load("data", eval_strategy="epoch")


# --- forms that are read


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"conversations": CHAT["messages"]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "id": "1"},
        {"messages": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}], "prompt": "stray"},
    ],
    ids=["messages", "conversations", "sharegpt", "from-value"],
)
def test_conversations_of_all_forms_are_messages(row, streaming):
    data = load(write("rows.jsonl", row), streaming=streaming)
    assert (data.columns, data.conversational, data.is_plain_text) == (("messages",), True, False)
    assert list(data.train) == [CHAT]


def test_ultrafeedback_is_read():
    """Its prompt is the first turn of both conversations."""
    chosen, rejected = [user("a"), assistant("b")], [user("a"), assistant("c")]
    row = {"prompt": "a", "prompt_id": "1", "messages": chosen, "chosen": chosen, "rejected": rejected, "score": 3.5}
    assert list(load(write("rows.jsonl", row), DPO_TYPES).train) == [{"chosen": chosen, "rejected": rejected}]


def test_csv_is_read():
    assert list(load(write("rows.csv", "text,source", "กขค,web")).train) == [{"text": "กขค"}]
    Path("pairs.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\na,b,c\n"))
    assert list(load("pairs.csv.gz", DPO_TYPES).train) == [PAIR]


# --- tokens


LONG = 40  # tokens of a sequence in these tests


@pytest.fixture(scope="module")
def documents(sentences) -> list[dict[str, str]]:
    """Documents from a third of a sequence to twelve of them."""
    return [{"text": " ".join(sentences[i : i + 1] * length)} for i, length in ((0, 1), (1, 2), (2, 8), (3, 1), (4, 5))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": None},
        {"packing": True, "packing_strategy": "bfd"},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "bfd_split", "eval_packing": False},
    ],
    ids=["one-by-one", "unlimited", "bfd", "bfd_split", "wrapped", "evaluated-unpacked"],
)
def test_tokens_of_plain_text_are_counted_as_they_are_trained(model, tiny_tokenizer, documents, options):
    """Against what TRL makes of them, to the token."""
    rows = Dataset.from_list(documents)
    training = SFTConfig("out", bf16=False, report_to="none", **{"max_length": LONG, **options})
    data = TrainingData("documents", DatasetType.LANGUAGE_MODELING, ("text",), False, rows, rows.select([2]))
    whole = [len(tiny_tokenizer(row["text"] + tiny_tokenizer.eos_token)["input_ids"]) for row in documents]
    train, evaluation = count_tokens(data, tiny_tokenizer, training)
    trainer = JaiSFTTrainer(
        model, training, train_dataset=data.train, eval_dataset=data.evaluation, processing_class=tiny_tokenizer
    )
    assert (train.rows, train.is_sample, train.tokens) == (5, False, sum(whole))
    assert sum(map(len, trainer.train_dataset["input_ids"])) == train.tokens - train.cut
    assert sum(map(len, trainer.eval_dataset["input_ids"])) == evaluation.tokens - evaluation.cut
    keeps_all = options.get("packing_strategy") in ("bfd_split", "wrapped") or "max_length" in options
    cut = sum(max(length - LONG, 0) for length in whole)
    assert cut > train.tokens / 2
    assert train.cut == (0 if keeps_all else cut)
    assert evaluation.cut == (0 if keeps_all and "eval_packing" not in options else whole[2] - LONG)


def test_bfd_split_keeps_every_token_of_more_rows_than_it_packs_at_a_time(tiny_tokenizer, model, sentences):
    rows = Dataset.from_list([{"text": " ".join(sentences[i % 6 : i % 6 + 2])} for i in range(1500)])
    data = TrainingData("rows", DatasetType.LANGUAGE_MODELING, ("text",), False, rows, None)
    training = SFTConfig(
        "out", bf16=False, report_to="none", max_length=LONG, packing=True, packing_strategy="bfd_split"
    )
    trainer = JaiSFTTrainer(model, training, train_dataset=rows, processing_class=tiny_tokenizer)
    assert sum(map(len, trainer.train_dataset["input_ids"])) == count_tokens(data, tiny_tokenizer, training)[0].tokens


@pytest.fixture
def bos_tokenizer(tiny_tokenizer):
    """A tokenizer that begins text with <s>, as Llama's does; a chat template writes its special tokens itself."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))])
    tokenizer.backend_tokenizer.post_processor = begin
    assert tokenizer("a")["input_ids"][0] == tokenizer.convert_tokens_to_ids("<s>")
    return tokenizer


def test_tokens_of_conversations_and_completions_are_counted_as_they_are_trained(model, bos_tokenizer, sentences):
    answers = ["yes", *(sentences[i] * (i + 1) for i in range(3))]
    chats = [{"messages": [user("hi"), assistant(answer)]} for answer in answers]
    completions = [{"prompt": "Q: ", "completion": answer} for answer in answers]
    turns = [{"prompt": chat["messages"][:1], "completion": chat["messages"][1:]} for chat in chats]
    for rows, type_, conversational in (
        (chats, DatasetType.LANGUAGE_MODELING, True),
        (completions, DatasetType.PROMPT_COMPLETION, False),
        (turns, DatasetType.PROMPT_COMPLETION, True),
    ):
        training = SFTConfig("out", bf16=False, report_to="none", max_length=60, assistant_only_loss=rows is chats)
        dataset = Dataset.from_list(rows)
        data = TrainingData("rows", type_, tuple(rows[0]), conversational, dataset, None)
        counted, _ = count_tokens(data, bos_tokenizer, training)
        trainer = JaiSFTTrainer(model, training, train_dataset=dataset, processing_class=bos_tokenizer)
        assert len(trainer.train_dataset) == 4
        assert sum(map(len, trainer.train_dataset["input_ids"])) == counted.tokens - counted.cut
        assert counted.cut > 0


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


def test_a_row_that_does_not_fit_the_template_is_named(tiny_tokenizer):
    data = load(write("rows.jsonl", CHAT, {"messages": [{"role": "robot", "content": "x"}]}))
    with pytest.raises(UserError, match=r"Row 2 of rows.jsonl does not fit the chat template: .*'robot'"):
        count_tokens(data, tiny_tokenizer, SFTConfig("out", bf16=False))


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
    assert f"5 rows, {total:,} tokens; packed (longer documents go on in another sequence)" in printed
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
