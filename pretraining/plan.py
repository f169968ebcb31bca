# SPDX-License-Identifier: Apache-2.0
"""Which tokens every sequence of a run holds: a function of packed text, a seed and the sequence's number.

Step s of a run with B sequences a step trains on the sequences from s·B until before (s+1)·B, on however many ranks; so
a run goes on anywhere, on other hardware, without reading what came before. Sequences are planned in blocks of about
17 million tokens: where a block of each source begins is a formula (`mixture.py`), which documents lie there is
looked up (`order.py`), and how they share sequences is decided within the block (`packing.py`).
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np

from jai.errors import UserError
from jai.pretraining.mixture import Mixture, language_shares
from jai.pretraining.order import Pieces, Recent, SourceOrder, random_bits, shuffled
from jai.pretraining.packing import LanguageMixer, Placement, best_fit, one_after_another
from jai.pretraining.shards import PackedCorpus, PackedSource
from jai.pretraining.shares import Shares, SourceShare

Strategy = Literal["isolated", "concatenated", "xlda", "paired-isolated"]
MIXED_STRATEGIES = ("xlda", "paired-isolated")  # every sequence holds two languages and more

# At 4,096 tokens, best fit cuts 3.8 % of the shared text's documents in blocks of 2^22, and 2.0 % in these.
BLOCK_TOKENS = 2**24
DEFAULT_RHO = 0.5  # ours: Trillion-7B's report has no number
_ORDER, _SEQUENCES, _LANGUAGES = 1, 2, 3  # what random bits of a block are for


@dataclass(frozen=True)
class _Block:
    """The sequences of a block: pieces in order, and where each sequence's begin (and the last one's end)."""

    pieces: Pieces
    offsets: np.ndarray


class SequencePlan:
    """The sequences of a run.

    Args:
        corpus: the packed text.
        context: tokens of a sequence.
        strategy: how documents share sequences.
            isolated: documents stay whole where they can (best fit), and do not see each other.
            concatenated: they follow each other, and see what comes before them.
            xlda: every sequence holds two languages and more, and documents see what comes before them.
            paired-isolated: the same sequences as xlda, in which documents do not see each other.
        seed: of all that is random.
        rho: probability that the next document is of another language; xlda and paired-isolated only.
        shares: how much of each source; None is what the configuration said when the corpus was packed.
        starts: tokens of sources that earlier sequences have used up, by name; `epochs` count them.
        at_most: sequences after which the plan ends; what they hold of a stream is then its beginning, without a gap.
            None is as many as the sources last for.

    Attributes:
        sequences: how many there are: as many as the sources last for.
        sources: those that are used, in the order of the shares.
        is_isolated: whether documents do not see each other.
        languages: those that `language_ids` count, in order.

    Raises:
        UserError: for shares that do not fit the corpus, no tokens, or too little text for the strategy.
    """

    def __init__(
        self,
        corpus: PackedCorpus,
        context: int,
        *,
        strategy: Strategy = "isolated",
        seed: int = 0,
        rho: float = DEFAULT_RHO,
        shares: Shares | None = None,
        starts: Mapping[str, int] | None = None,
        at_most: int | None = None,
    ):
        if strategy not in get_args(Strategy):
            raise UserError(f"The strategy is {strategy!r}; expected one of {', '.join(get_args(Strategy))}.")
        if context < 2:
            raise UserError(f"The context is {context}; a sequence needs 2 tokens or more, of which one is predicted.")
        if not 0 <= rho <= 1:
            raise UserError(f"rho is {rho}; expected a probability, from 0 to 1.")
        self.corpus, self.context, self.strategy, self.seed, self.rho = corpus, context, strategy, seed, rho
        self.shares = shares or corpus.shares
        self.is_isolated = strategy in ("isolated", "paired-isolated")
        self.languages = corpus.languages
        self.sources = [_source(corpus, name, share) for name, share in self.shares.sources.items()]
        used = list(self.shares.sources.values())
        self.orders = [SourceOrder(source, seed, share.choice) for source, share in zip(self.sources, used)]
        _refuse_empty(self.orders)
        self._starts = [(starts or {}).get(source.name, 0) for source in self.sources]
        self.mixture = self._mixture(used, at_most)
        # Which of all languages a source's are, for its documents in turn.
        self._language_ids = [
            np.array([self.languages.index(language) for language in source.entry.languages]) for source in self.sources
        ]
        self._blocks: Recent[_Block] = Recent(4)
        self.sequences = self._sequences_of_two_languages() if self._mixes_languages else self.mixture.sequences
        if not self.sequences:
            raise UserError(
                f"The text in {corpus.folder} is not enough for one sequence of {context:,} tokens by these "
                f"shares{self._why_it_ends()}. Give more text, or a shorter context."
            )

    def __len__(self) -> int:
        return self.sequences

    @property
    def _mixes_languages(self) -> bool:
        return self.strategy in MIXED_STRATEGIES

    def pieces(self, sequence: int) -> Pieces:
        """What a sequence holds, in order; `source` counts in `self.sources`, `language` in `self.languages`.

        Raises:
            UserError: if there is no such sequence.
        """
        if not 0 <= sequence < self.sequences:
            raise UserError(
                f"There is no sequence {sequence:,}: the text lasts for {self.sequences:,}{self._why_it_ends()}."
            )
        number, index = self.mixture.place(sequence)
        block = self._block(number)
        return block.pieces[block.offsets[index] : block.offsets[index + 1]]

    @property
    def parts(self) -> "tuple[SequencePlan, ...]":
        """The plans that follow each other: this one alone."""
        return (self,)

    def part(self, sequence: int) -> "tuple[SequencePlan, int]":
        """The plan that a sequence is in, and its number there: this one, and the number itself."""
        return self, sequence

    def tokens_seen(self, sequences: int) -> dict[str, int]:
        """Tokens of each source in the first so many sequences, padding left out."""
        sequences = min(sequences, self.sequences)
        if sequences == self.mixture.sequences:
            ends = [stop for _, stop in self.mixture.block(self.mixture.blocks - 1).ranges]
            return dict(zip((source.name for source in self.sources), ends))
        number, index = self.mixture.place(sequences)
        seen = np.array([start for start, _ in self.mixture.block(number).ranges])
        if index:
            block = self._block(number)
            pieces = block.pieces[: block.offsets[index]]
            is_text = pieces.source >= 0
            seen += np.bincount(pieces.source[is_text], pieces.lengths[is_text], len(seen)).astype(np.int64)
        return dict(zip((source.name for source in self.sources), seen.tolist()))

    def check_lasts(self, sequences: int) -> None:
        """Refuse a run that is longer than the text.

        Raises:
            UserError: naming the source that is used up first, and when.
        """
        if sequences > self.sequences:
            raise UserError(
                f"The run takes {sequences:,} sequences of {self.context:,} tokens, and the text lasts for "
                f"{self.sequences:,}{self._why_it_ends()}. Train for fewer steps, allow more `epochs` of it, give it a "
                "smaller weight, or set `when_dry: renormalize`, which goes on with the other sources."
            )

    def identity(self) -> dict[str, Any]:
        """What decides every sequence, as JSON: a resumed run must have the same."""
        return {
            "content_sha256": self.corpus.content_sha256,
            "context": self.context,
            "strategy": self.strategy,
            "seed": self.seed,
            "rho": self.rho if self._mixes_languages else None,
            "tokens": {order.source.name: order.tokens for order in self.orders},
            "starts": self._starts,
            "shares": asdict(self.shares),
        }

    def _why_it_ends(self) -> str:
        if self.shares.when_dry == "renormalize" or not self.mixture.dry:
            return ", all of it together"
        names = ", ".join(self.sources[dry.source].name for dry in self.mixture.dry)
        return f"; then {names} is used up"

    def _mixture(self, used: list[SourceShare], at_most: int | None) -> Mixture:
        limits = [
            max(0, int(order.tokens * share.epochs) - start)
            for order, share, start in zip(self.orders, used, self._starts)
        ]
        if self.shares.alpha is not None and self.shares.beta is not None:
            weights: list[float] | None = self._weights_by_language(self.shares.alpha, self.shares.beta)
        else:
            given = [share.weight for share in used if share.weight is not None]
            weights = given if len(given) == len(used) else None
        block_sequences = max(1, BLOCK_TOKENS // self.context)
        # A last sequence that is half padding could not hold two languages.
        fill_last = self._mixes_languages
        return Mixture(limits, weights, self.context, block_sequences, self.shares.when_dry, fill_last, at_most)

    def _weights_by_language(self, alpha: float, beta: dict[str, float]) -> list[float]:
        """Equation 2; sources of one language share as their sizes are.

        A mixture's languages are checked by `CorpusConfig`; those that the text was packed with may be others.
        """
        packed = sorted({language for source in self.sources for language in source.entry.languages})
        if sorted(beta) != packed:
            raise UserError(
                f"beta has {', '.join(sorted(beta))}; the text in {self.corpus.folder} was packed as "
                f"{', '.join(packed)}. Give a share for each of these languages."
            )
        if parallel := next((source.name for source in self.sources if len(source.entry.languages) > 1), None):
            raise UserError(
                f"Equation 2 gives each language its share, and {parallel} was packed with several. Give weights "
                "instead."
            )
        languages = [source.entry.languages[0] for source in self.sources]
        sizes: dict[str, int] = {}
        for language, order in zip(languages, self.orders):
            sizes[language] = sizes.get(language, 0) + order.tokens
        shares = language_shares(sizes, alpha, beta)
        return [shares[language] * order.tokens / sizes[language] for language, order in zip(languages, self.orders)]

    def _sequences_of_two_languages(self) -> int:
        """How many sequences there are before only one language is left."""
        names = {language for source in self.sources for language in source.entry.languages}
        if len(names) < 2:
            raise UserError(
                f"The strategy {self.strategy} needs text of two languages or more; all of it is {', '.join(names)}. "
                "Add a source, or choose another strategy."
            )
        for first_sequence, block in self.mixture.stretches:
            tokens = self.mixture.block(block)
            by_language = np.zeros(len(self.languages))
            for ids, (start, stop) in zip(self._language_ids, tokens.ranges):
                by_language[ids] += (stop - start) / len(ids)  # parallel texts are about as long as each other
            if by_language.max() > tokens.sequences * (self.context - 1):
                if first_sequence:
                    return first_sequence
                raise UserError(
                    f"With these shares, the second language of a sequence of {self.context:,} tokens would have less "
                    f"than one token. Give a language other than {self.languages[int(by_language.argmax())]} more."
                )
        return self.mixture.sequences

    def _block(self, number: int) -> _Block:
        return self._blocks.get(number, lambda: self._plan_block(number))

    def _plan_block(self, number: int) -> _Block:
        tokens = self.mixture.block(number)
        pieces = self._pieces_of(tokens.ranges)
        if self.strategy == "isolated":
            placement = best_fit(pieces.lengths, self.context, tokens.sequences)
        else:
            pieces = self._shuffle_rows(pieces, number)
            if self._mixes_languages:
                placement = self._mix(pieces, number, tokens.sequences)
            else:
                placement = one_after_another(pieces.lengths, self.context)
        return self._in_sequences(pieces, placement, number, tokens.sequences)

    def _pieces_of(self, ranges: list[tuple[int, int]]) -> Pieces:
        columns = []
        for index, (order, (start, stop)) in enumerate(zip(self.orders, ranges)):
            document, begin, end = order.pieces(self._starts[index] + start, self._starts[index] + stop)
            ids = self._language_ids[index]
            columns.append((np.full(len(document), index), document, begin, end, ids[document % len(ids)]))
        return Pieces(*map(np.concatenate, zip(*columns)))

    def _rows(self, pieces: Pieces) -> np.ndarray:
        """A number for each piece, the same for parallel documents that follow each other and for nothing else."""
        widths = np.array([len(source.entry.languages) for source in self.sources])[pieces.source]
        row = pieces.document // widths
        begins = (np.diff(row, prepend=-1) != 0) | (np.diff(pieces.source, prepend=-1) != 0)
        begins |= np.diff(pieces.document, prepend=-1) <= 0  # the same row, the last of an epoch and first of the next
        return np.cumsum(begins) - 1

    def _shuffle_rows(self, pieces: Pieces, number: int) -> Pieces:
        rows = self._rows(pieces)
        place = np.argsort(shuffled(int(rows[-1]) + 1, self.seed, _ORDER, number))
        return pieces[np.argsort(place[rows], kind="stable")]

    def _mix(self, pieces: Pieces, number: int, sequences: int) -> Placement:
        rows = self._rows(pieces)
        is_parallel = np.bincount(rows)[rows] > 1
        mixer = LanguageMixer(
            pieces.lengths,
            pieces.language,
            np.where(is_parallel, rows, -1),
            self.context,
            sequences,
            self.rho,
            _uniform(self.seed, _LANGUAGES, number),
        )
        return mixer.mix()

    def _in_sequences(self, pieces: Pieces, placement: Placement, number: int, sequences: int) -> _Block:
        """The sequences in the order in which they are trained on; the one that is not full, if any, is padded."""
        chosen = pieces[placement.item]
        start = chosen.start + placement.start
        placed = replace(chosen, start=start, stop=chosen.start + placement.stop)
        sequence = shuffled(sequences, self.seed, _SEQUENCES, number)[placement.sequence]
        filled = np.bincount(sequence, placed.lengths, sequences).astype(np.int64)
        short = np.flatnonzero(filled < self.context)
        nothing = np.zeros_like(short)
        padding = Pieces(nothing - 1, nothing, nothing, self.context - filled[short], nothing - 1)
        sequence = np.concatenate([sequence, short])
        order = np.argsort(sequence, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(sequence, minlength=sequences))])
        return _Block(_joined(placed, padding)[order], offsets)


class AnnealedPlan:
    """A plan that goes over to other shares: Trillion-7B's annealing (section 3.2), more of a language and better text.

    A source whose choice of documents (`keep_best`, …) stays the same goes on where it was, and `epochs` count over
    both parts. One whose choice changes begins anew: of its best documents, most were seen before.

    Args:
        corpus, context, strategy, seed, rho: as `SequencePlan` takes them.
        shares: until the annealing; None is what the configuration said when the corpus was packed.
        annealing: from then on.
        begins: the first sequence of the annealing.

    Attributes:
        parts: the two plans.
        sequences: how many there are in both.

    Raises:
        UserError: as `SequencePlan`, and if a source is used up before the annealing.
    """

    def __init__(
        self,
        corpus: PackedCorpus,
        context: int,
        *,
        annealing: Shares,
        begins: int,
        strategy: Strategy = "isolated",
        seed: int = 0,
        rho: float = DEFAULT_RHO,
        shares: Shares | None = None,
    ):
        stable = SequencePlan(corpus, context, strategy=strategy, seed=seed, rho=rho, shares=shares, at_most=begins)
        stable.check_lasts(begins)
        before, after = stable.shares.sources, annealing.sources
        starts = {
            name: tokens
            for name, tokens in stable.tokens_seen(begins).items()
            if name in after and after[name].choice == before[name].choice
        }
        annealed = SequencePlan(corpus, context, strategy=strategy, seed=seed, rho=rho, shares=annealing, starts=starts)
        self.corpus, self.context, self.begins = corpus, context, begins
        self.is_isolated, self.languages = stable.is_isolated, stable.languages
        self.parts = (stable, annealed)
        self.sequences = begins + annealed.sequences

    def __len__(self) -> int:
        return self.sequences

    def part(self, sequence: int) -> tuple[SequencePlan, int]:
        """The plan that a sequence is in, and its number there."""
        stable, annealed = self.parts
        return (stable, sequence) if sequence < self.begins else (annealed, sequence - self.begins)

    def pieces(self, sequence: int) -> Pieces:
        """What a sequence holds; `source` counts in the `sources` of the part that it is in."""
        plan, number = self.part(sequence)
        return plan.pieces(number)

    def tokens_seen(self, sequences: int) -> dict[str, int]:
        """Tokens of each source in the first so many sequences, padding left out."""
        stable, annealed = self.parts
        seen = Counter(stable.tokens_seen(min(sequences, self.begins)))
        if sequences > self.begins:
            seen.update(annealed.tokens_seen(sequences - self.begins))
        return dict(seen)

    def check_lasts(self, sequences: int) -> None:
        """Refuse a run that is longer than the text, as `SequencePlan.check_lasts`."""
        self.parts[1].check_lasts(sequences - self.begins)

    def identity(self) -> dict[str, Any]:
        """What decides every sequence, as JSON."""
        stable, annealed = self.parts
        return {"stable": stable.identity(), "annealing": annealed.identity(), "begins": self.begins}


AnyPlan = SequencePlan | AnnealedPlan


def check_same_plan(saved: Mapping[str, Any], plan: AnyPlan) -> None:
    """Refuse to go on with other sequences than a run began with.

    Args:
        saved: the `identity()` of the plan that the run began with, as JSON gave it back.
        plan: the one that it would go on with.

    Raises:
        UserError: naming what has changed.
    """
    changes = list(_changes(saved, json.loads(json.dumps(plan.identity()))))
    if changes:
        raise UserError(
            f"The run was begun with other data: {'; '.join(changes[:3])}. Its steps would see other text. Give the "
            "same options and the same packed text, or begin a new run."
        )


def _changes(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from _changes(old.get(key), new.get(key), f"{path} {key}".strip())
    elif old != new:
        yield f"{path} was {json.dumps(old, ensure_ascii=False)} and is {json.dumps(new, ensure_ascii=False)}"


def _joined(first: Pieces, second: Pieces) -> Pieces:
    names = [field.name for field in fields(Pieces)]
    return Pieces(*(np.concatenate([getattr(first, name), getattr(second, name)]) for name in names))


def _uniform(*key: int) -> Iterator[float]:
    """Numbers from 0 to below 1 that the key decides."""
    bits = random_bits(*key)
    while True:
        yield from ((bits.random_raw(1024) >> np.uint64(11)) * 2.0**-53).tolist()


def _source(corpus: PackedCorpus, name: str, share: SourceShare) -> PackedSource:
    """The packed source that a share is of, under the share's name."""
    packed = {source.name: source for source in corpus.sources}
    source = packed.get(share.packed or name)
    if source is None:
        raise UserError(
            f"The source {share.packed or name} is not in {corpus.folder}, which has {', '.join(packed)}. Pack it too, "
            "or leave it out of the mixture."
        )
    if share.choice.keep_best < 1 and not source.entry.has_quality:
        raise UserError(
            f"The best {share.choice.keep_best:.0%} of {name} are asked for, but it was packed without scores. Pack it "
            "with a `quality_column`."
        )
    return source if source.name == name else source.named(name)


def _refuse_empty(orders: Sequence[SourceOrder]) -> None:
    for order in orders:
        if not order.tokens:
            least, most = order.choice.min_tokens, order.choice.max_tokens or "any"
            raise UserError(
                f"No document of the source {order.source.name} has from {least} to {most} tokens. Choose others, or "
                "leave the source out."
            )
