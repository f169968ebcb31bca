# SPDX-License-Identifier: Apache-2.0
"""`jai tokenizer report`: every figure against a count by hand, on tiny tokenizers of several kinds."""

import dataclasses
import json
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import TokenizersBackend

from jai.errors import UserError
from jai.tokenization import measure as measuring
from jai.tokenization.extend import RESERVED_TOKEN
from jai.tokenization.loading import RECORD_FILE
from jai.tokenization.measure import TokenizerFigures, count_words, measure, script_of
from jai.tokenization.options import ReportTokenizersOptions, TrainTokenizerOptions
from jai.tokenization.phi3_style import train_phi3_style
from jai.tokenization.report import JSON_FILE, MARKDOWN_FILE, PICTURE_FILE, Report, load_subjects, report_tokenizers
from jai.tokenization.train import train_tokenizer

THAI_TEXT = (
    "สวัสดีครับ ผมชื่อสมชาย อยู่ที่กรุงเทพมหานคร",
    "น้ำในแม่น้ำใสมาก ปลาก็ว่ายน้ำอยู่ในน้ำ ๑๒๓ ๔๕๖ ราคา 20 บาท",
    "กินข้าวหรือยัง กินแล้ว วันนี้กินข้าวผัดกับเพื่อนที่ร้านหน้าโรงเรียน",
    "คุณครูพูดว่า การเรียนรู้คือการเดินทาง ผู้ที่รู้จักถามคือผู้ที่รู้จักคิด",
)
FIRST_NEW, SIZE = 448, 540  # of the extended tokenizer; 400 to 447 are reserved
NEW = SIZE - FIRST_NEW
TEXTS = st.text(
    st.one_of(
        st.sampled_from("กขนสวดีมำา้่ิัุู๑๒ \nthequick,.20"),
        st.characters(min_codepoint=0x0E01, max_codepoint=0x0E5B),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)
SEVERAL = st.lists(TEXTS, min_size=1, max_size=4)
FEW = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def make_report(tokenizers, texts, *, console: Console, **options) -> Report:
    given = ReportTokenizersOptions(tokenizer=list(tokenizers), text=[*map(str, texts)], **options)
    return report_tokenizers(given, console=console)


@pytest.fixture(scope="module", autouse=True)
def one_pass_of_speed():
    """Speeds are not what these tests are about, apart from one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "SPEED_PASSES", 1)
        yield


@pytest.fixture(scope="module")
def base(sentences) -> TokenizersBackend:
    """Lacks many Thai characters, which fall back to bytes."""
    return train_phi3_style(sentences[2:] * 4, vocab_size=400)


@pytest.fixture(scope="module")
def extended(base) -> TokenizersBackend:
    """Merges of Thai after the base's, whatever they are: `extend_tokenizer` chooses among them."""
    learner = Tokenizer(models.BPE())
    runs = [run for text in THAI_TEXT for run in regex.findall(r"▁?\p{Thai}+", text.replace(" ", "▁"))]
    learner.train_from_iterator(runs, trainers.BpeTrainer(vocab_size=1000, show_progress=False))
    learned = sorted(learner.get_vocab(), key=learner.token_to_id)
    state = json.loads(base.backend_tokenizer.to_str())
    vocab = base.get_vocab() | {RESERVED_TOKEN.format(i): i for i in range(len(base), FIRST_NEW)}
    vocab |= {piece: FIRST_NEW + i for i, piece in enumerate([p for p in learned if p not in vocab][:NEW])}
    merges = json.loads(learner.to_str())["model"]["merges"]
    state["model"]["vocab"] = vocab
    state["model"]["merges"] += [pair for pair in merges if "".join(pair) in vocab]
    return TokenizersBackend(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **base.special_tokens_map)


@pytest.fixture(scope="module")
def byte_level() -> TokenizersBackend:
    """As GPT-2's: tokens are strings of bytes, which may end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(THAI_TEXT * 2, trainer)
    return TokenizersBackend(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def folders(base, extended, tmp_path_factory) -> tuple[str, str]:
    """The base and its extension, saved."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (("base", base), ("extended", extended)):
        tokenizer.save_pretrained(root / name)
    return str(root / "base"), str(root / "extended")


def figures_of(tokenizer: TokenizersBackend, texts: list[str], new=()) -> TokenizerFigures:
    backend = tokenizer.backend_tokenizer
    _, figures = measure((("a", text) for text in texts), {"it": backend}, {"it": new}, None)
    return figures["it"]


def write_lines(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def tokens_of(tokenizer: TokenizersBackend, texts) -> list[str]:
    return [
        token
        for text in texts
        for token in tokenizer.convert_ids_to_tokens(tokenizer(unicodedata.normalize("NFC", text))["input_ids"])
    ]


def shares_by_hand(tokens: list[str], to_bytes) -> tuple[Counter, Counter]:
    """Tokens of each character, and characters made of parts, going token by token with a buffer of bytes."""
    shares, parts = Counter(), Counter()
    buffer, waiting = b"", 0
    for token in tokens:
        data = to_bytes(token)
        if isinstance(data, str):
            assert not waiting
            for character in data:
                shares[character] += 1 / len(data)
            continue
        buffer, waiting = buffer + data, waiting + 1
        try:
            whole = buffer.decode()
        except UnicodeDecodeError:
            continue
        for character in whole:
            shares[character] += waiting / len(whole)
            parts[character] += 1
        buffer, waiting = b"", 0
    assert not waiting
    return shares, parts


def phi3_style(token: str) -> bytes | str:
    piece = regex.fullmatch("<0x(..)>", token)
    return bytes.fromhex(piece[1]) if piece else token.replace("▁", " ")


def gpt2_style(token: str) -> bytes | str:
    data = decoders.ByteLevel().decode([token])
    if "\ufffd" not in data:
        return data
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others are at U+0100 and up, in order
    others = [byte for byte in range(256) if byte not in printable]
    return bytes(others[ord(c) - 256] if ord(c) >= 256 else ord(c) for c in token)


def by_script(characters: Counter) -> Counter:
    scripts = Counter()
    for character, count in characters.items():
        scripts[script_of(character)] += count
    return scripts


class TestText:
    @given(st.characters(exclude_categories=["Cs", "Cn", "Co"]))
    def test_scripts_are_unicodes(self, character):
        name = script_of(character).replace(" ", "_")
        try:
            pattern = regex.compile(rf"\p{{Script={name}}}")
        except regex.error:  # a script newer than one of the two tables
            return
        assert pattern.fullmatch(character)

    def test_words(self):
        assert count_words("แมวกินปลา the cat's 3 fish") == Counter({"Thai": 3, "Latin": 4, "Common": 1})
        assert count_words("ปลาABC") == Counter({"Thai": 1, "Latin": 1})
        assert count_words(" … !? \n") == Counter()
        assert count_words("cafe\u0301 ພາສາລາວ") == Counter({"Latin": 1, "Lao": 1})

    def test_amounts_by_source_and_script(self, base):
        documents = [("b", "กข a"), ("a", "ภาษาไทย"), ("b", "\u0301é1\n")]
        text, _ = measure(documents, {"it": base.backend_tokenizer}, {}, None)
        assert text.documents == 3
        assert list(text.by_source) == ["b", "a"]
        assert dataclasses.astuple(text.by_source["a"]) == (7, 21, 1)
        assert (text.whole.characters, text.whole.bytes) == (15, 8 + 21 + 6)
        scripts = {name: (size.characters, size.bytes) for name, size in text.by_script.items()}
        assert scripts == {"Thai": (9, 27), "Latin": (2, 3), "Common": (3, 3), "Inherited": (1, 2)}
        assert text.words_counted_in == 15

    def test_text_is_taken_in_nfc(self, base):
        decomposed, composed = "e\u0301 ท\u0e48\u0e38ง", "é ท\u0e38\u0e48ง"
        assert unicodedata.normalize("NFC", decomposed) == composed
        found, expected = figures_of(base, [decomposed]), figures_of(base, [composed])
        assert found.by_script == expected.by_script
        assert found.round_trip.failures == 0

    def test_words_of_long_sources_are_scaled_up(self, base, monkeypatch):
        documents = [("a", "แมวกินปลา the cat"), ("a", "x" * 34)]
        whole, _ = measure(documents, {"it": base.backend_tokenizer}, {}, None)
        assert (whole.words_counted_in, whole.whole.words) == (51, 6)
        monkeypatch.setattr(measuring, "WORD_CHARACTERS", 10)
        part, _ = measure(documents, {"it": base.backend_tokenizer}, {}, None)
        assert part.words_counted_in == 17
        assert part.whole.words == 15
        assert part.by_script["Thai"].words == 9
        assert part.by_source["a"].words == 15

    def test_many_sources_are_put_together(self, base, monkeypatch):
        monkeypatch.setattr(measuring, "MAX_SOURCES", 2)
        documents = [("a", "x"), ("b", "yyyy"), ("c", "z"), ("a", "x"), ("d", "zz")]
        text, figures = measure(documents, {"it": base.backend_tokenizer}, {}, None)
        found = {name: size.characters for name, size in text.by_source.items()}
        assert found == {"b": 4, "a": 2, "(other sources)": 3}
        assert sum(rate.tokens for rate in figures["it"].by_source.values()) == figures["it"].whole.tokens

    @pytest.mark.parametrize("documents", [[], [("a", "")]])
    def test_no_text(self, base, documents):
        with pytest.raises(UserError, match="no text to measure"):
            measure(documents, {"it": base.backend_tokenizer}, {}, None)

    def test_half_a_surrogate_pair(self, base):
        with pytest.raises(UserError, match="Document 2 of a has half a surrogate pair"):
            measure([("a", "x"), ("a", "y\ud800")], {"it": base.backend_tokenizer}, {}, None)

    def test_batches_do_not_matter(self, extended, monkeypatch):
        whole = figures_of(extended, list(THAI_TEXT))
        monkeypatch.setattr(measuring, "BATCH_CHARACTERS", 50)
        parts = figures_of(extended, list(THAI_TEXT))
        assert dataclasses.replace(parts, speed=whole.speed) == whole


class TestTokens:
    @given(texts=SEVERAL)
    @FEW
    @pytest.mark.parametrize("name", ["base", "extended", "byte_level"])
    def test_shares_of_scripts_and_bytes(self, request, name, texts):
        tokenizer = request.getfixturevalue(name)
        texts = [*texts, "น้ำ x"]
        found = figures_of(tokenizer, texts)
        tokens = tokens_of(tokenizer, texts)
        shares, parts = shares_by_hand(tokens, gpt2_style if name == "byte_level" else phi3_style)
        characters = Counter(character for text in texts for character in unicodedata.normalize("NFC", text))
        assert found.whole.tokens == len(tokens)
        assert found.whole.per_character == len(tokens) / characters.total()
        assert found.whole.per_byte == len(tokens) / sum(len(c.encode()) * n for c, n in characters.items())
        in_text = by_script(characters)
        expected = {script: share for script, share in by_script(shares).items() if script in in_text}
        assert {script: rate.tokens for script, rate in found.by_script.items() if rate.tokens} == pytest.approx(
            expected
        )
        for script, rate in found.by_script.items():
            assert rate.per_character == pytest.approx(expected.get(script, 0) / in_text[script])
        assert found.byte_fallback.characters == parts.total()
        assert found.byte_fallback.share == parts.total() / characters.total()
        assert dict(found.byte_fallback.most).items() <= parts.items()
        assert found.byte_fallback.share_by_script == pytest.approx(
            {script: by_script(parts)[script] / count for script, count in in_text.items()}
        )

    def test_a_character_of_three_bytes_is_three_tokens(self, base):
        found = figures_of(base, ["aฉฉ"])  # `▁a` or `▁` and `a`, then six bytes
        assert found.by_script["Thai"].tokens == 6
        assert found.by_script["Thai"].per_character == 3
        assert found.byte_fallback.share_by_script == {"Latin": 0, "Thai": 1}
        assert found.byte_fallback.most == [("ฉ", 2)]

    def test_lengths(self, extended):
        tokens = tokens_of(extended, THAI_TEXT)
        lengths = Counter(len(data) if isinstance(data := phi3_style(token), str) else 0 for token in tokens)
        assert figures_of(extended, list(THAI_TEXT)).by_length == dict(sorted(lengths.items()))

    def test_sources(self, extended):
        documents = [("a", THAI_TEXT[0]), ("b", THAI_TEXT[1]), ("a", "fox")]
        _, figures = measure(documents, {"it": extended.backend_tokenizer}, {}, None)
        found = figures["it"].by_source
        assert found["a"].tokens == len(tokens_of(extended, [THAI_TEXT[0], "fox"]))
        assert found["b"].tokens == len(tokens_of(extended, [THAI_TEXT[1]]))
        assert found["b"].per_word == found["b"].tokens / sum(count_words(THAI_TEXT[1]).values())

    def test_new_tokens(self, extended):
        new = [i for token, i in extended.get_vocab().items() if i >= FIRST_NEW]
        text = "สวัสดีครับ สวัสดี fox"
        counts = Counter(extended(text)["input_ids"])
        found = figures_of(extended, [text], new).new
        unused = {i for i in new if not counts[i]}
        assert (found.tokens, found.unused) == (NEW, len(unused))
        assert 0 < found.unused_share == len(unused) / NEW < 1
        assert found.share_of_text == pytest.approx(sum(counts[i] for i in new) / counts.total())
        assert {use.id for use in found.unused_examples} <= unused
        assert len(found.unused_examples) == 10
        assert all(use.count == 0 for use in found.unused_examples)
        assert [use.count for use in found.most_used] == sorted((counts[i] for i in new), reverse=True)[:10]
        assert all(use.count == counts[use.id] for use in found.most_used)
        surfaces = extended.convert_ids_to_tokens(new)
        assert [len(use.text) for use in found.longest] == sorted(map(len, surfaces), reverse=True)[:10]
        assert {use.text for use in found.longest} <= set(surfaces)
        assert found.by_length == dict(sorted(Counter(map(len, surfaces)).items()))

    def test_all_new_tokens_used(self, extended):
        i = extended(THAI_TEXT[0])["input_ids"][-1]
        found = figures_of(extended, [THAI_TEXT[0]], [i]).new
        assert (found.unused, found.unused_share, found.unused_examples) == (0, 0, [])

    def test_tokens_that_begin_with_a_mark(self, extended):
        new = [i for i in extended.get_vocab().values() if i >= FIRST_NEW]
        marks = {i for token, i in extended.get_vocab().items() if unicodedata.category(token[0]) in ("Mn", "Mc", "Me")}
        alone = {i for i in marks if len(extended.convert_ids_to_tokens(i)) == 1}
        assert len(alone) > 5
        assert len(marks - alone) > 5
        ids = [i for text in THAI_TEXT for i in extended(text)["input_ids"]]
        found = figures_of(extended, list(THAI_TEXT), new)
        for tokens, expected in ((found.marks_alone, alone), (found.marks_first, marks - alone)):
            assert tokens.tokens == len(expected)
            assert tokens.new == len(expected & set(new))
            assert tokens.share_of_text == sum(i in expected for i in ids) / len(ids)
            assert {use.id for use in tokens.most_used} <= expected
            assert tokens.most_used[0].count == max(ids.count(i) for i in expected)

    def test_real_tokenizer_needs_more_than_a_token_for_a_thai_character(self, shared_data):
        (subject,) = load_subjects([str(shared_data / "tokenizers" / "phi3-mini")]).values()
        text = "ผู้ใหญ่ฟังเสียงฝน " * 20
        _, figures = measure([("a", text)], {"it": subject.tokenizer}, {}, None)
        assert figures["it"].by_script["Thai"].per_character > 1
        assert figures["it"].byte_fallback.share_by_script["Thai"] > 0
        assert figures["it"].round_trip.failures == 0


class TestRoundTrip:
    @given(texts=SEVERAL)
    @FEW
    @pytest.mark.parametrize("name", ["base", "extended", "byte_level"])
    def test_as_by_hand(self, request, name, texts):
        tokenizer = request.getfixturevalue(name)
        expected = 0
        for text in texts:
            text = unicodedata.normalize("NFC", text)
            back = tokenizer.decode(
                tokenizer(text)["input_ids"], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            expected += back != text
        found = figures_of(tokenizer, [*texts, "x"]).round_trip
        assert found.failures + found.failures_with_special_tokens == expected
        assert sum(difference.documents for difference in found.differences) <= found.failures
        assert bool(found.differences) == bool(found.failures)

    def test_a_lossy_tokenizer_is_found(self, base):
        state = Tokenizer.from_str(base.backend_tokenizer.to_str())
        state.normalizer = normalizers.Lowercase()
        _, figures = measure(
            [("a", "all small"), ("a", "The Fox"), ("b", "no"), ("b", "The end"), ("b", "is Near")],
            {"it": state},
            {},
            None,
        )
        found = figures["it"].round_trip
        assert found.failures == 3
        assert [dataclasses.astuple(difference) for difference in found.differences] == [
            ("The Fox", "the fox", "a", 2, 0, 2),
            ("Near", "near", "b", 3, 3, 1),
        ]

    def test_lost_ends_are_found(self, extended):
        # phi-3's way: a space at the start is taken for the tokenizer's own, and `▁` is a space.
        found = figures_of(extended, [" น้ำ", "ก▁ข", "ok"]).round_trip
        assert found.failures == 2
        assert {(difference.expected, difference.got) for difference in found.differences} == {
            (" น้ำ", "น้ำ"),
            ("▁ข", " ข"),
        }

    def test_special_tokens_in_text_are_apart(self, base):
        texts = ["<|user|>\nhello", "see <|end|>", "hello"]  # the first loses its newline, phi-3's way
        found = figures_of(base, texts).round_trip
        assert (found.failures, found.differences) == (0, [])
        assert (found.failures_with_special_tokens, found.documents_with_special_tokens) == (1, 2)

    def test_unknown_text_is_counted_and_in_no_script(self):
        words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "fox": 2}, unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        found = figures_of(TokenizersBackend(tokenizer_object=words, unk_token="[UNK]"), ["the blue fox", "the fox"])
        assert (found.unknown, found.whole.tokens) == (1, 5)
        assert found.by_script["Latin"].tokens == pytest.approx(4)
        assert found.round_trip.failures == 1
        assert found.round_trip.differences[0].expected == "blue fox"


class TestSpeed:
    def test_ratios_are_to_the_base(self, base, extended, monkeypatch):
        monkeypatch.setattr(measuring, "SPEED_PASSES", 3)
        tokenizers = {"one": base.backend_tokenizer, "two": extended.backend_tokenizer}
        _, figures = measure([("a", text) for text in THAI_TEXT], tokenizers, {}, "one")
        assert (figures["one"].speed.batched_ratio, figures["one"].speed.single_ratio) == (1, 1)
        for speed in (figures["one"].speed, figures["two"].speed):
            assert min(dataclasses.astuple(speed)) > 0
        _, figures = measure([("a", text) for text in THAI_TEXT], tokenizers, {}, None)
        assert figures["two"].speed.batched_ratio is None


class TestSubjects:
    def test_new_tokens_without_a_record(self, folders, extended):
        first, second = load_subjects(folders).values()
        assert first.new_ids == frozenset()
        assert first.base_entries is None
        assert second.new_ids == frozenset(range(FIRST_NEW, SIZE))
        assert RESERVED_TOKEN.format(400) in extended.get_vocab()
        assert second.base_entries == 400

    @pytest.fixture
    def trained(self, folders, tmp_path) -> Path:
        """As `jai tokenizer train` leaves it."""
        text = write_lines(tmp_path / "t.jsonl", THAI_TEXT * 4)
        options = TrainTokenizerOptions(
            text=[str(text)], base=folders[0], out=tmp_path / "out", vocab_size=FIRST_NEW + 22
        )
        return train_tokenizer(options, console=quiet())

    def test_new_tokens_by_the_record(self, trained):
        (subject,) = load_subjects([str(trained)]).values()
        assert subject.new_ids == frozenset(range(FIRST_NEW, FIRST_NEW + 22))
        assert subject.base_entries == 400

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda record: record["new_tokens"]["450"].update(surface="x"), "says that token 450 is 'x'"),
            (lambda record: record.pop("base"), "is not a record of `jai tokenizer train`"),
            (lambda record: record.update(new_tokens=[1]), "is not a record of `jai tokenizer train`"),
        ],
    )
    def test_a_record_that_is_wrong(self, trained, change, message):
        record = json.loads((trained / RECORD_FILE).read_text(encoding="utf-8"))
        change(record)
        (trained / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            load_subjects([str(trained)])

    def test_truncation_of_the_folder_is_not_taken(self, folders, base, tmp_path):
        base.save_pretrained(tmp_path)
        state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        state["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "direction": "Right", "stride": 0}
        (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
        (subject,) = load_subjects([str(tmp_path)]).values()
        assert len(subject.tokenizer.encode("the quick brown fox jumps").ids) > 3

    def test_same_names_are_told_apart(self, base, tmp_path):
        for parent in ("a", "b"):
            base.save_pretrained(tmp_path / parent / "tok")
        names = list(load_subjects([str(tmp_path / "a" / "tok"), str(tmp_path / "b" / "tok")]))
        assert names == [str(tmp_path / "a" / "tok"), str(tmp_path / "b" / "tok")]

    @pytest.mark.parametrize("content", [None, "", "{}", '{"model": 3}'])
    def test_no_tokenizer(self, tmp_path, content):
        if content is not None:
            (tmp_path / "tokenizer.json").write_text(content)
            (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(UserError, match=r"has no tokenizer that can be loaded|tokenizer\.json is not valid JSON"):
            load_subjects([str(tmp_path)])

    def test_no_fast_implementation(self, tmp_path):
        (tmp_path / "vocab.json").write_text('{"<unk>": 0, "a": 1}')
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
        with pytest.raises(UserError, match="CanineTokenizer, which has no fast implementation"):
            load_subjects([str(tmp_path)])


def quiet() -> Console:
    return Console(quiet=True)


class TestReport:
    @pytest.fixture
    def texts(self, tmp_path, sentences) -> list[Path]:
        thai = write_lines(tmp_path / "thai.jsonl", (*THAI_TEXT, " น้ำ", "<|user|>\nน้ำ"))
        return [thai, write_lines(tmp_path / "en.jsonl", sentences[2:4])]

    def test_sources_are_the_files_or_what_documents_name(self, folders, tmp_path):
        rows = [{"text": "น้ำ", "source": "law"}, {"text": "น้ำใจ"}, {"text": "ใจดี", "source": "law"}]
        path = tmp_path / "mixed.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        text = make_report(folders[:1], [path], console=quiet()).text
        assert {name: amount.characters for name, amount in text.by_source.items()} == {"law": 7, "mixed.jsonl": 5}

    def test_what_is_written(self, folders, texts, tmp_path, base, extended):
        out = tmp_path / "out"
        report = make_report(folders, texts, out=out, console=quiet())
        assert sorted(path.name for path in out.iterdir()) == [JSON_FILE, MARKDOWN_FILE, PICTURE_FILE]
        record = json.loads((out / JSON_FILE).read_text(encoding="utf-8"))
        assert record == json.loads(json.dumps(report.record()))
        assert record.keys() == {"jai", "versions", "machine", "command", "base", "texts", "text", "tokenizers"}
        assert record["base"] == "base"
        assert record["command"].startswith(f"jai tokenizer report {folders[0]} {folders[1]} --text ")
        assert [(text["path"], text["documents"]) for text in record["texts"]] == [("thai.jsonl", 6), ("en.jsonl", 2)]
        assert all(len(text["sha256"]) == 64 for text in record["texts"])
        assert record["text"]["documents"] == 8
        assert list(record["tokenizers"]) == ["base", "extended"]
        expected = {field.name for field in dataclasses.fields(TokenizerFigures)} | {"origin", "sha256", "base_entries"}
        for name, tokenizer in (("base", base), ("extended", extended)):
            found = record["tokenizers"][name]
            assert found.keys() == expected
            assert found["entries"] == len(tokenizer)
            assert found["by_source"].keys() == {"thai.jsonl", "en.jsonl"}
            assert found["round_trip"]["failures"] == 1
            assert found["round_trip"]["failures_with_special_tokens"] == 1
        assert record["tokenizers"]["base"]["new"] is None
        assert record["tokenizers"]["extended"]["new"]["tokens"] == NEW

        assert (out / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
        page = (out / MARKDOWN_FILE).read_text(encoding="utf-8")
        titles = ("Tokens per character", "Tokens per word", "Tokens per byte", "Tokenizers", "Round trips that fail")
        assert all(f"## {title}\n" in page for title in titles)
        rate = record["tokenizers"]["extended"]["by_script"]["Thai"]["per_character"]
        assert regex.search(rf"\| script Thai \| [\d.]+% \| [\d.]+ \| {rate:.4f} \|", page)

    def test_named_base(self, folders, texts):
        report = make_report([folders[1]], texts, base=folders[0], console=quiet())
        assert report.base == "base"
        assert list(report.figures) == ["base", "extended"]
        assert report.figures["extended"].new.tokens == NEW
        assert make_report(folders, texts, base=folders[1], console=quiet()).base == "extended"

    def test_one_alone(self, folders, texts):
        report = make_report([folders[1]], texts, console=quiet())
        assert report.base is None
        assert report.figures["extended"].new is None
        assert report.figures["extended"].speed.batched_ratio is None

    def test_tables_fit_into_100_columns(self, folders, texts, capsys):
        make_report(folders, texts, console=Console(width=100))
        printed = capsys.readouterr().out
        for part in (
            "script Thai",
            "source en.jsonl",
            "new tokens",
            "begin with a mark",
            "ผ U+0E1C",
            "Round trips that",
        ):
            assert part in printed
        assert "…" not in printed

    def test_a_failed_run_leaves_nothing(self, folders, tmp_path):
        (tmp_path / "bad.jsonl").write_bytes(b'{"text": "\xff"}\n')
        (tmp_path / "empty.jsonl").touch()
        for name, message in (("bad.jsonl", "not UTF-8"), ("empty.jsonl", "no text to measure"), ("no.txt", "no.txt")):
            with pytest.raises(UserError, match=message):
                make_report(folders, [tmp_path / name], out=tmp_path / "out", console=quiet())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "empty.jsonl"]

    def test_nothing_is_overwritten(self, folders, texts, tmp_path):
        with pytest.raises(UserError, match="exists already"):
            make_report(folders, texts, out=tmp_path, console=quiet())
        with pytest.raises(UserError, match="No tokenizer was given"):
            make_report([], texts, console=quiet())

    def test_command_line(self, folders, texts, tmp_path):
        run = [sys.executable, "-m", "jai", "tokenizer", "report", *folders, "--text", str(texts[0])]
        done = subprocess.run([*run, "--out", str(tmp_path / "out")], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / JSON_FILE).is_file()
        assert "Tokens per character" in done.stdout
