# SPDX-License-Identifier: Apache-2.0
"""Training over several processes, and under FSDP2, gives what one process gives."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trainable_worker
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard

from jai.configuration_jai import AUTO_MAP
from jai.provenance import read_step
from jai.trainers.monitor import RouterMonitor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory, sentences) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {
            "messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}],
            "kind": f"kind {number}",
        }
        for ask in sentences
        for number, answer in enumerate(sentences[:2])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def launch(
    folder: Path, processes: int, checkpoint: Path, data: Path, *, verb: str = "sft", **options: Any
) -> list[dict[str, Any]]:
    """Run a stage by `accelerate launch` on CPU processes, and return the logs of its steps."""
    out = folder / f"out-{processes}"
    options = {
        "model_name_or_path": checkpoint,
        "dataset_name": data,
        "output_dir": out,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    # Its `--cpu` starts one process only; torchrun, which starts several, is behind `--multi_gpu`.
    command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [
        "-m",
        f"jai.trainers.{verb}",
        *(part for key, value in options.items() for part in (f"--{key}", str(value))),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "c")}
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Checkpoint written to") == 1  # the main process alone speaks
    record = read_step(out)
    assert record["hardware"]["processes"] == processes
    return [log for log in json.loads((out / record["log_history"]).read_text()) if "loss" in log]


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_doubled_batch(checkpoint, chats, tmp_path):
    """Losses, those of categories, weights and router statistics. Without the auxiliary loss, which is a batch's."""
    options = {"router_aux_loss_coef": 0, "optim": "sgd", "learning_rate": 0.3, "category_column": "kind"}
    options |= {"assistant_only_loss": True}
    two = launch(tmp_path, 2, checkpoint, chats, per_device_train_batch_size=2, **options)
    one = launch(tmp_path, 1, checkpoint, chats, per_device_train_batch_size=4, **options)
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        losses = {key: value for key, value in theirs.items() if key.startswith("loss/")}
        assert losses
        assert losses.keys() <= {"loss/category/kind 0", "loss/category/kind 1"}
        assert {key: ours[key] for key in losses} == pytest.approx(losses, abs=1e-5)
        statistics = {key: value for key, value in theirs.items() if key.startswith(("router/", "skip_alpha/"))}
        assert len(statistics) == 7 * (4 + 3) + 3 + 4 + 1
        assert {key: ours[key] for key in statistics} == pytest.approx(statistics, abs=1e-5)
    weights = load_file(tmp_path / "out-1" / "model.safetensors")
    for name, weight in load_file(tmp_path / "out-2" / "model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["dpo", "cpo"])
def test_two_processes_prefer_as_one_does(checkpoint, tmp_path, sentences, verb):
    """Losses, figures of categories, and the reference's log-probabilities, of a number of pairs that is odd."""
    rows = [
        {"prompt": sentences[number % 6], "chosen": f"ดี {number}", "rejected": "no" * (1 + number % 3),
         "kind": f"kind {number % 2}"}
        for number in range(13)
    ]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"router_aux_loss_coef": 0, "optim": "sgd", "learning_rate": 0.1, "category_column": "kind"}
    options |= {"verb": verb} | ({"precompute_ref_log_probs": True} if verb == "dpo" else {"cpo_alpha": 0})
    two = launch(tmp_path, 2, checkpoint, data, per_device_train_batch_size=2, **options)
    kept = list((tmp_path / "c").rglob("log_probs.bin"))
    assert [path.stat().st_size for path in kept] == ([13 * 24] if verb == "dpo" else [])
    for path in kept:
        path.unlink()
    one = launch(tmp_path, 1, checkpoint, data, per_device_train_batch_size=4, **options)
    assert all(path.stat().st_size == 13 * 24 for path in kept)
    names = ("loss", "rewards/margins", "rewards/margins/category/kind 0", "rewards/accuracies/category/kind 1")
    for ours, theirs in zip(two, one, strict=True):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], abs=1e-4)
    assert abs(one[-1]["rewards/margins"] - one[0]["rewards/margins"]) > 1e-3


@pytest.fixture
def one_gloo_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mode", ["full", "experts"])
def test_parts_train_on_shards_as_without(checkpoint, mode, one_gloo_process):
    """Gradients are DTensors then; test_trainable.py has the same over two processes."""
    train = partial(trainable_worker.train_two_steps, checkpoint, mode, "300-309", trainable_worker.IDS[:1])
    sharded, whole = train(sharded=True), train(sharded=False)
    for name, weight in whole.items():
        torch.testing.assert_close(sharded[name], weight, atol=1e-5, rtol=1e-4)
    before = load_file(checkpoint / "model.safetensors")
    if mode == "full":
        assert torch.equal(sharded["lm_head.weight"][310:], before["lm_head.weight"][310:])
        assert not torch.equal(sharded["lm_head.weight"][300:310], before["lm_head.weight"][300:310])


def test_checkpoints_under_fsdp2_carry_their_code(tiny_model, tmp_path, one_gloo_process):
    """FSDP2 renames the class, and saving would then copy torch's wrapper instead of the model's code."""
    model = tiny_model().train()
    alphas = RouterMonitor(model).pop(lambda sums: sums)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    assert type(model).__name__ != "JaiForCausalLM"

    monitor = RouterMonitor(model)
    model(torch.arange(3, 40)[None])
    logs = monitor.pop(lambda sums: sums)
    assert sum(logs[f"router/load/layer_06/expert_{expert}"] for expert in range(4)) == pytest.approx(1)
    assert {key: logs[key] for key in alphas} == alphas  # read from sharded parameters

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.save_pretrained(tmp_path / "saved", state_dict=whole)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["JaiForCausalLM"]
    assert {file.name for file in (tmp_path / "saved").glob("*.py")} == {
        "modeling_jai.py",
        "configuration_jai.py",
        "quantization_jai.py",
    }
    expected = tiny_model()
    loaded = type(expected).from_pretrained(tmp_path / "saved").state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weight, loaded[name])
