# SPDX-License-Identifier: Apache-2.0
"""A run of any trainer that is killed and begun again ends as one that was left alone, to the bit.

Weights, and every log: losses, rewards, figures of categories, router statistics, alphas, counts of tokens.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from json_lines import write_rows
from safetensors.torch import load_file

from jai.errors import UserError
from jai.provenance import read_step
from jai.trainers.cpo import CPO
from jai.trainers.dpo import DPO
from jai.trainers.grpo import GRPO
from jai.trainers.kto import KTO
from jai.trainers.orpo import ORPO
from jai.trainers.pretrain_config import PretrainConfig
from jai.trainers.reward import REWARD
from jai.trainers.run_identity import NOT_DECIDING, saved_identity
from jai.trainers.sft import SFT

pytestmark = pytest.mark.usefixtures("in_empty_folder")

STEPS = 16
OF_ALL = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 3,  # no divisor of where it resumes
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "disable_tqdm": True,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "router_aux_loss_coef": 0.01,
}
# What depends on the time or the machine.
TIMES = ("runtime", "per_second", "step_time", "tps", "memory")


@dataclass(frozen=True)
class Run:
    """A stage, the data that it takes, and its options."""

    verb: str
    data: str
    options: dict[str, Any] = field(default_factory=dict)


CATEGORIES = {"category_column": "kind"}
EVALUATED = {"test_split_size": 4, "eval_strategy": "steps", "eval_steps": 4}
GROUPS = {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 8}
REWARDED = {**GROUPS, "rewards": ["language", "repetition"], "language_column": "lang", "beta": 0.1}
RUNS = {
    "sft": Run("sft", "chats", {"assistant_only_loss": True, **CATEGORIES, **EVALUATED}),
    "sft-packed": Run("sft", "chats", {"packing": True, "max_length": 96, "neftune_noise_alpha": 5, **CATEGORIES}),
    "sft-adapter": Run("sft", "chats", {"use_peft": True, "lora_dropout": 0.1, "lora_target_modules": "all-linear"}),
    "dpo": Run("dpo", "pairs", {**CATEGORIES, **EVALUATED}),
    "dpo-beforehand": Run("dpo", "pairs", {"precompute_ref_log_probs": True, "use_peft": True, **CATEGORIES}),
    "kto": Run("kto", "answers"),
    "reward": Run("reward", "pairs", {**EVALUATED, "gradient_accumulation_steps": 1}),
    "cpo": Run("cpo", "pairs", {"loss_type": "simpo", "cpo_alpha": 0, **CATEGORIES}),
    "orpo": Run("orpo", "pairs", CATEGORIES),
    "grpo": Run("grpo", "prompts", {**REWARDED, "routing_replay": True}),
    "grpo-iterations": Run("grpo", "prompts", {**REWARDED, "num_iterations": 2, "gradient_accumulation_steps": 1}),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=256)


@pytest.fixture(scope="module")
def data(tmp_path_factory, sentences) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")

    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("chats", "pairs", "answers", "prompts")}
    for number in range(24):
        ask = said("user", f"{sentences[number % 6]} {number}")
        answer = said("assistant", f"{sentences[(number + 1) % 6]}{' yes' * (number % 3)}")
        kind = {"kind": f"kind {number % 2}"}
        rows["chats"].append({"messages": ask + answer, **kind})
        rows["pairs"].append({"prompt": ask, "chosen": answer, "rejected": said("assistant", f"no {number}"), **kind})
        rows["answers"].append({"prompt": ask, "completion": answer, "label": number % 3 > 0})
        rows["prompts"].append({"prompt": ask, "lang": "th"})
    return {name: write_rows(folder / f"{name}.jsonl", each) for name, each in rows.items()}


def command_line(run: Run, checkpoint: Path, data: dict[str, Path], out: str, **more: Any) -> list[str]:
    places = {"model_name_or_path": checkpoint, "dataset_name": data[run.data], "output_dir": out}
    options = {**places, **OF_ALL, **run.options, **more}
    if run.verb == "kto":
        del options["router_aux_loss_coef"]
    return [
        part
        for name, value in options.items()
        for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def start(run: Run, arguments: list[str], processes: int = 1) -> subprocess.Popen:
    launcher = []
    if processes > 1:  # accelerate's `--cpu` starts one process only; torchrun is behind `--multi_gpu`
        launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes), "--multi_gpu"]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(Path("datasets_cache").absolute())}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", f"jai.trainers.{run.verb}", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    said = process.communicate()[0]
    assert process.returncode == 0, said[-3000:]
    return said


def kill_sometime(process: subprocess.Popen, out: Path, random_place: random.Random) -> None:
    """SIGKILL to the process and all that it started: some time after a checkpoint is there, before the run's end."""
    while not (out / "checkpoint-2" / "trainer_state.json").exists() and not list(out.glob("checkpoint-[4-8]")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.005)
    time.sleep(random_place.uniform(0, 0.6))
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it had ended before it was killed: give it more steps"


def logs_of(out: Path) -> list[dict[str, Any]]:
    logs = json.loads((out / read_step(out)["log_history"]).read_text())
    return [{key: log[key] for key in log if not any(word in key for word in TIMES)} for log in logs]


def assert_same_run(out: Path, expected: Path) -> None:
    *logs, last = logs_of(out)
    *expected_logs, expected_last = logs_of(expected)
    for ours, theirs in zip(logs, expected_logs, strict=True):
        assert ours == theirs
    # `train_loss` of the summary is transformers' mean over the steps since the run went on.
    assert last.keys() == expected_last.keys()
    name = next(path.name for path in expected.glob("*.safetensors"))
    weights, expected_weights = load_file(out / name), load_file(expected / name)
    assert weights.keys() == expected_weights.keys()
    for key, weight in weights.items():
        assert torch.equal(weight, expected_weights[key]), key


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "sft-adapter",
            {
                "learning_rate": (0.1, "learning_rate was 0.001 and is 0.1"),
                "lora_alpha": (64, "lora_alpha was 32 and is 64"),
                "max_length": (32, "max_length was 1024 and is 32"),
                "packing": (True, "packing was False and is True"),
                "assistant_only_loss": (True, "assistant_only_loss was False and is True"),
                "max_steps": (5, "max_steps was 2 and is 5"),
                "per_device_train_batch_size": (3, "examples_a_step was 4 and is 6"),
                "test_split_size": (4, r"other data than .*chats.jsonl gives now: they were 24 rows, and are 20"),
            },
        ),
        pytest.param(
            "dpo",
            {
                "beta": (0.5, "beta was 0.1 and is 0.5"),
                "loss_type": ("ipo", r"loss_type was \['sigmoid'\] and is \['ipo'\]"),
                "ref_model_name_or_path": ("reference", "another reference: the files of `ref_model_name_or_path`"),
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "grpo",
            {
                "rewards": (["language"], r"rewards was \['language', 'repetition'\] and is \['language'\]"),
                "temperature": (0.5, "temperature was 1.0 and is 0.5"),
                "num_generations": (2, "num_generations was 4 and is 2"),
                "system_prompt": ("Think.", "system_prompt was None and is Think."),
                "routing_replay": (False, "routing_replay was True and is False"),
                "gradient_accumulation_steps": (1, "completions_a_step was 8 and is 4"),
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_goes_on_with_its_own_data_and_options_alone(checkpoint, data, name, changes, monkeypatch, capsys):
    run = RUNS[name]
    main = import_module(f"jai.trainers.{run.verb}").main
    main(command_line(run, checkpoint, data, "out", max_steps=2))
    steps = read_step(Path("out"))["steps"]
    again = {"max_steps": 2, "resume_from_checkpoint": "true"}
    shutil.copytree(checkpoint, "reference")
    for option, (value, message) in changes.items():
        more = EVALUATED if option == "test_split_size" else {}
        with pytest.raises(UserError, match=message):
            main(command_line(run, checkpoint, data, "out", **{**again, **more, option: value}))
    rows = data[run.data].read_text().splitlines(keepends=True)
    for changed in ([rows[1], rows[0], *rows[2:]], [rows[0], *rows[:-1]]):
        Path("other.jsonl").write_text("".join(changed))
        with pytest.raises(UserError, match="other rows, or the same in another order"):
            main(command_line(run, checkpoint, {run.data: Path("other.jsonl")}, "out", **again))
    other = Path(shutil.copytree(checkpoint, "other"))
    (other / "provenance.json").write_text('{"step": "merge", "inputs": []}')
    with pytest.raises(UserError, match="begun with another model: the files of `model_name_or_path` are others"):
        main(command_line(run, other, data, "out", **again))
    other_verb = "sft" if run.verb == "dpo" else "dpo"
    with pytest.raises(UserError, match=f"was written by `jai {run.verb}`, and not by `jai {other_verb}`"):
        saved_identity(Path("out/checkpoint-2"), other_verb)
    assert read_step(Path("out"))["steps"] == steps == 2
    # The same data and the same model elsewhere, and the same batch cut otherwise, are the same run.
    moved = Path(shutil.move(other, "moved"))
    (moved / "provenance.json").unlink()
    Path("same.jsonl").write_text("".join(rows))
    batch = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 if name == "grpo" else 1}
    capsys.readouterr()
    main(command_line(run, moved, {run.data: Path("same.jsonl")}, "out", **again, **batch, logging_steps=1))
    assert "does not say which data" not in capsys.readouterr().out


def test_a_constant_learning_rate_may_go_on_for_longer(checkpoint, data, capsys):
    """And TRL's own checkpoints, which do not say what decided them, are gone on from with a word."""
    run, given = RUNS["sft-adapter"], {"lr_scheduler_type": "constant", "save_steps": 1}
    main = import_module("jai.trainers.sft").main
    main(command_line(run, checkpoint, data, "out", max_steps=1, **given))
    longer = command_line(run, checkpoint, data, "out", max_steps=2, resume_from_checkpoint="true", **given)
    main(longer)
    assert read_step(Path("out"))["steps"] == 2
    with pytest.raises(UserError, match=r"warmup_steps was 0 and is 0\.5"):
        main([*longer, "--warmup_steps", "0.5"])
    state_file = Path("out/checkpoint-2/trainer_state.json")
    state = json.loads(state_file.read_text())
    options = state["stateful_callbacks"]["RunIdentity"]["attributes"]["identity"]["options"]
    del options["adam_beta2"], options["weight_decay"]  # as an older version writes it that has no such option
    options["of_old"] = 1
    state_file.write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"other options: weight_decay was None and is 0\.5\. It can be resumed"):
        main([*longer, "--weight_decay", "0.5"])
    del state["stateful_callbacks"]["RunIdentity"]
    state_file.write_text(json.dumps(state))
    capsys.readouterr()
    main([*longer, "--max_steps", "3", "--learning_rate", "0.1"])
    assert "checkpoint-2 does not say which data and options its run had" in " ".join(capsys.readouterr().out.split())


def test_what_does_not_decide_a_run_are_options_that_there_are():
    classes = [stage.config_class for stage in (SFT, DPO, KTO, CPO, ORPO, REWARD, GRPO)]
    known = {each.name for one in (*classes, PretrainConfig) for each in fields(one)}
    of_other_transformers = {"activation_checkpointing", "activation_checkpointing_kwargs", "trackio_bucket_id"}
    assert not NOT_DECIDING - known - of_other_transformers
    assert not NOT_DECIDING & {"learning_rate", "beta", "seed", "max_length", "max_steps", "num_train_epochs"}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_as_one_that_was_left_alone(checkpoint, data, name, record_property):
    """Killed at random; a checkpoint that is half written is passed over."""
    run = RUNS[name]
    import_module(f"jai.trainers.{run.verb}").main(command_line(run, checkpoint, data, "whole"))
    seed = random.randrange(1 << 30)
    record_property("seed", seed)
    random_place = random.Random(seed)
    kill_sometime(start(run, command_line(run, checkpoint, data, "killed")), Path("killed"), random_place)
    half = Path("killed/checkpoint-99")
    half.mkdir()
    (half / "trainer_state.json").write_text('{"epoch": 0.')
    said = finish(start(run, command_line(run, checkpoint, data, "killed", resume_from_checkpoint="true")))
    assert "was not written to its end" in " ".join(said.split())
    assert not half.exists()
    assert_same_run(Path("killed"), Path("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reward", "orpo", "kto"])
def test_two_processes_train_as_one(checkpoint, data, name):
    """At the same global batch. KTO's KL, 0 at first, is a mean over processes in TRL, and not over accumulation."""
    run = replace(RUNS[name], options={key: RUNS[name].options[key] for key in RUNS[name].options.keys() - EVALUATED})
    given = {"max_steps": 3, "save_strategy": "no", "logging_steps": 1, "gradient_accumulation_steps": 2}
    finish(start(run, command_line(run, checkpoint, data, "one", **given)))
    finish(
        start(
            run, command_line(run, checkpoint, data, "two", **{**given, "gradient_accumulation_steps": 1}), processes=2
        )
    )
    logs = list(zip(logs_of(Path("two")), logs_of(Path("one")), strict=True))[:-1]
    for ours, theirs in logs if name != "kto" else logs[:1]:
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert len({ours["loss"] for ours, _ in logs}) == 3


@pytest.mark.slow
def test_two_processes_reinforce_together(checkpoint, data):
    """Answers to one prompt are compared over both processes, which draw their own; the same seed is the same run."""
    run = RUNS["grpo"]
    given = {"max_steps": 3, "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 2}
    said = [finish(start(run, command_line(run, checkpoint, data, out, **given), processes=2)) for out in ("a", "b")]
    logs = logs_of(Path("a"))
    assert logs == logs_of(Path("b"))
    for text in said:  # 3 steps x 2 accumulated x 2 processes x 2 answers, in groups of 4
        assert re.search(r"Rewards: \d+ of 6 groups had equal ones and taught nothing; 0 of 24 completions", text)
    steps = [log for log in logs if "loss" in log]
    assert len({log["reward"] for log in steps}) > 1
    assert any(log["reward_std"] > 0 for log in steps)
    assert all(0 <= log["routing/disagreement"] < 0.5 for log in steps)
    assert steps[-1]["num_tokens"] > steps[0]["num_tokens"] > 8 * 8
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, Path("a")))
    assert any(not torch.equal(before[name], after[name]) for name in before)
