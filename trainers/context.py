# SPDX-License-Identifier: Apache-2.0
"""The context that a stage trains a model for: its length and RoPE's base, set in the checkpoint that comes out."""

from dataclasses import replace
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from jai.errors import UserError
from jai.trainers.arguments import StageArguments
from jai.trainers.base_model import BaseModel


def with_context(base: BaseModel, arguments: StageArguments) -> BaseModel:
    """The checkpoint as the options want its context; itself where they say nothing.

    Raises:
        UserError: for values that the model cannot have, a model whose context is more than these two numbers, and an
            adapter, which has no configuration to hold them.
    """
    jai = arguments.jai
    given = {
        name: value for name in ("max_position_embeddings", "rope_theta") if (value := getattr(jai, name)) is not None
    }
    if not given:
        return base
    names = " and ".join(f"`{name}`" for name in given)
    clash = {*given, "rope_parameters"} & set(arguments.training.model_init_kwargs or ())
    if clash:
        raise UserError(f"{names} and `model_init_kwargs` ({', '.join(sorted(clash))}) set the same. Leave one out.")
    if arguments.model.use_peft and not jai.merge_adapter:
        raise UserError(
            f"{names} would be lost: they belong into a checkpoint's configuration, and this run writes an adapter "
            "alone, which is loaded on the base model with its own. Set `merge_adapter: true`, which writes both."
        )
    _refuse_other_contexts(base, names)
    changes: dict[str, Any] = {}
    if jai.max_position_embeddings is not None:
        changes["max_position_embeddings"] = jai.max_position_embeddings
    if jai.rope_theta is not None:
        changes["rope_parameters"] = {**base.config.rope_parameters, "rope_theta": jai.rope_theta}
    tokenizer = base.tokenizer
    length = jai.max_position_embeddings
    if length is not None and tokenizer.model_max_length < length:
        tokenizer.model_max_length = length
    return replace(base, config=_changed(base, changes), loading={**base.loading, **changes}, given_config=base.config)


def context_of(config: PreTrainedConfig) -> tuple[int | None, float | None]:
    """The length of the context in tokens, and RoPE's base, where a configuration has them."""
    rope = getattr(config, "rope_parameters", None) or {}
    return getattr(config, "max_position_embeddings", None), rope.get("rope_theta")


def _refuse_other_contexts(base: BaseModel, names: str) -> None:
    window = getattr(base.config, "sliding_window", None)
    if window is not None:
        raise UserError(
            f"{names} cannot be set for {base.name}: its attention has a window of {window:,} tokens, beyond which it "
            "sees nothing, whatever the context. `jai convert` makes a JAI of a phi-3, which has no window."
        )
    rope = getattr(base.config, "rope_parameters", None)
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind != "default":
        raise UserError(
            f"{names} cannot be set for {base.name}: its RoPE is {kind or 'of another kind'}, whose further factors "
            "are made for the context and the base that it has. Set `rope_parameters` as a whole in its config.json."
        )


def _changed(base: BaseModel, changes: dict[str, Any]) -> PreTrainedConfig:
    try:
        return type(base.config).from_dict({**base.config.to_dict(), **changes})
    except (ValueError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"The context does not fit {base.name}: {reason}") from error
