"""The fleet with real Ray processes and no engines: placed, scaled, killed, stopped, replaced, retired."""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

import cluster.fleet
from cluster.deaths import ACTOR, DeathCount, Deaths
from cluster.fleet import Fleet, Kind
from cluster.pulse import BUSY_LIMIT_S, ELSEWHERE_LIMIT_S, LIMIT_S, MIN_LOOKS, Pulse, Sight, look_at
from cluster.session import without_onlookers
from core.calls import Calls
from core.errors import DataError, TrainingError
from core.processes import shortage
from tests.support.clocks.machine import machine_s
from tests.support.clocks.waits import until
from tests.support.fleet_actors import SleepingActor

pytestmark = pytest.mark.timed

LOOK_S = 0.1


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with without_onlookers():
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error"
        )
    yield
    ray.shutdown()


class Bench:
    """A fleet of sleeping actors; `behaviour` maps names to what goes wrong with them."""

    def __init__(
        self,
        directory: Path,
        behaviour: dict[str, str] | None = None,
        num_cpus: float = 1.0,
        timeout_s: float = 60.0,
        first_at_once: float = math.inf,
        may_place: Callable[[], bool] = lambda: True,
    ) -> None:
        self.directory, self.behaviour = directory, behaviour or {}
        self.told: list[str] = []
        self.released: list[str] = []
        self.orders: list[tuple[str, str]] = []
        kind = Kind(self._spawn, num_cpus=num_cpus)
        self.fleet = Fleet(
            kind,
            Calls(60.0),
            retire=self._retire,
            release=self.released.append,
            tell=self.told.append,
            deaths=Deaths(directory),
            timeout_s=timeout_s,
            first_at_once=first_at_once,
            may_place=may_place,
        )

    def _spawn(self, name: str, options: dict[str, Any]) -> Any:
        actor_class = ray.remote(SleepingActor).options(max_concurrency=2, **options)
        return actor_class.remote(
            name, str(self.directory), self.behaviour.get(name, self.behaviour.get("*", ""))
        )

    def _retire(self, names: list[str], how: str) -> None:
        for name in names:
            self.orders.append((name, how))
            (self.directory / f"{name}.retire").touch()

    def until(self, is_so: Callable[[], bool], timeout_s: float = 60.0) -> float:
        """Looks until it is so; the seconds of the machine's clock that took."""
        start_s = machine_s()
        while not is_so():
            self.fleet.poll()
            self.fleet.tick(time.monotonic())
            assert machine_s() - start_s < timeout_s, (self.fleet.status(), self.told)
            time.sleep(LOOK_S)
        return machine_s() - start_s

    def run(self, count: int) -> None:
        self.fleet.scale_to(count)
        self.until(lambda: len(self.fleet.names("running")) == count)

    def pid(self, name: str) -> int:
        return next(entry["pid"] for entry in self.fleet.status() if entry["name"] == name)


@pytest.fixture
def bench(local_ray: None, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**arguments: Any) -> Bench:
        made.append(Bench(tmp_path, **arguments))
        return made[-1]

    yield make
    for each in made:
        each.fleet.kill()
    until(lambda: free_cpus() == 4.0)  # The next one's places are free: Ray frees them a moment later.


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


@pytest.mark.slow
def test_one_to_four_to_one_retires_the_newest_and_frees_their_places(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.run(1)
    assert b.fleet.scale_to(4) == (["actor-1", "actor-2", "actor-3"], [])
    b.until(lambda: len(b.fleet.names("running")) == 4)
    assert b.fleet.scale_to(1) == ([], ["actor-3", "actor-2", "actor-1"])
    assert b.fleet.target == 1
    b.until(lambda: b.fleet.names() == ["actor-0"])
    assert b.orders == [("actor-3", "drain"), ("actor-2", "drain"), ("actor-1", "drain")]
    assert sorted(b.released) == ["actor-1", "actor-2", "actor-3"]
    b.until(lambda: free_cpus() == 3.0)
    assert b.fleet.scale_to(2)[0] == ["actor-4"]  # A name is not used again.
    assert b.fleet.num_deaths == 0


@pytest.mark.slow
def test_one_that_cannot_be_placed_blocks_nobody_and_says_what_is_missing(
    bench: Callable[..., Bench], monkeypatch: Any
) -> None:
    monkeypatch.setattr(cluster.fleet, "TELL_WAITING_S", math.inf)
    b = bench(num_cpus=1.5)
    b.fleet.scale_to(3)
    b.until(lambda: len(b.fleet.names("running")) == 2)  # Ray looks at what it could not place now and then.
    monkeypatch.setattr(cluster.fleet, "TELL_WAITING_S", 2.0)
    b.until(lambda: bool(b.told))
    waiting = next(entry for entry in b.fleet.status() if entry["state"] == "waiting for placement")
    name = waiting["name"]  # Whichever Ray did not place.
    assert waiting["note"] == "asks for 1.5 CPU; free now: 1 CPU"
    assert b.told == [f"{name} waits for placement: asks for 1.5 CPU; free now: 1 CPU"]
    older, newer = b.fleet.names("running")
    assert b.fleet.scale_to(1) == ([], [name, newer])
    assert name not in b.fleet.names()  # It has begun nothing.
    b.until(lambda: b.fleet.names() == [older])
    b.fleet.scale_to(2)
    b.until(lambda: len(b.fleet.names("running")) == 2)


@pytest.mark.slow
def test_a_killed_actor_is_noticed_within_three_seconds_and_replaced_under_a_new_name(
    bench: Callable[..., Bench],
) -> None:
    b = bench()
    b.run(2)
    os.kill(b.pid("actor-0"), signal.SIGKILL)
    assert b.until(lambda: "actor-0" in b.released) < 3.0
    b.until(lambda: b.fleet.names("running") == ["actor-0.1", "actor-1"])
    assert len(b.told) == 1
    assert b.told[0].startswith("actor-0 died, restarted as actor-0.1")
    assert "its process was killed" in b.told[0]
    assert len(b.told[0].splitlines()) <= 7
    assert b.fleet.scale_to(1)[1] == ["actor-1"]  # The newest role, not the newest process.


@pytest.mark.slow
def test_a_stopped_process_is_found_by_its_pulse_killed_and_replaced(bench: Callable[..., Bench]) -> None:
    b = bench()
    b.run(2)
    pid = b.pid("actor-1")
    os.kill(pid, signal.SIGSTOP)
    assert b.until(lambda: "actor-1" in b.released) < 3.0
    assert "actor-1 died, restarted as actor-1.1" in b.told[0]
    assert "its process is stopped (SIGSTOP)" in b.told[0]
    b.until(lambda: b.fleet.names("running") == ["actor-0", "actor-1.1"])
    b.until(lambda: not psutil.pid_exists(pid))
    assert b.fleet.num_deaths == 1


@pytest.mark.slow
def test_a_loop_that_stands_still_while_its_process_answers_is_replaced(bench: Callable[..., Bench]) -> None:
    b = bench(behaviour={"actor-0": "stuck"})
    began_s = time.monotonic()
    b.run(1)
    timeout_s, b.fleet._timeout_s = b.fleet._timeout_s, 8.0
    b.until(lambda: b.told)
    elapsed_s = time.monotonic() - began_s
    b.fleet._timeout_s = timeout_s  # It limits loading, too.
    b.until(lambda: b.fleet.names("running") == ["actor-0.1"], timeout_s=60)
    stood_s = re.search(r"its loop has not turned for (\d+) s \(run\.timeout_s\)", b.told[0])
    assert stood_s is not None
    assert 8 <= int(stood_s[1]) <= elapsed_s


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "cause"), [("raise", "ValueError: the engine broke"), ("return", "run() returned")]
)
def test_an_actor_whose_run_ends_by_itself_is_replaced(
    bench: Callable[..., Bench], behaviour: str, cause: str
) -> None:
    b = bench(behaviour={"actor-0": behaviour})
    b.fleet.scale_to(1)
    b.until(lambda: b.fleet.names("running") == ["actor-0.1"])
    assert cause in b.told[0]
    assert b.released == ["actor-0"]
    b.until(lambda: free_cpus() == 3.0)


@pytest.mark.slow
def test_a_crash_loop_stops_with_role_cause_last_log_lines_and_a_hint(bench: Callable[..., Bench]) -> None:
    b = bench(behaviour={"*": "exit"})
    b.fleet.scale_to(1)
    with pytest.raises(TrainingError) as caught:
        b.until(lambda: False, timeout_s=60)
    text = str(caught.value)
    assert text.startswith(f"actor-0 died {ACTOR.max_deaths} times within 5 min; the last time:")
    assert "last words of the engine" in text
    assert "lower actors.slots and actors.engine_memory" in text
    assert len(b.told) == ACTOR.max_deaths - 1


@pytest.mark.slow
def test_a_constructor_that_raises_before_any_actor_ran_stops_at_once_and_later_is_a_death(
    bench: Callable[..., Bench],
) -> None:
    b = bench(behaviour={"actor-0": "boot"})
    b.fleet.scale_to(1)
    with pytest.raises(
        TrainingError,
        match=r"(?s)actor actor-0 could not start:.*ValueError: no such "
        r"engine",
    ):
        b.until(lambda: False)
    later = bench(behaviour={"actor-1": "boot"})
    later.run(1)
    later.fleet.scale_to(2)
    later.until(lambda: later.fleet.names("running") == ["actor-0", "actor-1.1"])


@pytest.mark.slow
def test_an_error_of_ours_in_run_is_the_end_of_the_run(bench: Callable[..., Bench]) -> None:
    b = bench(behaviour={"actor-0": "data"})
    b.fleet.scale_to(1)
    with pytest.raises(DataError, match="row 3 is empty"):
        b.until(lambda: False)


@pytest.mark.slow
def test_one_that_does_not_retire_is_hurried_then_killed_and_one_that_dies_retiring_is_not_replaced(
    bench: Callable[..., Bench], monkeypatch: Any
) -> None:
    monkeypatch.setattr(cluster.fleet, "DRAIN_S", 2.0)
    monkeypatch.setattr(cluster.fleet, "HAND_BACK_S", 2.0)
    b = bench(behaviour={"actor-1": "deaf", "actor-2": "deaf"})
    b.run(3)
    b.fleet.scale_to(1)
    os.kill(b.pid("actor-2"), signal.SIGKILL)
    b.until(lambda: b.fleet.names() == ["actor-0"])
    assert ("actor-1", "now") in b.orders
    assert sorted(b.released) == ["actor-1", "actor-2"]
    assert any("actor-1 did not retire" in text for text in b.told)
    assert any("actor-2 died while retiring" in text for text in b.told)
    assert b.fleet.num_deaths == 0


@pytest.mark.slow
def test_a_feeder_is_replaced_but_neither_scaled_nor_placed_and_the_end_retires_all(
    bench: Callable[..., Bench],
) -> None:
    b = bench()
    b.fleet.add_feeder(Kind(b._spawn, is_placed=False))
    b.until(lambda: b.fleet.names("running") == ["offline"])
    os.kill(b.pid("offline"), signal.SIGKILL)
    b.until(lambda: b.fleet.names("running") == ["offline.1"])
    b.fleet.scale_to(1)
    b.until(lambda: len(b.fleet.names("running")) == 2)
    assert b.fleet.scale_to(1) == ([], [])
    b.fleet.end()
    b.until(lambda: not b.fleet.names())
    assert sorted(b.orders) == [("actor-0", "now"), ("offline.1", "now")]


# --- The pulse: judged by looks ---


def judge(looks: list[tuple[float, Sight | None]]) -> str | None:
    pulse = Pulse(0.0)
    return [pulse.missed(time_s, sight) for time_s, sight in looks][-1]


EVERY_HALF_S = [number * 0.5 for number in range(1, 8)]  # 3.5 s


@pytest.mark.parametrize(
    ("looks", "cause"),
    [
        ([(t, Sight(1.0, is_stopped=True)) for t in EVERY_HALF_S], "stopped"),
        ([(t, Sight(1.0, is_stopped=True)) for t in EVERY_HALF_S[:4]], "stopped"),  # 2 s.
        ([(t, Sight(1.0, is_stopped=True)) for t in EVERY_HALF_S[:3]], None),
        ([(t, Sight(1.0)) for t in EVERY_HALF_S], "does nothing"),
        ([(t, Sight(1.0)) for t in EVERY_HALF_S[:5]], None),  # 2.5 s.
        ([(t, Sight(t)) for t in EVERY_HALF_S], None),  # It works: a long step.
        ([(t, Sight(1.0, is_in_io=True)) for t in EVERY_HALF_S], None),
        ([(t * 10, Sight(t * 10)) for t in EVERY_HALF_S], "works but does not come back"),
        ([(t, None) for t in EVERY_HALF_S], None),  # Of another node.
        ([(t * 3, None) for t in EVERY_HALF_S], "no answer for 10 s"),
        # The supervisor itself was paused: it has not looked.
        ([(100.0, Sight(1.0, is_stopped=True))], None),
        ([(100.0 + t, Sight(1.0)) for t in EVERY_HALF_S[: MIN_LOOKS - 1]], None),
    ],
)
def test_a_process_counts_as_hung_after_time_and_looks_unless_it_is_seen_working(
    looks: list[tuple[float, Sight | None]], cause: str | None
) -> None:
    found = judge(looks)
    assert (found is None) if cause is None else (found is not None and cause in found)
    assert LIMIT_S < ELSEWHERE_LIMIT_S < BUSY_LIMIT_S


def test_an_answer_begins_anew() -> None:
    pulse = Pulse(0.0)
    for time_s in EVERY_HALF_S:
        pulse.missed(time_s, Sight(1.0))
    pulse.answered(4.0)
    assert pulse.missed(4.5, Sight(1.0, is_stopped=True)) is None


def test_this_process_is_seen_and_none_where_there_is_none() -> None:
    here = look_at(os.getpid())
    assert here is not None
    assert here.cpu_s > 0
    assert not here.is_stopped
    assert look_at(None) is None
    assert look_at(2**22 + 1) is None


def test_deaths_are_counted_by_role_within_the_window() -> None:
    deaths = DeathCount()
    assert [deaths.note("actor-0", t, 300.0) for t in (0, 10, 20)] == [1, 2, 3]
    assert deaths.note("actor-1", 20, 300.0) == 1
    assert deaths.note("actor-0", 305, 300.0) == 3  # Those at 0 is forgotten.


@pytest.mark.slow
def test_successors_and_actors_that_wait_leave_their_places_to_the_learner(
    bench: Callable[..., Bench],
) -> None:
    learner_is_placed = True
    b = bench(num_cpus=2.0, may_place=lambda: learner_is_placed)
    b.run(2)
    b.fleet.scale_to(3)  # There is no room for the third.
    os.kill(b.pid("actor-0"), signal.SIGKILL)
    learner_is_placed = False
    b.until(lambda: "actor-0.1" in b.fleet.names() and free_cpus() == 2)
    for _ in range(3):
        b.fleet.poll()
        b.fleet.tick(time.monotonic())
    assert b.fleet.names("running") == ["actor-1"]
    notes = {entry["name"]: entry["note"] for entry in b.fleet.status()}
    assert notes["actor-0.1"] == notes["actor-2"] == "the learner is placed first"
    learner = placement_group([{"CPU": 2.0}])
    assert learner.wait(60), "what waited has given its claims back"
    learner_is_placed = True
    remove_placement_group(learner)
    b.until(lambda: len(b.fleet.names("running")) == 2)


@pytest.mark.slow
def test_scaling_down_takes_one_that_waits_before_a_newer_one_that_runs(bench: Callable[..., Bench]) -> None:
    may_place = True
    b = bench(may_place=lambda: may_place)
    b.run(2)
    os.kill(b.pid("actor-0"), signal.SIGKILL)
    may_place = False
    b.until(lambda: b.fleet.names("waiting for placement") == ["actor-0.1"])
    assert b.fleet.scale_to(1) == ([], ["actor-0.1"])
    assert b.fleet.names("running") == ["actor-1"]
    assert b.orders == []


@pytest.mark.slow
def test_until_one_runs_no_more_load_at_once_than_have_a_core_each(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.fleet, "MAX_HOLD_S", math.inf)
    b = bench(first_at_once=1)
    b.fleet.scale_to(3)
    seen: set[int] = set()

    def one_runs() -> bool:
        if b.fleet.names("running"):
            return True
        seen.add(len(b.fleet.names("loading")))
        return False

    b.until(one_runs)
    assert max(seen) == 1
    assert len(b.fleet.names("running")) == 1  # Whichever Ray placed first.
    b.until(lambda: len(b.fleet.names("running")) == 3)


@pytest.mark.parametrize(("free", "yet"), [(0.25, ""), (3.0, ", which Ray has not placed yet")])
def test_a_shortage_is_told_only_where_less_is_free_than_asked(
    free: float, yet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.processes.ray.available_resources", lambda: {"CPU": free})
    group = SimpleNamespace(bundle_specs=[{"CPU": 0.5}])
    told = shortage(group)  # type: ignore[arg-type]
    assert told == f"asks for 0.5 CPU{yet}; free now: {free:g} CPU"
