# SPDX-License-Identifier: Apache-2.0
"""Gives a causal language model of transformers the linear cross-entropy, per instance and from outside."""

import functools
import inspect
import sys
import types
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.mixtral import modeling_mixtral

from .loss import linear_cross_entropy, linear_token_figures

# What some models do to their logits. JAI, Mixtral, Llama, Phi-3 and Qwen do none of it.
_LOGIT_CHANGES = (
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "final_logit_softcapping",
)


_CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # since 5.24


@dataclass
class LinearCrossEntropyOutput(MoeCausalLMOutputWithPast):
    """A model's output without logits; with `fused_lm_head=True` also the figures of each token that TRL reads.

    `log_probs`, `entropy`, `mean_logits`, `log_sum_sq_probs` and `is_top1` have the shape of the shifted labels, and
    are 0 where `label_mask` is False.
    """

    log_probs: torch.FloatTensor | None = None
    entropy: torch.FloatTensor | None = None
    mean_logits: torch.FloatTensor | None = None
    log_sum_sq_probs: torch.FloatTensor | None = None
    is_top1: torch.BoolTensor | None = None
    label_mask: torch.BoolTensor | None = None


def use_linear_cross_entropy(
    model: PreTrainedModel, *, temperature: float = 1.0, expect_equal_weights: bool = True
) -> PreTrainedModel:
    """Make `model(input_ids, labels=...)` compute its loss without logits (`logits` is None then).

    Without labels the model does what it did. The auxiliary loss of a mixture of experts is added as the model itself
    would. With TRL, call it on the trainer's model, after the trainer is made, which replaces the forward pass too:

        trainer = SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
        use_linear_cross_entropy(trainer.model)

    For DPO, KTO, GRPO and RLOO, whose losses weigh tokens unequally: `use_linear_cross_entropy(trainer.model,
    expect_equal_weights=False)`, and the same for `trainer.ref_model`.

    Args:
        model: a causal language model with `base_model`, whose output embeddings are an `nn.Linear` on its last hidden
            state; or a PEFT model around one.
        temperature: what TRL's log-probabilities are divided by; it must be that of the trainer.
        expect_equal_weights: TRL's SFT computes its loss from log-probabilities. True computes their gradients in the
            forward pass, for a loss that weighs all tokens alike; a loss that does not is right too, but slower.

    Returns:
        The model.

    Raises:
        ValueError: for a model whose logits are not hidden states times a matrix (a bias, a factor, a softcap).
    """
    inner: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
    config = inner.config.get_text_config()
    changes = [name for name in _LOGIT_CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]
    if changes:
        raise ValueError(
            f"{type(inner).__name__} changes its logits ({', '.join(changes)} in its config), which the linear "
            "cross-entropy does not do. Leave the model as it is."
        )
    _head_weight(inner)
    before = inner.forward
    _check_trl(before, temperature)
    names = [name for name in inspect.signature(type(inner).forward).parameters if name != "self"]

    @functools.wraps(type(inner).forward)
    def forward(self, *args, labels=None, shift_labels=None, fused_lm_head=False, **kwargs):
        kwargs |= zip(names, args)
        labels = kwargs.pop("labels", labels)
        if labels is None and shift_labels is None:
            # A copy of the model has a forward of its own; only the function must be the original's.
            return before.__func__(self, **kwargs) if inspect.ismethod(before) else before(**kwargs)
        return _forward(self, labels, shift_labels, fused_lm_head, temperature, expect_equal_weights, kwargs)

    inner.forward = types.MethodType(forward, inner)
    return model


def _forward(
    model: PreTrainedModel,
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    fused_lm_head: bool,
    temperature: float,
    expect_equal_weights: bool,
    kwargs: dict[str, Any],
) -> LinearCrossEntropyOutput | tuple:
    config = model.config.get_text_config()
    num_items_in_batch = kwargs.pop("num_items_in_batch", None)
    kwargs.pop("logits_to_keep", None)
    return_dict = kwargs.pop("return_dict", None)
    if kwargs.get("output_router_logits") is None and getattr(config, "output_router_logits", False):
        kwargs["output_router_logits"] = True
    outputs = model.base_model(**kwargs, return_dict=True)

    weight = _head_weight(model)
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight  # FSDP2
    if weight.shape[0] != config.vocab_size:
        raise ValueError(
            f"The head's weight has {weight.shape[0]} rows here and the vocabulary {config.vocab_size} entries: it is "
            "split over devices (tensor parallelism, DeepSpeed ZeRO-3), and this loss needs it whole. Train with FSDP2 "
            "or ZeRO-2, or without use_linear_cross_entropy."
        )
    hidden = outputs.last_hidden_state.to(weight.device)
    if labels is not None and shift_labels is None:
        # The last position gets an ignored label instead of being cut off, which would copy all hidden states.
        targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].to(weight.device)
    else:
        targets = cast(torch.Tensor, shift_labels).to(weight.device)
    figures = {}
    if fused_lm_head:
        mask = targets != -100
        per_token = linear_token_figures(
            hidden, weight, targets, temperature=temperature, expect_equal_weights=expect_equal_weights
        )
        items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -per_token.log_probs.sum() / items
        width = targets.shape[-1] - (shift_labels is None)
        figures = {name: figure[..., :width] for name, figure in (*per_token._asdict().items(), ("label_mask", mask))}
    else:
        loss = linear_cross_entropy(hidden, weight, targets, num_items_in_batch=num_items_in_batch)

    aux_loss: torch.Tensor | None = None
    router_logits = outputs.get("router_logits")
    if kwargs.get("output_router_logits") and router_logits:
        given = kwargs.get("attention_mask")
        mask_BS = given[:, -hidden.shape[1] :] if given is not None and given.dim() == 2 else None
        # The model's own function where it has one, found as the model finds it.
        module = sys.modules[type(model).__module__]
        balance: Any = getattr(module, "load_balancing_loss_func", modeling_mixtral.load_balancing_loss_func)
        aux_loss = balance(router_logits, config.num_experts, config.num_experts_per_tok, mask_BS)
        loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
    result = LinearCrossEntropyOutput(
        loss=loss,
        aux_loss=aux_loss,
        **{_CACHE: outputs.get(_CACHE)},
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
        router_logits=router_logits,
        **figures,
    )
    as_dict = model.config.return_dict if return_dict is None else return_dict
    return result if as_dict else result.to_tuple()


def _head_weight(model: PreTrainedModel) -> torch.Tensor:
    head = model.get_output_embeddings()
    # PEFT's wrappers for rows (`trainable_token_indices`) and whole modules give the weight with what they train.
    linear = getattr(head, "original_module", head)
    if not isinstance(linear, torch.nn.Linear) or not linear.weight.is_floating_point():
        given = "nothing" if head is None else f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(
            f"The output embeddings of {type(model).__name__} are {given}; expected an nn.Linear with floating-point "
            "weights. LoRA on the head (PEFT) or a quantised head would be ignored: leave lm_head out of them."
        )
    if linear.bias is not None:
        raise ValueError(f"The head of {type(model).__name__} has a bias, which this loss leaves out: do not use it.")
    return cast(torch.Tensor, cast(torch.nn.Module, head).weight)


def _check_trl(forward: Any, temperature: float) -> None:
    """TRL's fused head knows its trainer's temperature and keeps it in a closure: ours must be the same."""
    function = getattr(forward, "__func__", None)
    if function is None or getattr(function, "__module__", "") == __name__:
        return
    nonlocals = inspect.getclosurevars(function).nonlocals if function.__closure__ else {}
    if "temperature" in nonlocals and nonlocals["temperature"] != temperature:
        raise ValueError(
            f"temperature={temperature} was given, and the trainer divides logits by {nonlocals['temperature']}: give "
            "use_linear_cross_entropy the trainer's temperature."
        )
    if nonlocals.get("cast_lm_head_to_fp32"):
        raise ValueError("The trainer has cast_lm_head_to_fp32=True, which this loss does not do. Turn it off.")
