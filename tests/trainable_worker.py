# SPDX-License-Identifier: Apache-2.0
"""One of two processes of test_trainable.py: trains parts of a model under FSDP2, in full or through an adapter.

Rank 0 writes `OUT/MODE.safetensors`, the whole weights after two steps.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from trl import ModelConfig

from jai import JaiForCausalLM
from jai.trainers.lora import lora_config
from jai.trainers.parts import ADAPTER_PARTS, read_entries, select_parts
from jai.trainers.trainable import alphas_follow_adapter, train_parts

PARTS = {
    "full": ["new_rows", "new_experts", "alphas"],
    "adapter": ADAPTER_PARTS,
    "experts": ["attention", "new_experts"],  # through an adapter, too
}
IDS = (torch.arange(2 * 60) * 7 % 390 + 3).view(2, 60)  # a row for each process


def train_two_steps(
    folder: Path, mode: str, new_rows: str, ids: torch.Tensor, *, sharded: bool
) -> dict[str, torch.Tensor]:
    """The whole weights after two steps of SGD with momentum, and the logits of a model whose adapter is off."""
    model = JaiForCausalLM.from_pretrained(folder).train()
    parts = select_parts(PARTS[mode], model, read_entries(new_rows, "new_row_ids"))
    if mode != "full":
        torch.manual_seed(0)
        model_args = ModelConfig(use_peft=True, lora_r=4, lora_dropout=0.0)
        model = get_peft_model(model, lora_config(model_args, parts, model))
    trained = train_parts(model, parts)
    if trained.alphas:
        alphas_follow_adapter(model, trained)
    if sharded:
        for layer in (model if mode == "full" else model.get_base_model()).model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=0.1, momentum=0.9)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        trained.clear_frozen_gradients()
        optimizer.step()
        optimizer.zero_grad()
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trained.alphas:
        with torch.no_grad(), model.disable_adapter():
            weights["reference"] = model(ids).logits
    return {name: weight.contiguous() for name, weight in weights.items()}


def main() -> None:
    folder, out, new_rows = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for mode in PARTS:
        ids = IDS[dist.get_rank()][None]
        weights = train_two_steps(folder, mode, new_rows, ids, sharded=True)
        if dist.get_rank() == 0:
            save_file(weights, out / f"{mode}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
