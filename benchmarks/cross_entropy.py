# SPDX-License-Identifier: Apache-2.0
"""The head and its loss, forward and backward, beside its peers: time, memory and error.

    python benchmarks/cross_entropy.py                                            # JAI-1's head on a GPU
    python benchmarks/cross_entropy.py --device cpu --tokens 256 --hidden 64 --vocab 3000 --dtype float32

Contenders run in turn, on the same tensors, in one process; the ceiling is the three matrix products alone (the logits,
the hidden gradient, the weight gradient), into buffers that exist. Time is the median over rounds (CUDA events; on a
CPU the clock), memory the most beside what is there before, gradients included. Errors are ‖gradient − exact‖ / ‖exact‖
against fp64, on the first 2,048 tokens at most. Without a GPU ours is the plain PyTorch path, and its rows say so. Rows
are appended to results/cross_entropy.csv.
"""

import argparse
import contextlib
import statistics
import sys
import warnings
from collections.abc import Callable

import torch
from accelerator import describe, milliseconds, peak_mebibytes, version
from records import append, provenance
from torch.nn import functional

from jai.kernels.head import loss as head_loss
from jai.kernels.head.loss import linear_cross_entropy, linear_cross_entropy_reference, linear_log_probs

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
CHECKED_TOKENS = 2048
CEILING = "ceiling: three products"


def whole_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As transformers computes it: all logits, converted to fp32."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), labels)


def ours_log_probs(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -linear_log_probs(hidden, weight, labels).sum() / (labels != -100).sum()


def trl_chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As TRL's `add_fused_lm_head` calls it for log-probabilities alone."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    kept = labels != -100
    log_probs = ChunkedLogProbFunction.apply(
        hidden[kept], weight, None, labels[kept], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
    )[0]
    return -log_probs.sum() / kept.sum()


def liger(accumulate: torch.dtype | None) -> Loss:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        return LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, None, None, -100, 0.0, 0.0, "mean", None, False, accumulate
        )[0]

    return loss


def torch_fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn import LinearCrossEntropyOptions

    return functional.linear_cross_entropy(hidden, weight, labels, options=LinearCrossEntropyOptions())


def contenders(device: str) -> dict[str, Loss]:
    found: dict[str, Loss] = {"jai linear_cross_entropy": linear_cross_entropy, "jai linear_log_probs": ours_log_probs}
    found["whole logits"] = whole_logits
    with contextlib.suppress(ImportError):
        import trl.kernels  # noqa: F401

        found["TRL chunked"] = trl_chunked
    if hasattr(functional, "linear_cross_entropy"):
        found["torch linear_cross_entropy"] = torch_fused
    if device == "cuda":
        with contextlib.suppress(ImportError):
            import liger_kernel  # noqa: F401

            found["Liger FLCE"] = liger(None)
            found["Liger FLCE, fp32 sum"] = liger(torch.float32)
    return found


class Ceiling:
    """The three products, over as many tokens at a time as ours, or 8,192."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor):
        self.hidden, self.weight = hidden.detach(), weight.detach()
        self.rows = min(8192, hidden.shape[0])
        self.logits = hidden.new_empty((self.rows, weight.shape[0]))
        self.hidden_gradient = torch.empty_like(self.hidden)
        self.weight_gradient = torch.empty_like(self.weight)

    def __call__(self) -> None:
        for start in range(0, self.hidden.shape[0], self.rows):
            x = self.hidden[start : start + self.rows]
            logits = self.logits[: x.shape[0]]
            torch.mm(x, self.weight.t(), out=logits)
            torch.mm(logits, self.weight, out=self.hidden_gradient[start : start + self.rows])
            torch.mm(logits.t(), x, out=self.weight_gradient)


def draw(arguments: argparse.Namespace, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of unit size, a head that makes logits of unit size, labels of which a share is ignored."""
    generator = torch.Generator(arguments.device).manual_seed(0)
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    hidden = torch.randn(tokens, arguments.hidden, generator=generator, device=device).to(dtype)
    weight = torch.randn(arguments.vocab, arguments.hidden, generator=generator, device=device)
    weight = (weight / arguments.hidden**0.5).to(dtype)
    labels = torch.randint(arguments.vocab, (tokens,), generator=generator, device=device)
    labels[torch.rand(tokens, generator=generator, device=device) < arguments.ignored] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def step(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> None:
    hidden.grad = weight.grad = None
    loss(hidden, weight, labels).backward()


def errors(losses: dict[str, Loss], arguments: argparse.Namespace, tokens: int) -> dict[str, tuple[str, str]]:
    """Relative errors of the hidden and of the weight gradient. What cannot run is taken out of `losses`."""
    hidden, weight, labels = draw(arguments, min(tokens, CHECKED_TOKENS))
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    linear_cross_entropy_reference(*exact, labels).backward()
    found = {}
    for name, loss in list(losses.items()):
        try:
            step(loss, hidden, weight, labels)
        except Exception as reason:  # a peer that cannot run here is named, with why
            print(f"  {name} cannot run: {str(reason).splitlines()[0][:140]}")
            del losses[name]
            continue
        found[name] = tuple(
            f"{float((t.grad.double() - e.grad).norm() / e.grad.norm()):.2e}" for t, e in zip((hidden, weight), exact)
        )
    return found


def measure(arguments: argparse.Namespace, tokens: int) -> list[dict[str, str]]:
    """A row for each contender at one number of tokens."""
    losses = contenders(arguments.device)
    wrong = errors(losses, arguments, tokens)
    hidden, weight, labels = draw(arguments, tokens)
    runs: dict[str, Callable[[], None]] = {CEILING: Ceiling(hidden, weight)}
    for name, loss in losses.items():
        runs[name] = lambda loss=loss: step(loss, hidden, weight, labels)
    peaks, times, failed = {}, {name: [] for name in runs}, {}
    for name, run in runs.items():
        hidden.grad = weight.grad = None
        try:
            run()  # compiles, and takes cuBLAS's workspace
            hidden.grad = weight.grad = None
            with peak_mebibytes(arguments.device) as peak:
                run()
            peaks[name] = peak[0]
        except torch.OutOfMemoryError:
            failed[name] = "out of memory"
    hidden.grad = weight.grad = None
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            if name not in failed:
                times[name].append(milliseconds(run, arguments.device))
    kept = int((labels != -100).sum())
    plain = head_loss.why_not_triton(hidden.device, hidden.dtype)
    first = statistics.median(times["jai linear_cross_entropy"])
    rows = []
    for name in runs:
        row = {
            "contender": name,
            "path": "" if not name.startswith("jai") else "Triton" if plain is None else "plain PyTorch",
            "dtype": arguments.dtype,
            "tokens": str(tokens),
            "kept": str(kept),
            "hidden": str(arguments.hidden),
            "vocab": str(arguments.vocab),
            "chunk_mib": str(head_loss.LOGITS_BYTES // 2**20),
            "median_ms": failed.get(name, ""),
            "fastest_ms": "",
            "slowest_ms": "",
            "against_ours": "",
            "tflops": "",
            "extra_mib": "",
            "hidden_gradient_error": "",
            "weight_gradient_error": "",
            "repeats": str(arguments.repeats),
        }
        if name not in failed:
            middle = statistics.median(times[name])
            operations = 6 * (tokens if name == CEILING else kept) * arguments.hidden * arguments.vocab
            row |= {
                "median_ms": f"{middle:.3f}",
                "fastest_ms": f"{min(times[name]):.3f}",
                "slowest_ms": f"{max(times[name]):.3f}",
                "against_ours": f"{middle / first:.3f}",
                "tflops": f"{operations / middle / 1e9:.1f}",
                "extra_mib": f"{peaks[name]:.0f}" if name != CEILING else "",
            }
        if name in wrong:
            row["hidden_gradient_error"], row["weight_gradient_error"] = wrong[name]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--hidden", type=int, default=5120)
    parser.add_argument("--vocab", type=int, default=64000)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--ignored", type=float, default=0.0, help="share of labels that are ignored")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--chunk-mib", type=int, help="bytes of a chunk's logits, in MiB, to try other sizes")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No GPU here. Give --device cpu and small sizes: see --help.")
    if arguments.chunk_mib:
        head_loss.LOGITS_BYTES = arguments.chunk_mib * 2**20
    warnings.filterwarnings("ignore", message=".*runs in plain PyTorch")
    packages = {name: version(name) for name in ("triton", "trl", "liger-kernel", "transformers")}
    source = provenance(("torch",)) | packages | describe(arguments.device)
    for tokens in arguments.tokens:
        rows = measure(arguments, tokens)
        path = append("cross_entropy", [source | row for row in rows])
        print(f"\n{tokens} tokens on {source['device']}, {arguments.dtype}, H {arguments.hidden}, V {arguments.vocab}:")
        for row in rows:
            what = f"{row['contender']} ({row['path']})" if row["path"] else row["contender"]
            print(
                f"  {what:42} {row['median_ms']:>10} ms  {row['against_ours']:>7} of ours  {row['extra_mib']:>7} MiB  "
                f"errors {row['hidden_gradient_error']:>8} {row['weight_gradient_error']:>8}"
            )
    print(f"\nAppended to {path}")


if __name__ == "__main__":
    main()
