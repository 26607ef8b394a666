"""A server of the OpenAI chat API on the loopback, in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer:
    """Says what `speak` makes of the messages; where that is empty, it fails. `asked` has the messages of
    each call, `authorizations` its header.
    """

    def __init__(self, speak: Callable[[list[Mapping[str, Any]]], str]) -> None:
        self.asked: list[list[Mapping[str, Any]]] = []
        self.authorizations: list[str] = []
        self._speak = speak
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answers one request."""
        messages = json.loads(request.rfile.read(int(request.headers["Content-Length"])))["messages"]
        self.asked.append(messages)
        self.authorizations.append(request.headers["Authorization"])
        said = self._speak(messages)
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        body = json.dumps(reply).encode()
        request.send_response(200 if said else 500)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
