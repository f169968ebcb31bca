# SPDX-License-Identifier: Apache-2.0
"""Mixtures of sources, gates of quality, the validation split, the loss of each category, the preview, the recipes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from dataset_hub import DatasetHub
from datasets import Dataset
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments, SFTConfig

from jai.errors import UserError
from jai.provenance import read_step
from jai.trainers import dpo, sft
from jai.trainers.arguments import JaiTrainingArguments, StageArguments, parse_arguments
from jai.trainers.data import CATEGORY, TrainingData, hash_of_rows, load_training_data
from jai.trainers.data_arguments import DataArguments
from jai.trainers.group_losses import GroupLosses
from jai.trainers.grpo import JaiGRPOConfig
from jai.trainers.mixture import cut_validation, even_order, mix_rows
from jai.trainers.pair_figures import PairFigures
from jai.trainers.prepare import prepare_rows
from jai.trainers.rows import DatasetType
from jai.trainers.sft import JaiSFTConfig

RECIPES = Path(__file__).parent.parent / "recipes"
OPTIONS = (ScriptArguments, JaiSFTConfig, ModelConfig, JaiTrainingArguments, DataArguments)
SFT_TYPES = (DatasetType.LANGUAGE_MODELING, DatasetType.PROMPT_COMPLETION)


pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def numbered(name: str, count: int, **more: Any) -> str:
    return write(f"{name}.jsonl", [chat(f"{name} {number}", f"answer {number}", **more) for number in range(count)])


def prepared(
    tokenizer: Any,
    name: str | None = None,
    *,
    types: tuple[DatasetType, ...] = SFT_TYPES,
    config: type | None = None,
    training=None,
    **data: Any,
) -> TrainingData:
    config = config or (SFTConfig if types is SFT_TYPES else DPOConfig)
    arguments = StageArguments(
        ScriptArguments(dataset_name=name),
        config("out", bf16=False, report_to="none", **(training or {})),
        ModelConfig(),
        JaiTrainingArguments(),
        DataArguments(**data),
    )
    return prepare_rows(load_training_data(arguments, types), arguments, tokenizer)


def questions(rows: Any) -> list[str]:
    return [row["messages"][0]["content"] for row in rows]


# --- rows of a mixture


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_every_beginning_of_the_order_is_spread_evenly(seed):
    order = even_order(1000, seed)
    assert sorted(order) == list(range(1000))
    for taken in (10, 100, 377, 900):
        chosen = np.zeros(1000)
        chosen[order[:taken]] = 1
        for part in (chosen[:500], chosen[500:], chosen[::2], chosen[1::2], chosen[::3], chosen[200:300]):
            assert abs(part.sum() - taken * len(part) / 1000) <= 3
    assert list(order) != list(even_order(1000, seed + 1))


def rows_of(counts: dict[str, int]) -> list[str | None]:
    return [name for name, count in counts.items() for _ in range(count)]


def test_the_largest_mixture_that_repeats_nothing():
    """Table 10's SFT.1 of Table 9's rows: culture and safety are short, and safety the more so."""
    counts = {"chat": 65_664, "if": 185_270, "task": 139_986, "culture": 169_276, "safety": 5_235, "long": 13_369}
    shares = {"chat": 10.15, "if": 24.19, "task": 24.72, "culture": 39.32, "safety": 1.62, "long": 0.0}
    mixture = mix_rows(rows_of(counts), shares, tokens=None)
    assert len(set(mixture.positions.tolist())) == len(mixture.positions)
    taken = {share.name: share.rows for share in mixture.shares}
    assert taken["safety"] == 5_235
    assert taken["long"] == 0
    assert mixture.printed_sum == pytest.approx(100)
    total = sum(taken.values())
    assert total == pytest.approx(5_235 / 0.0162, abs=3)
    for name, share in shares.items():
        assert taken[name] / total == pytest.approx(share / 100, abs=1e-5)


def test_sft_2_is_table_9_without_long():
    """Its shares sum to 97.69 %: they are those of all 578,800 rows, and Long's 2.31 % are missing."""
    counts = {"chat": 65_664, "if": 185_270, "task": 139_986, "culture": 169_276, "safety": 5_235}
    shares = yaml.safe_load((RECIPES / "sft_2.yaml").read_text(encoding="utf-8"))["shares"]
    assert sum(shares.values()) == pytest.approx(97.69)
    assert sum(counts.values()) + 13_369 == 578_800
    assert {name: round(100 * count / 578_800, 2) for name, count in counts.items()} == shares
    mixture = mix_rows(rows_of(counts), shares, tokens=None)
    for share in mixture.shares:  # all of the rows, but for the shares' rounding to two places
        assert share.rows == pytest.approx(counts[share.name], rel=6e-3)


def test_shares_of_tokens():
    rng = np.random.default_rng(0)
    groups = rows_of({"a": 500, "b": 300})
    tokens = np.concatenate([rng.integers(1, 20, 500), rng.integers(50, 100, 300)])
    mixture = mix_rows(groups, {"a": 1, "b": 3}, tokens=tokens, of="tokens")
    a, b = mixture.shares
    assert a.rows in (499, 500)  # it is the shorter one
    assert b.tokens / (a.tokens + b.tokens) == pytest.approx(0.75, abs=0.005)
    assert b.rows < 300 < a.rows


@pytest.mark.parametrize(("size", "rows"), [(14, 1), (15, 2), (16, 2), (30, 3)])
def test_a_share_is_met_as_nearly_as_whole_rows_can(size, rows):
    mixture = mix_rows(["a"] * 3, {"a": 1}, tokens=np.full(3, 10), of="tokens", size=size)
    assert (mixture.shares[0].rows, mixture.shares[0].tokens) == (rows, 10 * rows)


def test_the_seed_decides_the_order_of_categories():
    """Each has one row, so that it decides nothing else."""
    names = list("abcdefgh")
    orders = [mix_rows(names, dict.fromkeys(names, 1), tokens=None, seed=seed).positions.tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(8))


def test_all_rows_may_be_asked_for_and_a_share_of_nothing_needs_none():
    mixture = mix_rows(rows_of({"a": 3}), {"a": 1, "b": 0}, tokens=None, size=3)
    assert sorted(mixture.positions) == [0, 1, 2]
    assert [(share.rows, share.of_rows) for share in mixture.shares] == [(3, 3), (0, 0)]


def test_the_group_that_ends_a_mixture_is_the_one_with_least_for_its_share():
    """Of 10 rows for a share of 9/10 and 5 for 1/10, the 10 run out first."""
    mixture = mix_rows(["a"] * 10 + ["b"] * 5, {"a": 9, "b": 1}, tokens=None)
    assert [share.rows for share in mixture.shares] == [10, 1]
    assert len(set(mixture.positions.tolist())) == 11


def test_a_given_size_and_repetition():
    groups = rows_of({"a": 40, "b": 40})
    mixture = mix_rows(groups, {"a": 3, "b": 1}, tokens=None, size=40)
    assert [share.rows for share in mixture.shares] == [30, 10]
    with pytest.raises(
        UserError, match=r"`mixture_size` is 100 examples, .*there are 53: a has 40 for its share of 75"
    ):
        mix_rows(groups, {"a": 3, "b": 1}, tokens=None, size=100)
    repeated = mix_rows(groups, {"a": 3, "b": 1}, tokens=None, size=120, repeat=True)
    times = np.bincount(repeated.positions, minlength=80)
    assert set(times[:40]) == {2, 3}
    assert (times[:40].sum(), times[40:].sum()) == (90, 30)
    # The same seed gives the same rows; a smaller mixture is part of a larger one; another seed takes others.
    again = mix_rows(groups, {"a": 3, "b": 1}, tokens=None, size=40)
    assert again.positions.tolist() == mixture.positions.tolist() != sorted(mixture.positions.tolist())
    smaller = mix_rows(groups, {"a": 3, "b": 1}, tokens=None, size=20)
    assert set(smaller.positions) < set(mixture.positions)
    other = mix_rows(groups, {"a": 3, "b": 1}, tokens=None, size=40, seed=1)
    assert set(other.positions) != set(mixture.positions)


@pytest.mark.parametrize(
    ("groups", "shares", "message"),
    [
        (["a", "b"], {"a": 1}, r"`shares` has none for b"),
        (["a"], {"a": 1, "b": 1}, r"`shares` has b, and no rows are of it; there are a\."),
        (["a", None], {"a": 1}, r"Some rows have no category"),
    ],
)
def test_shares_that_do_not_fit_the_rows_are_refused(groups, shares, message):
    with pytest.raises(UserError, match=message):
        mix_rows(groups, shares, tokens=None)


def test_sources_are_mixed_and_interleaved(tiny_tokenizer):
    """TRL's `fraction` takes the first rows."""
    sources = [
        {"path": numbered("thai", 60), "category": "chat", "language": "th"},
        {"path": numbered("english", 30), "category": "chat", "language": "en"},
        {"path": numbered("task", 60), "category": "task", "language": "th"},
    ]
    result = prepared(tiny_tokenizer, datasets=sources, shares={"chat": 30, "task": 20})
    assert result.counts == {
        ("thai.jsonl", "chat", "th"): 60,
        ("english.jsonl", "chat", "en"): 30,
        ("task.jsonl", "task", "th"): 60,
    }
    result = prepared(tiny_tokenizer, datasets=sources, shares={"chat": 30, "task": 20}, mixture_size=50)
    rows = result.train
    assert [result.counts["thai.jsonl", "chat", "th"], result.counts["english.jsonl", "chat", "en"]] == [20, 10]
    numbers = [int(question.split()[1]) for question in questions(rows) if question.startswith("thai")]
    assert len({number // 20 for number in numbers}) == 3
    assert rows[CATEGORY][:] != sorted(rows[CATEGORY][:])
    assert questions(
        prepared(tiny_tokenizer, datasets=sources, shares={"chat": 30, "task": 20}, mixture_size=50).train
    ) == questions(rows)


def test_fractions_of_sources_and_rows(tiny_tokenizer):
    sources = [{"path": numbered("a", 60), "fraction": 0.75}, {"path": numbered("b", 60), "fraction": 0.25}]
    assert prepared(tiny_tokenizer, datasets=sources).counts == {
        ("a.jsonl", None, None): 60,
        ("b.jsonl", None, None): 20,
    }
    sources = [{"path": "a.jsonl", "rows": 17}, {"path": "b.jsonl", "rows": 2}]
    result = prepared(tiny_tokenizer, datasets=sources)
    assert result.counts == {("a.jsonl", None, None): 17, ("b.jsonl", None, None): 2}
    assert max(int(question.split()[1]) for question in questions(result.train)) > 50
    sources[1]["rows"] = 61
    with pytest.raises(UserError, match=r"`rows` of b.jsonl is 61, and it has 60"):
        prepared(tiny_tokenizer, datasets=sources)


def test_the_seed_of_the_data_decides_which_rows_are_taken(tiny_tokenizer):
    """As transformers has it: `data_seed`, or where there is none, `seed`."""
    sources = [{"path": numbered("rows", 30), "rows": 5}]
    taken = [
        questions(prepared(tiny_tokenizer, datasets=sources, training=training).train)
        for training in ({"seed": 1}, {"data_seed": 1}, {"seed": 1, "data_seed": 2}, {"data_seed": 2})
    ]
    assert taken[0] == taken[1] != taken[2] == taken[3]


def test_rows_of_sources_are_interleaved_and_one_may_stand_twice(tiny_tokenizer):
    one, other = numbered("one", 40), numbered("other", 40)
    sources = [{"path": one, "rows": 30}, {"path": other, "rows": 30}]
    asked = questions(prepared(tiny_tokenizer, datasets=sources).train)
    assert 5 < sum(question.startswith("one") for question in asked[:30]) < 25
    twice = [{"path": one, "fraction": 1, "split": "train"}, {"path": one, "fraction": 3}]
    shares = prepared(tiny_tokenizer, datasets=twice).mixture.shares
    assert [(share.name, share.wanted) for share in shares] == [(f"{one} (1)", 0.25), (f"{one} (2)", 0.75)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": []}, "`datasets` is empty"),
        ({"datasets": [{"path": "a", "fracton": 1}]}, "'fracton', which does not exist. Did you mean 'fraction'"),
        ({"datasets": [{"category": "a"}]}, "has no `path`"),
        ({"datasets": [{"path": 5}]}, "`path` in `datasets` is 5; expected text"),
        ({"datasets": [{"path": "a", "language": False}]}, "`language` in `datasets` is False; expected text"),
        ({"datasets": [{"path": "a", "score_column": 5}]}, "`score_column` in `datasets` is 5; expected text"),
        ({"datasets": [{"path": "a", "rows": 0}]}, "`rows` in `datasets` is 0"),
        ({"datasets": [{"path": "a", "fraction": 1}, {"path": "b"}]}, "`fraction` must be set for all"),
        (
            {"datasets": [{"path": "a", "fraction": 1, "category": "b"}], "shares": {"b": 1}},
            "and not beside `shares` of categories",
        ),
        ({"datasets": [{"path": "a", "fraction": 10**400}]}, "expected a number, 0 or more"),
        ({"shares": {"a": 1}}, "`shares` are of categories"),
        ({"shares": {"a": -1}, "category_column": "x"}, "The share of a in `shares` is -1"),
        ({"shares": {"a": 0}, "category_column": "x"}, "`shares` are all 0"),
        ({"shares": "a", "category_column": "x"}, "`shares` is 'a'; expected a share for each category"),
        ({"mixture_size": 5}, "`mixture_size` is of a mixture by shares"),
        ({"shares_of": "tokens"}, "`shares_of` is of a mixture by shares"),
        ({"repeat_rows": True, "shares": {"a": 1}, "category_column": "x"}, "Give `mixture_size`"),
        ({"score_above": 3}, "`score_above` needs scores"),
        ({"drop_wrong_language": True}, "needs to know the right one"),
        ({"max_faulty_rows": -1}, "`max_faulty_rows` is -1; expected 0 or more"),
        ({"max_faulty_rows": float("nan")}, "`max_faulty_rows` is nan; expected 0 or more"),
        ({"test_split_size": 0}, "`test_split_size` is 0; expected more than 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DataArguments(**options).sources("x", None, "train")


# --- gates


def test_gates_leave_out_and_say_what(tiny_tokenizer):
    rows = [chat("a", "yes", score=4), chat("b", "no", score=3), chat("c", "no", score=None), chat("a", "yes", score=5)]
    name = write("rows.jsonl", rows)
    result = prepared(tiny_tokenizer, name, score_column="score", score_above=3)
    assert questions(result.train) == ["a", "a"]
    assert (
        "Left out 2 of 4 examples: their score is not above 3 (1 have none) (row 2 of rows.jsonl, row 3 of"
        in " ".join(result.notes)
    )
    result = prepared(tiny_tokenizer, name)
    assert result.rows == 4
    assert "1 of 4 rows are the same as an earlier one (row 4 of rows.jsonl), and stay" in result.notes[0]
    result = prepared(tiny_tokenizer, name, drop_duplicates=True)
    assert questions(result.train) == ["a", "b", "c"]
    assert "Left out 1 of 4 examples: they are the same as an earlier row (row 4" in result.notes[0]
    with pytest.raises(UserError, match=r"None of the examples in rows.jsonl can be trained on: their score"):
        prepared(tiny_tokenizer, name, score_column="score", score_above=5)


def test_rows_that_are_too_long_are_left_out_on_demand(tiny_tokenizer):
    name = write("rows.jsonl", [chat("a", "yes"), chat("b", "yes " * 100)])
    assert prepared(tiny_tokenizer, name, training={"max_length": 40}).rows == 2
    result = prepared(tiny_tokenizer, name, training={"max_length": 40}, drop_truncated=True)
    assert questions(result.train) == ["a"]
    assert "they have more than 40 tokens (row 2 of rows.jsonl)" in result.notes[0]
    split = {"max_length": 40, "packing": True, "packing_strategy": "bfd_split"}
    for options, why in ((split, "packing continues"), ({"max_length": None}, "`max_length` is null")):
        result = prepared(tiny_tokenizer, name, training=options, drop_truncated=True)
        assert (result.rows, len(result.notes)) == (2, 1)
        assert result.notes[0].startswith(f"`drop_truncated` leaves nothing out: no row is cut off, for {why}")
    ends = {"max_length": 20, "assistant_only_loss": True, "truncation_mode": "keep_end"}
    assert prepared(tiny_tokenizer, write("asked.jsonl", [chat("a " * 100, "yes")]), training=ends).rows == 1
    with pytest.raises(UserError, match="nothing that the loss is taken on lies in their first 4 tokens"):
        prepared(tiny_tokenizer, name, training={"max_length": 4, "assistant_only_loss": True})


def test_answers_in_another_language_are_left_out(tiny_tokenizer):
    thai, english = "วันนี้อากาศดีมาก", "The weather is fine."
    rows = [
        chat("a", thai, lang="th"),
        chat("b", english, lang="th"),
        chat("c", english, lang="en"),
        chat("d", "hm", lang="fr"),
    ]
    name = write("rows.jsonl", rows)
    result = prepared(tiny_tokenizer, name, language_column="lang", drop_wrong_language=True)
    assert questions(result.train) == ["a", "c", "d"]
    assert "Not checked for their language: rows whose language is fr." in result.notes
    assert "Left out 1 of 4 examples: their answers are not in their language" in " ".join(result.notes)
    pairs = [{"prompt": "q", "chosen": thai, "rejected": answer, "lang": "th"} for answer in ("ไม่รู้", english)]
    name = write("pairs.jsonl", pairs)
    types = (DatasetType.PREFERENCE,)
    result = prepared(tiny_tokenizer, name, types=types, language_column="lang", drop_wrong_language=True)
    assert [row["rejected"] for row in result.train] == ["ไม่รู้"]


# --- the validation split


def test_the_validation_split_holds_no_prompt_that_is_trained_on():
    prompts = np.random.default_rng(0).integers(-(2**62), 2**62, 300)
    rows = np.concatenate([prompts, prompts[:100]])
    train, held_out = cut_validation(rows, 0.1, seed=0)
    assert len(held_out) == 40
    assert sorted([*train, *held_out]) == list(range(400))
    assert not set(rows[train]) & set(rows[held_out])
    assert cut_validation(rows, 40, seed=0)[1].tolist() == held_out.tolist()
    assert cut_validation(rows, 0.1, seed=1)[1].tolist() != held_out.tolist()
    # The order of the rows decides nothing.
    assert set(rows[::-1][cut_validation(rows[::-1], 0.1, seed=0)[1]]) == set(rows[held_out])
    for size in (0.999, 1e-6, 400):
        with pytest.raises(UserError, match="no validation split of that size"):
            cut_validation(rows, size, seed=0)


@pytest.mark.parametrize("seed", range(8))
def test_a_prompt_with_too_many_answers_to_hold_out_ends_nothing(seed):
    prompts = np.random.default_rng(0).integers(-(2**62), 2**62, 61)
    train, held_out = cut_validation(np.concatenate([prompts, np.repeat(prompts[:1], 49)]), 20, seed)
    assert (len(train), len(held_out)) == (90, 20)


def test_a_validation_split_is_cut_and_evaluated(checkpoint, tiny_tokenizer):
    rows = [chat(f"q {number % 12}", f"answer {number}") for number in range(24)]
    name = write("rows.jsonl", rows)
    result = prepared(tiny_tokenizer, name, training={"eval_strategy": "epoch"}, test_split_size=0.25)
    assert (result.rows, len(result.evaluation)) == (18, 6)
    assert not set(questions(result.train)) & set(questions(result.evaluation))
    with pytest.raises(UserError, match="`test_split_size` is set, and `eval_strategy` is no"):
        prepared(tiny_tokenizer, name, test_split_size=0.25)
    out = run(checkpoint, "out", dataset_name=name, eval_strategy="steps", eval_steps=1, test_split_size=0.25)
    assert read_step(out)["metrics"]["eval_loss"] > 0


def test_what_cannot_be_had_of_pairs_or_twice_is_refused(tiny_tokenizer):
    pairs = write("pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "kind": "d"}])
    types = (DatasetType.PREFERENCE,)
    with pytest.raises(UserError, match="`drop_truncated` is for SFT"):
        prepared(tiny_tokenizer, pairs, types=types, drop_truncated=True)
    with pytest.raises(UserError, match="`shares_of: tokens` is for SFT"):
        prepared(tiny_tokenizer, pairs, types=types, category_column="kind", shares={"d": 1}, shares_of="tokens")
    with pytest.raises(UserError, match=r"`category_column` is kin, which no row of pairs\.jsonl has"):
        prepared(tiny_tokenizer, pairs, types=types, category_column="kin")
    with pytest.raises(UserError, match="`test_split_size` is set, and `eval_strategy` is no"):
        prepared(tiny_tokenizer, pairs, types=types, test_split_size=0.5)
    with pytest.raises(UserError, match="Both `dataset_name` and `datasets` are given"):
        prepared(tiny_tokenizer, pairs, datasets=[{"path": pairs}])
    with pytest.raises(UserError, match="`eval_strategy` is on, and there are several `datasets`"):
        prepared(tiny_tokenizer, types=types, datasets=[{"path": pairs}] * 2, training={"eval_strategy": "epoch"})


def test_rows_that_are_trained_and_evaluated_on_are_said(tiny_tokenizer):
    Path("data").mkdir()
    write("data/train.jsonl", [chat("a", "b"), chat("c", "d")])
    write("data/test.jsonl", [chat("a", "b"), chat("e", "f")])
    notes = prepared(tiny_tokenizer, "data", training={"eval_strategy": "epoch"}).notes
    assert notes == ["1 of 2 rows to evaluate on are among those to train on."]


def test_rows_to_evaluate_on_without_a_loss_are_said(tiny_tokenizer):
    Path("data").mkdir()
    write("data/train.jsonl", [chat("a", "b")])
    write("data/test.jsonl", [chat("c", "d"), chat("e " * 100, "f"), chat("g " * 100, "h")])
    options = {"eval_strategy": "epoch", "max_length": 20, "assistant_only_loss": True}
    result = prepared(tiny_tokenizer, "data", training=options)
    assert questions(result.evaluation) == ["c"]
    assert result.notes == ["Left out 2 of 3 rows to evaluate on: no loss is taken on what is left of them."]
    write("data/test.jsonl", [chat("e " * 100, "f")])
    with pytest.raises(UserError, match="None of the rows to evaluate on in data"):
        prepared(tiny_tokenizer, "data", training=options)


def test_which_rows_are_chosen_is_known_before_the_data(tiny_tokenizer):
    """The recipe's 10,000 prompts of GSM8K and MATH, by a rule, from as many rows as both have."""
    text = (RECIPES / "grpo_math.yaml").read_text(encoding="utf-8")
    config, sizes = yaml.safe_load(text), (7_473, 7_500)
    (printed,) = re.findall(r"^#   ([0-9a-f]{64})$", text, re.MULTILINE)
    rows = [
        (place, int(row) + 1)
        for place, (size, source) in enumerate(zip(sizes, config["datasets"]))
        for row in even_order(size, config["seed"])[: source["rows"]]
    ]
    assert len(set(rows)) == 10_000
    assert hash_of_rows(rows) == printed
    sources = []
    for place, size in enumerate(sizes):
        name, answer = (("question", "answer"), ("problem", "solution"))[place]
        write(f"{place}.jsonl", [{name: f"{place} {row}", answer: "#### 1"} for row in range(size)])
        source = {key: value for key, value in config["datasets"][place].items() if key not in ("name", "revision")}
        sources.append({**source, "path": f"{place}.jsonl"})
    data = prepared(
        tiny_tokenizer, types=(DatasetType.PROMPT,), config=JaiGRPOConfig, training={"seed": 42}, datasets=sources
    )
    asked = {tuple(map(int, row["prompt"][0]["content"].split())) for row in data.train}
    assert asked == {(place, row - 1) for place, row in rows}
    assert data.chosen_rows == printed


def test_a_record_says_which_rows_were_chosen(checkpoint):
    write("few.jsonl", [chat(f"{row}", "yes") for row in range(9)])
    records = []
    for number, source in enumerate(({"rows": 4}, {"rows": 4}, {"rows": 5}, {})):
        out = run(checkpoint, f"out-{number}", datasets=[{"path": "few.jsonl", **source}])
        records.append(read_step(out)["dataset"].get("chosen_rows_sha256"))
    assert records[0] == records[1] != records[2]
    assert len(records[0]) == 64
    assert records[3] is None


def test_revisions_are_of_the_hub(tiny_tokenizer):
    write("few.jsonl", [chat("a", "b")])
    with pytest.raises(UserError, match=r"`revision` is abc, and few\.jsonl is not a dataset on the Hub"):
        prepared(tiny_tokenizer, datasets=[{"path": "few.jsonl", "revision": "abc"}])
    with pytest.raises(UserError, match="`revision` in `datasets` is 5; expected text"):
        prepared(tiny_tokenizer, datasets=[{"path": "few.jsonl", "revision": 5}])


@pytest.mark.slow
def test_a_pinned_commit_of_the_hub_is_what_is_read(checkpoint, tmp_path):
    with DatasetHub(tmp_path / "hub", user="lab") as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo("lab/maths", repo_type="dataset")
        commits = []
        for number in range(2):
            Dataset.from_list([chat(f"commit {number}", "yes")] * 3).to_parquet("train.parquet")
            commits.append(
                api.upload_file(
                    path_or_fileobj="train.parquet",
                    path_in_repo="train.parquet",
                    repo_id="lab/maths",
                    repo_type="dataset",
                ).oid
            )
        environment = os.environ | hub.environment() | {"HF_TOKEN": hub.token}
        for number, revision in enumerate([*commits, None]):
            source = {"path": "lab/maths", **({"revision": revision} if revision else {})}
            config = {"model_name_or_path": str(checkpoint), "output_dir": "out", "datasets": [source], "preview": 1}
            Path("stage.yaml").write_text(yaml.safe_dump({**config, "bf16": False, "report_to": "none"}))
            command = [sys.executable, "-m", "jai", "sft", "--config", "stage.yaml"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            digit = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids(str(min(number, 1)))
            assert f"({digit})" in done.stdout


# --- the loss of each category


def run(checkpoint: Path, out: str, config: dict[str, Any] | None = None, **options: Any) -> Path:
    options = {
        "model_name_or_path": str(checkpoint),
        "output_dir": out,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        **options,
    }
    options = {**(config or {}), **options}
    Path("stage.yaml").write_text(yaml.safe_dump(options, allow_unicode=True), encoding="utf-8")
    return sft.main(["--config", "stage.yaml"])


def logs_of(out: Path) -> list[dict[str, float]]:
    return json.loads((out / read_step(out)["log_history"]).read_text())


@pytest.fixture(scope="module")
def grouped(sentences) -> list[dict[str, Any]]:
    return [
        chat(sentences[number % 6], f"{sentences[(number + 1) % 6]} {number}", kind=("chat", "task", None)[number % 3],
             lang=("th", "en")[number % 2])
        for number in range(10)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def losses_by_hand(checkpoint, grouped) -> dict[str, float]:
    """Means over the labelled tokens of each group's rows, one row at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint)
    sums: dict[str, list[float]] = {}
    for row in grouped:
        encoded = tokenizer.apply_chat_template(row["messages"], return_assistant_tokens_mask=True)
        ids, taught = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"]).bool()
        with torch.no_grad():
            logits = model.eval()(ids[None]).logits[0]
        loss = F.cross_entropy(logits[:-1][taught[1:]], ids[1:][taught[1:]], reduction="sum").item()
        for key in (f"category/{row['kind']}", f"language/{row['lang']}"):
            total = sums.setdefault(key, [0.0, 0.0])
            total[0] += loss
            total[1] += int(taught[1:].sum())
    return {f"loss/{key}": loss / tokens for key, (loss, tokens) in sums.items() if "None" not in key}


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2},
        {"packing": True, "max_length": 256, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 100},
        {"packing": True, "max_length": 512, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 50,
         "linear_cross_entropy": True},
        {"padding_free": True, "max_length": None, "per_device_train_batch_size": 10},
    ],
    ids=["padded", "packed", "packed-kernel", "padding-free"],
)  # fmt: skip
def test_losses_of_categories_and_languages_are_logged(checkpoint, grouped, losses_by_hand, options):
    if options.get("linear_cross_entropy") and not torch.cuda.is_available():
        pytest.skip("the kernel needs a GPU")
    name = write("rows.jsonl", grouped)
    out = run(
        checkpoint, "out", dataset_name=name, category_column="kind", language_column="lang", learning_rate=0.0,
        num_train_epochs=1, max_steps=-1, assistant_only_loss=True, logging_strategy="epoch", **options
    )  # fmt: skip
    (log,) = [log for log in logs_of(out) if "loss" in log]
    assert {key: value for key, value in log.items() if key.startswith("loss/")} == pytest.approx(
        losses_by_hand, abs=1e-5
    )
    assert not any(key.startswith("train_loss/") for log in logs_of(out) for key in log)


def test_losses_of_categories_on_what_is_cut_off_split_and_evaluated(checkpoint, grouped):
    """Documents that are longer than a sequence are known by their parts."""
    Path("data").mkdir()
    for split in ("train", "test"):
        write(f"data/{split}.jsonl", [{**row, "all": "x"} for row in grouped])
    shared = {"dataset_name": "data", "category_column": "kind", "language_column": "all", "learning_rate": 0.0}
    shared |= {"max_length": 32, "router_aux_loss_coef": 0.0}
    for index, options in enumerate(({"packing": True}, {"packing": True, "packing_strategy": "bfd_split"})):
        out = run(
            checkpoint,
            f"out-{index}",
            shared,
            eval_strategy="steps",
            eval_steps=1,
            per_device_train_batch_size=10,
            per_device_eval_batch_size=10,
            gradient_accumulation_steps=50,
            num_train_epochs=1,
            max_steps=-1,
            logging_strategy="epoch",
            **options,
        )
        (trained,) = [log for log in logs_of(out) if "loss" in log]
        evaluated = [log for log in logs_of(out) if "eval_loss" in log][-1]
        assert trained["loss/language/x"] == pytest.approx(trained["loss"], abs=1e-5)
        for key in ("loss/category/chat", "loss/category/task"):
            assert evaluated[f"eval_{key}"] == pytest.approx(trained[key], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"truncation_mode": "keep_end"}, ([3, 4], [3, 4])),
        ({"truncation_mode": "keep_start"}, ([1, 2], [1, 2])),
        ({"packing": True, "packing_strategy": "bfd_split", "eval_packing": False}, ([1, 2], [3, 4], [1, 2])),
    ],
)
def test_documents_are_known_by_what_is_trained_of_them(options, known):
    """Of those with the same tokens the first decides; of rows to evaluate on `eval_packing` does what is seen."""
    train = Dataset.from_list([{"input_ids": [1, 2, 3, 4], "category": name} for name in "ab"])
    evaluation = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "category": "c"}])
    data = TrainingData("d", DatasetType.LANGUAGE_MODELING, ("messages",), True, train, evaluation)
    losses = GroupLosses(data, SFTConfig("out", bf16=False, max_length=2, **options))
    for ids in known:
        document = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 2)}
        assert losses._token_groups(document).tolist() == [[0, 0]]
        evaluated = {"input_ids": torch.tensor([ids]) + 4, "attention_mask": torch.ones(1, 2)}
        is_seen = not options.get("packing") or ids == [1, 2]
        assert losses._token_groups(evaluated).tolist() == [[2, 2] if is_seen else [3, 3]]


def test_wrapped_packing_tells_no_categories_apart_and_says_so(tiny_tokenizer, grouped):
    name, options = write("rows.jsonl", grouped), {"packing": True, "packing_strategy": "wrapped"}
    data = prepared(tiny_tokenizer, name, training=options, category_column="kind")
    assert data.notes == ["No loss by category and language is logged: `wrapped` packing hides where documents end."]
    assert not GroupLosses.can_tell(data, SFTConfig("out", bf16=False, **options))
    assert GroupLosses.can_tell(data, SFTConfig("out", bf16=False, packing=True))


def test_where_no_categories_are_told_apart_it_is_said(tiny_tokenizer):
    name = write("pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "kind": "d"}])
    types = (DatasetType.PREFERENCE,)
    result = prepared(tiny_tokenizer, name, types=types, category_column="kind", training={"ld_alpha": 0.5})
    said = "No figures by category and language are logged: "
    assert result.notes == [f"{said}`ld_alpha` weighs tokens by their places."]
    assert not PairFigures.can_tell(result, DPOConfig("out", bf16=False, ld_alpha=0.5))
    assert PairFigures.can_tell(result, DPOConfig("out", bf16=False))
    assert not prepared(tiny_tokenizer, name, types=types, category_column="kind").notes
    answers = write("answers.jsonl", [{"prompt": "a", "completion": "b", "label": True, "kind": "d"}])
    result = prepared(
        tiny_tokenizer, answers, types=(DatasetType.UNPAIRED_PREFERENCE,), config=KTOConfig, category_column="kind"
    )
    assert result.notes == [f"{said}TRL's KTOTrainer keeps no such columns."]
    assert not PairFigures.can_tell(result, KTOConfig("out", bf16=False))


# --- the preview


def test_the_preview_shows_labels_and_loads_nothing(checkpoint, tiny_tokenizer, capsys):
    name = write("rows.jsonl", [chat("hi", "hello"), chat("a", "b")])
    out = run(checkpoint, "out", dataset_name=name, preview=1, assistant_only_loss=True, max_length=8)
    printed = capsys.readouterr().out
    assert not out.exists()
    ids = tiny_tokenizer.apply_chat_template(chat("hi", "hello")["messages"])["input_ids"]
    title, question, answer = [line for line in printed.splitlines() if line.strip()]
    assert title.startswith(f"Row 1: {len(ids)} tokens, ")
    assert title.endswith(f"; the last {len(ids) - 8} are cut off")
    shown = [int(number) for number in re.findall(r"\((\d+)\)", question + " " + answer)]
    assert shown == ids[:8]
    assert question.startswith("  -     <|user|>(")
    assert answer.startswith("  loss  ")
    taught = [int(number) for number in re.findall(r"\((\d+)\)", answer)]
    prompt = tiny_tokenizer.apply_chat_template(chat("hi", "")["messages"][:1], add_generation_prompt=True)["input_ids"]
    assert taught == ids[len(prompt) : 8]
    assert f", {len(taught)} with a label;" in title  # what is cut off has none
    pairs = write("pairs.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " c"}])
    dpo.main(
        ["--model_name_or_path", str(checkpoint), "--dataset_name", pairs, "--output_dir", "out", "--preview", "3"]
    )
    printed = capsys.readouterr().out
    assert "Row 1, chosen: " in printed
    assert "Row 1, rejected: " in printed
    assert printed.count("  loss  ") == 2


def test_the_preview_needs_no_weights(checkpoint, tmp_path, capsys):
    from shutil import copytree

    broken = copytree(checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    name = write("rows.jsonl", [chat("hi", "hello")])
    run(broken, "out", dataset_name=name, preview=1)
    assert "Row 1" in capsys.readouterr().out


# --- the recipes

MIXTURES = {
    "sft_1": {"th": 0, "en": 0},
    "sft_2": {"th": 0, "en": 0},
    "sft_reasoning_v1": {"en": 0, "th": 2_000},  # no number is all of them
    "sft_reasoning_v2": {"en": 0, "th": 6_500},
    "sft_reasoning_v3": {"en": 0, "th": 7_000},
    "sft_reasoning_v4": {"en": 10_000, "th": 17_000},
}


@pytest.mark.parametrize("recipe", MIXTURES)
def test_recipes_of_mixtures_parse(recipe):
    parsed = parse_arguments(OPTIONS, ["--config", str(RECIPES / f"{recipe}.yaml")], "jai sft")
    rows: dict[str | None, int] = {}
    for source in parsed[-1].sources("", None, "train"):
        rows[source.language] = rows.get(source.language, 0) + (source.rows or 0)
    assert rows == MIXTURES[recipe]
    assert parsed[1].packing
    assert parsed[1].packing_strategy is None  # documents do not see each other


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            recipe,
            marks=[pytest.mark.slow]
            if recipe in ("sft_1", "sft_reasoning_v1", "sft_reasoning_v2", "sft_reasoning_v3")
            else [],
        )
        for recipe in MIXTURES
    ],
)
def test_recipes_of_mixtures_run_on_generated_rows(recipe, checkpoint, sentences):
    """As they are but for the places of the data, and with a thousandth of their rows."""
    config = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))
    for number, source in enumerate(config["datasets"]):
        count = max(source["rows"] // 1000, 1) if "rows" in source else 17
        thought = "<think>\nก็คือ\n</think>\n\n" if source["category"] == "reasoning" else ""
        answer = sentences[0] if source["language"] == "th" else sentences[2]
        rows = [chat(f"{number} {row}", f"{thought}{answer} {row}") for row in range(count * (1 + ("rows" in source)))]
        source["path"] = write(f"source-{number}.jsonl", rows)
        if "rows" in source:
            source["rows"] = count
    out = run(
        checkpoint,
        "out",
        config,
        max_length=512,
        merge_adapter=False,
        new_row_ids="300-380",
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1000,
        dtype="float32",
    )
    (log,) = [log for log in logs_of(out) if "loss" in log]
    assert log["loss"] > 0
    names = {f"loss/{name}/{source[name]}" for source in config["datasets"] for name in ("category", "language")}
    assert {key for key in log if key.startswith("loss/")} == names
    record = read_step(out)["dataset"]
    rows = sum(source["rows"] for source in record["sources"])
    assert rows == record["rows"]
    assert read_step(out)["options"].get("shares") == config.get("shares")
    assert "datasets" not in read_step(out)["options"]
    for category, share in config.get("shares", {}).items():
        of = sum(source["rows"] for source in record["sources"] if source["category"] == category)
        assert of / rows == pytest.approx(share / sum(config["shares"].values()), abs=0.02)
    if "shares" not in config:
        assert sorted(source["rows"] for source in record["sources"]) == sorted(
            source.get("rows", 17) for source in config["datasets"]
        )
