# SPDX-License-Identifier: Apache-2.0
"""What an extended tokenizer promises for any text: other scripts keep their ids, Thai comes back as it was given, and
every way to the ids gives the same ids. Over real text, text made to hurt, and text that hypothesis makes."""

import gzip
import json
import unicodedata
from collections.abc import Iterator
from itertools import islice, pairwise, takewhile
from pathlib import Path

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pythainlp.util import reorder_vowels
from tokenizers import Tokenizer
from transformers import AutoTokenizer, TokenizersBackend

from jai.demo.text.corpus import build_text
from jai.errors import UserError
from jai.tokenization.extend import RESERVED_TOKEN, extend_tokenizer, new_token_pieces
from jai.tokenization.normalization import THAI_LOOK_ALIKES, replace_all, replacements
from jai.tokenization.phi3_style import SPECIAL_TOKENS, train_phi3_style

THAI = regex.compile(r"\p{Script=Thai}")
PACKAGE = Path(__file__).parents[1]
NEW_TOKENS = 4000  # on the real phi-3; from 3 M characters that takes some seconds
TRAINING_CHARACTERS = 3_000_000

MANY = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

OTHER_TEXTS = {
    "json": json.dumps({"a": [1, 2.5, None, True], "ключ": {"é": "\u2028", "\\": '"'}}, ensure_ascii=False, indent=2)
    + json.dumps({"thai": "ไทย", "emoji": "😀"}),
    "emoji": "👩‍👩‍👧‍👦 👍🏽 🇹🇭 ❤️ 1️⃣ 😀😀 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "Lao": "ສະບາຍດີ ຂ້ອຍຊື່ສົມໄຊ ນ້ຳ ນໍ້າ ໑໒໓",
    "Khmer": "សួស្តី ខ្ញុំឈ្មោះសុខា ភាសាខ្មែរ ១២៣",
    "Myanmar": "မင်္ဂလာပါ ကျွန်တော့်နာမည် ၁၂၃",
    "Arabic": "السَّلَامُ عَلَيْكُمْ ورحمة الله ١٢٣ لا",
    "Devanagari": "नमस्ते दुनिया क्षत्रिय १२३ क\u093c",
    "Chinese": "你好，世界。繁體中文與简体中文　全形空格",
    "Japanese": "こんにちは世界。が か\u3099 ｶﾞ カタカナ",
    "Korean": "안녕하세요 세계 \u1112\u1161\u11ab",
    "Hebrew with marks": "בְּרֵאשִׁית בָּרָא אֱלֹהִים \u05e9\u05c1\u05bc",
    "combining Latin": "e\u0301 a\u0323\u0302 a\u0302\u0323 Z\u0351\u036b\u0343\u036a ﬁ Å Å Å",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\xad",
    "invisible characters": "\u200b\u200c\u200d\u200e\u2060\ufeff\ufffe\ufffd\U000e0001 \u00a0\u2003\u3000",
    "planes": "𝕳𝖊𝖑𝖑𝖔 𓀀𓂀 𠜎𠜱 \U0010ffff\U000f0000",
    "spaces": "   x  y   \n\n\n\t\t z \r\n ▁▁ _▁_ ",
    "baht": "฿100 and 100฿",
    "byte tokens as text": "<0x00><0xE0><0xB8> <0x41> <unk> <s> ",
    "special tokens": "<|user|>\n hi  <|end|>\n<|assistant|> \t x</s>  y<|endoftext|>\n z<|reserved_3|>",
}

CONSONANTS = st.characters(min_codepoint=0x0E01, max_codepoint=0x0E2E)
ABOVE_AND_BELOW = [*map(chr, [0x0E31, *range(0x0E34, 0x0E3B), *range(0x0E47, 0x0E4F)])]
MARKS = st.lists(st.sampled_from(ABOVE_AND_BELOW), max_size=2).map("".join)
SARA_AM = st.sampled_from(["\u0e33", "\u0e4d\u0e32"])  # one character, or nikhahit and sara aa
FOLLOWING = st.one_of(st.just(""), SARA_AM, st.sampled_from("ะาๅๆฯ"))
LEADING = st.sampled_from(["", "", *"เแโใไ"])
SYLLABLES = st.builds("{}{}{}{}".format, LEADING, CONSONANTS, MARKS, FOLLOWING)
BETWEEN = st.sampled_from([" ", "  ", "\n", "\t", "\u200b", "\u200c", "\u200d", "\u2060", "\u00a0", ".", "/", "<", "฿"])
LATIN = st.text(st.sampled_from("abcXYZéñ-_'0123456789"), min_size=1, max_size=6)
THAI_DIGITS = st.text(st.sampled_from("๐๑๒๓๔๕๖๗๘๙0123456789.,"), min_size=1, max_size=5)
WORDS = st.lists(SYLLABLES, min_size=1, max_size=5).map("".join)
THAI_TEXTS = st.lists(st.one_of(WORDS, WORDS, BETWEEN, LATIN, THAI_DIGITS), max_size=12).map("".join)
# Anything from the Thai block in any order: marks without letters, three tone marks, unassigned code points.
THAI_SOUP = st.text(
    st.one_of(
        st.characters(min_codepoint=0x0E00, max_codepoint=0x0E7F),
        st.sampled_from(ABOVE_AND_BELOW),
        st.sampled_from(" aZ2\n\u200b\u200c\u200d\u0301\u0323"),
    ),
    max_size=40,
)
OTHER_CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.characters(categories=["Mn", "Mc", "Cf", "Zs"]),
    *(
        st.characters(min_codepoint=first, max_codepoint=last)
        for first, last in ((0x0E80, 0x0EFF), (0x1780, 0x17FF), (0x0590, 0x06FF), (0x3040, 0x9FFF), (0x1F300, 0x1FAFF))
    ),
).filter(lambda character: not THAI.match(character))
SPECIALS = st.sampled_from([*SPECIAL_TOKENS, "</s>", "<s>", "<unk>", "<0xE0>", "<|", "|>", " ", "\n", "▁"])
OTHER_PARTS = st.one_of(st.text(OTHER_CHARACTERS, max_size=12), SPECIALS, LATIN)
OTHERS = st.lists(OTHER_PARTS, max_size=10).map("".join)
ANYTHING = st.lists(st.one_of(THAI_TEXTS, THAI_SOUP, OTHERS), max_size=4).map("".join)


class Pair:
    """A base, its extension, and the extension as it comes back from its folder in two ways."""

    def __init__(self, base: TokenizersBackend, extended: TokenizersBackend, folder: Path):
        extended.save_pretrained(folder)
        self.base, self.extended = base, extended
        self.loaded: TokenizersBackend = AutoTokenizer.from_pretrained(folder)
        self.bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.first_new_id = -(-len(base) // 64) * 64

    def __repr__(self) -> str:  # printed with each failing example
        return f"<{len(self.base)} → {len(self.extended)} entries>"


@pytest.fixture(scope="module")
def tiny_pair(sentences, tmp_path_factory) -> Pair:
    base = train_phi3_style(sentences[2:] * 4, vocab_size=400)
    extended = extend_tokenizer(base, build_text(0).pretrain_th, vocab_size=448 + 100)
    return Pair(base, extended, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def exact_pair(tiny_pair, tmp_path_factory) -> Pair:
    """As the tiny one, but look-alikes stay apart."""
    texts = build_text(0).pretrain_th
    extended = extend_tokenizer(tiny_pair.base, texts, vocab_size=448 + 100, normalize_thai=False)
    return Pair(tiny_pair.base, extended, tmp_path_factory.mktemp("exact"))


def documents(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


@pytest.fixture(scope="module")
def thai_documents(shared_data) -> list[str]:
    return [row["text"] for row in islice(documents(shared_data / "train_th.jsonl.gz"), 3000)]


@pytest.fixture(scope="module")
def phi3_pair(shared_data, thai_documents, tmp_path_factory) -> Pair:
    base = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "phi3-mini")
    held_out, texts, characters = 200, [], 0
    for text in thai_documents[held_out:]:
        texts.append(text)
        characters += len(text)
        if characters > TRAINING_CHARACTERS:
            break
    extended = extend_tokenizer(base, texts, vocab_size=32064 + NEW_TOKENS)
    return Pair(base, extended, tmp_path_factory.mktemp("phi3"))


@pytest.fixture(params=["tiny", "phi3"])
def pair(request) -> Pair:
    """Tiny ones always, and the real phi-3 where the shared data is there."""
    return request.getfixturevalue(f"{request.param}_pair")


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def as_read(text: str) -> str:
    """The text as the tokenizers here read it, and give it back."""
    return replace_all(text, replacements("Thai", normalize_thai=True))


def round_trip(pair: Pair, text: str) -> str:
    """The text decoded again. A leading space is the tokenizer's own, so something stands before it."""
    return pair.extended.decode(ids(pair.extended, "x" + text), clean_up_tokenization_spaces=False)[1:]


class TestTextWithoutTheScriptKeepsItsIds:
    @pytest.mark.parametrize("name", OTHER_TEXTS)
    def test_made_to_hurt(self, pair, name):
        text = THAI.sub("", OTHER_TEXTS[name])
        for variant in (text, " " + text, text.upper(), text[::-1], nfc(text), unicodedata.normalize("NFD", text)):
            assert ids(pair.extended, variant) == ids(pair.base, variant)

    @pytest.mark.parametrize("file", ["train_en", "instruct_en", "parallel_en_th"])
    def test_english(self, phi3_pair, shared_data, file):
        rows = islice(documents(shared_data / f"{file}.jsonl.gz"), 1500)
        fields = {"train_en": "text", "instruct_en": "messages", "parallel_en_th": "en"}
        texts = [json.dumps(row[fields[file]], ensure_ascii=False)[:4000] for row in rows]
        texts = [text for text in texts if not THAI.search(text)]
        assert len(texts) > 1000
        assert phi3_pair.extended(texts)["input_ids"] == phi3_pair.base(texts)["input_ids"]

    def test_source_code(self, pair):
        files = sorted(path for path in PACKAGE.rglob("*.py") if ".venv" not in path.parts)
        texts = [THAI.sub("", path.read_text(encoding="utf-8")) for path in files]
        assert sum(map(len, texts)) > 100_000
        assert pair.extended(texts)["input_ids"] == pair.base(texts)["input_ids"]

    @given(text=OTHERS)
    @MANY
    def test_any_text(self, pair, text):
        assert ids(pair.extended, text) == ids(pair.base, text)

    @given(before=OTHERS, thai=WORDS, after=OTHERS)
    @MANY
    def test_also_beside_the_script(self, pair, before, thai, after):
        """Around a line of Thai the ids are the base's: only those of the Thai itself differ."""
        base, extended = (ids(t, f"{before}\n{thai}\n{after}") for t in (pair.base, pair.extended))
        of_thai = len(ids(pair.base, f"x\n{thai}")) - len(ids(pair.base, "x\n"))
        same = common(base, extended) + common(base[::-1], extended[::-1])
        assert same >= len(base) - of_thai


def common(first: list[int], second: list[int]) -> int:
    """How many ids two texts begin with that are the same."""
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first, second)))


class TestRoundTrip:
    @pytest.mark.parametrize("name", [name for name in OTHER_TEXTS if name not in ("special tokens", "spaces")])
    def test_other_text_is_exact(self, pair, name):
        # Exact, so not normalised: the marks of other scripts stay as they were given.
        assert round_trip(pair, OTHER_TEXTS[name]) == OTHER_TEXTS[name]

    @given(text=st.text(OTHER_CHARACTERS))
    @MANY
    def test_any_other_text_is_exact(self, pair, text):
        text = text.replace("▁", "")  # the tokenizer's own sign for a space
        assert round_trip(pair, text) == text

    @given(text=THAI_TEXTS)
    @MANY
    def test_thai(self, pair, text):
        assert round_trip(pair, text) == as_read(text) == as_read(nfc(text))
        assert ids(pair.extended, text) == ids(pair.extended, nfc(text))

    @given(text=THAI_SOUP)
    @MANY
    def test_any_string_of_thai_characters(self, pair, text):
        assert round_trip(pair, text) == as_read(text)

    def test_real_thai(self, phi3_pair, thai_documents):
        for text in thai_documents[:200]:
            assert round_trip(phi3_pair, text) == as_read(text)
        exact = sum(as_read(text) == nfc(text) for text in thai_documents[:200])
        assert exact > 190  # the rest have look-alikes

    @given(text=THAI_SOUP.map(nfc))
    @MANY
    def test_exact_without_the_option(self, exact_pair, text):
        assert round_trip(exact_pair, text) == text

    @given(parts=st.lists(st.tuples(st.sampled_from(SPECIAL_TOKENS[1:]), THAI_TEXTS), min_size=1, max_size=4))
    @MANY
    def test_thai_between_special_tokens(self, pair, parts):
        """Special tokens stay whole, and swallow the whitespace after them, as in phi-3's."""
        encoded = ids(pair.extended, "x" + "".join(token + text for token, text in parts))
        special = set(pair.base.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
        assert [i for i in encoded if i in special] == [pair.base.convert_tokens_to_ids(token) for token, _ in parts]
        expected = "x" + "".join(token + as_read(text.lstrip()) for token, text in parts)
        assert pair.extended.decode(encoded, clean_up_tokenization_spaces=False) == expected


LOOK_ALIKES = (
    ("น\u0e33", "น\u0e4d\u0e32"),  # sara am; nikhahit and sara aa
    ("น\u0e49\u0e33", "น\u0e49\u0e4d\u0e32", "น\u0e4d\u0e49\u0e32", "น\u0e33\u0e49"),
    ("\u0e41ปล", "\u0e40\u0e40ปล"),
    ("ก\u0e35\u0e48", "ก\u0e48\u0e35"),
    ("ก\u0e38\u0e48", "ก\u0e48\u0e38"),
    ("ก\u0e48า", "กา\u0e48"),
    ("พันธ\u0e38\u0e4c", "พันธ\u0e4c\u0e38"),
)


class TestLookAlikes:
    @pytest.mark.parametrize("words", LOOK_ALIKES)
    def test_one_encoding(self, pair, words):
        usual, *others = (f"x {word} แล้ว {word}" for word in words)
        assert others
        for other in others:
            assert ids(pair.extended, other) == ids(pair.extended, usual) == ids(pair.loaded, other)
            assert pair.bare.encode(other).ids == pair.bare.encode(usual).ids
            assert round_trip(pair, other) == usual

    @pytest.mark.parametrize("words", LOOK_ALIKES)
    def test_kept_apart_without_the_option(self, exact_pair, words):
        for word in words:
            assert round_trip(exact_pair, word) == nfc(word)

    @given(
        words=st.lists(
            st.builds(
                "{}{}{}{}{}".format,
                st.sampled_from(["", "", "\u0e40\u0e40", *"เแโใไ"]),
                CONSONANTS,
                st.sampled_from(["", "", *"ัิีึืุู็"]),
                st.sampled_from(["", "", *"่้๊๋์"]),
                st.sampled_from(["", "", *"ะาำ", "\u0e4d\u0e32"]),
            ).flatmap(lambda word: st.sampled_from([word, word[:-2] + word[-2:][::-1]])),
            max_size=8,
        )
    )
    @MANY
    def test_as_pythainlp_reorders(self, pair, words):
        """Words of one vowel mark and one tone mark, their last two characters perhaps swapped."""
        text = "x" + " ".join(words)
        assert round_trip(pair, text) == reorder_vowels(text)

    def test_real_text_as_pythainlp_reorders(self, phi3_pair, thai_documents):
        different = [text for text in thai_documents if as_read(text) != nfc(text)]
        assert len(different) > 10
        for text in different:
            # What it does beyond look-alikes: the letter lakkhangyao becomes sara aa, which looks otherwise.
            assert as_read(text) == reorder_vowels(nfc(text).replace("\u0e45", "\0")).replace("\0", "\u0e45")

    def test_offsets_are_those_of_the_text_as_given(self, pair):
        for text in ("x เเปลก y", "x น้ํา y", "x กี่่ y", "a ท่ีดี b"):
            encoding = pair.loaded(text, return_offsets_mapping=True)
            spans = encoding["offset_mapping"]
            assert spans[0][0] == 0
            assert spans[-1][1] == len(text)
            assert all(start <= end for start, end in spans)
            assert all(before[0] <= after[0] for before, after in pairwise(spans))
            # Inside a replaced cluster a token may have any of its characters; after it spans are exact.
            last = text.rindex(" ") + 1
            assert text[slice(*spans[encoding.char_to_token(last)])].strip().startswith(text[last])

    def test_replacements_are_stable(self):
        """What a replacement makes, no later one undoes; and the usual form is never touched."""
        for words in LOOK_ALIKES:
            assert {as_read(word) for word in words} == {words[0]}
        for _, usual in THAI_LOOK_ALIKES:
            assert as_read(as_read("ก" + usual)) == as_read("ก" + usual)

    def test_other_scripts_have_none(self):
        assert replacements("Lao", normalize_thai=True) == replacements("Lao", normalize_thai=False)
        assert not set(THAI_LOOK_ALIKES[:1]) & set(replacements("thai", normalize_thai=False))


class TestEveryWayGivesTheSameIds:
    @given(texts=st.lists(ANYTHING, min_size=1, max_size=4))
    @MANY
    def test_single_batched_loaded_and_bare(self, pair, texts):
        single = [ids(pair.extended, text) for text in texts]
        assert pair.extended(texts)["input_ids"] == single
        assert pair.loaded(texts)["input_ids"] == single
        assert [ids(pair.loaded, text) for text in texts] == single
        assert [encoding.ids for encoding in pair.bare.encode_batch(texts)] == single
        assert [pair.bare.encode(text).ids for text in texts] == single
        strings = [pair.loaded.convert_ids_to_tokens(row) for row in single]
        assert [pair.loaded.convert_tokens_to_ids(row) for row in strings] == single

    @given(texts=st.lists(ANYTHING, min_size=2, max_size=4))
    @MANY
    def test_padded(self, pair, texts):
        padded = pair.extended(texts, padding=True)
        for text, row, mask in zip(texts, padded["input_ids"], padded["attention_mask"]):
            assert [i for i, real in zip(row, mask) if real] == ids(pair.extended, text)

    def test_real_thai(self, phi3_pair, thai_documents):
        texts = thai_documents[:200]
        single = [ids(phi3_pair.extended, text) for text in texts]
        assert phi3_pair.loaded(texts)["input_ids"] == single
        assert [encoding.ids for encoding in phi3_pair.bare.encode_batch(texts)] == single


class TestVocabulary:
    def test_size(self, pair):
        size = len(pair.extended)
        assert size == pair.first_new_id + (100 if len(pair.base) == 400 else NEW_TOKENS)
        assert size == pair.extended.vocab_size == len(pair.loaded) == pair.bare.get_vocab_size()
        assert sorted(pair.extended.get_vocab().values()) == list(range(size))

    def test_specials_are_the_bases(self, pair):
        assert pair.extended.special_tokens_map == pair.base.special_tokens_map
        for token in (*SPECIAL_TOKENS, "<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"):
            assert pair.loaded.convert_tokens_to_ids(token) == pair.base.convert_tokens_to_ids(token)
            if token in SPECIAL_TOKENS:
                assert ids(pair.loaded, token) == [pair.base.convert_tokens_to_ids(token)]
        if len(pair.base) != 400:
            assert pair.loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(32000, 32011))

    def test_every_id_decodes_to_something(self, pair):
        before = pair.extended.convert_tokens_to_ids("x")
        decoded = pair.extended.batch_decode(
            [[before, i] for i in range(len(pair.extended))], clean_up_tokenization_spaces=False
        )
        assert all(text.startswith("x") and len(text) > 1 for text in decoded)
        surfaces = pair.extended.convert_ids_to_tokens(list(range(pair.first_new_id, len(pair.extended))))
        assert decoded[pair.first_new_id :] == ["x" + surface.replace("▁", " ") for surface in surfaces]

    def test_merges_of_the_script_have_the_new_ids(self, pair):
        vocab = pair.extended.get_vocab()
        thai = {token for token in vocab if regex.fullmatch(r"▁?\p{Script=Thai}+", token)}
        assert {token for token, i in vocab.items() if i >= pair.first_new_id} == thai - pair.base.get_vocab().keys()
        for i in range(len(pair.base), pair.first_new_id):
            assert vocab[RESERVED_TOKEN.format(i)] == i

    def test_each_new_token_is_what_its_string_becomes(self, pair):
        bpe = pair.extended.backend_tokenizer.model
        surfaces = [
            token
            for token, i in pair.extended.get_vocab().items()
            if i >= pair.first_new_id and as_read(token) == token
        ]
        others = [token for token in surfaces if [piece.value for piece in bpe.tokenize(token)] != [token]]
        # Runs of one character can be cut in more ways than one: ววว is วว ว or ว วว.
        assert len(others) <= len(surfaces) / 1000, others[:10]


class TestBadInputWithTheRealPhi3:
    def test_too_little_text_names_the_size_that_fits(self, phi3_pair, thai_documents):
        texts = thai_documents[:50]
        with pytest.raises(UserError, match=r"gave \d+ \(\d+ characters and \d+ merges\)") as error:
            extend_tokenizer(phi3_pair.base, texts, vocab_size=64000)
        fits = int(regex.search(r"Give a vocab_size of (\d+)", str(error.value))[1])
        assert 32064 < fits < 64000
        extended = extend_tokenizer(phi3_pair.base, texts, vocab_size=fits)
        assert len(extended) == fits
        assert (
            sum(
                1
                for pieces in new_token_pieces(phi3_pair.base.backend_tokenizer, extended.backend_tokenizer).values()
                if pieces
            )
            == fits - 32064
        )

    def test_below_the_embedding_rows(self, phi3_pair, thai_documents):
        with pytest.raises(UserError, match="vocab_size above 32064"):
            extend_tokenizer(phi3_pair.base, thai_documents[:50], vocab_size=32064)
