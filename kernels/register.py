# SPDX-License-Identifier: Apache-2.0
"""Makes `experts_implementation="jai_fused"` known to transformers: importing this file is enough.

    import jai.kernels.register
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="jai_fused")

It serves every model whose experts are SwiGLU with gate and up rows concatenated and no bias (JAI, Mixtral, Qwen3-MoE,
...), in training and in decoding. Where it cannot, it says why once and lets `grouped_mm` compute. `jai_fused_x` and
`jai_fused_fp8` keep less for the backward pass (see `save` of `fused_experts`).
"""

import functools
import importlib.util
import logging
import os
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .experts.four_bits import FourBits
from .experts.fused import ExpertsLora, Save, fused_experts

logger = logging.getLogger(__name__)

IMPLEMENTATIONS: dict[str, Save] = {"jai_fused": "x+pre", "jai_fused_x": "x", "jai_fused_fp8": "fp8-pre"}
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MATRIX_NAMES = ("gate_up_proj", "down_proj")
_SILU_CLASSES = (nn.SiLU, type(ACT2FN["silu"]))  # once: ACT2FN makes a module at every look


def why_not(experts: nn.Module, hidden_states: torch.Tensor, save: Save = "x+pre") -> str | None:
    """Why the fused kernels cannot compute these experts, in words; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    device = hidden_states.device
    if device.type == "cuda":
        needed = (8, 9) if save == "fp8-pre" else (8, 0)
        if _capability(device) < needed:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability {needed[0]}.{needed[1]}"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        return f"the hidden states are on {device}; the kernels run on CUDA devices"
    name = type(experts).__name__
    if getattr(experts, "has_bias", False) or getattr(experts, "has_post_expert_norm", False):
        return f"{name} has biases or a norm after the experts"
    if not getattr(experts, "has_gate", True) or not getattr(experts, "is_concatenated", True):
        return f"{name} has no gate, or gate and up rows interleaved"
    if getattr(experts, "is_transposed", False):
        return f"{name} stores its matrices transposed"
    if not _is_silu(getattr(experts, "act_fn", None)) or not _has_default_gate(type(experts)):
        return f"{name} has another activation than SwiGLU's silu"
    if is_in_four_bits(experts):
        return None
    for matrix in _matrices(experts):
        if isinstance(matrix, DTensor):
            return f"the matrices of {name} are distributed tensors"
        if matrix.dtype not in _KERNEL_DTYPES:
            return f"the matrices of {name} are {matrix.dtype}; the kernels take bfloat16, float16 and float32"
        if matrix.ndim != 3:
            return f"the matrices of {name} have {matrix.ndim} dimensions; the kernels take (experts, rows, columns)"
    return None


def is_in_four_bits(experts: nn.Module) -> bool:
    """Whether they are a JAI's in four bits, of the package or of remote code."""
    return all(hasattr(experts, name) for name in ("matrices", "compute", "lora", "compute_dtype"))


@torch.compiler.assume_constant_result  # torch.compile would put the call into its graph
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _matrices(experts: nn.Module) -> list[torch.Tensor]:
    """Both matrices, without what PEFT adds to them: reading an adapted one would make the merged matrix."""
    parametrizations: Any = getattr(experts, "parametrizations", None)
    return [
        getattr(experts, name) if _factors_of(experts, name) is None else parametrizations[name].original
        for name in _MATRIX_NAMES
    ]


def _lora(experts: nn.Module, dtype: torch.dtype) -> ExpertsLora | None:
    """LoRA in `dtype`, where PEFT adapts a matrix (`target_parameters`) and has not merged.

    PEFT 0.21 puts a parametrisation with the factors on each adapted parameter while the module runs. Of PEFT's private
    class only three attributes are used.
    """
    proxies = [_factors_of(experts, name) for name in _MATRIX_NAMES]
    if proxies == [None, None]:
        return None
    factors: list[torch.Tensor] = []
    scales: list[float] = []
    for matrix, proxy in zip(_matrices(experts), proxies, strict=True):
        num_experts, rows, columns = matrix.shape
        if proxy is None:
            a, b, scale = matrix.new_empty(num_experts, 0, columns), matrix.new_empty(num_experts, rows, 0), 0.0
        else:
            a, b, scale = proxy.rhs, proxy.lhs, float(proxy.scaling)
        factors += [a.to(dtype), b.to(dtype)]
        scales.append(scale)
    up_a, up_b, down_a, down_b = factors
    return ExpertsLora(up_a, up_b, down_a, down_b, *scales)


def _factors_of(experts: nn.Module, name: str) -> Any:
    if not parametrize.is_parametrized(experts, name):
        return None
    parametrizations = cast(Any, experts.parametrizations)[name]
    proxy = parametrizations[0]
    alone = len(parametrizations) == 1 and all(hasattr(proxy, part) for part in ("lhs", "rhs", "scaling"))
    return proxy if alone else None


def _is_silu(activation: object) -> bool:
    return activation is nn.functional.silu or isinstance(activation, _SILU_CLASSES)


def _has_default_gate(experts_class: type) -> bool:
    # transformers gives every experts class a method `_apply_gate`; one of another module computes something else.
    method = getattr(experts_class, "_apply_gate", None)
    return method is None or method.__module__ == ALL_EXPERTS_FUNCTIONS.__class__.__module__


def experts_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    save: Save,
) -> torch.Tensor:
    """What transformers calls in place of the forward of an experts module.

    Args:
        hidden_states: `(T, H)`.
        top_k_index, top_k_weights: chosen experts and their weights `(T, K)`.

    Returns:
        `(T, H)` in the dtype of `hidden_states`.
    """
    reason = why_not(experts, hidden_states, save)
    if reason is not None:
        _warn_once(reason)
        if is_in_four_bits(experts):
            return cast(Any, experts).compute(hidden_states, top_k_index, top_k_weights, in_loop=False)
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)
    device_type = hidden_states.device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if is_in_four_bits(experts):
        x = hidden_states.to(autocast or cast(torch.dtype, experts.compute_dtype))
        out = _compute_in_four_bits(cast(Any, experts), x, top_k_index, top_k_weights, save)
        return out.to(hidden_states.dtype)
    gate_up, down = _matrices(experts)
    dtype = autocast or gate_up.dtype
    x, gate_up, down = (tensor.to(dtype) for tensor in (hidden_states, gate_up, down))
    out = fused_experts(x, gate_up, down, top_k_index, top_k_weights, save=save, lora=_lora(experts, dtype))
    return out.to(hidden_states.dtype)


def _compute_in_four_bits(experts: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, save: Save):
    matrices = [experts.matrices(name) for name in _MATRIX_NAMES]
    scales = [
        [part for part in (m.absmax, m.nested_absmax, m.nested_offset, m.nested_quant_map) if part is not None]
        for m in matrices
    ]
    four_bits = FourBits(_code(experts.quant_type, x.device), *scales)
    lora = None
    if experts.lora:
        factors: list[torch.Tensor] = []
        strengths: list[float] = []
        for name, matrix in zip(_MATRIX_NAMES, matrices, strict=True):
            rows, columns = matrix.shape
            of_matrix = experts.lora.get(name)
            if of_matrix is None:
                a, b, strength = (
                    x.new_empty(len(matrix.packed), 0, columns),
                    x.new_empty(len(matrix.packed), rows, 0),
                    0.0,
                )
            else:
                a, b, strength = of_matrix
            factors += [a.to(x.dtype), b.to(x.dtype)]
            strengths.append(strength)
        up_a, up_b, down_a, down_b = factors
        lora = ExpertsLora(up_a, up_b, down_a, down_b, *strengths)
    gate_up, down = (matrix.packed for matrix in matrices)
    return fused_experts(x, gate_up, down, ids, weights, save=save, lora=lora, four_bits=four_bits)


@functools.cache
def _code(quant_type: str, device: torch.device) -> torch.Tensor:
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type(quant_type, device=device)


_warned: set[str] = set()


def _warn_once(reason: str) -> None:
    if not torch.compiler.is_compiling() and reason not in _warned:
        _warned.add(reason)
        logger.warning(f'experts_implementation="jai_fused" falls back to "grouped_mm": {reason}.')


for _name, _save in IMPLEMENTATIONS.items():
    _function = partial(experts_forward, save=_save)
    cast(Any, _function).reads_four_bits = True  # for the model's file
    ALL_EXPERTS_FUNCTIONS.register(_name, _function)
