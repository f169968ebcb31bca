# SPDX-License-Identifier: Apache-2.0
"""Requests of every kind to a server of a JAI: an answer or a status of 400 to 499, never a traceback."""

import json
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import VALUES, damages_of
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_four_bits import SIZES, four_bits
from transformers import AutoModelForCausalLM

from fuzzing import HANG_SECONDS, SECONDS, Figures, fuzz

pytest.importorskip("fastapi", reason="needs transformers[serving]")
pytest.importorskip("openai", reason="needs transformers[serving]")

from jai.quantization_jai import lora_reaching_four_bits
from jai.serve import adapt_server

pytestmark = pytest.mark.usefixtures("within_bounds")

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "hi", "max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2, "stream": False},
}
# Fields that a body may have beside its own, with values that are taken.
MORE: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "seed": 1,
    "stop": ["x"],
    "stream": True,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "logit_bias": {"5": 1.0},
    "frequency_penalty": 0.5,
    "chat_template_kwargs": {"x": 1},
    "generation_config": json.dumps({"max_new_tokens": 2}),
    "model": None,
    "instructions": "A",
    "suffix": "b",
    "max_completion_tokens": 1,
}
# What the other fields are to these is refused by name.
NOT_OF = {
    "/v1/chat/completions": {"instructions", "suffix"},
    "/v1/completions": {"tools", "chat_template_kwargs", "instructions", "max_completion_tokens"},
    "/v1/responses": {"stop", "logit_bias", "frequency_penalty", "suffix", "max_completion_tokens"},
}


@pytest.fixture
def adapter_on_four_bits(tiny_checkpoint, tmp_path) -> tuple[Path, torch.Tensor]:
    """An adapter of experts in four bits, and the logits of 20 tokens with it."""
    whole = tiny_checkpoint(tmp_path / "whole", **SIZES)
    AutoModelForCausalLM.from_pretrained(whole, quantization_config=four_bits()).save_pretrained(tmp_path / "four")
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    config = lora_reaching_four_bits(LoraConfig(r=4, **targets, init_lora_weights=False))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "four"), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", model(torch.arange(5, 25)[None]).logits


@pytest.fixture(scope="module")
def address(tmp_path_factory, tiny_checkpoint) -> Iterator[str]:
    """A server in a thread of this process."""
    from transformers.cli import serve

    adapt_server()
    folder = tiny_checkpoint(tmp_path_factory.mktemp("fuzz") / "jai", num_hidden_layers=2, hidden_size=16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = serve.Serve(force_model=str(folder), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    while not server.server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.kill_server()


def test_an_adapter_is_loaded_on_the_base_that_it_names(address, adapter_on_four_bits):
    """transformers' own server takes none."""
    from transformers.cli.serving.model_manager import ModelManager

    adapter, expected = adapter_on_four_bits
    model = ModelManager(device="cpu")._load_model(f"{adapter}@main")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(torch.arange(5, 25)[None]).logits, expected, rtol=1e-4, atol=1e-5)


def ask(address: str, path: str, body: bytes) -> tuple[int, str]:
    request = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=HANG_SECONDS) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@st.composite
def bodies(draw: st.DrawFn, path: str) -> bytes:
    body = dict(BODIES[path])
    for name in draw(st.lists(st.sampled_from(sorted(MORE.keys() - NOT_OF.get(path, ()))), max_size=3, unique=True)):
        body[name] = draw(st.sampled_from([MORE[name], MORE[name], draw(st.sampled_from(VALUES))]))
    if draw(st.booleans()):
        return json.dumps(body).encode()
    damage = draw(damages_of("body.json", json.dumps(body).encode()))
    return json.dumps(body).encode() if damage.content is None else damage.content


def check_request(address: str, path: str, body: bytes, log: pytest.LogCaptureFixture) -> str:
    log.clear()
    status, text = ask(address, path, body)
    assert status == 200 or 400 <= status < 500, (status, text)
    assert not [record for record in log.records if record.exc_info], body
    assert '"error":' not in text.partition("data: ")[2], text
    assert ask(address, "/v1/chat/completions", json.dumps(CHAT).encode())[0] == 200, "it answers no more"
    if status == 200:
        return "ok"
    assert json.loads(text)["detail"], text
    return f"{status} {text[:60]}"


@pytest.mark.parametrize("path", BODIES)
def test_requests(address, caplog, figures, path):
    fuzz_requests(address, caplog, figures, path, None)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
@pytest.mark.parametrize("path", BODIES)
def test_requests_for_minutes(address, caplog, figures, path):
    fuzz_requests(address, caplog, figures, path, SECONDS / 10 / len(BODIES))


def fuzz_requests(address: str, log: Any, figures: Figures, path: str, seconds: float | None) -> None:
    log.set_level(logging.ERROR)
    assert check_request(address, path, json.dumps(BODIES[path]).encode(), log) == "ok"
    fuzz(bodies(path), lambda body: figures.add(check_request(address, path, body, log)), examples=20, seconds=seconds)


# Each was a traceback and status 500, but for the last two, which kept the server's only thread for ever.
@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/v1/chat/completions", b"{}", 400, "`messages` is missing"),
        ("/v1/chat/completions", b'{"messages": null}', 400, "`messages` is missing"),
        ("/v1/chat/completions", b'{"messages": [{"content": "x"}]}', 400, "a list of messages, each an object"),
        (
            "/v1/chat/completions",
            b'{"messages": [{"role": "user", "content": [{"type": "x"}]}]}',
            400,
            "a list of messages",
        ),
        ("/v1/chat/completions", rb'{"messages": [{"role": "user", "content": "\ud800"}]}', 400, "a list of messages"),
        ("/v1/chat/completions", b"[" * 900 + b"]" * 900, 422, "not a JSON object"),
        ("/v1/chat/completions", b"[NaN]", 422, "not a JSON object"),
        ("/v1/chat/completions", b"hello", 422, "not a JSON object"),
        ("/v1/completions", b'{"prompt": "hi", "temperature": -1}', 400, "a number from 0"),
        ("/v1/completions", b'{"prompt": "hi", "temperature": NaN}', 400, "a number from 0"),
        ("/v1/completions", b'{"prompt": "hi", "top_p": 2}', 400, "above 0 up to 1"),
        ("/v1/completions", b'{"prompt": "hi", "seed": -1}', 400, "up to 4294967295"),
        ("/v1/completions", b'{"prompt": "hi", "max_tokens": 0}', 400, "a whole number from 1"),
        ("/v1/completions", b'{"prompt": "' + b"hi " * 500 + b'"}', 400, "expected 1 to 127"),
        ("/v1/responses", b"{}", 400, "`input` is missing"),
        ("/v1/responses", b'{"input": [[1]], "stream": false}', 400, "cannot be answered as it is"),
        ("/v1/completions", b'{"prompt": "hi", "max_tokens": 1000000000000000000}', 200, '"finish_reason"'),
        ("/v1/completions", b'{"prompt": "hi", "temperature": 1e-300, "max_tokens": 2}', 200, '"finish_reason"'),
    ],
)
def test_requests_that_fuzzing_found(address, caplog, path, body, status, message):
    answered, text = ask(address, path, body)
    assert (answered, message in text) == (status, True), text
    assert not [record for record in caplog.records if record.exc_info]
    logged = [record.getMessage() for record in caplog.records if record.name == "jai.serve"]
    assert bool(logged) == (
        message == "cannot be answered as it is"
    )  # and whose fault that is, only the server can see
    assert all(text.startswith(f"{path}: ") and ".py, line " in text for text in logged)
