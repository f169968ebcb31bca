# SPDX-License-Identifier: Apache-2.0
"""Translation into Thai, by BLEU over words (Papineni et al., 2002)."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jai.evaluation.text import plain_text, split_thought


def thai_translation_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """BLEU of a sentence from 0 to 1, for lm-eval's `process_results`; what the reply thought is no part of it."""
    return {"sentence_bleu": sentence_bleu(split_thought(results[0]).answer, doc["th"])}


def sentence_bleu(translation: str, reference: str) -> float:
    """sacrebleu's BLEU of a sentence (exponential smoothing, and no longer n-grams than the sentence has words).

    Words are PyThaiNLP's newmm: Thai has no spaces between them, and sacrebleu's own tokenizers would take a phrase for
    one. Look-alikes and spaces make no difference.
    """
    if not (words := _words(translation)):
        return 0.0
    return float(_bleu().sentence_score(words, [_words(reference)]).score / 100)


def _words(text: str) -> str:
    from pythainlp.tokenize import word_tokenize

    return " ".join(word_tokenize(plain_text(text).strip(), keep_whitespace=False))


@cache
def _bleu() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize="none", effective_order=True)
