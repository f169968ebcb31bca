# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible endpoint on 127.0.0.1 that behaves as a test wants, badly too."""

import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behaviour = Callable[[dict[str, Any], int], "Answer | str"]


@dataclass(frozen=True)
class Answer:
    """An HTTP response.

    Attributes:
        body: its bytes; None is a whole reply with `text`.
        text: of the reply.
        status: of HTTP.
        finish: why the reply ended.
        headers: beside the usual ones.
        delay: seconds before it comes.
        drip: seconds between its bytes.
        hang_up: whether the connection is closed without an answer.
    """

    text: str = ""
    body: bytes | None = None
    status: int = 200
    finish: str = "stop"
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0
    drip: float = 0
    hang_up: bool = False


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who asked did not wait
            super().handle_error(request, client_address)


class ChatEndpoint:
    """A server with one method, `POST /v1/chat/completions`.

    Args:
        behave: called with the request's JSON and how often this very request has come before; gives the reply.
        key: what a caller must know, None for nobody.
        model: what the server calls itself; None repeats what it is asked for.
    """

    def __init__(self, behave: Behaviour, *, key: str | None = None, model: str | None = None):
        self.behave = behave
        self.key = key
        self.model = model
        self.asked: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                owner.handle(self)

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "ChatEndpoint":
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def prompts(self) -> list[str]:
        """The last message of each request."""
        return [request["messages"][-1]["content"] for request in self.asked]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            before = self.asked.count(request)
            self.asked.append(request)
            self.times.append(time.monotonic())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self._answer(handler, request, before)
        except (BrokenPipeError, ConnectionResetError):  # who asked did not wait
            handler.close_connection = True
        finally:
            with self.lock:
                self.at_once -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, request: dict[str, Any], before: int) -> None:
        if handler.path != "/v1/chat/completions":
            answer = Answer(status=404, body=b'{"error": "no such path"}')
        elif self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
            body = {"error": f"Incorrect API key: {handler.headers['Authorization']}"}
            answer = Answer(status=401, body=json.dumps(body).encode())
        else:
            given = self.behave(request, before)
            answer = Answer(given) if isinstance(given, str) else given
        time.sleep(answer.delay)
        if answer.hang_up:
            handler.close_connection = True
            return
        body = self._reply(request, answer) if answer.body is None else answer.body
        handler.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        for piece in [body] if not answer.drip else [bytes([byte]) for byte in body]:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(answer.drip)

    def _reply(self, request: dict[str, Any], answer: Answer) -> bytes:
        content = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": self.model or request["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": answer.finish,
                    "message": {"role": "assistant", "content": answer.text},
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14},
        }
        return json.dumps(content).encode()
