# SPDX-License-Identifier: Apache-2.0
"""`jai eval --backend vllm`: what lm-eval's class is given, and what of it reaches vLLM.

vLLM itself is not installed where the tests run; a stand-in for its package notes what its engine is made with. What
was seen with the real one is in docs/evaluation.md.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from jai.errors import UserError
from jai.evaluation.fitting import is_too_long
from jai.evaluation.kept_answers import ANSWERS_FILE, KeptAnswers
from jai.evaluation.models import load_answering_model
from jai.evaluation.options import EvalOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


class _Engine:
    """What the stand-in for `vllm.LLM` was made with."""

    fails = False

    def __init__(self, **arguments):
        if _Engine.fails:
            raise RuntimeError("no GPU\nwas found")
        self.arguments = arguments
        length = arguments["max_model_len"] or 4096
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=length))


@pytest.fixture
def vllm(monkeypatch):
    contents = {
        "vllm": {"LLM": _Engine, "SamplingParams": object, "TokensPrompt": dict},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": object},
        "vllm.renderers": {},
        "vllm.renderers.hf": {"resolve_chat_template": lambda **given: given["tokenizer"].chat_template},
        "vllm.tokenizers": {"get_tokenizer": lambda name, **_: AutoTokenizer.from_pretrained(name)},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0" if name == "vllm" else version(name))
    monkeypatch.setattr(_Engine, "fails", False)


def options_of(checkpoint: Path, **given) -> EvalOptions:
    return EvalOptions(**{"model": str(checkpoint), "backend": "vllm", "trust_remote_code": True, **given})


def test_options_reach_vllm(checkpoint, vllm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    options = options_of(checkpoint, dtype="bfloat16", max_length=99, seed=5, parallelize=True)
    options.check()
    arguments = load_answering_model(options, chat=True).model.arguments
    wanted = {
        "model": str(checkpoint),
        "dtype": "bfloat16",
        "max_model_len": 99,
        "seed": 5,
        "trust_remote_code": True,
        "tensor_parallel_size": 3,
    }
    assert {name: arguments[name] for name in wanted} == wanted
    arguments = load_answering_model(options_of(checkpoint), chat=False).model.arguments
    assert (arguments["tensor_parallel_size"], arguments["max_model_len"], arguments["dtype"]) == (1, None, "auto")


def test_vllm_is_asked_much_at_a_time_and_what_it_cuts_is_counted(checkpoint, vllm, tmp_path):
    lm = load_answering_model(options_of(checkpoint, max_length=20), chat=False)
    asked: list[int] = []
    lm.loglikelihood = lambda requests, **_: (asked.append(len(requests)), [(0.0, False)] * len(requests))[1]
    model = KeptAnswers(lm, tmp_path / ANSWERS_FILE, 8)
    model.loglikelihood([Instance("loglikelihood", {}, (f"{number}", "x"), number) for number in range(1100)])
    assert asked == [1024, 76]
    # It generates a token in any case, so one less than its length may be read.
    lengths = {count: len(lm.tok_encode("ก" * count)) for count in range(1, 60)}
    for count, length in lengths.items():
        request = Instance("loglikelihood", {}, ("ก" * (count - 1), "ก"), 0)
        assert is_too_long(lm, request) == (length > 19)
    assert 19 in lengths.values()
    writes = Instance("generate_until", {}, ("ก", {"max_gen_toks": 20}), 0, ("mine", 0, 1))
    with pytest.raises(UserError, match="The task mine lets the model write 20 tokens, and the model takes 20 in all"):
        model.generate_until([writes])


def test_what_vllm_cannot_do_is_one_error(checkpoint, vllm, monkeypatch):
    with pytest.raises(UserError, match=r"with the code in its folder\. Allow that with --trust-remote-code"):
        load_answering_model(options_of(checkpoint, trust_remote_code=False), chat=False)
    monkeypatch.setattr(_Engine, "fails", True)
    with pytest.raises(UserError, match=f"vLLM cannot load {checkpoint}: no GPU was found"):
        load_answering_model(options_of(checkpoint), chat=False)


def test_vllm_must_be_installed(checkpoint):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    with pytest.raises(UserError, match="pip install vllm"):
        load_answering_model(options_of(checkpoint), chat=False)
