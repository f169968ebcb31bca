# SPDX-License-Identifier: Apache-2.0
"""The wire under the loopback Hub: it remembers every request, and lets faults happen to it."""

import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from jai.demo.hub.http_server import HttpError, HubHandler, Request, error_response
from loopback_hub.faults import Fault, Faults

_SLOW_PIECES, _SLOW_PAUSE = 5, 0.01


@dataclass(frozen=True)
class SeenRequest:
    """What a client asked for: enough to test which way it took, and where it sent its token."""

    method: str
    path: str
    host: str
    authorized: bool


@dataclass
class Wire:
    """What happened on the wire of one Hub, and what is to go wrong on it."""

    requests: list[SeenRequest] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)


def faulty_handler(wire: Wire) -> type[HubHandler]:
    """The handler of a server whose requests `wire` sees."""
    return type("FaultyHandler", (_FaultyHandler,), {"wire": wire})


class _FaultyHandler(HubHandler):
    wire: Wire
    fault: Fault | None

    def respond(self, request: Request) -> None:
        seen = SeenRequest(request.method, request.path, self.headers.get("Host", ""), "Authorization" in self.headers)
        self.wire.requests.append(seen)
        has_body = "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
        self.fault = self.wire.faults.draw(request.method, request.path, has_body)
        if self.fault is None:
            super().respond(request)
            return
        time.sleep(self.fault.delay)
        match self.fault.kind:
            case "hang up":
                self._hang_up()
            case "lose answer":
                self.server.answer(request)
                self._hang_up()
            case "cut upload":
                self._read_half()
                self._hang_up()
            case "status":
                answer = error_response(HttpError(self.fault.status, "this failure was asked for"))
                if self.fault.retry_after is not None:
                    answer.headers["Retry-After"] = str(self.fault.retry_after)
                self.send_reply(request, answer)
            case _:  # "cut answer" and "slow", see `send_body`
                super().respond(request)

    def send_body(self, file: BinaryIO, length: int) -> None:
        kind = self.fault.kind if self.fault else ""
        if kind == "cut answer":
            super().send_body(file, length // 2)
            self._hang_up()
        elif kind == "slow":
            piece = max(length // _SLOW_PIECES, 1)
            for start in range(0, length, piece):
                super().send_body(file, min(piece, length - start))
                time.sleep(_SLOW_PAUSE)
        else:
            super().send_body(file, length)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client may have been quicker
            self.connection.shutdown(socket.SHUT_RDWR)

    def _read_half(self) -> None:
        if "Transfer-Encoding" in self.headers:
            self.rfile.readline()
        else:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
