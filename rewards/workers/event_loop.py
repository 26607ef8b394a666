"""The part of a worker process's life in which it calls `async def` functions: many at once, each with its
limit.

A call beyond its limit is cancelled, and costs itself. A function that blocks the event loop keeps it from
saying that it turns (BEAT), by which the pool knows it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import msgspec

from core.own_warnings import OwnWarnings
from rewards.registry import WeightedReward
from rewards.scoring import CallFailed, call_async, describe
from rewards.workers.worker import BEAT, Request, WorkerReply, completions_of, encoded, votes_of

BEAT_S = 0.25


def serve_calls(
    connection: Connection, functions: Sequence[WeightedReward], warnings: OwnWarnings, first: Request
) -> NoReturn:
    """Serves `first` and whatever is asked then, until the socket closes, which ends the process."""
    asyncio.run(_EventLoop(connection, functions, warnings).serve(first))
    raise AssertionError("an event loop serves until its process ends")


class _EventLoop:
    """The calls under way."""

    def __init__(
        self, connection: Connection, functions: Sequence[WeightedReward], warnings: OwnWarnings
    ) -> None:
        self._connection, self._functions, self._warnings = connection, functions, warnings
        self._tasks: set[asyncio.Task[Any]] = set()  # The loop itself holds them weakly.
        self._num_open = 0

    async def serve(self, first: Request) -> None:
        """Serves until the process ends."""
        asyncio.get_running_loop().add_reader(self._connection.fileno(), self._receive)
        self._begin(first)
        while True:
            await asyncio.sleep(BEAT_S)
            if self._num_open:
                self._send(WorkerReply(BEAT))

    def _receive(self) -> None:
        while self._connection.poll(0):
            try:
                payload = self._connection.recv_bytes()
            except (EOFError, OSError):  # The actor is gone.
                os._exit(0)
            self._begin(msgspec.msgpack.decode(payload, type=Request))

    def _begin(self, request: Request) -> None:
        self._num_open += 1
        self._keep(asyncio.create_task(self._answer(request)))

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, request: Request) -> None:
        reward = self._functions[request.function]
        try:
            reply = await self._call(request, reward)
        except CallFailed as error:
            reply = WorkerReply(request.number, error=str(error))
        except asyncio.CancelledError:
            reply = WorkerReply(request.number, error=f"{reward.name} cancelled itself")
        # A panic of Rust's (pyo3) is no Exception.
        except BaseException as error:  # noqa: BLE001 - the user's code; a call without a reply stays open
            reply = WorkerReply(request.number, error=describe(reward, error))
        self._num_open -= 1
        self._send(reply)

    async def _call(self, request: Request, reward: WeightedReward) -> WorkerReply:
        """Returns what the function says within its limit. Raises whatever it does."""
        completions = completions_of(request)
        called = asyncio.create_task(call_async(reward, completions))
        self._keep(called)
        # Not wait_for: a function that swallows its cancellation would hold the reply.
        done, _ = await asyncio.wait({called}, timeout=request.limit_s)
        if not done:
            called.cancel()
            return WorkerReply(request.number, timed_out=True)
        return WorkerReply(request.number, called.result(), votes_of(request, reward, completions))

    def _send(self, reply: WorkerReply) -> None:
        try:
            self._connection.send_bytes(encoded(reply, self._warnings))
        except OSError:  # The actor is gone.
            os._exit(0)
