# SPDX-License-Identifier: Apache-2.0
"""phi-3's chat template with the assistant's turns marked for the loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from jai.errors import UserError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer with phi-3's special tokens the chat template, in place; it is returned as well."""
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def check_chat(name: str, tokenizer: PreTrainedTokenizerBase, remedy: str = "Fix the template.") -> None:
    """Refuse a chat template that cannot be used.

    Args:
        name: of the model, for messages.
        tokenizer: one with a chat template.
        remedy: what to do, for messages.

    Raises:
        UserError: if it fails, or makes no tokens of a chat.
    """
    try:
        inputs = tokenizer.apply_chat_template([{"role": "user", "content": "A"}], return_dict=True)
        tokens = cast("BatchEncoding", inputs)["input_ids"]
    except Exception as error:  # of any kind: jinja2's, and what a template does wrong with its values
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"The chat template of {name} cannot be used: {reason}. {remedy}") from error
    if not tokens:
        raise UserError(f"The chat template of {name} makes no tokens of a chat. {remedy}")
