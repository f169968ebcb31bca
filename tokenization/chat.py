# SPDX-License-Identifier: Apache-2.0
"""phi-3's chat template with the assistant's turns marked for the loss."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def with_chat_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer with phi-3's special tokens the chat template, in place; it is returned as well."""
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
