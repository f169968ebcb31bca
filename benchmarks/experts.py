# SPDX-License-Identifier: Apache-2.0
r"""A layer's experts beside their peers: time, memory, bytes kept for the backward pass, and error.

    python benchmarks/experts.py                                  # JAI-1's size in bf16 on a GPU
    TRITON_INTERPRET=1 python benchmarks/experts.py --device cpu --dtype float32 --tokens 8 --hidden 32 \
        --intermediate 48  # to try it out without a GPU

First the ceiling of the machine: the same matrix products by cuBLAS, expert by expert, alone. Then every contender in
turn, on the same tensors: ours, transformers' implementations, a cuBLAS loop over the experts (whose sizes the host
knows: no real model can), sonicmoe where it loads, and Liger's. Passes: `forward`, `replayed` (the same as a CUDA
graph, for up to 64 tokens: what decoding costs without Python), `training` (forward and backward), `checkpointed` (the
same under non-reentrant activation checkpointing). `--lora R` adapts both matrices by PEFT; `--contenders` leaves the
others out. Time is the median over
rounds, by CUDA events, with the caches flushed in between; memory the most beside what is there before. Rows are
appended to results/experts.csv; --plot draws the last run against the roofline.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerator import describe, milliseconds, peak_mebibytes, version
from bitsandbytes.functional import get_4bit_type
from records import RESULTS, append, provenance
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import jai.kernels.register  # noqa: F401  "jai_fused"
from jai.kernels.experts.four_bits import FourBits
from jai.kernels.experts.fused import fused_experts, fused_experts_reference
from jai.quantization_jai import quantize_matrices

PASSES = ("forward", "replayed", "training", "checkpointed")
IMPLEMENTATIONS = (
    "jai_fused",
    "jai_fused_x",
    "jai_fused_fp8",
    "grouped_mm",
    "batched_mm",
    "eager",
    "sonicmoe",
    "deepgemm",
)
CEILING = "ceiling: cuBLAS products"
LOOP = "cuBLAS loop"
NF4 = "jai_fused, NF4"
CONTENDERS = (*IMPLEMENTATIONS, NF4, LOOP, "liger")
BATCHED_MOST = 64  # batched_mm copies a token's matrices: 1.1 GB each at JAI-1's size
REPLAYED_MOST = 64  # decoding
CHECKED_TOKENS = 256


def loop_over_experts(experts: nn.Module, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor):
    """Sorted rows, then torch's own products expert by expert; the sizes come from the host."""
    top_k = ids_TK.shape[1]
    order_R = ids_TK.reshape(-1).argsort(stable=True)
    sizes = experts.sizes
    rows = x_TH[order_R // top_k].split(sizes)
    gate_up_EFH, down_EHI = experts.gate_up_proj, experts.down_proj  # once: PEFT merges where they are read
    outs = []
    for gate_up_FH, down_HI, part in zip(gate_up_EFH, down_EHI, rows, strict=True):
        gate, up = functional.linear(part, gate_up_FH).chunk(2, dim=-1)
        outs.append(functional.linear(functional.silu(gate) * up, down_HI))
    weighted = torch.cat(outs) * weights_TK.reshape(-1)[order_R, None].to(x_TH.dtype)
    return torch.zeros_like(x_TH).index_add(0, order_R // top_k, weighted)


def liger(experts: nn.Module, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor):
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x_TH, experts.gate_up_proj, experts.down_proj, ids_TK, weights_TK)


def in_four_bits(experts: nn.Module, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor):
    """Ours on the same matrices in NF4, whose error is that of four bits; their gradient is none."""
    return fused_experts(x_TH, *experts.packed, ids_TK, weights_TK, four_bits=experts.four_bits)


def pack(experts: nn.Module) -> None:
    """Quantise the matrices once, beside those that the others compute with."""
    made = [quantize_matrices(matrix.detach(), "nf4", False) for matrix in (experts.gate_up_proj, experts.down_proj)]
    experts.packed = [matrices.packed for matrices in made]
    code = get_4bit_type("nf4", device=experts.gate_up_proj.device)
    experts.four_bits = FourBits(code, *[[matrices.absmax] for matrices in made])


ALL_EXPERTS_FUNCTIONS.register(LOOP, loop_over_experts)
ALL_EXPERTS_FUNCTIONS.register(NF4, in_four_bits)
ALL_EXPERTS_FUNCTIONS.register("liger", liger)


class Ceiling:
    """The products of one pass by cuBLAS, each expert's rows in one piece, into buffers that exist.

    Operands are random numbers that no product overwrites: of zeros a GPU draws less power, and clocks higher.
    """

    def __init__(self, experts: nn.Module, arguments: argparse.Namespace, backward: bool):
        hidden, intermediate, dtype = arguments.hidden, arguments.intermediate, getattr(torch, arguments.dtype)
        self.backward, self.trained, self.sizes = backward, backward and not arguments.lora, experts.sizes
        self.gate_up, self.down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        rows, device = max(experts.sizes), self.gate_up.device

        def rows_of(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            operand = torch.randn(rows, columns, device=device, dtype=dtype)
            return operand, torch.empty_like(operand)

        self.x, self.pre, self.act = rows_of(hidden), rows_of(2 * intermediate), rows_of(intermediate)
        self.gate_up_gradient = torch.empty_like(self.gate_up[0]) if self.trained else None
        self.down_gradient = torch.empty_like(self.down[0]) if self.trained else None

    def __call__(self) -> None:
        for expert, size in enumerate(self.sizes):
            (x, x_out), (pre, pre_out), (act, act_out) = (
                (operand[:size], out[:size]) for operand, out in (self.x, self.pre, self.act)
            )
            torch.mm(x, self.gate_up[expert].t(), out=pre_out)
            torch.mm(act, self.down[expert].t(), out=x_out)
            if self.backward:
                torch.mm(x, self.down[expert], out=act_out)
                torch.mm(pre, self.gate_up[expert], out=x_out)
            if self.trained:
                torch.mm(x.t(), act, out=self.down_gradient)
                torch.mm(pre.t(), x, out=self.gate_up_gradient)


def make_experts(
    arguments: argparse.Namespace, tokens: int
) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The module and a batch: tokens spread evenly, or with --skew as a router that prefers the first experts."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    config = MixtralConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_local_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
    )
    config._experts_implementation = "eager"
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        experts = MixtralExperts(config)
        torch.set_default_dtype(torch.float32)
    for matrix in experts.parameters():
        nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5, generator=generator)
    x_TH = torch.randn(tokens, arguments.hidden, generator=generator, device=device).to(dtype).requires_grad_()
    preference_E = -arguments.skew * torch.arange(arguments.experts, device=device)
    logits_TE = torch.randn(tokens, arguments.experts, generator=generator, device=device) + preference_E
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(arguments.top_k)
    experts.sizes = ids_TK.flatten().bincount(minlength=arguments.experts).tolist()
    return experts, x_TH, ids_TK, (weights_TK / weights_TK.sum(-1, keepdim=True)).requires_grad_()


def with_lora(experts: nn.Module, rank: int) -> nn.Module:
    """PEFT's adapters on both matrices, everything else frozen."""
    from peft import LoraConfig, get_peft_model

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, *batch: torch.Tensor) -> torch.Tensor:
            return self.experts(*batch)

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    return get_peft_model(Layer(), LoraConfig(r=rank, lora_alpha=rank, target_modules=[], target_parameters=targets))


def captured(runs: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Each contender as a CUDA graph, as a serving engine runs it; one that asks the device has none."""
    replays: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            replays[name] = graph.replay
        except Exception as reason:
            print(f"  {name} cannot be captured: {str(reason).splitlines()[0][:140]}")
    return replays


def run_once(what: str, module: nn.Module, batch: tuple[torch.Tensor, ...], dout_TH: torch.Tensor) -> None:
    if what in ("forward", "replayed"):
        with torch.no_grad():
            module(*batch)
        return
    module.zero_grad(set_to_none=True)
    batch[0].grad = batch[2].grad = None
    out = checkpoint(module, *batch, use_reentrant=False) if what == "checkpointed" else module(*batch)
    out.backward(dout_TH)


def kept_mebibytes(module: nn.Module, batch: tuple[torch.Tensor, ...]) -> float:
    """Bytes that the forward pass keeps for the backward one, the module's own parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*batch)
    return sum(storage.nbytes() for storage in kept.values()) / 2**20


def error(experts: nn.Module, module: nn.Module, batch: tuple[torch.Tensor, ...]) -> float:
    """‖out − exact‖ / ‖exact‖ against float64, on the first tokens."""
    x_TH, ids_TK, weights_TK = (tensor[:CHECKED_TOKENS].detach() for tensor in batch)
    sizes, experts.sizes = experts.sizes, ids_TK.flatten().bincount(minlength=experts.num_experts).tolist()
    with torch.no_grad():
        matrices = [matrix.double() for matrix in (experts.gate_up_proj, experts.down_proj)]
        exact = fused_experts_reference(x_TH.double(), *matrices, ids_TK, weights_TK.double())
        out = module(x_TH, ids_TK, weights_TK).double()
    experts.sizes = sizes
    return float((out - exact).norm() / exact.norm())


def measure(arguments: argparse.Namespace, tokens: int) -> list[dict[str, str]]:
    """A row for each contender and pass at one number of tokens."""
    experts, *batch = make_experts(arguments, tokens)
    batch = tuple(batch)
    dout_TH = torch.randn_like(batch[0].detach())
    errors = {}
    names = [name for name in arguments.contenders if name != "batched_mm" or tokens <= BATCHED_MOST]
    if arguments.lora and NF4 in names:  # `benchmarks/expert_lora.py` has it
        names.remove(NF4)
    for name in names:
        experts.config._experts_implementation = name
        try:
            if name == NF4:
                pack(experts)
            errors[name] = f"{error(experts, experts, batch):.2e}"
        except Exception as reason:  # a peer that cannot run here is named, with why
            print(f"  {name} cannot run: {str(reason).splitlines()[0][:140]}")
    module = with_lora(experts, arguments.lora) if arguments.lora else experts
    flush = torch.empty(256 * 2**20 if arguments.device == "cuda" else 1, dtype=torch.uint8, device=arguments.device)
    rows = []
    for what in arguments.passes:
        runs: dict[str, Callable[[], object]] = {}
        runs[CEILING] = Ceiling(experts, arguments, what in ("training", "checkpointed"))
        for name in errors:

            def run(name: str = name, what: str = what) -> None:
                experts.config._experts_implementation = name
                run_once(what, module, batch, dout_TH)

            runs[name] = run
        if what == "replayed":
            if arguments.device == "cpu" or tokens > REPLAYED_MOST:
                continue
            runs = captured(runs)
        peaks, kept, times = {}, {}, {}
        for name, run in runs.items():
            try:
                run()  # compiles, and takes cuBLAS's workspace
                module.zero_grad(set_to_none=True)
                batch[0].grad = batch[2].grad = None
                with peak_mebibytes(arguments.device) as peak:
                    run()
                peaks[name], times[name] = peak[0], []
                if what == "training" and name != CEILING:
                    kept[name] = kept_mebibytes(module, batch)
            except Exception as reason:
                print(f"  {name} cannot run {what}: {str(reason).splitlines()[0][:140]}")
        for _ in range(arguments.repeats):
            for name in times:
                flush.zero_()  # what one contender left in the L2 is of no use to the next
                times[name].append(milliseconds(runs[name], arguments.device))
        rows += [row_of(arguments, tokens, what, name, times, peaks, kept, errors) for name in times]
    return rows


def row_of(arguments, tokens, what, name, times, peaks, kept, errors) -> dict[str, str]:
    products = 1 if what in ("forward", "replayed") else 2 if arguments.lora else 3  # LoRA's own are not counted
    operations = products * 6 * tokens * arguments.top_k * arguments.hidden * arguments.intermediate
    middle = statistics.median(times[name])
    return {
        "contender": name,
        "pass": what,
        "lora": str(arguments.lora),
        "dtype": arguments.dtype,
        "tokens": str(tokens),
        "hidden": str(arguments.hidden),
        "intermediate": str(arguments.intermediate),
        "experts": str(arguments.experts),
        "top_k": str(arguments.top_k),
        "skew": str(arguments.skew),
        "median_ms": f"{middle:.3f}",
        "fastest_ms": f"{min(times[name]):.3f}",
        "slowest_ms": f"{max(times[name]):.3f}",
        "against_ours": f"{middle / statistics.median(times['jai_fused']):.3f}" if "jai_fused" in times else "",
        "tflops": f"{operations / middle / 1e9:.1f}",
        "extra_mib": f"{peaks[name]:.0f}",
        "kept_kib_a_token": f"{kept[name] * 1024 / tokens:.1f}" if name in kept else "",
        "error": errors.get(name, ""),
        "repeats": str(arguments.repeats),
    }


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """TFLOP/s over tokens, a panel a pass, with the measured ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure, axes = pyplot.subplots(1, len(passes), figsize=(6 * len(passes), 4.5), sharey=True, squeeze=False)
    for axis, what in zip(axes[0], passes, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            points = [
                (int(r["tokens"]), float(r["tflops"])) for r in rows if (r["contender"], r["pass"]) == (name, what)
            ]
            if points:
                ours, ceiling = name.startswith("jai"), name == CEILING
                style = {"color": "black", "linestyle": "--"} if ceiling else {"linewidth": 2.4 if ours else 1.2}
                axis.plot(*zip(*points, strict=True), marker="." if not ceiling else None, label=name, **style)
        axis.set(title=what, xlabel="tokens", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TFLOP/s")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"Experts of one layer, {rows[0]['dtype']}, on {rows[0]['device']}")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384, 65536])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--intermediate", type=int, default=17920)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--skew", type=float, default=0.0, help="how much the router prefers the first experts")
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="rank of LoRA on the experts; 0: none")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No GPU here. Give --device cpu and small sizes: see --help.")
    packages = {name: version(name) for name in ("triton", "transformers", "liger-kernel", "peft")}
    source = provenance(("torch",)) | packages | describe(arguments.device)
    every_row = []
    for tokens in arguments.tokens:
        print(f"\n{tokens} tokens on {source['device']}, {arguments.dtype}:")
        rows = [source | row for row in measure(arguments, tokens)]
        every_row += rows
        append("experts", rows)
        for row in rows:
            print(
                f"  {row['pass']:12} {row['contender']:26} {row['median_ms']:>11} ms  {row['against_ours']:>7} of ours"
                f"  {row['tflops']:>7} TFLOP/s  {row['extra_mib']:>7} MiB  {row['kept_kib_a_token']:>7} KiB/token kept"
                f"  error {row['error']}"
            )
    print(f"\nAppended to {RESULTS / 'experts.csv'}")
    if arguments.plot:
        plot(every_row, arguments.plot)
        print(f"Drawn in {arguments.plot}")


if __name__ == "__main__":
    main()
