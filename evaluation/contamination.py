# SPDX-License-Identifier: Apache-2.0
"""Which test items training text has in it: by n-grams of their texts, and by the Wikipedia article that they are of.

An n-gram is the shortest run of words with n units. A word of a script with spaces between words is a unit; of Thai,
Lao, Khmer, Burmese, Chinese and Japanese a character is a fifth of one: a Thai word has 5.1 of them (PyThaiNLP's newmm,
on 2 MB of Thai text). So 13 words of English or 65 characters of Thai make a 13-gram, and no dictionary decides where a
word ends. Letter case, punctuation, spaces, invisible characters and the digits' script make no difference.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from urllib.parse import unquote

import regex

from jai.evaluation.text import plain_text, with_ascii_digits

SHORTEST = 8  # words of a text that is looked for as a whole where it has fewer than n
_WORD = 5  # weight of a word; a character of a script without spaces weighs 1
_WITHOUT_SPACES = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Han}\p{Hiragana}\p{Katakana}"
_TOKEN = regex.compile(rf"[{_WITHOUT_SPACES}]|(?:(?![{_WITHOUT_SPACES}])[\p{{L}}\p{{M}}\p{{N}}])+")
_ALONE = regex.compile(rf"[{_WITHOUT_SPACES}]")


@dataclass(frozen=True)
class SuiteQuestion:
    """A question of a suite.

    Attributes:
        suite, task, id: as of its outcomes; a judged suite's have no task here.
        texts: by column; a column may hold several.
        article: that it is of, as `article_title` gives it; None where nothing says so.
    """

    suite: str
    task: str
    id: str
    texts: Mapping[str, Sequence[str]]
    article: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.suite, self.task, self.id


@dataclass(frozen=True)
class ItemOverlap:
    """What the training text has of an item.

    Attributes:
        item: the item.
        columns: share of the n-grams that were found, for each column that has any to look for.
        place: where the first was found, None where none was.
        article_place: where a text of the same article was first found.
    """

    item: SuiteQuestion
    columns: Mapping[str, float]
    place: str | None
    article_place: str | None

    @property
    def overlaps(self) -> bool:
        """Whether any n-gram of any column was found."""
        return self.place is not None


class _Tokens:
    """A text as words and characters, one after the other in `line`.

    Attributes:
        line: words with spaces around them, characters of scripts without spaces as they are.
        starts, ends: where each token lies in it.
        weights: of all tokens before each, and of all.
    """

    def __init__(self, text: str):
        tokens = _TOKEN.findall(with_ascii_digits(plain_text(text)).casefold())
        pieces = [token if _ALONE.match(token) else f" {token} " for token in tokens]
        self.line = "".join(pieces)
        self.ends = list(accumulate(map(len, pieces)))
        self.starts = [0, *self.ends[:-1]]
        self.weights = list(accumulate((1 if len(piece) == 1 else _WORD for piece in pieces), initial=0))

    def grams(self, words: int) -> Iterator[tuple[int, int]]:
        """The n-grams: the hash of each, and the number of the token with which it begins."""
        line, starts, ends, weights = self.line, self.starts, self.ends, self.weights
        size, last, count = words * _WORD, 0, len(ends)
        for first in range(count):
            need = weights[first] + size
            while last < count and weights[last] < need:
                last += 1
            if weights[last] < need:
                return
            yield hash(line[starts[first] : ends[last - 1]]), first

    def has_at(self, token: int, line: str) -> bool:
        """Whether the tokens of another text stand here."""
        return self.line.startswith(line, self.starts[token])


class ContaminationSearch:
    """Looks for the texts of test items in training text, a text at a time.

    What is kept grows with the test items alone: some 100 bytes for each of their n-grams.

    Args:
        items: of all suites.
        words: n of the n-grams.
    """

    def __init__(self, items: Sequence[SuiteQuestion], words: int):
        self._items = items
        self._words = words
        self._owners: dict[int, list[int]] = defaultdict(list)  # items by the hash of an n-gram
        self._short: dict[int, list[tuple[str, int]]] = defaultdict(list)  # whole texts by the hash of their beginning
        self._found: set[int] = set()
        self._found_short: set[str] = set()
        self._places: dict[int, str] = {}
        self._articles: dict[str, str | None] = {item.article: None for item in items if item.article}
        for number, item in enumerate(items):
            for text in (text for texts in item.texts.values() for text in texts):
                tokens = _Tokens(text)
                grams = {gram for gram, _ in tokens.grams(words)}
                for gram in grams:
                    self._owners[gram].append(number)
                if not grams and (beginning := next(tokens.grams(SHORTEST), None)):
                    self._short[beginning[0]].append((tokens.line, number))

    def look_through(self, text: str, place: str) -> None:
        """Look for the items in a text of the training data."""
        tokens = _Tokens(text)
        owners = self._owners
        for gram, _ in tokens.grams(self._words):
            if gram in owners and gram not in self._found:
                self._found.add(gram)
                self._note(owners[gram], place)
        if self._short:
            for gram, first in tokens.grams(SHORTEST):
                for line, number in self._short.get(gram, ()):
                    if tokens.has_at(first, line):
                        self._found_short.add(line)
                        self._note([number], place)

    def _note(self, numbers: Sequence[int], place: str) -> None:
        for number in numbers:
            self._places.setdefault(number, place)

    def see_article(self, title: str, place: str) -> None:
        """Note that the training data has a text of an article."""
        if title in self._articles and self._articles[title] is None:
            self._articles[title] = place

    def overlaps(self) -> list[ItemOverlap]:
        """What was found of each item, in their order."""
        return [
            ItemOverlap(
                item,
                {name: share for name, texts in item.texts.items() if (share := self._share(texts)) is not None},
                self._places.get(number),
                self._articles.get(item.article) if item.article else None,
            )
            for number, item in enumerate(self._items)
        ]

    def _share(self, texts: Sequence[str]) -> float | None:
        found = total = 0
        for text in texts:
            tokens = _Tokens(text)
            grams = {gram for gram, _ in tokens.grams(self._words)}
            if grams:
                found, total = found + len(grams & self._found), total + len(grams)
            elif tokens.weights[-1] >= SHORTEST * _WORD:
                found, total = found + (tokens.line in self._found_short), total + 1
        return found / total if total else None


# --- Rows ---


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a row or a cell, however deep, such as those of a chat."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from texts_of(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_of(each)


def article_title(row: Mapping[str, Any]) -> str | None:
    """The article that a row is of, by its `title`, else by a Wikipedia address in its `url`; None without either.

    They may stand in `metadata` or `meta`. Titles are compared without case, and with spaces for underscores.
    """
    places = [row, *(row[name] for name in ("metadata", "meta") if isinstance(row.get(name), Mapping))]
    for place in places:
        if isinstance(title := place.get("title"), str) and title.strip():
            return _title(title)
    for place in places:
        if isinstance(url := place.get("url"), str) and "wikipedia.org/wiki/" in url:
            return _title(unquote(url.partition("/wiki/")[2].partition("#")[0].partition("?")[0]))
    return None


def _title(text: str) -> str:
    return " ".join(plain_text(text).replace("_", " ").casefold().split())
