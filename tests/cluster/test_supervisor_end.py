"""How a run ends: it waits for open evaluations as long as they come any further."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import supervisor as supervisor_module
from cluster.supervisor import Supervisor
from core.calls import Pending

LAST = 600


class Open:
    """In place of `Evaluations`: what was said last."""

    def __init__(self) -> None:
        self.open: set[int] = {LAST}
        self.results: dict[tuple[str, int], Any] = {}

    def take(self, is_open: Sequence[int], results: Sequence[Any]) -> None:
        self.open = set(is_open)


def ending(
    monkeypatch: pytest.MonkeyPatch, first_word: list[int], closes_at_turn: int
) -> tuple[Any, list[str]]:
    """A supervisor whose board answers `first_word`, and whose last evaluation ends at that turn."""
    monkeypatch.setattr(supervisor_module, "TURN_S", 0.001)
    told: list[str] = []
    answer: Future[Any] = Future()
    answer.set_result((first_word, []))
    made: Any = object.__new__(Supervisor)
    made._config = SimpleNamespace(run=SimpleNamespace(timeout_s=0.5))
    made._evaluations, made.turns = Open(), 0
    made._best = SimpleNamespace(is_busy=False, consider=lambda results: None)
    made._services = SimpleNamespace(
        calls=SimpleNamespace(start=lambda call: Pending(answer, "the board", 60.0)),
        board=SimpleNamespace(evaluations=lambda known: None),
        view=SimpleNamespace(value={"actors": {}}),
        event=told.append,
    )

    def turn(self: Any, terminal: Any) -> None:
        self.turns += 1
        if self.turns == closes_at_turn:
            self._evaluations.open = set()

    monkeypatch.setattr(Supervisor, "turn", turn)
    return made, told


@pytest.mark.parametrize(("first_word", "closes_at_turn"), [([], -1), ([LAST], 5)])
def test_the_end_waits_for_the_last_evaluation_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, first_word: list[int], closes_at_turn: int
) -> None:
    made, told = ending(monkeypatch, first_word, closes_at_turn)
    made._await_evaluations(SimpleNamespace(name=None), None)
    assert told == []
    assert made.turns == max(0, closes_at_turn)


def test_an_evaluation_that_stands_still_is_told_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = ending(monkeypatch, [LAST], -1)
    start_s = time.monotonic()
    made._await_evaluations(SimpleNamespace(name=None), None)
    assert told == ["the final evaluation stood still for 0 s (run.timeout_s); going on without it"]
    assert time.monotonic() - start_s >= 0.5
