# SPDX-License-Identifier: Apache-2.0
"""Text of the tokenizer ablation: what is held out, the order in which all arms read the rest, and its tokens."""

import random
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from jai.errors import UserError

_ENCODED_AT_ONCE = 256  # pieces


@dataclass(frozen=True)
class SplitText:
    """Pieces of documents in NFC, by language: what is trained on and what is held out."""

    train: dict[str, list[str]]
    heldout: dict[str, list[str]]


@dataclass(frozen=True)
class Stream:
    """The training text of one run under one tokenizer.

    Attributes:
        ids: tokens, shape (rows × context + 1,): row r predicts `ids[r × context + 1 : (r + 1) × context + 1]`.
        characters: how many characters have been predicted after each row, shape (rows,).
    """

    ids: np.ndarray
    characters: np.ndarray


def split_text(
    documents: Mapping[str, Iterable[str]], heldout_every: int, heldout_characters: int, longest: int
) -> SplitText:
    """Hold out every `heldout_every`-th document of each language; cut all documents into pieces.

    A document that occurs word for word in the training text is not held out. Of the pieces that are held out, a
    random sample (the same for all arms and seeds) of `heldout_characters` characters is kept.

    Args:
        documents: by language.
        heldout_every: 20 holds out a twentieth.
        heldout_characters: characters to evaluate on in each language.
        longest: most characters of a piece. Books would otherwise fill all that a short run reads.

    Raises:
        UserError: if a language has too few documents to hold one out.
    """
    train: dict[str, list[str]] = {}
    heldout: dict[str, list[str]] = {}
    for language, texts in documents.items():
        normalized = [unicodedata.normalize("NFC", text).strip() for text in texts]
        kept = [text for i, text in enumerate(normalized, 1) if i % heldout_every]
        seen = set(kept)
        aside = [text for i, text in enumerate(normalized, 1) if not i % heldout_every and text not in seen]
        train[language] = [piece for text in kept for piece in _cut(text, longest)]
        pieces = [piece for text in dict.fromkeys(aside) for piece in _cut(text, longest)]
        if not pieces or not train[language]:
            raise UserError(
                f"The {language} text has {len(normalized):,} documents, too few to hold out every {heldout_every}th. "
                "Give more documents, or a smaller heldout_every."
            )
        random.Random(0).shuffle(pieces)
        heldout[language] = list(_first_characters(pieces, heldout_characters))
    return SplitText(train, heldout)


def reading_order(text: SplitText, weights: Mapping[str, float], seed: int | str) -> Iterator[str]:
    """The training pieces in the order of a seed, without end of text, the languages mixed by characters.

    Args:
        text: what to read.
        weights: share of each language in the characters, to any sum.
        seed: another seed, another order.

    Raises:
        UserError: when a language has been read to its end.
    """
    pieces = {}
    for language in weights:
        shuffled = list(text.train[language])
        random.Random(f"{seed} {language}").shuffle(shuffled)
        pieces[language] = iter(shuffled)
    read = dict.fromkeys(weights, 0)
    while True:
        language = min(read, key=lambda name: read[name] / weights[name])
        piece = next(pieces[language], None)
        if piece is None:
            raise UserError(
                f"The {language} text ends after {read[language]:,} characters, before a run does. Give more text, "
                "or fewer tokens."
            )
        read[language] += len(piece)
        yield piece


def encode_stream(tokenizer: PreTrainedTokenizerBase, pieces: Iterator[str], rows: int, context: int) -> Stream:
    """Encode pieces, joined by end of text, until `rows` rows of `context` tokens are full.

    Within a piece, characters are counted in proportion to its tokens.
    """
    eos = tokenizer.eos_token_id
    ids: list[int] = [eos]
    counts: list[float] = [0.0]
    wanted = rows * context + 1
    while len(ids) < wanted:
        for piece, piece_ids in encode(tokenizer, islice(pieces, _ENCODED_AT_ONCE)):
            ids += [*piece_ids, eos]
            counts += [len(piece) / len(piece_ids)] * len(piece_ids) + [0.0]
    characters = np.cumsum(counts[:wanted])[context::context]
    return Stream(np.array(ids[:wanted], dtype=np.int32), characters)


def encode(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """Each piece with its tokens, no special ones added."""
    texts: Sequence[str] = list(pieces)
    if texts:
        yield from zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"])


def _cut(text: str, longest: int) -> Iterator[str]:
    start = 0
    while len(text) - start > longest:
        end = max(text.rfind(space, start + 1, start + longest + 1) for space in " \n")
        end = end if end > start else start + longest
        if piece := text[start:end].strip():
            yield piece
        start = end
    if piece := text[start:].strip():
        yield piece


def _first_characters(pieces: Iterable[str], characters: int) -> Iterator[str]:
    for piece in pieces:
        if characters <= 0:
            return
        characters -= len(piece)
        yield piece
