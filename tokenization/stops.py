# SPDX-License-Identifier: Apache-2.0
"""Where a generation ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

END_OF_TURN = "<|end|>"  # of phi-3's chat form


def stop_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids at which a generation ends: those of the checkpoint's generation config, and the tokenizer's.

    The tokenizer's are its end of text and, in phi-3's chat form, `<|end|>`. Either source may lack one: a base's
    configuration names the end of text alone, a tokenizer knows nothing of a third token that a trainer added.
    """
    configured = generation_config.eos_token_id if generation_config else None
    configured = [configured] if isinstance(configured, int) else configured or []
    ids = [*configured, tokenizer.eos_token_id, tokenizer.get_vocab().get(END_OF_TURN)]
    return sorted({id_ for id_ in ids if id_ is not None})
