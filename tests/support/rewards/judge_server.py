"""A judge on loopback that speaks the OpenAI API, as well or as badly as it is told."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Say(NamedTuple):
    """What the server answers: a reply of the model, or another status and body."""

    text: str = "Fine.\nScore: 10"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: str | None = None
    delay_s: float = 0.0


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # By default 5: further clients at once try again after a second.


class JudgeServer:
    """`script(number, request)` says how to answer the request of this number; `asked` has them all."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Say], port: int = 0) -> None:
        self.asked: list[dict[str, Any]] = []
        self.asked_at_s: list[float] = []
        self.keys: list[str] = []
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(server.asked)
                    server.asked.append(request)
                    server.asked_at_s.append(time.monotonic())
                    server.keys.append(self.headers.get("authorization", ""))
                say = script(number, request)
                time.sleep(say.delay_s)
                body = say.body if say.body is not None else json.dumps(completion(say.text))
                with contextlib.suppress(OSError):  # Whoever asked has gone.
                    self.send_response(say.status)
                    for header in (("content-type", "application/json"), *say.headers):
                        self.send_header(*header)
                    self.send_header("content-length", str(len(body.encode())))
                    self.end_headers()
                    self.wfile.write(body.encode())

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def judge_server(script: Callable[[int, dict[str, Any]], Say], port: int = 0) -> Iterator[JudgeServer]:
    server = JudgeServer(script, port)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def port_of_nobody() -> Iterator[int]:
    """Yields a port where nobody listens, and which no other process is given: that of a judge that is down,
    and may come up.
    """
    with socket.socket() as held:
        held.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # As the server that takes its place has it.
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}
