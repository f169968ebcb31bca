# SPDX-License-Identifier: Apache-2.0
"""Tokenizers by name, for every verb that takes one."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jai.errors import UserError

_LONGEST_REASON = 300


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Runs no code from there.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of many kinds: the Hub's, JSON's, KeyError, the tokenizers library's bare Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        raise UserError(
            f"{name} has no tokenizer that can be loaded. Give a folder with tokenizer.json, or a Hub id. ({reason})"
        ) from error
