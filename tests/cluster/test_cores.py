"""An engine that works has a core for itself where there is none to spare, and gives it up when it waits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cluster.cores import CoreKeeper
from core.machine import available_cpus
from tests.support import ROOT
from tests.support.clocks.waits import until

CORES = os.sched_getaffinity(0)
ENGINE = """
import select, subprocess, sys
from core.machine import ENGINE_THREAD, call_thread

call_thread(ENGINE_THREAD)
other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print(other.pid, flush=True)
works = False
while True:
    if select.select([sys.stdin], [], [], 0 if works else None)[0]:
        word = sys.stdin.readline()
        if not word:
            break
        works = word == "work\\n"
other.communicate()
"""

pytestmark = pytest.mark.skipif(
    not 2 <= len(CORES) <= available_cpus(), reason="one core cannot be kept from anybody"
)


class _Engine:
    """A process whose thread is an engine's, with another process below it."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", ENGINE]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.pid, self.other_pid = self.process.pid, int(self.process.stdout.readline())

    def say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def end(self) -> None:
        if self.process.returncode is None:
            self.process.communicate()


@pytest.fixture
def engine() -> Iterator[_Engine]:
    engine = _Engine()
    yield engine
    engine.end()


def _look_until(keeper: CoreKeeper, is_keeping: bool) -> None:
    def looked() -> bool:
        time.sleep(0.3)
        keeper.tick()
        return keeper.is_keeping is is_keeping

    until(looked)


def _keeper(engine: _Engine, num_ranks: int = len(CORES) - 1) -> CoreKeeper:
    return CoreKeeper(num_ranks, engine.pid)


def test_others_stay_off_the_core_of_an_engine_that_works(engine: _Engine) -> None:
    keeper = _keeper(engine)
    keeper.tick()
    assert not keeper.is_keeping
    engine.say("work")
    _look_until(keeper, True)
    assert os.sched_getaffinity(engine.pid) == CORES
    assert os.sched_getaffinity(engine.other_pid) == CORES - {min(CORES)}
    engine.say("wait")
    _look_until(keeper, False)
    assert os.sched_getaffinity(engine.pid) == os.sched_getaffinity(engine.other_pid) == CORES


def test_it_looks_by_itself_and_gives_all_cores_back_at_its_end(engine: _Engine) -> None:
    engine.say("work")
    with _keeper(engine) as keeper:
        until(lambda: keeper.is_keeping)
        until(lambda: os.sched_getaffinity(engine.other_pid) != CORES)
    assert os.sched_getaffinity(engine.other_pid) == CORES


@pytest.mark.parametrize("core", [min(CORES), max(CORES)])
def test_whoever_has_chosen_its_cores_itself_keeps_them(engine: _Engine, core: int) -> None:
    chosen = {core}
    os.sched_setaffinity(engine.other_pid, chosen)
    keeper = _keeper(engine)
    engine.say("work")
    _look_until(keeper, True)
    assert os.sched_getaffinity(engine.other_pid) == chosen
    engine.say("wait")
    _look_until(keeper, False)
    assert os.sched_getaffinity(engine.other_pid) == chosen


def test_an_engine_that_ends_is_not_kept_a_core_for(engine: _Engine) -> None:
    keeper = _keeper(engine)
    engine.say("work")
    _look_until(keeper, True)
    engine.end()
    _look_until(keeper, False)


def test_nobody_is_kept_away_where_cores_are_too_few_or_enough(engine: _Engine) -> None:
    engine.say("work")
    for num_ranks in (len(CORES) - 2, len(CORES)):
        keeper = _keeper(engine, num_ranks)
        for _ in range(4):
            time.sleep(0.1)
            keeper.tick()
            assert not keeper.is_keeping
    assert os.sched_getaffinity(engine.other_pid) == CORES
