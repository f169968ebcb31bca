# SPDX-License-Identifier: Apache-2.0
"""Tokenizers by name: the light way knows the same tokens as transformers, and what is damaged gets one clear error."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jai.errors import UserError
from jai.tokenization.extend import new_token_pieces
from jai.tokenization.loading import load_backend_tokenizer, load_tokenizer

BOTH = pytest.mark.parametrize("load", [load_tokenizer, load_backend_tokenizer])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer) -> Path:
    out = tmp_path_factory.mktemp("loading") / "tokenizer"
    tiny_tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    return shutil.copytree(folder, tmp_path / "copied")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))


def assert_same_tokens(folder: Path) -> None:
    full, light = AutoTokenizer.from_pretrained(folder), load_backend_tokenizer(folder)
    assert light.get_vocab() == full.get_vocab()
    assert {i: str(token) for i, token in light.get_added_tokens_decoder().items()} == {
        i: str(token) for i, token in full.added_tokens_decoder.items()
    }
    assert light.get_vocab_size() == len(full)


class TestTheLightWay:
    def test_as_saved(self, folder):
        assert_same_tokens(folder)

    def test_tokens_that_only_the_configuration_names(self, copied):
        edit(copied / "tokenizer_config.json", extra_special_tokens=["<|tool|>", "<|end|>"], mask_token="<mask>")
        assert_same_tokens(copied)
        assert load_backend_tokenizer(copied).token_to_id("<|tool|>") is not None

    def test_tokens_of_an_older_transformers(self, copied):
        size = load_backend_tokenizer(copied).get_vocab_size()
        edit(copied / "added_tokens.json", **{"สวัสดี": size, "<|tool|>": size + 1})
        edit(copied / "special_tokens_map.json", additional_special_tokens=["<|tool|>"])
        assert_same_tokens(copied)
        assert load_backend_tokenizer(copied).token_to_id("สวัสดี") == size

    def test_the_real_one(self, shared_data):
        assert_same_tokens(shared_data / "tokenizers" / "phi3-mini")

    def test_does_not_ask_for_the_class(self, folder):
        code = (
            "import sys; from jai.tokenization.loading import load_backend_tokenizer\n"
            "assert load_backend_tokenizer(sys.argv[1]).get_vocab_size() == 400\n"
            "print('transformers.models.auto.tokenization_auto' in sys.modules)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True, env=os.environ
        )
        assert run.stdout.strip() == "False"


class TestAddedWords:
    """A word of `add_tokens` starts from the pieces of its text; a special token says nothing of its meaning."""

    def pieces(self, base: PreTrainedTokenizerBase, folder: Path, *tokens, special: bool = False) -> list[list[int]]:
        base.save_pretrained(folder / "base")
        extended = AutoTokenizer.from_pretrained(folder / "base")
        assert extended.add_tokens(list(tokens), special_tokens=special) == len(tokens)
        extended.save_pretrained(folder / "extended")
        found = new_token_pieces(*(load_backend_tokenizer(folder / name) for name in ("base", "extended")))
        return [found[extended.convert_tokens_to_ids(str(token))] for token in tokens]

    def test_pieces_of_their_text(self, tiny_tokenizer, tmp_path):
        inside, spaced, other = self.pieces(
            tiny_tokenizer, tmp_path, "ครับผม", AddedToken(" ครับ ผม", normalized=False), "ฉ"
        )
        # As in the middle of a text: no space goes before what has none.
        assert tiny_tokenizer.convert_ids_to_tokens(inside) == list("ครับผม")
        assert tiny_tokenizer.convert_ids_to_tokens(spaced) == list("▁ครับ▁ผม")
        assert tiny_tokenizer.convert_ids_to_tokens(other) == ["<0xE0>", "<0xB8>", "<0x89>"]

    def test_none_of_special_tokens(self, tiny_tokenizer, tmp_path):
        assert self.pieces(tiny_tokenizer, tmp_path, "<|tool|>", special=True) == [[]]


class TestRefused:
    @BOTH
    def test_nothing_there(self, load, tmp_path):
        with pytest.raises(UserError, match=r"no tokenizer that can be loaded: there is none of tokenizer\.json"):
            load(tmp_path)

    @BOTH
    def test_neither_folder_nor_id(self, load, tmp_path):
        with pytest.raises(UserError, match="neither a folder nor a Hub id"):
            load(tmp_path / "not there")

    @BOTH
    def test_what_the_hub_does_not_give(self, load):
        with pytest.raises(
            UserError, match="nobody/nothing is not a local folder, and it cannot be downloaded from the Hub"
        ):
            load("nobody/nothing")

    @BOTH
    def test_offline(self, load, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(
            UserError, match=r"nothing is not a local folder.* not in the Hub cache\. HF_HUB_OFFLINE is set"
        ):
            load("nobody/nothing")

    @BOTH
    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    def test_no_regular_file(self, load, copied, name):
        (copied / name).unlink()
        os.mkfifo(copied / name)  # reading it would wait for ever
        with pytest.raises(UserError, match=rf"{name} is a named pipe, not a file"):
            load(copied)

    @BOTH
    @pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b'{"model": 3}', b"\xff\xfe", b"[" * 100_000])
    def test_no_tokenizer_json(self, load, copied, content):
        (copied / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=r"no tokenizer that can be loaded|tokenizer\w*\.json (is|holds) "):
            load(copied)

    @BOTH
    @pytest.mark.parametrize("content", [b"[]", b"\xff", b"{", b'{"added_tokens_decoder": {"x": 1}}', b"[" * 100_000])
    def test_no_configuration(self, load, copied, content):
        (copied / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"no tokenizer that can be loaded|tokenizer\w*\.json (is|holds) "):
            load(copied)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_damaged(self, folder, tmp_path, data):
        """Cut, overwritten or with a value of another kind, a file loads or is refused, and nothing else happens."""
        damaged = tmp_path / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(folder, damaged)
        path = damaged / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
        content = path.read_bytes()
        at = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["cut", "overwrite", "value"]))
        if kind == "cut":
            content = content[:at]
        elif kind == "overwrite":
            content = content[:at] + data.draw(st.binary(min_size=1, max_size=8)) + content[at + 8 :]
        else:
            values = json.loads(content)
            key = data.draw(st.sampled_from(sorted(values)))
            values[key] = data.draw(st.sampled_from([None, 3, "text", [], {}, [[]], {"type": "BPE"}, -1.5]))
            content = json.dumps(values).encode()
        path.write_bytes(content)
        for load in (load_tokenizer, load_backend_tokenizer):
            with suppress(UserError):
                load(damaged)
