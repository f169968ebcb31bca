# SPDX-License-Identifier: Apache-2.0
"""The checks: whether a text follows an instruction of a type. A check's keyword arguments are the type's in the data.

`ENGLISH` has the 25 types of IFEval and agrees with lm-eval's implementation but in two things: keywords are words,
where lm-eval reads them as regular expressions; and what lm-eval draws at random (an argument that is 0, missing or out
of range, such as a letter that is none of a to z) is here what the row says, or an error.

`THAI` has the 22 of them that have a meaning in Thai, which has no letter case, and two that SEA-IFEval adds.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from jai.evaluation.instructions.counting import (
    detect_language,
    english_sentences,
    english_tokens,
    split_english_words,
    split_thai_words,
    thai_occurrences,
    thai_positions,
    thai_sentences,
)
from jai.evaluation.text import plain_text, with_ascii_digits

Relation = Literal["less than", "at least", "exactly"]
Check = Callable[..., bool]


@dataclass(frozen=True)
class InstructionSet:
    """The types of instructions of a language.

    Attributes:
        language: "en" or "th".
        checks: by the names of their types.
        renamed: arguments that some data calls by another name.
        normalize: is applied to texts and arguments before the check.
    """

    language: str
    checks: Mapping[str, Check]
    renamed: Mapping[str, str] = field(default_factory=dict)
    normalize: Callable[[str], str] = str


def _compare(count: int, relation: Relation, threshold: int) -> bool:
    return {"less than": count < threshold, "at least": count >= threshold, "exactly": count == threshold}[relation]


# --- Both languages ---


def _has_placeholders(text: str, *, num_placeholders: int) -> bool:
    """Each `[…]` in a line is one."""
    closed = text.split("]")[:-1]  # `\[.*?\]` would look for the end of each bracket anew
    return sum("[" in part.rpartition("\n")[2] for part in closed) >= num_placeholders


def _has_postscript(text: str, *, postscript_marker: str) -> bool:
    """The marker, with or without spaces after its full stops. The last one of P.P.S may be missing."""
    marker = postscript_marker.strip().lower()
    if marker == "p.p.s":
        pattern = r"p\.\s?p\.\s?s"
    else:
        pattern = r"\.\s?".join(re.escape(part) for part in marker.removesuffix(".").split("."))
        pattern += r"\." if marker.endswith(".") else ""
    return re.search(pattern, text.lower()) is not None


def _has_bullets(text: str, *, num_bullets: int) -> bool:
    with_stars = re.findall(r"^[^\S\n]*\*[^\*].*$", text, re.MULTILINE)
    with_dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(with_stars) + len(with_dashes) == num_bullets


def _has_highlights(text: str, *, num_highlights: int) -> bool:
    single = [each for each in re.findall(r"\*[^\n\*]*\*", text) if each.strip("*").strip()]
    double = [each for each in re.findall(r"\*\*[^\n\*]*\*\*", text) if each[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _has_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)) >= num_sections


def _has_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Paragraphs with `***` between them: none is blank, but for what stands before the first and after the last."""
    paragraphs = re.split(r"\s?\*\*\*\s?", text)
    blank = [number for number, each in enumerate(paragraphs) if not each.strip()]
    if any(number not in (0, len(paragraphs) - 1) for number in blank):
        return False
    return len(paragraphs) - len(blank) == num_paragraphs


def _is_json(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(text: str) -> bool:
    return any(_title(line) for line in text.split("\n"))


def _title(line: str) -> str:
    """What stands between the first `<<` and the last `>>` of a line."""
    begin, end = line.find("<<"), line.rfind(">>")
    return line[begin : end + 2].lstrip("<").rstrip(">").strip() if 0 <= begin < end - 2 else ""


def _has_two_responses(text: str) -> bool:
    """Two different texts with `******` between them."""
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    responses = [part for part in parts if part]
    return len(responses) == 2 and responses[0] != responses[1]


def _repeats_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(text: str, *, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _is_quoted(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


def _has_no_comma(text: str) -> bool:
    return "," not in text


def _has_letter(text: str, *, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return _compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _paragraph_begins(
    text: str,
    begins: Callable[[str, str], bool],
    *,
    num_paragraphs: int,
    nth_paragraph: int,
    first_word: str,
) -> bool:
    """Paragraphs with an empty line between them; the nth is counted with blank ones, as IFEval does."""
    paragraphs = text.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if count != num_paragraphs or not 1 <= nth_paragraph <= count:
        return False
    return begins(paragraphs[nth_paragraph - 1].strip(), first_word)


# --- English ---


def _has_english_option(text: str) -> bool:
    return any(option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def _has_words(text: str, *, num_words: int, relation: Relation) -> bool:
    return _compare(len(split_english_words(text)), relation, num_words)


def _has_sentences(text: str, *, num_sentences: int, relation: Relation) -> bool:
    return _compare(len(english_sentences(text)), relation, num_sentences)


def _has_keywords(text: str, *, keywords: list[str]) -> bool:
    return all(_count(keyword, text) for keyword in keywords)


def _has_keyword(text: str, *, keyword: str, frequency: int, relation: Relation) -> bool:
    return _compare(_count(keyword.strip(), text), relation, frequency)


def _count(keyword: str, text: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))


def _has_none_of(text: str, *, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _is_in_language(text: str, *, language: str) -> bool:
    return detect_language(text) in (language, None)


def _is_in_english_capitals(text: str) -> bool:
    return text.isupper() and _is_in_language(text, language="en")


def _is_in_english_lower_case(text: str) -> bool:
    return text.islower() and _is_in_language(text, language="en")


def _has_capital_words(text: str, *, capital_frequency: int, capital_relation: Relation) -> bool:
    return _compare(sum(token.isupper() for token in english_tokens(text)), capital_relation, capital_frequency)


def _english_paragraph_begins(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    def begins(paragraph: str, word: str) -> bool:
        first = paragraph.split()[0].lstrip("'").lstrip('"') if paragraph else ""
        return re.split("""[.,?!'"]""", first)[0].lower() == word.lower()

    return _paragraph_begins(
        text, begins, num_paragraphs=num_paragraphs, nth_paragraph=nth_paragraph, first_word=first_word
    )


# --- Thai ---

_THAI_OPTION = re.compile(
    r"คำตอบของฉันคือ(?:ใช่|ไม่|อาจจะ)(?:นะ)?(?:ครับ|ค่ะ|คะ)?(?![\u0e00-\u0e7f])"  # ไม่ใช่ is another answer
)


def _has_thai_option(text: str) -> bool:
    return _THAI_OPTION.search(text) is not None


def _has_thai_words(text: str, *, num_words: int, relation: Relation) -> bool:
    return _compare(len(split_thai_words(text)), relation, num_words)


def _has_thai_sentences(text: str, *, num_sentences: int, relation: Relation, divider: str | None = None) -> bool:
    """Sentences by PyThaiNLP; where the prompt asks for a divider between them, what stands between dividers."""
    sentences = [each for each in text.split(divider) if each.strip()] if divider else thai_sentences(text)
    return _compare(len(sentences), relation, num_sentences)


def _has_thai_keywords(text: str, *, keywords: list[str]) -> bool:
    return all(thai_occurrences(keyword, text) for keyword in keywords)


def _has_thai_keyword(text: str, *, keyword: str, frequency: int, relation: Relation) -> bool:
    return _compare(thai_occurrences(keyword.strip(), text), relation, frequency)


def _has_no_thai_word_of(text: str, *, forbidden_words: list[str]) -> bool:
    return not any(thai_occurrences(word, text) for word in forbidden_words)


def _has_number(text: str, *, number: str, frequency: int, relation: Relation) -> bool:
    """A number by itself, in the digits of any script: 3 stands neither in 30 nor in 3.5."""
    alone = rf"(?<!\d)(?<!\d[.,]){re.escape(with_ascii_digits(number.strip()))}(?![.,]?\d)"
    return _compare(len(re.findall(alone, with_ascii_digits(text))), relation, frequency)


def _begins_with_thai_word(text: str, first_word: str) -> bool:
    return 0 in thai_positions(first_word.strip(), text.strip().lstrip("\"'“‘"))


def _begins_with_word(text: str, *, first_word: str) -> bool:
    return _begins_with_thai_word(text, first_word)


def _thai_paragraph_begins(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    return _paragraph_begins(
        text, _begins_with_thai_word, num_paragraphs=num_paragraphs, nth_paragraph=nth_paragraph, first_word=first_word
    )


def _is_certainly_in_language(text: str, *, language: str) -> bool:
    """Unlike in English, a text of which there is no telling, such as a number, does not follow."""
    return detect_language(text) == language


def _is_quoted_either_way(text: str) -> bool:
    return _is_quoted(text.strip().replace("“", '"').replace("”", '"'))


# --- The types ---

_IN_BOTH: Mapping[str, Check] = {
    "length_constraints:number_paragraphs": _has_paragraphs,
    "detectable_content:number_placeholders": _has_placeholders,
    "detectable_content:postscript": _has_postscript,
    "detectable_format:number_bullet_lists": _has_bullets,
    "detectable_format:number_highlighted_sections": _has_highlights,
    "detectable_format:multiple_sections": _has_sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _has_title,
    "combination:two_responses": _has_two_responses,
    "combination:repeat_prompt": _repeats_prompt,
    "keywords:letter_frequency": _has_letter,
    "startend:end_checker": _ends_with,
    "punctuation:no_comma": _has_no_comma,
}
ENGLISH = InstructionSet(
    "en",
    {
        **_IN_BOTH,
        "keywords:existence": _has_keywords,
        "keywords:frequency": _has_keyword,
        "keywords:forbidden_words": _has_none_of,
        "language:response_language": _is_in_language,
        "length_constraints:number_sentences": _has_sentences,
        "length_constraints:number_words": _has_words,
        "length_constraints:nth_paragraph_first_word": _english_paragraph_begins,
        "detectable_format:constrained_response": _has_english_option,
        "startend:quotation": _is_quoted,
        "change_case:capital_word_frequency": _has_capital_words,
        "change_case:english_capital": _is_in_english_capitals,
        "change_case:english_lowercase": _is_in_english_lower_case,
    },
)
THAI = InstructionSet(
    "th",
    {
        **_IN_BOTH,
        "keywords:existence": _has_thai_keywords,
        "keywords:frequency": _has_thai_keyword,
        "keywords:forbidden_words": _has_no_thai_word_of,
        "keywords:number_frequency": _has_number,
        "language:response_language": _is_certainly_in_language,
        "length_constraints:number_sentences": _has_thai_sentences,
        "length_constraints:number_words": _has_thai_words,
        "length_constraints:nth_paragraph_first_word": _thai_paragraph_begins,
        "detectable_format:constrained_response": _has_thai_option,
        "startend:first_word": _begins_with_word,
        "startend:quotation": _is_quoted_either_way,
    },
    renamed={"section_title": "section_spliter", "response_language": "language"},
    normalize=plain_text,
)
INSTRUCTION_SETS: Mapping[str, InstructionSet] = {each.language: each for each in (ENGLISH, THAI)}
