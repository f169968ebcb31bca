# SPDX-License-Identifier: Apache-2.0
"""LoRA on the experts of one layer in three ways, forward and backward, on a CPU: processor time and memory.

    python benchmarks/expert_lora.py [--hidden-size 1024] [--intermediate-size 3584] [--tokens 256] [--rank 16]

- ours: experts in NF4, the factors as narrow products beside the matrices (`jai.trainers.expert_lora`);
- PEFT: `target_parameters` on the dequantised weights, whole in memory;
- parametrised: `bitsandbytes.nn.parametrize.replace_parameter_4bit`, with the factors as a second
  parametrisation (PEFT's `target_parameters` find nothing there).

All have the same weights and factors; their outputs and the gradients of the input are compared first. Memory is
the weights, and what PyTorch's allocator holds beside them at the peak of one pass, from its profiler. Appends to
`benchmarks/results/expert_lora.csv`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from records import append, provenance
from torch import nn
from torch.nn.utils import parametrize
from torch.profiler import ProfilerActivity, profile
from transformers import BitsAndBytesConfig

from jai import JaiConfig
from jai.modeling_jai import JaiExperts
from jai.quantization_jai import JaiExperts4bit, quantize_matrices
from jai.trainers.expert_lora import adapting_four_bits

EXPERTS, TOP_K = 4, 2
NAMES = ("gate_up_proj", "down_proj")
Pass = Callable[[], list[torch.Tensor]]


class AddFactors(nn.Module):
    """LoRA as a parametrisation: the product of the factors on top of the matrices."""

    def __init__(self, a_ERC: torch.Tensor, b_ERR: torch.Tensor):
        super().__init__()
        self.a_ERC, self.b_ERR = nn.Parameter(a_ERC), nn.Parameter(b_ERR)

    def forward(self, weight_ERC: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(weight_ERC, self.b_ERR, self.a_ERC)


class Layer(nn.Module):
    """Something for PEFT to find the experts in."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.experts(*inputs)


def with_peft(experts: nn.Module, rank: int, *, in_four_bits: bool) -> nn.Module:
    targets = [f"experts.{name}" for name in NAMES]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=targets, init_lora_weights=False)
    return get_peft_model(Layer(experts), adapting_four_bits(config) if in_four_bits else config)


def factors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's, by names without those of its wrappers."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def parametrised(experts: JaiExperts, model: nn.Module, rank: int) -> nn.Module:
    """By bitsandbytes' own function, with the factors of a model with PEFT."""
    found = list(factors_of(model).values())
    for name in NAMES:
        parameter = getattr(experts, name)
        count, rows, columns = parameter.shape
        a, b = next(
            (a, b)
            for a, b in zip(found[::2], found[1::2])
            if a.shape == (count * rank, columns) and b.shape == (rows, count * rank)
        )
        replace_parameter_4bit(experts, name, quant_type="nf4", blocksize=64)
        a_ERC = a.detach().reshape(count, rank, columns)
        b_ERR = b.detach().reshape(rows, rank, count).permute(2, 0, 1)
        parametrize.register_parametrization(experts, name, AddFactors(a_ERC.clone(), b_ERR.contiguous()), unsafe=True)
    return Layer(experts)


def arms(options: argparse.Namespace) -> Iterator[tuple[str, str, nn.Module]]:
    """What is compared: a name, the implementation of the experts, and the layer."""
    torch.manual_seed(0)
    config = JaiConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        block_size=1,
        block_repeats=[1],
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    source = JaiExperts(config)
    for name in NAMES:
        nn.init.normal_(getattr(source, name), std=0.02)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    ours = with_peft(quantized(source, how), options.rank, in_four_bits=True)
    first = factors_of(ours)
    for implementation in ("grouped_mm", "eager"):
        config._experts_implementation = implementation
        yield "ours", implementation, ours
    (packed,) = (module for module in ours.modules() if isinstance(module, JaiExperts4bit))
    whole = packed.dequantized(torch.float32)
    peft = with_peft(whole, options.rank, in_four_bits=False)
    with torch.no_grad():
        for name, factor in factors_of(peft).items():
            factor.copy_(first[name])
    config._experts_implementation = "grouped_mm"
    yield "PEFT", "grouped_mm", peft
    del peft, whole
    config._experts_implementation = "grouped_mm"
    yield "parametrised", "grouped_mm", parametrised(source, ours, options.rank)


def quantized(source: JaiExperts, how: BitsAndBytesConfig) -> nn.Module:
    experts = source.in_four_bits(how)
    for name in NAMES:
        made = quantize_matrices(getattr(source, name).detach(), "nf4", double=False)
        getattr(experts, name).data = made.packed
        getattr(experts, name.replace("proj", "absmax")).data = made.absmax
    return experts


# --- Measuring


def build_pass(layer: nn.Module, options: argparse.Namespace) -> Pass:
    """A forward and a backward pass; gives the output and the gradients of the input and of every factor."""
    generator = torch.Generator().manual_seed(1)
    x_TH = torch.randn(options.tokens, options.hidden_size, generator=generator, requires_grad=True)
    chosen_TK = torch.rand(options.tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    weights_TK = torch.full((options.tokens, TOP_K), 1 / TOP_K)
    learning = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def run() -> list[torch.Tensor]:
        for each in (x_TH, *learning):
            each.grad = None
        out = layer(x_TH, chosen_TK, weights_TK)
        out.square().mean().backward()
        return [out.detach(), *(cast(torch.Tensor, each.grad) for each in (x_TH, *learning))]

    return run


def peak_bytes(run: Pass) -> int:
    """What the allocator holds at most during a pass, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def held_bytes(layer: nn.Module) -> int:
    """Of the weights; scales of the parametrisation are in no parameter."""
    tensors = [*layer.parameters(), *layer.buffers()]
    tensors += [module.quant_state.absmax for module in layer.modules() if hasattr(module, "quant_state")]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=3584)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, first = [], None
    for name, implementation, layer in arms(options):
        run = build_pass(layer, options)
        found = run()
        first = first or found
        for actual, expected in zip(found[:2], first[:2]):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        seconds = []
        for _ in range(options.repeats):
            began = time.process_time()
            run()
            seconds.append(time.process_time() - began)
        row = {
            "arm": name,
            "implementation": implementation,
            "hidden_size": str(options.hidden_size),
            "intermediate_size": str(options.intermediate_size),
            "experts": str(EXPERTS),
            "tokens": str(options.tokens),
            "rank": str(options.rank),
            "processor_seconds": f"{statistics.median(seconds):.3f}",
            "least_seconds": f"{min(seconds):.3f}",
            "weights_mb": f"{held_bytes(layer) / 1e6:.1f}",
            "peak_beside_mb": f"{peak_bytes(run) / 1e6:.1f}",
            "repeats": str(options.repeats),
            **provenance(("torch", "peft", "bitsandbytes")),
        }
        print({key: row[key] for key in list(row)[:11]}, flush=True)
        rows.append(row)
    print(f"appended to {append('expert_lora', rows)}")


if __name__ == "__main__":
    main()
