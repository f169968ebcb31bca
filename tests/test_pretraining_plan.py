# SPDX-License-Identifier: Apache-2.0
"""Sequence plans: nothing lost, nothing twice, shares, languages, ranks, and what attention and labels see."""

import itertools
import json
import pickle
from collections import Counter
from hashlib import blake2b

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_text import EOS, packed_corpus
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from jai.errors import UserError
from jai.pretraining import plan as plans
from jai.pretraining.config import corpus_config
from jai.pretraining.dataset import PackedSequences
from jai.pretraining.mixture import Mixture, language_shares
from jai.pretraining.packing import LanguageMixer, best_fit, switch_probabilities
from jai.pretraining.plan import AnnealedPlan, SequencePlan, check_same_plan
from jai.pretraining.shares import DocumentChoice, Shares, SourceShare

STRATEGIES = ("isolated", "concatenated", "xlda", "paired-isolated")


def lengths_of(count: int, longest: int, seed: int) -> list[int]:
    """Document lengths as text has them: most short, a few long."""
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 12), 1.2, count)
    return np.clip(drawn, 1, longest).astype(int).tolist()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 1,024 tokens, so that a few documents fill several."""
    monkeypatch.setattr(plans, "BLOCK_TOKENS", 1024)


@pytest.fixture
def two_languages(tmp_path, small_blocks):
    """Some 60,000 tokens of English and 7,000 of Thai; documents of up to 600 tokens, a context is 128."""
    documents = {"english": lengths_of(700, 600, 0), "thai": lengths_of(80, 600, 1)}
    return packed_corpus(tmp_path / "two", documents, languages={"english": ["en"], "thai": ["th"]})


def items_of(plan: SequencePlan) -> list[dict[str, np.ndarray]]:
    dataset = PackedSequences(plan)
    return [{name: tensor.numpy() for name, tensor in dataset[number].items()} for number in range(len(dataset))]


def ids_of(plan: SequencePlan) -> np.ndarray:
    return np.concatenate([item["input_ids"] for item in items_of(plan)])


class TestEveryTokenOnce:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_of_two_languages(self, two_languages, strategy):
        plan = SequencePlan(two_languages, 128, strategy=strategy)
        ids = ids_of(plan)
        total = sum(source.tokens for source in plan.sources)
        assert len(ids) == len(plan) * 128
        seen = Counter(ids.tolist())
        padding = seen.pop(EOS, 0)
        assert max(seen.values()) == 1
        left = 0 if strategy in ("isolated", "concatenated") else total % 128  # no sequence with padding holds two
        assert padding == (-total % 128 if not left else 0)
        assert len(seen) == total - left == total - sum(plan.mixture.left)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
        context=st.integers(2, 40),
        strategy=st.sampled_from(("isolated", "concatenated")),
    )
    def test_of_any_lengths(self, tmp_path_factory, small_blocks, lengths, context, strategy):
        corpus = packed_corpus(tmp_path_factory.mktemp("any") / "corpus", {"a": lengths})
        ids = ids_of(SequencePlan(corpus, context, strategy=strategy))
        assert sorted(ids[ids != EOS].tolist()) == list(range(1, sum(lengths) + 1))
        assert np.count_nonzero(ids == EOS) == -sum(lengths) % context

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        first=st.lists(st.integers(1, 90), min_size=4, max_size=60),
        second=st.lists(st.integers(1, 90), min_size=4, max_size=60),
        rho=st.sampled_from([0.0, 0.5, 1.0]),
        context=st.integers(16, 40),
        seed=st.integers(0, 3),
    )
    def test_of_any_languages(self, tmp_path_factory, small_blocks, first, second, rho, context, seed):
        corpus = packed_corpus(tmp_path_factory.mktemp("any") / "corpus", {"a": first, "b": second})
        plan, reason = None, ""
        try:
            plan = SequencePlan(corpus, context, strategy="xlda", rho=rho, seed=seed)
        except UserError as error:
            reason = str(error)
        if not plan:
            assert "not enough for one sequence" in reason or "less than one token" in reason
            return
        items = items_of(plan)
        ids = np.concatenate([item["input_ids"] for item in items]).tolist()
        assert len(set(ids)) == len(ids) == plan.sequences * context
        assert all(len(set(item["language_ids"].tolist())) == 2 for item in items)

    def test_what_was_seen_is_counted_without_padding(self, tmp_path, small_blocks):
        """Up to every sequence; the one with padding is not the last of its block."""
        corpus = packed_corpus(tmp_path / "a", {"a": lengths_of(60, 60, 0), "b": lengths_of(60, 60, 1)})
        plan = SequencePlan(corpus, 32)
        items = items_of(plan)
        (padded,) = (number for number, item in enumerate(items) if EOS in item["input_ids"])
        assert padded < len(plan) - 2
        seen = Counter({"a": 0, "b": 0})
        for number, item in enumerate(items):
            assert plan.tokens_seen(number) == seen
            seen.update(plan.languages[language] for language in item["language_ids"].tolist() if language >= 0)
        assert plan.tokens_seen(len(plan)) == seen

    def test_of_each_epoch_before_the_next(self, tmp_path, small_blocks):
        corpus = packed_corpus(tmp_path / "a", {"a": lengths_of(200, 100, 0)}, mixture={"a": {"epochs": 2.5}})
        plan = SequencePlan(corpus, 64)
        tokens = corpus.sources[0].tokens
        seen = Counter(ids_of(plan).tolist())
        del seen[EOS]
        assert Counter(seen.values()) == {2: tokens - int(tokens * 2.5) % tokens, 3: int(tokens * 2.5) % tokens}
        (order,) = plan.orders
        for epoch in range(2):
            documents, starts, stops = order.pieces(epoch * tokens, (epoch + 1) * tokens)
            assert sorted(documents.tolist()) == list(range(200))
            assert not starts.any()
            assert stops.tolist() == [int(corpus.sources[0].lengths(d, d + 1)[0]) for d in documents.tolist()]
        first, second = (order.pieces(epoch * tokens, (epoch + 1) * tokens)[0].tolist() for epoch in range(2))
        assert first != second

    @pytest.mark.parametrize("languages", [["en"], ["en", "th"]], ids=["single", "parallel"])
    def test_a_text_that_comes_again_at_once_is_another_one(self, tmp_path, small_blocks, languages):
        """The last of an epoch, which is the first of the next, too: the two are shuffled apart."""
        documents = {"often": [10] * len(languages), "once": [10] * 20}
        corpus = packed_corpus(
            tmp_path / "a", documents, languages={"often": languages}, mixture={"often": {"epochs": 20}}
        )
        tokens = 200 * len(languages) + 200
        sources = SequencePlan(corpus, tokens, strategy="concatenated").pieces(0).source
        assert len(sources) == tokens // 10
        assert np.count_nonzero(np.diff(sources)) > 10

    def test_of_a_source_of_many_chunks(self, tmp_path, monkeypatch, small_blocks):
        monkeypatch.setattr("jai.pretraining.order.CHUNK_ROWS", 8)
        monkeypatch.setattr("jai.pretraining.order.GROUP_CHUNKS", 4)
        corpus = packed_corpus(tmp_path / "a", {"a": lengths_of(333, 100, 0)})
        plan = SequencePlan(corpus, 64)
        ids = ids_of(plan)
        assert sorted(ids[ids != EOS].tolist()) == list(range(1, corpus.sources[0].tokens + 1))
        (order,) = plan.orders
        whole = np.concatenate(order.pieces(0, order.tokens)[:1])
        other = order.pieces(order.tokens, 2 * order.tokens)[0]
        assert set(other[:32].tolist()) != set(whole[:32].tolist())
        by_another_seed = SequencePlan(corpus, 64, seed=1).orders[0].pieces(0, order.tokens)[0]
        assert set(by_another_seed[:32].tolist()) != set(whole[:32].tolist())
        table = order._epoch(0)
        shuffles = set()
        for group in range(10):
            chunks = table.chunks[4 * group : 4 * group + 4].tolist()
            if 41 not in chunks:  # the last one, which has fewer documents
                in_files = [chunk * 8 + row for chunk in chunks for row in range(8)]
                shuffles.add(tuple(map(in_files.index, order._group(0, group, table).documents.tolist())))
        assert len(shuffles) >= 9  # each group has an order of its own
        # Neighbours in the files are not neighbours in the order, and a stream may be entered anywhere.
        assert np.count_nonzero(np.abs(np.diff(whole)) == 1) < 40
        for start, stop in ((0, 1), (777, 900), (order.tokens - 1, order.tokens + 5)):
            parts = [order.pieces(at, at + 1) for at in range(start, stop)]
            documents, starts, stops = order.pieces(start, stop)
            tokens = [(d, t) for d, a, b in zip(documents, starts, stops) for t in range(a, b)]
            assert tokens == [(int(d[0]), int(a[0])) for d, a, _ in parts]


class TestIsolated:
    def test_documents_stay_whole_but_for_a_few(self, tmp_path):
        lengths = np.array(lengths_of(3000, 600, 0))
        plan = SequencePlan(packed_corpus(tmp_path / "a", {"a": lengths.tolist()}), 128)
        parts = Counter(document for number in range(len(plan)) for document in plan.pieces(number).document.tolist())
        cut = sum(parts[document] - -(-length // 128) for document, length in enumerate(lengths.tolist()))
        assert 0 < cut < 0.02 * 3000  # where nothing fits any more, at the end of the block

    @settings(max_examples=100, deadline=None)
    @given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=80), context=st.integers(1, 30))
    def test_best_fit_is_the_textbooks(self, lengths, context):
        """Against a search of all sequences, for parts that are no longer than one."""
        lengths = np.minimum(lengths, context)
        count = -(-int(lengths.sum()) // context)
        placement = best_fit(np.array(lengths), context, count)
        rooms: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [room for room in rooms if room >= length]
            if fitting:
                rooms[rooms.index(min(fitting))] -= length
            elif len(rooms) < count:
                rooms.append(context - length)
        whole = (placement.stop - placement.start) == lengths[placement.item]
        free = np.full(count, context)
        np.subtract.at(free, placement.sequence[whole], (placement.stop - placement.start)[whole])
        assert sorted(free.tolist()) == sorted([*rooms, *[context] * (count - len(rooms))])
        assert np.bincount(placement.sequence, placement.stop - placement.start, count).max() <= context

    def test_what_is_cut_is_cut_as_seldom_as_can_be(self):
        """Rooms of 5, 5, 4 and 1 are left for 9 and 6: 5 + 4 and 5 + 1."""
        placement = best_fit(np.array([15, 15, 16, 19, 9, 6]), 20, 4)
        parts = placement.stop - placement.start
        assert [sorted(parts[placement.item == item].tolist()) for item in (4, 5)] == [[4, 5], [1, 5]]

    def test_rooms_of_a_long_context(self):
        """Rooms are looked up in two steps above 512 tokens."""
        lengths = np.array([3000, 2000, 1500, 1000, 600, 500, 92, 4])
        placement = best_fit(lengths, 4096, 3)
        groups = {tuple(sorted(lengths[placement.item[placement.sequence == s]].tolist())) for s in range(3)}
        assert groups == {(1000, 3000), (4, 92, 500, 1500, 2000), (600,)}

    def test_positions_and_labels(self, two_languages):
        plan = SequencePlan(two_languages, 128)
        for item in items_of(plan):
            restarts = item["position_ids"] == 0
            # Tokens that follow each other in the corpus are of one document, but where one ends and the next begins.
            goes_on = np.diff(item["input_ids"], prepend=-1) == 1
            is_text = item["language_ids"] >= 0
            assert (goes_on | restarts | ~is_text).all()
            assert (item["labels"][restarts] == -100).all()
            learnt = ~restarts & is_text
            assert (item["labels"][learnt] == item["input_ids"][learnt]).all()
            assert (item["labels"][~is_text] == -100).all()

    def test_the_model_keeps_documents_apart(self, tmp_path, tiny_model):
        """The loss of sequences is that of their pieces alone."""
        corpus = packed_corpus(tmp_path / "a", {"a": [5, 9, 3, 12, 4, 7, 30, 2, 11]})
        plan = SequencePlan(corpus, 16)
        model = tiny_model()
        items = [PackedSequences(plan)[number] for number in range(len(plan))]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        del batch["language_ids"]
        with torch.no_grad():
            packed = model(**batch, num_items_in_batch=1).loss
            alone = 0.0
            for number in range(len(plan)):
                pieces = plan.pieces(number)
                for source, document, start, stop in zip(pieces.source, pieces.document, pieces.start, pieces.stop):
                    if stop - start > 1 and source >= 0:
                        ids = torch.from_numpy(corpus.sources[0].read(document, start, stop).astype(np.int64))[None]
                        alone += model(input_ids=ids, labels=ids, num_items_in_batch=1).loss
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)


class TestConcatenated:
    def test_what_overflows_begins_a_sequence(self, two_languages):
        plan = SequencePlan(two_languages, 128, strategy="concatenated")
        items = items_of(plan)
        begins = {int(item["input_ids"][0]) for item in items}
        overflowing = 0
        ends = set()
        for source in two_languages.sources:
            for document in range(source.documents):
                ends.add(int(source.read(document)[-1]))
        for item in items:
            last = int(item["input_ids"][-1])
            if last not in ends and last != EOS:
                overflowing += last + 1 in begins
        assert overflowing > 0.8 * len(items)  # the others end a block of 8 sequences, and go on in the next block
        for item in items:
            assert item["position_ids"].tolist() == list(range(128))
            is_text = item["input_ids"] != EOS
            assert (item["labels"][is_text] == item["input_ids"][is_text]).all()


def adjacency(plan: SequencePlan) -> float:
    """Of the places where a document ends and another begins in a sequence: the share that changes the language."""
    same = other = 0
    for number in range(len(plan)):
        pieces = plan.pieces(number)
        languages = pieces.language
        for index, following in itertools.pairwise(range(len(pieces))):
            source = plan.sources[pieces.source[index]]
            length = source.lengths(pieces.document[index], pieces.document[index] + 1)[0]
            if pieces.stop[index] == length and pieces.start[following] == 0:
                other += languages[index] != languages[following]
                same += languages[index] == languages[following]
    return other / (same + other)


class TestLanguages:
    @pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
    def test_every_sequence_holds_two_with_a_tenth_of_thai(self, two_languages, rho):
        plan = SequencePlan(two_languages, 128, strategy="xlda", rho=rho)
        thai = plan.languages.index("th")
        shares = np.array([np.mean(item["language_ids"] == thai) for item in items_of(plan)])
        assert shares.min() > 0
        assert shares.max() < 1
        tokens = {source.name: source.tokens for source in two_languages.sources}
        assert shares.mean() == pytest.approx(tokens["thai"] / sum(tokens.values()), rel=0.01)
        assert np.minimum(shares, 1 - shares).min() * 128 >= 128 // 16 - 1e-9

    def test_rho_is_the_share_of_changes_where_shares_allow_it(self, tmp_path):
        documents = {name: lengths_of(2000, 60, seed) for seed, name in enumerate(("en", "th"))}
        corpus = packed_corpus(tmp_path / "even", documents)
        for rho in (0.1, 0.5, 0.9):
            changes = adjacency(SequencePlan(corpus, 512, strategy="xlda", rho=rho))
            assert changes == pytest.approx(rho, abs=0.06), rho

    def test_rho_with_a_tenth_of_thai_goes_to_a_fifth(self, tmp_path):
        corpus = packed_corpus(tmp_path / "a", {"en": [40] * 3600, "th": [40] * 400}, shard_documents=4000)
        changes = [adjacency(SequencePlan(corpus, 512, strategy="xlda", rho=rho)) for rho in (0.15, 0.2, 1.0)]
        assert changes == pytest.approx([0.15, 0.2, 0.2], rel=0.1)
        # Without any, a sequence of 12.8 documents still changes to Thai once.
        least = adjacency(SequencePlan(corpus, 512, strategy="xlda", rho=0.0))
        assert least == pytest.approx(1 / 12.8, rel=0.2)

    @settings(max_examples=100, deadline=None)
    @given(documents=st.lists(st.integers(1, 1000), min_size=2, max_size=5), rho=st.floats(0, 1))
    def test_switches_leave_a_language_as_often_as_they_come_to_it(self, documents, rho):
        shares = np.array(documents) / sum(documents)
        left = shares * switch_probabilities(documents, rho)
        assert left.sum() == pytest.approx(min(rho, 2 * (1 - shares.max())), abs=1e-6)
        assert left.max() <= left.sum() - left.max() + 1e-6

    def test_what_overflows_begins_the_next_sequence(self):
        lengths, languages = np.array(lengths_of(200, 90, 3)), np.arange(200) % 2
        sequences = int(lengths.sum()) // 64
        lengths[-1] -= lengths.sum() - sequences * 64
        mixer = LanguageMixer(lengths, languages, np.full(200, -1), 64, sequences, 0.5, iter(np.linspace(0, 1, 9999)))
        placed = mixer.mix()
        overflows = 0
        for sequence in range(sequences - 1):
            last = np.flatnonzero(placed.sequence == sequence)[-1]
            if placed.stop[last] < lengths[placed.item[last]]:
                assert placed.item[last + 1] == placed.item[last]
                assert placed.start[last + 1] == placed.stop[last]
                overflows += 1
        assert overflows > 0.5 * sequences

    def test_a_language_that_is_a_sequence_ahead_is_not_switched_to(self):
        """Its long documents come first: one by one with the other's, they would put it 475 tokens ahead."""
        lengths = np.array([length for pair in zip([40] * 50 + [2] * 50, [21] * 100) for length in pair])
        languages, sequences = np.arange(200) % 2, int(lengths.sum()) // 64
        lengths[-1] -= lengths.sum() - sequences * 64
        placed = LanguageMixer(lengths, languages, np.full(200, -1), 64, sequences, 1.0, itertools.repeat(0.0)).mix()
        tokens = np.where(languages[placed.item] == 0, placed.stop - placed.start, 0)
        share = lengths[::2].sum() / lengths.sum()
        ahead = np.cumsum(tokens) - share * np.cumsum(placed.stop - placed.start)
        assert 64 < ahead.max() <= 64 + 40 * (1 - share)

    def test_a_switch_is_to_the_language_that_is_furthest_behind(self):
        lengths, languages = np.full(240, 16), np.arange(240) % 3
        placed = LanguageMixer(lengths, languages, np.full(240, -1), 64, 60, 1.0, itertools.repeat(0.0)).mix()
        tokens = placed.stop - placed.start
        for language in range(3):
            ahead = np.cumsum(np.where(languages[placed.item] == language, tokens, 0) - tokens / 3)
            assert abs(ahead).max() <= 16

    def test_paired_isolated_is_the_same_text_with_documents_apart(self, two_languages):
        for xlda, paired in zip(
            items_of(SequencePlan(two_languages, 128, strategy="xlda", seed=3)),
            items_of(SequencePlan(two_languages, 128, strategy="paired-isolated", seed=3)),
        ):
            assert (xlda["input_ids"] == paired["input_ids"]).all()
            assert (xlda["language_ids"] == paired["language_ids"]).all()
            assert (xlda["labels"] == xlda["input_ids"]).all()
            assert xlda["position_ids"].tolist() == list(range(128))
            assert np.count_nonzero(paired["position_ids"] == 0) > 1

    def test_parallel_documents_stay_side_by_side(self, tmp_path, small_blocks):
        documents = {"pairs": lengths_of(300, 60, 0), "english": lengths_of(300, 60, 1)}
        languages = {"pairs": ["en", "th"], "english": ["en"]}
        corpus = packed_corpus(tmp_path / "pairs", documents, languages=languages)
        plan = SequencePlan(corpus, 128, strategy="xlda")
        beside = apart = 0
        for number in range(len(plan)):
            pieces = plan.pieces(number)
            placed = list(zip(pieces.source.tolist(), pieces.document.tolist()))
            for index, (source, document) in enumerate(placed):
                if source == 0:
                    beside += (0, document ^ 1) in placed[max(0, index - 1) : index + 2]
                    apart += (0, document ^ 1) not in placed[max(0, index - 1) : index + 2]
        assert beside > 3 * apart  # the others lie at a sequence's end, or are cut to hold two languages
        order = plan.orders[0]
        documents, _, _ = order.pieces(0, order.tokens)
        assert (documents[::2] ^ 1 == documents[1::2]).all()

    def test_one_language_is_refused(self, tmp_path):
        corpus = packed_corpus(tmp_path / "one", {"a": [50] * 50}, languages={"a": ["th"]})
        with pytest.raises(UserError, match="needs text of two languages or more; all of it is th"):
            SequencePlan(corpus, 64, strategy="xlda")

    def test_it_ends_where_one_language_is_left(self, tmp_path, small_blocks):
        mixture = {"en": {"weight": 1.0}, "th": {"weight": 1.0}}
        documents = {"en": [50] * 400, "th": [50] * 100}
        corpus = packed_corpus(tmp_path / "a", documents, mixture=mixture, when_dry="renormalize")
        plan = SequencePlan(corpus, 64, strategy="xlda")
        assert 2 * 5000 // 64 - 16 <= plan.sequences <= 2 * 5000 // 64 + 16
        assert sum(plan.tokens_seen(plan.sequences).values()) == plan.sequences * 64
        assert all(len(set(item["language_ids"].tolist())) == 2 for item in items_of(plan))
        assert SequencePlan(corpus, 64).sequences == -(-25_000 // 64)


class TestShares:
    def shares(self, corpus, weights, when_dry="error", epochs=1.0):
        sources = {name: SourceShare(weight, epochs) for name, weight in weights.items()}
        return Shares(sources, when_dry=when_dry)

    def test_hold_in_every_block(self, two_languages):
        shares = self.shares(two_languages, {"english": 3, "thai": 1}, epochs=3)
        plan = SequencePlan(two_languages, 128, shares=shares)
        for step in range(8, plan.sequences, 8):
            seen = plan.tokens_seen(step)
            assert seen["thai"] == pytest.approx(step * 128 / 4, abs=1)
            assert sum(seen.values()) == step * 128

    def test_tokens_seen_are_counted_ones(self, two_languages):
        shares = self.shares(two_languages, {"english": 1, "thai": 1})
        plan = SequencePlan(two_languages, 128, strategy="xlda", shares=shares)
        items = items_of(plan)
        for sequences in (0, 1, 7, 8, 9, 20, len(items)):
            counted = sum(np.bincount(item["language_ids"], minlength=2) for item in items[:sequences]) + np.zeros(2)
            assert list(plan.tokens_seen(sequences).values()) == counted.tolist()

    def test_a_source_that_runs_dry_is_said(self, two_languages):
        shares = self.shares(two_languages, {"english": 1, "thai": 1})
        plan = SequencePlan(two_languages, 128, shares=shares)
        thai = two_languages.sources[1].tokens
        assert plan.sequences == 2 * thai // 128
        with pytest.raises(UserError, match=f"lasts for {plan.sequences}; then thai is used up. Train for fewer"):
            plan.check_lasts(plan.sequences + 1)
        plan.check_lasts(plan.sequences)
        with pytest.raises(UserError, match=f"There is no sequence {plan.sequences}"):
            plan.pieces(plan.sequences)

    def test_renormalize_goes_on_with_the_others(self, two_languages):
        shares = self.shares(two_languages, {"english": 1, "thai": 1}, when_dry="renormalize")
        plan = SequencePlan(two_languages, 128, shares=shares)
        english, thai = (source.tokens for source in two_languages.sources)
        assert plan.sequences == -(-(english + thai) // 128)
        assert plan.tokens_seen(plan.sequences) == {"english": english, "thai": thai}
        half = plan.tokens_seen(2 * thai // 128 // 8 * 8)
        assert half["english"] == pytest.approx(half["thai"], abs=1)
        dry = plan.mixture.dry[0]
        assert plan.sources[dry.source].name == "thai"
        assert plan.tokens_seen(dry.sequence)["thai"] == thai
        assert plan.tokens_seen(dry.sequence - 16)["thai"] < thai

    @settings(max_examples=200, deadline=None)
    @given(
        limits=st.lists(st.integers(1, 5000), min_size=1, max_size=5),
        weights=st.none() | st.lists(st.floats(1e-6, 10), min_size=5, max_size=5),
        when_dry=st.sampled_from(["error", "renormalize"]),
        context=st.integers(8, 50),
        fill_last=st.booleans(),
        at_most=st.none() | st.integers(1, 60),
    )
    def test_blocks_follow_each_other_whatever_the_shares(self, limits, weights, when_dry, context, fill_last, at_most):
        weights = weights and weights[: len(limits)]
        whole = Mixture(limits, weights, context, 4, when_dry, fill_last)
        mixture = Mixture(limits, weights, context, 4, when_dry, fill_last, at_most)
        if at_most is not None:
            assert mixture.sequences == min(at_most, whole.sequences)
            assert [mixture.block(b) for b in range(mixture.blocks - 1)] == [
                whole.block(b) for b in range(mixture.blocks - 1)
            ]
        at, sequences = [0] * len(limits), 0
        for number in range(mixture.blocks):
            block = mixture.block(number)
            assert [start for start, _ in block.ranges] == at
            assert all(start <= stop for start, stop in block.ranges)
            tokens = sum(stop - start for start, stop in block.ranges)
            assert block.sequences == -(-tokens // context)
            assert tokens % context == 0 or number == mixture.blocks - 1
            assert mixture.place(sequences) == (number, 0)
            at = [stop for _, stop in block.ranges]
            sequences += block.sequences
        assert sequences == mixture.sequences
        assert [limit - end for limit, end in zip(limits, at)] == mixture.left
        assert min(mixture.left) >= 0
        if at_most is not None:
            return
        if weights is None or when_dry == "renormalize":
            assert sum(mixture.left) == (sum(limits) % context if fill_last else 0)
        elif sequences:
            for index, weight in enumerate(weights):
                # Which of the largest takes the rest is for shares in units of 2^-40 to say.
                tolerance = 1 if weight < max(weights) * (1 - 1e-9) else len(limits)
                assert at[index] == pytest.approx(sum(at) * weight / sum(weights), abs=tolerance + 1e-3)

    def test_a_source_that_is_used_up_to_its_last_token_is_not_dry(self):
        mixture = Mixture([105, 100], [1, 1], 10, 4, "error")
        assert (mixture.sequences, [each.source for each in mixture.dry]) == (20, [1])

    def test_equation_2(self):
        sizes = {"en": 900, "ko": 100}
        shares = language_shares(sizes, 0.25, {"en": 0.4, "ko": 0.6})
        assert shares == pytest.approx({"en": 0.25 * 0.9 + 0.75 * 0.4, "ko": 0.25 * 0.1 + 0.75 * 0.6})
        assert sum(shares.values()) == pytest.approx(1)
        assert language_shares(sizes, 1, {"en": 0, "ko": 1}) == pytest.approx({"en": 0.9, "ko": 0.1})

    def test_equation_2_shares_a_language_by_size(self, tmp_path, small_blocks):
        documents = {"wiki": [40] * 300, "web": [40] * 600, "thai": [40] * 300}
        languages = {"wiki": ["en"], "web": ["en"], "thai": ["th"]}
        corpus = packed_corpus(tmp_path / "a", documents, languages=languages)
        sources = {name: SourceShare(epochs=4) for name in documents}
        plan = SequencePlan(corpus, 64, shares=Shares(sources, 0.5, {"en": 0.2, "th": 0.8}))
        seen = plan.tokens_seen(160)
        english = 0.5 * 0.75 + 0.5 * 0.2
        total = 160 * 64
        assert list(seen.values()) == pytest.approx(
            [english / 3 * total, 2 * english / 3 * total, (1 - english) * total], abs=2
        )

    def test_equation_2_goes_by_the_languages_that_were_packed(self, tmp_path, small_blocks):
        """A mixture may call them otherwise, which its own check cannot see."""
        documents = {"english": [40] * 300, "pairs": [40] * 300}
        languages = {"english": ["en"], "pairs": ["en", "th"]}
        corpus = packed_corpus(tmp_path / "a", documents, languages=languages)
        shares = Shares({"english": SourceShare()}, 0.5, {"eng": 1.0})
        with pytest.raises(UserError, match=r"beta has eng; the text in .* was packed as en\. Give a share for each"):
            SequencePlan(corpus, 64, shares=shares)
        shares = Shares({name: SourceShare() for name in documents}, 0.5, {"en": 0.5, "th": 0.5})
        with pytest.raises(UserError, match="and pairs was packed with several"):
            SequencePlan(corpus, 64, shares=shares)

    def test_all_that_a_configuration_says_is_taken(self):
        first = {"name": "a", "text": "a.jsonl", "language": "th", "quality_column": "score", "keep_best": 0.5}
        first |= {"min_tokens": 2, "max_tokens": 9, "weight": 3, "epochs": 2.5}
        second = {"name": "b", "packed": "a", "weight": 1}
        given = corpus_config({"sources": [first, second], "when_dry": "renormalize"})
        assert Shares.configured(given) == Shares(
            {
                "a": SourceShare(3.0, 2.5, DocumentChoice(0.5, 2, 9)),
                "b": SourceShare(1.0, 1.0, DocumentChoice(), "a"),
            },
            when_dry="renormalize",
        )
        del first["weight"]
        given = corpus_config({"sources": [first], "alpha": 0.25, "beta": {"th": 1.0}})
        of_a = SourceShare(None, 2.5, DocumentChoice(0.5, 2, 9))
        assert Shares.configured(given) == Shares({"a": of_a}, 0.25, {"th": 1.0}, "error")

    def test_the_best_by_score(self, tmp_path, small_blocks):
        scores = np.random.default_rng(0).permutation(200).astype(float).tolist()
        corpus = packed_corpus(tmp_path / "a", {"a": [10] * 200}, quality={"a": scores})
        plan = SequencePlan(corpus, 20, shares=Shares({"a": SourceShare(choice=DocumentChoice(0.25))}))
        kept = {(id_ - 1) // 10 for id_ in ids_of(plan).tolist() if id_ != EOS}
        assert kept == set(np.argsort(scores)[-50:].tolist())
        plain = packed_corpus(tmp_path / "b", {"a": [10] * 20})
        with pytest.raises(UserError, match="The best 25% of a are asked for, but it was packed without scores"):
            SequencePlan(plain, 20, shares=Shares({"a": SourceShare(choice=DocumentChoice(0.25))}))

    def test_long_and_short_documents_of_one_packed_source(self, tmp_path, small_blocks):
        """Trillion-7B's context extension: so much of long documents, so much of short ones."""
        lengths = lengths_of(400, 300, 0)
        corpus = packed_corpus(tmp_path / "a", {"web": lengths, "pairs": lengths}, languages={"pairs": ["en", "th"]})
        config = corpus_config(
            {
                "sources": [
                    {"name": "web", "text": "a", "language": "en", "min_tokens": 65, "weight": 0.6},
                    {"name": "short", "packed": "web", "max_tokens": 64, "weight": 0.4},
                ],
            }
        )
        plan = SequencePlan(corpus, 128, shares=Shares.configured(config))
        seen = plan.tokens_seen(plan.sequences)
        assert seen["short"] / sum(seen.values()) == pytest.approx(0.4, abs=0.001)
        for number in range(len(plan)):
            pieces = plan.pieces(number)
            for source, document in zip(pieces.source.tolist(), pieces.document.tolist()):
                assert (lengths[document] > 64) == (plan.sources[source].name == "web")
        kept = SequencePlan(corpus, 128, shares=Shares({"pairs": SourceShare(choice=DocumentChoice(min_tokens=65))}))
        parts = [kept.pieces(number) for number in range(len(kept))]
        documents = {document for each in parts for document in each.document[each.source >= 0].tolist()}
        assert sorted(documents) == [d for d in range(400) if lengths[d // 2 * 2] > 64]
        few = packed_corpus(tmp_path / "b", {"a": [9, 10, 11] * 9})
        exact = SequencePlan(few, 10, shares=Shares({"a": SourceShare(choice=DocumentChoice(1.0, 10, 10))}))
        assert {d for n in range(len(exact)) for d in exact.pieces(n).document.tolist()} == {*range(1, 27, 3)}
        with pytest.raises(UserError, match="No document of the source web has from 1000 to any tokens"):
            SequencePlan(corpus, 128, shares=Shares({"web": SourceShare(choice=DocumentChoice(min_tokens=1000))}))

    def test_unknown_sources_and_values(self, two_languages):
        with pytest.raises(UserError, match=r"The source french is not in .*, which has english, thai"):
            SequencePlan(two_languages, 128, shares=Shares({"french": SourceShare()}))
        for arguments, message in [
            ({"strategy": "bfd"}, "The strategy is 'bfd'; expected one of isolated, concatenated, xlda, paired-"),
            ({"rho": 1.5}, "rho is 1.5"),
            ({"context": 1}, "The context is 1"),
            ({"context": 1_000_000, "strategy": "xlda"}, "not enough for one sequence"),
        ]:
            with pytest.raises(UserError, match=message):
                SequencePlan(two_languages, **{"context": 128} | arguments)


class TestAnnealing:
    def test_more_of_a_language_goes_on_where_it_was(self, two_languages):
        stable = Shares({"english": SourceShare(9, 2), "thai": SourceShare(1, 2)})
        annealing = Shares({"english": SourceShare(7, 2), "thai": SourceShare(3, 2)})
        plan = AnnealedPlan(two_languages, 128, annealing=annealing, begins=250, shares=stable)
        plain = SequencePlan(two_languages, 128, shares=stable)
        dataset, stable_dataset = PackedSequences(plan), PackedSequences(plain)
        for number in (0, 100, 247):  # the last block is smaller: what it holds of English has no gap
            assert (dataset[number]["input_ids"] == stable_dataset[number]["input_ids"]).all()
        seen = plan.tokens_seen(250)
        assert plan.identity()["annealing"]["starts"] == list(seen.values())
        assert seen["thai"] == pytest.approx(0.1 * 250 * 128, rel=0.2)
        later = plan.tokens_seen(306)
        assert later["thai"] - seen["thai"] == pytest.approx(0.3 * 56 * 128, rel=0.02)
        # Of the first epoch no token comes twice, whichever part it comes in.
        tokens = {source.name: source.tokens for source in two_languages.sources}
        ids = Counter(np.concatenate([dataset[number]["input_ids"] for number in range(306)]).tolist())
        english = [count for id_, count in ids.items() if 0 < id_ <= tokens["english"]]
        assert later["english"] < tokens["english"]
        assert max(english) == 1
        with pytest.raises(UserError, match="then thai is used up"):
            plan.check_lasts(plan.sequences + 1)

    def test_a_source_that_was_used_up_before_is_named(self, two_languages):
        stable = Shares({"english": SourceShare(1.0), "thai": SourceShare(1.0)})
        begins = SequencePlan(two_languages, 128, shares=stable).sequences
        with pytest.raises(UserError, match=r"not enough for one sequence .*; then thai is used up"):
            AnnealedPlan(two_languages, 128, annealing=stable, begins=begins, shares=stable)

    def test_fewer_epochs_than_were_used_leave_nothing(self, two_languages):
        stable = Shares({"english": SourceShare(epochs=2), "thai": SourceShare(epochs=2)}, when_dry="renormalize")
        after = Shares({"english": SourceShare(1.0, 3), "thai": SourceShare(1.0, 0.1)}, when_dry="renormalize")
        begins = SequencePlan(two_languages, 128, shares=stable).sequences - 1
        plan = AnnealedPlan(two_languages, 128, annealing=after, begins=begins, shares=stable)
        seen, end = plan.tokens_seen(begins), plan.tokens_seen(len(plan))
        assert end["thai"] == seen["thai"]
        assert end["english"] > seen["english"]

    def test_better_text_begins_anew(self, tmp_path, small_blocks):
        scores = np.arange(400.0).tolist()
        corpus = packed_corpus(tmp_path / "a", {"a": [10] * 400}, quality={"a": scores})
        shares = Shares({"a": SourceShare(1.0, choice=DocumentChoice(0.8))})
        annealing = Shares({"a": SourceShare(1.0, choice=DocumentChoice(0.2))})
        plan = AnnealedPlan(corpus, 20, annealing=annealing, begins=100, shares=shares)
        dataset = PackedSequences(plan)
        documents = [{(id_ - 1) // 10 for id_ in dataset[number]["input_ids"].tolist()} for number in range(140)]
        assert min(set.union(*documents[:100])) >= 80
        assert set.union(*documents[100:]) == set(range(320, 400))
        assert len(plan) == 140
        earlier = AnnealedPlan(corpus, 20, annealing=annealing, begins=99, shares=shares)
        with pytest.raises(UserError, match="begun with other data: begins was 100 and is 99"):
            check_same_plan(plan.identity(), earlier)

    def test_a_run_goes_on_only_with_the_same(self, two_languages):
        plan = SequencePlan(two_languages, 128)
        saved = json.loads(json.dumps(plan.identity()))
        check_same_plan(saved, plan)
        with pytest.raises(UserError, match=r"begun with other data: seed was 0 and is 1\. Its steps would see other"):
            check_same_plan(saved, SequencePlan(two_languages, 128, seed=1))

    def test_nor_with_other_documents_of_as_many_tokens(self, tmp_path, small_blocks):
        first, second = (
            SequencePlan(packed_corpus(tmp_path / name, {"a": lengths}), 16)
            for name, lengths in (("one", [5, 9, 30]), ("two", [9, 5, 30]))
        )
        with pytest.raises(
            UserError, match=r"begun with other data: content_sha256 was \"\w{64}\" and is \"\w{64}\"\. "
        ):
            check_same_plan(first.identity(), second)

    def test_nor_with_the_names_of_two_sources_exchanged(self, tmp_path, small_blocks):
        """They decide the order of the documents, and here as many tokens are under each."""
        first, second = (
            SequencePlan(packed_corpus(tmp_path / names, dict(zip(names, ([5, 9, 30], [30, 9, 5])))), 16)
            for names in ("ab", "ba")
        )
        with pytest.raises(UserError, match="content_sha256 was"):
            check_same_plan(first.identity(), second)


class TestPlaces:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_a_sequence_is_a_function_of_its_number(self, two_languages, strategy):
        plan = SequencePlan(two_languages, 128, strategy=strategy)
        in_order = [item["input_ids"].tolist() for item in items_of(plan)]
        anew = PackedSequences(SequencePlan(two_languages, 128, strategy=strategy))
        for number in np.random.default_rng(0).permutation(len(in_order))[:40].tolist():
            assert anew[number]["input_ids"].tolist() == in_order[number]
        other = PackedSequences(SequencePlan(two_languages, 128, strategy=strategy, seed=1))
        assert other[0]["input_ids"].tolist() != in_order[0]

    def test_the_same_in_any_version_of_numpy(self, two_languages):
        """Recorded: a run that goes on elsewhere must find the same sequences."""
        found = {}
        for strategy in ("isolated", "concatenated", "xlda"):
            ids = ids_of(SequencePlan(two_languages, 128, strategy=strategy, seed=7))
            found[strategy] = blake2b(ids.astype("<i8").tobytes(), digest_size=4).hexdigest()
        assert found == {"isolated": "2b43bf56", "concatenated": "55233c7f", "xlda": "0d84b3ae"}

    def test_ranks_share_the_global_order(self, two_languages):
        """Accelerate deals the batches of a sequential sampler out, so a step has the same sequences on any ranks."""
        dataset = PackedSequences(SequencePlan(two_languages, 128))
        batch = 8
        for ranks in (1, 2, 4):
            per_device = 2
            accumulation = batch // ranks // per_device
            sampler = BatchSampler(SequentialSampler(dataset), per_device, drop_last=True)
            of_rank = [list(BatchSamplerShard(sampler, ranks, rank)) for rank in range(ranks)]
            for step in range(len(dataset) // batch):
                numbers = [
                    number
                    for batches in of_rank
                    for micro in batches[step * accumulation : (step + 1) * accumulation]
                    for number in micro
                ]
                assert sorted(numbers) == list(range(step * batch, (step + 1) * batch))

    def test_loader_processes_map_the_shards_themselves(self, two_languages):
        dataset = PackedSequences(SequencePlan(two_languages, 128))
        expected = [dataset[number]["input_ids"].tolist() for number in range(len(dataset))][:8]
        mapped = sum(values.nbytes for source in dataset.plan.sources for values in source._maps.values())
        assert len(pickle.dumps(dataset)) < mapped / 2
        (batch, *_) = DataLoader(dataset, 8, num_workers=1, multiprocessing_context="fork")
        assert batch["input_ids"].tolist() == expected

    def test_an_id_that_the_tokenizer_has_not(self, two_languages):
        item = PackedSequences(SequencePlan(two_languages, 128))[0]
        highest = int(item["input_ids"].max())
        two_languages.tokenizer["vocabulary"] = highest + 1
        assert (PackedSequences(SequencePlan(two_languages, 128))[0]["input_ids"] == item["input_ids"]).all()
        two_languages.tokenizer["vocabulary"] = highest
        with pytest.raises(UserError, match=f"it has the id {highest:,}, and the tokenizer has {highest:,}"):
            PackedSequences(SequencePlan(two_languages, 128))[0]

    def test_identity_changes_with_whatever_changes_sequences(self, two_languages):
        base = SequencePlan(two_languages, 128, strategy="xlda").identity()
        assert base == SequencePlan(two_languages, 128, strategy="xlda").identity()
        weights = Shares({"english": SourceShare(1.0), "thai": SourceShare(2.0)})
        for changed in ({"seed": 1}, {"rho": 0.25}, {"context": 64}, {"strategy": "isolated"}, {"shares": weights}):
            arguments = {"context": 128, "strategy": "xlda"} | changed
            assert SequencePlan(two_languages, **arguments).identity() != base
        isolated = [SequencePlan(two_languages, 128, rho=rho).identity() for rho in (0.25, 0.5)]
        assert isolated[0] == isolated[1]  # it has no effect there
