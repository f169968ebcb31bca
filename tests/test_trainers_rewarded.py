# SPDX-License-Identifier: Apache-2.0
"""Reward models, their calibration and their scores; GRPO with rewards by name; KTO: against TRL's own classes."""

import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from json_lines import turn, write_rows
from peft import LoraConfig, PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import (
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    ScriptArguments,
)

from jai.errors import UserError
from jai.files import resumable_folder
from jai.preferences import scoring
from jai.preferences.calibration import (
    PAPER_THRESHOLD,
    Calibration,
    calibration_error,
    fit_calibration,
    read_calibration,
)
from jai.preferences.options import ScoreOptions
from jai.preferences.reward_model import RewardModel
from jai.preferences.scoring import _join, score_file, scored_conversation
from jai.provenance import checkpoint_revision, read_step
from jai.trainers import dpo, grpo, kto, reward
from jai.trainers.announce import context_text, estimate_steps
from jai.trainers.arguments import JaiTrainingArguments, StageArguments, parse_arguments
from jai.trainers.base_model import open_base_model
from jai.trainers.data import load_training_data
from jai.trainers.data_arguments import DataArguments
from jai.trainers.grpo import (
    GRPO,
    JaiGRPOConfig,
    JaiGRPOTrainer,
    RewardCounts,
    prepare_prompts,
    say_what_was_rewarded,
)
from jai.trainers.reward import JaiRewardConfig, measure_reward_model
from jai.trainers.rewards import final_answer_reward, language_reward
from jai.trainers.tokens import TokenCount

RECIPES = Path(__file__).parent.parent / "recipes"
OF_ALL = (ModelConfig, JaiTrainingArguments, DataArguments)
EXPERTS, TOP_K = 4, 2


pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), router_aux_loss_coef=0.1)


@pytest.fixture(scope="module")
def pair_rows(sentences) -> list[dict[str, Any]]:
    """Pairs whose chosen answer ends with a word of its own, some longer than the rejected one and some shorter."""
    return [
        {
            "prompt": turn("user", f"{sentences[i % 6]} {i}"),
            "chosen": turn("assistant", f"{'yes ' * (i % 3)}ดี"),
            "rejected": turn("assistant", "no"),
            "category": ("chat", "fluency")[i % 2],
        }
        for i in range(24)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, pair_rows) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows)


@pytest.fixture(scope="module")
def prompt_rows(sentences) -> list[dict[str, Any]]:
    return [{"question": sentences[i % 6][: 8 + 5 * i], "answer": f"#### {i}", "lang": "th"} for i in range(6)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, prompt_rows) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", prompt_rows)


def arguments(model: Path, data: Path, out: str, **options: Any) -> list[str]:
    """Command-line arguments of a run of two steps."""
    values = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": out,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    return [
        part
        for key, value in values.items()
        for part in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]


def log_of(out: Path) -> list[dict[str, float]]:
    record = read_step(out)
    return [log for log in json.loads((out / record["log_history"]).read_text()) if "loss" in log]


TRLS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "bf16": False,
    "learning_rate": 1e-3,
}


def losses(trainer: Any, *keys: str) -> list[list[float]]:
    trainer.train()
    return [[log[key] for key in ("loss", *keys)] for log in trainer.state.log_history if "loss" in log]


# --- The reward model


def test_trls_own_reward_trainer_gives_the_same_losses(checkpoint, pairs, pair_rows):
    options = {"learning_rate": 1e-3, "router_aux_loss_coef": 0}
    out = reward.main(arguments(checkpoint, pairs, "out", **options))
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pair_rows]
    trainer = RewardTrainer(
        model=str(checkpoint),
        args=RewardConfig(output_dir="trl", **TRLS),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    assert [[log["loss"], log["accuracy"]] for log in log_of(out)] == losses(trainer, "accuracy")
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.equal(model.score.weight, trainer.model.score.weight)


@pytest.mark.parametrize("gradient_checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_auxiliary_loss_is_added(checkpoint, pairs, pair_rows, gradient_checkpointing):
    options = {"learning_rate": 0, "max_steps": 1, "per_device_train_batch_size": 24}
    options |= {"gradient_checkpointing": gradient_checkpointing}
    log = log_of(reward.main(arguments(checkpoint, pairs, "with", **options)))[0]
    without = log_of(reward.main(arguments(checkpoint, pairs, "without", router_aux_loss_coef=0, **options)))[0]
    assert "aux_loss" not in without
    assert log["loss"] == pytest.approx(without["loss"] + 0.1 * log["aux_loss"], abs=1e-5)
    assert log["grad_norm"] != pytest.approx(without["grad_norm"], abs=1e-5)  # it has gradients of its own

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    texts = [row["prompt"] + row[name] for name in ("chosen", "rejected") for row in pair_rows]
    ids = [tokenizer.apply_chat_template(text, return_dict=True)["input_ids"] for text in texts]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        router_logits = model(**batch, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(router_logits, EXPERTS, TOP_K, batch["attention_mask"])
    assert log["aux_loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.fixture(scope="module")
def reward_model(checkpoint, pairs, tmp_path_factory) -> Path:
    """A reward model of some steps, with held-out pairs; through LoRA, merged."""
    folder = tmp_path_factory.mktemp("reward")
    options = {
        "max_steps": 20,
        "learning_rate": 1e-2,
        "use_peft": True,
        "merge_adapter": True,
        "test_split_size": 9,
        "eval_strategy": "steps",
        "eval_steps": 20,
        "category_column": "category",
    }
    before = os.getcwd()
    os.chdir(folder)
    try:
        return folder / reward.main(arguments(checkpoint, pairs, "out", **options))
    finally:
        os.chdir(before)


def test_a_reward_model_tells_pairs_apart_and_is_calibrated(reward_model, checkpoint, pair_rows):
    log = log_of(reward_model)
    assert log[-1]["loss"] < log[0]["loss"] - 0.2
    record = json.loads((reward_model / "reward_calibration.json").read_text())
    held_out = record["held_out"]
    assert held_out["all pairs"]["pairs"] == record["pairs"] == 9
    for kind in ("category ", "the chosen answer "):
        assert sum(each["pairs"] for name, each in held_out.items() if name.startswith(kind)) == 9
    assert held_out["all pairs"]["accuracy"] >= 0.8
    calibration = read_calibration(reward_model)
    # What the checkpoint gives is what was measured: adapter, head and padding come back.
    model = RewardModel(str(reward_model))
    chosen, rejected = (
        model.scores([row["prompt"] + row[name] for row in pair_rows], batch_size=5) for name in ("chosen", "rejected")
    )
    right = [better > worse for better, worse in zip(chosen, rejected)]
    assert sum(right) / len(right) >= 0.8
    assert np.mean([calibration.probability(each) for each in chosen]) > 0.5
    assert np.mean([calibration.probability(each) for each in rejected]) < 0.5
    adapter = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1), reward_model / "adapter"
    )
    saved = AutoModelForSequenceClassification.from_pretrained(reward_model)
    assert torch.equal(adapter.base_model.model.score.modules_to_save["default"].weight, saved.score.weight)
    assert read_step(reward_model)["step"] == "reward"


def test_long_pairs_are_counted_and_no_calibration_is_said(checkpoint, tmp_path, pair_rows, capsys):
    rows = pair_rows[:3]
    rows[0] = {**rows[0], "chosen": turn("assistant", "yes " * 200)}
    data = write_rows(tmp_path / "long.jsonl", rows)
    out = reward.main(arguments(checkpoint, data, "out", max_length=128, max_steps=1))
    printed = " ".join(capsys.readouterr().out.split())
    assert "Left out 1 of 3 examples: an answer with its prompt has more than 128 tokens" in printed
    assert "No calibration was written" in printed
    assert f"jai score ANSWERS.jsonl OUT --model {out}" in printed
    assert read_calibration(out) is None
    with pytest.raises(UserError, match="a reward model lacks"):
        reward.main(arguments(checkpoint, data, "other", linear_cross_entropy=True))


def test_a_tie_of_held_out_pairs_is_not_right(tmp_path):
    """And pairs are counted by which answer is the longer one."""
    rows = Dataset.from_list([
        {"chosen_ids": [1] * chosen, "rejected_ids": [1] * rejected, "language": "th"}
        for chosen, rejected in ((3, 2), (3, 2), (2, 3), (2, 2))
    ])  # fmt: skip
    logits = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    trainer = SimpleNamespace(eval_dataset=rows, pair_logits=lambda rows: logits, is_world_process_zero=lambda: True)
    measure_reward_model(trainer, None, tmp_path, Console(quiet=True))
    held_out = json.loads((tmp_path / "reward_calibration.json").read_text())["held_out"]
    assert {name: (each["accuracy"], each["pairs"]) for name, each in held_out.items()} == {
        "all pairs": (0.5, 4),
        "language th": (0.5, 4),
        "the chosen answer longer": (0.5, 2),
        "the chosen answer shorter": (0, 1),
        "the chosen answer as long": (1, 1),
    }


# --- Calibration


def test_calibration_finds_the_scale_of_logits():
    rng = np.random.default_rng(0)
    slope, intercept = 0.4, -1.5
    logits = rng.normal(3, 4, 40_000)
    is_chosen = rng.random(40_000) < 1 / (1 + np.exp(-(slope * logits + intercept)))
    count = min(is_chosen.sum(), (~is_chosen).sum())
    # As many of each, as pairs have: by Bayes the intercept moves by the log of their odds.
    moved = intercept - math.log(is_chosen.sum() / (~is_chosen).sum())
    fitted = fit_calibration(logits[is_chosen][:count], logits[~is_chosen][:count])
    assert fitted.slope == pytest.approx(slope, rel=0.05)
    assert fitted.intercept == pytest.approx(moved, rel=0.1)
    assert fitted.probability(2.0) == pytest.approx(1 / (1 + math.exp(-(slope * 2 + moved))), abs=0.02)
    assert calibration_error(logits[is_chosen][:count], logits[~is_chosen][:count]) < 0.02


def test_the_temperature_of_pairs_is_that_of_their_differences():
    rng = np.random.default_rng(1)
    differences = rng.normal(0, 6, 40_000)
    is_first = rng.random(40_000) < 1 / (1 + np.exp(-differences / 2.5))
    chosen, rejected = np.where(is_first, differences, 0), np.where(is_first, 0, differences)
    assert fit_calibration(chosen, rejected).pair_temperature == pytest.approx(2.5, rel=0.05)


def test_pairs_without_a_fault_have_finite_slopes():
    fitted = fit_calibration([5.0, 6.0, 7.0], [-5.0, -6.0, -7.0])
    assert 0 < fitted.slope < 10
    assert 0.7 < fitted.probability(6.0) < 1
    same = fit_calibration([1.0, 1.0], [1.0, 1.0])
    assert same.probability(1.0) == pytest.approx(0.5)
    assert math.isnan(calibration_error([1.0] * 3, [0.0] * 3))
    assert not math.isnan(calibration_error([1.0] * 4, [0.0] * 4))


def test_one_pair_is_fitted_to_platts_targets():
    """They are 2/3 and 1/3 for one of each, which two points of a logistic curve meet exactly."""
    fitted = fit_calibration([1.0], [-1.0])
    assert [fitted.probability(logit) for logit in (1.0, -1.0)] == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    assert fitted.pair_temperature == pytest.approx(2 / math.log(2), abs=1e-6)


def test_the_error_of_a_half_is_that_of_the_others_calibration():
    assert calibration_error([1.0, -1.0] * 50, [-1.0, 1.0] * 50) > 0.9  # each half is the other's contrary
    assert calibration_error([1.0] * 100, [-1.0] * 100) < 0.05
    # A probability of 1 is in the last bin, too: of 20 answers the last one is a rejected one, and has it.
    last_is_wrong = [-1.0] * 9 + [1e9]
    assert fit_calibration([1.0] * 5, [-1.0] * 5).probability(1e9) == 1
    assert calibration_error([1.0] * 10, last_is_wrong) == pytest.approx(0.1341, abs=1e-3)  # without it, 0.05 less


# --- Scores


def conversations(count: int) -> list[dict[str, Any]]:
    return [
        # A line separator inside of a text ends no row.
        {"id": i, "prompt": f"คำถาม\u2028{i}", "answer": "yes ดี" if i % 2 else "no " * (i % 7 + 1)}
        for i in range(count)
    ]


def json_lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_scores_are_the_models_and_what_is_above_is_kept(reward_model, tmp_path, capsys):
    rows = conversations(11)
    data = write_rows(tmp_path / "answers.jsonl", rows)
    scored = score_file(
        ScoreOptions(file=data, out=tmp_path / "out", model=str(reward_model), keep_above=0.5, batch_size=3)
    )
    found = json_lines(scored)
    assert [{key: row[key] for key in ("id", "prompt", "answer")} for row in found] == rows  # as they were, in order
    calibration = read_calibration(reward_model)
    model = RewardModel(str(reward_model))
    for row in found:
        alone = model.scores([turn("user", row["prompt"]) + turn("assistant", row["answer"])], batch_size=1)[0]
        assert row["reward"] == pytest.approx(alone, abs=1e-4)
        assert row["reward_probability"] == pytest.approx(calibration.probability(row["reward"]))
    kept = json_lines(tmp_path / "out" / "kept.jsonl")
    assert kept == [row for row in found if row["reward_probability"] > 0.5]
    assert 0 < len(kept) < len(found)
    above = sum(row["reward_probability"] > 0.88 for row in found) / len(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{above:.1%} have a probability above 0.88. (The JAI-1 paper's 0.88 is on logits" in printed
    assert f"{len(kept)} of 11 above 0.5" in printed
    assert sorted(os.listdir(tmp_path / "out")) == ["kept.jsonl", "scored.jsonl", "scores.json"]
    revision = json.loads((tmp_path / "out" / "scores.json").read_text())["model_revision"]
    copy = shutil.copytree(reward_model, tmp_path / "copy")
    assert checkpoint_revision(str(copy)) == checkpoint_revision(str(reward_model)) == revision
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")  # trained anew under the same name
    assert checkpoint_revision(str(copy)) != revision
    with pytest.raises(UserError, match="exists already"):
        ScoreOptions(file=data, out=tmp_path / "out", model=str(reward_model)).check()


def test_thresholds_are_of_what_is_above_them(reward_model, tmp_path, capsys):
    """A row at --keep-above is not above it; of three rows the paper's 0.88 keeps one and 0.5 would keep two."""
    data = write_rows(tmp_path / "answers.jsonl", conversations(3))
    folder = shutil.copytree(reward_model, tmp_path / "calibrated")
    logits = sorted(row["reward"] for row in json_lines(score_file(
        ScoreOptions(file=data, out=tmp_path / "first", model=str(folder))
    )))  # fmt: skip
    assert logits[0] < logits[1] < logits[2]
    slope = math.log(9) / (logits[2] - logits[1])  # 0.5 is a quarter of the way from the second to the third
    intercept = -slope * (logits[1] - (logits[2] - logits[1]) / 4)
    Calibration(slope, intercept, 1.0, 9).save(folder, {})
    probabilities = [Calibration(slope, intercept, 1.0, 9).probability(logit) for logit in logits]
    assert 0.5 < probabilities[1] < 0.88 < probabilities[2]
    capsys.readouterr()
    score_file(ScoreOptions(file=data, out=tmp_path / "out", model=str(folder), keep_above=probabilities[1]))
    printed = " ".join(capsys.readouterr().out.split())
    assert "33.3% have a probability above 0.88" in printed
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (record["share_above_paper_threshold"], record["kept"]) == (1 / 3, 1)
    assert record["keep_above"] == probabilities[1]
    assert [row["reward"] for row in json_lines(tmp_path / "out" / "kept.jsonl")] == [logits[2]]


def test_a_probability_at_a_threshold_is_not_above_it(tmp_path):
    rows = [{"reward_probability": each} for each in (0.5, PAPER_THRESHOLD, 0.9)]
    options = ScoreOptions(file=tmp_path / "rows.jsonl", out=tmp_path / "out", model="m", keep_above=PAPER_THRESHOLD)
    with resumable_folder(options.out, {}) as job:
        write_rows(job.folder / "chunk-000000.jsonl", rows)
        assert _join(options, job, 3) == {"share_above_paper_threshold": 1 / 3, "kept": 1}


def test_options_reach_the_reward_model_and_decide_what_is_gone_on_with(checkpoint, tmp_path, monkeypatch):
    """Of two chunks the second fails; the rest is another run's where the file or the model is another."""
    made, sizes = [], []

    class Model:
        def __init__(self, *args: Any, **kwargs: Any):
            made.append((args, kwargs))

        def scores(self, conversations: list[Any], *, batch_size: int, console: Console) -> list[float]:
            sizes.append(batch_size)
            if len(sizes) == 2:
                raise RuntimeError("out of memory")
            return [0.5] * len(conversations)

    monkeypatch.setattr(scoring, "RewardModel", Model)
    monkeypatch.setattr(scoring, "_CHUNK", 2)
    data = write_rows(tmp_path / "answers.jsonl", conversations(3))
    other = shutil.copytree(checkpoint, tmp_path / "other")
    options = {"file": data, "out": tmp_path / "out", "model": str(checkpoint)}
    reached = {"batch_size": 3, "device": "cpu", "trust_remote_code": True}
    with pytest.raises(RuntimeError):
        score_file(ScoreOptions(**options, **reached))
    assert made == [((str(checkpoint),), {"device": "cpu", "trust_remote_code": True})]
    assert sizes == [3, 3]
    again = write_rows(tmp_path / "again.jsonl", conversations(4))
    for change, what in (({"file": again}, "file_sha256"), ({"model": str(other)}, "model"), ({}, "")):
        with pytest.raises(UserError, match=what) if what else nullcontext():
            score_file(ScoreOptions(**options | change))
    assert len(json_lines(tmp_path / "out" / "scored.jsonl")) == 3
    with pytest.raises(UserError, match="has no rows"):
        score_file(ScoreOptions(**options | {"file": write_rows(tmp_path / "none.jsonl", []), "out": tmp_path / "new"}))


def test_a_threshold_needs_a_calibration(checkpoint, reward_model, tmp_path):
    bare = tmp_path / "bare"
    AutoModelForSequenceClassification.from_pretrained(reward_model).save_pretrained(bare)
    AutoTokenizer.from_pretrained(reward_model).save_pretrained(bare)
    data = write_rows(tmp_path / "answers.jsonl", conversations(2))
    with pytest.raises(UserError, match="bare has no calibration"):
        score_file(ScoreOptions(file=data, out=tmp_path / "out", model=str(bare), keep_above=0.88))
    scored = score_file(ScoreOptions(file=data, out=tmp_path / "out", model=str(bare)))
    assert [row["reward_probability"] for row in json_lines(scored)] == [None, None]
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["share_above_paper_threshold"] is None
    (bare / "reward_calibration.json").write_text('{"slope": "x"}')
    with pytest.raises(UserError, match="is not a calibration"):
        read_calibration(bare)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q"},
        {"prompt": "q", "answer": " "},
        {"messages": turn("user", "q")},
        {"messages": turn("assistant", "a")},
        {"messages": [*turn("user", "q"), *turn("assistant", "")]},
        {"messages": [*turn("user", "q"), *turn("assistant", "a"), *turn("assistant", "b")]},
        {"messages": [*turn("user", "q"), *turn("user", "r")]},
        {"answer": "a"},
    ],
)
def test_rows_without_an_answer_are_refused(row, tmp_path, reward_model):
    with pytest.raises(ValueError, match=r"no |not end"):
        scored_conversation(row)


def test_rows_are_read_in_their_forms():
    expected = (*turn("user", "q"), *turn("assistant", "a"))
    for row in (
        {"messages": list(expected)},
        {"prompt": "q", "completion": "a"},
        {"prompt": turn("user", "q"), "chosen": turn("assistant", "a")},
        {"question": "q", "response": "a"},
    ):
        assert scored_conversation(row).messages == expected


@pytest.mark.slow
def test_a_killed_scoring_goes_on(reward_model, tmp_path):
    data = write_rows(tmp_path / "answers.jsonl", conversations(6000))
    command = [sys.executable, "-m", "jai", "score", str(data), str(tmp_path / "out"), "--model", str(reward_model)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    work = tmp_path / ".out.partial"
    while len(list(work.glob("files/chunk-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = work / "files" / "chunk-000000.jsonl"
    written = first.stat().st_mtime_ns
    link = tmp_path / "kept"
    os.link(first, link)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert link.stat().st_mtime_ns == written
    rows = json_lines(tmp_path / "out" / "scored.jsonl")
    assert [row["id"] for row in rows] == list(range(6000))
    assert (tmp_path / "out" / "scored.jsonl").read_bytes().startswith(link.read_bytes())


# --- GRPO


def grpo_options(**options: Any) -> dict[str, Any]:
    return {
        "learning_rate": 1e-3,
        "num_generations": 4,
        "max_completion_length": 10,
        "rewards": ["language", "final_answer"],
        "reward_weights": [1.0, 0.5],
        "language_column": "lang",
        **options,
    }


@pytest.mark.parametrize("routing_replay", [False, True])
def test_trls_own_grpo_trainer_gives_the_same_losses(checkpoint, prompts, prompt_rows, routing_replay):
    """Also with replay: in one precision, the experts of the rollout are those of training."""
    out = grpo.main(arguments(checkpoint, prompts, "out", **grpo_options(routing_replay=routing_replay, beta=0.1)))
    rows = [
        {"prompt": turn("user", row["question"]), "solution": row["answer"], "language": "th"} for row in prompt_rows
    ]
    trainer = GRPOTrainer(
        model=str(checkpoint),
        args=GRPOConfig(
            output_dir="trl", num_generations=4, max_completion_length=10, reward_weights=[1.0, 0.5], beta=0.1, **TRLS
        ),
        reward_funcs=[language_reward, final_answer_reward],
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    logs = log_of(out)
    found = [[log["loss"], log["reward"], log["kl"]] for log in logs]
    assert found == [pytest.approx(each, abs=1e-6) for each in losses(trainer, "reward", "kl")]
    assert any(log["reward_std"] > 0 for log in logs)
    assert all(log["routing/disagreement"] == 0 for log in logs[:1])
    record = read_step(out)
    assert record["options"]["rewards"] == ["language", "final_answer"]
    assert record["options"]["routing_replay"] is routing_replay


def by_length(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


def build_grpo(
    checkpoint: Path,
    rows: list[dict[str, Any]],
    out: str,
    reward_func: Any = by_length,
    peft_config: LoraConfig | None = None,
    **options: Any,
) -> JaiGRPOTrainer:
    args = JaiGRPOConfig(
        output_dir=out, **{**TRLS, "num_generations": 4, "max_completion_length": 8, "rewards": ["think"], **options}
    )
    return JaiGRPOTrainer(
        model=str(checkpoint),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": turn("user", row["question"])} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
        reward_funcs=[reward_func],
        peft_config=peft_config,
    )


def test_in_training_the_experts_are_those_of_the_rollout(checkpoint, prompt_rows):
    """Routers are moved between rollout and training: with replay the experts stay, and the share is what differs."""
    chosen: dict[bool, list[torch.Tensor]] = {}
    shares = {}
    for replays in (False, True):
        trainer = build_grpo(
            checkpoint, prompt_rows, f"out-{replays}", routing_replay=replays, steps_per_generation=2,
            gradient_accumulation_steps=1, gradient_checkpointing=True, max_steps=1, router_aux_loss_coef=0.0,
        )  # fmt: skip
        score = trainer._generate_and_score_completions
        passes: list[torch.Tensor] = []

        def perturbed(inputs, score=score, trainer=trainer, passes=passes):
            batch = score(inputs)
            with torch.no_grad():
                for layer in trainer.model.model.layers:
                    layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.flip(0))  # every expert gets another's row
            trainer.model.model.layers[3].mlp.experts.register_forward_pre_hook(
                lambda module, args: passes.append(args[1].clone())
            )
            return batch

        trainer._generate_and_score_completions = perturbed
        trainer.train()
        # The pass and its second one, under gradient checkpointing, take the same experts.
        assert len(passes) == 2
        assert torch.equal(*passes)
        inputs = trainer._buffered_inputs[0]
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1).bool().flatten()
        routes = inputs["expert_ids"][:, :, 3].flatten(0, 1).long()
        known = routes[:, 0] >= 0
        assert (~mask & known).sum() == 0
        assert known.sum() >= mask.sum() - len(inputs["prompt_mask"])
        same = (passes[0][known] == routes[known]).all(dim=-1)
        chosen[replays] = same
        shares[replays] = next(log for log in trainer.state.log_history if "loss" in log)["routing/disagreement"]
    assert chosen[True].all()
    assert not chosen[False].all()
    assert all(0.2 < share < 1 for share in shares.values())


@pytest.mark.parametrize("lora", [False, True])
def test_the_old_policy_is_replayed_and_the_reference_is_not(checkpoint, prompt_rows, monkeypatch, lora):
    adapter = LoraConfig(target_modules=["q_proj"]) if lora else None
    trainer = build_grpo(
        checkpoint,
        prompt_rows,
        "out",
        peft_config=adapter,
        routing_replay=True,
        beta=0.1,
        num_iterations=2,
        max_steps=1,
    )
    followed = []
    compute = GRPOTrainer._get_per_token_logps_and_entropies

    def spy(self, *args, **kwargs):
        followed.append(self._routing._followed_BSLK is not None)
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", spy)
    trainer.train()
    assert followed == [True, False, True]  # the old policy, the reference, training
    assert trainer._routing._followed_BSLK is None


def test_trls_private_methods_are_there():
    """What JaiGRPOTrainer overrides, with the arguments that it relies on."""
    takes = {
        "_generate_single_turn": ["self", "prompt_ids"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["self", "inputs"],
        "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask"],
    }
    for name, parameters in takes.items():
        found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
        assert found[: len(parameters)] == parameters, name


def test_rollouts_go_on_where_they_were(checkpoint, prompt_rows):
    """Four steps on one rollout; a checkpoint after six is amid the second, whose prompts are answered anew."""
    asked = []

    def reward(completions, **_):
        asked.append(trainer.state.global_step)
        return [float(len(str(completion))) for completion in completions]

    options = {"num_iterations": 4, "gradient_accumulation_steps": 2, "max_steps": 10, "save_strategy": "steps"}
    trainer = build_grpo(checkpoint, prompt_rows, "out", reward, save_steps=6, **options)
    trainer.train()
    assert asked == [0, 4, 8]
    asked.clear()
    trainer = build_grpo(checkpoint, prompt_rows, "out", reward, **{**options, "save_strategy": "no"})
    before = trainer.reward_counts
    trainer.train(resume_from_checkpoint="out/checkpoint-6")
    assert asked == [6, 8]
    assert trainer.reward_counts is before
    assert trainer.reward_counts.groups == 3 * 2  # as of a run in one go: the second rollout, made anew, counts once
    assert trainer.reward_counts.completions == 3 * 8
    counts = RewardCounts()
    for _ in range(2):
        counts.add(torch.tensor([1.0, 1.0, math.nan, math.nan]), 2)
    kept = {"stateful_callbacks": {"RewardCounts": counts.state()}}
    for step, rollouts in ((6, 1), (8, 2)):  # at 8, a rollout has ended
        trainer.go_on_from({"global_step": step, **kept})
        found = trainer.reward_counts
        assert [found.groups, found.equal, found.completions, found.unscored] == [
            count * rollouts for count in (2, 2, 4, 2)
        ]


def test_rewards_that_teach_nothing_are_counted():
    nan = math.nan
    counts = RewardCounts()
    counts.add(torch.tensor([1.0, 1.0, 0.0, 1.0, nan, nan, nan, 2.0]), 2)
    assert (counts.groups, counts.equal, counts.completions, counts.unscored) == (4, 3, 8, 3)


def test_rewards_are_counted_as_they_are_weighed(checkpoint, prompt_rows, monkeypatch):
    """1, none, 1 and 1 with these weights; a completion that one of two rewards scores has a reward."""
    nan = math.nan
    found = torch.tensor([[1.0, nan], [nan, nan], [math.inf, 2.0], [0.5, 1.0]])
    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", lambda self, *args, **kwargs: found)
    trainer = build_grpo(checkpoint, prompt_rows, "out")
    trainer.reward_weights = torch.tensor([1.0, 0.5])
    trainer.model.train()
    assert trainer._calculate_rewards().isnan().sum() == 4
    counts = trainer.reward_counts
    assert (counts.groups, counts.equal, counts.completions, counts.unscored) == (1, 1, 4, 1)
    trainer.model.eval()
    trainer._calculate_rewards()
    assert counts.groups == 1


def test_nothing_is_said_of_no_rewards(capsys):
    say_what_was_rewarded(SimpleNamespace(reward_counts=RewardCounts()), None, Path(), Console())
    assert capsys.readouterr().out == ""


def test_equal_and_infinite_rewards_are_said_and_harm_nothing(checkpoint, prompts, prompt_rows, capsys, monkeypatch):
    out = grpo.main(arguments(checkpoint, prompts, "equal", **grpo_options(rewards=["think"], reward_weights=[1.0],
                                                                           router_aux_loss_coef=0)))  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 groups had equal ones and taught nothing; 0 of 8 completions had none" in printed
    assert "No group had different rewards" in printed
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (checkpoint, out))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)

    def broken(completions, **_):
        return [math.inf, math.nan, None, 1.0]

    trainer = build_grpo(checkpoint, prompt_rows, "broken", broken)
    trainer.train()
    assert trainer.reward_counts.unscored == 6
    assert trainer.reward_counts.completions == 8
    assert all(each.isfinite().all() for each in trainer.model.parameters())
    assert all(math.isfinite(log["loss"]) for log in trainer.state.log_history if "loss" in log)


def test_the_plan_knows_how_often_answers_are_learnt_from(checkpoint, prompt_rows):
    options = {"max_steps": -1, "num_train_epochs": 2, "num_iterations": 3, "gradient_accumulation_steps": 2}
    trainer = build_grpo(checkpoint, prompt_rows, "out", **options)
    batches = len(trainer.get_train_dataloader())
    assert estimate_steps(trainer.args, len(prompt_rows), TokenCount(6, False, 60, 0, 10)) == batches // 2 * 2


def test_answers_beyond_the_context_are_said_in_the_plan(checkpoint):
    base = open_base_model(ModelConfig(str(checkpoint)), GRPOConfig("out", bf16=False))
    context = base.config.max_position_embeddings
    for longest, is_said in ((context - 1, False), (context, True)):
        text = context_text(JaiGRPOConfig("out", bf16=False, max_completion_length=longest), base)
        assert ("answers have up to" in text) == is_said
    config = JaiGRPOConfig("out", bf16=False, max_completion_length=context - 20)
    assert "prompts have" not in context_text(config, base, 20)
    assert f"prompts have up to 21 tokens, and answers {context - 20}[/], together" in context_text(config, base, 21)
    assert "prompts have" not in context_text(RewardConfig("out", bf16=False, max_length=None), base, context + 1)


def test_the_system_prompt_comes_first(checkpoint, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "ถาม", "solution": 1}, {"prompt": [*turn("system", "mine"), *turn("user", "ถาม")], "answer": 2}]
    data = write_rows(tmp_path / "prompts.jsonl", rows)
    seen = []
    monkeypatch.setattr(
        "jai.trainers.grpo.reward_functions",
        lambda names: [lambda prompts, solution, **_: seen.extend(zip(prompts, solution)) or [0.0] * len(prompts)],
    )
    options = grpo_options(
        system_prompt="ตอบ", rewards=["final_answer"], reward_weights=[1.0], max_position_embeddings=16
    )
    del options["language_column"]
    grpo.main(arguments(checkpoint, data, "out", **options))
    found = {json.dumps([prompt, solution], ensure_ascii=False) for prompt, solution in seen}
    expected = [
        [[*turn("system", "ตอบ"), *turn("user", "ถาม")], "1"],
        [[*turn("system", "mine"), *turn("user", "ถาม")], "2"],
    ]
    assert found == {json.dumps(each, ensure_ascii=False) for each in expected}
    asked = [
        AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        for prompt, _ in expected
    ]
    assert f"prompts have up to {max(map(len, asked))} tokens, and answers 10" in " ".join(
        capsys.readouterr().out.split()
    )


INSTRUCTION = {"prompt": "q", "instruction_id_list": ["no:such"], "kwargs": [{}], "language": "en"}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "q"}, {}, r"final_answer needs `solution`, which no row of .* has"),
        ({"prompt": "q", "answer": "1"}, {"rewards": ["language"]}, r"needs `language`, .*Set `language_column`"),
        (INSTRUCTION, {"rewards": ["instructions"], "language_column": "language"}, "no:such"),
        ({"prompt": "q", "answer": "1"}, {"rewards": ["fame"]}, r"no reward 'fame'; expected one of final_answer"),
        ({"prompt": "q", "answer": "1"}, {"reward_weights": [1, 2]}, r"`reward_weights` has 2 numbers"),
        ({"prompt": "q", "answer": "1"}, {"loss_type": "x"}, r"`loss_type` is 'x'"),
        ({"prompt": "q", "answer": "1"}, {"num_generations": 0}, r"`num_generations` is 0; expected 2 or more"),
        ({"prompt": "q", "answer": "1"}, {"num_generations": 1}, r"`num_generations` is 1; expected 2 or more"),
        (
            {"prompt": "q", "answer": "1", "lang": "th"},
            {"drop_wrong_language": True, "language_column": "lang"},
            "`drop_wrong_language` is about answers",
        ),
        ({"prompt": "q", "answer": "1"}, {"num_generations": 3}, r"must be divisible by num_generations"),
        ({"prompt": "q", "answer": "1"}, {"routing_replay": True, "use_vllm": True}, "Switch one of them off"),
        ({"prompt": "q", "answer": [1]}, {}, r"its solution is \[1\]"),
        ({"prompt": turn("assistant", "a")}, {}, "ends with an answer"),
        ({"prompt": turn("assistant", "a") + turn("user", "b")}, {}, "`prompt` has a turn of the assistant at the beg"),
        ({"text": "q"}, {}, r"expected a prompt in `prompt`, `question` or `problem`"),
        ({"prompt": "q", "answer": "1"}, {"temperature": 0}, r"`temperature` is 0.*more than 0"),
        ({"prompt": "q", "answer": "1"}, {"label_smoothing_factor": 0.1}, "is for SFT"),
    ],
)
def test_bad_input_of_grpo(checkpoint, tmp_path, row, options, message):
    data = write_rows(tmp_path / "prompts.jsonl", [row])
    with pytest.raises(UserError, match=message):
        grpo.main(arguments(checkpoint, data, "out", num_generations=4, **options) if "num_generations" not in options
                  else arguments(checkpoint, data, "out", **options))  # fmt: skip
    assert not Path("out").exists()


def test_options_of_grpo_are_refused_where_they_are_made():
    for options, message in (
        ({"num_generations": None}, "`num_generations` is None; expected 2"),
        ({"rewards": []}, "`rewards` is empty"),
        ({"rewards": ["fame"]}, "no reward 'fame'"),
        ({"routing_replay": True, "use_transformers_continuous_batching": True}, "mixes the tokens of all rows"),
    ):
        with pytest.raises(UserError, match=message):
            JaiGRPOConfig("out", bf16=False, **options)
    # Those that TRL's trainer computes, by its own code.
    known = re.findall(r'self\.loss_type (?:==|in) (\[.*?\]|".*?")', inspect.getsource(GRPOTrainer._compute_loss))
    for loss_type in set(re.findall(r'"(\w+)"', " ".join(known))):
        assert JaiGRPOConfig("out", bf16=False, loss_type=loss_type).loss_type == loss_type


def test_rows_to_evaluate_on_are_checked_and_prompted_too(checkpoint, tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", [{"prompt": "q", "answer": "1"}])
    write_rows(tmp_path / "data" / "test.jsonl", [{"prompt": "q"}])
    options = {"num_generations": 4, "eval_strategy": "steps"}
    with pytest.raises(UserError, match="final_answer needs `solution`"):
        grpo.main(arguments(checkpoint, tmp_path / "data", "out", **options))
    write_rows(tmp_path / "data" / "test.jsonl", [{"prompt": "q", "answer": "1"}])
    training = JaiGRPOConfig("out", bf16=False, system_prompt="s", **options)
    given = StageArguments(
        ScriptArguments(str(tmp_path / "data")), training, ModelConfig(str(checkpoint)), JaiTrainingArguments()
    )
    data = prepare_prompts(given, load_training_data(given, GRPO.dataset_types))
    for rows in (data.train, data.evaluation):
        assert rows["prompt"][0] == [*turn("system", "s"), *turn("user", "q")]


def test_an_evaluation_neither_counts_nor_follows_on(checkpoint, prompt_rows, monkeypatch):
    """The disagreement that is logged, and the rewards that are counted, are those of training."""
    trainer = build_grpo(checkpoint, prompt_rows, "out", routing_replay=True, per_device_eval_batch_size=4)
    trainer.eval_dataset = trainer.train_dataset.select(range(1))
    pending = torch.tensor(1.0)
    trainer._routing._differing = trainer._routing._choices = pending
    assert "routing/disagreement" not in trainer.evaluate()
    assert trainer._routing._choices is pending
    assert trainer._routing._followed_BSLK is None
    assert trainer.reward_counts == RewardCounts()


def test_a_rollout_that_cannot_be_replayed_ends_the_run(checkpoint, prompt_rows):
    for replays in (True, False):
        trainer = build_grpo(checkpoint, prompt_rows, "out", routing_replay=replays, max_steps=1)
        trainer._routing.recorded = lambda *tokens: None
        with pytest.raises(UserError, match="cannot be matched with its tokens") if replays else nullcontext():
            trainer.train()


def test_continuous_batching_records_no_routes(checkpoint, prompt_rows):
    assert build_grpo(checkpoint, prompt_rows, "out", use_transformers_continuous_batching=True)._routing is None


def test_a_dense_model_has_no_routing_to_replay(tiny_model, tiny_tokenizer, prompt_rows, tmp_path):
    model = tiny_model(vocab_size=len(tiny_tokenizer), num_local_experts=1, num_experts_per_tok=1)
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="no routers"):
        build_grpo(tmp_path / "dense", prompt_rows, "out", routing_replay=True)
    assert build_grpo(tmp_path / "dense", prompt_rows, "out")._routing is None


# --- KTO, and DPO's reference


def test_trls_own_kto_trainer_gives_the_same_losses(checkpoint, tmp_path, sentences):
    rows = [
        {
            "prompt": turn("user", sentences[i % 6]),
            "completion": turn("assistant", sentences[(i + 1) % 6]),
            "label": i % 2 == 0,
        }
        for i in range(6)
    ]
    out = kto.main(arguments(checkpoint, write_rows(tmp_path / "rows.jsonl", rows), "out", learning_rate=1e-3))
    trainer = KTOTrainer(
        model=str(checkpoint),
        args=KTOConfig(output_dir="trl", **TRLS),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(checkpoint),
    )
    assert [[log["loss"], log["kl"]] for log in log_of(out)] == losses(trainer, "kl")
    with pytest.raises(UserError, match="invalid choice: 'sigmoid'"):
        kto.main(arguments(checkpoint, tmp_path / "rows.jsonl", "bad", loss_type="sigmoid"))


def test_what_a_kto_trainer_leaves_out_is_said(checkpoint, tmp_path, capsys):
    answer = {"prompt": turn("user", "q"), "completion": turn("assistant", "a"), "label": True}
    rows = [answer, {**answer, "label": False}, {**answer, "prompt": turn("user", "long " * 60)}]
    kto.main(arguments(checkpoint, write_rows(tmp_path / "rows.jsonl", rows), "out", max_length=60, max_steps=1))
    printed = " ".join(capsys.readouterr().out.split())
    assert "Left out 1 of 3 examples: their prompts alone have 60 tokens or more (raise `max_length`)." in printed


def test_a_reference_computed_beforehand_is_the_same_reference(checkpoint, pairs):
    options = {"learning_rate": 1e-2, "router_aux_loss_coef": 0, "max_steps": 3}
    live = log_of(dpo.main(arguments(checkpoint, pairs, "live", **options)))
    kept = log_of(dpo.main(arguments(checkpoint, pairs, "kept", precompute_ref_log_probs=True, **options)))
    for name in ("loss", "rewards/margins"):
        assert [log[name] for log in kept] == pytest.approx([log[name] for log in live], abs=1e-5)
    assert abs(live[-1]["rewards/margins"]) > 0.01


# --- Recipes


@pytest.mark.parametrize(
    ("recipe", "config"),
    [("reward.yaml", JaiRewardConfig), ("grpo.yaml", JaiGRPOConfig), ("grpo_math.yaml", JaiGRPOConfig)],
)
def test_recipes_parse(recipe, config, tmp_path):
    text = (RECIPES / recipe).read_text()
    spelled = tmp_path / recipe
    spelled.write_text(re.sub(r"^# (router_aux_loss_coef)", r"\1", text, flags=re.M))
    for path in (RECIPES / recipe, spelled):
        options = (ScriptArguments, config, *OF_ALL)
        parsed = parse_arguments(options, ["--config", str(path), "--seed=7"], "jai")
        values = {key: value for part in parsed for key, value in vars(part).items()}
        for key, value in yaml.safe_load(path.read_text()).items():
            if key not in ("seed", "report_to"):
                assert values[key] == value, key
        assert values["seed"] == 7
