# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: phi-3's form from nothing, the extension by a script, the chat template, `jai tokenizer train`."""

import copy
import gzip
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import regex
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, TokenizersBackend

from jai.errors import UserError
from jai.tokenization.chat import check_chat, with_chat_template
from jai.tokenization.extend import RESERVED_TOKEN, extend_tokenizer, new_token_pieces
from jai.tokenization.loading import RECORD_FILE
from jai.tokenization.normalization import replace_all, replacements
from jai.tokenization.options import TrainTokenizerOptions
from jai.tokenization.phi3_style import SPECIAL_TOKENS, train_phi3_style
from jai.tokenization.train import train_tokenizer

THAI = regex.compile(r"\p{Script=Thai}")
THAI_TEXT = (
    "สวัสดีครับ ผมชื่อสมชาย อยู่ที่กรุงเทพมหานคร",
    "สวัสดีค่ะ ดิฉันชื่อสมหญิง อยู่ที่เชียงใหม่ ทำงานเป็นครู",
    "น้ำในแม่น้ำใสมาก ปลาก็ว่ายน้ำอยู่ในน้ำ ๑๒๓ ๔๕๖ ราคา 20 บาท",
    "กินข้าวหรือยัง กินแล้ว วันนี้กินข้าวผัดกับเพื่อนที่ร้านหน้าโรงเรียน",
    "คุณครูพูดว่า การเรียนรู้คือการเดินทาง ผู้ที่รู้จักถามคือผู้ที่รู้จักคิด",
)
CHATS = (
    [
        {"role": "user", "content": "สวัสดีครับ"},
        {"role": "assistant", "content": "สวัสดีค่ะ มีอะไรให้ช่วยไหมคะ"},
        {"role": "user", "content": "1+1 เท่ากับเท่าไร"},
        {"role": "assistant", "content": "เท่ากับ 2 ค่ะ\nลองอีกข้อไหมคะ"},
    ],
    [
        {"role": "system", "content": "You answer briefly."},
        {"role": "user", "content": "Name a fruit.\n"},
        {"role": "assistant", "content": "  Mango"},
    ],
)
PHI3_TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture(scope="module")
def tiny_base(sentences) -> TokenizersBackend:
    """Knows Thai only by single characters, and lacks many of those."""
    return train_phi3_style(sentences[2:] * 4, vocab_size=400)


@pytest.fixture(scope="module")
def tiny_extended(tiny_base) -> TokenizersBackend:
    return extend_tokenizer(tiny_base, THAI_TEXT * 2, vocab_size=560)


@pytest.fixture(scope="module")
def phi3(shared_data) -> TokenizersBackend:
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "phi3-mini")


@pytest.fixture(scope="module")
def phi3_extended(phi3) -> TokenizersBackend:
    return extend_tokenizer(phi3, THAI_TEXT * 2, vocab_size=32064 + 150)


@pytest.fixture(params=["tiny", "phi3"])
def pair(request) -> tuple[TokenizersBackend, TokenizersBackend]:
    """A base and its extension: the tiny one, and the real one where it is there."""
    names = {"tiny": ("tiny_base", "tiny_extended"), "phi3": ("phi3", "phi3_extended")}[request.param]
    return tuple(request.getfixturevalue(name) for name in names)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text)["input_ids"]


def decode(tokenizer, text: str) -> str:
    return tokenizer.decode(ids(tokenizer, text), clean_up_tokenization_spaces=False)


def train(texts, base: str | Path, out: Path, vocab_size: int, **options) -> Path:
    return train_tokenizer(
        TrainTokenizerOptions(text=[*map(str, texts)], base=str(base), out=out, vocab_size=vocab_size, **options)
    )


def as_read(text: str) -> str:
    return replace_all(text, replacements("Thai", normalize_thai=True))


class TestPhi3Style:
    def test_layout_is_phi3s(self, tiny_base, phi3):
        assert len(tiny_base) == 400
        for token in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"):
            assert tiny_base.convert_tokens_to_ids(token) == phi3.convert_tokens_to_ids(token)
        offset = 32000 - 389
        theirs = {(str(token), i, token.rstrip, token.special) for i, token in phi3.added_tokens_decoder.items()}
        ours = {
            (str(token), i + offset if i > 2 else i, token.rstrip, token.special)
            for i, token in tiny_base.added_tokens_decoder.items()
        }
        assert ours == theirs
        assert tiny_base.special_tokens_map == phi3.special_tokens_map
        assert str(tiny_base.backend_tokenizer.pre_tokenizer) == str(phi3.backend_tokenizer.pre_tokenizer)
        assert str(tiny_base.backend_tokenizer.decoder) == str(phi3.backend_tokenizer.decoder)
        assert tiny_base.padding_side == phi3.padding_side

    def test_latin_merges_and_thai_does_not(self, tiny_base):
        assert len(tiny_base.tokenize("language models")) <= len("language models") / 1.5
        assert tiny_base.tokenize("แมวนอน") == ["▁", *"แมวนอน"]
        assert tiny_base.tokenize("ฉ") == ["▁", "<0xE0>", "<0xB8>", "<0x89>"]

    def test_no_bos_and_eos_is_padding(self, tiny_base):
        assert tiny_base.bos_token_id not in ids(tiny_base, "The fox")
        assert tiny_base.pad_token == tiny_base.eos_token == "<|endoftext|>"
        assert ids(tiny_base, "") == []

    @given(st.text(st.characters(exclude_categories=["Cs"])))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    def test_round_trip(self, tiny_base, text):
        # `▁` is the tokenizer's own sign for a space, and a leading one is dropped, as in phi-3's.
        text = "x" + text.replace("▁", "")
        assert decode(tiny_base, text) == text

    def test_saved_loads_alike(self, tiny_base, tmp_path):
        tiny_base.save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.get_vocab() == tiny_base.get_vocab()
        for text in (*THAI_TEXT, "<|user|>\nhello  there<|end|>\n<|assistant|>\n ok</s> x"):
            assert ids(loaded, text) == ids(tiny_base, text)

    def test_same_text_gives_the_same_tokenizer(self, tiny_base, sentences):
        again = train_phi3_style(sentences[2:] * 4, vocab_size=400)
        assert again.backend_tokenizer.to_str() == tiny_base.backend_tokenizer.to_str()

    @pytest.mark.parametrize("vocab_size", [3, 300, 100_000])
    def test_text_that_does_not_fill_it(self, sentences, vocab_size):
        with pytest.raises(UserError, match=r"Give vocab_size=\d+") as error:
            train_phi3_style(sentences, vocab_size)
        fits = int(regex.search(r"vocab_size=(\d+)", str(error.value))[1])
        assert len(train_phi3_style(sentences, fits)) == fits


class TestExtension:
    def test_size_and_old_ids(self, pair):
        base, extended = pair
        assert len(extended) == max(extended.get_vocab().values()) + 1
        assert len(extended) == (560 if len(base) == 400 else 32064 + 150)
        assert base.get_vocab().items() <= extended.get_vocab().items()

    def test_specials_and_reserved_ids_are_in_the_model(self, phi3_extended):
        by_id = {
            i: token for token, i in json.loads(phi3_extended.backend_tokenizer.to_str())["model"]["vocab"].items()
        }
        assert sorted(by_id) == list(range(32064 + 150))
        assert [by_id[32000 + i] for i in range(11)] == list(SPECIAL_TOKENS)
        assert [by_id[i] for i in range(32011, 32064)] == [RESERVED_TOKEN.format(i) for i in range(32011, 32064)]

    @given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: not THAI.search(text)))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    def test_text_without_the_script_keeps_its_ids(self, pair, text):
        base, extended = pair
        assert ids(extended, text) == ids(base, text)

    @pytest.mark.parametrize(
        "text",
        [
            "e\u0301 is not \u00e9",  # NFC would join the first, and change its ids
            "def f(x):\n\treturn {'a': [1, 2.5], \"b\": None}\n\n",
            '{"key": "\\u0e01", "n": -1e-9}',
            "👩‍👩‍👧 日本語 ພາສາລາວ русский עברית \x00\x7f\u200b\ufeff",
            "<|reserved_32020|> <|user|> </s> <0x41> ▁▁ ฿100",
            "   leading and trailing   ",
        ],
    )
    def test_other_text_keeps_its_ids(self, pair, text):
        base, extended = pair
        assert ids(extended, text) == ids(base, text)

    @pytest.mark.parametrize("name", ["train_en", "instruct_en"])
    def test_real_english_keeps_its_ids(self, phi3, phi3_extended, shared_data, name):
        with gzip.open(shared_data / f"{name}.jsonl.gz", "rt") as lines:
            texts = [line for _, line in zip(range(200), lines) if not THAI.search(line)]
        assert len(texts) > 100
        assert phi3_extended(texts)["input_ids"] == phi3(texts)["input_ids"]

    @given(
        text=st.text(
            st.one_of(
                st.characters(min_codepoint=0x0E01, max_codepoint=0x0E5B),
                st.sampled_from("กขนำา้่ิฺุูํ๒๙ \n\u200d\u200c\u200b2aZ"),
            )
        )
    )
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    def test_thai_comes_back_as_the_tokenizer_reads_it(self, pair, text):
        assert decode(pair[1], "x" + text) == "x" + as_read(text)

    def test_marks_are_put_in_the_order_of_nfc(self, pair):
        # Tone mark, then vowel: looks the same as the other way round, and NFC is the other way round.
        for wrong in ("ท" + "\u0e48" + "\u0e38" + "ง", "รู้ ผ\u0e49\u0e39"):
            right = unicodedata.normalize("NFC", wrong)
            assert wrong != right
            assert ids(pair[1], wrong) == ids(pair[1], right)
            assert decode(pair[1], "x" + wrong) == "x" + right
        decomposed = "e\u0301 ก"
        assert decode(pair[1], "x" + decomposed) == "x" + decomposed  # other scripts' marks stay

    def test_new_pieces_stay_inside_runs(self, pair):
        base, extended = pair
        learned = [token for token, i in extended.get_vocab().items() if i >= -(-len(base) // 64) * 64]
        assert len(learned) > 100
        assert all(regex.fullmatch(r"▁?\p{Script=Thai}+", token) for token in learned)
        assert any(token.startswith("▁") for token in learned)
        assert max(map(len, learned)) <= 16

    @pytest.mark.parametrize("cap", [2, 5])
    def test_cap_is_inclusive(self, tiny_base, cap):
        extended = extend_tokenizer(tiny_base, THAI_TEXT * 2, 448 + (60 if cap == 2 else 100), max_token_chars=cap)
        learned = [token for token, i in extended.get_vocab().items() if i >= 448]
        assert max(map(len, learned)) == cap

    def test_thai_becomes_shorter_and_needs_no_bytes(self, pair):
        base, extended = pair
        text = "\n".join(THAI_TEXT)
        assert len(ids(extended, text)) < 0.5 * len(ids(base, text))
        assert not any(token.startswith("<0xE0") for token in extended.tokenize(text))

    def test_saved_loads_alike(self, pair, tmp_path):
        _, extended = pair
        extended.save_pretrained(tmp_path)
        texts = [*THAI_TEXT, "<|user|>\nสวัสดี hello  there<|end|>\n<|assistant|>\n ok</s> x", " ผ้", ""]
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert type(loaded) is TokenizersBackend
        assert loaded.get_vocab() == extended.get_vocab()
        assert loaded.special_tokens_map == extended.special_tokens_map
        assert (loaded.padding_side, loaded.model_max_length) == (extended.padding_side, extended.model_max_length)
        assert loaded.chat_template == extended.chat_template
        assert loaded(texts)["input_ids"] == extended(texts)["input_ids"]
        # Also where the folder is a JAI checkpoint, and without transformers.
        (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
        assert AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"] == extended(texts)["input_ids"]
        bare = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert [bare.encode(text).ids for text in texts] == extended(texts)["input_ids"]

    def test_same_text_gives_the_same_tokenizer(self, tiny_base, tiny_extended):
        again = extend_tokenizer(tiny_base, THAI_TEXT * 2, vocab_size=560)
        assert again.backend_tokenizer.to_str() == tiny_extended.backend_tokenizer.to_str()

    def test_an_extension_can_be_extended(self, tiny_extended):
        lao = "ສະບາຍດີ ຂ້ອຍຊື່ສົມໄຊ ຢູ່ວຽງຈັນ ສະບາຍດີ ຂ້ອຍຢູ່ວຽງຈັນ"
        both = extend_tokenizer(tiny_extended, [lao] * 2, vocab_size=600 + 26, script="Lao", first_new_id=576)
        assert len(both) == 626
        assert ids(both, THAI_TEXT[0]) == ids(tiny_extended, THAI_TEXT[0])
        assert len(ids(both, lao)) < len(ids(tiny_extended, lao)) / 2
        assert decode(both, "x" + lao) == "x" + unicodedata.normalize("NFC", lao)

    def test_first_new_id_can_be_given(self, tiny_base):
        extended = extend_tokenizer(tiny_base, THAI_TEXT * 2, vocab_size=500, first_new_id=400)
        assert len(extended) == 500
        assert all(new_token_pieces(tiny_base.backend_tokenizer, extended.backend_tokenizer).values())

    def test_prepending_bases_keep_their_ids(self, shared_data, tmp_path):
        # Beside a phi-3 config.json, transformers takes tokenizer.json as it stands: it puts `▁` before each segment.
        for file in (shared_data / "tokenizers" / "phi3-mini").iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
        base = AutoTokenizer.from_pretrained(tmp_path)
        assert base.tokenize("<|user|>\nhello")[1] == "▁hello"
        extended = extend_tokenizer(base, THAI_TEXT * 2, vocab_size=32064 + 150)
        text = "<|user|>\nhello  world<|end|>\n<|assistant|>\nok"
        assert ids(extended, text) == ids(base, text)
        extended.save_pretrained(tmp_path / "out")
        thai = "<|user|>\nสวัสดีครับ<|end|>\n"
        assert ids(AutoTokenizer.from_pretrained(tmp_path / "out"), thai) == ids(extended, thai)


class TestBadInput:
    def test_vocabulary_below_the_base(self, tiny_base):
        with pytest.raises(UserError, match="vocab_size above 448"):
            extend_tokenizer(tiny_base, THAI_TEXT, vocab_size=448)
        with pytest.raises(UserError, match="uses the ids up to 399"):
            extend_tokenizer(tiny_base, THAI_TEXT, vocab_size=600, first_new_id=399)

    @pytest.mark.parametrize("vocab_size", [450, 5000])
    def test_text_that_does_not_fill_it(self, tiny_base, vocab_size):
        with pytest.raises(UserError, match=r"the text gave \d+ .*Give a vocab_size of \d+") as error:
            extend_tokenizer(tiny_base, THAI_TEXT, vocab_size)
        fits = int(regex.search(r"Give a vocab_size of (\d+)", str(error.value))[1])
        assert len(extend_tokenizer(tiny_base, THAI_TEXT, fits)) == fits

    @pytest.mark.parametrize("texts", [[], [""], ["no Thai here"]])
    def test_text_without_the_script(self, tiny_base, texts):
        with pytest.raises(UserError, match="no character of the script Thai"):
            extend_tokenizer(tiny_base, texts, 560)

    def test_unknown_script_and_cap(self, tiny_base):
        with pytest.raises(UserError, match="'Klingon' is not a script"):
            extend_tokenizer(tiny_base, THAI_TEXT, 560, script="Klingon")
        with pytest.raises(UserError, match="max_token_chars is 1"):
            extend_tokenizer(tiny_base, THAI_TEXT, 560, max_token_chars=1)

    def test_base_with_merges_of_the_script(self, tiny_base, tiny_extended):
        with pytest.raises(UserError, match="merges of the script Thai already"):
            extend_tokenizer(tiny_extended, THAI_TEXT, 700)
        with pytest.raises(UserError, match="merges of the script Latin already"):
            extend_tokenizer(tiny_base, THAI_TEXT, 700, script="Latin")

    def test_base_of_another_kind(self):
        words = TokenizersBackend(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
        with pytest.raises(UserError, match="is a WordLevel"):
            extend_tokenizer(words, THAI_TEXT, 560)
        no_bytes = TokenizersBackend(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
        with pytest.raises(UserError, match="BPE without byte fallback"):
            extend_tokenizer(no_bytes, THAI_TEXT, 560)


class TestPieces:
    def test_every_new_id_has_the_pieces_of_its_string(self, pair):
        base, extended = pair
        pieces = new_token_pieces(base.backend_tokenizer, extended.backend_tokenizer)
        assert list(pieces) == list(range(len(base), len(extended)))
        first_new = -(-len(base) // 64) * 64
        assert all((not found) == (i < first_new) for i, found in pieces.items())
        for i, found in pieces.items():
            if found:
                surface = extended.convert_ids_to_tokens(i)
                # Nothing added and nothing lost: in particular no `▁` of the tokenizer's own.
                assert base.backend_tokenizer.decoder.decode(["x", *base.convert_ids_to_tokens(found)]) == (
                    "x" + surface.replace("▁", " ")
                )
                assert found == [i for i in found if i < len(base)]

    def test_missing_characters_are_their_bytes(self, tiny_base, tiny_extended):
        i = tiny_extended.convert_tokens_to_ids("ฉ")
        pieces = new_token_pieces(tiny_base.backend_tokenizer, tiny_extended.backend_tokenizer)[i]
        assert tiny_base.convert_ids_to_tokens(pieces) == [
            "<0xE0>",
            "<0xB8>",
            "<0x89>",
        ]

    def test_the_same_tokenizer_has_none(self, tiny_base):
        assert new_token_pieces(tiny_base.backend_tokenizer, tiny_base.backend_tokenizer) == {}

    def test_another_base_is_refused(self, tiny_base, tiny_extended, sentences):
        other = train_phi3_style(sentences * 4, vocab_size=400)
        with pytest.raises(UserError, match="does not extend its base"):
            new_token_pieces(other.backend_tokenizer, tiny_extended.backend_tokenizer)


class TestChat:
    @pytest.fixture(params=["tiny_base", "tiny_extended", "phi3", "phi3_extended"])
    def tokenizer(self, request) -> TokenizersBackend:
        return with_chat_template(request.getfixturevalue(request.param))

    @pytest.mark.parametrize("chat", CHATS)
    def test_tokens_are_phi3s(self, tokenizer, chat):
        for messages, prompt in ((chat, False), (chat[:-1], True), (chat[:-1], False)):
            ours = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)
            theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, chat_template=PHI3_TEMPLATE)
            assert ours["input_ids"] == theirs["input_ids"]

    def test_template_of_the_real_phi3_is_the_one_compared_with(self, shared_data):
        original = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "phi3-mini")
        for chat in CHATS:
            for prompt in (False, True):
                assert original.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=prompt
                ) == original.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=prompt, chat_template=PHI3_TEMPLATE
                )

    @pytest.mark.parametrize("chat", CHATS)
    def test_mask_is_the_answers_with_their_end(self, tokenizer, chat):
        encoded = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
        tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        spans, inside = [], False
        for token, masked in zip(tokens, encoded["assistant_masks"]):
            if masked and not inside:
                spans.append([])
            if masked:
                spans[-1].append(token)
            inside = bool(masked)
        answers = [message["content"].lstrip() for message in chat if message["role"] == "assistant"]
        assert len(spans) == len(answers)
        for span, answer in zip(spans, answers):
            ends = span.index("<|end|>")
            # The decoder drops one leading space, which is the tokenizer's own where there is no text before.
            assert tokenizer.convert_tokens_to_string(["x", *span[:ends]]).removeprefix("x").strip() == answer
        assert [span[-1] for span in spans] == ["<|end|>"] * (len(spans) - 1) + ["<|endoftext|>"]
        assert all("<|assistant|>" not in span for span in spans)

    def test_prompt_begins_the_whole(self, tokenizer):
        for chat in CHATS:
            whole = tokenizer.apply_chat_template(chat)["input_ids"]
            prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True)["input_ids"]
            assert whole[: len(prompt)] == prompt

    def test_trl_takes_it_as_it_is(self, tokenizer):
        from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

        assert get_training_chat_template(tokenizer) is None
        assert is_chat_template_stop_token_trained(tokenizer)

    def test_unknown_role_is_refused(self, tokenizer):
        with pytest.raises(Exception, match="has the role 'robot'"):
            tokenizer.apply_chat_template([{"role": "robot", "content": "42"}])

    @pytest.mark.parametrize(
        ("template", "problem"),
        [
            ("{{ messages[0]['content'] }}", None),
            ("{{ raise_exception('not\\nthis.') }}", r"cannot be used: not this\. Mend it"),
            ("{{ messages[0]['content'] + 1 }}", r"cannot be used: .*\. Mend it"),
            ("{% for message in messages %}", r"cannot be used: .*\. Mend it"),
            ("", r"makes no tokens of a chat\. Mend it"),
        ],
    )
    def test_a_template_that_cannot_be_used_is_refused(self, tiny_extended, template, problem):
        tokenizer = copy.deepcopy(tiny_extended)
        tokenizer.chat_template = template
        if problem is None:
            check_chat("a-model", tokenizer)
        else:
            with pytest.raises(UserError, match=f"The chat template of a-model {problem}"):
                check_chat("a-model", tokenizer, "Mend it.")

    @pytest.fixture
    def spans(self, tokenizer) -> Callable[..., tuple[str, list[str]]]:
        """A chat as text, and the parts of it that the loss is on, by the mask that TRL takes."""

        def render(messages, **kwargs) -> tuple[str, list[str]]:
            text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
            encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **kwargs)
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            found: list[list[int]] = []
            for (start, end), masked, before in zip(
                offsets, encoded["assistant_masks"], [0, *encoded["assistant_masks"]], strict=False
            ):
                if masked and not before:
                    found.append([start, end])
                elif masked:
                    found[-1][1] = end
            return text, [text[start:end].rstrip("\n") for start, end in found]  # phi-3's special tokens take it in

        return render

    def test_tools_are_listed_called_and_answered(self, spans):
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "เชียงใหม่", "days": 2}}}
        tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
        chat = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "ฝนตกไหม"},
            {"role": "assistant", "content": "Let me look.", "tool_calls": [call, call]},
            {"role": "tool", "content": "rain", "name": "weather"},
            {"role": "tool", "content": "sun"},
            {"role": "assistant", "content": "ตก"},
        ]
        text, trained = spans(chat, tools=[tool])
        written = '<tool_call>\n{"name": "weather", "arguments": {"city": "เชียงใหม่", "days": 2}}\n</tool_call>'
        assert trained == [f"Let me look.\n{written}\n{written}<|end|>", "ตก<|end|>\n<|endoftext|>"]
        listed, _, rest = text.partition("<|end|>")
        assert listed.startswith("<|system|>\nBe brief.\n\n# Tools")
        assert f"<tools>\n{json.dumps(tool)}\n</tools>" in listed
        assert rest.count("<|system|>") == 0
        parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *chat[1:]]
        assert spans(parts, tools=[tool]) == (text, trained)
        results = "<|user|>\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response><|end|>\n"
        assert text.count(results) == 1
        # As OpenAI's client has it: arguments are JSON, and a call has no content.
        call = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
        _, trained = spans([chat[1], {"role": "assistant", "content": None, "tool_calls": [call]}])
        assert trained == [
            '<tool_call>\n{"name": "weather", "arguments": {"city": "x"}}\n</tool_call><|end|>'
        ]  # and no end of text: the result is to come

    def test_thoughts_are_kept_in_the_last_turn_alone(self, spans):
        first = {"role": "assistant", "content": "<think>\nหนึ่งบวกหนึ่ง\n</think>\n\n2"}
        separate = {"role": "assistant", "content": "2", "reasoning_content": "หนึ่งบวกหนึ่ง"}
        ask = [{"role": "user", "content": "1+1"}, {"role": "user", "content": "2+2"}]
        for thinking in (first, separate):
            text, trained = spans([ask[0], thinking])
            assert text == "<|user|>\n1+1<|end|>\n<|assistant|>\n" + first["content"] + "<|end|>\n<|endoftext|>"
            assert trained == [first["content"] + "<|end|>\n<|endoftext|>"]
            # In the history it is gone, and what is left of its turn is no example of an answer.
            text, trained = spans([ask[0], thinking, ask[1], {"role": "assistant", "content": "4"}])
            assert "<think>" not in text
            assert "<|assistant|>\n2<|end|>" in text
            assert trained == ["4<|end|>\n<|endoftext|>"]
            # Between the calls of one answer it stays.
            call = {"function": {"name": "add", "arguments": {}}}
            text, trained = spans([ask[0], {**thinking, "tool_calls": [call]}, {"role": "tool", "content": "2"}, first])
            assert text.count("<think>") == len(trained) == 2

    def test_thinking_can_be_switched_off(self, tokenizer, spans):
        closed = "<|assistant|>\n<think>\n\n</think>\n\n"
        ask = [{"role": "user", "content": "1+1"}]
        prompt, _ = spans(ask, add_generation_prompt=True, enable_thinking=False)
        assert prompt.endswith(closed)
        answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"}
        text, trained = spans([*ask, answer], enable_thinking=False)
        assert text.startswith(prompt)
        assert trained == ["2<|end|>\n<|endoftext|>"]
        for kwargs in ({}, {"enable_thinking": True}):
            assert spans(ask, add_generation_prompt=True, **kwargs)[0].endswith("<|end|>\n<|assistant|>\n")

    @pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
    def test_turns_can_be_left_out_of_the_loss(self, spans, mark):
        chat = [dict(message) for message in CHATS[0]]
        before, both = spans(chat)
        chat[1] |= mark
        assert spans(chat) == (before, both[1:])
        chat[3] |= mark
        assert spans(chat) == (before, [])
        chat[1] |= {"weight": 1, "train": True}
        assert spans(chat) == (before, both[:1])

    def test_content_in_parts_is_its_text(self, spans):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert spans([{"role": "user", "content": parts}]) == spans([{"role": "user", "content": "ab"}])


class TestTrain:
    @pytest.fixture(scope="class")
    def base_folder(self, tiny_base, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        tiny_base.save_pretrained(folder)
        return folder

    @pytest.fixture
    def texts(self, tmp_path) -> list[Path]:
        plain, lines, packed = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.jsonl.gz"
        rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in THAI_TEXT]
        plain.write_text("\n".join(THAI_TEXT), encoding="utf-8")
        lines.write_text("".join(rows[:2]), encoding="utf-8")
        packed.write_bytes(gzip.compress("".join(rows[2:]).encode()))
        return [plain, lines, packed]

    def test_writes_a_folder_and_its_record(self, base_folder, texts, tmp_path, tiny_base, capsys):
        out = train(texts, str(base_folder), tmp_path / "out", 550)
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert len(tokenizer) == 550
        expected = extend_tokenizer(tiny_base, ["\n".join(THAI_TEXT), *THAI_TEXT], 550)
        assert tokenizer.get_vocab() == expected.get_vocab()
        record = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
        assert [(file["path"], file["documents"]) for file in record["texts"]] == [
            ("a.txt", 1),
            ("b.jsonl", 2),
            ("c.jsonl.gz", 3),
        ]
        assert record["options"] == {
            "vocab_size": 550,
            "max_token_chars": 16,
            "script": "Thai",
            "unit": "run",
            "normalize_thai": True,
            "sample_bytes": 200_000_000,
            "seed": 0,
        }
        pieces = new_token_pieces(tiny_base.backend_tokenizer, tokenizer.backend_tokenizer)
        assert record["new_tokens"] == {
            str(i): {"surface": tokenizer.convert_ids_to_tokens(i), "pieces": ids} for i, ids in pieces.items()
        }
        printed = capsys.readouterr().out
        assert "550 entries" in printed
        assert f"--tokenizer {out}" in printed

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({}, {"vocab_size": 510}),
            ({}, {"max_token_chars": 3}),
            ({}, {"unit": "word"}),
            ({}, {"unit": "cluster"}),
            ({}, {"script": "Lao"}),
            ({}, {"normalize_thai": False}),
            ({"sample_bytes": 4000}, {"sample_bytes": 3000}),
            ({"sample_bytes": 3000}, {"sample_bytes": 3000, "seed": 1}),
        ],
        ids=str,
    )
    def test_every_option_decides_bytes(self, base_folder, tmp_path, one, other):
        text = tmp_path / "a.jsonl"
        lao = ("ສະບາຍດີ ຂ້ອຍຊື່ ສົມໃຈ ຢູ່ນະຄອນຫຼວງວຽງຈັນ", "ມື້ນີ້ກິນເຂົ້າກັບໝູ່ຢູ່ຮ້ານໜ້າໂຮງຮຽນ", "ນ້ຳໃນແມ່ນ້ຳໃສຫຼາຍ ປາກໍ່ລອຍນ້ຳຢູ່ໃນນ້ຳ")
        documents = [f"{text} {number}" for number in range(10) for text in (*THAI_TEXT, "เเม่น้ำ เเละ แม่น้ำ", *lao)]
        text.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        made = [
            train([text], str(base_folder), tmp_path / name, **{"vocab_size": 500, **options})
            for name, options in (("one", one), ("other", other))
        ]
        assert (made[0] / "tokenizer.json").read_bytes() != (made[1] / "tokenizer.json").read_bytes()

    def test_loads_in_a_clean_process_that_has_no_jai(self, base_folder, texts, tmp_path):
        out = train(texts, str(base_folder), tmp_path / "out", 550)
        code = (
            "import sys; sys.modules['jai'] = None\n"
            "from transformers import AutoTokenizer\n"
            "print(AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2])['input_ids'])"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(out), THAI_TEXT[0]],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert json.loads(run.stdout) == ids(AutoTokenizer.from_pretrained(out), THAI_TEXT[0])

    def test_missing_things_are_named(self, base_folder, texts, tmp_path):
        with pytest.raises(UserError, match="no tokenizer that can be loaded"):
            train(texts, str(tmp_path), tmp_path / "out", 550)
        damaged = shutil.copytree(base_folder, tmp_path / "damaged")
        (damaged / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": 3}}')
        with pytest.raises(UserError, match="no tokenizer that can be loaded"):
            train(texts, str(damaged), tmp_path / "out", 550)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
        with pytest.raises(UserError, match="exists already"):
            train(texts, str(base_folder), tmp_path / "out", 550)


@pytest.mark.slow
def test_64000_entries_on_real_text(shared_data, phi3, capsys):
    """Every twentieth document is held out; exams, questions and reviews are of other kinds than the training text."""
    with gzip.open(shared_data / "train_th.jsonl.gz", "rt") as lines:
        documents = [json.loads(line)["text"] for line in lines]
    held_out = documents[::20]
    extended = extend_tokenizer(phi3, (text for i, text in enumerate(documents) if i % 20), 64000)
    assert len(extended) == 64000
    others = []
    for path in sorted((shared_data / "eval").glob("*.jsonl.gz")):
        with gzip.open(path, "rt") as lines:
            texts = {text for line in lines for text in strings(json.loads(line))}
        others += sorted(text for text in texts if len(THAI.findall(text)) > len(text) / 2)

    figures = {}
    for name, texts in {"held out": held_out, "evaluation sets": others}.items():
        characters = sum(map(len, texts))
        figures[name] = [sum(map(len, t(texts)["input_ids"])) / characters for t in (phi3, extended)]
    with capsys.disabled():
        for name, (before, after) in figures.items():
            print(f"\ntokens per character, {name}: phi-3 {before:.4f}, extended {after:.4f}")
    assert figures["held out"][1] <= 0.215
    assert figures["evaluation sets"][1] <= 0.235
    for text in held_out[:200]:
        assert decode(extended, "x" + text) == "x" + as_read(text)


def strings(value) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []
