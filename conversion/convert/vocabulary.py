# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a tokenizer that extends the base's come from (paper, section 3.1.1). Imports no PyTorch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer

from jai.conversion.convert.options import ConvertOptions, EmbeddingInit
from jai.conversion.inputs.phi3 import load_phi3_config, read_phi3_config
from jai.errors import UserError
from jai.hub import local_folder
from jai.tokenization.extend import new_token_pieces
from jai.tokenization.loading import RECORD_FILE as TOKENIZER_RECORD_FILE
from jai.tokenization.loading import has_tokenizer, load_backend_tokenizer

INIT_TEXTS: dict[EmbeddingInit, str] = {
    "mean": "mean of their pieces' rows",
    "random": "random, with the mean and standard deviation of the base's columns",
    "mean-normed": "mean of their pieces' rows, as long as those are",
}
_NAMED = 5


@dataclass(frozen=True)
class Vocabulary:
    """Where each row of the output's embeddings comes from: the row of the base with its id, or one of the new.

    Attributes:
        size: rows of the output's embeddings.
        base_rows: rows of the base's.
        pieces: ids of the base's pieces for each new row of a token that has some.
        without_pieces: id and string of the new rows that no piece explains; these are drawn at random.
        spare: id and string of new tokens without pieces for which the base has a row that no token used.
    """

    size: int
    base_rows: int
    pieces: dict[int, list[int]] = field(default_factory=dict)
    without_pieces: dict[int, str] = field(default_factory=dict)
    spare: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = set(range(self.base_rows, self.size)) - self.pieces.keys() - self.without_pieces.keys()
        if missing:
            raise AssertionError(f"row {min(missing)} comes from nowhere")

    def new_runs(self) -> Iterator[range]:
        """The new rows, those that follow each other together."""
        new = sorted(self.pieces.keys() | self.without_pieces.keys())
        # Ids that follow each other differ from their places by the same number.
        for _, run in groupby(enumerate(new), key=lambda entry: entry[1] - entry[0]):
            ids = [id_ for _, id_ in run]
            yield range(ids[0], ids[-1] + 1)

    @property
    def new_rows(self) -> int:
        return len(self.pieces) + len(self.without_pieces)


def read_vocabulary(options: ConvertOptions) -> Vocabulary:
    """Where the rows of a conversion come from, by the tokenizers of the base and of the output.

    Raises:
        UserError: for a base that is no phi-3, a tokenizer that is missing or damaged, and as `plan_vocabulary`.
    """
    folder = local_folder(options.base)
    rows = read_phi3_config(folder).get("vocab_size")
    if type(rows) is not int:
        rows = load_phi3_config(folder).vocab_size  # the default, or an error that says what is wrong
    base = _load_tokenizer(folder)
    if options.tokenizer is None:
        return plan_vocabulary(rows, base, None)
    extended_folder = local_folder(options.tokenizer)
    extended = _load_tokenizer(extended_folder)
    if extended is None:
        raise UserError(f"{options.tokenizer} has no tokenizer files. Give a folder that save_pretrained wrote.")
    return plan_vocabulary(rows, base, extended, extended_folder)


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    return load_backend_tokenizer(folder) if has_tokenizer(folder) else None


def plan_vocabulary(
    base_rows: int,
    base: Tokenizer | None,
    extended: Tokenizer | None,
    extended_folder: Path | None = None,
) -> Vocabulary:
    """Find where the rows of the output's tokenizer come from (paper, section 3.1.1).

    Args:
        base_rows: rows of the base model's embeddings.
        base: the base's tokenizer. It may have more tokens than the model has rows (`add_tokens` without resizing the
            model): those are new tokens, and pieces are found without them.
        extended: the tokenizer of the output, which may be the base's; None keeps the base's rows.
        extended_folder: where `extended` was read from. If its training is recorded there, the pieces must be those
            of the record.

    Raises:
        UserError: if `extended` is smaller than `base`, gives one of its tokens another id, or was trained from
            another base than this; and if it is None and `base` has tokens without rows.
    """
    if extended is None:
        if base is not None:
            refuse_tokens_without_rows(base, base_rows)
        return Vocabulary(base_rows, base_rows)
    if base is None:
        raise UserError(
            "--tokenizer was given, but BASE has no tokenizer files, so the pieces of new tokens cannot be found. Put "
            "the base's tokenizer.json and tokenizer_config.json into its folder."
        )
    size, base_entries = extended.get_vocab_size(), base.get_vocab_size()
    if size < base_entries:
        raise UserError(
            f"The tokenizer has {size:,} entries, fewer than the base's {base_entries:,}. Give one that extends the "
            "base's (jai tokenizer train)."
        )
    pieces = new_token_pieces(base, extended)
    surfaces = {id_: token for token, id_ in extended.get_vocab().items()}
    if extended_folder and (extended_folder / TOKENIZER_RECORD_FILE).exists():
        _check_tokenizer_record(extended_folder / TOKENIZER_RECORD_FILE, pieces, surfaces)
    without_rows = {id_ for id_ in base.get_vocab().values() if id_ >= base_rows}
    if without_rows:
        known = set(base.get_vocab().values()) - without_rows
        found = new_token_pieces(_tokenizer_of_rows(base, base_rows), extended)
        pieces = {id_: ids for id_, ids in found.items() if id_ not in known}
    rows = max(max(surfaces, default=-1) + 1, base_rows)
    if rows > base_rows + 2 * size:  # some gaps are there for alignment
        raise UserError(
            f"The tokenizer has ids up to {rows - 1:,}, but only {size:,} entries; most rows would be of no token. "
            "Number its tokens one after the other, or give another."
        )
    return Vocabulary(
        size=rows,
        base_rows=base_rows,
        pieces={id_: ids for id_, ids in pieces.items() if ids},
        # Special tokens, reserved strings, and ids between tokens that have none.
        without_pieces={id_: surfaces.get(id_, "no token") for id_ in range(base_rows, rows) if not pieces.get(id_)},
        # The base has rows for some of them (phi-3: 32011 to 32063).
        spare={id_: surfaces[id_] for id_, ids in pieces.items() if not ids and id_ < base_rows},
    )


def refuse_tokens_without_rows(tokenizer: Tokenizer, rows: int) -> None:
    """Raise `UserError` if a base's tokenizer has ids that its embeddings do not have."""
    beyond = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= rows)
    if beyond:
        listed = ", ".join(f"{token!r} ({id_})" for id_, token in beyond[:_NAMED]) + (", …" if beyond[_NAMED:] else "")
        raise UserError(
            f"The tokenizer of BASE has {len(beyond):,} tokens without a row in its embeddings, which are {rows:,} "
            f"rows: {listed}. The model fails at each of them. Give --tokenizer with the same folder or Hub id as "
            "BASE, which makes rows for them, or with a tokenizer that extends it; or put the tokenizer into BASE that "
            "the model was trained with."
        )


def _tokenizer_of_rows(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """A tokenizer's model without the tokens that have no row, for finding the pieces of these."""
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if id_ < rows}
    else:
        model["vocab"] = model["vocab"][:rows]  # of a Unigram model, a list by id
    if "merges" in model:
        kept = model["vocab"].keys()
        model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= kept]
    return Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None, "decoder": None}))


def _check_tokenizer_record(path: Path, pieces: dict[int, list[int]], surfaces: dict[int, str]) -> None:
    try:
        recorded = {
            int(id_): (entry["surface"], entry["pieces"])
            for id_, entry in json.loads(path.read_text(encoding="utf-8"))["new_tokens"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is not a record of a tokenizer's training. Remove it, or train the tokenizer again "
            "(jai tokenizer train)."
        ) from None
    found = {id_: (surfaces[id_], ids) for id_, ids in pieces.items()}
    differing = sorted(id_ for id_ in found.keys() | recorded.keys() if found.get(id_) != recorded.get(id_))
    if differing:
        first = differing[0]
        raise UserError(
            f"The tokenizer is not the one that {path} records, or BASE is not its base: {len(differing):,} of the new "
            f"tokens differ, first {first}, which is {_token_text(recorded.get(first))} in the record and "
            f"{_token_text(found.get(first))} by the two tokenizers. Give the base that the tokenizer was trained from "
            "and the folder as `jai tokenizer train` wrote it, or train it again."
        )


def _token_text(token: tuple[str, list[int]] | None) -> str:
    return f"{token[0]!r} of the pieces {token[1]}" if token else "missing"
