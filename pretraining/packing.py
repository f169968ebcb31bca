# SPDX-License-Identifier: Apache-2.0
"""Parts of documents to sequences: best fit, one after another, and languages mixed.

Each takes the parts of a block in the order in which they come, and gives for every part of a part the sequence that it
is in. The block has as many sequences as its tokens need, so that all are full; only a last one may not be.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jai.errors import UserError


@dataclass(frozen=True)
class Placement:
    """Where tokens come, as columns of int64; those of a sequence follow each other in the order of their places.

    Attributes:
        item: index of the part.
        start, stop: its tokens from `start` until before `stop`.
        sequence: that they are in.
    """

    item: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    sequence: np.ndarray


def best_fit(lengths: np.ndarray, context: int, sequences: int) -> Placement:
    """Documents stay whole where they can: the longest first, each where it leaves the least room.

    What is longer than a sequence fills whole ones, and its rest is packed like a document. What fits nowhere at the
    end fills the room that is left, the largest first: it is cut, and no token is lost.

    Args:
        lengths: tokens of each part, `(parts,)`.
        context: tokens of a sequence.
        sequences: how many there are; they hold all tokens.
    """
    whole = lengths // context
    rests = lengths - whole * context
    full = int(whole.sum())
    items = np.repeat(np.arange(len(lengths)), whole)
    starts = (np.arange(full) - np.repeat(np.cumsum(whole) - whole, whole)) * context

    order = np.argsort(-rests, kind="stable")[: int(np.count_nonzero(rests))]
    placed, cut = _fit_rests(order.tolist(), rests[order].tolist(), context, sequences - full)
    uncut = order[placed >= 0]
    cut_items, cut_starts, cut_lengths, cut_sequences = (np.array(column, np.int64) for column in cut)
    cut_starts += whole[cut_items] * context
    return _sorted(
        np.concatenate([items, uncut, cut_items]),
        np.concatenate([starts, whole[uncut] * context, cut_starts]),
        np.concatenate([starts + context, lengths[uncut], cut_starts + cut_lengths]),
        np.concatenate([np.arange(full), placed[placed >= 0] + full, cut_sequences + full]),
    )


_Columns = tuple[list[int], list[int], list[int], list[int]]


def _fit_rests(items: list[int], lengths: list[int], context: int, sequences: int) -> tuple[np.ndarray, _Columns]:
    """Best fit, decreasing.

    Returns:
        For each item its sequence, -1 where it is cut; and the cut parts: item, start, length, sequence.
    """
    rooms, opened = _Rooms(context), 0
    placed, overflow = [], []
    for item, length in zip(items, lengths):
        room = rooms.least(length)
        if room:
            sequence = rooms.pop(room)
        elif opened < sequences:
            sequence, room = opened, context
            opened += 1
        else:
            placed.append(-1)
            overflow.append((item, length))
            continue
        placed.append(sequence)
        if room > length:
            rooms.push(room - length, sequence)
    for sequence in range(opened, sequences):
        rooms.push(context, sequence)

    cut: _Columns = ([], [], [], [])
    for item, length in overflow:
        start = 0
        while start < length:
            room = rooms.least(length - start) or rooms.largest()
            taken = min(room, length - start)
            sequence = rooms.pop(room)
            if room > taken:
                rooms.push(room - taken, sequence)
            for column, value in zip(cut, (item, start, taken, sequence)):
                column.append(value)
            start += taken
    return np.array(placed, np.int64), cut


_WORD = 9  # bits: 512 rooms share an integer, of which a context of 131,072 has 256


class _Rooms:
    """Sequences by the room that they have left.

    Bit r of `words[r >> 9]` says whether any has room r, and bit w of `words_in_use` whether that word has any. So the
    least room that is enough is the lowest bit at or above a place in two integers, which takes half a microsecond.
    """

    def __init__(self, context: int):
        self.sequences: dict[int, list[int]] = {}
        self.words = [0] * ((context >> _WORD) + 1)
        self.words_in_use = 0

    def least(self, length: int) -> int:
        """The least room that is enough; 0 where there is none."""
        word = length >> _WORD
        shift = length & ((1 << _WORD) - 1)
        found = self.words[word] >> shift
        if found:
            return length + (found & -found).bit_length() - 1
        higher = self.words_in_use >> (word + 1)
        if not higher:
            return 0
        word += (higher & -higher).bit_length()
        found = self.words[word]
        return (word << _WORD) + (found & -found).bit_length() - 1

    def largest(self) -> int:
        """The most room that any sequence has."""
        word = self.words_in_use.bit_length() - 1
        return (word << _WORD) + self.words[word].bit_length() - 1

    def push(self, room: int, sequence: int) -> None:
        """Note the room of a sequence."""
        found = self.sequences.get(room)
        if found:
            found.append(sequence)
            return
        self.sequences[room] = [sequence]
        word = room >> _WORD
        self.words[word] |= 1 << (room & ((1 << _WORD) - 1))
        self.words_in_use |= 1 << word

    def pop(self, room: int) -> int:
        """A sequence that has this room."""
        found = self.sequences[room]
        sequence = found.pop()
        if not found:
            word = room >> _WORD
            self.words[word] ^= 1 << (room & ((1 << _WORD) - 1))
            if not self.words[word]:
                self.words_in_use ^= 1 << word
        return sequence


def one_after_another(lengths: np.ndarray, context: int) -> Placement:
    """Documents follow each other, and a sequence ends wherever it is full; what overflows begins the next one.

    Args:
        lengths: tokens of each part, `(parts,)`.
        context: tokens of a sequence.
    """
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    borders = np.union1d(ends, np.arange(context, total, context))
    begins = np.concatenate([[0], borders[:-1]])
    items = np.searchsorted(ends, begins, "right")
    first = ends - lengths
    return Placement(items, begins - first[items], borders - first[items], begins // context)


def _sorted(item: np.ndarray, start: np.ndarray, stop: np.ndarray, sequence: np.ndarray) -> Placement:
    order = np.argsort(sequence, kind="stable")
    return Placement(item[order], start[order], stop[order], sequence[order])


# Languages mixed

_SPAN_SHARE = 16  # a sequence's second language gets a sixteenth of it at least, where there is as much


def shortest_span(tokens: Sequence[int], context: int, sequences: int) -> int:
    """Tokens that a second language has at least in each sequence: a sixteenth, or what there is for each.

    Args:
        tokens: of each language in the block; they fill the sequences.
        context: tokens of a sequence.
        sequences: of the block.
    """
    return min(context // _SPAN_SHARE, (sum(tokens) - max(tokens)) // sequences)


def switch_probabilities(documents: Sequence[int], rho: float) -> list[float]:
    """How probable a switch is behind a document of each language, so that ρ of all ends of documents are switches.

    A language is left as often as it is come to, so rare ones must be left more readily: with shares π of the
    documents, a language is left behind a document with the probability min(1, κ / π), and κ is such that the sum of
    min(π, κ) is ρ. With two languages that is ρ / 2π. No more than 2·(1 − π) of the ends can be switches, π being the
    largest share: a tenth of Thai allows a fifth.

    Args:
        documents: of each language.
        rho: share of the ends of documents.
    """
    total = sum(documents)
    shares = [count / total for count in documents]
    reachable = min(rho, 2 * (1 - max(shares)))
    low, high = 0.0, 1.0
    for _ in range(50):
        kappa = (low + high) / 2
        low, high = (kappa, high) if sum(min(share, kappa) for share in shares) < reachable else (low, kappa)
    return [min(1.0, high / share) if share else 0.0 for share in shares]


class LanguageMixer:
    """Sequences of two languages and more (XLDA, Trillion-7B, section 2.1).

    At each end of a document, the next one is of another language with probability ρ (`switch_probabilities`): of the
    one that is furthest behind its share. Three rules go before it, in this order: every sequence holds at least `span`
    tokens that are not of its main language, for which a document is cut where it must be; what overflows a sequence
    begins the next one; and tokens are as many of each language as the block has, so a language that is ahead of its
    share by more than a sequence is not switched to.

    Each sequence leaves as much of each language as the ones after it can take: with R sequences to come, no language
    may have more than R·(context − span) tokens left, and the surplus is due in this one.

    Args:
        lengths: tokens of each part, `(parts,)`, in the order in which they come.
        languages: of each part, `(parts,)`.
        rows: parts of the same number are parallel, and come one right behind the other; -1 is parallel to none.
        context: tokens of a sequence.
        sequences: how many there are; the parts fill them.
        rho: probability of another language.
        uniform: numbers between 0 and 1.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        languages: np.ndarray,
        rows: np.ndarray,
        context: int,
        sequences: int,
        rho: float,
        uniform: Iterator[float],
    ):
        self.context, self.sequences, self.uniform = context, sequences, uniform
        self.lengths, self.languages = lengths.tolist(), languages.tolist()
        self.left = np.bincount(languages, lengths).astype(np.int64).tolist()
        self.shares = [tokens / sum(self.left) for tokens in self.left]
        self.switches = switch_probabilities(np.bincount(languages, minlength=len(self.left)).tolist(), rho)
        self.span = shortest_span(self.left, context, sequences)
        if self.span < 1:
            raise UserError(
                f"Of {sequences} sequences, each of two languages, not every one gets a token of the second: one "
                f"language has {max(self.left):,} of {sum(self.left):,} tokens. Give another mixture, or another "
                "strategy."
            )
        self.waiting: list[deque[int]] = [deque() for _ in self.left]  # parts by language, in their order
        for item, language in enumerate(self.languages):
            self.waiting[language].append(item)
        self.begun: list[list[int]] = [[] for _ in self.left]  # parts that come before those; the last one first
        self.rows = rows.tolist()
        self.parallel: dict[int, list[int]] = {}  # parts of each row
        for item in np.flatnonzero(rows >= 0).tolist():
            self.parallel.setdefault(self.rows[item], []).append(item)
        self.translation: int | None = None  # of what was placed last
        self.at = [0] * len(self.lengths)  # tokens of each part that are placed
        self.used = [0] * len(self.left)
        self.places: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])

    def mix(self) -> Placement:
        """Place all parts."""
        language: int | None = None
        for sequence in range(self.sequences):
            language = self._fill(sequence, language)
        return Placement(*(np.array(column, np.int64) for column in self.places))

    def _fill(self, sequence: int, language: int | None) -> int:
        room, held = self.context, [0] * len(self.left)
        to_come = (self.sequences - 1 - sequence) * (self.context - self.span)
        overflows = language is not None and bool(self.begun[language]) and self.at[self.begun[language][-1]] > 0
        while room:
            due = [max(0, left - to_come) for left in self.left]
            for_one, for_others = self.context - self.span, room - sum(due)
            limits = [
                min(for_others + of_this, for_one - here) if left else 0
                for of_this, here, left in zip(due, held, self.left)
            ]
            # A document that this sequence would cut for the sake of a second language waits for the next one.
            is_cut = language is not None and 0 < limits[language] < self._left_of_next(language)
            is_alone = sum(held) - max(held) < self.span
            language = self._choose(language, [limit > 0 for limit in limits], overflows, is_cut and is_alone)
            overflows = False
            taken = self._place(language, limits[language], sequence)
            held[language] += taken
            room -= taken
        assert language is not None
        return language

    def _choose(self, language: int | None, allowed: list[bool], overflows: bool, must_switch: bool) -> int:
        """The next language, after one that is None at the very beginning."""
        others = [index for index, is_allowed in enumerate(allowed) if is_allowed and index != language]
        ahead = self._ahead()
        if language is None or not (allowed[language] or self._translation_is_in(others)):
            return min(others, key=lambda other: ahead[other])
        if overflows and allowed[language]:
            return language
        if self._translation_is_in(others):
            return self.languages[self.translation]
        within = [other for other in others if must_switch or ahead[other] <= self.context]
        if within and (must_switch or next(self.uniform) < self.switches[language]):
            return min(within, key=lambda other: ahead[other])
        return language

    def _ahead(self) -> list[float]:
        """Tokens that each language is ahead of its share of what is placed."""
        placed = sum(self.used)
        return [used - share * placed for used, share in zip(self.used, self.shares)]

    def _translation_is_in(self, languages: list[int]) -> bool:
        return self.translation is not None and self.languages[self.translation] in languages

    def _place(self, language: int, most: int, sequence: int) -> int:
        """Place as much of the language's next part as may be, and give how much it was."""
        begun = self.begun[language]
        item = self._next(language)
        if item not in begun:
            begun.append(item)
        start = self.at[item]
        taken = min(most, self.lengths[item] - start)
        for column, value in zip(self.places, (item, start, start + taken, sequence)):
            column.append(value)
        self.at[item] += taken
        self.left[language] -= taken
        self.used[language] += taken
        if item == self.translation:
            self.translation = None
        if self.at[item] == self.lengths[item]:
            begun.pop()
            self._bring_translation(item)
        return taken

    def _bring_translation(self, item: int) -> None:
        """Let what is parallel to a part, and not begun, come next."""
        other = next((other for other in self.parallel.get(self.rows[item], ()) if not self.at[other]), None)
        if other is not None:
            self.translation = other
            self.begun[self.languages[other]].append(other)

    def _next(self, language: int) -> int:
        """The language's next part."""
        if self.begun[language]:
            return self.begun[language][-1]
        waiting = self.waiting[language]
        while self.at[waiting[0]]:
            waiting.popleft()
        return waiting[0]

    def _left_of_next(self, language: int) -> int:
        """Tokens of the language's next part that are not placed."""
        item = self._next(language)
        return self.lengths[item] - self.at[item]
