# SPDX-License-Identifier: Apache-2.0
"""The benchmark of depth and experts: starts against the models that they come from, equal data, going on, spread."""

import csv
import importlib
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import Phi3ForCausalLM

from jai.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@dataclass
class QuickRun:
    """A whole run in tiny sizes.

    Attributes:
        module: `benchmarks/price_of_depth.py`.
        texts, out: what was read, and where the results lie.
        runs: all that were made.
        first_ids: the first tokens that each training was given, in the order of the runs; a base has two trainings.
    """

    module: ModuleType
    texts: list[Path]
    out: Path
    runs: list
    first_ids: list[np.ndarray]

    def find(self, part: str, arm: str, seed: int = 0):
        return next(run for run in self.runs if (run.part, run.arm, run.seed) == (part, arm, seed))


@pytest.fixture(scope="module")
def quick(tmp_path_factory, sentences) -> QuickRun:
    folder = tmp_path_factory.mktemp("price")
    texts = [folder / "thai.jsonl", folder / "english.jsonl"]
    thai = [s * 2 + str(i) for i in range(90) for s in (sentences[0], sentences[1], sentences[4])]
    english = [f"{i} {s}" for i in range(200) for s in sentences[2:4]]
    for path, documents in zip(texts, (thai, english)):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    first_ids = []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        module = importlib.import_module("price_of_depth")
        train = module.train

        def watched(model, ids, *rest):
            first_ids.append(ids[:100].copy())
            train(model, ids, *rest)

        patch.setattr(module, "train", watched)
        runs, is_new = module.price_of_depth(module.QUICK, texts, folder / "out")
    assert is_new
    return QuickRun(module, texts, folder / "out", runs, first_ids)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "price_of_depth.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_arm_is_run_with_every_seed_and_measured_at_every_point(quick):
    settings = quick.module.QUICK
    expected = [
        (seed, part, arm) for seed in settings.seeds for part, arms in quick.module.ARMS.items() for arm in arms
    ]
    assert [(run.seed, run.part, run.arm) for run in quick.runs] == expected
    for run in quick.runs:
        measured = {point.step for point in run.points}
        base_steps = settings.base_steps + settings.settling_steps
        assert measured >= ({0, base_steps} if run.part == "base" else set(settings.measured_at))
    assert len(rows_of(quick.out)) == sum(len(run.points) for run in quick.runs)


def test_training_lowers_the_loss_of_every_arm(quick):
    for run in quick.runs:
        assert run.points[-1].nats < run.points[0].nats - 0.05, (run.part, run.arm)


@pytest.mark.parametrize("seed", [0, 1])
def test_starts_that_keep_the_function_keep_the_loss(quick, seed):
    base = quick.find("base", "base", seed).points[-1].nats
    assert quick.find("depth", "base", seed).at(0).nats == pytest.approx(base, abs=1e-6)
    assert quick.find("depth", "identity", seed).at(0).nats == pytest.approx(base, abs=1e-6)
    assert abs(quick.find("depth", "alpha-0", seed).at(0).nats - base) > 1e-4  # copies do not

    dense = quick.find("depth", quick.module.PAPERS_START, seed).points[-1].nats
    assert quick.find("experts", "dense", seed).at(0).nats == pytest.approx(dense, abs=1e-6)
    assert quick.find("experts", "copy", seed).at(0).nats == pytest.approx(dense, abs=1e-5)
    assert abs(quick.find("experts", "random", seed).at(0).nats - dense) > 1e-2


def test_dus_v1_without_a_gap_is_a_repetition(quick):
    """Three layers as 1, 2, 2, 3 are the same model by both methods."""
    v1, v2 = (quick.find("depth", arm).at(0).nats for arm in ("dus-v1", "alpha-0-frozen"))
    assert v1 == pytest.approx(v2, abs=1e-6)


def test_dus_v1_joins_the_first_and_the_last_layers(quick, tiny_phi3, phi3_oracle, tmp_path):
    base = tiny_phi3(tmp_path / "base")
    plain = phi3_oracle.jai_of(Phi3ForCausalLM.from_pretrained(base))
    deep = quick.module.dus_v1(base, 8)
    assert len(deep.model.layers) == 8
    for layer, origin in zip(deep.model.layers, (0, 1, 2, 3, 2, 3, 4, 5)):
        for name, weight in plain.model.layers[origin].state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], weight, rtol=0, atol=0)
    torch.testing.assert_close(deep.lm_head.weight, plain.lm_head.weight, rtol=0, atol=0)
    # The same hidden state, by running the plain model's layers in that order.
    ids = torch.arange(1, 21)[None]
    plain.model.layers = torch.nn.ModuleList(plain.model.layers[i] for i in (0, 1, 2, 3, 2, 3, 4, 5))
    plain.config.num_hidden_layers, plain.config.block_repeats = 8, [1] * 8
    with torch.no_grad():
        expected, found = (model(ids, use_cache=False).logits for model in (plain, deep))
    torch.testing.assert_close(found, expected)


def test_frozen_alphas_stay_and_learned_ones_move(quick):
    for arm, start in quick.module.DEPTH_STARTS.items():
        run = quick.find("depth", arm)
        assert run.points[0].alphas == pytest.approx([start.alpha])
        assert (run.points[0].alphas == run.points[-1].alphas) is not start.trainable


def test_snapshot_experts_are_the_mlps_of_the_steps_and_the_rest_is_the_last(quick):
    module = quick.module
    job = module.Job("experts", "snapshots", 0, module.QUICK, quick.out)
    assert module.QUICK.snapshot_steps == (0, 2, 4, 6)
    snapshots = [module.JaiForCausalLM.from_pretrained(job.snapshot_folder(step)) for step in (0, 2, 4, 6)]
    mixture = module.start_model(job)
    for layer, block in enumerate(mixture.model.layers):
        for i, snapshot in enumerate(snapshots):
            mlp = snapshot.model.layers[layer].mlp
            gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            assert torch.equal(block.mlp.experts.gate_up_proj[i], gate_up)
            assert torch.equal(block.mlp.experts.down_proj[i], mlp.down_proj.weight)
    last = snapshots[-1].state_dict()
    shared = {name: tensor for name, tensor in mixture.state_dict().items() if ".mlp." not in name}
    assert shared.keys() == {name for name in last if ".mlp." not in name}
    assert all(torch.equal(tensor, last[name]) for name, tensor in shared.items())
    assert not torch.equal(
        snapshots[0].model.layers[0].mlp.down_proj.weight, last["model.layers.0.mlp.down_proj.weight"]
    )


def test_distance_and_load_entropy_have_their_known_values(quick, tiny_model):
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.layers:
            for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                stack[1:] = stack[:1]
    assert quick.module.expert_distance(model) == 0
    with torch.no_grad():
        for layer in model.model.layers:
            for stack in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
                stack[1] = -stack[0]  # the pairs with expert 1 are two apart, the other three are alike
    assert quick.module.expert_distance(model) == pytest.approx(1.0)
    assert quick.find("experts", "copy").at(0).expert_distance == 0
    assert quick.find("experts", "random").at(0).expert_distance == pytest.approx(2**0.5, abs=0.02)
    for arm in quick.module.EXPERT_STARTS:
        for point in quick.find("experts", arm).points:
            assert len(point.load_entropy) == 4
            assert all(0.5 - 1e-6 <= entropy <= 1 for entropy in point.load_entropy)  # top-2: half of them at least
    assert quick.find("experts", "dense").at(0).load_entropy == []


def test_arms_of_a_part_read_the_same_text_and_seeds_do_not(quick):
    read: dict[tuple, list[np.ndarray]] = {}
    trainings = iter(quick.first_ids)
    for run in quick.runs:
        read.setdefault((run.seed, run.part), []).append(next(trainings))
        if run.part == "base":
            read[run.seed, "base, settling"] = [next(trainings)]
    assert not list(trainings)
    for arms in read.values():
        assert all(np.array_equal(ids, arms[0]) for ids in arms)
    firsts = [arms[0] for arms in read.values()]
    assert not any(np.array_equal(a, b) for i, a in enumerate(firsts) for b in firsts[:i])


def test_a_run_that_goes_on_gives_the_same_results(quick, tmp_path):
    module, rows = quick.module, rows_of(quick.out)
    for name in ("depth-alpha-0.1-1", "experts-noise-0.1-0", "experts-snapshots-1"):
        (quick.out / "runs" / f"{name}.json").unlink()
    runs, is_new = module.price_of_depth(module.QUICK, quick.texts, quick.out)
    assert is_new
    assert len(runs) == len(quick.runs)
    measured = [name for name in rows[0] if name not in runs[0].origin]
    assert [[row[name] for name in measured] for row in rows_of(quick.out)] == [
        [row[name] for name in measured] for row in rows
    ]
    before = (quick.out / "price_of_depth.csv").read_bytes()
    assert module.price_of_depth(module.QUICK, quick.texts, quick.out)[1] is False
    assert (quick.out / "price_of_depth.csv").read_bytes() == before


def test_other_settings_or_texts_are_refused(quick, tmp_path):
    module = quick.module
    with pytest.raises(UserError, match="other steps"):
        module.price_of_depth(replace(module.QUICK, steps=12), quick.texts, quick.out)
    other = tmp_path / "thai.jsonl"
    other.write_text(quick.texts[0].read_text(encoding="utf-8") + '{"text": "more"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="other texts"):
        module.price_of_depth(module.QUICK, [other, quick.texts[1]], quick.out)


def test_the_tables_show_means_and_spread_over_the_seeds(quick):
    tables = (quick.out / "price_of_depth.md").read_text(encoding="utf-8")
    last = quick.module.QUICK.steps
    values = [
        float(row["nats_per_token"])
        for row in rows_of(quick.out)
        if (row["part"], row["arm"], row["step"]) == ("depth", "identity", str(last))
    ]
    assert len(values) == 2
    line = next(line for line in tables.splitlines() if line.startswith("| identity |"))
    cells = line.split("|")
    mean, spread = cells[4].split("±")
    assert float(mean) == pytest.approx(statistics.mean(values), abs=6e-4)
    assert float(spread) == pytest.approx(statistics.stdev(values), abs=6e-4)
    control = [quick.find("depth", "base", seed).at(last).nats for seed in (0, 1)]
    differences = [a - b for a, b in zip(values, control)]
    mean, spread = cells[-3].split("±")  # at the last step
    assert float(mean) == pytest.approx(statistics.mean(differences), abs=6e-4)
    assert float(spread) == pytest.approx(statistics.stdev(differences), abs=6e-4)
    assert (quick.out / "price_of_depth.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_program_runs_in_processes(quick, tmp_path):
    import subprocess

    command = [sys.executable, BENCHMARKS / "price_of_depth.py", "--quick", "--workers", "2", "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--text", *quick.texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured = [name for name in rows_of(quick.out)[0] if name not in quick.runs[0].origin]
    found, expected = ([[row[n] for n in measured] for row in rows_of(out)] for out in (tmp_path / "out", quick.out))
    assert found == expected
