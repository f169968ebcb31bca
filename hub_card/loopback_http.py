# SPDX-License-Identifier: Apache-2.0
"""The wire under the loopback Hub: an HTTP/1.1 server on 127.0.0.1 with faults on request."""

import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

_BLOCK = 2**20


class HttpError(Exception):
    """An answer that is an error, with the header by which the Hub's client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass(frozen=True)
class SeenRequest:
    """What a client asked for: enough to test which way it took, and where it sent its token."""

    method: str
    path: str
    host: str
    authorized: bool


@dataclass
class Request:
    """A request as a route sees it. `blocks` yields the body once."""

    method: str
    path: str
    query: dict[str, str]
    headers: Message
    blocks: Iterator[bytes]
    user: str | None = None

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
    return json_answer({"error": error.message}, headers, error.status)


@dataclass
class Fault:
    """What to do to the next `remaining` requests whose `"METHOD /path"` contains `match`.

    Attributes:
        status: answer with it; `None` closes the connection without an answer.
        after_work: let the request take effect first, as when an answer is lost on its way back.
        delay: seconds to wait before.
    """

    remaining: int
    match: str
    status: int | None
    after_work: bool = False
    delay: float = 0.0


class LoopbackServer:
    """Serves `answer` on a free port of 127.0.0.1 while the `with` block runs."""

    def __init__(self, answer: Callable[[Request], Answer]):
        self._answer = answer
        self._lock = threading.Lock()
        self.requests: list[SeenRequest] = []
        self.faults: list[Fault] = []

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

    def take_fault(self, request: Request) -> Fault | None:
        """The fault that this request meets, if any; it is then used up by one."""
        with self._lock:
            for fault in self.faults:
                if fault.remaining > 0 and fault.match in f"{request.method} {request.path}":
                    fault.remaining -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Answer:
        """The answer to a request, errors included."""
        try:
            return self._answer(request)
        except HttpError as error:
            return error_answer(error)
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
        fault = self.loopback.take_fault(request)
        if fault is None:
            answer = self.loopback.answer(request)
        else:
            time.sleep(fault.delay)
            if fault.after_work:
                self.loopback.answer(request)
            if fault.status is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            answer = error_answer(HttpError(fault.status, "this failure was asked for"))
        for _ in request.blocks:  # what the route did not read, else it would pass for the next request
            pass
        self._send(answer)

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

    def _send(self, answer: Answer) -> None:
        size = answer.body.stat().st_size if isinstance(answer.body, Path) else len(answer.body)
        start, end = 0, size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and isinstance(answer.body, Path):
            start, end = int(asked[1]), min(int(asked[2]) + 1 if asked[2] else size, size)
            answer.status = 206 if start < end else 416
            answer.headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}" if start < end else f"bytes */{size}"
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(max(end - start, 0)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(answer.body, bytes):
            self.wfile.write(answer.body)
            return
        with answer.body.open("rb") as file:
            file.seek(start)
            while start < end:
                block = file.read(min(_BLOCK, end - start))
                self.wfile.write(block)
                start += len(block)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: `requests` keeps what there is to know."""
