"""Places of environments that misbehave, for tests that ask them."""

from __future__ import annotations

import time

import psutil
import pytest

from environments import EnvironmentFailure
from environments.pool import EnvironmentPool, Place
from environments.spec import EnvironmentSpec

TIMEOUT_S = 2.0
SOON_S = 60.0
"""What must come comes long before, unless others fill the machine."""
BAD = "tests.support.environments.bad"
SPECS = (
    EnvironmentSpec("bad", f"{BAD}:Bad", "turns"),
    EnvironmentSpec("shared", f"{BAD}:BadAsync", "turns", is_async=True),
    EnvironmentSpec("counter", "tests.support.environments.trl:Counter", "tools"),
)


def opened(pool: EnvironmentPool, name: str = "bad", seed: int = 0, **row: object) -> Place:
    place = pool.open(name, row, seed)
    place.reset().result(SOON_S)
    return place


def said(place: Place, text: str) -> str:
    turn = place.act(text).result(SOON_S)
    assert isinstance(turn.observation, str)
    return turn.observation


def failure(place: Place, text: str) -> EnvironmentFailure:
    with pytest.raises(EnvironmentFailure) as caught:
        place.act(text).result(SOON_S)
    assert "\n" not in caught.value.text
    return caught.value


def is_gone(pid: int | str, timeout_s: float = SOON_S) -> bool:
    """Waits until the process has ended."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            if psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False
