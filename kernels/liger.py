# SPDX-License-Identifier: Apache-2.0
"""RMSNorm, RoPE and SwiGLU from Liger: `use_liger_kernel=True` in transformers' and TRL's training arguments.

Importing this module registers the model type `jai` with Liger, which passes over unknown types in silence. `jai sft`,
`jai dpo` and trainers with `JaiTrainerMixin` import it where `use_liger_kernel` is on. A script of your own does it:

    import jai.kernels.liger

Only the given model is patched, whether its class is this package's or remote code. Its experts are not: they go
through `experts_implementation`, and Liger's fused experts are weak where experts are few and large.
"""

import inspect
from typing import Any

import triton
from liger_kernel.transformers import LigerSwiGLUMLP, liger_rotary_pos_emb
from liger_kernel.transformers.monkey_patch import (
    MODEL_TYPE_TO_APPLY_LIGER_FN,
    _patch_rms_norm_module,
    _patch_swiglu_module,
)
from liger_kernel.utils import infer_device
from transformers import PreTrainedModel

from jai.configuration_jai import JaiConfig
from jai.errors import UserError


def apply_liger_kernel_to_jai(
    rope: bool = True,
    rms_norm: bool = True,
    swiglu: bool = True,
    cross_entropy: bool = False,
    fused_linear_cross_entropy: bool = False,
    model: PreTrainedModel | None = None,
) -> None:
    """Put Liger's kernels into one JAI, in place. transformers gives the options from `liger_kernel_config`.

    Args:
        rope: rotary embeddings of every layer, of any kind (partial, LongRoPE): cos and sin come from the model.
        rms_norm: the two norms of every layer, and the last.
        swiglu: the MLP of a dense JAI. A JAI with several experts has none, and is left as it is.
        cross_entropy: refused.
        fused_linear_cross_entropy: refused; TRL's trainers have a chunked one of their own.
        model: a JAI with any head, or none, as `PreTrainedModel`.

    Raises:
        UserError: without a model, for what is refused, where there is no device for Triton, and where Liger would
            compute something else than the model.
    """
    if model is None:
        raise UserError(
            "Liger was asked to patch JAI's classes before a model is built, which would change every JAI in this "
            "process. Build the model first and give it: `apply_liger_kernel_to_jai(model=model)`."
        )
    if cross_entropy or fused_linear_cross_entropy:
        raise UserError(
            "`cross_entropy` and `fused_linear_cross_entropy` of Liger are not for JAI: the first replaces "
            "PyTorch's for every model in this process, the second the model's forward and with it the router's "
            "auxiliary loss. Leave them out of `liger_kernel_config`; TRL's trainers compute the loss in chunks anyway."
        )
    require_device()
    config = model.config
    if rope and config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        _require_partial_rope()
    dense = config.num_local_experts == 1
    if swiglu and dense and config.hidden_act not in ("silu", "swish"):
        raise UserError(
            f"Liger's SwiGLU computes silu, and this model's `hidden_act` is {config.hidden_act!r}. Give "
            '`liger_kernel_config={"swiglu": False}`.'
        )

    base_model: Any = getattr(model, model.base_model_prefix, model)
    if rms_norm:
        _patch_rms_norm_module(base_model.norm)
    for layer in base_model.layers:
        if rope:
            layer.self_attn.apply_rotary_pos_emb = liger_rotary_pos_emb
        if rms_norm:
            _patch_rms_norm_module(layer.input_layernorm)
            _patch_rms_norm_module(layer.post_attention_layernorm)
        if swiglu and dense:
            _patch_swiglu_module(layer.mlp, LigerSwiGLUMLP)


def require_device() -> None:
    """Refuse a machine on which Triton has nothing to run on.

    Raises:
        UserError: if there is no GPU, and Triton's interpreter is off.
    """
    if infer_device() == "cpu" and not triton.knobs.runtime.interpret:
        raise UserError("Liger's kernels need a GPU, and there is none here. Leave `use_liger_kernel` out.")


def _require_partial_rope() -> None:
    # Before it had the argument `rotary_dim`, the kernel read cos and sin as if they were as wide as a head.
    if "rotary_dim" not in inspect.signature(liger_rotary_pos_emb).parameters:
        raise UserError(
            "This model rotates a part of each head (`partial_rotary_factor`), which the installed Liger computes "
            'wrongly. Install liger-kernel 0.8.5 or later, or give `liger_kernel_config={"rope": False}`.'
        )


MODEL_TYPE_TO_APPLY_LIGER_FN[JaiConfig.model_type] = apply_liger_kernel_to_jai
