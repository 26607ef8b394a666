"""Orders of the driver to its services that are not waited for."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from buffer.store import DiskFullError
from cluster.deaths import SHARD
from cluster.services import Services
from core.calls import Pending
from core.errors import TrainingError
from core.processes import Whereabouts


def order(answer: BaseException | None = None, *, is_open: bool = False) -> Pending[None]:
    future: Future[None] = Future()
    if answer is not None:
        future.set_exception(answer)
    elif not is_open:
        future.set_result(None)
    return Pending(future, "the buffer", 60.0)


def test_an_order_that_failed_is_raised_once_and_the_others_are_looked_at_later() -> None:
    services = object.__new__(Services)  # Its processes are not needed for this.
    under_way, last = order(is_open=True), order()
    services._owed = [under_way, order(TrainingError("refused")), last]
    with pytest.raises(TrainingError, match="refused"):
        services._poll_orders()
    assert services._owed == [under_way, last]
    services._poll_orders()
    assert services._owed == [under_way]


def test_leases_that_a_full_disk_kept_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Services, "event", lambda self, text: told.append(text))
    services = object.__new__(Services)
    services._owed = [order(DiskFullError("no space")), order()]
    services._poll_orders()
    assert services._owed == []
    assert told == ["the buffer could not take leases back; they will run out: no space"]


def test_a_shard_that_came_back_again_is_told_with_its_number_and_what_it_recovered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Services, "event", lambda self, text: told.append(text))
    services = object.__new__(Services)
    services.stats = SimpleNamespace(value={"buffer/groups": 9.0})  # type: ignore[assignment]
    services._deaths = SimpleNamespace(note=lambda *_, **__: "killed", total=lambda kind: 2)  # type: ignore[assignment]
    place = SimpleNamespace(poll=lambda: True, value=Whereabouts("n", 2, "here"))
    life: Any = SimpleNamespace(name="buffer-0", kind=SHARD, place=place, known=Whereabouts("n", 1, "here"))
    assert services._is_another(life)
    assert told == ["replay buffer restarted (2nd time), 9 groups recovered: killed"]
    assert not services._is_another(life)
