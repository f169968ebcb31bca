# SPDX-License-Identifier: Apache-2.0
"""The demo's small world: Thai and English words, and the facts that its text tells about them.

Written for this project, except the names of the provinces, which come from PyThaiNLP's list (CC0).
"""

from typing import NamedTuple, cast

from pythainlp.corpus import provinces


class Region(NamedTuple):
    th: str
    en: str
    provinces: str


class Province(NamedTuple):
    th: str
    en: str
    region: Region

    @property
    def th_title(self) -> str:
        """With the word for province, which the capital does not take."""
        return self.th if self.th == "กรุงเทพมหานคร" else f"จังหวัด{self.th}"


class Country(NamedTuple):
    th: str
    en: str
    capital_th: str
    capital_en: str
    continent_th: str
    continent_en: str


class Animal(NamedTuple):
    th: str
    en: str
    plural: str
    legs: int
    home_th: str
    home_en: str
    food_th: str
    food_en: str


class Fruit(NamedTuple):
    th: str
    en: str
    plural: str
    colour_th: str
    colour_en: str
    taste_th: str
    taste_en: str


class Thing(NamedTuple):
    th: str
    en: str
    plural: str
    classifier: str


class Person(NamedTuple):
    th: str
    en: str
    female: bool

    @property
    def they(self) -> str:
        return "she" if self.female else "he"

    @property
    def their(self) -> str:
        return "her" if self.female else "his"

    @property
    def them(self) -> str:
        return "her" if self.female else "him"


class Job(NamedTuple):
    th: str
    en: str
    work_th: str
    work_en: str


class Dish(NamedTuple):
    th: str
    en: str
    parts_th: tuple[str, str, str]
    parts_en: tuple[str, str, str]


class Pair(NamedTuple):
    th: str
    en: str


# The regions of Thailand as its Royal Society draws them.
REGIONS = (
    Region(
        "ภาคเหนือ",
        "northern",
        "เชียงใหม่ เชียงราย ลำปาง ลำพูน แม่ฮ่องสอน น่าน พะเยา แพร่ อุตรดิตถ์",
    ),
    Region(
        "ภาคตะวันออกเฉียงเหนือ",
        "northeastern",
        "อำนาจเจริญ บึงกาฬ บุรีรัมย์ ชัยภูมิ กาฬสินธุ์ ขอนแก่น เลย มหาสารคาม มุกดาหาร "
        "นครพนม นครราชสีมา หนองบัวลำภู หนองคาย ร้อยเอ็ด สกลนคร ศรีสะเกษ สุรินทร์ "
        "อุบลราชธานี อุดรธานี ยโสธร",
    ),
    Region(
        "ภาคกลาง",
        "central",
        "อ่างทอง กรุงเทพมหานคร ชัยนาท กำแพงเพชร ลพบุรี นครนายก นครปฐม นครสวรรค์ นนทบุรี "
        "ปทุมธานี เพชรบูรณ์ พิจิตร พิษณุโลก พระนครศรีอยุธยา สมุทรปราการ สมุทรสาคร "
        "สมุทรสงคราม สระบุรี สิงห์บุรี สุโขทัย สุพรรณบุรี อุทัยธานี",
    ),
    Region(
        "ภาคตะวันออก",
        "eastern",
        "ฉะเชิงเทรา จันทบุรี ชลบุรี ปราจีนบุรี ระยอง สระแก้ว ตราด",
    ),
    Region(
        "ภาคตะวันตก",
        "western",
        "กาญจนบุรี เพชรบุรี ประจวบคีรีขันธ์ ราชบุรี ตาก",
    ),
    Region(
        "ภาคใต้",
        "southern",
        "ชุมพร กระบี่ นครศรีธรรมราช นราธิวาส ปัตตานี พังงา พัทลุง ภูเก็ต ระนอง สตูล สงขลา สุราษฎร์ธานี ตรัง ยะลา",
    ),
)


def load_provinces() -> tuple[Province, ...]:
    """The 77 provinces (Bangkok among them) with their region, in the order of PyThaiNLP's list."""
    region_of = {name: region for region in REGIONS for name in region.provinces.split()}
    entries = cast(list[dict[str, str]], provinces(details=True))
    return tuple(Province(entry["name_th"], entry["name_en"], region_of[entry["name_th"]]) for entry in entries)


COUNTRIES = tuple(
    Country(*row)
    for row in (
        ("ไทย", "Thailand", "กรุงเทพมหานคร", "Bangkok", "เอเชีย", "Asia"),
        ("ลาว", "Laos", "เวียงจันทน์", "Vientiane", "เอเชีย", "Asia"),
        ("กัมพูชา", "Cambodia", "พนมเปญ", "Phnom Penh", "เอเชีย", "Asia"),
        ("เวียดนาม", "Vietnam", "ฮานอย", "Hanoi", "เอเชีย", "Asia"),
        ("มาเลเซีย", "Malaysia", "กัวลาลัมเปอร์", "Kuala Lumpur", "เอเชีย", "Asia"),
        ("ฟิลิปปินส์", "the Philippines", "มะนิลา", "Manila", "เอเชีย", "Asia"),
        ("จีน", "China", "ปักกิ่ง", "Beijing", "เอเชีย", "Asia"),
        ("ญี่ปุ่น", "Japan", "โตเกียว", "Tokyo", "เอเชีย", "Asia"),
        ("เกาหลีใต้", "South Korea", "โซล", "Seoul", "เอเชีย", "Asia"),
        ("อินเดีย", "India", "นิวเดลี", "New Delhi", "เอเชีย", "Asia"),
        ("เนปาล", "Nepal", "กาฐมาณฑุ", "Kathmandu", "เอเชีย", "Asia"),
        ("มองโกเลีย", "Mongolia", "อูลานบาตาร์", "Ulaanbaatar", "เอเชีย", "Asia"),
        ("ฝรั่งเศส", "France", "ปารีส", "Paris", "ยุโรป", "Europe"),
        ("เยอรมนี", "Germany", "เบอร์ลิน", "Berlin", "ยุโรป", "Europe"),
        ("อิตาลี", "Italy", "โรม", "Rome", "ยุโรป", "Europe"),
        ("สเปน", "Spain", "มาดริด", "Madrid", "ยุโรป", "Europe"),
        ("โปรตุเกส", "Portugal", "ลิสบอน", "Lisbon", "ยุโรป", "Europe"),
        ("อังกฤษ", "England", "ลอนดอน", "London", "ยุโรป", "Europe"),
        ("กรีซ", "Greece", "เอเธนส์", "Athens", "ยุโรป", "Europe"),
        ("โปแลนด์", "Poland", "วอร์ซอ", "Warsaw", "ยุโรป", "Europe"),
        ("สวีเดน", "Sweden", "สตอกโฮล์ม", "Stockholm", "ยุโรป", "Europe"),
        ("นอร์เวย์", "Norway", "ออสโล", "Oslo", "ยุโรป", "Europe"),
        ("ฟินแลนด์", "Finland", "เฮลซิงกิ", "Helsinki", "ยุโรป", "Europe"),
        ("เดนมาร์ก", "Denmark", "โคเปนเฮเกน", "Copenhagen", "ยุโรป", "Europe"),
        ("ออสเตรีย", "Austria", "เวียนนา", "Vienna", "ยุโรป", "Europe"),
        ("ไอร์แลนด์", "Ireland", "ดับลิน", "Dublin", "ยุโรป", "Europe"),
        ("อียิปต์", "Egypt", "ไคโร", "Cairo", "แอฟริกา", "Africa"),
        ("เคนยา", "Kenya", "ไนโรบี", "Nairobi", "แอฟริกา", "Africa"),
        ("โมร็อกโก", "Morocco", "ราบัต", "Rabat", "แอฟริกา", "Africa"),
        ("เอธิโอเปีย", "Ethiopia", "แอดดิสอาบาบา", "Addis Ababa", "แอฟริกา", "Africa"),
        ("แคนาดา", "Canada", "ออตตาวา", "Ottawa", "อเมริกาเหนือ", "North America"),
        ("เม็กซิโก", "Mexico", "เม็กซิโกซิตี", "Mexico City", "อเมริกาเหนือ", "North America"),
        ("คิวบา", "Cuba", "ฮาวานา", "Havana", "อเมริกาเหนือ", "North America"),
        ("บราซิล", "Brazil", "บราซิเลีย", "Brasilia", "อเมริกาใต้", "South America"),
        ("อาร์เจนตินา", "Argentina", "บัวโนสไอเรส", "Buenos Aires", "อเมริกาใต้", "South America"),
        ("เปรู", "Peru", "ลิมา", "Lima", "อเมริกาใต้", "South America"),
        ("ชิลี", "Chile", "ซันติอาโก", "Santiago", "อเมริกาใต้", "South America"),
        ("ออสเตรเลีย", "Australia", "แคนเบอร์รา", "Canberra", "โอเชียเนีย", "Oceania"),
        ("นิวซีแลนด์", "New Zealand", "เวลลิงตัน", "Wellington", "โอเชียเนีย", "Oceania"),
    )
)

ANIMALS = tuple(
    Animal(*row)
    for row in (
        ("แมว", "cat", "cats", 4, "ในบ้าน", "in the house", "ปลา", "fish"),
        ("หมา", "dog", "dogs", 4, "ในบ้าน", "in the house", "กระดูก", "bones"),
        ("วัว", "cow", "cows", 4, "ในทุ่งหญ้า", "in the meadow", "หญ้า", "grass"),
        ("ควาย", "buffalo", "buffaloes", 4, "ในทุ่งนา", "in the rice field", "หญ้า", "grass"),
        ("ม้า", "horse", "horses", 4, "ในคอก", "in the stable", "หญ้าแห้ง", "hay"),
        ("เสือ", "tiger", "tigers", 4, "ในป่า", "in the forest", "เนื้อ", "meat"),
        ("นก", "bird", "birds", 2, "บนต้นไม้", "in the tree", "เมล็ดพืช", "seeds"),
        ("ไก่", "chicken", "chickens", 2, "ในลานบ้าน", "in the yard", "ข้าวเปลือก", "grain"),
        ("เป็ด", "duck", "ducks", 2, "ริมบึง", "by the pond", "หอย", "snails"),
        ("กบ", "frog", "frogs", 4, "ริมบึง", "by the pond", "แมลง", "insects"),
        ("ปลา", "fish", "fish", 0, "ในน้ำ", "in the water", "พืชน้ำ", "water plants"),
        ("งู", "snake", "snakes", 0, "ในพงหญ้า", "in the tall grass", "หนู", "mice"),
        ("มด", "ant", "ants", 6, "ใต้ดิน", "under the ground", "น้ำตาล", "sugar"),
        ("ผึ้ง", "bee", "bees", 6, "ในรัง", "in the hive", "น้ำหวานจากดอกไม้", "nectar"),
        ("ผีเสื้อ", "butterfly", "butterflies", 6, "ในสวน", "in the garden", "น้ำหวานจากดอกไม้", "nectar"),
        ("แมงมุม", "spider", "spiders", 8, "บนใย", "in the web", "แมลงวัน", "flies"),
        ("กระต่าย", "rabbit", "rabbits", 4, "ในโพรง", "in the burrow", "ผัก", "vegetables"),
        ("หนู", "mouse", "mice", 4, "ในรู", "in the hole", "เศษอาหาร", "crumbs"),
        ("แพะ", "goat", "goats", 4, "บนเนินเขา", "on the hill", "ใบไม้", "leaves"),
        ("หมู", "pig", "pigs", 4, "ในคอก", "in the pen", "รำข้าว", "rice bran"),
        ("เต่า", "turtle", "turtles", 4, "ริมแม่น้ำ", "by the river", "ผัก", "vegetables"),
        ("แกะ", "sheep", "sheep", 4, "ในทุ่งหญ้า", "in the meadow", "หญ้า", "grass"),
        ("กวาง", "deer", "deer", 4, "ในป่า", "in the forest", "ใบไม้", "leaves"),
        ("ปู", "crab", "crabs", 10, "บนชายหาด", "on the beach", "สาหร่าย", "seaweed"),
    )
)

FRUITS = tuple(
    Fruit(*row)
    for row in (
        ("กล้วย", "banana", "bananas", "เหลือง", "yellow", "มีรสหวาน", "tastes sweet"),
        ("มะม่วงสุก", "ripe mango", "ripe mangoes", "เหลือง", "yellow", "มีรสหวาน", "tastes sweet"),
        ("มะนาว", "lime", "limes", "เขียว", "green", "มีรสเปรี้ยว", "tastes sour"),
        ("ฝรั่ง", "guava", "guavas", "เขียว", "green", "มีเนื้อกรอบ", "crisp"),
        ("แอปเปิล", "apple", "apples", "แดง", "red", "มีเนื้อกรอบ", "crisp"),
        ("เงาะ", "rambutan", "rambutans", "แดง", "red", "มีรสหวาน", "tastes sweet"),
        ("มังคุด", "mangosteen", "mangosteens", "ม่วง", "purple", "มีรสหวาน", "tastes sweet"),
        ("องุ่น", "grape", "grapes", "ม่วง", "purple", "มีรสหวาน", "tastes sweet"),
        ("ส้ม", "orange", "oranges", "ส้ม", "orange", "มีรสเปรี้ยวอมหวาน", "tastes sweet and sour"),
        ("มะละกอสุก", "ripe papaya", "ripe papayas", "ส้ม", "orange", "มีรสหวาน", "tastes sweet"),
        ("ลำไย", "longan", "longans", "น้ำตาล", "brown", "มีรสหวาน", "tastes sweet"),
        ("ชมพู่", "rose apple", "rose apples", "ชมพู", "pink", "มีเนื้อกรอบ", "crisp"),
    )
)

THINGS = tuple(
    Thing(*row)
    for row in (
        ("หนังสือ", "book", "books", "เล่ม"),
        ("ดินสอ", "pencil", "pencils", "แท่ง"),
        ("เก้าอี้", "chair", "chairs", "ตัว"),
        ("โต๊ะ", "table", "tables", "ตัว"),
        ("รถ", "car", "cars", "คัน"),
        ("จักรยาน", "bicycle", "bicycles", "คัน"),
        ("ร่ม", "umbrella", "umbrellas", "คัน"),
        ("บ้าน", "house", "houses", "หลัง"),
        ("เรือ", "boat", "boats", "ลำ"),
        ("เครื่องบิน", "plane", "planes", "ลำ"),
        ("จาน", "plate", "plates", "ใบ"),
        ("กระเป๋า", "bag", "bags", "ใบ"),
        ("หมวก", "hat", "hats", "ใบ"),
        ("เสื้อ", "shirt", "shirts", "ตัว"),
        ("ต้นไม้", "tree", "trees", "ต้น"),
        ("ดอกไม้", "flower", "flowers", "ดอก"),
        ("กุญแจ", "key", "keys", "ดอก"),
        ("ไข่", "egg", "eggs", "ฟอง"),
        ("จดหมาย", "letter", "letters", "ฉบับ"),
        ("ภาพวาด", "drawing", "drawings", "ภาพ"),
    )
)

PEOPLE = tuple(
    Person(*row)
    for row in (
        ("สมชาย", "Somchai", False),
        ("มาลี", "Malee", True),
        ("ก้อย", "Koi", True),
        ("ต้น", "Ton", False),
        ("แก้ว", "Kaew", True),
        ("ดาว", "Dao", True),
        ("เมฆ", "Mek", False),
        ("ฟ้า", "Fah", True),
        ("ใบเตย", "Baitoey", True),
        ("เอก", "Ek", False),
        ("พลอย", "Ploy", True),
        ("ฝน", "Fon", True),
        ("อ้อม", "Aom", True),
        ("บอย", "Boy", False),
        ("วิชัย", "Wichai", False),
        ("สุดา", "Suda", True),
        ("ปรีชา", "Preecha", False),
        ("อารีย์", "Aree", True),
        ("ธนา", "Thana", False),
        ("กมล", "Kamon", False),
    )
)

FAMILY = tuple(
    Pair(*row)
    for row in (
        ("พ่อ", "father"),
        ("แม่", "mother"),
        ("พี่ชาย", "older brother"),
        ("พี่สาว", "older sister"),
        ("น้องชาย", "younger brother"),
        ("น้องสาว", "younger sister"),
        ("ปู่", "grandfather"),
        ("ยาย", "grandmother"),
        ("ลุง", "uncle"),
        ("ป้า", "aunt"),
    )
)

PLACES = tuple(
    Pair(*row)
    for row in (
        ("ตลาด", "market"),
        ("โรงเรียน", "school"),
        ("วัด", "temple"),
        ("สวนสาธารณะ", "park"),
        ("ห้องสมุด", "library"),
        ("โรงพยาบาล", "hospital"),
        ("ร้านอาหาร", "restaurant"),
        ("สถานีรถไฟ", "railway station"),
        ("สนามเด็กเล่น", "playground"),
        ("พิพิธภัณฑ์", "museum"),
        ("ร้านหนังสือ", "bookshop"),
        ("สวนสัตว์", "zoo"),
    )
)

JOBS = tuple(
    Job(*row)
    for row in (
        ("ครู", "teacher", "สอนหนังสือในโรงเรียน", "teaches children at school"),
        ("หมอ", "doctor", "รักษาคนไข้ในโรงพยาบาล", "treats patients in a hospital"),
        ("พยาบาล", "nurse", "ดูแลคนไข้ในโรงพยาบาล", "cares for patients in a hospital"),
        ("ชาวนา", "rice farmer", "ปลูกข้าวในทุ่งนา", "grows rice in the fields"),
        ("ชาวประมง", "fisher", "จับปลาในทะเล", "catches fish in the sea"),
        ("กุ๊ก", "cook", "ทำอาหารในครัว", "prepares food in the kitchen"),
        ("ช่างไม้", "carpenter", "ทำโต๊ะและเก้าอี้จากไม้", "makes tables and chairs out of wood"),
        ("คนขับรถเมล์", "bus driver", "ขับรถเมล์ไปตามถนน", "drives a bus along the street"),
        ("คนขายผลไม้", "fruit seller", "ขายผลไม้ในตลาด", "sells fruit at the market"),
        ("นักร้อง", "singer", "ร้องเพลงบนเวที", "sings songs on a stage"),
        ("คนสวน", "gardener", "รดน้ำต้นไม้ในสวน", "waters the plants in the garden"),
        ("คนส่งจดหมาย", "mail carrier", "ส่งจดหมายไปตามบ้าน", "brings letters to the houses"),
        ("นักบิน", "pilot", "ขับเครื่องบินบนท้องฟ้า", "flies a plane through the sky"),
        ("ช่างตัดผม", "barber", "ตัดผมให้ลูกค้า", "cuts the hair of customers"),
    )
)

DISHES = tuple(
    Dish(*row)
    for row in (
        ("ข้าวผัด", "fried rice", ("ข้าว", "ไข่", "ต้นหอม"), ("rice", "eggs", "spring onions")),
        ("ส้มตำ", "papaya salad", ("มะละกอ", "มะนาว", "พริก"), ("papaya", "lime", "chillies")),
        ("ต้มยำกุ้ง", "tom yam soup", ("กุ้ง", "ตะไคร้", "มะนาว"), ("prawns", "lemongrass", "lime")),
        ("ผัดไทย", "pad thai", ("เส้นเล็ก", "ไข่", "ถั่วงอก"), ("rice noodles", "eggs", "bean sprouts")),
        ("แกงเขียวหวาน", "green curry", ("ไก่", "กะทิ", "โหระพา"), ("chicken", "coconut milk", "basil")),
        ("ไข่เจียว", "omelette", ("ไข่", "น้ำปลา", "หมูสับ"), ("eggs", "fish sauce", "minced pork")),
        ("ข้าวต้ม", "rice soup", ("ข้าว", "ปลา", "ขิง"), ("rice", "fish", "ginger")),
        ("ข้าวเหนียวมะม่วง", "mango sticky rice", ("ข้าวเหนียว", "มะม่วง", "กะทิ"), ("sticky rice", "mango", "coconut milk")),
    )
)

COLOURS = tuple(
    Pair(*row)
    for row in (
        ("แดง", "red"),
        ("เขียว", "green"),
        ("น้ำเงิน", "blue"),
        ("เหลือง", "yellow"),
        ("ดำ", "black"),
        ("ขาว", "white"),
        ("ม่วง", "purple"),
        ("ส้ม", "orange"),
        ("ชมพู", "pink"),
        ("น้ำตาล", "brown"),
        ("เทา", "grey"),
    )
)

OPPOSITES = tuple(
    (Pair(*first), Pair(*second))
    for first, second in (
        (("ใหญ่", "big"), ("เล็ก", "small")),
        (("สูง", "tall"), ("เตี้ย", "short")),
        (("ร้อน", "hot"), ("เย็น", "cold")),
        (("เร็ว", "fast"), ("ช้า", "slow")),
        (("ใหม่", "new"), ("เก่า", "old")),
        (("หนัก", "heavy"), ("เบา", "light")),
        (("ง่าย", "easy"), ("ยาก", "difficult")),
        (("กว้าง", "wide"), ("แคบ", "narrow")),
        (("แข็ง", "hard"), ("นุ่ม", "soft")),
        (("มืด", "dark"), ("สว่าง", "bright")),
        (("ถูก", "cheap"), ("แพง", "expensive")),
        (("สะอาด", "clean"), ("สกปรก", "dirty")),
        (("แห้ง", "dry"), ("เปียก", "wet")),
        (("รวย", "rich"), ("จน", "poor")),
        (("แข็งแรง", "strong"), ("อ่อนแอ", "weak")),
        (("เต็ม", "full"), ("ว่าง", "empty")),
        (("ใกล้", "near"), ("ไกล", "far")),
        (("หนา", "thick"), ("บาง", "thin")),
        (("ลึก", "deep"), ("ตื้น", "shallow")),
        (("ดี", "good"), ("เลว", "bad")),
    )
)

# The colour is the one that Thai tradition gives the day.
DAYS = tuple(
    (Pair(*day), Pair(*colour))
    for day, colour in (
        (("วันจันทร์", "Monday"), ("เหลือง", "yellow")),
        (("วันอังคาร", "Tuesday"), ("ชมพู", "pink")),
        (("วันพุธ", "Wednesday"), ("เขียว", "green")),
        (("วันพฤหัสบดี", "Thursday"), ("ส้ม", "orange")),
        (("วันศุกร์", "Friday"), ("ฟ้า", "light blue")),
        (("วันเสาร์", "Saturday"), ("ม่วง", "purple")),
        (("วันอาทิตย์", "Sunday"), ("แดง", "red")),
    )
)

MONTHS = tuple(
    Pair(*row)
    for row in (
        ("มกราคม", "January"),
        ("กุมภาพันธ์", "February"),
        ("มีนาคม", "March"),
        ("เมษายน", "April"),
        ("พฤษภาคม", "May"),
        ("มิถุนายน", "June"),
        ("กรกฎาคม", "July"),
        ("สิงหาคม", "August"),
        ("กันยายน", "September"),
        ("ตุลาคม", "October"),
        ("พฤศจิกายน", "November"),
        ("ธันวาคม", "December"),
    )
)
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_THAI_DIGITS = ("ศูนย์", "หนึ่ง", "สอง", "สาม", "สี่", "ห้า", "หก", "เจ็ด", "แปด", "เก้า")
_ENGLISH_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_ENGLISH_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def thai_words(number: int) -> str:
    """A number from 0 to 99 in Thai words.

    >>> thai_words(21)
    'ยี่สิบเอ็ด'
    """
    tens, ones = divmod(number, 10)
    if tens == 0:
        return _THAI_DIGITS[ones]
    before = {1: "", 2: "ยี่"}.get(tens, _THAI_DIGITS[tens])
    after = {0: "", 1: "เอ็ด"}.get(ones, _THAI_DIGITS[ones])
    return f"{before}สิบ{after}"


def english_words(number: int) -> str:
    """A number from 0 to 99 in English words.

    >>> english_words(21)
    'twenty-one'
    """
    if number < 20:
        return _ENGLISH_NUMBERS[number]
    tens, ones = divmod(number, 10)
    return _ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH_NUMBERS[ones]}" if ones else "")


def thai_numerals(number: int) -> str:
    """A number in Thai digits.

    >>> thai_numerals(42)
    '๔๒'
    """
    return str(number).translate({ord("0") + digit: 0x0E50 + digit for digit in range(10)})


def with_article(noun: str) -> str:
    """An English noun with its indefinite article.

    >>> with_article("ant")
    'an ant'
    """
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def vocabulary() -> tuple[Pair, ...]:
    """The words that the demo's text translates, Thai and English, each side without repeats."""
    words: dict[str, Pair] = {}
    seen_english: set[str] = set()
    adjectives = (word for pair in OPPOSITES for word in pair)
    colours = (Pair(f"สี{colour.th}", colour.en) for colour in COLOURS)
    months = (Pair(f"เดือน{month.th}", month.en) for month in MONTHS)
    days = (day for day, _ in DAYS)
    for group in (ANIMALS, FRUITS, THINGS, FAMILY, PLACES, JOBS, DISHES, colours, adjectives, days, months):
        for word in group:
            if word.th not in words and word.en not in seen_english:
                words[word.th] = Pair(word.th, word.en)
                seen_english.add(word.en)
    return tuple(words.values())
