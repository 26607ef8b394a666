"""How often a service is called from one machine, whichever processes call it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Iterator

MAX_POSTPONED_S = 600.0
_MOMENT = struct.Struct("d")


class Pace:
    """Lets calls of a service through, at most so many a minute from all processes of a user on a machine.

        pace = Pace("https://judge.example/v1 my-model", calls_per_minute=60)
        await pace.turn()            # then call
        pace.postpone(20.0)          # it asked for a pause: nobody calls before

    What processes share is one moment in a file: when the next call may begin. Whoever finds that it has come
    moves it on; nobody reserves a later one, so that a killed caller leaves no gap.
    """

    def __init__(self, service: str, calls_per_minute: float | None = None) -> None:
        """`calls_per_minute` None lets every call through that no `postpone` holds back."""
        self._interval_s = 60.0 / calls_per_minute if calls_per_minute is not None else 0.0
        name = hashlib.sha256(service.encode()).hexdigest()[:16]
        self._path = os.path.join(tempfile.gettempdir(), f"agro-pace-{os.getuid()}-{name}")
        self._lock: asyncio.Lock | None = None

    async def turn(self) -> None:
        """Returns when a call may begin; callers of one process come in their order."""
        if self._lock is None:
            self._lock = asyncio.Lock()
        async with self._lock:
            while (wait_s := self._move(self._interval_s)) > 0:
                await asyncio.sleep(wait_s)

    def postpone(self, pause_s: float) -> None:
        """Lets no call begin within `pause_s`, at most MAX_POSTPONED_S."""
        with self._moment() as (file, moment_s):
            later_s = max(moment_s, time.time() + min(pause_s, MAX_POSTPONED_S))
            os.pwrite(file, _MOMENT.pack(later_s), 0)

    def _move(self, by_s: float) -> float:
        """Takes the turn if it has come, and returns 0; else returns how long it will take."""
        with self._moment() as (file, moment_s):
            now_s = time.time()
            # A clock that was set back must not hold calls for ever.
            if now_s < moment_s <= now_s + MAX_POSTPONED_S + by_s:
                return moment_s - now_s
            if by_s:
                os.pwrite(file, _MOMENT.pack(now_s + by_s), 0)
            return 0.0

    @contextlib.contextmanager
    def _moment(self) -> Iterator[tuple[int, float]]:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            kept = os.pread(file, _MOMENT.size, 0)
            yield file, _MOMENT.unpack(kept)[0] if len(kept) == _MOMENT.size else 0.0
        finally:
            os.close(file)
