# SPDX-License-Identifier: Apache-2.0
"""Options that cannot work, refused before the model is loaded: ranges, packages that are missing, contradictions."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, cast

from huggingface_hub import get_token
from peft import LoraConfig
from transformers import PreTrainedConfig
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_kernels_available
from trl import GRPOConfig, SFTConfig

from jai.configuration_jai import JaiConfig
from jai.errors import UserError
from jai.quantization_jai import refuse_old_bitsandbytes
from jai.trainers.arguments import StageArguments, StageConfig, max_length_of
from jai.trainers.engine import check_engine, check_engine_with_model, sharded_at_load, uses_deepspeed, uses_fsdp

_RANGES: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    (
        "1 or more",
        lambda value: value >= 1,
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "eval_accumulation_steps",
            "max_length",
            "save_total_limit",
            "dataset_num_proc",
            "lora_r",
            "snapshot_steps",
            "max_position_embeddings",
            "precompute_ref_batch_size",
            "ref_model_sync_steps",
            "max_completion_length",
            "num_iterations",
            "steps_per_generation",
            "generation_batch_size",
        ),
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "router_aux_loss_coef",
            "dataloader_num_workers",
            "seed",
            "data_seed",
            "eval_delay",
            "neftune_noise_alpha",
        ),
    ),
    (
        "more than 0",
        lambda value: value > 0,
        (
            "num_train_epochs",
            "adam_epsilon",
            "lora_alpha",
            "logging_steps",
            "save_steps",
            "eval_steps",
            "beta",
            "temperature",
            "rope_theta",
        ),
    ),
    (
        "from 0 to below 1",
        lambda value: 0 <= value < 1,
        ("lora_dropout", "label_smoothing_factor", "label_smoothing", "adam_beta1", "adam_beta2"),
    ),
    ("from 0 to 1", lambda value: 0 <= value <= 1, ("ld_alpha", "ref_model_mixup_alpha")),
    ("-1 (no limit), or 1 or more", lambda value: value == -1 or value >= 1, ("max_steps",)),
)

_DPO_LOSSES = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
)

_DPO_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

# By a part of the optimiser's name; the first that fits.
_OPTIMIZER_PACKAGES = (
    ("adamw_torch_4bit", "torchao", "torchao"),
    ("adamw_torch_8bit", "torchao", "torchao"),
    ("adamw_anyprecision", "torchdistx", "torchdistx"),
    ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("bnb", "bitsandbytes", "bitsandbytes"),
    ("bit", "bitsandbytes", "bitsandbytes"),
    ("ademamix", "bitsandbytes", "bitsandbytes"),
)

_EXPERTS_OF_THE_HUB = ("deepgemm", "sonicmoe")


def check_options(arguments: StageArguments) -> None:
    """Refuse options whose values cannot be, or need a package that is not installed.

    Raises:
        UserError: naming the option, its value and what was expected.
    """
    for options in (arguments.training, arguments.model, arguments.jai):
        for expected, fits, names in _RANGES:
            for name in names:
                value = getattr(options, name, None)
                if name == "beta" and value == 0 and isinstance(options, GRPOConfig):
                    continue  # GRPO without a reference
                if not all(fits(each) for each in (value if isinstance(value, list) else [value]) if each is not None):
                    raise UserError(f"`{name}` is {value}; expected {expected}.")
    losses = getattr(arguments.training, "loss_type", [])
    for loss in losses if isinstance(losses, list) else []:
        if loss not in _DPO_LOSSES:
            raise UserError(f"`loss_type` is {loss!r}; expected some of {', '.join(_DPO_LOSSES)}.")
    divergence = getattr(arguments.training, "f_divergence_type", _DPO_DIVERGENCES[0])
    if divergence not in _DPO_DIVERGENCES:
        raise UserError(f"`f_divergence_type` is {divergence!r}; expected one of {', '.join(_DPO_DIVERGENCES)}.")
    if getattr(arguments.training, "packing", False) and max_length_of(arguments.training) is None:
        raise UserError("`packing` fills sequences of `max_length` tokens, and `max_length` is null. Give a number.")
    if arguments.jai.merge_adapter and not arguments.model.use_peft:
        raise UserError(
            "`merge_adapter` is on, but there is no adapter: set `use_peft: true` as well, or leave it out."
        )
    if arguments.training.eval_on_start and arguments.training.eval_strategy == "no":
        raise UserError(
            "`eval_on_start` is on, and `eval_strategy` is no, so that there is nothing to evaluate on. Set "
            "`eval_strategy: steps`, or leave it out."
        )
    if arguments.script.ignore_bias_buffers:
        raise UserError("`ignore_bias_buffers` has no effect: it is for GPT-2's buffers under DDP. Leave it out.")
    check_engine(arguments.training, use_peft=arguments.model.use_peft)
    _check_trackers(arguments)
    _check_optimizer(arguments)
    _check_attention(arguments)
    _check_experts(arguments)
    _check_quantization(arguments)
    if getattr(arguments.training, "use_vllm", False):
        _require("vllm", "vllm", "`use_vllm` is on", "leave the option out")
    if arguments.training.push_to_hub and not (arguments.training.hub_token or get_token()):
        raise UserError(
            "`push_to_hub` is on, and there is no access token. Log in with `hf auth login`, set HF_TOKEN, or leave "
            "the option out and publish the result with `jai publish`."
        )


def refuse_without_effect(training: StageConfig, effective: Mapping[str, tuple[bool, str]]) -> None:
    """Refuse options that are given and do nothing beside the others, which TRL passes over.

    Args:
        training: TRL's options.
        effective: of an option, whether it has an effect, and with what it has one.

    Raises:
        UserError: naming the option.
    """
    defaults = {each.name: each.default for each in fields(training)}
    for name, (has_effect, needed) in effective.items():
        value = getattr(training, name)
        if value != defaults[name] and not has_effect:
            raise UserError(f"`{name}` is {value}, which has an effect with {needed} alone. Set that, or leave it out.")


def _check_trackers(arguments: StageArguments) -> None:
    available = get_available_reporting_integrations()
    for tracker in arguments.training.report_to or []:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"`report_to` is {tracker!r}; expected none, or some of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            )
        if tracker not in available:
            raise UserError(
                f"`report_to` is {tracker}, which is not installed. `pip install {tracker.replace('_', '-')}`, or set "
                "`report_to: none`."
            )


def _check_optimizer(arguments: StageArguments) -> None:
    name = str(getattr(arguments.training.optim, "value", arguments.training.optim))
    for part, module, package in _OPTIMIZER_PACKAGES:
        if part in name:
            _require(module, package, f"`optim` is {name}", "take `optim: adamw_torch`")
            return


def _check_attention(arguments: StageArguments) -> None:
    name = arguments.model.attn_implementation
    if name is None:
        return
    if "/" in name:
        _require_kernels(f"`attn_implementation` is {name}", "take `sdpa`")
        return
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name not in known:
        raise UserError(f"`attn_implementation` is {name!r}; expected one of {', '.join(sorted(known))}.")
    for version, is_available in (("2", is_flash_attn_2_available), ("3", is_flash_attn_3_available)):
        if name.endswith(f"flash_attention_{version}") and not is_available():
            raise UserError(
                f"`attn_implementation` is {name}, which is not installed, or has no GPU to run on. Take `sdpa`, or "
                "`pip install flash-attn --no-build-isolation` on a machine with one."
            )


def _check_experts(arguments: StageArguments) -> None:
    given = cast(dict[str, Any], getattr(arguments.training, "model_init_kwargs", None) or {})
    name = given.get("experts_implementation", arguments.jai.experts_implementation)
    if name is None:
        return
    from jai.kernels.register import ALL_EXPERTS_FUNCTIONS  # importing it makes "jai_fused" known

    known = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    if name not in known:
        raise UserError(f"`experts_implementation` is {name!r}; expected one of {', '.join(sorted(known))}.")
    if name in _EXPERTS_OF_THE_HUB:
        _require_kernels(f"`experts_implementation` is {name}", "take `grouped_mm`")


def _check_quantization(arguments: StageArguments) -> None:
    model = arguments.model
    if not (model.load_in_4bit or model.load_in_8bit):
        return
    option = "load_in_4bit" if model.load_in_4bit else "load_in_8bit"
    if not model.use_peft:
        raise UserError(f"`{option}` is on, and quantised weights cannot be trained. Set `use_peft: true` as well.")
    _require("bitsandbytes", "bitsandbytes", f"`{option}` is on", "leave the option out")


def _require_kernels(setting: str, alternative: str) -> None:
    if not is_kernels_available():
        raise UserError(
            f"{setting}, which comes from the Hub by the package kernels, and none is installed that transformers "
            f"takes. `pip install 'jai-llm[gpu]'`, or {alternative}."
        )


def _require(module: str, package: str, setting: str, alternative: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"{setting}, which needs {package}. `pip install {package}`, or {alternative}.")


# They mix the entries of a matrix, or use gradients before the backward pass has ended.
_OPTIMIZERS_OF_WHOLE_MATRICES = ("galore", "apollo", "lomo")


def check_partial_training(arguments: StageArguments, partial: Collection[str], lora: LoraConfig | None = None) -> None:
    """Refuse what would move the frozen entries of parameters of which others learn.

    Args:
        arguments: the run's.
        partial: names of these parameters.
        lora: the adapter, if there is one.

    Raises:
        UserError: for an optimiser that mixes entries, and for an engine that keeps gradients out of reach, or rows.
    """
    if lora is not None and lora.trainable_token_indices and is_deepspeed_zero3_enabled():
        raise UserError(
            "DeepSpeed's ZeRO-3 is on, and rows of new tokens are to learn beside LoRA, which PEFT cannot take out of "
            "matrices that are cut. Name in `trainable` what else learns (attention, experts, router, alphas), or take "
            "FSDP2 (recipes/accelerate/fsdp2.yaml)."
        )
    if not partial:
        return
    name = str(getattr(arguments.training.optim, "value", arguments.training.optim))
    obstacle = f"`optim` is {name}" if any(part in name for part in _OPTIMIZERS_OF_WHOLE_MATRICES) else ""
    if uses_deepspeed(arguments.training):
        obstacle = "`deepspeed` is on"
    if sharded_at_load(arguments.training) is not None:
        obstacle = "`distributed_config` is given"
    if obstacle:
        raise UserError(
            f"{obstacle}, and {next(iter(partial))} is to learn in part, which that cannot do. Train whole parts "
            "(attention, experts, router, alphas, new_layers), or take `optim: adamw_torch` on one GPU, DDP or FSDP2."
        )


def _check_quantized_checkpoint(arguments: StageArguments, config: PreTrainedConfig) -> None:
    """Of a checkpoint whose weights are quantised, only what is beside them can be trained."""
    model = arguments.model
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        if model.load_in_4bit:
            _check_bitsandbytes("`load_in_4bit` is on", config)
        return
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    what = f"The checkpoint's weights are quantised ({stored.get('quant_method', 'unknown')})"
    if not model.use_peft:
        raise UserError(f"{what}, and cannot be trained. Set `use_peft: true`, or give the checkpoint in 16 bits.")
    if arguments.jai.merge_adapter:
        raise UserError(
            f"{what}, and an adapter cannot be merged into them. Leave `merge_adapter` out, and merge into the "
            "checkpoint in 16 bits afterwards: jai merge-adapter ADAPTER OUT --base CKPT"
        )
    if model.load_in_8bit or (model.load_in_4bit and not stored.get("load_in_4bit")):
        raise UserError(f"{what}, and cannot be quantised again. Leave `load_in_4bit` and `load_in_8bit` out.")
    if stored.get("quant_method") == "bitsandbytes":
        _require("bitsandbytes", "bitsandbytes", what, "give the checkpoint in 16 bits")
        _check_bitsandbytes(what, config)


def _check_bitsandbytes(setting: str, config: PreTrainedConfig) -> None:
    """That of the experts of a JAI; for other models transformers asks for what it needs."""
    if config.model_type == JaiConfig.model_type:
        try:
            refuse_old_bitsandbytes()
        except ImportError as error:
            raise UserError(f"{setting}: {error}") from None


def check_options_with_model(arguments: StageArguments, config: PreTrainedConfig) -> None:
    """Refuse options that TRL would drop for this model in silence.

    Raises:
        UserError: naming the options.
    """
    _check_quantized_checkpoint(arguments, config)
    training = arguments.training
    is_quantized = arguments.model.load_in_4bit or getattr(config, "quantization_config", None) is not None
    if is_quantized and (uses_fsdp(training) or is_deepspeed_zero3_enabled()):
        engine = "FSDP" if uses_fsdp(training) else "ZeRO-3"
        raise UserError(
            f"{engine} is on, and quantised weights cannot be cut over processes: each must hold them whole. "
            "Launch without it (`accelerate launch --num_processes N …`, recipes/qlora_two_cards.yaml), or load in "
            "bfloat16."
        )
    check_engine_with_model(training, config)
    if training.label_smoothing_factor == 0:
        return
    if hasattr(training, "label_smoothing"):
        raise UserError("`label_smoothing_factor` has no effect on preferences. `label_smoothing` is the one that has.")
    if not isinstance(training, SFTConfig):
        raise UserError("`label_smoothing_factor` is for SFT, and has no effect here. Leave it out.")
    weight = training.router_aux_loss_coef
    weight = getattr(config, "router_aux_loss_coef", 0) if weight is None else weight
    if weight and getattr(config, "num_local_experts", 1) > 1:
        raise UserError(
            "With `label_smoothing_factor` TRL leaves the router's auxiliary loss out, and the experts would lose "
            "their balance. Leave it out, or set `router_aux_loss_coef: 0` to do without the auxiliary loss."
        )
