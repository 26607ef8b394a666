"""How many threads a rank computes with where `learner.num_cpus` is `auto`: as many as it finds cores.

    cores it used since the last look + cores that idled meanwhile --> threads from the next step on

Actors that work keep their cores; while they wait (for admission, an environment, a reward) theirs idle, and
the rank takes them. It looks at the node's own clocks, so that nobody need tell it who is there. Where a
run's only node has no core but one for each actor and one for each rank, it does not look: an actor that
waits comes back between two looks, and a thread that shares its core is waited for by the others.

More threads sum in another order: results differ in their last bits by the number of threads. A run with
`run.deterministic` has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from core.config import Config
from core.machine import available_cpus, idle_cpu_seconds

LOOK_EVERY_S = 1.0
"""The kernel counts a core's time in hundredths of a second: over a shorter time the count says little."""


class Clocks(NamedTuple):
    """What the clocks say: the moment, this process's CPU seconds, and those that the cores which it may run
    on idled.
    """

    time_s: float
    used_s: float
    idle_s: float


def read_clocks() -> Clocks:
    """Returns what the clocks say now."""
    return Clocks(time.monotonic(), time.process_time(), idle_cpu_seconds())


class FreeCores:
    """Counts the cores that one of `ranks` ranks finds: `cores.count()`, between two steps.

    The ranks count as if all were on one node: where they are on several, each finds fewer than there are.
    """

    def __init__(self, ranks: int, most: int, read: Callable[[], Clocks] = read_clocks) -> None:
        """Finds at least one core, and at most `most`."""
        self._ranks, self._most, self._read = ranks, most, read
        self._last, self._count = read(), 1

    def count(self) -> int:
        """Returns this rank's cores by what happened since the last look, which is LOOK_EVERY_S ago or more.

        Half a core counts as one: a thread that shares a core with an actor is waited for by the others.
        """
        now = self._read()
        elapsed_s = now.time_s - self._last.time_s
        if elapsed_s >= LOOK_EVERY_S:
            used_s, idle_s = now.used_s - self._last.used_s, now.idle_s - self._last.idle_s
            found = (used_s + idle_s / self._ranks) / elapsed_s
            self._count = min(self._most, max(1, int(found + 0.5)))
            self._last = now
        return self._count


class Threads:
    """Sets the threads that a rank computes with: `threads.follow()` between two steps, in the thread that
    takes them.
    """

    def __init__(self, config: Config, num_nodes: int = 1) -> None:
        """Reads `learner.num_cpus`, and `run.deterministic`, with which there is one. On several nodes the
        actors may be on others.
        """
        learner = config.learner
        self._cores: FreeCores | None = None
        if learner.num_gpus:
            self._fixed = torch.get_num_threads()
        elif config.run.deterministic:
            self._fixed = 1
        else:
            self._fixed = max(1, int(learner.reserved_cpus))
            cores = max(1, int(available_cpus()))  # A container may have less than one.
            has_more = cores > config.actors.fewest + learner.ranks or num_nodes > 1
            if learner.num_cpus == "auto" and has_more:
                self._cores = FreeCores(learner.ranks, cores)

    def follow(self) -> int:
        """Lets torch have as many threads as there are cores for it now, and returns how many."""
        count = self._cores.count() if self._cores else self._fixed
        if count != torch.get_num_threads():
            torch.set_num_threads(count)
        return count
