# SPDX-License-Identifier: Apache-2.0
"""What merges are learned inside of: runs of a script, words, or character clusters."""

from collections import Counter
from collections.abc import Iterable
from typing import Literal, get_args

import regex

from jai.errors import UserError

Unit = Literal["run", "word", "cluster"]
UNITS: tuple[str, ...] = get_args(Unit)
SPACE = "▁"

# A vowel that is written before its consonant, a letter, its marks, and the vowels that are written after it (Thai and
# Lao, which have their vowels in this order; elsewhere it is a letter and its marks).
_CLUSTER = regex.compile(
    r"\p{Logical_Order_Exception}?[^\p{M}\p{Logical_Order_Exception}]\p{M}*[\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3]*"
)


def script_runs(script: str) -> regex.Pattern:
    """The pattern of a run of the script's characters, with the space before it, written `▁`, if there is one.

    Raises:
        UserError: if Unicode has no such script.
    """
    try:
        if not regex.fullmatch(r"[A-Za-z][A-Za-z_ -]*", script):  # a brace would be read as more of the pattern
            raise regex.error("no name")
        return regex.compile(rf"{SPACE}?\p{{Script={script}}}+")
    except (regex.error, OverflowError) as error:
        raise UserError(
            f"{script!r} is not a script that Unicode knows. Give a name such as Thai, Lao, Khmer or Myanmar."
        ) from error


def check_script(script: str, unit: str) -> None:
    """Refuse a script that Unicode does not know, and a unit that there is not, or not of this script.

    Raises:
        UserError: saying what there is.
    """
    script_runs(script)
    if unit not in UNITS:
        raise UserError(f"unit is {unit!r}. Give one of {', '.join(UNITS)}.")
    if unit == "word" and script.casefold() != "thai":
        raise UserError(f"unit word cuts Thai words only, but the script is {script}. Give run or cluster.")


def count_runs(texts: Iterable[str], script: str) -> Counter[str]:
    """How often each run of the script occurs in the texts, with the space before it."""
    runs = script_runs(script)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(runs.findall(SPACE + text.replace(" ", SPACE)))
    return counts


def clusters(run: str) -> list[str]:
    """Cut a run into character clusters: a letter with all that cannot stand without it (Thai: TCC).

    A leading space, and marks or vowels that follow nothing, stand alone.
    """
    return regex.findall(rf"{SPACE}|{_CLUSTER.pattern}|.", run)


def split_runs_into_words(run_counts: Counter[str]) -> Counter[str]:
    """How often each Thai word occurs, each run cut by PyThaiNLP's newmm; a space stays with the word after it."""
    counts: Counter[str] = Counter()
    from concurrent.futures import ProcessPoolExecutor  # here, for `jai --help` needs none

    with ProcessPoolExecutor() as pool:
        for words, count in zip(pool.map(_words, run_counts, chunksize=2_000), run_counts.values()):
            for word in words:
                counts[word] += count
    return counts


def _words(run: str) -> list[str]:
    from pythainlp.tokenize import newmm  # half a second, which only this unit needs

    words = newmm.segment(run.removeprefix(SPACE))
    return [SPACE + words[0], *words[1:]] if run.startswith(SPACE) else words
