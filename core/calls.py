"""Calls to other processes, from code that must not wait for them. The one place where peers are called.

    calls = Calls(run.timeout_s, tell)
    future = calls.start(buffer.lease(...), "replay buffer")          a concurrent Future, to be looked at between two engine steps
    stats = calls.ask(buffer.stats(), "replay buffer")                waits; PeerTimeout names who did not answer
    calls.post(monitor.log_step.remote(row), "monitor", "its rows")   nobody waits; failures are counted, and told when they begin and end

The coroutines run on an event loop in a thread of their own. What a call raises is an error of ours, in a
sentence of its own: Ray's paragraphs end here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from ray.exceptions import RayError

from buffer.shards import ShardedBuffer
from core.errors import PeerTimeout
from core.processes import explained
from core.troubles import Troubles

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Calls:
    """An event loop in a daemon thread; `timeout_s` limits what `ask` waits for. `tell` gets what
    becomes of `post`.
    """

    def __init__(self, timeout_s: float, tell: Callable[[str], object] | None = None) -> None:
        self._timeout_s = timeout_s
        self._troubles = Troubles(tell or _log.warning)
        self.num_failed_posts = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="calls", daemon=True).start()

    def start(self, call: Awaitable[T], who: str) -> concurrent.futures.Future[T]:
        """Begins the call; its result, or an error of ours, is in the future: to be looked at. Else use
        `post`.
        """
        return asyncio.run_coroutine_threadsafe(answered(call, who), self._loop)

    def ask(self, call: Awaitable[T], who: str, timeout_s: float | None = None) -> T:
        """The call's result. Raises PeerTimeout that names `who` after `timeout_s` (None: the limit of
        all), or what the call raises.
        """
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        future = self.start(call, who)
        try:
            return future.result(limit_s)
        except concurrent.futures.TimeoutError:
            if future.done():  # At the last moment, or the call itself raised a TimeoutError.
                return future.result(0)
            future.cancel()
            raise PeerTimeout(f"{who} did not answer within {limit_s:.0f} s (run.timeout_s)") from None

    def post(self, call: Awaitable[Any], who: str, what: str) -> None:
        """Makes the call for nobody's sake; one that fails is counted, and the first of them told."""
        what = f"{who} did not take {what}"

        def look(future: concurrent.futures.Future[Any]) -> None:
            if future.cancelled():
                return
            if error := future.exception():
                self.num_failed_posts += 1
                self._troubles.note(what, error)
            else:
                self._troubles.well(what)

        self.start(call, who).add_done_callback(look)


class RemoteShard:
    """A buffer shard that is a Ray actor: its methods return what can be awaited."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name).remote


def connect_buffer(handles: Sequence[Any]) -> ShardedBuffer:
    """The replay buffer whose shards are these Ray actors."""
    return ShardedBuffer([RemoteShard(handle) for handle in handles])


async def answered(call: Awaitable[T], who: str) -> T:
    """The call's result. What Ray wraps, or has to say itself, is raised as an error of ours
    (`processes.explained`).
    """
    try:
        return await call
    except RayError as error:
        raise explained(error, who) from None
