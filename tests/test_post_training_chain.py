# SPDX-License-Identifier: Apache-2.0
"""The chain of post-training in its quick form: every step runs, from the one before it, and does what it must."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jai.files import sha256

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "post_training_chain.py"
DATA = Path(__file__).parents[2] / "shared" / "data"
# Each step, and the checkpoints that it is made from.
STEPS = {
    "sft_1": ("base",),
    "sft_2": ("base",),
    "merged": ("sft_1", "sft_2"),
    "reward": ("merged",),
    "dpo": ("merged",),
    "grpo": ("dpo",),
}
CHECKPOINTS = ("base", "SFT.1", "SFT.2", "SFT.1 and SFT.2, 1:1", "DPO", "GRPO")
FIGURES = 8
INTERVAL = re.compile(r"(-?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),  # eight minutes of one core; busy cores took 23
    pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data, which is not here"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "run"
    run_quickly(folder)
    return folder


def run_quickly(folder: Path) -> None:
    command = [sys.executable, SCRIPT, folder, "--quick"]
    finished = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logged(run: Path, name: str, key: str) -> list[float]:
    history = json.loads((run / name / "trainer_state.json").read_text())["log_history"]
    return [log[key] for log in history if key in log]


def test_each_step_is_made_from_the_one_before_it_which_is_as_it_was(run):
    for name, sources in STEPS.items():
        record = json.loads((run / name / "provenance.json").read_text())
        models = {source["name"]: source["files"] for source in record["inputs"] if source["role"] == "model"}
        assert tuple(models) == sources
        for source, files in models.items():  # DPO's reference, and the judge of the pairs, are among them
            assert files["model.safetensors"] == sha256(run / source / "model.safetensors"), (name, source)


def test_every_training_changes_its_model(run):
    for name in ("sft_1", "sft_2", "dpo", "grpo"):
        (source,) = STEPS[name]
        before, after = weights(run, source), weights(run, name)
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[key], after[key]) for key in before), name
    assert any(not torch.equal(a, b) for a, b in zip(weights(run, "sft_1").values(), weights(run, "sft_2").values()))


def test_the_merge_is_the_mean(run):
    first, second, merged = (weights(run, name) for name in ("sft_1", "sft_2", "merged"))
    assert merged.keys() == first.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)


def test_no_prompt_is_in_training_and_in_held_out_pairs(run):
    prompts = [{json.dumps(row["prompt"]) for row in rows(run / "data" / f"{name}.jsonl")} for name in
               ("pairs", "prompts_chat", "heldout_pairs")]  # fmt: skip
    assert all(prompts)
    assert not (prompts[0] | prompts[1]) & prompts[2]
    problems = [{json.dumps(row["prompt"]) for row in rows(run / "data" / f"{name}.jsonl")} for name in
                ("problems", "heldout_problems")]  # fmt: skip
    assert all(problems)
    assert not problems[0] & problems[1]


def test_the_chosen_answers_are_the_better_ones(run):
    calibration = json.loads((run / "reward" / "reward_calibration.json").read_text())
    assert calibration["slope"] > 0  # a higher logit is a better answer
    pairs = rows(run / "pairs" / "pairs.jsonl")
    assert pairs
    assert all(pair["judge"] == "reward" for pair in pairs)
    checked = rows(run / "pairs_if" / "pairs.jsonl")
    assert checked
    assert all((pair["score_chosen"], pair["score_rejected"]) == (1, 0) for pair in checked)
    for pair in pairs + checked:
        assert pair["score_chosen"] > pair["score_rejected"]
        assert pair["chosen"] != pair["rejected"]


def test_dpo_begins_at_its_reference(run):
    margins, losses = logged(run, "dpo", "rewards/margins"), logged(run, "dpo", "loss")
    auxiliary = logged(run, "dpo", "aux_loss")
    assert margins[0] == pytest.approx(0, abs=1e-4)  # the policy is its reference before the first update
    assert any(abs(margin) > 1e-4 for margin in margins[1:])
    assert losses[0] == pytest.approx(math.log(2) + _weight(run, "dpo") * auxiliary[0], abs=1e-3)


def _weight(run: Path, name: str) -> float:
    return json.loads((run / name / "config.json").read_text())["router_aux_loss_coef"]


def test_rewards_and_disagreement_are_logged(run):
    rewards, disagreement = logged(run, "grpo", "reward"), logged(run, "grpo", "routing/disagreement")
    assert len(rewards) == len(disagreement) == 4
    assert all(0 <= reward <= 2 for reward in rewards)  # 1 for the answer, 0.5 each for language and thought
    assert all(0 <= share < 0.5 for share in disagreement)


def test_the_table_has_every_figure_with_its_interval(run):
    text = (run / "table.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[1].strip() for line in lines] == list(CHECKPOINTS)
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert len(cells) == FIGURES
        for cell in cells:
            value, low, high = map(float, INTERVAL.fullmatch(cell).groups())
            assert low <= value <= high
    for figure in ("Reward model: accuracy on", "accuracy beside the reference on the held-out pairs"):
        assert INTERVAL.search(text.split(figure)[1].splitlines()[0]), figure


def test_a_finished_run_is_not_begun_anew(run):
    def written() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in run.rglob("provenance.json")}

    before = written()
    assert len(before) >= len(STEPS) + 1
    run_quickly(run)
    assert written() == before
