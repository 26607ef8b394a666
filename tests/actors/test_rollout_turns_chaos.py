"""Actors that die in every phase of an episode, among updates, deadlines and failing environments: nothing is
lost, nothing is played twice into the buffer, and what is played again is the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.records import Group
from environments import EnvironmentFailure, Turn
from tests.support.clocks.waits import until
from tests.support.configs import actor_config
from tests.support.in_process import Bench
from tests.support.playing import Asked, turns
from tests.support.simulated import SimulatedActor, benches, ledger, played_rows

pytestmark = pytest.mark.timed


class Died(Exception):
    """An actor's process is gone."""


class Mortal(SimulatedActor):
    """Dies at the first turn of its loop at which `dies` is true; as with a process, its environments end."""

    dies: Callable[[], bool] = staticmethod(lambda: False)

    def _beat(self) -> None:
        super()._beat()
        if self.dies():
            self._groups.close()
            self._scoring.close()
            raise Died


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    with benches(tmp_path) as make:
        yield make


def config_of(**sections: Any) -> Any:
    # One that needs a worker: what is called where it is asked for is never seen being scored.
    functions = {"functions": {"environment": 1.0, "tests.support.reward_functions:length": 1.0}}
    return actor_config(environments="tests.support.playing:Game", rewards=functions, **sections)


def killed(run: Bench, actor: Mortal, dies: Callable[[], bool]) -> None:
    """Lets the actor die where `dies` says, and the driver notice it."""
    actor.dies = dies  # type: ignore[method-assign]
    running = run._running.pop(actor._name)
    with pytest.raises(Died):
        running.result(60)
    run.buffer.get("release_actor", actor._name)


def played(group: Group) -> list[tuple[Any, ...]]:
    return [(sample.tokens, sample.turns, sample.reward) for sample in group.samples]


PHASES: dict[str, Callable[[Mortal], Any]] = {
    "waiting for reset": lambda actor: any(
        place.asked[-1].what == "reset" and not place.is_closed for place in actor.places.places
    ),
    "generating": lambda actor: actor._groups._requests,
    "in the environment": lambda actor: any(
        place.asked[-1].what == "act" and not place.is_closed for place in actor.places.places
    ),
    "being scored": lambda actor: len(actor._scoring),
}


@pytest.mark.parametrize("phase", PHASES)
def test_an_actor_killed_in_this_phase_leaves_nothing_open_and_its_item_is_played_again_the_same(
    bench: Callable[..., Bench], phase: str
) -> None:
    def behave(asked: Asked) -> tuple[float, Turn]:
        return 0.01, turns(asked.seed % 3 + 1)(asked)[1]

    undisturbed = bench(config_of(), rows=played_rows())
    other = SimulatedActor(undisturbed, behave=behave, num_tokens=(2, 5), step_s=0.001)
    undisturbed.publish(0)
    undisturbed.start(other)
    expected = {group.group_id: played(group) for step in range(4) for group in undisturbed.train(step, 4)}

    run = bench(config_of(), rows=played_rows())
    run.publish(0)
    for number in range(2):
        actor = Mortal(run, f"actor-{number}", behave=behave, num_tokens=(2, 5), step_s=0.001)
        run.start(actor)
        until(lambda actor=actor: actor.places.places)  # type: ignore[misc]
        killed(run, actor, lambda actor=actor: bool(PHASES[phase](actor)))  # type: ignore[misc]
        assert actor.places is not None
        assert actor.places.num_open == 0
    run.start(SimulatedActor(run, "actor-9", behave=behave, num_tokens=(2, 5), step_s=0.001))
    found = {group.group_id: played(group) for step in range(4) for group in run.train(step, 4)}
    same = found.keys() & expected.keys()
    assert len(same) >= 8
    assert all(found[group_id] == expected[group_id] for group_id in same)
    assert run.stats()["duplicates"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_shards", "on_update"), [(1, "continue"), (1, "drain"), (1, "abort"), (3, "continue")]
)
def test_nothing_is_lost_whatever_happens_to_episodes(
    bench: Callable[..., Bench], num_shards: int, on_update: str
) -> None:
    """Two actors for three seconds, one of which is killed again and again; environments are slow, raise,
    hang and die; versions come, deadlines pass, evaluations are asked for.
    """
    draw = random.Random(num_shards)

    def behave(asked: Asked) -> tuple[float, Turn | EnvironmentFailure]:
        fate = draw.random()
        if fate < 0.03:
            return 0.01, EnvironmentFailure(
                draw.choice(["raised", "crash", "memory", "timeout"]), "by chance"
            )
        return (3600.0 if fate > 0.99 else draw.choice([0, 0.001, 0.02])), turns(asked.seed % 4 + 1)(asked)[1]

    limits = {
        "straggler_timeouts_s": (0.4, 0.5),
        "max_new_tokens": 16,
        "max_turns": 3,
        "on_update": on_update,
    }
    config = config_of(
        actors=limits, buffer={"num_shards": num_shards, "capacity": 64}, run={"timeout_s": 10.0}
    )
    run = bench(config, rows=played_rows(), eval_rows=played_rows(3))
    run.publish(0)
    steady = SimulatedActor(run, "steady", behave=behave, num_tokens=(1, 12), step_s=0.001)
    run.start(steady)
    step = kills = 0
    ends_s = time.monotonic() + 3.0
    while time.monotonic() < ends_s or kills < 2 or step < 4:  # The fourth version is evaluated.
        mortal = Mortal(run, f"mortal-{kills}", behave=behave, num_tokens=(1, 12), step_s=0.001)
        run.start(mortal)
        for _ in range(draw.randint(1, 3)):
            assert len(run.train(step, 4)) == 4
            step += 1
            run.publish(step, evaluate=step % 4 == 0)
        killed(run, mortal, lambda: True)
        assert mortal.places is not None
        assert mortal.places.num_open == 0
        kills += 1
    until(lambda: run.evaluations)
    events = ledger(run)
    inserted = [event["group_id"] for event in events if event["event"] == "inserted"]
    assert len(inserted) == len(set(inserted))
    failed = [f"environment_{how}" for how in ("errors", "crashes", "timeouts")]
    for wanted in (failed, ["cut_at_max_turns"]):
        while not sum(steady._all_counters()[name] for name in wanted):
            assert len(run.train(step, 4)) == 4
            step += 1
    until(lambda: steady.places is not None and steady.places.num_open <= 3 * config.actors.slots)
