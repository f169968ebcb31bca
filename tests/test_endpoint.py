# SPDX-License-Identifier: Apache-2.0
"""The client of endpoints, against a server on this machine that stumbles in every way."""

import json
import os
import signal
import subprocess
import sys
import time
from email.utils import formatdate

import pytest

from chat_endpoint import Answer, ChatEndpoint
from jai.errors import UserError
from jai.evaluation.endpoint import Endpoint, EndpointClient, FailedRequest, rough_tokens
from jai.evaluation.reply_cache import ChatReply, ChatRequest, ReplyCache

KEY = "sk-1234567890abcdef"


def request_of(text: str, **parameters) -> ChatRequest:
    return ChatRequest([{"role": "user", "content": text}], parameters or {"max_tokens": 100})


def echo(request: dict, before: int) -> str:
    return f"re: {request['messages'][-1]['content']}"


@pytest.fixture
def client_of(tmp_path):
    """`client_of(server, **options)`: a client that waits little and keeps its replies in this test's folder."""

    def build(server: ChatEndpoint, **options) -> EndpointClient:
        values = {"model": "judge", "first_pause": 0.01, "timeout": 5.0, "attempts": 4, **options}
        return EndpointClient(Endpoint(url=server.url, **values), ReplyCache(tmp_path / "replies.sqlite"))

    return build


def test_all_replies_in_order_and_as_many_at_a_time_as_may(client_of):
    with ChatEndpoint(lambda request, before: Answer(echo(request, before), delay=0.05)) as server:
        client = client_of(server, concurrency=3)
        replies = client.ask([request_of(f"ก{number}") for number in range(12)])
    assert [reply.text for reply in replies] == [f"re: ก{number}" for number in range(12)]
    assert server.most_at_once == 3
    assert (client.counts.replies, client.counts.tries, client.counts.cached) == (12, 12, 0)
    assert (client.counts.prompt_tokens, client.counts.reply_tokens) == (120, 48)
    assert server.asked[0]["max_tokens"] == 100
    assert server.asked[0]["model"] == "judge"


def test_what_was_answered_is_not_asked_again(client_of):
    with ChatEndpoint(echo) as server:
        first = client_of(server).ask([request_of("a"), request_of("b"), request_of("a")])
        assert sorted(server.prompts) == ["a", "b"]
        again = client_of(server)
        assert again.ask([request_of("c"), request_of("b"), request_of("a")])[1:] == [first[1], first[0]]
        assert (again.counts.cached, again.counts.replies) == (2, 1)
        # Another model, other parameters or another repeat is another request.
        client_of(server, model="other").ask([request_of("a")])
        again.ask([request_of("a", max_tokens=7), ChatRequest(request_of("a").messages, {"max_tokens": 100}, repeat=1)])
    assert len(server.asked) == 6


BROKEN = {
    "HTTP 429": Answer(status=429, body=b'{"error": "slow down"}'),
    "HTTP 500": Answer(status=500, body=b"oops"),
    "HTTP 503": Answer(status=503),
    "empty body": Answer(body=b""),
    "no JSON": Answer(body=b'{"choices": [{"message": {"content": "8'),
    "no message": Answer(body=b'{"choices": []}'),
    "timeout": Answer("late", delay=1.0),
    "connection": Answer(hang_up=True),
    "empty reply": Answer("  "),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_stumble_is_asked_again(client_of, kind):
    with ChatEndpoint(lambda request, before: BROKEN[kind] if not before else "well") as server:
        client = client_of(server, timeout=0.4)
        assert client.ask([request_of("a")])[0].text == "well"
    assert client.counts.again == {kind: 1}
    assert client.counts.tries == len(server.asked) == 2
    assert f"{kind} 1×" in client.summary()


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind != "empty reply"])
def test_what_never_answers_ends_with_one_error_and_keeps_the_rest(client_of, kind):
    def behave(request: dict, before: int) -> Answer | str:
        return BROKEN[kind] if request["messages"][-1]["content"] == "bad" else "well"

    with ChatEndpoint(behave) as server:
        client = client_of(server, timeout=0.4, attempts=3, concurrency=1)
        with pytest.raises(UserError, match=r"A request to judge .* failed; the last one after 3 tries: .*1 of the 3"):
            client.ask([request_of("good"), request_of("bad"), request_of("never asked")])
        assert server.prompts == ["good", "bad", "bad", "bad"]
        assert client.counts.failed == 1
        assert client_of(server).ask([request_of("good")])[0].text == "well"
        assert len(server.asked) == 4


def test_failures_up_to_the_limit_are_outcomes(client_of):
    def behave(request: dict, before: int) -> Answer | str:
        bad = request["messages"][-1]["content"].startswith("bad")
        return Answer(status=400, body=b'{"error": "this prompt is not allowed"}') if bad else "well"

    with ChatEndpoint(behave) as server:
        client = client_of(server, max_failed=1)
        outcomes = client.ask([request_of("good"), request_of("bad"), request_of("fine")])
        assert [type(each) for each in outcomes] == [ChatReply, FailedRequest, ChatReply]
        assert "not allowed" in outcomes[1].reason
        assert server.prompts.count("bad") == 1  # what is wrong with a request does not go away
        with pytest.raises(UserError, match=r"2 requests .* failed, and 1 may"):
            client_of(server, max_failed=1).ask([request_of("bad"), request_of("bad 2")])


def test_a_model_that_says_nothing_is_a_reply(client_of):
    with ChatEndpoint(lambda request, before: "") as server:
        client = client_of(server)
        assert client.ask([request_of("a")])[0].text == ""
        assert len(server.asked) == 2
        client.ask([request_of("a")])
    assert len(server.asked) == 2
    assert client.counts.empty == 2
    assert "without a text: 2" in client.summary()


@pytest.mark.parametrize("form", ["seconds", "date", "milliseconds"])
def test_retry_after_holds_for_all(client_of, form):
    headers = {
        "seconds": {"Retry-After": "1"},
        "date": {"Retry-After": formatdate(time.time() + 2, usegmt=True)},
        "milliseconds": {"retry-after-ms": "800"},
    }[form]
    with ChatEndpoint(
        lambda request, before: Answer(status=429, headers=headers) if len(server.asked) == 1 else "well"
    ) as server:
        client = client_of(server, concurrency=1)
        client.ask([request_of("a"), request_of("b")])
    assert server.times[1] - server.times[0] >= 0.75
    assert client.counts.again == {"HTTP 429": 1}


def test_a_pause_that_is_too_long_ends_it(client_of):
    with (
        ChatEndpoint(lambda request, before: Answer(status=429, headers={"Retry-After": "86400"})) as server,
        pytest.raises(UserError, match="left alone for 86,400 seconds"),
    ):
        client_of(server).ask([request_of("a")])


def test_a_server_that_drips_is_not_waited_for(client_of):
    with ChatEndpoint(lambda request, before: Answer("slow", drip=0.05) if not before else "well") as server:
        client = client_of(server, timeout=0.5)  # each byte comes in time, the whole would take 14 seconds
        assert client.ask([request_of("a")])[0].text == "well"
    assert client.counts.again == {"timeout": 1}


def test_a_wrong_key_is_one_error_without_the_key(client_of, monkeypatch, tmp_path):
    with ChatEndpoint(echo, key="sk-the-right-one-000") as server:
        monkeypatch.setenv("JUDGE_KEY", KEY)
        client = client_of(server, key_variable="JUDGE_KEY", concurrency=1)
        with pytest.raises(UserError, match="refuses the key in JUDGE_KEY") as raised:
            client.ask([request_of("a"), request_of("b")])
        assert KEY not in str(raised.value)
        assert len(server.asked) == 1
        monkeypatch.delenv("JUDGE_KEY")
        with pytest.raises(UserError, match=r"refuses a call without a key .* Set the environment variable JUDGE_KEY"):
            client.ask([request_of("a")])
        monkeypatch.setenv("JUDGE_KEY", "sk-the-right-one-000")
        assert client.ask([request_of("a")])[0].text == "re: a"


def test_the_key_is_written_nowhere(client_of, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with ChatEndpoint(lambda request, before: f"Your key is {KEY}.", key=KEY) as server:
        client = client_of(server, key_variable="JUDGE_KEY")
        assert KEY not in client.ask([request_of("a")])[0].text
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"Your key is" in written
    assert KEY.encode() not in written
    assert KEY not in repr(client.endpoint) + client.summary()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Answer(status=404, body=b'{"error": "model not found"}'), "no model judge .*model not found.*model's id"),
        (Answer(status=429, body=b'{"error": {"code": "insufficient_quota"}}'), "wants more credit"),
        (Answer(status=402), "wants more credit"),
    ],
)
def test_what_no_request_can_mend_ends_at_once(client_of, answer, message):
    with ChatEndpoint(lambda request, before: answer) as server:
        with pytest.raises(UserError, match=message):
            client_of(server, concurrency=1).ask([request_of("a"), request_of("b")])
        assert len(server.asked) == 1


def test_no_server(client_of):
    with ChatEndpoint(echo) as server:
        client = client_of(server, attempts=2)
    with pytest.raises(UserError, match=r"after 2 tries: no connection"):
        client.ask([request_of("a")])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("judge", "is not an address"),
        ("ftp://host/v1", "is not an address"),
        ("https://user:secret@host/v1", "more than a place"),
        ("https://host/v1?key=secret", "more than a place"),
        ("https://host/v1/chat/completions", "address before /chat/completions"),
    ],
)
def test_addresses_are_checked(url, message):
    with pytest.raises(UserError, match=message) as raised:
        Endpoint(url=url, model="judge")
    assert "secret" not in str(raised.value)


def test_a_key_that_is_none(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "กุญแจ")
    with pytest.raises(UserError, match="JUDGE_KEY holds characters that no key has"):
        Endpoint(url="https://host/v1", model="judge", key_variable="JUDGE_KEY").key  # noqa: B018


def test_cost_is_known_before(client_of):
    with ChatEndpoint(echo) as server:
        client = client_of(server, prices=(2.5, 10.0))
        requests = [request_of("a" * 400, max_tokens=50), request_of("ก" * 100, max_tokens=50)]
        estimate = client.estimate([*requests, requests[0]])
        assert (estimate.requests, estimate.cached) == (2, 0)
        assert (estimate.prompt_tokens, estimate.reply_tokens) == (200, 100)
        assert estimate.price == pytest.approx((200 * 2.5 + 100 * 10) / 1e6)
        assert "at most 0.0015" in str(estimate)
        client.ask(requests[:1])
        assert client.estimate(requests).prompt_tokens == 100
        assert client.estimate(requests).cached == 1
        assert "10 tokens read, 4 written, 0.0001" in client.summary()
        assert client.estimate([request_of("a", temperature=0)]).price is None
        assert client_of(server).estimate(requests).price is None


def test_rough_tokens_are_rather_too_many(shared_data):
    import gzip

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared_data / "tokenizers" / "phi3-mini" / "tokenizer.json"))
    with gzip.open(shared_data / "eval" / "mt_bench_en.jsonl.gz", "rt") as file:
        english = " ".join(json.loads(line)["turns"][0] for line in file)
    assert 0.8 < rough_tokens(english) / len(tokenizer.encode(english).ids) < 1.3


def test_the_model_that_answers_is_named(client_of):
    with ChatEndpoint(echo, model="judge-2024-08-06") as server:
        client = client_of(server)
        client.ask([request_of("a")])
    assert client.counts.models == {"judge-2024-08-06": 1}
    assert "answered by: judge-2024-08-06" in client.summary()


def test_odd_bodies_are_read_or_refused(client_of):
    """Half of a surrogate pair is JSON but no text; counts of tokens that are no counts are none."""
    bodies = [
        b'{"choices": [{"message": {"content": "\\ud83d half"}}], "usage": {"prompt_tokens": "many"}}',
        b'{"choices": [{"message": {"content": null, "refusal": "No."}}]}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b"[1, 2]",
        b"null",
        b"[" * 100_000,
    ]
    with ChatEndpoint(lambda request, before: Answer(body=bodies[int(request["messages"][-1]["content"])])) as server:
        client = client_of(server, attempts=1, max_failed=4)
        outcomes = client.ask([request_of(str(number)) for number in range(len(bodies))])
    assert outcomes[0].text == "� half"
    assert outcomes[1].text == "No."
    assert all(isinstance(outcome, FailedRequest) for outcome in outcomes[2:])
    assert client.counts.uncounted == 2


def test_a_cache_that_is_none(tmp_path):
    (tmp_path / "file").write_text("something else " * 100)
    with pytest.raises(UserError, match="cannot be used as a cache"):
        ReplyCache(tmp_path / "file")


KILLED = """
import signal
import sys
from pathlib import Path
from rich.console import Console
from jai.evaluation.endpoint import Endpoint, EndpointClient
from jai.evaluation.reply_cache import ChatRequest, ReplyCache

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background would inherit none
endpoint = Endpoint(url=sys.argv[1], model="judge", concurrency=2)
client = EndpointClient(endpoint, ReplyCache(Path(sys.argv[2])), console=Console(soft_wrap=True))
client.ask([ChatRequest([{"role": "user", "content": f"{number}"}], {"max_tokens": 100}) for number in range(20)])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_asks_nothing_twice(client_of, tmp_path, how):
    with ChatEndpoint(lambda request, before: Answer(echo(request, before), delay=0.1)) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, server.url, str(tmp_path / "replies.sqlite")],
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while len(server.asked) < 9:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(how)
        printed = process.communicate(timeout=20)[0]
        assert process.returncode != 0
        assert ("of the 20 replies came and are kept" in printed) == (how is signal.SIGINT)
        asked_before = len(server.asked)
        assert asked_before < 20
        client = client_of(server)
        replies = client.ask([request_of(f"{number}") for number in range(20)])
    assert [reply.text for reply in replies] == [f"re: {number}" for number in range(20)]
    assert client.counts.cached >= 6
    twice = {prompt for prompt in server.prompts if server.prompts.count(prompt) > 1}
    assert len(twice) <= 2  # what was under way when it was killed
    assert client.counts.cached + client.counts.replies == 20
