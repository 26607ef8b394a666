"""Harnesses in processes of their own: their client asks whom the pool says, and they fail as environments
do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from environments import EnvironmentFailure, Turn
from environments.pool import EnvironmentPool
from environments.spec import EnvironmentSpec
from tests.support.environments.chat_server import ChatServer
from tests.support.environments.places import TurningPool

pytestmark = pytest.mark.timed

AGENTS = "tests.support.environments.agents"
SPECS = [
    EnvironmentSpec("agent", f"{AGENTS}:agent", "harness", is_async=True),
    EnvironmentSpec("plain", f"{AGENTS}:plain_agent", "harness"),
    EnvironmentSpec("broken", f"{AGENTS}:broken_agent", "harness", is_async=True),
]
SOON_S = 30.0


@pytest.fixture(scope="module")
def policy() -> Iterator[ChatServer]:
    """Says what it was asked last, in capitals."""
    with ChatServer(lambda messages: messages[-1]["content"].upper().replace("FAIL", "")) as server:
        yield server


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvironmentPool]:
    with TurningPool(SPECS, turn_timeout_s=2.0, memory_bytes=2**30) as pool:
        yield pool


def test_what_a_harness_returns_is_the_reward(pool: EnvironmentPool, policy: ChatServer) -> None:
    answers = ["A A  7 7", "something else"]
    places = [pool.open("agent", {"question": "a", "answer": answer}, 7) for answer in answers]
    turns = [place.run(policy.url, f"key-{index}") for index, place in enumerate(places)]
    assert [turn.result(SOON_S) for turn in turns] == [Turn("", True, 1.0), Turn("", True, 0.0)]
    asked = [messages[-1]["content"] for messages in policy.asked]
    assert sorted(zip(policy.authorizations, asked, strict=True)) == [
        ("Bearer key-0", "a  7"),
        ("Bearer key-0", "a A  7 7"),
        ("Bearer key-1", "a  7"),
        ("Bearer key-1", "a A  7 7"),
    ]
    for place in places:
        place.close()


def test_a_harness_without_an_event_loop_has_a_process_of_its_own(
    pool: EnvironmentPool, policy: ChatServer
) -> None:
    place = pool.open("plain", {"question": "2+2", "answer": "4"}, 0)
    assert place.run(policy.url, "key").result(SOON_S) == Turn("", True, None)
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
    pool: EnvironmentPool, policy: ChatServer, deed: str, kind: str, why: str
) -> None:
    place = pool.open("broken", {"deed": deed}, 0)
    with pytest.raises(EnvironmentFailure) as caught:
        place.run(policy.url, "key").result(SOON_S)
    assert caught.value.kind == kind
    assert why in caught.value.text
    place.close()
