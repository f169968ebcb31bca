# SPDX-License-Identifier: Apache-2.0
"""Two real processes (gloo, CPU) = one: tensor, expert, data and pipeline parallel, by transformers' own engine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.distributed import DistributedConfig

from jai import JaiForCausalLM
from jai.configuration_jai import AUTO_MAP

WORKER = Path(__file__).with_name("distributed_worker.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> Path:
    """The folder that the two workers wrote, with the models that they read in `base` and `no_skips`."""
    out = tmp_path_factory.mktemp("distributed")
    # Cut in the middle by a pipeline, layers 0-1 and 2-3: the skip joins layers 1 and 2.
    tiny_model(vocab_size=100, block_repeats=[1, 2, 1], router_aux_loss_coef=0.1).save_pretrained(out / "base")
    tiny_model(vocab_size=100, block_repeats=[1, 1, 1, 1]).save_pretrained(out / "no_skips")
    torch.save(torch.randint(3, 99, (4, 12), generator=torch.Generator().manual_seed(0)), out / "input_ids.pt")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), *map(str, (out / "base", out / "no_skips", out))]
    workers = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert (out / "pp.pt").exists(), "\n".join(logs)
    return out


FSDP_AND_EP = pytest.param(
    "fsdp_ep",
    marks=pytest.mark.skipif(
        "ep_implementation" not in DistributedConfig.__dataclass_fields__,
        reason="this transformers halves the gradients of experts beside FSDP, Mixtral's too",
    ),
)
MODES = ["tp", "tp_ep", "fsdp", FSDP_AND_EP]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_are_one(runs, mode):
    model = JaiForCausalLM.from_pretrained(runs / "base").train()
    input_ids = torch.load(runs / "input_ids.pt")
    halves = input_ids.chunk(2) if mode.startswith("fsdp") else [input_ids]
    outputs = [model(half, labels=half, output_router_logits=True) for half in halves]
    (sum(output.loss for output in outputs) / len(halves)).backward()
    result = torch.load(runs / f"{mode}.pt")
    expected = [(output.loss.item(), output.aux_loss.item()) for output in outputs] * (2 // len(halves))
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients["model.layers.2.skip_alpha"].abs() > 0
    torch.testing.assert_close(result["gradients"], gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_saved_from_two_processes_is_whole(runs, mode):
    folder = runs / mode
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["JaiForCausalLM"]
    assert {path.name for path in folder.glob("*.py")} == {
        "configuration_jai.py",
        "modeling_jai.py",
        "quantization_jai.py",
    }
    before = JaiForCausalLM.from_pretrained(runs / "base").state_dict()
    after = JaiForCausalLM.from_pretrained(folder).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pipeline_between_blocks_computes_the_same(runs):
    model = JaiForCausalLM.from_pretrained(runs / "no_skips").eval()
    expected = model(torch.load(runs / "input_ids.pt")).logits
    torch.testing.assert_close(torch.load(runs / "pp.pt"), expected, rtol=1e-5, atol=1e-5)


def test_a_pipeline_through_a_live_skip_raises(runs):
    assert "Cut it only before one of the layers [0, 1, 3]" in (runs / "pp_cut.0.txt").read_text()
    assert not (runs / "pp_cut.pt").exists()
