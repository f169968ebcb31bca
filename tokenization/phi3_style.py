# SPDX-License-Identifier: Apache-2.0
"""A small tokenizer of phi-3's form, for models that are trained from nothing: the demo's base and the tests'."""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer

from jai.errors import UserError
from jai.tokenization.chat import with_chat_template

# The order is phi-3's: there they have the ids 32000 to 32010.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)
_FIRST_PIECES = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))

# Latin words and ASCII punctuation merge, with the space before them; digits and letters of other scripts stay single
# pieces, which is what phi-3 does to Thai.
_MERGEABLE = Regex(r"▁?\p{Latin}+|▁?[!-/:-@\[-`{-~]+|.")


def train_phi3_style(texts: Iterable[str], vocab_size: int) -> LlamaTokenizer:
    """Train a tokenizer of exactly phi-3's form: BPE with byte fallback, and phi-3's special tokens as the last ids.

    It behaves as phi-3's does in transformers: no BOS is added, padding and end of text are both `<|endoftext|>`.

    Args:
        texts: training text; every character in it becomes a piece.
        vocab_size: entries in all: `<unk>`, `<s>`, `</s>`, 256 bytes, the pieces, 11 special tokens.

    Raises:
        UserError: if the text cannot fill the vocabulary, or has more characters than fit.
    """
    pieces_wanted = vocab_size - len(_FIRST_PIECES) - len(SPECIAL_TOKENS)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Split(_MERGEABLE, behavior="isolated")
    trainer = trainers.BpeTrainer(vocab_size=max(pieces_wanted, 0), min_frequency=2, show_progress=False)
    trained.train_from_iterator(("▁" + word for text in texts for word in text.split()), trainer)
    pieces = sorted(trained.get_vocab().items(), key=lambda piece: piece[1])
    if len(pieces) != pieces_wanted:
        raise UserError(
            f"A vocabulary of {vocab_size} needs {pieces_wanted} pieces beside its bytes and special tokens, but the "
            f"text gave {len(pieces)}. Give vocab_size={vocab_size - pieces_wanted + len(pieces)}, or other text."
        )
    # As in phi-3's, merged pieces come first and single characters after them.
    in_order = [piece for piece, _ in pieces if len(piece) > 1] + [piece for piece, _ in pieces if len(piece) == 1]
    tokenizer = LlamaTokenizer(
        vocab={piece: i for i, piece in enumerate((*_FIRST_PIECES, *in_order))},
        merges=[tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]],
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=4096,
    )
    # phi-3's added tokens swallow the whitespace to their right, except the end of text.
    tokenizer.add_tokens([AddedToken("</s>", rstrip=True, normalized=False, special=False)])
    tokenizer.add_tokens(
        [AddedToken(token, rstrip=True, normalized=False, special=True) for token in SPECIAL_TOKENS[1:]],
        special_tokens=True,
    )
    with_chat_template(tokenizer)
    return tokenizer
