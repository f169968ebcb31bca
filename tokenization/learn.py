# SPDX-License-Identifier: Apache-2.0
"""Learn the pieces of a script from counted runs of it, and drop those that a tokenizer is better without."""

import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer, models, trainers

from jai.tokenization.units import SPACE, clusters

Merge = tuple[str, str]
T = TypeVar("T")

# Clusters are learned as single symbols; the rarest, one occurrence in 10,000, stay single characters.
_COMMON_CLUSTERS = 0.9999
_FIRST_PRIVATE_SYMBOL = 0xF0000  # a Unicode plane of 65,534 characters that no text has by itself
# A piece stays where its place saves this many times the tokens that the last pieces save (docs/tokenizer.md).
_UNUSED_WORTH = 4.0
_MARK_WORTH = 1.0
_ROUNDS = 3  # merges that take a place can turn out to be unused themselves


def learn_merges(counts: Counter[str], size: int, max_token_chars: int) -> list[Merge]:
    """Byte pair encoding over counted strings.

    Args:
        counts: strings that no merge may cross, and how often each occurs.
        size: characters and merged pieces together, at most.
        max_token_chars: longest piece, in characters.

    Returns:
        The merges, the most frequent first; fewer where nothing occurs twice any more.
    """
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        max_token_length=max_token_chars + 1,  # its limit is exclusive
        show_progress=sys.stderr.isatty(),
    )
    learner.train_from_iterator(([string] * count for string, count in counts.items()), trainer, length=len(counts))
    return [(left, right) for left, right in json.loads(learner.to_str())["model"]["merges"]]


def learn_cluster_merges(run_counts: Counter[str], size: int, max_token_chars: int) -> list[Merge]:
    """As `learn_merges`, but no piece begins or ends inside a character cluster, except to build a cluster.

    Merges that build the common clusters, letter by letter, come first. A rarer cluster stays in single characters,
    and nothing merges across it.
    """
    cluster_counts: Counter[str] = Counter()
    for run, count in run_counts.items():
        for cluster in clusters(run):
            cluster_counts[cluster] += count
    built = _prefixes(_most_common(cluster_counts, _COMMON_CLUSTERS))
    symbol_of = {cluster: chr(_FIRST_PRIVATE_SYMBOL + i) for i, cluster in enumerate(built)}
    cluster_of = {symbol: cluster for cluster, symbol in symbol_of.items()}

    counts: Counter[str] = Counter()
    for run, count in run_counts.items():
        for part in _parts(run, symbol_of):
            counts[part] += count
    # Its limit counts a cluster as one character, so pieces that are too long are learned as well and left out here.
    merges = [(cluster[:-1], cluster[-1]) for cluster in built]
    for left, right in learn_merges(counts, size + size // 8, max_token_chars):
        left, right = ("".join(cluster_of.get(symbol, symbol) for symbol in side) for side in (left, right))
        if len(left + right) <= max_token_chars:
            merges.append((left, right))
    return merges


def choose_pieces(run_counts: Counter[str], merges: list[Merge], size: int) -> list[Merge]:
    """The merges of `size` pieces: the first ones, but for those that a tokenizer is better without.

    Byte pair encoding leaves pieces behind that only led to longer ones, so they are never used themselves and their
    embeddings never learn. And some pieces begin with a combining mark, which no reader would call a unit. Both are
    dropped, with what cannot be built without them, unless they save many tokens; merges from further down the list
    take the places, and where there are too few of those nothing is dropped.

    Args:
        run_counts: the training text's runs; pieces are counted as encoding them uses them.
        merges: what was learned; two may give the same piece.
        size: different merged pieces to keep.
    """
    reserve = iter(merges)
    chosen = _first(reserve, size)
    for _ in range(_ROUNDS):
        unwanted = _not_worth_it(chosen, count_uses(run_counts, chosen))
        refilled = _refilled(without(chosen, unwanted), reserve, size)
        if refilled == chosen or len(set(map("".join, refilled))) < size:
            break
        chosen = refilled
    return chosen


def _not_worth_it(merges: list[Merge], uses: Counter[str]) -> set[str]:
    """Unused pieces and those that begin with a mark, with what depends on them, where all this saves few tokens."""
    doubtful = {piece for piece in map("".join, merges) if not uses[piece] or starts_with_mark(piece)}
    rest = _rebuilt(merges, doubtful)
    lost = set(map("".join, merges)) - set(map("".join, rest))
    bpe = _bpe(rest, {character for merge in merges for character in "".join(merge)})
    saves = {piece: uses[piece] * (len(bpe.tokenize(piece)) - 1) for piece in lost}
    dependents: dict[str, set[str]] = {piece: {piece} for piece in lost}
    for left, right in reversed(merges):  # what depends on a piece comes after it
        for part in {left, right} & lost:
            if left + right in lost:
                dependents[part] |= dependents[left + right]
    last_uses = [uses[left + right] for left, right in merges[-(len(merges) // 10) :]]
    last_saves = float(np.median(last_uses or [0]))
    unwanted: set[str] = set()
    for piece in doubtful:
        worth = last_saves * (_MARK_WORTH if uses[piece] else _UNUSED_WORTH)
        if sum(saves[dependent] for dependent in dependents[piece]) < worth * len(dependents[piece]):
            unwanted |= dependents[piece]
    return unwanted


def _first(merges: Iterator[Merge], size: int) -> list[Merge]:
    first: list[Merge] = []
    pieces: set[str] = set()
    while len(pieces) < size and (merge := next(merges, None)):
        first.append(merge)
        pieces.add("".join(merge))
    return first


def _refilled(chosen: list[Merge], reserve: Iterator[Merge], size: int) -> list[Merge]:
    """The merges chosen, and those of the reserve that join pieces which there are, up to `size` pieces."""
    refilled = list(chosen)
    pieces = set(map("".join, chosen))
    while len(pieces) < size and (merge := next(reserve, None)):
        if not starts_with_mark("".join(merge)) and all(len(part) == 1 or part in pieces for part in merge):
            refilled.append(merge)
            pieces.add("".join(merge))
    return refilled


def count_uses(run_counts: Counter[str], merges: list[Merge]) -> Counter[str]:
    """How often encoding the runs by these merges gives each piece."""
    tokenizer = Tokenizer(_bpe(merges, set().union(*run_counts)))
    totals = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for part in _in_parts(run_counts.items(), 50_000):
        encoded = tokenizer.encode_batch_fast([run for run, _ in part], add_special_tokens=False)
        ids = [encoding.ids for encoding in encoded]
        weights = np.repeat([count for _, count in part], [len(run_ids) for run_ids in ids])
        totals += np.bincount(np.concatenate(ids), weights, len(totals)).astype(np.int64)
    return Counter({piece: int(totals[i]) for piece, i in tokenizer.get_vocab().items()})


def without(merges: list[Merge], unwanted: set[str]) -> list[Merge]:
    """The merges without the unwanted pieces, except those that a kept piece cannot be built without.

    A piece that was built from an unwanted one is built from the two that the other merges leave of it, at its old
    rank. Where they leave more than two, the unwanted piece stays.
    """
    unwanted = set(unwanted)
    while True:
        rebuilt = _rebuilt(merges, unwanted)
        lost = {left + right for left, right in merges if left + right not in unwanted} - set(map("".join, rebuilt))
        needed = {part for left, right in merges if left + right in lost for part in (left, right)} & unwanted
        if not lost:
            return rebuilt
        unwanted -= needed


def starts_with_mark(piece: str) -> bool:
    """Whether a piece, its leading space aside, begins with a combining mark."""
    return unicodedata.category(piece.removeprefix(SPACE)[:1] or SPACE).startswith("M")


def _rebuilt(merges: list[Merge], unwanted: set[str]) -> list[Merge]:
    rebuilt = {rank: merge for rank, merge in enumerate(merges) if unwanted.isdisjoint((*merge, "".join(merge)))}
    wanted = set(map("".join, merges)) - unwanted - set(map("".join, rebuilt.values()))
    pending = {rank: left + right for rank, (left, right) in enumerate(merges) if left + right in wanted}
    characters = {character for left, right in merges for character in left + right}
    while pending:
        bpe = _bpe([rebuilt[rank] for rank in sorted(rebuilt)], characters)
        halves = {rank: [token.value for token in bpe.tokenize(piece)] for rank, piece in pending.items()}
        found = {rank: (parts[0], parts[1]) for rank, parts in halves.items() if len(parts) == 2}
        if not found:
            break
        rebuilt |= found
        pending = {rank: piece for rank, piece in pending.items() if rank not in found}
    return [rebuilt[rank] for rank in sorted(rebuilt)]


def _bpe(merges: list[Merge], characters: Iterable[str]) -> models.BPE:
    pieces = dict.fromkeys(characters)
    for left, right in merges:
        pieces |= dict.fromkeys((left, right, left + right))
    return models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


def _most_common(counts: Counter[str], share: float) -> list[str]:
    """The strings that make up this share of all occurrences, the most frequent first."""
    enough, seen, common = share * counts.total(), 0, []
    for string, count in counts.most_common():
        if seen >= enough:
            break
        common.append(string)
        seen += count
    return common


def _prefixes(strings: list[str]) -> list[str]:
    """The strings of two and more characters and their beginnings, the shortest first."""
    prefixes = dict.fromkeys(string[:end] for string in strings for end in range(2, len(string) + 1))
    return sorted(prefixes, key=len)


def _parts(run: str, symbol_of: dict[str, str]) -> Iterator[str]:
    """The run in symbols of its clusters, cut where a cluster has none."""
    part = ""
    for cluster in clusters(run):
        symbol = cluster if len(cluster) == 1 else symbol_of.get(cluster)
        if symbol is None or starts_with_mark(cluster):
            yield part
            part = ""
        else:
            part += symbol
    yield part


def _in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
