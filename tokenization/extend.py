# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of phi-3's form, extended by one script: the base's ids stay, the script's merges are appended.

New merges only touch pieces that hold the script, and rank after every merge of the base. So text without the script
keeps its ids, and text with it is first cut as the base would cut it, then joined further.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable

import regex
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from jai.errors import UserError
from jai.tokenization.chat import with_chat_template
from jai.tokenization.learn import Merge, choose_pieces, learn_cluster_merges, learn_merges
from jai.tokenization.normalization import replace_all, replacements, with_replacements
from jai.tokenization.phi3_style import SPECIAL_TOKENS
from jai.tokenization.units import SPACE, Unit, check_script, count_runs, script_runs, split_runs_into_words

RESERVED_TOKEN = "<|reserved_{}|>"


def extend_tokenizer(
    base: PreTrainedTokenizerBase,
    texts: Iterable[str],
    vocab_size: int,
    script: str = "Thai",
    max_token_chars: int = 16,
    unit: Unit = "run",
    first_new_id: int | None = None,
    normalize_thai: bool = True,
) -> TokenizersBackend:
    """Learn pieces of a script from text and append them to a byte-fallback BPE (paper, section 3.1.1).

    The characters that the base lacks come first, then the merges, until the vocabulary has exactly `vocab_size`
    entries. The tokenizer itself puts the script's combining marks in the order of NFC, and reads Thai that looks the
    same as the same, so training and inference see the same; text without the script is not normalised, because that
    would change its ids.

    Args:
        base: tokenizer to extend; it is not changed.
        texts: training text; each is normalised to NFC here.
        vocab_size: entries of the result, `len(result)`.
        script: Unicode name of the script.
        max_token_chars: longest new piece, in characters, its leading space included.
        unit: what merges are learned inside of. `run`: runs of the script, with the space before them. `word`: Thai
            words, as PyThaiNLP's newmm cuts them. `cluster`: runs, but no piece begins or ends inside a character
            cluster, such as a letter and its vowel marks.
        first_new_id: id of the first new piece, at least the base's size; ids between are reserved. By default the
            base's size rounded up to a multiple of 64, as phi-3's embeddings are (32,011 entries, 32,064 rows).
        normalize_thai: read look-alikes of Thai as one: two sara e as sara ae, nikhahit and sara aa as sara am, marks
            in any order. Decoding gives `replace_all(text, replacements("Thai", True))`. No effect on other scripts.

    Raises:
        UserError: if the base is no byte-fallback BPE or has merges of the script, the script is unknown, or the text
            cannot fill the vocabulary.
    """
    check_script(script, unit)
    if max_token_chars < 2:
        raise UserError(f"max_token_chars is {max_token_chars}, which leaves nothing to merge. Give 2 or more.")
    first_new_id = check_extension(base, vocab_size, script, first_new_id)
    state = json.loads(base.backend_tokenizer.to_str())
    vocab: dict[str, int] = base.get_vocab()
    pairs = replacements(script, normalize_thai)
    run_counts = count_runs((replace_all(unicodedata.normalize("NFC", text), pairs) for text in texts), script)
    characters = set().union(*run_counts) - {SPACE}
    if not characters:
        raise UserError(f"The text has no character of the script {script}. Give text in {script}, or another script.")
    new_characters = sorted(characters - vocab.keys())
    merges = _learn(run_counts, vocab_size - first_new_id - len(new_characters), max_token_chars, unit)
    merged = list(dict.fromkeys(left + right for left, right in merges))
    new_pieces = [*new_characters, *merged]
    if first_new_id + len(new_pieces) != vocab_size:
        fits = first_new_id + len(new_pieces)
        advice = f"Give a vocab_size of {fits}" + (", or more text." if merges else " or more.")
        raise UserError(
            f"A vocabulary of {vocab_size} needs {vocab_size - first_new_id} new pieces from id {first_new_id} on, but "
            f"the text gave {len(new_pieces)} ({len(new_characters)} characters and {len(merged)} merges). {advice}"
        )

    taken = set(vocab.values())
    vocab |= {RESERVED_TOKEN.format(i): i for i in range(first_new_id) if i not in taken}
    vocab |= {piece: first_new_id + i for i, piece in enumerate(new_pieces)}
    # Special tokens included: `tokenizers` would renumber those that are not in the model's vocabulary when it loads.
    state["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda entry: entry[1]))
    state["model"]["merges"] = [*state["model"]["merges"], *map(list, merges)]
    state["normalizer"] = with_replacements(state["normalizer"], pairs)
    extended = TokenizersBackend(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **base.special_tokens_map,
        chat_template=base.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=base.model_max_length,
        padding_side=base.padding_side,
    )
    if set(SPECIAL_TOKENS) <= base.get_vocab().keys():
        with_chat_template(extended)
    return extended


def check_extension(
    base: PreTrainedTokenizerBase, vocab_size: int, script: str, first_new_id: int | None = None
) -> int:
    """The id of the first new piece, if the base can be extended by the script to this size; needs no text.

    Raises:
        UserError: as `extend_tokenizer`.
    """
    _check_base(base, script_runs(script), script)
    base_end = max(base.get_vocab().values()) + 1
    if first_new_id is None:
        first_new_id = -(-base_end // 64) * 64
    if first_new_id < base_end or vocab_size <= first_new_id:
        raise UserError(
            f"A vocabulary of {vocab_size} with new pieces from id {first_new_id} on does not fit: the base uses the "
            f"ids up to {base_end - 1}. Give a vocab_size above {max(first_new_id, base_end)}."
        )
    return first_new_id


def new_token_pieces(base: Tokenizer, extended: Tokenizer) -> dict[int, list[int]]:
    """For every token of `extended` that `base` lacks, the base's ids of the same string.

    Their mean is where the new rows of the embeddings start (paper, section 3.1.1). Reserved and special ids have no
    pieces: their list is empty. Words that `add_tokens` added have those of their text.

    Args:
        base, extended: what the tokenizers library makes of both: `load_backend_tokenizer`, or `backend_tokenizer`.

    Raises:
        UserError: if `extended` does not keep every id of `base`.
    """
    base_vocab, vocab = base.get_vocab(), extended.get_vocab()
    moved = [token for token, i in base_vocab.items() if vocab.get(token) != i]
    if moved:
        raise UserError(
            f"The tokenizer does not extend its base: {len(moved)} of the base's {len(base_vocab)} tokens are missing "
            f"or have another id ({moved[0]!r} is {vocab.get(moved[0])}, not {base_vocab[moved[0]]}). Give a tokenizer "
            "that was extended from this base."
        )
    # The bare BPE: the tokenizer around it would put a space before a piece that has none.
    added = extended.get_added_tokens_decoder()
    unknown = base.token_to_id(getattr(base.model, "unk_token", None) or "")
    pieces: dict[int, list[int]] = {}
    for surface, i in sorted(vocab.items(), key=lambda entry: entry[1]):
        if surface in base_vocab:
            continue
        if surface == RESERVED_TOKEN.format(i) or (i in added and added[i].special):
            pieces[i] = []
        else:
            parts = _parts_of_word(base, surface) if i in added else [surface]
            pieces[i] = [piece.id for part in parts for piece in base.model.tokenize(part) if piece.id != unknown]
    return pieces


def _parts_of_word(base: Tokenizer, word: str) -> list[str]:
    """What the base's model reads of an added word, which stands for itself: no space goes before it."""
    text = base.normalizer.normalize_str(word) if base.normalizer else word
    parts = [part for part, _ in base.pre_tokenizer.pre_tokenize_str(text)] if base.pre_tokenizer else [text]
    if parts and not word.startswith((" ", SPACE)):
        parts[0] = parts[0].removeprefix(SPACE)
    return [part for part in parts if part]


def _check_base(base: PreTrainedTokenizerBase, runs: regex.Pattern, script: str) -> None:
    state = json.loads(base.backend_tokenizer.to_str()) if isinstance(base, TokenizersBackend) else {}
    model = state.get("model", {})
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        kind = "BPE without byte fallback" if model.get("type") == "BPE" else model.get("type", type(base).__name__)
        raise UserError(f"The base tokenizer is a {kind}. Give a BPE with byte fallback, such as phi-3's.")
    # Ours would come after such merges and start from pieces that the learner has never seen.
    merged = [left + right for left, right in model["merges"] if runs.search(left + right)]
    if merged:
        raise UserError(
            f"The base tokenizer has {len(merged)} merges of the script {script} already (such as {merged[0]!r}). "
            "Choose a script of which it only has single characters."
        )


def _learn(run_counts: Counter[str], size: int, max_token_chars: int, unit: Unit) -> list[Merge]:
    """Merges of `size` different pieces, or of as many as there are."""
    # The learner counts single characters as pieces; a tenth more is learned than kept, for a choice.
    to_learn = len(set().union(*run_counts)) + max(size, 0) * 11 // 10
    if unit == "cluster":
        merges = learn_cluster_merges(run_counts, to_learn, max_token_chars)
    else:
        counts = split_runs_into_words(run_counts) if unit == "word" else run_counts
        merges = learn_merges(counts, to_learn, max_token_chars)
    return choose_pieces(run_counts, merges, max(size, 0))
