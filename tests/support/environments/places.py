"""Places of environments that misbehave, for tests that ask them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import psutil
import pytest

from environments import EnvironmentFailure
from environments.pool import CLOSE_TIMEOUT_S, EnvironmentPool, Place
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


class TurningPool(EnvironmentPool):
    """A pool whose turns are a thread's, for who waits for the futures of its places."""

    def __init__(self, specs: Iterable[EnvironmentSpec], turn_timeout_s: float, memory_bytes: int) -> None:
        super().__init__(specs, turn_timeout_s, memory_bytes)
        self._is_closing = False
        self._thread = threading.Thread(target=self._go_round, name="environments", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closing = True
        self._wake_up()
        self._thread.join(CLOSE_TIMEOUT_S + 1.0)

    def _go_round(self) -> None:
        while not self._is_closing:
            self.turn(SOON_S)
        super().close()


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
