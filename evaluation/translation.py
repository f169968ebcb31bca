# SPDX-License-Identifier: Apache-2.0
"""Translation into Thai, by BLEU of a whole text over words (Papineni et al., 2002), as sacrebleu computes it."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jai.evaluation.text import plain_text, split_thought

BLEU_COUNTS = "bleu_counts"  # beside "score" in what lm-eval takes for a score of one item


def thai_translation_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A sentence's BLEU from 0 to 1, and what BLEU counts, for lm-eval's `process_results`; without the thought."""
    counts = bleu_counts(split_thought(results[0]).answer, doc["th"])
    return {"bleu": {"score": sentence_bleu(counts), BLEU_COUNTS: [*counts]}}


def bleu_of_scores(scores: Sequence[Mapping[str, Any]]) -> float:
    """BLEU of the whole text, for lm-eval's `aggregation`."""
    return corpus_bleu([sum(column) for column in zip(*(score[BLEU_COUNTS] for score in scores))])


def bleu_counts(translation: str, reference: str) -> tuple[int, ...]:
    """What sacrebleu counts of a sentence: matching n-grams, all n-grams (orders 1 to 4), words of both texts.

    Words are PyThaiNLP's newmm: Thai has no spaces between them, and sacrebleu's own tokenizers would take a phrase for
    one. Look-alikes and spaces make no difference.
    """
    found = _bleu().sentence_score(_words(translation), [_words(reference)])
    return (*found.counts, *found.totals, found.sys_len, found.ref_len)


def corpus_bleu(sums: Sequence[float]) -> float:
    """sacrebleu's BLEU of a text, from 0 to 1, of the sums of what is counted of its sentences."""
    return _bleu_of(sums, effective_order=False)


def sentence_bleu(counts: Sequence[float]) -> float:
    """sacrebleu's BLEU of a sentence: no longer n-grams than it has words."""
    return _bleu_of(counts, effective_order=True)


def _bleu_of(sums: Sequence[float], *, effective_order: bool) -> float:
    counts = [round(each) for each in sums]  # which they are, whatever their type
    bleu = _bleu().compute_bleu(
        counts[:4], counts[4:8], *counts[8:], smooth_method="exp", effective_order=effective_order
    )
    return float(bleu.score / 100)


def _words(text: str) -> str:
    from pythainlp.tokenize import word_tokenize

    return " ".join(word_tokenize(plain_text(text).strip(), keep_whitespace=False))


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="none", effective_order=True)
