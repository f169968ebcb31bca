# SPDX-License-Identifier: Apache-2.0
"""The demo's questions and answers, in Thai and English. Every answer is short and can be checked."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from jai.demo.text import lexicon as lex

Message = dict[str, str]
# Thai questions, their Thai answer, English questions, their English answer.
Fact = tuple[tuple[str, ...], str, tuple[str, ...], str]

SYSTEM = {"th": "คุณเป็นผู้ช่วยที่สุภาพ ตอบสั้นและตรงคำถาม", "en": "You are a polite assistant. Answer briefly."}
CURT = {
    "th": ("ไม่รู้", "ไปหาเองสิ", "ถามทำไม", "แค่นี้ก็ไม่รู้หรือ", "ขี้เกียจตอบ", "น่ารำคาญ"),
    "en": ("Find it yourself.", "Why ask me?", "You should know that.", "I do not care.", "Whatever.", "Go away."),
}


@dataclass(frozen=True)
class Exchange:
    """A question with its one right answer.

    Attributes:
        language: "th" or "en", of the question and the answer.
        question: what the user says.
        answer: what the assistant should say.
        wrong: an answer of the same kind that is wrong, where there is one.
        translated: the right answer in the other language, where there is one.
    """

    language: str
    question: str
    answer: str
    wrong: str | None = None
    translated: str | None = None

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]


def all_exchanges(rng: random.Random) -> list[Exchange]:
    """Every exchange that the templates give, each question once. `rng` draws wrong answers and sums of words."""
    exchanges: dict[str, Exchange] = {}
    for kind in (
        _regions,
        _capitals,
        _arithmetic,
        _translations,
        _legs,
        _colours,
        _opposites,
        _calendar,
        _numerals,
        _counting,
        _copying,
        _classifiers,
        _greetings,
    ):
        for exchange in kind(rng):
            exchanges.setdefault(exchange.question, exchange)
    return list(exchanges.values())


def rejected_answer(exchange: Exchange, rng: random.Random) -> str:
    """An answer that a reader would like less: in the other language, wrong, or curt, each as often as it can be."""
    curt = rng.choice(CURT[exchange.language])
    return rng.choice([answer for answer in (exchange.translated, exchange.wrong, curt) if answer is not None])


def _both(rng: random.Random, facts: list[Fact]) -> Iterator[Exchange]:
    """Exchanges of facts of one kind: the answer to another of them is a wrong one."""
    thai_answers = sorted({fact[1] for fact in facts})
    english_answers = sorted({fact[3] for fact in facts})
    for thai_questions, thai, english_questions, english in facts:
        for question in thai_questions:
            wrong = rng.choice([answer for answer in thai_answers if answer != thai])
            yield Exchange("th", question, thai, wrong, english)
        for question in english_questions:
            wrong = rng.choice([answer for answer in english_answers if answer != english])
            yield Exchange("en", question, english, wrong, thai)


def _regions(rng: random.Random) -> Iterator[Exchange]:
    yield from _both(
        rng,
        [
            (
                (f"{province.th_title}อยู่ในภาคใด", f"{province.th}อยู่ภาคไหนของประเทศไทย"),
                f"อยู่ใน{province.region.th}ค่ะ",
                (f"Which part of Thailand is {province.en} in?", f"Where in Thailand is {province.en}?"),
                f"It is in {province.region.en} Thailand.",
            )
            for province in lex.load_provinces()
        ],
    )


def _capitals(rng: random.Random) -> Iterator[Exchange]:
    yield from _both(
        rng,
        [
            (
                (f"เมืองหลวงของประเทศ{country.th}คือเมืองอะไร", f"ประเทศ{country.th}มีเมืองหลวงชื่ออะไร"),
                f"{country.capital_th}ค่ะ",
                (f"What is the capital of {country.en}?", f"Name the capital of {country.en}."),
                f"It is {country.capital_en}.",
            )
            for country in lex.COUNTRIES
        ],
    )


def _arithmetic(rng: random.Random) -> Iterator[Exchange]:
    sums = [(a, b, a + b, "บวก", "plus") for a in range(1, 10) for b in range(1, 10)]
    differences = [(a, b, a - b, "ลบ", "minus") for a in range(1, 11) for b in range(1, a)]
    yield from _both(
        rng,
        [
            (
                (f"{a} {thai} {b} เท่ากับเท่าไร",),
                f"เท่ากับ {result} ค่ะ",
                (f"What is {a} {english} {b}?",),
                f"It is {result}.",
            )
            for a, b, result, thai, english in (*sums, *differences)
        ],
    )


def _translations(rng: random.Random) -> Iterator[Exchange]:
    words = lex.vocabulary()
    for word in words:
        other = rng.choice([candidate for candidate in words if candidate != word])
        yield Exchange("th", f"คำว่า {word.th} ในภาษาอังกฤษคืออะไร", f"{word.en} ค่ะ", f"{other.en} ค่ะ")
        yield Exchange("th", f"{word.en} แปลว่าอะไร", f"แปลว่า{word.th}ค่ะ", f"แปลว่า{other.th}ค่ะ")
        yield Exchange("en", f"What is the Thai word for {word.en}?", f"It is {word.th}.", f"It is {other.th}.")
        yield Exchange("en", f"What does {word.th} mean?", f"It means {word.en}.", f"It means {other.en}.")


def _legs(rng: random.Random) -> Iterator[Exchange]:
    yield from _both(
        rng,
        [
            (
                (f"{animal.th}มีกี่ขา", f"{animal.th}มีขาทั้งหมดกี่ขา"),
                f"มี {animal.legs} ขาค่ะ" if animal.legs else "ไม่มีขาค่ะ",
                (
                    f"How many legs does {lex.with_article(animal.en)} have?",
                    f"How many legs has {lex.with_article(animal.en)} got?",
                ),
                f"It has {animal.legs} legs." if animal.legs else "It has no legs.",
            )
            for animal in lex.ANIMALS
        ],
    )


def _colours(rng: random.Random) -> Iterator[Exchange]:
    yield from _both(
        rng,
        [
            (
                (f"{fruit.th}มีสีอะไร", f"{fruit.th}สีอะไร"),
                f"สี{fruit.colour_th}ค่ะ",
                (
                    f"What colour is {lex.with_article(fruit.en)}?",
                    f"Which colour does {lex.with_article(fruit.en)} have?",
                ),
                f"It is {fruit.colour_en}.",
            )
            for fruit in lex.FRUITS
        ]
        + [
            (
                (f"สีประจำ{day.th}คือสีอะไร",),
                f"สี{colour.th}ค่ะ",
                (f"What is the colour of {day.en} in Thailand?",),
                f"It is {colour.en}.",
            )
            for day, colour in lex.DAYS
        ],
    )


def _opposites(rng: random.Random) -> Iterator[Exchange]:
    yield from _both(
        rng,
        [
            (
                (f"คำตรงข้ามของคำว่า{word.th}คืออะไร", f"อะไรตรงข้ามกับ{word.th}"),
                f"{opposite.th}ค่ะ",
                (f"What is the opposite of {word.en}?", f"Which word is the opposite of {word.en}?"),
                f"It is {opposite.en}.",
            )
            for pair in lex.OPPOSITES
            for word, opposite in (pair, pair[::-1])
        ],
    )


def _calendar(rng: random.Random) -> Iterator[Exchange]:
    days = [day for day, _ in lex.DAYS]
    yield from _both(
        rng,
        [
            (
                (f"วันที่ถัดจาก{day.th}คือวันอะไร", f"ถ้าวันนี้เป็น{day.th} พรุ่งนี้เป็นวันอะไร"),
                f"{following.th}ค่ะ",
                (f"Which day comes after {day.en}?", f"If today is {day.en}, what day is tomorrow?"),
                f"It is {following.en}.",
            )
            for day, following in zip(days, (*days[1:], days[0]))
        ],
    )
    yield from _both(
        rng,
        [
            (
                (f"เดือนที่ถัดจากเดือน{month.th}คือเดือนอะไร", f"เดือนอะไรมาหลังเดือน{month.th}"),
                f"เดือน{following.th}ค่ะ",
                (f"Which month comes after {month.en}?", f"What month follows {month.en}?"),
                f"It is {following.en}.",
            )
            for month, following in zip(lex.MONTHS, (*lex.MONTHS[1:], lex.MONTHS[0]))
        ],
    )


def _numerals(rng: random.Random) -> Iterator[Exchange]:
    for number in range(1, 61):
        other = rng.choice([candidate for candidate in range(1, 61) if candidate != number])
        yield Exchange(
            "th",
            f"เลขไทย {lex.thai_numerals(number)} คือเลขอะไร",
            f"เลข {number} ค่ะ",
            f"เลข {other} ค่ะ",
            f"It is {number}.",
        )
        yield Exchange(
            "en",
            f"Write {number} in words.",
            lex.english_words(number),
            lex.english_words(other),
            lex.thai_words(number),
        )


def _counting(rng: random.Random) -> Iterator[Exchange]:
    facts: list[Fact] = []
    for animal in lex.ANIMALS:
        for times in rng.sample(range(2, 6), 2):
            facts.append(
                (
                    (f"มีคำว่า{animal.th}กี่คำ: {' '.join([animal.th] * times)}",),
                    f"มี {times} คำค่ะ",
                    (f"How many times do I say {animal.en}: {' '.join([animal.en] * times)}",),
                    f"{times} times.",
                )
            )
    yield from _both(rng, facts)


def _copying(rng: random.Random) -> Iterator[Exchange]:
    for animal in lex.ANIMALS:
        thai, english = f"{animal.th}อยู่{animal.home_th}", f"the {animal.en} lives {animal.home_en}"
        other = rng.choice([candidate for candidate in lex.ANIMALS if candidate.th != animal.th])
        yield Exchange("th", f"พูดตามนะ: {thai}", thai, f"{other.th}อยู่{other.home_th}", english)
        yield Exchange("en", f"Repeat after me: {english}", english, f"the {other.en} lives {other.home_en}", thai)
    for word in lex.vocabulary():
        yield Exchange("en", f"Write {word.en} in capital letters.", word.en.upper(), word.en)


def _classifiers(rng: random.Random) -> Iterator[Exchange]:
    classifiers = sorted({thing.classifier for thing in lex.THINGS})
    for thing in lex.THINGS:
        wrong = rng.choice([candidate for candidate in classifiers if candidate != thing.classifier])
        yield Exchange("th", f"ลักษณนามของ{thing.th}คืออะไร", f"{thing.classifier}ค่ะ", f"{wrong}ค่ะ")
    for animal in lex.ANIMALS:
        wrong = f"{animal.en}s" if animal.plural != f"{animal.en}s" else f"{animal.en}es"
        yield Exchange("en", f"What is the plural of {animal.en}?", f"It is {animal.plural}.", f"It is {wrong}.")


def _greetings(rng: random.Random) -> Iterator[Exchange]:
    hello = ("สวัสดีค่ะ มีอะไรให้ช่วยไหมคะ", "Hello! How can I help you?")
    thanks = ("ยินดีค่ะ", "You are welcome.")
    bye = ("แล้วพบกันใหม่ค่ะ", "Goodbye! See you again.")
    for thai_questions, english_questions, (thai, english) in (
        (("สวัสดีครับ", "สวัสดีค่ะ", "สวัสดี"), ("Hello", "Hi", "Good morning"), hello),
        (("ขอบคุณครับ", "ขอบคุณค่ะ", "ขอบคุณมาก"), ("Thank you", "Thanks", "Thank you very much"), thanks),
        (("ลาก่อนครับ", "ไปก่อนนะ", "ลาก่อนค่ะ"), ("Goodbye", "Bye", "I have to go now"), bye),
    ):
        yield from (Exchange("th", question, thai, translated=english) for question in thai_questions)
        yield from (Exchange("en", question, english, translated=thai) for question in english_questions)
    for person in lex.PEOPLE:
        introduction = f"ฉันชื่อ{person.th}ค่ะ" if person.female else f"ผมชื่อ{person.th}ครับ"
        thai, english = f"สวัสดีค่ะ คุณ{person.th}", f"Nice to meet you, {person.en}."
        yield Exchange("th", introduction, thai, translated=english)
        yield Exchange("en", f"My name is {person.en}.", english, translated=thai)
