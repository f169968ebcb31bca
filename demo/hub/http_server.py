# SPDX-License-Identifier: Apache-2.0
"""An HTTP/1.1 server on 127.0.0.1 that speaks as the Hub does: errors with its headers, files in ranges."""

import io
import json
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

_BLOCK = 2**20


class HttpError(Exception):
    """An answer that is an error, with the header by which the Hub's client tells errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Request:
    """A request as a route sees it. `blocks` yields the body once; `user` is whose token came with it, if any."""

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
class Response:
    """A status, headers and a body: bytes, or a file that is sent from disk (with `Range`)."""

    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200


def json_response(value: Any, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    """`value` as JSON."""
    return Response(json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})}, status)


def error_response(error: HttpError) -> Response:
    """An error as the Hub words it."""
    one_line = " ".join(error.message.split()).encode("ascii", "replace").decode()
    headers = {"X-Error-Message": one_line} | ({"X-Error-Code": error.code} if error.code else {})
    return json_response({"error": error.message}, headers, error.status)


class HubHandler(BaseHTTPRequestHandler):
    """Bytes on the wire: reads a request, asks the Hub, sends the answer."""

    server: "HubServer"
    protocol_version = "HTTP/1.1"

    def serve(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.respond(Request(self.command, url.path, query, self.headers, self._blocks()))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def respond(self, request: Request) -> None:
        """Find the answer to a request and send it."""
        self.send_reply(request, self.server.answer(request))

    def send_reply(self, request: Request, answer: Response) -> None:
        """Send an answer, once the whole request has come."""
        for _ in request.blocks:  # what the route did not read, else it would pass for the next request
            pass
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
        with answer.body.open("rb") if isinstance(answer.body, Path) else io.BytesIO(answer.body) as file:
            file.seek(start)
            self.send_body(file, length)

    def send_body(self, file: BinaryIO, length: int) -> None:
        """Send the next `length` bytes of a file."""
        while length:
            block = file.read(min(_BLOCK, length))
            self.wfile.write(block)
            length -= len(block)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

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


class HubServer(ThreadingHTTPServer):
    """Serves `routes` on a free port of 127.0.0.1 while the `with` block runs."""

    daemon_threads = True

    def __init__(self, routes: Callable[[Request], Response], handler: type[HubHandler] = HubHandler):
        super().__init__(("127.0.0.1", 0), handler)
        self._routes = routes
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()

    def answer(self, request: Request) -> Response:
        """The answer to a request, errors included."""
        try:
            return self._routes(request)
        except HttpError as error:
            return error_response(error)
        except ConnectionError:
            raise
        except Exception as error:  # a fault of the server is an answer, too
            traceback.print_exc()
            return error_response(HttpError(500, f"{type(error).__name__}: {error}"))

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may leave at any time
            super().handle_error(request, client_address)
