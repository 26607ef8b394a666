"""The board's word to those who retire."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from core.weights.board import Board, Directive
from tests.support.configs import make_config

pytestmark = pytest.mark.timed

CONFIG = make_config({"run": {"timeout_s": 30.0}})


def test_a_drain_is_told_once_then_at_every_timeout_and_now_hurries_it() -> None:
    async def scenario() -> None:
        board = Board(CONFIG.run, {}, lambda result, samples: None)
        await board.publish(b"m", [], 3, evaluate=())

        async def poll(timeout_s: float = 0.0) -> Directive:
            payload, _ = await board.poll("actor-1", 1, 4, timeout_s)
            return msgspec.msgpack.decode(payload, type=Directive)

        assert (await poll()).retire == ""
        waiting = asyncio.create_task(poll(600.0))
        await board.retire(["actor-1"], "drain")
        assert (await asyncio.wait_for(waiting, 60)).retire == "drain"
        start_s = time.monotonic()
        again = await poll(0.2)
        assert (again.retire, again.version) == ("drain", 1)  # No newer weights for one that goes.
        assert time.monotonic() - start_s >= 0.2  # An actor that drains does not spin.
        await board.retire(["actor-1"], "now")
        assert (await asyncio.wait_for(poll(600.0), 60)).retire == "now"
        await board.retire(["actor-1"], "drain")
        assert (await poll()).retire == "now"

    asyncio.run(scenario())
