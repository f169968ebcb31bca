# SPDX-License-Identifier: Apache-2.0
"""The demo's stand-in for phi-3: a small `Phi3ForCausalLM`, trained for a minute, mostly on English."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerBase

from jai.small_model import train
from jai.small_model_options import Training

CONTEXT = 128
BATCH = 8


def train_base(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    steps: int,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train a 6-layer phi-3 from nothing on packed text and save it with its tokenizer.

    Args:
        texts: training documents; they are shuffled, joined by the end-of-text token, and read as often as it takes.
        tokenizer: a tokenizer of phi-3's form.
        out: folder to write.
        steps: optimiser steps of `BATCH` contexts of `CONTEXT` tokens.
        seed: seed of the weights and of the order of the text.
        on_step: called after each step with its number and loss.

    Returns:
        The training loss of each step, in nats a token.
    """
    torch.manual_seed(seed)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        original_max_position_embeddings=1024,
        sliding_window=None,
        initializer_range=0.08,  # at this width 0.02 hardly learns: loss 5.1 against 3.6 after 60 steps
        bos_token_id=tokenizer.get_vocab()["<s>"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Phi3ForCausalLM(config)
    losses: list[float] = []

    def record(step: int, loss: float) -> None:
        losses.append(loss)
        on_step(step, loss)

    training = Training(
        tokens=steps * BATCH * CONTEXT,
        context=CONTEXT,
        batch_rows=BATCH,
        learning_rate=4e-3,
        warmup_steps=max(steps // 10, 1),
        decay=True,
        dtype="float32",
    )
    ids = _token_stream(texts, tokenizer, training.tokens + 1, seed)
    train(model, ids, training, [training.rows], on_step=record)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    return losses


def _token_stream(texts: list[str], tokenizer: PreTrainedTokenizerBase, tokens: int, seed: int) -> np.ndarray:
    """So many ids of all texts, joined by the end of text, in a new order each time that they are through."""
    rng = random.Random(seed)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream: list[int] = []
    while len(stream) < tokens:
        rng.shuffle(encoded)
        for ids in encoded:
            stream += [*ids, tokenizer.eos_token_id]
    return np.array(stream[:tokens])
