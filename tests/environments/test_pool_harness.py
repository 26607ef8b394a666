"""Harnesses in processes of their own: their client asks whom the pool says, and they fail as environments
do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from environments import EnvironmentFailure, Turn
from environments.pool import EnvironmentPool
from environments.spec import EnvironmentSpec

pytestmark = pytest.mark.timed

AGENTS = "tests.support.environments.agents"
SPECS = [
    EnvironmentSpec("agent", f"{AGENTS}:agent", "harness", is_async=True),
    EnvironmentSpec("plain", f"{AGENTS}:plain_agent", "harness"),
    EnvironmentSpec("broken", f"{AGENTS}:broken_agent", "harness", is_async=True),
]
SOON_S = 30.0


class Policy(BaseHTTPRequestHandler):
    """Answers what it was asked, in capitals."""

    asked: list[tuple[str, str]] = []  # noqa: RUF012 - of the one test at a time

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        self.asked.append((self.headers["Authorization"], asked))
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": asked.upper()},
        }
        body = json.dumps(
            {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        )
        self.send_response(500 if asked == "fail" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Policy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    with EnvironmentPool(SPECS, turn_timeout_s=2.0, memory_bytes=2**30) as pool:
        yield pool


def test_what_a_harness_returns_is_the_reward(pool: EnvironmentPool, url: str) -> None:
    Policy.asked.clear()
    answers = ["A A  7 7", "something else"]
    places = [pool.open("agent", {"question": "a", "answer": answer}, 7) for answer in answers]
    turns = [place.run(url, f"key-{index}") for index, place in enumerate(places)]
    assert [turn.result(SOON_S) for turn in turns] == [Turn("", True, 1.0), Turn("", True, 0.0)]
    assert sorted(Policy.asked) == [
        ("Bearer key-0", "a  7"),
        ("Bearer key-0", "a A  7 7"),
        ("Bearer key-1", "a  7"),
        ("Bearer key-1", "a A  7 7"),
    ]
    for place in places:
        place.close()


def test_a_harness_without_an_event_loop_has_a_process_of_its_own(pool: EnvironmentPool, url: str) -> None:
    place = pool.open("plain", {"question": "2+2", "answer": "4"}, 0)
    assert place.run(url, "key").result(SOON_S) == Turn("", True, None)
    place.close()


@pytest.mark.parametrize(
    ("deed", "kind", "why"),
    [
        ("raise", "raised", "it raised KeyError: 'raise' (agents.py:"),
        ("hang", "timeout", "it did not end within 2 s"),
        ("ask", "raised", "InternalServerError"),
    ],
)
def test_a_harness_that_fails_is_told(
    pool: EnvironmentPool, url: str, deed: str, kind: str, why: str
) -> None:
    place = pool.open("broken", {"deed": deed}, 0)
    with pytest.raises(EnvironmentFailure) as caught:
        place.run(url, "key").result(SOON_S)
    assert caught.value.kind == kind
    assert why in caught.value.text
    place.close()
