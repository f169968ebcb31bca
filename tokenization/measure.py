# SPDX-License-Identifier: Apache-2.0
"""What tokenizers do to text: tokens by script and source, bytes, round trips, unused and odd tokens, speed.

Every document is put in NFC and encoded whole, without tokens of the tokenizer's own at its ends. Most figures come
from one count for each id, because the vocabulary says which characters a token stands for; nothing needs offsets.

How tokens are shared among scripts: a token gives an equal share of itself to each character that it stands for.
Tokens that hold only a part of a character (byte pieces) are taken together until their characters are whole, and
shared in the same way. So the tokens of all scripts add up to all tokens. A space is a character, of the script Common.
"""

import json
import os
import platform
import statistics
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain, pairwise

import numpy as np
import regex
from fontTools.unicodedata import script, script_name
from pythainlp.tokenize import word_tokenize
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jai.errors import UserError

BATCH_CHARACTERS = 1_000_000
MAX_SOURCES = 32
OTHER_SOURCES = "(other sources)"
WORD_CHARACTERS = 250_000  # of each source: PyThaiNLP reads only about a quarter of a million in a second
SPEED_CHARACTERS = 200_000  # of each source
SPEED_CHARACTERS_IN_ALL = 1_000_000
SPEED_PASSES = 5
EXAMPLES = 10

_WORDS = regex.compile(r"\p{Script=Thai}+|[\w--\p{Script=Thai}]+", regex.V1)
_NO_SCRIPT = ("Common", "Inherited", "Unknown")


@dataclass(frozen=True)
class TextSize:
    """How much text, in NFC; `words` are PyThaiNLP's (newmm) in Thai, runs of `\\w` elsewhere."""

    characters: int
    bytes: int
    words: int


@dataclass(frozen=True)
class TextFigures:
    """A text. Words are counted in the first `words_counted_in` characters of the sources, and scaled up by source."""

    documents: int
    whole: TextSize
    by_script: dict[str, TextSize]
    by_source: dict[str, TextSize]
    words_counted_in: int


@dataclass(frozen=True)
class Rate:
    """Tokens for some text; `per_word` is None where there are no words."""

    tokens: float
    per_character: float
    per_word: float | None
    per_byte: float


@dataclass(frozen=True)
class Difference:
    """A way in which decoded text differs from the text: what is at the first place where they differ.

    Attributes:
        expected, got: up to 16 characters of both, from that place on, in the first such document.
        document: that document, counted from 1 in its source; `character` counts from 0.
        documents: documents that differ in this way, by the first character on both sides.
    """

    expected: str
    got: str
    source: str
    document: int
    character: int
    documents: int


@dataclass(frozen=True)
class RoundTrip:
    """Documents that are not the same after encoding and decoding.

    Text that contains the string of a special (or other added) token is counted apart: it is read as that token, and
    the token may swallow whitespace beside it.
    """

    failures: int
    differences: list[Difference]
    documents_with_special_tokens: int
    failures_with_special_tokens: int


@dataclass(frozen=True)
class ByteFallback:
    """Characters that are not in the vocabulary and are encoded by pieces of their bytes."""

    characters: int
    share: float
    share_by_script: dict[str, float]
    most: list[tuple[str, int]]


@dataclass(frozen=True)
class TokenUse:
    """A token as text (spaces as `▁`) and how often the text has it."""

    id: int
    text: str
    count: int


@dataclass(frozen=True)
class TokenSet:
    """Some tokens of a vocabulary: how many, how many of them are new, and their share of all tokens of the text."""

    tokens: int
    new: int
    share_of_text: float
    most_used: list[TokenUse]


@dataclass(frozen=True)
class NewTokens:
    """The tokens that the tokenizer has over its base, reserved and special ones left out."""

    tokens: int
    share_of_text: float
    unused: int
    unused_share: float
    unused_examples: list[TokenUse]
    longest: list[TokenUse]
    most_used: list[TokenUse]
    by_length: dict[int, int]


@dataclass(frozen=True)
class Speed:
    """Characters a second; the ratios to the base are medians over passes in which all tokenizers took turns."""

    batched: float
    single: float
    batched_ratio: float | None
    single_ratio: float | None


@dataclass(frozen=True)
class TokenizerFigures:
    """All figures of one tokenizer.

    Attributes:
        marks_alone: tokens that are one combining mark and nothing else.
        marks_first: longer tokens that begin with a combining mark.
        unknown: tokens that stand for text that was lost; they are in no script's figures.
        by_length: tokens of the text by the characters they stand for; 0 are pieces of a character.
    """

    entries: int
    whole: Rate
    by_script: dict[str, Rate]
    by_source: dict[str, Rate]
    byte_fallback: ByteFallback
    unknown: int
    round_trip: RoundTrip
    new: NewTokens | None
    marks_alone: TokenSet
    marks_first: TokenSet
    by_length: dict[int, int]
    speed: Speed


@dataclass(frozen=True)
class TokenTexts:
    """What the ids of a tokenizer stand for.

    Attributes:
        texts: the text of each token that is made of whole characters.
        parts: the bytes of each token that holds a part of a character, or a byte piece.
        added: ids of special and other added tokens, the unknown one left out.
        unknown: id of the token for what is not in the vocabulary.
        size: the largest id + 1.
    """

    texts: dict[int, str]
    parts: dict[int, bytes]
    added: frozenset[int]
    unknown: int | None
    size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TokenTexts":
        """Read it from the tokenizer's vocabulary and decoder."""
        state = json.loads(tokenizer.to_str())
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        unknown = vocab.get(state["model"].get("unk_token"))
        added = frozenset(tokenizer.get_added_tokens_decoder()) - {unknown}
        decoder = state["decoder"] or {}
        byte_level = "ByteLevel" in {part["type"] for part in decoder.get("decoders", [decoder]) if part}
        to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
        texts, parts = {}, {}
        for token, i in vocab.items():
            if i == unknown:
                continue
            if i in added:
                texts[i] = token
            elif byte_level and to_byte.keys() >= set(token):
                data = bytes(to_byte[character] for character in token)
                try:
                    texts[i] = data.decode()
                except UnicodeDecodeError:
                    parts[i] = data
            elif state["model"].get("byte_fallback") and regex.fullmatch(r"<0x[0-9A-F]{2}>", token):
                parts[i] = bytes([int(token[3:5], 16)])
            else:
                texts[i] = _text_of(token, tokenizer)
        return cls(texts, parts, added, unknown, max(vocab.values()) + 1)


def _text_of(token: str, tokenizer: Tokenizer) -> str:
    if tokenizer.decoder is None:
        return token
    # Behind another token, because decoders treat the first one otherwise.
    return tokenizer.decoder.decode(["x", token]).removeprefix("x") or token


def measure(
    documents: Iterable[tuple[str, str]],
    tokenizers: Mapping[str, Tokenizer],
    new_ids: Mapping[str, Collection[int]],
    base: str | None,
) -> tuple[TextFigures, dict[str, TokenizerFigures]]:
    """Encode and decode all documents with all tokenizers, in one pass over the text.

    Args:
        documents: pairs (source, text). After `MAX_SOURCES` sources the rest count as one.
        tokenizers: by name; they must neither truncate nor pad.
        new_ids: the new tokens of some of them.
        base: the one whose speed the others are compared with.

    Raises:
        UserError: if there is no text, or it is no valid Unicode.
    """
    sources: defaultdict[str, _Source] = defaultdict(_Source)
    characters: Counter[str] = Counter()
    tallies = {name: _Tally(tokenizer) for name, tokenizer in tokenizers.items()}
    sample: list[str] = []
    sample_size = 0
    for batch in _batches(documents):
        named = []
        for name, text in batch:
            if name not in sources and len(sources) >= MAX_SOURCES:
                name = OTHER_SOURCES
            if sources[name].characters < SPEED_CHARACTERS and sample_size < SPEED_CHARACTERS_IN_ALL:
                sample.append(text)
                sample_size += len(text)
            sources[name].add(name, text)
            named.append((name, sources[name].documents, text))
        characters.update(chain.from_iterable(text for _, text in batch))
        for tally in tallies.values():
            tally.add(named)
    if not characters:
        raise UserError("There is no text to measure: the files hold no character. Give files with text.")

    measured = _text_figures(sources, characters)
    speeds = measure_speed(sample, tokenizers, base)
    figures = {
        name: tally.figures(measured, frozenset(new_ids.get(name, ())), speeds[name]) for name, tally in tallies.items()
    }
    return measured, figures


def measure_speed(texts: list[str], tokenizers: Mapping[str, Tokenizer], base: str | None) -> dict[str, Speed]:
    """Encode the texts in one batch and one by one, `SPEED_PASSES` times; the tokenizers take turns."""
    characters = sum(map(len, texts))
    modes: dict[str, Callable[[Tokenizer], object]] = {
        "batched": lambda tokenizer: tokenizer.encode_batch_fast(texts, add_special_tokens=False),
        "single": lambda tokenizer: [tokenizer.encode(text, add_special_tokens=False) for text in texts],
    }
    rates: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in modes} for name in tokenizers}
    for _ in range(SPEED_PASSES):
        for mode, encode in modes.items():
            for name, tokenizer in tokenizers.items():
                start = time.perf_counter()
                encode(tokenizer)
                rates[name][mode].append(characters / (time.perf_counter() - start))

    def ratio(name: str, mode: str) -> float | None:
        if base is None:
            return None
        return statistics.median(ours / theirs for ours, theirs in zip(rates[name][mode], rates[base][mode]))

    return {
        name: Speed(
            batched=statistics.median(rates[name]["batched"]),
            single=statistics.median(rates[name]["single"]),
            batched_ratio=ratio(name, "batched"),
            single_ratio=ratio(name, "single"),
        )
        for name in tokenizers
    }


def machine() -> dict[str, str | int | None]:
    """What the speeds depend on."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        **{name: os.environ.get(name) for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM")},
    }


@cache
def script_of(character: str) -> str:
    """Unicode's name of its script: Thai, Latin, Common (spaces, digits, signs), Inherited (some marks), …"""
    return script_name(script(character)).replace("_", " ")


def count_words(text: str) -> Counter[str]:
    """Words by script. Thai is cut by PyThaiNLP's newmm; elsewhere a word is a run of letters, marks and digits."""
    words: Counter[str] = Counter()
    for run in _WORDS.findall(text):
        name = next((found for found in map(script_of, run) if found not in _NO_SCRIPT), "Common")
        words[name] += len(word_tokenize(run, engine="newmm")) if name == "Thai" else 1
    return words


@dataclass
class _Source:
    documents: int = 0
    characters: int = 0
    bytes: int = 0
    words_counted_in: int = 0
    words: Counter[str] = field(default_factory=Counter)

    def add(self, name: str, text: str) -> None:
        self.documents += 1
        try:
            self.bytes += len(text.encode())
        except UnicodeEncodeError as error:
            raise UserError(
                f"Document {self.documents} of {name} has half a surrogate pair ({text[error.start]!r}), which no "
                "UTF-8 can hold. Fix the text."
            ) from None
        if self.characters < WORD_CHARACTERS:
            self.words_counted_in += len(text)
            self.words.update(count_words(text))
        self.characters += len(text)

    def all_words(self) -> dict[str, float]:
        """Scaled up to all of the source."""
        return {name: n * self.characters / self.words_counted_in for name, n in self.words.items()}


def _text_figures(sources: Mapping[str, _Source], characters: Counter[str]) -> TextFigures:
    words: Counter[str] = Counter()
    by_script: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for source in sources.values():
        words.update(source.all_words())
    for character, count in characters.items():
        totals = by_script[script_of(character)]
        totals[0] += count
        totals[1] += count * len(character.encode())
    return TextFigures(
        documents=sum(source.documents for source in sources.values()),
        whole=TextSize(
            characters=characters.total(),
            bytes=sum(source.bytes for source in sources.values()),
            words=round(words.total()),
        ),
        by_script={
            name: TextSize(count, size, round(words[name]))
            for name, (count, size) in sorted(by_script.items(), key=lambda entry: -entry[1][0])
        },
        by_source={
            name: TextSize(source.characters, source.bytes, round(sum(source.all_words().values())))
            for name, source in sorted(sources.items(), key=lambda entry: -entry[1].characters)
            if source.characters
        },
        words_counted_in=sum(source.words_counted_in for source in sources.values()),
    )


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Documents in NFC, in lists of about `BATCH_CHARACTERS`."""
    batch: list[tuple[str, str]] = []
    size = 0
    for source, text in documents:
        batch.append((source, unicodedata.normalize("NFC", text)))
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Tally:
    """What one tokenizer made of the text so far."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.token_texts = TokenTexts.of(tokenizer)
        self.counts = np.zeros(self.token_texts.size, dtype=np.int64)
        # Neighbouring parts of characters, cut where a character begins.
        self.groups: Counter[tuple[int, ...]] = Counter()
        self.by_source: Counter[str] = Counter()
        self.differences: dict[tuple[str, str], Difference] = {}
        self.with_special = 0
        self.failures_with_special = 0
        self.is_part = np.zeros(self.token_texts.size, dtype=bool)
        self.begins_character = np.zeros(self.token_texts.size, dtype=bool)
        for i, data in self.token_texts.parts.items():
            self.is_part[i] = True
            self.begins_character[i] = data[0] & 0xC0 != 0x80

    def add(self, documents: list[tuple[str, int, str]]) -> None:
        """Encode and decode (source, number in the source, text) triples."""
        encodings = self.tokenizer.encode_batch_fast([text for *_, text in documents], add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        flat = np.fromiter(chain.from_iterable(ids), dtype=np.int64, count=sum(map(len, ids)))
        self.counts += np.bincount(flat, minlength=len(self.counts))
        parts = flat[self.is_part[flat]]
        cuts = [0, *np.flatnonzero(self.begins_character[parts]), len(parts)]
        listed = parts.tolist()
        self.groups.update(tuple(listed[start:end]) for start, end in pairwise(cuts) if start < end)

        decoded = self.tokenizer.decode_batch(ids, skip_special_tokens=False)
        for (source, number, text), tokens, back in zip(documents, ids, decoded):
            self.by_source[source] += len(tokens)
            special = not self.token_texts.added.isdisjoint(tokens)
            self.with_special += special
            if back == text:
                continue
            if special:
                self.failures_with_special += 1
                continue
            at = next(
                (i for i, (ours, theirs) in enumerate(zip(text, back)) if ours != theirs), min(len(text), len(back))
            )
            key = text[at : at + 1], back[at : at + 1]
            first = self.differences.get(key) or Difference(
                expected=text[at : at + 16],
                got=back[at : at + 16],
                source=source,
                document=number,
                character=at,
                documents=0,
            )
            self.differences[key] = replace(first, documents=first.documents + 1)

    def figures(self, text: TextFigures, new: frozenset[int], speed: Speed) -> TokenizerFigures:
        """Everything counted so far, for the text that it was counted on."""
        by_script, fallback = self._by_script()
        return TokenizerFigures(
            entries=self.tokenizer.get_vocab_size(),
            whole=_rate(int(self.counts.sum()), text.whole),
            by_script={name: _rate(by_script[name], size) for name, size in text.by_script.items()},
            by_source={name: _rate(self.by_source[name], size) for name, size in text.by_source.items()},
            byte_fallback=self._byte_fallback(fallback, text),
            unknown=0 if self.token_texts.unknown is None else int(self.counts[self.token_texts.unknown]),
            round_trip=RoundTrip(
                failures=sum(difference.documents for difference in self.differences.values()),
                differences=sorted(self.differences.values(), key=lambda found: -found.documents)[:EXAMPLES],
                documents_with_special_tokens=self.with_special,
                failures_with_special_tokens=self.failures_with_special,
            ),
            new=self._new_tokens(new) if new else None,
            marks_alone=self._token_set({i for i, token in self._marks() if len(token) == 1}, new),
            marks_first=self._token_set({i for i, token in self._marks() if len(token) > 1}, new),
            by_length=self._by_length(),
            speed=speed,
        )

    def _by_script(self) -> tuple[dict[str, float], Counter[str]]:
        """Tokens by script, and the characters that were encoded by their parts."""
        tokens: defaultdict[str, float] = defaultdict(float)
        fallback: Counter[str] = Counter()

        def share(string: str, number: int) -> None:
            for character in string:
                tokens[script_of(character)] += number / len(string)

        for i in np.flatnonzero(self.counts).tolist():
            if i in self.token_texts.texts:
                share(self.token_texts.texts[i], int(self.counts[i]))
        for group, count in self.groups.items():
            string = b"".join(self.token_texts.parts[i] for i in group).decode(errors="replace")
            share(string, len(group) * count)
            for character in string:
                fallback[character] += count
        return tokens, fallback

    def _byte_fallback(self, fallback: Counter[str], text: TextFigures) -> ByteFallback:
        by_script: Counter[str] = Counter()
        for character, count in fallback.items():
            by_script[script_of(character)] += count
        return ByteFallback(
            characters=fallback.total(),
            share=fallback.total() / text.whole.characters,
            share_by_script={name: by_script[name] / size.characters for name, size in text.by_script.items()},
            most=fallback.most_common(EXAMPLES),
        )

    def _new_tokens(self, new: frozenset[int]) -> NewTokens:
        unused = sorted(i for i in new if not self.counts[i])
        return NewTokens(
            tokens=len(new),
            share_of_text=self._share(new),
            unused=len(unused),
            unused_share=len(unused) / len(new),
            unused_examples=self._uses(unused[:: max(len(unused) // EXAMPLES, 1)]),
            longest=self._uses(sorted(new, key=lambda i: (-len(self.token_texts.texts.get(i, "")), i))),
            most_used=self._uses(self._by_use(new)),
            by_length=dict(sorted(Counter(len(self.token_texts.texts.get(i, "")) for i in new).items())),
        )

    def _token_set(self, ids: set[int], new: frozenset[int]) -> TokenSet:
        return TokenSet(len(ids), len(ids & new), self._share(ids), self._uses(self._by_use(ids)))

    def _marks(self) -> Iterator[tuple[int, str]]:
        for i, token in self.token_texts.texts.items():
            if token and unicodedata.category(token[0]).startswith("M"):
                yield i, token

    def _by_length(self) -> dict[int, int]:
        lengths: Counter[int] = Counter()
        for i in np.flatnonzero(self.counts).tolist():
            if i != self.token_texts.unknown:
                lengths[len(self.token_texts.texts.get(i, ""))] += int(self.counts[i])
        return dict(sorted(lengths.items()))

    def _share(self, ids: Collection[int]) -> float:
        return float(self.counts[list(ids)].sum() / self.counts.sum()) if ids else 0.0

    def _by_use(self, ids: Collection[int]) -> list[int]:
        return sorted(ids, key=lambda i: (-self.counts[i], i))

    def _uses(self, ids: list[int]) -> list[TokenUse]:
        return [
            TokenUse(i, self.token_texts.texts.get(i, "").replace(" ", "▁") or repr(self.token_texts.parts[i]), n)
            for i in ids[:EXAMPLES]
            for n in [int(self.counts[i])]
        ]


def _rate(tokens: float, size: TextSize) -> Rate:
    return Rate(
        tokens=tokens,
        per_character=tokens / size.characters,
        per_word=tokens / size.words if size.words else None,
        per_byte=tokens / size.bytes,
    )
