# Copyright 2026 The JAI authors
# SPDX-License-Identifier: Apache-2.0
"""The experts of a JAI in four bits: NF4 (QLoRA, section 3) in blocks of 64, the scales in eight bits by option.

    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", ...)
    )

bitsandbytes quantises `nn.Linear` alone, and the experts, nine tenths of the weights, are 3-D parameters. The layout
is that of bitsandbytes' pull request 1965: for each expert its packed bytes and its absolute maxima of blocks.

This file ships to the Hub beside `modeling_jai.py`, which imports it. It imports bitsandbytes only when it quantises.

Shape suffixes: E experts, S rows, which are tokens by chosen expert, R and C rows and columns of an expert's matrix.
"""

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging import version
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils import logging

logger = logging.get_logger(__name__)

BLOCK = 64  # weights that share a scale
SCALE_BLOCK = 256  # scales that share a scale of their own, with double quantisation
QUANT_TYPES = ("nf4", "fp4")
BITSANDBYTES = "0.50"  # what is tested here; those before it round FP4 in another way, or not at all (0.46)
_MATRICES = ("gate_up_proj", "down_proj")
_OWN = ("eager", "grouped_mm", "batched_mm")  # implementations that are computed here


class Matrices4bit(NamedTuple):
    """One matrix of every expert, quantised, and what it stands for.

    Attributes:
        packed: two weights a byte, `(E, R * C / 2)`.
        absmax: the scale of each block, `(E, R * C / 64)`, in float32; with double quantisation codes of 8 bits.
        nested_absmax: with double quantisation the scale of each 256 scales, `(E, R * C / 64 / 256)`, rounded up.
        nested_offset: with double quantisation what is added to the scales, `(E,)`.
        nested_quant_map: with double quantisation what the codes mean, `(256,)`; bitsandbytes' dynamic map.
        shape: rows and columns of an expert's matrix.
        quant_type: "nf4" or "fp4".
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_quant_map: torch.Tensor | None
    shape: tuple[int, int]
    quant_type: str

    def of(self, experts: torch.Tensor | slice) -> "Matrices4bit":
        """The matrices of some experts, by ids or a slice."""
        parts = (part if part is None else part[experts] for part in self[:4])
        return Matrices4bit._make([*parts, *self[4:]])

    def scales(self) -> torch.Tensor:
        """The scale of each block in float32, `(E, R * C / 64)`."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        scales = [
            _bitsandbytes().functional.dequantize_blockwise(
                codes, absmax=absmax, code=self.nested_quant_map, blocksize=SCALE_BLOCK
            )
            for codes, absmax in zip(self.absmax, self.nested_absmax)
        ]
        return torch.stack(scales) + self.nested_offset[:, None]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights, `(E, R, C)`."""
        functional = _bitsandbytes().functional
        number, (rows, columns) = self.packed.shape[0], self.shape
        state = functional.QuantState(
            absmax=self.scales().reshape(-1),
            shape=torch.Size((number * rows, columns)),
            blocksize=BLOCK,
            quant_type=self.quant_type,
            dtype=dtype,
        )
        return functional.dequantize_4bit(self.packed.reshape(-1, 1), state).view(number, rows, columns)


_STORED = Matrices4bit._fields.index("shape")  # the fields before it are tensors


def quantize_matrices(weight_ERC: torch.Tensor, quant_type: str, double: bool) -> Matrices4bit:
    """Quantise each expert's matrix by itself, with bitsandbytes' kernels where the weights are."""
    functional = _bitsandbytes().functional
    parts: list[list[torch.Tensor]] = []
    for weight_RC in weight_ERC:
        packed, state = functional.quantize_4bit(weight_RC.contiguous(), blocksize=BLOCK, quant_type=quant_type)
        scales = compress_scales(state.absmax) if double else [state.absmax]
        parts.append([packed.reshape(-1), *scales])
    packed_and_scales = [torch.stack(part) for part in zip(*parts)]
    if double:
        packed_and_scales[-1] = packed_and_scales[-1][0]  # the map is one for all
    nothing = [None] * (_STORED - len(packed_and_scales))
    return Matrices4bit._make([*packed_and_scales, *nothing, tuple(weight_ERC.shape[1:]), quant_type])


def compress_scales(absmax: torch.Tensor) -> list[torch.Tensor]:
    """Double quantisation of one matrix's scales (QLoRA, section 3): codes, their scales, their mean, and their map."""
    offset = absmax.mean()
    codes, state = _bitsandbytes().functional.quantize_blockwise(absmax - offset, blocksize=SCALE_BLOCK)
    return [codes, state.absmax, offset, state.code]


class _Product(torch.autograd.Function):
    """Rows times matrices, which are dequantised here and again in the backward pass: none is kept between.

    The rows meet one matrix, matrices in order (`offsets`: where the rows of each end), or each row its own (`ids`).
    """

    @staticmethod
    def forward(ctx, x_SC, ids, offsets, shape, quant_type, *stored):
        ctx.save_for_backward(ids, offsets, *stored)
        ctx.shape, ctx.quant_type, ctx.dtype = shape, quant_type, x_SC.dtype
        return _multiply(x_SC, _weight(ctx, ids, stored).transpose(-2, -1), offsets)

    @staticmethod
    def backward(ctx, gradient_SR):
        ids, offsets, *stored = ctx.saved_tensors
        gradient_SC = _multiply(gradient_SR, _weight(ctx, ids, stored), offsets)
        return gradient_SC, *[None] * (4 + len(stored))


def _weight(ctx, ids: torch.Tensor | None, stored: Iterable[torch.Tensor | None]) -> torch.Tensor:
    matrices = Matrices4bit._make([*stored, ctx.shape, ctx.quant_type])
    return (matrices if ids is None else matrices.of(ids)).dequantize(ctx.dtype)


def _multiply(x_S: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    if offsets is not None and _has_grouped_mm(x_S):
        return F.grouped_mm(x_S.contiguous(), weight, offs=offsets)
    if offsets is not None:
        return torch.ops.transformers.grouped_mm_fallback(x_S, weight, offs=offsets)
    if weight.shape[0] == 1:
        return x_S @ weight[0]
    return torch.bmm(x_S.unsqueeze(1), weight).squeeze(1)


def _has_grouped_mm(x_S: torch.Tensor) -> bool:
    """Whether torch multiplies these rows by groups: from Ampere on, and while it compiles in bf16 alone."""
    if torch.compiler.is_compiling() and x_S.dtype != torch.bfloat16:
        return False
    return x_S.device.type != "cuda" or torch.cuda.get_device_capability(x_S.device) >= (8, 0)


class Lora4bit(NamedTuple):
    """LoRA of one matrix of every expert: `scale * b[e] @ a[e]` is added to it.

    Attributes:
        a_ERC, b_ERR: `(E, rank, C)` and `(E, R, rank)`.
        scale: usually alpha / rank.
    """

    a_ERC: torch.Tensor
    b_ERR: torch.Tensor
    scale: float

    def prepared(self, dtype: torch.dtype) -> "Lora4bit":
        """In another type, with rows whose bytes grouped_mm takes: ranks that are a multiple of eight, contiguous."""
        missing = -self.a_ERC.shape[1] % 8
        a_ERC, b_ERR = F.pad(self.a_ERC.to(dtype), (0, 0, 0, missing)), F.pad(self.b_ERR.to(dtype), (0, missing))
        return Lora4bit(a_ERC.contiguous(), b_ERR.contiguous(), self.scale)

    def of(self, experts: torch.Tensor | slice) -> "Lora4bit":
        """The factors of some experts, by ids or a slice."""
        return Lora4bit(self.a_ERC[experts], self.b_ERR[experts], self.scale)

    def product(self, x_S: torch.Tensor, offsets: torch.Tensor | None = None) -> torch.Tensor:
        """What is added to the rows' products: two narrow products; of the rows as `_multiply` has it."""
        inner_S = _multiply(x_S, self.a_ERC.transpose(-2, -1), offsets)
        return _multiply(inner_S, self.b_ERR.transpose(-2, -1), offsets) * self.scale


class JaiExperts4bit(nn.Module):
    """`JaiExperts` with its matrices in four bits; nothing in it is trained.

    Parameters, the state dict's names: `gate_up_proj` and `down_proj`, `(E, R * C / 2)` in uint8; `gate_up_absmax` and
    `down_absmax`, `(E, R * C / 64)` in float32. With double quantisation the scales are uint8, and beside them are
    `…_nested_absmax` `(E, R * C / 64 / 256)`, `…_nested_offset` `(E,)` and `…_nested_quant_map` `(256,)`.

    The product is computed in `bnb_4bit_compute_dtype`, or under autocast in autocast's. `bnb_4bit_quant_storage` is
    for the linear layers alone.

    Args:
        experts: the `JaiExperts` to stand in for; its weights are not read.
        quantization: how.

    Raises:
        ValueError: if a matrix's columns are no multiple of 64, or for a form of four bits that is not known.
    """

    def __init__(self, experts: Any, quantization: Any):
        super().__init__()
        self.whole_class = type(experts)
        self.config = experts.config
        self.num_experts, self.act_fn = experts.num_experts, experts.act_fn
        self.hidden_dim, self.intermediate_dim = experts.hidden_dim, experts.intermediate_dim
        self.quant_type: str = quantization.bnb_4bit_quant_type
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(f"`bnb_4bit_quant_type` is {self.quant_type!r}; expected {' or '.join(QUANT_TYPES)}.")
        self.is_double: bool = quantization.bnb_4bit_use_double_quant
        self.compute_dtype: torch.dtype = quantization.bnb_4bit_compute_dtype
        self.lora: dict[str, Lora4bit] = {}  # by matrix, while `adapted` runs
        self.shapes: dict[str, tuple[int, int]] = {name: tuple(getattr(experts, name).shape[1:]) for name in _MATRICES}
        for name, (rows, columns) in self.shapes.items():
            if columns % BLOCK:
                size = "hidden_size" if name == "gate_up_proj" else "intermediate_size"
                raise ValueError(
                    f"`{size}` is {columns}, and experts are quantised to four bits in blocks of {BLOCK}: it must be a "
                    f"multiple of {BLOCK}. Load this model in bfloat16."
                )
            blocks = rows * columns // BLOCK
            scale_dtype = torch.uint8 if self.is_double else torch.float32
            self._add(name, (self.num_experts, rows * columns // 2), torch.uint8)
            self._add(_part(name, "absmax"), (self.num_experts, blocks), scale_dtype)
            if self.is_double:
                self._add(_part(name, "nested_absmax"), (self.num_experts, -(-blocks // SCALE_BLOCK)))
                self._add(_part(name, "nested_offset"), (self.num_experts,))
                self._add(_part(name, "nested_quant_map"), (256,))

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32):
        # No buffers, as the scales are in the pull request (the state dict is the same): data-parallel training would
        # send them to every rank in every step, 4.4 GB for JAI-1.
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def _apply(self, fn, *args, **kwargs):
        """`nn.Module`'s, for `to`, `cuda`, `bfloat16` and the like, none of which may round the scales."""

        def moved(stored: torch.Tensor) -> torch.Tensor:
            made = fn(stored)
            return made if made.dtype == stored.dtype else stored.to(made.device)

        return super()._apply(moved, *args, **kwargs)

    def matrices(self, name: str) -> Matrices4bit:
        """`gate_up_proj` or `down_proj` of every expert."""
        stored = (getattr(self, _part(name, part), None) for part in Matrices4bit._fields[1:_STORED])
        return Matrices4bit._make([getattr(self, name), *stored, self.shapes[name], self.quant_type])

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """As that of `JaiExperts`.

        "eager" dequantises one matrix at a time, of the experts that are chosen. "grouped_mm" and "batched_mm"
        dequantise those of all experts, or those of the rows where the rows are no more than the experts, and wait for
        nothing on the host.
        """
        implementation = self.config._experts_implementation
        if implementation not in (None, *_OWN):
            refuse_implementation(self, implementation)
            return ALL_EXPERTS_FUNCTIONS[implementation](self, hidden_states, top_k_index, top_k_weights)
        in_loop = implementation in (None, "eager")
        return self.compute(hidden_states, top_k_index, top_k_weights, in_loop)

    def compute(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, in_loop: bool
    ) -> torch.Tensor:
        """`forward` by bitsandbytes' kernels and torch's, whatever implementation is chosen."""
        tokens, choices = top_k_index.shape
        if tokens == 0:
            return torch.zeros_like(hidden_states)
        ids_S, order_S = top_k_index.reshape(-1).sort(stable=True)
        device_type = hidden_states.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.compute_dtype
        x_S = hidden_states.to(dtype)[order_S // choices]
        gate, up = self._project("gate_up_proj", x_S, ids_S, in_loop).chunk(2, dim=-1)
        y_S = self._project("down_proj", self.act_fn(gate) * up, ids_S, in_loop)
        y_S = y_S * top_k_weights.reshape(-1)[order_S, None]
        in_order = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
        return y_S[in_order].view(tokens, choices, self.hidden_dim).sum(dim=1).to(hidden_states.dtype)

    def _project(self, name: str, x_S: torch.Tensor, ids_S: torch.Tensor, in_loop: bool) -> torch.Tensor:
        """Each row times its expert's matrix, and LoRA's beside it; the ids are sorted."""
        matrices, lora = self.matrices(name), self.lora.get(name)
        if lora is not None:
            lora = lora.prepared(x_S.dtype)
        if not in_loop and len(ids_S) <= self.num_experts:
            y_S = _product(x_S, matrices, ids=ids_S)
            return y_S if lora is None else y_S + lora.of(ids_S).product(x_S)
        experts = torch.arange(self.num_experts, device=ids_S.device)
        ends_E = torch.searchsorted(ids_S, experts, right=True)
        if not in_loop:
            y_S = _product(x_S, matrices, offsets=ends_E.int())
            return y_S if lora is None else y_S + lora.product(x_S, ends_E.int())
        ends = [0, *ends_E.tolist()]
        parts = []
        for expert, (start, end) in enumerate(pairwise(ends)):
            if start < end:
                x, one = x_S[start:end], slice(expert, expert + 1)
                y = _product(x, matrices.of(one))
                parts.append(y if lora is None else y + lora.of(one).product(x))
        return torch.cat(parts)

    @contextmanager
    def adapted(self, name: str, lora: "Lora4bit") -> Iterator[None]:
        """Within it `gate_up_proj` or `down_proj` has this LoRA beside it.

        Raises:
            ValueError: if the factors do not fit the matrices.
        """
        rows, columns = self.shapes[name]
        rank = lora.a_ERC.shape[1]
        expected = (self.num_experts, rank, columns), (self.num_experts, rows, rank)
        given = tuple(lora.a_ERC.shape), tuple(lora.b_ERR.shape)
        if given != expected:
            raise ValueError(f"LoRA's factors of {name} are {given}, and its experts need {expected}.")
        self.lora[name] = lora
        try:
            yield
        finally:
            del self.lora[name]

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """The `JaiExperts` with these weights, as they are after quantisation."""
        with torch.device("meta"):
            whole = self.whole_class(self.config)
        for name in _MATRICES:
            setattr(whole, name, nn.Parameter(self.matrices(name).dequantize(dtype)))
        return whole.train(self.training)

    def num_weights(self) -> int:
        """How many weights are quantised."""
        return self.num_experts * sum(rows * columns for rows, columns in self.shapes.values())

    def extra_repr(self) -> str:
        double = ", scales in 8 bits" if self.is_double else ""
        return f"experts={self.num_experts}, {self.quant_type}{double}, compute_dtype={self.compute_dtype}"


def refuse_implementation(experts: nn.Module, implementation: str):
    """Refuse an `experts_implementation` that would not know what to do with these experts, if they are quantised.

    Of what is registered with transformers, those read four bits that say so by an attribute `reads_four_bits`.

    Raises:
        ValueError: naming those that can compute.
        KeyError: if there is none of that name.
    """
    if isinstance(experts, JaiExperts4bit):
        form = "four bits"
        able = [name for name, function in ALL_EXPERTS_FUNCTIONS.items() if getattr(function, "reads_four_bits", False)]
        able = [*_OWN, *able]
    elif isinstance(experts, FP8Experts):
        form, able = "FP8", ["eager", *ALL_FP8_EXPERTS_FUNCTIONS]
    else:
        return
    if implementation not in able:
        ALL_EXPERTS_FUNCTIONS.get_interface(implementation, refuse_implementation)  # whether it is a name at all
        raise ValueError(
            f'`experts_implementation="{implementation}"` cannot compute with experts in {form}. Choose one of '
            f"{', '.join(able)}."
        )


def _part(name: str, part: str) -> str:
    return f"{name.removesuffix('_proj')}_{part}"


def _product(
    x_S: torch.Tensor,
    matrices: Matrices4bit,
    ids: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    return _Product.apply(x_S, ids, offsets, matrices.shape, matrices.quant_type, *matrices[:_STORED])


# --- LoRA by PEFT


def lora_reaching_four_bits(config: Any) -> Any:
    """A `LoraConfig` of PEFT whose `target_parameters` reach experts in four bits; elsewhere it is as it was.

    PEFT's own class for them adds the product of its factors to the parameter, which here is packed bytes.

    Args:
        config: it is changed; what is registered is not saved with it.
    """
    config._register_custom_module({JaiExperts4bit: _param_wrapper()})
    return config


def peft_config_of_four_bits(adapter, config, load_config, adapter_kwargs=None, local_files_only=False, **kwargs):
    """The configuration of an adapter that is loaded on experts in four bits, with arguments of `load_adapter`."""
    peft = _peft()
    if config is None:
        where = {**getattr(load_config, "download_kwargs", {}), **(adapter_kwargs or {})}
        config = peft.PeftConfig.from_pretrained(
            adapter, **({"local_files_only": True} if local_files_only else {}), **where
        )
    return lora_reaching_four_bits(config) if isinstance(config, peft.LoraConfig) else config


@functools.cache
def _param_wrapper() -> type:
    base: Any = _peft().tuners.lora.layer.ParamWrapper

    class ParamWrapper(base):
        """PEFT's, for experts in four bits: the factors multiply the rows beside the frozen matrices.

        After `dequantize()` it is what PEFT's own is. PEFT knows a wrapper by the name of its class, so that is the
        name of its own.
        """

        def get_param(self) -> torch.Tensor:
            """What PEFT reads the shape, device and dtype of: a single 0 that stands for the whole matrix."""
            experts: Any = self.get_base_layer()
            if not isinstance(experts, JaiExperts4bit):
                return super().get_param()
            packed, shape = getattr(experts, self.parameter_name), experts.shapes[self.parameter_name]
            return torch.zeros((), dtype=experts.compute_dtype, device=packed.device).expand(len(packed), *shape)

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            experts: Any = self.get_base_layer()
            if not isinstance(experts, JaiExperts4bit):
                return super().forward(x, *args, **kwargs)
            self._check_forward_args(x, *args, **kwargs)
            kwargs.pop("adapter_names", None)
            active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
            with ExitStack() as stack:
                if active:
                    stack.enter_context(experts.adapted(self.parameter_name, self._lora(active)))
                return self.base_layer(x, *args, **kwargs)

        def _lora(self, adapters: list[str]) -> Lora4bit:
            """The active adapters' as one, side by side along the rank."""
            factors = [self.get_delta_factors(adapter) for adapter in adapters]
            if len(factors) == 1:
                b_ERR, a_ERC, scale = factors[0]
                return Lora4bit(a_ERC, b_ERR, scale)
            a_ERC = torch.cat([a for _, a, _ in factors], dim=1)
            return Lora4bit(a_ERC, torch.cat([b * scale for b, _, scale in factors], dim=2), 1.0)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            if not isinstance(self.get_base_layer(), JaiExperts4bit):
                super().merge(safe_merge, adapter_names)
            elif _peft().tuners.tuners_utils.check_adapters_to_merge(self, adapter_names):
                raise ValueError(
                    "An adapter cannot be merged into experts in four bits. Merge it into the checkpoint in 16 bits "
                    "that they were made of (jai merge-adapter ADAPTER OUT --base CKPT), or load it on what "
                    "`model.dequantize()` gives."
                )

    ParamWrapper.__qualname__ = "ParamWrapper"
    return ParamWrapper


def __getattr__(name: str) -> Any:
    """`ParamWrapper`, which is made when it is asked for, as pickle does."""
    if name == "ParamWrapper":
        return _param_wrapper()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- Loading


# transformers refuses a checkpoint's code where a package that it imports anywhere, but for within a `try`, is missing.


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError:  # named before, by `refuse_old_bitsandbytes`
        raise
    return bitsandbytes


def _peft() -> Any:
    try:
        import peft
    except ImportError:  # nobody loads an adapter without it
        raise
    return peft


def refuse_old_bitsandbytes():
    """Refuse a bitsandbytes without what is used here.

    Raises:
        ImportError: if the installed one is older than `BITSANDBYTES`.
        ModuleNotFoundError: if there is none.
    """
    try:
        installed = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes") from None
    if version.parse(installed) < version.parse(BITSANDBYTES):
        raise ImportError(
            f"bitsandbytes {installed} is installed, and experts in four bits need {BITSANDBYTES} or later: pip "
            f"install 'bitsandbytes>={BITSANDBYTES}'"
        )


class _Quantize(ConversionOps):
    """A loaded weight in four bits: the experts' here, those of linear layers as transformers does it."""

    def __init__(self, of_linear: ConversionOps):
        self.of_linear = of_linear

    def convert(self, input_dict, *args, model=None, **kwargs):
        (name, value), *_ = input_dict.items()
        experts, matrix = get_module_from_name(model, name)
        if not isinstance(experts, JaiExperts4bit):
            return self.of_linear.convert(input_dict, *args, model=model, **kwargs)
        weight = value[0] if isinstance(value, list) else value
        expected = (experts.num_experts, *experts.shapes[matrix])
        if tuple(weight.shape) != expected:
            raise ValueError(f"`{name}` has the shape {tuple(weight.shape)}; this configuration needs {expected}.")
        quantized = quantize_matrices(weight, experts.quant_type, experts.is_double)
        names = {part: name.removesuffix(matrix) + _part(matrix, part) for part in Matrices4bit._fields[1:_STORED]}
        parts = {key: getattr(quantized, part) for part, key in {"packed": name, **names}.items()}
        return {key: nn.Parameter(part, requires_grad=False) for key, part in parts.items() if part is not None}


class JaiBnb4BitHfQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantiser by bitsandbytes, which takes the experts of a JAI along."""

    def validate_environment(self, *args, **kwargs):
        super().validate_environment(*args, **kwargs)
        refuse_old_bitsandbytes()

    def _process_model_before_weight_loading(self, model, *args, **kwargs):
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        if not self.pre_quantized:
            _say_what_skips_nothing(model, self.quantization_config.llm_int8_skip_modules or ())
        found = [(name, module) for name, module in model.named_modules() if hasattr(module, "in_four_bits")]
        chosen = [(name, module) for name, module in found if should_convert_module(name, self.modules_to_not_convert)]
        if chosen and getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                "Experts in four bits cannot be split over devices by `distributed_config` or a `tp_plan`. Leave it "
                "out: each process of data-parallel training holds them whole."
            )
        for name, module in chosen:
            with torch.device("meta"):
                experts = module.in_four_bits(self.quantization_config)
                for matrix in () if self.pre_quantized else _MATRICES:
                    # What is loaded gets the placeholder's dtype, before it is quantised (transformers up to 5.22).
                    placeholder = torch.empty(getattr(experts, matrix).shape)
                    setattr(experts, matrix, nn.Parameter(placeholder, requires_grad=False))
            model.set_submodule(name, experts)
        _refuse_chosen_implementation(model)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, JaiExperts4bit):
            return name in _MATRICES
        return super().param_needs_quantization(model, param_name, **kwargs)

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, JaiExperts4bit) and name in _MATRICES:
            return 1  # byte, of two weights
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self):
        return _Quantize(super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            if isinstance(module, JaiExperts4bit):
                module.requires_grad_(False)  # loading makes every parameter of floating point trainable
            elif hasattr(module, "support_avx512bf16_for_cpu"):
                # In evaluation mode on such CPUs, bitsandbytes 0.50 packs a linear layer's weights and rounds its
                # scales. Saved after that they are others, and training has wrong gradients, without an error.
                module.support_avx512bf16_for_cpu = False
        _save_as_it_is(model)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _dequantize(self, model, dtype=None):
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # as saving leaves it in the configuration
        for name, module in list(model.named_modules()):
            if isinstance(module, JaiExperts4bit):
                model.set_submodule(name, module.dequantized(dtype))
        if not any(isinstance(module, _bitsandbytes().nn.Linear4bit) for module in model.modules()):
            return model  # where no linear layer is quantised, transformers fails (5.23)
        return super()._dequantize(model, dtype=dtype)


class JaiBnb8BitHfQuantizer(Bnb8BitHfQuantizer):
    """transformers' quantiser by bitsandbytes, which refuses to leave nine tenths of the weights as they are."""

    def _process_model_before_weight_loading(self, model, *args, **kwargs):
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        skipped = self.modules_to_not_convert
        if not self.pre_quantized:
            _say_what_skips_nothing(model, self.quantization_config.llm_int8_skip_modules or ())
        left = [
            name
            for name, module in model.named_modules()
            if hasattr(module, "in_four_bits") and should_convert_module(name, skipped)
        ]
        if left and not self.pre_quantized:
            raise ValueError(
                f"`load_in_8bit` would quantise the linear layers and leave the experts ({left[0]} and {len(left) - 1} "
                "more), most of the weights, as they are. Give `load_in_4bit=True`, which takes the experts too, or "
                '`llm_int8_skip_modules=["lm_head", "mlp.experts"]` if that is what you want.'
            )

    def _process_model_after_weight_loading(self, model, **kwargs):
        _save_as_it_is(model)
        return super()._process_model_after_weight_loading(model, **kwargs)


def _say_what_skips_nothing(model, skipped: Iterable[str]):
    """transformers passes over names that fit nothing, as `mlp.experts.gate_up_proj`, which is no module."""
    names = [name for name, _ in model.named_modules()]
    for each in skipped:
        if all(should_convert_module(name, [each]) for name in names):
            logger.warning(
                f"`llm_int8_skip_modules` has {each!r}, with which no module's name begins or ends: for it nothing is "
                'left as it is. The experts are "mlp.experts".'
            )


def _save_as_it_is(model):
    """Saving takes back how weights were converted in loading; of bitsandbytes' stored ones transformers (5.23) cannot.

    Nor need it: what is in memory is what is stored.
    """
    stored = {"Bnb4bitDeserialize", "Bnb8bitDeserialize"}
    model._weight_conversions = [
        conversion
        for conversion in getattr(model, "_weight_conversions", None) or []
        if stored.isdisjoint(type(operation).__name__ for operation in getattr(conversion, "operations", ()))
    ]


class JaiFineGrainedFP8HfQuantizer(FineGrainedFP8HfQuantizer):
    """transformers' quantiser for FP8, whose experts have implementations of their own."""

    def _process_model_before_weight_loading(self, model, *args, **kwargs):
        super()._process_model_before_weight_loading(model, *args, **kwargs)
        _refuse_chosen_implementation(model)


def _refuse_chosen_implementation(model):
    for module in model.modules():
        refuse_implementation(module, model.config._experts_implementation)


_QUANTIZERS: dict[str, Any] = {
    "bitsandbytes_4bit": JaiBnb4BitHfQuantizer,
    "bitsandbytes_8bit": JaiBnb8BitHfQuantizer,
    "fp8": JaiFineGrainedFP8HfQuantizer,
}
_one_at_a_time = threading.RLock()


@contextmanager
def quantizers_of_experts() -> Iterator[None]:
    """While a JAI loads, transformers' quantisers by bitsandbytes are those above; other models never see them."""
    with _one_at_a_time:
        before = {name: AUTO_QUANTIZER_MAPPING[name] for name in _QUANTIZERS}
        AUTO_QUANTIZER_MAPPING.update(_QUANTIZERS)
        try:
            yield
        finally:
            AUTO_QUANTIZER_MAPPING.update(before)
