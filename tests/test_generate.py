# SPDX-License-Identifier: Apache-2.0
"""`jai generate`: what it prints as it goes, where it ends, and what it refuses before anything is loaded."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import regex
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import GenerationConfig

from jai.errors import UserError
from jai.generate import ClusterStreamer, GenerateOptions, generate
from jai.tokenization.stops import stop_ids

TEXTS = (
    "สวัสดีครับ ผมชื่อน้ำ hello ฉันที่ก็ ฎฏ",
    "ฉันไม่ได้เว้นวรรคเลยสักที่เดียว",
    "👨‍👩‍👧 family 😀\n\n\tafter é e\u0301 ё",
    "\ufffd is a sign as well",
)


def stream(tokenizer, ids: list[int]) -> list[list[str]]:
    """What is given out after each token, and at the end."""
    given_out: list[str] = []
    streamer = ClusterStreamer(partial(tokenizer.decode, skip_special_tokens=True), given_out.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    steps = []
    for id_ in ids:
        streamer.put(torch.tensor([id_]))
        steps.append(list(given_out))
        given_out.clear()
    streamer.end()
    return [*steps, list(given_out)]


class TestStreaming:
    @pytest.mark.parametrize("text", TEXTS)
    def test_whole_clusters_and_all_of_them(self, tiny_tokenizer, text):
        ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = tiny_tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
        parts = [part for step in stream(tiny_tokenizer, ids + ends) for part in step]
        assert "".join(parts) == tiny_tokenizer.decode(ids, skip_special_tokens=True)
        assert [cluster for part in parts for cluster in regex.findall(r"\X", part)] == regex.findall(r"\X", text)

    def test_nothing_waits_for_a_space(self, tiny_tokenizer):
        text = TEXTS[1]
        assert " " not in text
        steps = stream(tiny_tokenizer, tiny_tokenizer(text, add_special_tokens=False)["input_ids"])
        before_the_end = "".join(part for step in steps[:-1] for part in step)
        assert regex.findall(r"\X", before_the_end) == regex.findall(r"\X", text)[:-1]

    @given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_text(self, tiny_tokenizer, text):
        ids = tiny_tokenizer("x" + text, add_special_tokens=False)["input_ids"]
        parts = [part for step in stream(tiny_tokenizer, ids) for part in step]
        assert "".join(parts) == tiny_tokenizer.decode(ids, skip_special_tokens=True)

    @given(ids=st.lists(st.integers(3, 399), max_size=30))
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_ids(self, tiny_tokenizer, ids):
        """Also bytes that are no text: whatever comes, it is given out, and nothing is given out twice."""
        parts = [part for step in stream(tiny_tokenizer, ids) for part in step]
        expected = tiny_tokenizer.decode(ids, skip_special_tokens=True)
        if "\ufffd" not in expected:
            assert "".join(parts) == expected
        assert all(parts)

    def test_again_after_the_end(self, tiny_tokenizer):
        given_out: list[str] = []
        streamer = ClusterStreamer(partial(tiny_tokenizer.decode, skip_special_tokens=True), given_out.append)
        for text in ("กข", "คง"):
            streamer.put(torch.tensor([[1, 2]]))
            for id_ in tiny_tokenizer(text, add_special_tokens=False)["input_ids"]:
                streamer.put(torch.tensor([id_]))
            streamer.end()
        assert "".join(given_out) == "กขคง"


class TestWhereItEnds:
    def test_union_of_configuration_and_tokenizer(self, tiny_tokenizer):
        end_of_text, end_of_turn = tiny_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"])
        both = sorted({end_of_text, end_of_turn})
        for configured, expected in (
            (None, both),
            (end_of_text, both),
            (7, [7, *both]),
            ([7, end_of_turn], [7, *both]),
        ):
            assert stop_ids(GenerationConfig(eos_token_id=configured), tiny_tokenizer) == expected
        assert stop_ids(None, tiny_tokenizer) == both

    def test_at_a_token_that_only_the_configuration_names(self, checkpoint, tmp_path):
        """The model says what it says; the first of its tokens is made the end."""
        options = {"prompt": "สวัสดี", "max_new_tokens": 6, "temperature": 0, "raw": True}
        text = run(checkpoint, **options)
        assert text
        folder = shutil.copytree(checkpoint, tmp_path / "stops")
        tokens = json.loads((folder / "generated.json").read_text())
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[1]}))
        assert len(run(folder, **options)) < len(text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    """A JAI with random weights, and what it says first in `generated.json`."""
    folder = tmp_path_factory.mktemp("generate") / "jai"
    model = tiny_model(
        vocab_size=len(tiny_tokenizer),
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    ids = tiny_tokenizer("สวัสดี", return_tensors="pt")["input_ids"]
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    (folder / "generated.json").write_text(json.dumps(generated.tolist()))
    return folder


def run(folder: Path, **options) -> str:
    console = Console(file=StringIO(), width=20)
    text = generate(GenerateOptions(model=str(folder), **options), console=console)
    assert console.file.getvalue() == text + "\n"  # printed as it is, whatever the terminal's width
    return text


class TestEveryOptionDoesSomething:
    GREEDY = {"prompt": "สวัสดี hello", "temperature": 0, "max_new_tokens": 8}
    HOT = GREEDY | {"temperature": 20.0, "top_p": 1.0}

    def test_max_new_tokens(self, checkpoint):
        assert len(run(checkpoint, **self.GREEDY | {"max_new_tokens": 2})) < len(run(checkpoint, **self.GREEDY))

    def test_temperature_and_seed(self, checkpoint):
        by_seed = [run(checkpoint, **self.HOT | {"seed": seed}) for seed in (0, 0, 1)]
        assert by_seed[0] == by_seed[1] != by_seed[2]
        assert run(checkpoint, **self.GREEDY) not in by_seed

    def test_top_p_of_nothing_but_the_likeliest_is_greedy(self, checkpoint):
        assert run(checkpoint, **self.HOT | {"top_p": 1e-6}) == run(checkpoint, **self.GREEDY)

    def test_raw_text_has_no_chat_around_it(self, checkpoint, tiny_tokenizer):
        prompt = str(self.GREEDY["prompt"])
        chat = tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        answer = run(checkpoint, **self.GREEDY)
        assert answer == run(checkpoint, **self.GREEDY | {"raw": True, "prompt": chat})
        assert answer != run(checkpoint, **self.GREEDY | {"raw": True})

    def test_trust_remote_code_runs_the_checkpoints(self, checkpoint, tmp_path):
        folder = shutil.copytree(checkpoint, tmp_path / "remote")
        code = folder / "modeling_jai.py"
        code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
        run(folder, **self.GREEDY)
        assert not (tmp_path / "ran").exists()
        run(folder, **self.GREEDY, trust_remote_code=True)
        assert (tmp_path / "ran").exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"temperature": -1}, "temperature is -1; expected a number from 0"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"max_new_tokens": 0}, "max_new_tokens is 0; expected a whole number from 1"),
            ({"top_p": 5}, "top_p is 5; expected a number above 0 up to 1"),
            ({"top_p": 0}, "top_p is 0"),
            ({"seed": -1}, "seed is -1"),
            ({"prompt": ""}, "The prompt is empty"),
        ],
    )
    def test_values(self, values, message):
        with pytest.raises(UserError, match=message):
            GenerateOptions(**{"model": "m", "prompt": "p", **values})

    def test_no_tokenizer(self, checkpoint, tmp_path):
        folder = tmp_path / "without"
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer*"))
        with pytest.raises(UserError, match="without has no tokenizer that can be loaded: there is none of"):
            generate(GenerateOptions(model=str(folder), prompt="x"))

    @pytest.mark.parametrize(
        ("name", "message"), [("config.json", "is not a checkpoint"), ("*.safetensors", "no weights")]
    )
    def test_files_that_lack(self, checkpoint, tmp_path, name, message):
        folder = tmp_path / "without"
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(name))
        with pytest.raises(UserError, match=message):
            generate(GenerateOptions(model=str(folder), prompt="x"))

    def test_weights_that_may_not_be_read(self, checkpoint, monkeypatch):
        """For which safetensors says that there is no such file. Root may read all, so who asks is told otherwise."""
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path).suffix != ".safetensors")
        with pytest.raises(UserError, match=r"model.safetensors cannot be read\. Fetch it again, or ask whoever"):
            generate(GenerateOptions(model=str(checkpoint), prompt="x"))

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
    @pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff" * 40])
    def test_damaged_files(self, checkpoint, tmp_path, name, content):
        folder = shutil.copytree(checkpoint, tmp_path / "damaged")
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} (is|holds)|cannot be loaded"):
            generate(GenerateOptions(model=str(folder), prompt="x"))

    @pytest.mark.parametrize(("name", "value"), [("bos_token_id", {"a": 1}), ("eos_token_id", [1, "2"])])
    def test_a_generation_config_with_ids_that_are_none(self, checkpoint, tmp_path, name, value):
        folder = shutil.copytree(checkpoint, tmp_path / "damaged")
        (folder / "generation_config.json").write_text(json.dumps({name: value}))
        with pytest.raises(UserError, match=f"generation_config.json is damaged: {name} is"):
            generate(GenerateOptions(model=str(folder), prompt="x"))

    def test_ids_beyond_the_models_rows(self, checkpoint, tiny_tokenizer, tmp_path):
        folder = shutil.copytree(checkpoint, tmp_path / "larger")
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": ["<|tool|>"]}))
        prompt = {"prompt": "<|tool|> x", "raw": True}
        with pytest.raises(
            UserError, match=f"gives the id {len(tiny_tokenizer)} for this prompt, but the model has only"
        ):
            generate(GenerateOptions(model=str(folder), **prompt))


def test_errors_need_no_pytorch(tmp_path):
    """Neither a value that is out of range nor a checkpoint that is not there or not whole loads PyTorch."""
    pytest.importorskip("fastapi", reason="jai serve needs transformers[serving]")
    code = (
        "import sys\nfrom jai.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers'} & sys.modules.keys(), 'loaded'"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    for arguments, message in (
        (["generate", "x", "hi", "--temperature", "-1"], "temperature is -1.0"),
        (
            ["generate", "nobody/nothing", "hi"],
            "nobody/nothing is not a local folder, and it cannot be downloaded from the Hub",
        ),
        (["generate", str(tmp_path), "hi"], "no config.json"),
        (["serve", "nobody/nothing@main", "--port", "1"], "nobody/nothing is not a local folder, and it cannot"),
        (["serve", str(tmp_path), "--port", "1"], "no config.json"),
    ):
        process = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
        )
        assert process.returncode == 1
        assert message in process.stderr
        assert "Traceback" not in process.stderr
