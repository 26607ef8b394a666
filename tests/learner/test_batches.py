"""The wait for a batch: how long it goes on, and what ends it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from buffer.client import connect_buffer
from core.calls import Calls, Local
from core.errors import PeerTimeout
from core.monitor_client import MonitorClient
from learner.batches import BatchSource


def test_the_learner_waits_as_long_as_tokens_come_and_names_who_generates_none(monkeypatch: Any) -> None:
    monkeypatch.setattr("learner.batches.POLL_S", 0.05)
    start_s, deadline_s = time.monotonic(), 2.0

    class Peer:
        """Buffer and monitor: no group ever; tokens for two seconds."""

        async def sample(self, step: int, num_groups: int, timeout_s: float) -> None:
            await asyncio.sleep(timeout_s)

        async def stats(self) -> dict[str, float]:
            return {f"buffer/{name}": 0.0 for name in ("inserted", "wait_admission_s", "wait_batch_s")}

        async def error_summary(self) -> tuple[int, int, dict[str, int]]:
            return 0, 0, {}

        async def generation(self) -> dict[str, Any]:
            return {"actor-0": ((0.0, min(deadline_s, time.monotonic() - start_s) * 100), 0.4)}

    batches = BatchSource(
        Calls(20.0),
        connect_buffer([Local(Peer())]),
        MonitorClient(Local(Peer()), "monitor"),
        groups_per_step=4,
        timeout_s=0.5,
        is_stopping=lambda: False,
    )
    with pytest.raises(
        PeerTimeout,
        match=r"no group came for 0 s .* at step 3 .* no token was generated: "
        r"actor-0 200 tokens so far",
    ):
        batches.next(3)
    assert 2.3 < time.monotonic() - start_s < 10


def test_a_learner_that_is_to_stop_gets_no_batch_though_one_could_come() -> None:
    calls, nobody = Calls(1.0), object()
    batches = BatchSource(
        calls,
        connect_buffer([Local(nobody)]),
        MonitorClient(Local(nobody), "monitor"),
        groups_per_step=4,
        timeout_s=0.5,
        is_stopping=lambda: True,
    )
    assert batches.next(0) is None
