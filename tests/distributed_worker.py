# SPDX-License-Identifier: Apache-2.0
"""One of two processes of test_modeling_distributed.py: loads a model in each way of being spread, and trains a step.

Rank 0 writes `OUT/MODE.pt` with the losses of both ranks and the whole gradients, and `OUT/MODE/` as saved from there.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from jai import JaiForCausalLM

FIELDS = DistributedConfig.__dataclass_fields__
EXPERTS = {"ep_size": 2} if "ep_size" in FIELDS else {"enable_expert_parallel": True}  # before transformers 5.19
MODES = {"tp": {"tp_size": 2}, "tp_ep": {"tp_size": 2, **EXPERTS}, "fsdp": {"fsdp_size": 2}}
if "ep_implementation" in FIELDS:  # before it, the experts of any model get half of their gradients beside FSDP
    MODES["fsdp_ep"] = {"fsdp_size": 2, **EXPERTS}


def whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_a_step(folder: Path, out: Path, mode: str, input_ids: torch.Tensor) -> None:
    model = JaiForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**MODES[mode])).train()
    if mode.startswith("fsdp"):  # data parallel: each rank has a half of the batch
        input_ids = input_ids.chunk(2)[dist.get_rank()]
    output = model(input_ids, labels=input_ids, output_router_logits=True)
    output.loss.backward()
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    losses = [None, None]
    dist.all_gather_object(losses, (output.loss.item(), output.aux_loss.item()))
    if dist.get_rank() == 0:
        torch.save({"losses": losses, "gradients": gradients}, out / f"{mode}.pt")
    model.save_pretrained(out / mode)


def run_pipeline(folder: Path, out: Path, name: str, input_ids: torch.Tensor) -> None:
    model = JaiForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(pp_size=2)).eval()
    with torch.no_grad():
        logits = model(input_ids).logits
    if dist.get_rank() == 0:
        torch.save(logits, out / f"{name}.pt")


def main() -> None:
    folder, folder_without_skips, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    input_ids = torch.load(out / "input_ids.pt")
    for mode in MODES:
        train_a_step(folder, out, mode, input_ids)
    run_pipeline(folder_without_skips, out, "pp", input_ids)
    dist.barrier()
    try:  # a stage that raises leaves the other waiting: the last thing that this process does
        run_pipeline(folder, out, "pp_cut", input_ids)
    except ValueError as error:
        (out / f"pp_cut.{os.environ['RANK']}.txt").write_text(str(error))


if __name__ == "__main__":
    main()
