"""Keeps a core for each engine where a machine has one for each engine and each rank, and no more: all
other threads of the run stay off it for as long as the engines want all of theirs.

    engines' threads ran or waited for a core nearly all the time --> the others get the other cores
    one did not (it waits for admission, an environment, a reward) --> everybody gets all of them

The kernel leaves cores idle here. It wakes a thread on its waker's core when cores are busy on average,
without a look at the others (`SIS_UTIL`), and a core that is idle for less than half a millisecond takes
nobody from another (`sched_migration_cost_ns`). A run wakes thousands of threads a second for a moment
each, and most of them by its engine: that stood behind them for a fifth of its time while a sixth of the
machine was idle. Nobody is woken on a core that is not his.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from core.children import family
from core.machine import ENGINE_THREAD, available_cpus

LOOK_EVERY_S = 0.5
SEARCH_EVERY_S = 5.0
"""Engines come and go, and processes that an engine's own thread has started have its cores."""
GIVE_BACK_PASSES = 5
WANTS_ALL, WANTS_LESS = 0.9, 0.7
"""Of the time: an engine that ran or waited for a core for the first or more gets one to itself, and gives it
up below the second.
"""


class Thread(NamedTuple):
    """A thread of the kernel's, with the process that it is in."""

    pid: int
    tid: int


class CoreKeeper:
    """The cores of a process and its descendants, this one's where no other is named. Example:

    with CoreKeeper(num_ranks=1):
        ...

    is_keeping  whether the engines have cores for themselves now
    """

    def __init__(self, num_ranks: int, pid: int | None = None) -> None:
        """Takes the number of the learner's ranks; each wants a core as an engine does."""
        self._num_ranks, self._pid = num_ranks, pid or os.getpid()
        self._cores = os.sched_getaffinity(0)
        # Where those who are no engine may run while the engines keep theirs.
        self._others = set(sorted(self._cores)[max(0, len(self._cores) - num_ranks) :])
        self._engines: dict[Thread, float] = {}
        self._strangers: set[Thread] = set()
        self._looked_s, self._searched_s = time.monotonic(), -math.inf
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self.is_keeping = False

    def __enter__(self) -> CoreKeeper:
        """Begins to look, twice a second; not where there is one core, or a container may not use all."""
        if 1 < len(self._cores) <= available_cpus():
            self._thread = threading.Thread(target=self._run, name="core keeper", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Gives every core back to all."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        if self.is_keeping:
            self._give_back()

    def tick(self) -> None:
        """Looks at what the engines wanted since the last time, and sets who may run where."""
        now_s = time.monotonic()
        elapsed_s, self._looked_s = now_s - self._looked_s, now_s
        wanted = self._wanted(elapsed_s)
        is_due = now_s - self._searched_s >= SEARCH_EVERY_S
        pids: list[int] = []
        if is_due or len(wanted) < len(self._engines):
            self._searched_s = now_s
            pids = family(self._pid)
            self._engines = _engines(pids)
        before, self.is_keeping = self.is_keeping, self._is_wanted(wanted)
        if self.is_keeping and (is_due or not before):
            given = self._others if before else self._cores
            self._allow(self._others, given, pids or family(self._pid))
        elif before and not self.is_keeping:
            self._give_back()

    def _run(self) -> None:
        while not self._is_over.wait(LOOK_EVERY_S):
            self.tick()

    def _wanted(self, elapsed_s: float) -> list[float]:
        """Returns how much of a core each engine used or waited for; those that have ended are left out."""
        shares = []
        for engine, before_s in list(self._engines.items()):
            if (clock_s := _clock_s(engine)) is not None:
                self._engines[engine] = clock_s
                shares.append((clock_s - before_s) / elapsed_s)
        return shares

    def _is_wanted(self, wanted: Collection[float]) -> bool:
        num_engines = len(self._engines)
        if not wanted or len(wanted) != num_engines or num_engines + self._num_ranks != len(self._cores):
            return False
        return min(wanted) >= (WANTS_LESS if self.is_keeping else WANTS_ALL)

    def _give_back(self) -> None:
        """Gives every core back to all, also to those that were started meanwhile by who had not got his."""
        for _ in range(GIVE_BACK_PASSES):
            if not self._allow(self._cores, self._others, family(self._pid)):
                return

    def _allow(self, cores: set[int], given: set[int], pids: Iterable[int]) -> int:
        """Lets the threads of these processes use the cores, and the engines' all; returns for how many that
        was new. Whoever has neither all nor what was `given` has chosen his cores himself, and keeps them
        from then on.
        """
        changed, strangers = 0, set[Thread]()
        for thread in _threads(pids):
            allowed = self._cores if thread in self._engines else cores
            with contextlib.suppress(OSError):  # It has ended, or is another user's.
                present = os.sched_getaffinity(thread.tid)
                if thread in self._strangers or present not in (self._cores, given):
                    strangers.add(thread)
                elif present != allowed:
                    os.sched_setaffinity(thread.tid, allowed)
                    changed += 1
        self._strangers = strangers
        return changed


def _threads(pids: Iterable[int]) -> Iterator[Thread]:
    for pid in pids:
        with contextlib.suppress(OSError):  # It has ended.
            yield from (Thread(pid, int(tid)) for tid in os.listdir(f"/proc/{pid}/task"))


def _engines(pids: Iterable[int]) -> dict[Thread, float]:
    """Returns the engines' threads and their clocks. What a thread starts inherits its name: of a process's
    it is the one that has worked most.
    """
    found = {}
    for pid in pids:
        named = {
            thread: clock_s
            for thread in _threads([pid])
            if _is_named(thread) and (clock_s := _clock_s(thread))
        }
        if named:
            engine = max(named, key=lambda thread: named[thread])
            found[engine] = named[engine]
    return found


def _is_named(thread: Thread) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{thread.pid}/task/{thread.tid}/comm") as file:
        return file.read().strip() == ENGINE_THREAD
    return False


def _clock_s(thread: Thread) -> float | None:
    """Returns for how long the thread has run or waited for a core; None when it has ended."""
    try:
        with open(f"/proc/{thread.pid}/task/{thread.tid}/schedstat") as file:
            ran_ns, waited_ns = map(int, file.read().split()[:2])
    except OSError:
        return None
    return (ran_ns + waited_ns) / 1e9
