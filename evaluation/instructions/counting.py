# SPDX-License-Identifier: Apache-2.0
"""Words, sentences and occurrences, in English and in Thai; and which language a text is in.

English is counted as IFEval counts it: words by `\\w+`, sentences by the Punkt algorithm, the language by langdetect.
Punkt's trained parameters must be downloaded, so a list of abbreviations of ours stands in for them: every machine
counts the same, but a sentence that ends in an abbreviation, such as "etc.", may be counted with the next one.

Thai is counted by PyThaiNLP: words by newmm, sentences by thaisum's rules, both over its dictionary.
"""

import re
from bisect import bisect_right
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import regex

from jai.errors import UserError

# Abbreviations that a sentence seldom ends with, as Punkt has them: in lower case, without the last full stop.
_ABBREVIATIONS = """
mr mrs ms messrs dr prof rev hon gen col maj capt cpt lt sgt sen rep gov pres supt st ft mt jr sr esq ph.d m.d b.a m.a
b.sc m.sc vs v al cf e.g i.e viz approx ca no nos vol vols fig figs sec ch pp p ed eds inc ltd co corp bros dept univ
assn ave blvd rd apt u.s u.k u.n d.c a.m p.m jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs
fri sat sun
"""
ABBREVIATIONS = frozenset(_ABBREVIATIONS.split())


def split_english_words(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return regex.findall(r"\w+", text)  # as NLTK reads it: vowel signs belong to their words


def english_sentences(text: str) -> list[str]:
    """Sentences by the Punkt algorithm, with `ABBREVIATIONS`."""
    return _punkt().tokenize(text)


def english_tokens(text: str) -> list[str]:
    """Words and signs as the Penn Treebank cuts them: a hyphenated word is one, and U.S.A. too."""
    return [token for sentence in english_sentences(text) for token in _treebank().tokenize(sentence)]


@cache
def _punkt() -> Any:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(ABBREVIATIONS)
    return PunktSentenceTokenizer(parameters)


@cache
def _treebank() -> Any:
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


# Four letters before a full stop: shorter are abbreviations, such as พ.ศ. and กทม.
_THAI_SENTENCE_END = re.compile(r"\n|(?<=[!?])\s|(?<=[\u0e00-\u0e7f]{4}\.)\s")


def split_thai_words(text: str) -> list[str]:
    """Words of the text, whatever their script; signs and spaces are none. ๆ is one: it is read as a word."""
    return [token for token in _thai_tokens(text) if any(each.isalnum() for each in token)]


def thai_sentences(text: str) -> list[str]:
    """Sentences by PyThaiNLP's thaisum, whose rules need no model; lines, and signs that end sentences, end one too."""
    from pythainlp.tokenize import sent_tokenize

    parts = (part for part in _THAI_SENTENCE_END.split(text) if part.strip())
    sentences = (sentence for part in parts for sentence in sent_tokenize(part, engine="thaisum"))
    return [sentence for sentence in map(str, sentences) if split_thai_words(sentence)]  # typed as strings or lists


def thai_occurrences(phrase: str, text: str) -> int:
    """How often a phrase stands in a text as words.

    มา does not stand in มาก, but ฆ่า stands in ฆ่าตัวตาย: where it is part of a word of the dictionary, what is left of
    that word must be words of the dictionary too. Letter case is ignored.
    """
    return len(thai_positions(phrase, text))


def thai_positions(phrase: str, text: str) -> list[int]:
    """Where a phrase stands in a text as words, as `thai_occurrences` counts them."""
    tokens = _thai_tokens(text)
    begins = list(accumulate(map(len, tokens), initial=0))

    def is_between_words(position: int) -> bool:
        token = bisect_right(begins, position) - 1
        return begins[token] == position or _may_be_cut(tokens[token], position - begins[token])

    found = re.finditer(re.escape(phrase), text, re.IGNORECASE)
    return [match.start() for match in found if is_between_words(match.start()) and is_between_words(match.end())]


def _may_be_cut(token: str, position: int) -> bool:
    if token[position - 1].isascii() and token[position].isascii():
        return not (token[position - 1].isalnum() and token[position].isalnum())
    if token[position] == "ๆ":
        return True
    if regex.match(r"\p{M}|[ะาำ]", token[position]) or token[position - 1] in "เแโใไ":
        return False  # inside a syllable
    dictionary = _thai_dictionary()
    if token not in dictionary:
        return True
    return all(part in dictionary for part in _thai_tokens(token[:position]) + _thai_tokens(token[position:]))


@lru_cache(maxsize=64)  # the eight texts of a loose verdict are counted for each instruction
def _thai_tokens(text: str) -> list[str]:
    from pythainlp.tokenize import word_tokenize

    return word_tokenize(text, engine="newmm", join_broken_num=False)


@cache
def _thai_dictionary() -> frozenset[str]:
    from pythainlp.corpus import thai_words as dictionary

    return frozenset(dictionary())


# --- Languages ---

# Of languages that alone are written in a script, where langdetect does not know them.
_SCRIPTS = {"my": "Myanmar", "lo": "Lao", "km": "Khmer"}


def detect_language(text: str) -> str | None:
    """The language of a text ("en", "th", "zh-cn", …) by langdetect or by its script; None where there is no telling.

    langdetect draws numbers, here always the same ones.
    """
    letters = regex.findall(r"\p{L}", text)
    for code, script in _SCRIPTS.items():
        if len(regex.findall(rf"(?=\p{{L}})\p{{Script={script}}}", text)) * 2 > len(letters):
            return code
    from langdetect import LangDetectException

    detector = _language_profiles().create()
    try:
        detector.append(text)
        return detector.detect()
    except LangDetectException:
        return None


def check_language_code(code: str) -> None:
    """Refuse a language that cannot be told.

    Raises:
        UserError: listing those that can.
    """
    known = [*_language_profiles().get_lang_list(), *_SCRIPTS]
    if code not in known:
        raise UserError(f"The language {code!r} cannot be detected; expected one of {', '.join(sorted(known))}.")


@cache
def _language_profiles() -> Any:
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.seed = 0
    return factory
