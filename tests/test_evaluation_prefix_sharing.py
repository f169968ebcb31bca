# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods with shared prefixes are lm-eval's."""

import random
from collections.abc import Callable

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import MistralConfig, MistralForCausalLM

from jai.errors import UserError
from jai.evaluation.fitting import is_too_long
from jai.evaluation.prefix_sharing import PrefixSharingLM, PrefixTree, _batches, _can_share, _Row, _rows

PASSAGES = ("แมวนอนอยู่บนเก้าอี้ในบ้าน ส่วนหมาวิ่งเล่นอยู่ในสวน", "The quick brown fox jumps over the lazy dog.")
QUESTIONS = ("ใครนอน", "Who jumps?", "ราคา 1,250 บาท")
CHOICES = (" แมว", " หมาวิ่งเล่น", " the fox", " ก", " ข")


def instances(pairs):
    return [Instance("loglikelihood", {}, pair, index, ("task", index, 1)) for index, pair in enumerate(pairs)]


def requests():
    """Choices of questions on passages after examples, and what lies at the edges."""
    pairs = [
        (f"ตัวอย่าง one two\n\n{passage}\n{question}\nคำตอบ:", choice)
        for passage in PASSAGES
        for question in QUESTIONS
        for choice in CHOICES
    ]
    pairs += [("", "แมว"), ("", "the fox"), ("the quick ", "fox"), ("a", "b"), (pairs[0][0], pairs[0][1])]
    pairs += [("แมวนอนอยู่บน " * 20, " เก้าอี้"), ("แมวนอนอยู่บน " * 20, " สวน")]  # longer than the model takes
    random.Random(0).shuffle(pairs)
    return instances(pairs)


@pytest.fixture(scope="module")
def model(tiny_model: Callable, tiny_tokenizer) -> torch.nn.Module:
    return tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=128)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_those_of_lm_eval(model, tiny_tokenizer, batch_size):
    options = {"pretrained": model, "tokenizer": tiny_tokenizer, "batch_size": batch_size, "backend": "causal"}
    theirs = HFLM(**options).loglikelihood(requests(), disable_tqdm=True)
    ours = PrefixSharingLM(**options)
    answers = ours.loglikelihood(requests(), disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in theirs]
    assert [value for value, _ in answers] == pytest.approx([value for value, _ in theirs], abs=2e-4)
    assert sum(is_too_long(ours, request) for request in requests()) == 2


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("", r"A choice is empty, so it has no likelihood: '' after 'Who jumps\?'"),
        ("แมว " * 90, "A choice has .* tokens"),
    ],
)
def test_what_cannot_be_scored_is_named(model, tiny_tokenizer, choice, message):
    ours = PrefixSharingLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=4, backend="causal")
    with pytest.raises(UserError, match=message):
        ours.loglikelihood(instances([("Who jumps?", " the fox"), ("Who jumps?", choice)]), disable_tqdm=True)


def test_what_sequences_share_is_encoded_once(model, tiny_tokenizer):
    """By the tokens that go into the model."""
    pairs = [(f"{PASSAGES[0]}\n{question}", choice) for question in QUESTIONS for choice in CHOICES[:4]]

    def tokens_of(kind):
        counts = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: counts.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True
        )
        lm = kind(pretrained=model, tokenizer=tiny_tokenizer, batch_size=4, backend="causal")
        lm.loglikelihood(instances(pairs), disable_tqdm=True)
        hook.remove()
        return sum(counts)

    assert tokens_of(PrefixSharingLM) < 0.5 * tokens_of(HFLM)


def test_a_tree_lets_tokens_see_their_own_sequence():
    tree = PrefixTree()
    first = tree.add([5, 6, 7], [])
    second = tree.add([5, 6, 8, 9], first[:2])
    assert (tree.tokens, tree.depths) == ([5, 6, 7, 8, 9], [0, 1, 2, 2, 3])
    assert second == [0, 1, 3, 4]
    assert tree.mask().int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_rows_hold_what_is_alike_and_no_more_than_fits():
    def packed(sequences, longest):
        return [[index for index, _ in row.paths] for row in _rows(sequences, longest)]

    same = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 6]]
    assert packed(same, 6) == [[0, 1, 2]]
    assert packed(same, 5) == [[0, 1], [2]]
    assert packed([[1, 2, 3, 4], [1, 9, 9, 9], [1, 9, 9, 9, 9, 9]], 99) == [[0, 1, 2]]  # a quarter is alike
    assert packed([[1, 2, 3, 4], [1, 9, 9, 9, 9]], 99) == [[0], [1]]
    assert packed([[1, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 5]], 99) == [[0, 2], [1]]  # whatever their order was


def test_rows_of_a_like_length_are_computed_together_up_to_so_many_tokens():
    rows = [_Row(PrefixTree([0] * length)) for length in (2, 8, 3, 4, 1)]
    lengths = [[len(row.tree.tokens) for row in batch] for batch in _batches(rows, 9)]
    assert lengths == [[8], [4, 3], [2, 1]]


def test_lm_evals_cache_and_precision_of_the_softmax_are_kept(model, tiny_tokenizer):
    ours = PrefixSharingLM(
        pretrained=model, tokenizer=tiny_tokenizer, batch_size=4, backend="causal", softmax_dtype="float64"
    )
    cached = []
    ours.cache_hook.add_partial = lambda *each: cached.append(each)
    pairs = [("Who jumps?", " the fox"), ("Who jumps?", " ก")]
    answers = ours.loglikelihood(instances(pairs), disable_tqdm=True)
    assert cached == [("loglikelihood", pair, answer) for pair, answer in zip(pairs, answers)]
    assert any(value != torch.tensor(value, dtype=torch.float32).item() for value, _ in answers)


def test_a_model_with_chunked_attention_gets_lm_evals_loop(model, monkeypatch):
    assert _can_share(model)
    monkeypatch.setattr(model.config, "attention_chunk_size", 8, raising=False)
    assert not _can_share(model)


def test_a_model_with_a_window_gets_lm_evals_loop(tiny_tokenizer):
    """A mask of ours would take the place of its window."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    model = MistralForCausalLM(config).eval()
    options = {"pretrained": model, "tokenizer": tiny_tokenizer, "batch_size": 3, "backend": "causal"}
    theirs = HFLM(**options).loglikelihood(requests(), disable_tqdm=True)
    assert PrefixSharingLM(**options).loglikelihood(requests(), disable_tqdm=True) == theirs
