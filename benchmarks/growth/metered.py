"""What each part of a run costs, all in one process on virtual time (`cluster/plan/virtual_time.py`).

    parts = Parts()
    shard = ShardClient(parts.handle("buffer", ReplayBuffer(...)), "the buffer")     what is asked of it is metered

What a part costs is the CPU time of its own code, also of waits in it that are woken for nothing.
"""

from __future__ import annotations

import inspect
import pickle
import time
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


@dataclass
class Cost:
    """What a part has cost so far: calls of it, bytes of their arguments and answers, and CPU seconds."""

    calls: int = 0
    size_bytes: int = 0
    cpu_s: float = 0.0


class Parts:
    """The costs of parts by name, and handles that note them."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}

    def handle(self, name: str, part: object) -> Metered:
        """Returns a handle of `part`, whose calls are noted under `name`."""
        return Metered(part, self.costs.setdefault(name, Cost()))

    def add(self, name: str, cpu_s: float) -> None:
        """Notes CPU time of something that is not called by others."""
        self.costs.setdefault(name, Cost()).cpu_s += cpu_s

    def clear(self) -> None:
        """Begins anew, after a warm-up."""
        for cost in self.costs.values():
            cost.calls, cost.size_bytes, cost.cpu_s = 0, 0, 0.0


class Metered:
    """A handle of an object in this process, as `core.calls.Local` is, that notes what calls cost."""

    def __init__(self, part: object, cost: Cost) -> None:
        self._part, self._cost = part, cost

    def __getattr__(self, method: str) -> Any:
        function, cost = getattr(self._part, method), self._cost

        async def remote(*arguments: Any, **named: Any) -> Any:
            cost.calls += 1
            cost.size_bytes += _size_bytes((arguments, named))
            start_s = time.thread_time()
            answer = function(*arguments, **named)
            cost.cpu_s += time.thread_time() - start_s
            if inspect.iscoroutine(answer):
                answer = await _Steps(answer, cost)
            cost.size_bytes += _size_bytes(answer)
            return answer

        return SimpleNamespace(remote=remote)


class _Steps:
    """Awaits a coroutine and notes the CPU time of its own steps, not of what runs while it waits."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], cost: Cost) -> None:
        self._coroutine, self._cost = coroutine, cost

    def __await__(self) -> Generator[Any, Any, Any]:
        sent, raised = None, None
        while True:
            start_s = time.thread_time()
            try:
                waits_for = self._coroutine.send(sent) if raised is None else self._coroutine.throw(raised)
            except StopIteration as end:
                return end.value
            finally:
                self._cost.cpu_s += time.thread_time() - start_s
            sent, raised = None, None
            try:
                sent = yield waits_for
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's to catch: a cancellation, mostly
                raised = error


def _size_bytes(value: Any) -> int:
    """Returns the bytes of what passes between processes."""
    return len(pickle.dumps(value, protocol=5))
