# SPDX-License-Identifier: Apache-2.0
"""The wire under the loopback Hub: an HTTP/1.1 server on 127.0.0.1 with faults on request."""

import io
import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from jai.hub_card.loopback_faults import Faults

_BLOCK = 2**20
_SLOW_PIECES, _SLOW_PAUSE = 5, 0.01


class HttpError(Exception):
    """An answer that is an error, with the header by which the Hub's client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after


@dataclass(frozen=True)
class SeenRequest:
    """What a client asked for: enough to test which way it took, and where it sent its token."""

    method: str
    path: str
    host: str
    authorized: bool


@dataclass
class Request:
    """A request as a route sees it. `blocks` yields the body once; `account` is the Hub's own."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    blocks: Iterator[bytes]
    account: Any = None

    def body(self) -> bytes:
        return b"".join(self.blocks)

    def json(self) -> Any:
        return json.loads(self.body())


@dataclass
class Answer:
    """A status, headers and a body: bytes, or a file that is sent from disk (with `Range`)."""

    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


def json_answer(value: Any, headers: dict[str, str] | None = None, status: int = 200) -> Answer:
    """`value` as JSON."""
    return Answer(json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}, status)


def error_answer(error: HttpError) -> Answer:
    """An error as the Hub words it."""
    one_line = " ".join(error.message.split()).encode("ascii", "replace").decode()
    headers = {"X-Error-Message": one_line} | ({"X-Error-Code": error.code} if error.code else {})
    headers |= {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
    return json_answer({"error": error.message}, headers, error.status)


class LoopbackServer:
    """Serves `answer` on a free port of 127.0.0.1 while the `with` block runs."""

    def __init__(self, answer: Callable[[Request], Answer]):
        self._answer = answer
        self.requests: list[SeenRequest] = []
        self.faults = Faults()

    def __enter__(self) -> "LoopbackServer":
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"loopback": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return self._server.server_port

    def answer(self, request: Request) -> Answer:
        """The answer to a request, errors included."""
        try:
            return self._answer(request)
        except HttpError as error:
            return error_answer(error)
        except ConnectionError:
            raise
        except Exception as error:  # a fault of the server is an answer, too
            traceback.print_exc()
            return error_answer(HttpError(500, f"{type(error).__name__}: {error}"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Bytes on the wire: reads a request, asks the Hub, sends the answer."""

    loopback: LoopbackServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        request = Request(self.command, url.path, query, self.headers, self._blocks())
        authorized = "Authorization" in self.headers
        self.loopback.requests.append(SeenRequest(self.command, url.path, self.headers.get("Host", ""), authorized))
        has_body = "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
        fault = self.loopback.faults.draw(self.command, url.path, has_body)
        time.sleep(fault.delay if fault else 0)
        kind = fault.kind if fault else ""
        if kind in ("hang up", "lose answer", "cut upload"):
            if kind == "lose answer":
                self.loopback.answer(request)
            elif kind == "cut upload":
                self._read_half()
            self._hang_up()
            return
        if fault is not None and kind == "status":
            error = HttpError(fault.status, "this failure was asked for", retry_after=fault.retry_after)
            answer = error_answer(error)
        else:
            answer = self.loopback.answer(request)
        for _ in request.blocks:  # what the route did not read, else it would pass for the next request
            pass
        self._send(answer, kind)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _blocks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():  # trailers
                pass
            return
        remaining = int(self.headers.get("Content-Length") or 0)
        while remaining and (block := self.rfile.read(min(_BLOCK, remaining))):
            remaining -= len(block)
            yield block
        if remaining:  # what came so far may read like a whole request
            raise ConnectionAbortedError(f"the client left {remaining} bytes before the end")

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client may have been quicker
            self.connection.shutdown(socket.SHUT_RDWR)

    def _read_half(self) -> None:
        if "Transfer-Encoding" in self.headers:
            self.rfile.readline()
        else:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)

    def _send(self, answer: Answer, kind: str) -> None:
        size = answer.body.stat().st_size if isinstance(answer.body, Path) else len(answer.body)
        start, end = 0, size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and isinstance(answer.body, Path):
            start, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else size, size)
            answer.status = 206 if start < end else 416
            answer.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}" if start < end else f"bytes */{size}"
        length = max(end - start, 0)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        pause = _SLOW_PAUSE if kind == "slow" else 0
        block_size = max(length // _SLOW_PIECES, 1) if kind == "slow" else _BLOCK
        with answer.body.open("rb") if isinstance(answer.body, Path) else io.BytesIO(answer.body) as file:
            file.seek(start)
            remaining = length // 2 if kind == "cut answer" else length
            while remaining:
                block = file.read(min(block_size, remaining))
                self.wfile.write(block)
                remaining -= len(block)
                time.sleep(pause)
        if kind == "cut answer":
            self._hang_up()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: `requests` keeps what there is to know."""
