"""Clocks for the deadlines of a simulated actor, which the machine's time does not move."""

from __future__ import annotations

import time

import pytest

import benchmarks.fake_engine
from actors.rollout import RolloutActor


class TurnedClock:
    """Stands still until a test moves `now_s`; a sleep takes its time, and does not move it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class SleptClock(TurnedClock):
    """The engine's clock: its steps take what they are said to take, however busy the machine is."""

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.now_s += seconds


def set_clock(monkeypatch: pytest.MonkeyPatch, actor: RolloutActor, clock: TurnedClock) -> None:
    """Has the deadlines of an actor's groups, and those of the requests of its simulated engine, count by
    `clock`.
    """
    monkeypatch.setattr(benchmarks.fake_engine, "time", clock)
    monkeypatch.setattr(actor._groups, "_clock", clock.monotonic)
