# SPDX-License-Identifier: Apache-2.0
"""Templates of the demo's pre-training text. Each makes one short document, in Thai and in English."""

import random
from collections.abc import Callable

from jai.demo.text import lexicon as lex

Sentences = list[tuple[str, str]]


def sentence_case(text: str) -> str:
    """With a capital at the beginning."""
    return text[0].upper() + text[1:]


def _regions(rng: random.Random) -> Sentences:
    provinces = lex.load_provinces()
    first = rng.choice(provinces)
    second, third = rng.sample([p for p in provinces if p.region == first.region and p != first], 2)
    elsewhere = rng.choice([p for p in provinces if p.region != first.region])
    th, en = first.region.th, first.region.en
    return [
        (f"{first.th_title}อยู่ใน{th}ของประเทศไทย", f"{first.en} is in {en} Thailand."),
        rng.choice(
            [
                (f"{second.th_title}ก็อยู่ใน{th}เช่นกัน", f"{second.en} is in {en} Thailand as well."),
                (
                    f"ใน{th}ยังมี{second.th_title}และ{third.th_title}",
                    f"{second.en} and {third.en} are also in {en} Thailand.",
                ),
                (f"{first.th}กับ{third.th}อยู่ภาคเดียวกัน", f"{first.en} and {third.en} are in the same region."),
            ]
        ),
        (
            f"ส่วน{elsewhere.th_title}ไม่ได้อยู่ใน{th} แต่อยู่ใน{elsewhere.region.th}",
            f"{elsewhere.en}, however, is not in {en} but in {elsewhere.region.en} Thailand.",
        ),
        (
            f"ชื่อภาษาอังกฤษของ{first.th_title}คือ {first.en}",
            f"The Thai name of {first.en} is {first.th}.",
        ),
    ]


def _capitals(rng: random.Random) -> Sentences:
    sentences: Sentences = []
    for country in rng.sample(lex.COUNTRIES, 3):
        sentences.append(
            rng.choice(
                [
                    (
                        f"เมืองหลวงของประเทศ{country.th}คือ{country.capital_th}",
                        f"The capital of {country.en} is {country.capital_en}.",
                    ),
                    (
                        f"{country.capital_th}เป็นเมืองหลวงของประเทศ{country.th}",
                        f"{country.capital_en} is the capital of {country.en}.",
                    ),
                ]
            )
        )
        sentences.append(
            rng.choice(
                [
                    (
                        f"ประเทศ{country.th}อยู่ในทวีป{country.continent_th}",
                        f"{sentence_case(country.en)} is in {country.continent_en}.",
                    ),
                    (
                        f"คนที่อยากเห็น{country.capital_th}ต้องเดินทางไปประเทศ{country.th}",
                        f"Whoever wants to see {country.capital_en} has to travel to {country.en}.",
                    ),
                ]
            )
        )
    return sentences


def _sums(rng: random.Random) -> Sentences:
    sentences: Sentences = []
    for _ in range(4):
        a, b = rng.randint(1, 20), rng.randint(1, 20)
        a, b = max(a, b), min(a, b)
        sentences.append(
            rng.choice(
                [
                    (
                        f"{lex.thai_words(a)}บวก{lex.thai_words(b)}เท่ากับ{lex.thai_words(a + b)}",
                        f"{lex.english_words(a)} plus {lex.english_words(b)} is {lex.english_words(a + b)}.",
                    ),
                    (
                        f"{lex.thai_words(a)}ลบ{lex.thai_words(b)}เท่ากับ{lex.thai_words(a - b)}",
                        f"{lex.english_words(a)} minus {lex.english_words(b)} is {lex.english_words(a - b)}.",
                    ),
                    (f"{a} + {b} = {a + b}", f"{a} + {b} = {a + b}."),
                    (f"{a} - {b} = {a - b}", f"{a} - {b} = {a - b}."),
                    (f"{a} บวก {b} เท่ากับ {a + b}", f"{a} plus {b} is {a + b}."),
                ]
            )
        )
    return [(thai, sentence_case(english)) for thai, english in sentences]


def _fruit_problem(rng: random.Random) -> Sentences:
    person, fruit, giver = rng.choice(lex.PEOPLE), rng.choice(lex.FRUITS), rng.choice(lex.FAMILY)
    has, gets, eats = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 3)
    left = has + gets - eats
    name = person.en
    sentences = [
        (f"{person.th}มี{fruit.th} {has} ลูก", f"{name} has {has} {fruit.plural}."),
        (
            f"{giver.th}ให้{person.th}อีก {gets} ลูก",
            f"{sentence_case(person.their)} {giver.en} gives {person.them} {gets} more.",
        ),
        (
            f"ตอนนี้{person.th}มี{fruit.th}ทั้งหมด {has + gets} ลูก",
            f"Now {name} has {has + gets} {fruit.plural}.",
        ),
    ]
    if left > 1 and rng.random() < 0.6:
        sentences.append(
            (
                f"ต่อมา {person.th}กินไป {eats} ลูก จึงเหลือ{fruit.th} {left} ลูก",
                f"Later {person.they} eats {eats}, so {left} {fruit.plural} are left.",
            )
        )
    return sentences


def _animals(rng: random.Random) -> Sentences:
    sentences: Sentences = []
    first, second = rng.sample(lex.ANIMALS, 2)
    for animal in (first, second):
        a = lex.with_article(animal.en)
        legs = (
            (
                f"{animal.th}มี{lex.thai_words(animal.legs)}ขา",
                f"{sentence_case(a)} has {lex.english_words(animal.legs)} legs.",
            )
            if animal.legs
            else (f"{animal.th}ไม่มีขา", f"{sentence_case(a)} has no legs.")
        )
        facts = [
            legs,
            (f"{animal.th}อยู่{animal.home_th}", f"The {animal.en} lives {animal.home_en}."),
            (f"{animal.th}ชอบกิน{animal.food_th}", f"{sentence_case(animal.plural)} like to eat {animal.food_en}."),
        ]
        sentences += rng.sample(facts, 2)
    if first.legs == second.legs:
        sentences.append(
            (
                f"{first.th}กับ{second.th}มีจำนวนขาเท่ากัน",
                f"{sentence_case(first.plural)} and {second.plural} have the same number of legs.",
            )
        )
    else:
        more, fewer = (first, second) if first.legs > second.legs else (second, first)
        sentences.append(
            (
                f"{more.th}มีขามากกว่า{fewer.th}",
                f"{sentence_case(lex.with_article(more.en))} has more legs than {lex.with_article(fewer.en)}.",
            )
        )
    return sentences


def _fruits(rng: random.Random) -> Sentences:
    sentences: Sentences = []
    for fruit in rng.sample(lex.FRUITS, 2):
        person = rng.choice(lex.PEOPLE)
        sentences += [
            (
                f"{fruit.th}มีสี{fruit.colour_th}และ{fruit.taste_th}",
                f"{sentence_case(lex.with_article(fruit.en))} is {fruit.colour_en} and {fruit.taste_en}.",
            ),
            rng.choice(
                [
                    (f"{person.th}ชอบกิน{fruit.th}มาก", f"{person.en} likes to eat {fruit.plural} very much."),
                    (f"{person.th}ซื้อ{fruit.th}จากตลาด", f"{person.en} buys {fruit.plural} at the market."),
                    (
                        f"ที่บ้านของ{person.th}มี{fruit.th}เต็มตะกร้า",
                        f"At {person.en}'s house there is a basket full of {fruit.plural}.",
                    ),
                ]
            ),
        ]
    return sentences


def _market(rng: random.Random) -> Sentences:
    person, relative = rng.choice(lex.PEOPLE), rng.choice(lex.FAMILY)
    fruit, (day, _) = rng.choice(lex.FRUITS), rng.choice(lex.DAYS)
    kilos, price = rng.randint(2, 5), rng.randrange(20, 70, 10)
    return [
        (
            f"ทุก{day.th}{person.th}ไปตลาดกับ{relative.th}",
            f"Every {day.en} {person.en} goes to the market with {person.their} {relative.en}.",
        ),
        (
            f"{fruit.th}ราคากิโลกรัมละ {price} บาท",
            f"A kilo of {fruit.plural} costs {price} baht.",
        ),
        (
            f"{relative.th}ซื้อ {kilos} กิโลกรัม จึงต้องจ่าย {kilos * price} บาท",
            f"They buy {kilos} kilos and have to pay {kilos * price} baht.",
        ),
        (
            f"{person.th}ช่วยถือของกลับบ้าน",
            f"{person.en} helps to carry everything home.",
        ),
    ]


def _days(rng: random.Random) -> Sentences:
    index = rng.randrange(7)
    (before, _), (day, colour), (after, _) = (lex.DAYS[(index + shift) % 7] for shift in (-1, 0, 1))
    person, place = rng.choice(lex.PEOPLE), rng.choice(lex.PLACES)
    sentences = [
        (f"วันที่ถัดจาก{day.th}คือ{after.th}", f"The day after {day.en} is {after.en}."),
        (f"สีประจำ{day.th}คือสี{colour.th}", f"In Thailand the colour of {day.en} is {colour.en}."),
        (
            f"เมื่อวานเป็น{before.th} วันนี้เป็น{day.th} และพรุ่งนี้จะเป็น{after.th}",
            f"Yesterday was {before.en}, today is {day.en}, and tomorrow will be {after.en}.",
        ),
        (
            f"{person.th}ใส่เสื้อสี{colour.th}ใน{day.th}",
            f"{person.en} wears {colour.en} on {day.en}.",
        ),
        (
            f"พอถึง{day.th} {person.th}จะไป{place.th}",
            f"On {day.en} {person.en} will go to the {place.en}.",
        ),
    ]
    return rng.sample(sentences, 4)


def _months(rng: random.Random) -> Sentences:
    index = rng.randrange(12)
    month, following = lex.MONTHS[index], lex.MONTHS[(index + 1) % 12]
    if index in (2, 3, 4):
        season = ("ฤดูร้อน", "hot season")
    elif index in (5, 6, 7, 8, 9):
        season = ("ฤดูฝน", "rainy season")
    else:
        season = ("ฤดูหนาว", "cool season")
    person, place = rng.choice(lex.PEOPLE), rng.choice(lex.PLACES)
    sentences = [
        (f"เดือน{month.th}มี {lex.MONTH_DAYS[index]} วัน", f"{month.en} has {lex.MONTH_DAYS[index]} days."),
        (f"เดือนที่ถัดจากเดือน{month.th}คือเดือน{following.th}", f"The month after {month.en} is {following.en}."),
        (f"เดือน{month.th}เป็นเดือนที่ {index + 1} ของปี", f"{month.en} is month number {index + 1} of the year."),
        (f"ในประเทศไทย เดือน{month.th}อยู่ใน{season[0]}", f"In Thailand {month.en} belongs to the {season[1]}."),
        (f"{person.th}เกิดเดือน{month.th}", f"{person.en} was born in {month.en}."),
        (
            f"ปีนี้{person.th}จะไป{place.th}ในเดือน{month.th}",
            f"This year {person.en} will visit the {place.en} in {month.en}.",
        ),
    ]
    return rng.sample(sentences, 4)


def _numerals(rng: random.Random) -> Sentences:
    sentences = []
    for number in rng.sample(range(1, 100), 3):
        numeral = lex.thai_numerals(number)
        sentences.append(
            (
                f"เลขไทย {numeral} คือเลข {number} อ่านว่า{lex.thai_words(number)}",
                f"The Thai numeral {numeral} is {number}, and {number} is read {lex.english_words(number)}.",
            )
        )
    start = rng.randint(1, 90)
    run = range(start, start + 5)
    sentences.append(
        (
            f"นับต่อจาก{lex.thai_words(start)}ได้ดังนี้ {' '.join(map(lex.thai_words, run[1:]))}",
            f"Count on from {lex.english_words(start)}: {', '.join(map(lex.english_words, run[1:]))}.",
        )
    )
    return sentences


# Of what can be said of these things, one opposite or the other.
_OF_THINGS = {"big", "new", "heavy", "clean", "dry"}
_WORN_OR_CARRIED = {"book", "umbrella", "bag", "hat", "shirt"}


def _opposites(rng: random.Random) -> Sentences:
    sentences: Sentences = []
    for first, second in rng.sample(lex.OPPOSITES, 2):
        sentences.append((f"คำตรงข้ามของคำว่า{first.th}คือ{second.th}", f"The opposite of {first.en} is {second.en}."))
        sentences.append(
            (
                f"ถ้าไม่{first.th}ก็อาจจะ{second.th}",
                f"What is not {first.en} may be {second.en}.",
            )
        )
    first, second = rng.choice([pair for pair in lex.OPPOSITES if pair[0].en in _OF_THINGS])
    one, other = rng.sample(lex.PEOPLE, 2)
    thing = rng.choice([thing for thing in lex.THINGS if thing.en in _WORN_OR_CARRIED])
    sentences.append(
        (
            f"{thing.th}ของ{one.th}{first.th} แต่{thing.th}ของ{other.th}{second.th}",
            f"{one.en}'s {thing.en} is {first.en}, but {other.en}'s {thing.en} is {second.en}.",
        )
    )
    return sentences


def _routine(rng: random.Random) -> Sentences:
    person, friend = rng.sample(lex.PEOPLE, 2)
    breakfast, dinner = rng.sample(lex.DISHES, 2)
    relative, place = rng.choice(lex.FAMILY), rng.choice(lex.PLACES)
    up, out, bed = rng.randint(5, 7), rng.randint(8, 10), rng.randint(20, 22)
    return [
        (
            f"ทุกเช้า{person.th}ตื่นนอนเวลา {up} นาฬิกา อาบน้ำ แล้วกิน{breakfast.th}",
            f"Every morning {person.en} gets up at {up} o'clock, takes a shower and eats {breakfast.en}.",
        ),
        (
            f"เวลา {out} นาฬิกา {person.th}ไป{place.th}กับ{friend.th}",
            f"At {out} o'clock {person.they} goes to the {place.en} with {friend.en}.",
        ),
        (
            f"ตอนเย็น{person.th}ช่วย{relative.th}ทำ{dinner.th}",
            f"In the evening {person.en} helps {person.their} {relative.en} to cook {dinner.en}.",
        ),
        (
            f"ก่อนนอน{person.th}อ่านหนังสือ แล้วเข้านอนเวลา {bed} นาฬิกา",
            f"Before bed {person.they} reads a book, and the light goes out at {bed - 12} o'clock.",
        ),
    ]


_PETS = {"cat", "dog", "rabbit", "turtle", "duck", "chicken"}
_HIDING_PLACES = {"car", "table", "chair", "tree", "house"}


def _lost_pet(rng: random.Random) -> Sentences:
    person, friend = rng.sample(lex.PEOPLE, 2)
    pet = rng.choice([animal for animal in lex.ANIMALS if animal.en in _PETS])
    hiding = rng.choice([thing for thing in lex.THINGS if thing.en in _HIDING_PLACES])
    colour = rng.choice([colour for colour in lex.COLOURS if colour.en in ("black", "white", "brown", "grey")])
    place = rng.choice(lex.PLACES)
    return [
        (
            f"{person.th}เลี้ยง{pet.th}สี{colour.th}ไว้หนึ่งตัว",
            f"{person.en} has a {colour.en} {pet.en}.",
        ),
        (
            f"วันหนึ่ง{pet.th}หายไป {person.th}จึงออกไปตามหาแถว{place.th}",
            f"One day the {pet.en} is gone, so {person.en} looks for it near the {place.en}.",
        ),
        rng.choice(
            [
                (f"{person.th}ถามทุกคน แต่ไม่มีใครเห็น", f"{person.en} asks everyone, but nobody has seen it."),
                (
                    f"{person.th}เรียกชื่อมันหลายครั้ง แต่ไม่มีเสียงตอบ",
                    f"{sentence_case(person.they)} calls its name many times, but hears nothing.",
                ),
            ]
        ),
        (
            f"ในที่สุด{friend.th}ก็เห็น{pet.th}นอนหลับอยู่ใต้{hiding.th}",
            f"At last {friend.en} sees the {pet.en} asleep under a {hiding.en}.",
        ),
        (
            f"{person.th}ดีใจมากและขอบคุณ{friend.th}",
            f"{person.en} is very glad and thanks {friend.en}.",
        ),
    ]


def _jobs(rng: random.Random) -> Sentences:
    first, second = rng.sample(lex.JOBS, 2)
    person, relative = rng.choice(lex.PEOPLE), rng.choice(lex.FAMILY)
    a_first, a_second = lex.with_article(first.en), lex.with_article(second.en)
    return [
        (f"{first.th}{first.work_th}", f"{sentence_case(a_first)} {first.work_en}."),
        (f"{relative.th}ของ{person.th}เป็น{first.th}", f"{person.en}'s {relative.en} is {a_first}."),
        (f"ส่วน{second.th}{second.work_th}", f"{sentence_case(a_second)}, on the other hand, {second.work_en}."),
        (
            f"เมื่อโตขึ้น {person.th}อยากเป็น{second.th}",
            f"{person.en} wants to become {a_second} when {person.they} grows up.",
        ),
    ]


def _cooking(rng: random.Random) -> Sentences:
    dish, cook, guest = rng.choice(lex.DISHES), rng.choice(lex.PEOPLE), rng.choice(lex.FAMILY)
    th, en = dish.parts_th, dish.parts_en
    return [
        (
            f"{dish.th}ทำจาก{th[0]} {th[1]} และ{th[2]}",
            f"{sentence_case(dish.en)} is made of {en[0]}, {en[1]} and {en[2]}.",
        ),
        (
            f"{cook.th}เตรียม{th[0]}ก่อน จากนั้นใส่{th[1]} แล้วใส่{th[2]}เป็นอย่างสุดท้าย",
            f"{cook.en} first prepares the {en[0]}, then adds the {en[1]}, and the {en[2]} last of all.",
        ),
        (
            f"เมื่อเสร็จแล้ว {cook.th}ยก{dish.th}ไปให้{guest.th}",
            f"When it is ready, {cook.en} brings the {dish.en} to {cook.their} {guest.en}.",
        ),
        rng.choice(
            [
                (f"{guest.th}บอกว่าอร่อยมาก", f"It is delicious, says the {guest.en}."),
                (f"{guest.th}กินจนหมดจาน", f"The {guest.en} eats it all."),
                (f"{guest.th}ขออีกหนึ่งจาน", f"The {guest.en} asks for one more plate."),
            ]
        ),
    ]


def _translations(rng: random.Random) -> Sentences:
    return [
        rng.choice(
            [
                (f"คำว่า {word.th} ในภาษาอังกฤษคือ {word.en}", f"The Thai word for {word.en} is {word.th}."),
                (f"{word.en} แปลว่า{word.th}", f"In English {word.th} means {word.en}."),
            ]
        )
        for word in rng.sample(lex.vocabulary(), 5)
    ]


def _meeting(rng: random.Random) -> Sentences:
    first, second = rng.sample(lex.PEOPLE, 2)
    home, other_home = rng.sample(lex.load_provinces(), 2)

    def i_am(person: lex.Person) -> tuple[str, str]:
        return ("ฉัน", "ค่ะ") if person.female else ("ผม", "ครับ")

    (me, polite), (you, your_polite) = i_am(first), i_am(second)
    question, answer = rng.choice(
        [
            (
                (
                    f"{other_home.th}อยู่ใน{other_home.region.th}ใช่ไหม{'คะ' if first.female else 'ครับ'}",
                    f"{other_home.en} is in {other_home.region.en} Thailand, is it not?",
                ),
                (f"ใช่{your_polite}", "Yes, it is."),
            ),
            (
                (f"{me}เคยไป{other_home.th}ครั้งหนึ่ง{polite}", f"I have been to {other_home.en} once."),
                (f"ดีใจจัง{your_polite}", "I am glad to hear that."),
            ),
            (
                (f"{me}ยังไม่เคยไป{other_home.th}เลย{polite}", f"I have never been to {other_home.en}."),
                (f"แวะมาเที่ยวได้นะ{'คะ' if second.female else 'ครับ'}", "Then come and see it."),
            ),
        ]
    )
    return [
        (
            f"{first.th}: สวัสดี{polite} {me}ชื่อ{first.th} มาจาก{home.th_title}{polite}",
            f"{first.en}: Hello, my name is {first.en}. I come from {home.en}.",
        ),
        (
            f"{second.th}: ยินดีที่ได้รู้จัก{your_polite} {you}ชื่อ{second.th} มาจาก{other_home.th_title}{your_polite}",
            f"{second.en}: Nice to meet you. I am {second.en}, and I come from {other_home.en}.",
        ),
        (f"{first.th}: {question[0]}", f"{first.en}: {question[1]}"),
        (f"{second.th}: {answer[0]}", f"{second.en}: {answer[1]}"),
    ]


def _journey(rng: random.Random) -> Sentences:
    person, month = rng.choice(lex.PEOPLE), rng.choice(lex.MONTHS)
    fruit, dish = rng.choice(lex.FRUITS), rng.choice(lex.DISHES)
    start, goal = rng.sample(lex.load_provinces(), 2)
    vehicle = rng.choice([("รถไฟ", "train"), ("รถยนต์", "car"), ("รถทัวร์", "coach")])
    days = rng.randint(2, 9)
    return [
        (
            f"ในเดือน{month.th} ครอบครัวของ{person.th}เดินทางจาก{start.th}ไป{goal.th}โดย{vehicle[0]}",
            f"In {month.en} {person.en}'s family travels from {start.en} to {goal.en} by {vehicle[1]}.",
        ),
        (f"{goal.th_title}อยู่ใน{goal.region.th}", f"{goal.en} is in {goal.region.en} Thailand."),
        (
            f"ที่นั่นพวกเขากิน{dish.th}และซื้อ{fruit.th}กลับมาฝากเพื่อน",
            f"There they eat {dish.en} and buy {fruit.plural} for their friends.",
        ),
        (
            f"หลังจากผ่านไป{lex.thai_words(days)}วัน พวกเขาก็กลับบ้านที่{start.th}",
            f"After {lex.english_words(days)} days they go home to {start.en}.",
        ),
    ]


def _weather(rng: random.Random) -> Sentences:
    person, friend = rng.sample(lex.PEOPLE, 2)
    place = rng.choice(lex.PLACES)
    weather = rng.choice(
        [
            (
                (
                    f"วันนี้ฝนตกหนัก {person.th}จึงกางร่มเดินไป{place.th}",
                    f"It rains hard today, so {person.en} takes an umbrella to the {place.en}.",
                ),
                (f"{friend.th}ไม่มีร่ม เสื้อจึงเปียก", f"{friend.en} has no umbrella and gets wet."),
                (
                    f"{person.th}ให้{friend.th}เดินใต้ร่มด้วยกัน",
                    f"{person.en} lets {friend.en} walk under {person.their} umbrella.",
                ),
            ),
            (
                (
                    f"วันนี้อากาศร้อนมาก {person.th}จึงใส่หมวกไป{place.th}",
                    f"It is very hot today, so {person.en} wears a hat to the {place.en}.",
                ),
                (f"{friend.th}ซื้อน้ำเย็นมาสองขวด", f"{friend.en} buys two bottles of cold water."),
                (f"{person.th}กับ{friend.th}นั่งพักใต้ต้นไม้", f"{person.en} and {friend.en} rest under a tree."),
            ),
            (
                (
                    f"เช้านี้อากาศหนาว {person.th}จึงใส่เสื้อหนาไป{place.th}",
                    f"It is cold this morning, so {person.en} wears a thick shirt to the {place.en}.",
                ),
                (f"{friend.th}ดื่มนมร้อนหนึ่งแก้ว", f"{friend.en} drinks a glass of hot milk."),
                (
                    f"พอแดดออก {person.th}กับ{friend.th}ก็ออกไปเล่นข้างนอก",
                    f"When the sun comes out, {person.en} and {friend.en} go out to play.",
                ),
            ),
        ]
    )
    return [
        ("ประเทศไทยมีสามฤดู คือ ฤดูร้อน ฤดูฝน และฤดูหนาว", "Thailand has three seasons: hot, rainy and cool."),
        *weather,
    ]


_ON_A_TABLE = {"book", "pencil", "plate", "bag", "hat", "flower", "key", "egg", "letter"}


def _things(rng: random.Random) -> Sentences:
    sentences: Sentences = []
    person = rng.choice(lex.PEOPLE)
    total = 0
    for thing in rng.sample([thing for thing in lex.THINGS if thing.en in _ON_A_TABLE], 2):
        number = rng.randint(2, 9)
        total += number
        sentences += [
            (
                f"บนโต๊ะมี{thing.th}{lex.thai_words(number)}{thing.classifier}",
                f"There are {lex.english_words(number)} {thing.plural} on the table.",
            ),
            (
                f"ลักษณนามของ{thing.th}คือ{thing.classifier}",
                f"Thai counts {thing.plural} with the word {thing.classifier}.",
            ),
        ]
    sentences.append(
        (
            f"{person.th}นับของบนโต๊ะได้ทั้งหมด{lex.thai_words(total)}ชิ้น",
            f"{person.en} counts {lex.english_words(total)} things on the table in all.",
        )
    )
    return sentences


_RUNNERS = {"cat", "dog", "horse", "tiger", "rabbit", "deer", "goat"}
_WALKERS = {"turtle", "pig", "crab", "frog", "ant", "duck", "sheep"}


def _race(rng: random.Random) -> Sentences:
    fast = rng.choice([animal for animal in lex.ANIMALS if animal.en in _RUNNERS])
    slow = rng.choice([animal for animal in lex.ANIMALS if animal.en in _WALKERS])
    return [
        (f"วันหนึ่ง{fast.th}ท้า{slow.th}วิ่งแข่ง", f"One day the {fast.en} challenged the {slow.en} to a race."),
        (
            f"{fast.th}วิ่งเร็วกว่ามาก แต่แวะกิน{fast.food_th}กลางทาง",
            f"The {fast.en} ran much faster, but stopped on the way to eat {fast.food_en}.",
        ),
        rng.choice(
            [
                (f"{slow.th}เดินช้า ๆ แต่ไม่หยุดเลย", f"The {slow.en} walked slowly and never stopped."),
                (f"{slow.th}เหนื่อยมาก แต่ก็เดินต่อไป", f"The {slow.en} was very tired, but walked on."),
            ]
        ),
        (f"ในที่สุด{slow.th}ก็ชนะ", f"In the end the {slow.en} won."),
        rng.choice(
            [
                (f"{fast.th}จึงรู้ว่าไม่ควรประมาท", f"So the {fast.en} learnt not to be careless."),
                (
                    f"{fast.th}ขอโทษ{slow.th} แล้วทั้งสองก็เป็นเพื่อนกัน",
                    f"The {fast.en} said sorry to the {slow.en}, and they became friends.",
                ),
            ]
        ),
    ]


def _kindness(rng: random.Random) -> Sentences:
    person, friend = rng.sample(lex.PEOPLE, 2)
    elder = rng.choice(lex.FAMILY[6:])
    thing, (day, _) = rng.choice(lex.THINGS[:2]), rng.choice(lex.DAYS)
    place = rng.choice([place for place in lex.PLACES if place.en in ("market", "bookshop", "railway station")])
    return [
        (
            f"เย็น{day.th} {person.th}เห็น{elder.th}ถือของหนักกลับจาก{place.th}",
            f"On {day.en} evening {person.en} sees {person.their} {elder.en} carry heavy bags from the {place.en}.",
        ),
        (
            f"{person.th}วิ่งไปช่วยถือ แล้วชวน{friend.th}มาช่วยด้วย",
            f"{person.en} runs to help and calls {friend.en} to help as well.",
        ),
        (
            f"{elder.th}ยิ้มและพูดว่า ขอบใจมากนะเด็ก ๆ",
            f"The {elder.en} smiles and says: thank you, children.",
        ),
        (
            f"วันต่อมา{elder.th}ให้{thing.th}แก่ทั้งสองคน คนละหนึ่ง{thing.classifier}",
            f"The next day each of the two gets a {thing.en} from the {elder.en}.",
        ),
    ]


TEMPLATES: tuple[Callable[[random.Random], Sentences], ...] = (
    _regions,
    _capitals,
    _sums,
    _fruit_problem,
    _animals,
    _fruits,
    _market,
    _days,
    _months,
    _numerals,
    _opposites,
    _routine,
    _lost_pet,
    _jobs,
    _cooking,
    _translations,
    _meeting,
    _journey,
    _weather,
    _things,
    _race,
    _kindness,
)


_ON_LINES = {_sums, _numerals, _translations, _meeting}


def draw_document(rng: random.Random) -> tuple[str, str]:
    """A short document from a template drawn at random, in Thai and in English."""
    template = rng.choice(TEMPLATES)
    separator = "\n" if template in _ON_LINES else " "
    thai, english = zip(*template(rng))
    return separator.join(thai), separator.join(english)
