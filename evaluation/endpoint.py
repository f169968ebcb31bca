# SPDX-License-Identifier: Apache-2.0
"""The client of OpenAI-compatible endpoints: judges, and models that answer.

It asks several requests at a time, keeps every reply as it comes, asks again where that may help, and stops with one
error where it does not. A run that was stopped asks only for what it has no reply to.
"""

import asyncio
import email.utils
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jai.errors import UserError
from jai.evaluation.progress import counted_progress
from jai.evaluation.reply_cache import ChatReply, ChatRequest, ReplyCache
from jai.provenance import redact

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from rich.console import Console

_BODY_SHOWN = 200  # characters of what an endpoint says, in an error
_ASK_AGAIN = {408, 409, 425, 429}  # and all from 500 up
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")  # 429 of OpenAI's that no waiting mends
_EMPTY_TRIES = 2  # an endpoint that stumbled answers then; a model that has nothing to say says nothing again
_SHORTEST_SECRET = 8  # characters: what is shorter, as "none" or "EMPTY", is a placeholder, and may stand in any text
_LONGEST_PAUSE = 30.0  # seconds between two tries, where the endpoint does not say how long
_LONGEST_ASKED_PAUSE = 600.0  # seconds that an endpoint may ask for


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask, and how.

    Attributes:
        url: of the API, such as `https://api.openai.com/v1`.
        model: id of the model there.
        key_variable: name of the environment variable that holds the key; it need not be set for a server that wants
            none.
        concurrency: requests at a time.
        timeout: seconds for a whole reply.
        attempts: how often a request is tried.
        max_failed: requests that may fail for good before all of it stops.
        prices: of a million tokens read, and of a million written; None where they are not known.
        first_pause: seconds before a request is tried again; each time after that, it is twice as long.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 120.0
    attempts: int = 6
    max_failed: int = 0
    prices: tuple[float, float] | None = None
    first_pause: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"{self.url!r} is not an address of an endpoint. Give one such as https://api.openai.com/v1 or "
                "http://127.0.0.1:8000/v1."
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                f"The address of the endpoint at {parts.hostname} holds more than a place. Give it without a user, "
                f"and put the key into the environment variable {self.key_variable}."
            )
        if parts.path.rstrip("/").endswith("/completions"):
            raise UserError(f"{self.url} names a method of the API. Give the address before /chat/completions.")

    @property
    def key(self) -> str | None:
        """The key, None where the variable is not set.

        Raises:
            UserError: if it is none that a header can carry.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(f"{self.key_variable} holds characters that no key has. Set it again.")
        return key or None


@dataclass(frozen=True)
class FailedRequest:
    """A request that has no reply, and why."""

    reason: str


@dataclass
class EndpointCounts:
    """What came of the requests of one client.

    Attributes:
        replies: that came from the endpoint.
        cached: that were there from an earlier run.
        failed: requests without a reply.
        tries: HTTP requests that were sent.
        again: tries that had to be repeated, by what was wrong.
        empty: replies without a text.
        cut_off: replies that ended at `max_tokens`.
        uncounted: replies of which the endpoint did not say the tokens.
        prompt_tokens, reply_tokens: of the replies that came from the endpoint.
        models: which models answered, by their own word, cached replies included.
    """

    replies: int = 0
    cached: int = 0
    failed: int = 0
    tries: int = 0
    again: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    cut_off: int = 0
    uncounted: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    models: Counter[str] = field(default_factory=Counter)

    def add(self, reply: ChatReply, *, cached: bool) -> None:
        self.models[reply.model] += 1
        self.empty += not reply.text.strip()
        self.cut_off += reply.finish_reason == "length"
        if cached:
            self.cached += 1
            return
        self.replies += 1
        self.uncounted += reply.prompt_tokens is None or reply.reply_tokens is None
        self.prompt_tokens += reply.prompt_tokens or 0
        self.reply_tokens += reply.reply_tokens or 0


@dataclass(frozen=True)
class CostEstimate:
    """What requests will take, before they are sent.

    Attributes:
        requests: all of them, each once.
        cached: those that need not be asked.
        prompt_tokens: about how many; see `rough_tokens`.
        reply_tokens: the most that may come, None where a request sets no limit.
        price: the most that it may cost, None where prices or limits are not known.
    """

    requests: int
    cached: int
    prompt_tokens: int
    reply_tokens: int | None
    price: float | None

    def __str__(self) -> str:
        replies = "replies of any length" if self.reply_tokens is None else f"at most {self.reply_tokens:,} of replies"
        price = "" if self.price is None else f", at most {_money(self.price)}"
        return (
            f"{_number(self.requests, 'request')}, {self.cached:,} answered already; about {self.prompt_tokens:,} "
            f"tokens of prompts and {replies}{price}"
        )


def rough_tokens(text: str) -> int:
    """About how many tokens a text has for a model whose tokenizer is not known.

    Four ASCII characters are one, and every other character is one: Thai has 0.3 to 1.1 tokens a character, so the
    number is rather too high than too low.
    """
    ascii_ = sum(character < "\x80" for character in text)
    return math.ceil(ascii_ / 4) + len(text) - ascii_


class EndpointClient:
    """Asks an endpoint.

    Args:
        endpoint: where and how.
        cache: where replies are kept.
        console: where estimates and progress are shown; None shows none.

    Attributes:
        counts: what came of all requests so far.
    """

    def __init__(self, endpoint: Endpoint, cache: ReplyCache, *, console: "Console | None" = None):
        self.endpoint = endpoint
        self.cache = cache
        self.counts = EndpointCounts()
        self._console = console
        self._not_before = 0.0

    def estimate(self, requests: Sequence[ChatRequest]) -> CostEstimate:
        """What asking these will take."""
        distinct = {each.key(self.endpoint.model): each for each in requests}
        asked = [each for key, each in distinct.items() if self.cache.get(key) is None]
        prompts = sum(rough_tokens(message["content"]) for each in asked for message in each.messages)
        limits = [_reply_limit(each) for each in asked]
        replies = None if None in limits else sum(filter(None, limits))
        price = None
        if self.endpoint.prices and replies is not None:
            price = (prompts * self.endpoint.prices[0] + replies * self.endpoint.prices[1]) / 1e6
        return CostEstimate(len(distinct), len(distinct) - len(asked), prompts, replies, price)

    def ask(self, requests: Sequence[ChatRequest], what: str = "Asking") -> list[ChatReply | FailedRequest]:
        """Ask all requests that have no reply yet.

        Args:
            requests: what to ask; a request that stands there twice is asked once.
            what: name of the work, for the progress.

        Returns:
            As many outcomes, in the same order. At most `max_failed` of them are failures.

        Raises:
            UserError: if the endpoint refuses the key or the model, or more requests fail than may. What came is kept.
        """
        keys = [each.key(self.endpoint.model) for each in requests]
        outcomes: dict[str, ChatReply | FailedRequest] = {}
        for key in dict.fromkeys(keys):
            if (known := self.cache.get(key)) is not None:
                outcomes[key] = known
                self.counts.add(known, cached=True)
        missing = {key: each for key, each in zip(keys, requests) if key not in outcomes}
        if missing:
            self._say(f"  {what} ({self.endpoint.model}): {self.estimate(requests)}")
            outcomes |= self._ask_missing(missing, what)
        return [outcomes[key] for key in keys]

    def summary(self) -> str:
        """What came of all requests, in a few lines."""
        counts = self.counts
        lines = [
            f"{_number(counts.replies, 'reply', 'replies')} in {_number(counts.tries, 'try', 'tries')}, "
            f"{counts.cached:,} from the cache, "
            f"{counts.failed:,} failed; {counts.prompt_tokens:,} tokens read, {counts.reply_tokens:,} written"
            + ("" if self.endpoint.prices is None else f", {_money(self._price())}")
        ]
        said = [
            ("asked again", ", ".join(f"{reason} {count:,}×" for reason, count in sorted(counts.again.items()))),
            ("without a text", f"{counts.empty:,}" if counts.empty else ""),
            ("cut off at max_tokens", f"{counts.cut_off:,}" if counts.cut_off else ""),
            ("tokens not counted by the endpoint", f"{counts.uncounted:,}" if counts.uncounted else ""),
            ("answered by", ", ".join(sorted(counts.models)) if {*counts.models} - {self.endpoint.model} else ""),
        ]
        return "\n".join([*lines, *(f"  {name}: {value}" for name, value in said if value)])

    def _say(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _price(self) -> float:
        prompt_price, reply_price = self.endpoint.prices or (0.0, 0.0)
        return (self.counts.prompt_tokens * prompt_price + self.counts.reply_tokens * reply_price) / 1e6

    def _ask_missing(self, missing: dict[str, ChatRequest], what: str) -> dict[str, ChatReply | FailedRequest]:
        from anyio.from_thread import start_blocking_portal

        before = self.counts.replies
        try:
            # In a thread of its own, for a notebook has an event loop already.
            with start_blocking_portal() as portal:
                return portal.call(self._ask_all, missing, what)
        except KeyboardInterrupt:
            came = f"{self.counts.replies - before:,} of the {len(missing):,} replies came"
            self._say(f"{came} and are kept in {self.cache.path}; the same command asks for the others.")
            raise

    async def _ask_all(self, missing: dict[str, ChatRequest], what: str) -> dict[str, ChatReply | FailedRequest]:
        from openai import AsyncOpenAI

        outcomes: dict[str, ChatReply | FailedRequest] = {}
        waiting = iter(missing.items())
        async with AsyncOpenAI(
            base_url=self.endpoint.url,
            api_key=self.endpoint.key or "none",  # which a server without keys ignores
            timeout=self.endpoint.timeout,
            max_retries=0,
        ) as client:
            with counted_progress(self._console, what, len(missing)) as tell:

                async def work() -> None:
                    for key, request in waiting:
                        outcomes[key] = await self._outcome(client, key, request)
                        tell(len(outcomes))

                workers = [asyncio.ensure_future(work()) for _ in range(min(self.endpoint.concurrency, len(missing)))]
                try:
                    await asyncio.gather(*workers)
                except UserError as error:
                    kept = sum(isinstance(each, ChatReply) for each in outcomes.values())
                    raise UserError(
                        f"{error} {kept:,} of the {len(missing):,} replies came and are kept in {self.cache.path}; the "
                        "same command asks for the others."
                    ) from None
                finally:
                    for worker in workers:
                        worker.cancel()
                    await asyncio.gather(*workers, return_exceptions=True)
        return outcomes

    async def _outcome(self, client: "AsyncOpenAI", key: str, request: ChatRequest) -> ChatReply | FailedRequest:
        """The reply to a request, after as many tries as it takes.

        Raises:
            UserError: if all requests would fail as this one does, or more failed than may.
        """
        for attempt in range(1, self.endpoint.attempts + 1):
            while (pause := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            self.counts.tries += 1
            result = await self._try(client, request)
            is_last = attempt == self.endpoint.attempts
            if isinstance(result, ChatReply) and (result.text.strip() or is_last or attempt >= _EMPTY_TRIES):
                self.cache.put(key, result)
                self.counts.add(result, cached=False)
                return result
            problem = _Problem("empty reply") if isinstance(result, ChatReply) else result
            if problem.stops_all:
                raise UserError(problem.text)
            if is_last or not problem.ask_again:
                return self._failed(problem, attempt)
            self.counts.again[problem.kind] += 1
            await self._pause(problem, attempt)
        raise AssertionError("there is at least one attempt")

    def _failed(self, problem: "_Problem", attempts: int) -> FailedRequest:
        self.counts.failed += 1
        if self.counts.failed > self.endpoint.max_failed:
            allowed = f", and {self.endpoint.max_failed} may" if self.endpoint.max_failed else ""
            number = "A request" if self.counts.failed == 1 else f"{self.counts.failed} requests"
            raise UserError(
                f"{number} to {self.endpoint.model} at {self.endpoint.url} failed{allowed}; the last one after "
                f"{_number(attempts, 'try', 'tries')}: {problem.text}"
            )
        return FailedRequest(problem.text)

    async def _pause(self, problem: "_Problem", attempt: int) -> None:
        """Wait before the next try; what the endpoint asks for holds for all requests."""
        if not problem.wait:
            longest = min(self.endpoint.first_pause * 2 ** (attempt - 1), _LONGEST_PAUSE)
            await asyncio.sleep(longest * random.uniform(0.5, 1))
        elif problem.wait > _LONGEST_ASKED_PAUSE:
            raise UserError(
                f"{self.endpoint.url} asks to be left alone for {problem.wait:,.0f} seconds. Try again after that."
            )
        else:
            self._not_before = max(self._not_before, time.monotonic() + problem.wait)

    async def _try(self, client: "AsyncOpenAI", request: ChatRequest) -> "ChatReply | _Problem":
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        # `max_tokens` and others are sent as they are: OpenAI's client knows not all that endpoints take.
        arguments: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": list(map(dict, request.messages)),
            "extra_body": dict(request.parameters),
        }
        try:
            # The client's own limit is for each step: a server that sends a byte a second would never reach it.
            async with asyncio.timeout(self.endpoint.timeout):
                response = await client.chat.completions.with_raw_response.create(**arguments)
                body = response.http_response.text
        except (TimeoutError, APITimeoutError):
            return _Problem("timeout", f"no whole reply within {self.endpoint.timeout:g} seconds.")
        except APIStatusError as error:
            return self._status_problem(error.status_code, error.response.headers, error.response.text)
        except APIConnectionError as error:
            return _Problem("connection", f"no connection ({error.__cause__ or error}).")
        return _read_reply(body, self._redacted)

    def _status_problem(self, status: int, headers: Any, body: str) -> "_Problem":
        said = " ".join(self._redacted(body).split())
        said = f"{said[:_BODY_SHOWN]}…" if len(said) > _BODY_SHOWN else said or "nothing"
        endpoint = self.endpoint
        if status in (401, 403):
            key = f"the key in {endpoint.key_variable}" if endpoint.key else "a call without a key"
            return _Problem(
                f"HTTP {status}",
                f"{endpoint.url} refuses {key} (HTTP {status}: {said}). Set the environment variable "
                f"{endpoint.key_variable} to a key that may use {endpoint.model}.",
                stops_all=True,
            )
        if status in (404, 405):
            return _Problem(
                f"HTTP {status}",
                f"{endpoint.url} has no chat API, or no model {endpoint.model} (HTTP {status}: {said}). Check the "
                "address, which often ends in /v1, and the model's id.",
                stops_all=True,
            )
        if status in (402, 429) and (status == 402 or any(code in body for code in _NO_CREDIT)):
            return _Problem(
                f"HTTP {status}", f"{endpoint.url} wants more credit (HTTP {status}: {said}).", stops_all=True
            )
        again = status in _ASK_AGAIN or status >= 500
        return _Problem(f"HTTP {status}", f"HTTP {status}: {said}", ask_again=again, wait=_asked_pause(headers))

    def _redacted(self, text: str) -> str:
        """Without the key, which a server may repeat."""
        key = self.endpoint.key
        return redact(text, key) if key and len(key) >= _SHORTEST_SECRET else text


@dataclass(frozen=True)
class _Problem:
    """What is wrong with a try.

    Attributes:
        kind: in a word or two, for counts.
        text: for people.
        ask_again: whether another try may help.
        stops_all: whether every request would fail like this.
        wait: seconds that the endpoint asks for, None where it says nothing.
    """

    kind: str
    text: str = ""
    ask_again: bool = True
    stops_all: bool = False
    wait: float | None = None


def _read_reply(body: str, redacted: Callable[[str], str]) -> "ChatReply | _Problem":
    """The reply in a body with status 200."""
    shown = repr(redacted(body)[:_BODY_SHOWN])
    if not body.strip():
        return _Problem("empty body", "the endpoint answered with nothing.")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return _Problem("no JSON", f"the endpoint's answer is not complete JSON: {shown}")
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text = message.get("content") or message.get("refusal") or ""
        usage = content.get("usage") or {}
        model, reason = content.get("model"), choice.get("finish_reason")
        tokens = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError):
        text = None
    if not isinstance(text, str):
        return _Problem("no message", f"the endpoint's answer holds no message: {shown}")
    text = redacted(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))  # half a pair is not UTF-8
    return ChatReply(
        text, model if isinstance(model, str) else "", reason if isinstance(reason, str) else None, *tokens
    )


def _count(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _reply_limit(request: ChatRequest) -> int | None:
    limits = (request.parameters.get(name) for name in ("max_tokens", "max_completion_tokens"))
    return next((limit for limit in limits if limit is not None), None)


def _asked_pause(headers: Any) -> float | None:
    """Seconds that `Retry-After` (or OpenAI's `retry-after-ms`) asks for; None without one that can be read."""
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        pass
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _number(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def _money(amount: float) -> str:
    """In the currency of the prices."""
    return f"{amount:,.2f}" if amount >= 0.01 or amount == 0 else f"{amount:.4f}"
