# SPDX-License-Identifier: Apache-2.0
"""What may go wrong between a client and the loopback Hub, planned or by chance."""

import random
import re
import threading
from collections import Counter
from dataclasses import dataclass

_RATE_LIMITED = 429
_CHANCES = ("status", "status", "hang up", "lose answer", "cut upload", "cut answer", "slow")
_STATUSES = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Attributes:
        kind: "status" answers with `status` instead, "hang up" closes the connection without an answer; neither takes
            effect. "lose answer" takes effect first, as when an answer is lost on its way back. "cut upload" closes the
            connection in the middle of the request's body, "cut answer" in the middle of the answer's. "slow" answers
            as always, in small pieces with pauses.
        status: of "status".
        delay: seconds to wait before anything else.
        retry_after: seconds, for the header Retry-After.
    """

    kind: str
    status: int = 500
    delay: float = 0.0
    retry_after: int | None = None


@dataclass
class _Planned:
    fault: Fault
    match: str
    remaining: int


class Faults:
    """Decides which request meets which fault: first those that were planned, then chance."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[_Planned] = []
        self._share = 0.0
        self._seed = 0
        self._asked: Counter[str] = Counter()
        self.met: Counter[str] = Counter()  # how many requests met each kind

    def plan(self, fault: Fault, n: int, match: str) -> None:
        """For the next `n` requests whose `"METHOD /path"` contains `match`."""
        with self._lock:
            self._planned.append(_Planned(fault, match, n))

    def storm(self, share: float, seed: int) -> None:
        """For that share of all requests, of every kind.

        A request's luck depends on the seed, on what it asks for and on how often that was asked before, not on the
        order in which the client's threads come.
        """
        with self._lock:
            self._share, self._seed = share, seed
            self._asked.clear()

    def stop(self) -> None:
        """No more of either."""
        with self._lock:
            self._planned.clear()
            self._share = 0.0

    def draw(self, method: str, path: str, has_body: bool) -> Fault | None:
        """The fault that this request meets, if any."""
        with self._lock:
            fault = self._next_planned(f"{method} {path}") or self._by_chance(method, path, has_body)
            if fault is not None:
                self.met[fault.kind] += 1
            return fault

    def _next_planned(self, request: str) -> Fault | None:
        for planned in self._planned:
            if planned.remaining > 0 and planned.match in request:
                planned.remaining -= 1
                return planned.fault
        return None

    def _by_chance(self, method: str, path: str, has_body: bool) -> Fault | None:
        if not self._share:
            return None
        name = f"{method} {re.sub('[0-9a-f]{16,}', '#', path)}"  # hashes of commits differ from run to run
        self._asked[name] += 1
        draw = random.Random(f"{self._seed} {name} {self._asked[name]}")
        if draw.random() >= self._share:
            return None
        kind = draw.choice([kind for kind in _CHANCES if kind != "cut upload" or has_body])
        status = draw.choice(_STATUSES)
        return Fault(kind, status, retry_after=1 if kind == "status" and status == _RATE_LIMITED else None)
