"""Calls to other processes, from code that must not wait for them.

    calls = Calls(run.timeout_s)
    future = calls.start(buffer.lease(...))             a concurrent Future, to be looked at between two engine steps
    stats = calls.ask(buffer.stats(), "replay buffer")  waits; PeerTimeout names who did not answer

The coroutines run on an event loop in a thread of their own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from buffer.shards import ShardedBuffer
from cluster.errors import PeerTimeout

T = TypeVar("T")


class Calls:
    """An event loop in a daemon thread; `timeout_s` limits what `ask` waits for."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="calls", daemon=True).start()

    def start(self, call: Awaitable[T]) -> concurrent.futures.Future[T]:
        """Begins the call; its result or exception is in the future."""
        return asyncio.run_coroutine_threadsafe(_awaited(call), self._loop)

    def ask(self, call: Awaitable[T], who: str, timeout_s: float | None = None) -> T:
        """The call's result. Raises PeerTimeout that names `who` after `timeout_s` (None: the limit of all), or what the call raises."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        future = self.start(call)
        try:
            return future.result(limit_s)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise  # The call itself raised a TimeoutError.
            future.cancel()
            raise PeerTimeout(f"{who} did not answer within {limit_s:.0f} s (run.timeout_s)") from None


class RemoteShard:
    """A buffer shard that is a Ray actor: its methods return what can be awaited."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name).remote


def connect_buffer(handles: Sequence[Any]) -> ShardedBuffer:
    """The replay buffer whose shards are these Ray actors."""
    return ShardedBuffer([RemoteShard(handle) for handle in handles])


async def _awaited(call: Awaitable[T]) -> T:
    return await call
