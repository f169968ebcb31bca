# SPDX-License-Identifier: Apache-2.0
"""`jai eval --backend openai`: log-likelihoods and answers from a server are those of the checkpoint that it serves."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from evaluation_data import write_data, write_rows
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat_endpoint import Answer, ChatEndpoint
from jai.errors import UserError
from jai.evaluation.command import evaluate_suites
from jai.evaluation.fitting import is_too_long
from jai.evaluation.models import load_answering_model
from jai.evaluation.options import EvalOptions
from jai.evaluation.results import read_run
from jai.evaluation.suites import read_suite


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data"), [])
    for language in ("th", "en"):
        rows = [{"question": f"{number} + 1?", "answer": None, "answer_number": number + 1} for number in range(4)]
        write_rows(folder, f"juletxara/mgsm/{language}/test", rows)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=2048).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def completions(checkpoint) -> Iterator[str]:
    """`POST /v1/completions` with `echo` and `logprobs`, as vLLM has it: the log-probability of each token given."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/completions"
            assert asked["echo"]
            assert asked["logprobs"] == 1
            with lock:
                choices = [choice(number, ids) for number, ids in enumerate(asked["prompt"])]
            body = json.dumps({"choices": choices}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    @torch.no_grad()
    def choice(number: int, ids: list[int]) -> dict:
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        best = scores.max(dim=-1)
        following = [*ids[1:], int(best.indices[-1])]  # echoed, and one more that is generated
        values = scores[torch.arange(len(ids)), torch.tensor(following)].tolist()
        tops = [{str(token): value} for token, value in zip(best.indices.tolist(), best.values.tolist())]
        return {"index": number, "logprobs": {"token_logprobs": [None, *values], "top_logprobs": [None, *tops]}}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def test_choices_by_a_server_are_those_of_its_checkpoint(checkpoint, completions, data, tmp_path):
    suites = [read_suite("thai-exam")]
    shared = {"data": data, "limit": 2, "batch_size": 4}
    ours = evaluate_suites(EvalOptions(model=str(checkpoint), out=tmp_path / "ours", **shared), suites)
    served = EvalOptions(
        model="tiny",
        backend="openai",
        base_url=completions,
        tokenizer=str(checkpoint),
        max_length=2048,
        out=tmp_path / "served",
        **shared,
    )
    theirs = evaluate_suites(served, suites)
    assert len(theirs.items) == 5 * 2
    assert {key: item.texts for key, item in theirs.items.items()} == {
        key: item.texts for key, item in ours.items.items()
    }
    assert [figure.value for figure in theirs.results.figures] == [figure.value for figure in ours.results.figures]
    assert theirs.results.revision == completions


def test_what_a_server_is_asked_is_cut_only_where_that_is_wanted(checkpoint, completions, data, tmp_path):
    """lm-eval's class cuts at 2,048 tokens where it is not told a length, and only logs it."""
    options = {"model": "tiny", "backend": "openai", "base_url": completions, "tokenizer": str(checkpoint)}
    text = "แมวนอนอยู่บนเก้าอี้ " * 400
    whole = load_answering_model(EvalOptions(**options), chat=False)
    request = Instance("loglikelihood", {}, (text, " ก"), 0, ("task", 0, 1))
    (sent,), (length,), _ = whole.batch_loglikelihood_requests([[(None, *whole._encode_pair(text, " ก"))]])
    assert sent == whole.tok_encode(text + " ก")
    assert len(sent) - 1 >= length > 4000
    assert not is_too_long(whole, request)
    assert is_too_long(load_answering_model(EvalOptions(**options, max_length=4000), chat=False), request)
    run = evaluate_suites(
        EvalOptions(**options, max_length=64, data=data, limit=1, out=tmp_path / "run"), [read_suite("thai-exam")]
    )
    assert {note.partition(": ")[2] for note in run.results.notes if note.startswith("thai_exam_onet")} == {
        "requests that are longer than the model takes and lost their beginning: 5."
    }
    with pytest.raises(UserError, match="--max-length does nothing for mgsm: a server's chats are cut by the server"):
        evaluate_suites(EvalOptions(**options, max_length=64, data=data, out=tmp_path / "chat"), [read_suite("mgsm")])


def test_a_server_gets_the_tokens_that_a_checkpoint_gets(checkpoint, completions, tmp_path):
    """With a tokenizer that begins every text with a token of its own, too."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    begin = tokenizer.bos_token or tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.convert_tokens_to_ids(begin))]
    )
    tokenizer.save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)("").input_ids) == 1
    options = EvalOptions(model="tiny", backend="openai", base_url=completions, tokenizer=str(tmp_path))
    server = load_answering_model(options, chat=False)
    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(checkpoint),
        tokenizer=AutoTokenizer.from_pretrained(tmp_path),
        backend="causal",
    )
    assert server._encode_pair("แมวนอน", " ก") == model._encode_pair("แมวนอน", " ก")
    assert server.tok_encode("ก", add_special_tokens=False) == model.tok_encode("ก", add_special_tokens=False)
    assert server.tok_encode(["ก"], add_special_tokens=server.add_bos_token) == [model.tok_encode("ก")]  # to go on


def test_log_likelihoods_of_a_server_need_a_tokenizer(completions, data, tmp_path):
    options = EvalOptions(model="tiny", backend="openai", base_url=completions, data=data, out=tmp_path / "run")
    with pytest.raises(UserError, match="need --tokenizer"):
        evaluate_suites(options, [read_suite("thai-exam")])


def served(url: str, data: Path, out: Path, at_once: int = 1) -> EvalOptions:
    return EvalOptions(model="tiny", backend="openai", base_url=url, data=data, out=out, batch_size=at_once)


def known_answer(request: dict, before: int) -> str:
    """Right on even numbers."""
    number = int(request["messages"][-1]["content"].split(" + 1?")[0].split()[-1])
    return f"คำตอบคือ {number + 1 + number % 2}"


@pytest.mark.parametrize("at_once", [1, 4])
def test_answers_of_a_chat_server(data, tmp_path, at_once):
    with ChatEndpoint(lambda *asked: Answer(known_answer(*asked), delay=0.05)) as endpoint:
        run = evaluate_suites(served(endpoint.url, data, tmp_path / "run", at_once), [read_suite("mgsm")])
        (mean,) = [each for each in run.results.figures if (each.name, each.metric) == ("mean", "exact_match")]
        assert mean.value == 0.5
        assert len(endpoint.asked) == 8
        assert (endpoint.most_at_once > 2) == (at_once == 4)  # one that is answered may still count


def test_a_null_reply_says_nothing(data, tmp_path):
    """Servers that take the thought out of the reply leave null where there is nothing else."""
    null = Answer(body=b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": null}}]}')
    with ChatEndpoint(lambda *_: null) as endpoint:
        run = evaluate_suites(served(endpoint.url, data, tmp_path / "run"), [read_suite("mgsm")])
    assert {item.texts["answer"] for item in run.items.values()} == {""}
    assert {item.score for item in run.items.values()} == {0}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answer(status=500, body=b"{}"), "500"),
        (Answer(status=401, body=b'{"error": "Incorrect API key"}'), "401"),
        (Answer(body=b'{"choices": [{"mess'), "JSON|Expecting|Unterminated"),
        (Answer(body=b'{"choices": []}'), "no choices"),
        (Answer(body=b'{"error": "overloaded"}'), "overloaded"),
        (Answer(hang_up=True), "without response"),
    ],
    ids=["500", "401", "half JSON", "no choice", "error with status 200", "hangs up"],
)
def test_a_server_that_fails_is_one_error_and_answers_are_kept(data, tmp_path, answer, problem):
    broken = threading.Event()

    def behave(request, before):
        return known_answer(request, before) if len(endpoint.asked) <= 4 or not broken.is_set() else answer

    with ChatEndpoint(behave) as endpoint:
        broken.set()
        with pytest.raises(UserError, match=rf"(?s){endpoint.url}.*({problem})"):
            evaluate_suites(served(endpoint.url, data, tmp_path / "run"), [read_suite("mgsm")])
        assert not read_run(tmp_path / "run")[0].finished
        broken.clear()
        endpoint.asked.clear()
        run = evaluate_suites(served(endpoint.url, data, tmp_path / "run"), [read_suite("mgsm")])
        assert len(endpoint.asked) == 4  # the English ones: the Thai ones were kept
        assert run.results.finished


def test_a_server_that_fails_while_it_is_asked_several_things(data, tmp_path):
    with (
        ChatEndpoint(lambda *_: Answer(status=500, body=b"{}")) as endpoint,
        pytest.raises(UserError, match=rf"{endpoint.url}.*500"),
    ):
        evaluate_suites(served(endpoint.url, data, tmp_path / "run", at_once=4), [read_suite("mgsm")])
