# SPDX-License-Identifier: Apache-2.0
"""Served by transformers itself: over HTTP, in batches, in pipelines, with a draft model (docs/serving.md)."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, pipeline

from jai import JaiForCausalLM

pytest.importorskip("fastapi", reason="needs transformers[serving]")
openai = pytest.importorskip("openai", reason="needs transformers[serving]")

TESTS = Path(__file__).parent
CHATS = {
    "สวัสดี": "วันนี้อากาศดีมาก",
    "Who are you?": "The quick brown fox.",
    "ราคา?": "1,250 บาท",
}
# In an isolated process, from the copy of the file alone: `jai` cannot be imported there.
REMOTE = f"""
import runpy, sys
sys.path.insert(0, {str(TESTS)!r})
import clean_process
assert not clean_process.can_import_jai()
sys.argv[0] = {str(TESTS.parent / "serve.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DOORS = {
    "package": [sys.executable, "-m", "jai.serve"],
    "remote code": [sys.executable, "-I", "-c", REMOTE, "--trust-remote-code"],
}
BATCHING = ["--continuous-batching", "--cb-num-blocks", "16", "--cb-max-batch-tokens", "64"]  # default: all memory


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A JAI with live skips that knows three chats by heart, ends of turn included."""
    tokenizer = tiny_tokenizer
    end_of_turn = tokenizer.convert_tokens_to_ids("<|end|>")
    model = tiny_model(
        vocab_size=len(tokenizer),
        block_repeats=[1, 2, 1],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], return_tensors="pt"
        )["input_ids"]
        for question, answer in CHATS.items()
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(45):
        optimizer.zero_grad()
        sum(model(row, labels=row).loss for row in rows).backward()
        optimizer.step()
    assert min(model.model.layers[2].skip_alpha.abs()) > 0.1
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end_of_turn]
    folder = tmp_path_factory.mktemp("serving") / "tiny-jai"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=[("package", []), ("remote code", BATCHING)], ids=["package", "remote-batching"])
def client(request, checkpoint, tmp_path_factory) -> Iterator["openai.OpenAI"]:
    """A client of a real server: of the installed package, and of remote code alone with continuous batching."""
    door, options = request.param
    home = tmp_path_factory.mktemp("home")
    port = free_port()
    command = [*DOORS[door], str(checkpoint), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port), *options]
    with (home / "log").open("w+") as log:
        server = subprocess.Popen(
            command,
            cwd=home,
            env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_healthy(server, f"http://127.0.0.1:{port}/health", home / "log")
            yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(timeout=5)
            except subprocess.TimeoutExpired:  # transformers leaves the thread of continuous batching running
                server.kill()
                server.wait()


def wait_until_healthy(server: subprocess.Popen, address: str, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(f"no answer from {address}:\n{log.read_text()}")


def ask(client: "openai.OpenAI", checkpoint: Path, question: str, **options):
    return client.chat.completions.create(
        model=str(checkpoint), messages=[{"role": "user", "content": question}], **{"max_tokens": 40, **options}
    )


def test_an_answer_ends_at_the_end_of_its_turn(client, checkpoint, tiny_tokenizer):
    completion = ask(client, checkpoint, "สวัสดี")
    (choice,) = completion.choices
    assert choice.message.content == CHATS["สวัสดี"]
    assert choice.finish_reason == "stop"
    chat = [{"role": "user", "content": "สวัสดี"}, {"role": "assistant", "content": CHATS["สวัสดี"]}]
    until_end, end_of_turn, _ = tiny_tokenizer.apply_chat_template(chat, tokenize=False).rpartition("<|end|>")
    tokens = tiny_tokenizer(until_end + end_of_turn, add_special_tokens=False)["input_ids"]
    assert completion.usage.total_tokens == len(tokens)


def test_a_stream_is_the_answer_in_parts(client, checkpoint):
    chunks = list(ask(client, checkpoint, "ราคา?", stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(parts) > 3
    assert "".join(parts) == CHATS["ราคา?"]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_answer_is_cut_where_the_client_says(client, checkpoint):
    completion = ask(client, checkpoint, "Who are you?", max_tokens=3)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 3
    assert CHATS["Who are you?"].startswith(completion.choices[0].message.content)


def test_a_temperature_samples(client, checkpoint, request):
    """The checkpoint's generation config does not, and transformers' server would stay with that."""
    if "remote-batching" in request.node.name:
        pytest.skip("continuous batching decides by its first request, in transformers itself")
    hot = {ask(client, checkpoint, "สวัสดี", temperature=1.9, max_tokens=12).choices[0].message.content for _ in range(6)}
    assert len(hot) > 1
    cold = ask(client, checkpoint, "สวัสดี", temperature=0)
    assert cold.choices[0].message.content == CHATS["สวัสดี"]


def test_requests_at_once_get_each_their_own_answer(client, checkpoint):
    questions = [*CHATS] * 2
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: ask(client, checkpoint, question), questions))
    assert [answer.choices[0].message.content for answer in answers] == [CHATS[question] for question in questions]


@pytest.mark.parametrize("trust", [True, False])
def test_transformers_own_program_finds_no_class_from_outside(checkpoint, trust):
    """Why jai.serve is there. When this fails, `transformers serve` will do, and docs/serving.md can say so."""
    from transformers.cli.serving.model_manager import ModelManager

    with pytest.raises(AttributeError, match="transformers has no attribute JaiForCausalLM"):
        ModelManager(force_model=str(checkpoint), device="cpu", trust_remote_code=trust)


def test_a_pipeline_streams_the_answer(checkpoint):
    pipe = pipeline("text-generation", model=str(checkpoint))
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    with ThreadPoolExecutor(1) as pool:
        chat = [{"role": "user", "content": "Who are you?"}]
        result = pool.submit(pipe, chat, max_new_tokens=40, streamer=streamer)
        parts = [part for part in streamer if part]
    assert len(parts) > 1
    assert "".join(parts) == CHATS["Who are you?"]
    assert result.result()[0]["generated_text"][-1] == {"role": "assistant", "content": CHATS["Who are you?"]}


@pytest.mark.parametrize("attention", ["paged|eager", "sdpa"])
@torch.no_grad()
def test_continuous_batching_is_plain_generation(checkpoint, attention):
    """More requests than fit in one batch, of different lengths; the alphas are live."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 390, (length,), generator=generator).tolist() for length in (3, 17, 9, 30, 5)]
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    config = GenerationConfig(**greedy, eos_token_id=-1)
    expected = {
        tuple(prompt): model.generate(torch.tensor([prompt]), **greedy, eos_token_id=None)[0, len(prompt) :].tolist()
        for prompt in prompts
    }
    model.set_attn_implementation(attention)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=24)
    finished = model.generate_batch(prompts, config, small).values()
    assert {tuple(request.prompt_ids): request.generated_tokens for request in finished} == expected


@torch.no_grad()
def test_a_smaller_jai_drafts_and_the_large_one_decides(checkpoint):
    """The first layers of the plan, loaded from the same folder; then without a second model, by leaving early."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    draft = AutoModelForCausalLM.from_pretrained(checkpoint, num_hidden_layers=2).eval()
    assert isinstance(draft, JaiForCausalLM)
    assert len(draft.model.layers) == 2
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    drafted = []
    draft.register_forward_hook(lambda *_: drafted.append(1))
    for question, answer in CHATS.items():
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        for options in ({"assistant_model": draft}, {"assistant_early_exit": 3}):
            output = model.generate(**inputs, max_new_tokens=40, do_sample=False, **options)
            assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == answer + "<|end|>"
    assert len(drafted) > len(CHATS)
    assert model.config.num_hidden_layers == 4
