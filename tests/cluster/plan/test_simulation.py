"""The simulation against closed forms."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import pytest

from cluster.plan.simulation import Simulation, Speeds, log_mean_of
from core.config import Config
from core.errors import ConfigError
from learner.catalogue import parse_config

GROUPS, SIZE = 16, 4


def make_config(**sections: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": "none"},
        "data": {"path": "none"},
        "rewards": {"functions": {"exact_match": 1.0}},
        "actors": {"group_size": SIZE},
        "learner": {"groups_per_step": GROUPS},
        "buffer": {"sampler": "oldest", "max_staleness": 8, "capacity": 64},
        "weights": {"publish_every": 1},
    }
    return parse_config(
        {name: {**tree.get(name, {}), **sections.get(name, {})} for name in {**tree, **sections}}
    )


ROOMY = {"capacity": 1000, "max_staleness": 60}
"""Neither admission nor the bound is in the way."""
SPEEDS = Speeds(
    actors=4,
    slots=32,
    engine_step_s=lambda running: 0.01,
    train_s=1.0,
    new_tokens=50,
    max_new_tokens=100_000,
)


def test_a_slow_learner_is_always_busy_and_samples_are_as_old_as_the_buffer_is_deep() -> None:
    outcome = Simulation(make_config(), dataclasses.replace(SPEEDS, train_s=100.0)).run(40)
    assert outcome.step_s == pytest.approx(100.0)
    assert outcome.learner_busy == 1.0
    assert outcome.slots_busy < 0.05
    assert outcome.admission_wait > 0.9
    # 64 groups are four steps ahead, begun two steps' at a time, when the newest version was not there yet.
    assert outcome.staleness == (4.0, 5.0, 5.0)
    assert outcome.evicted == {}


def test_slow_actors_are_always_busy_and_a_step_takes_their_time() -> None:
    outcome = Simulation(make_config(buffer=ROOMY), dataclasses.replace(SPEEDS, train_s=1e-6)).run(300)
    # 64 samples of 50 tokens by four engines of 32 sequences, each a token in 0.01 s.
    expected_s = GROUPS * SIZE * 50 / (4 * 32) * 0.01
    assert outcome.step_s == pytest.approx(expected_s, rel=0.05)
    assert outcome.slots_busy > 0.98
    assert outcome.learner_busy < 0.01


@pytest.mark.parametrize("mean", [1.0, 300.0, 614.0, 1024.0])
def test_lengths_have_the_mean_that_was_told_though_they_end_at_the_limit(mean: float) -> None:
    speeds = dataclasses.replace(SPEEDS, new_tokens=mean, max_new_tokens=1024)
    simulation = Simulation(make_config(), speeds)
    drawn = [simulation._draw_length() for _ in range(10_000)]
    assert statistics.mean(drawn) == pytest.approx(mean, rel=0.02)
    assert max(drawn) <= 1024
    # Without a limit in the way the mean of a lognormal is exp(m + s^2/2).
    assert log_mean_of(300, 1e9) == pytest.approx(math.log(300) - 0.6**2 / 2)


def test_answers_that_all_end_at_the_limit_take_their_whole_time() -> None:
    full = dataclasses.replace(SPEEDS, train_s=1e-6, new_tokens=50, max_new_tokens=50)
    outcome = Simulation(make_config(buffer=ROOMY), full).run(60)
    assert outcome.step_s == pytest.approx(GROUPS * SIZE * 50 / (4 * 32) * 0.01, rel=0.02)


def test_actors_take_turns_to_lease() -> None:
    """A batch of 16 groups of a synchronous run is dealt to all four engines, four to each."""
    config = make_config(buffer={"max_staleness": 0, "capacity": GROUPS})
    fixed = dataclasses.replace(SPEEDS, engine_step_s=lambda running: running * 0.001, max_new_tokens=50)
    # 64 sequences of 50 tokens, 16 at each engine, then a second of training.
    assert Simulation(config, fixed).run(20).step_s == pytest.approx(1.0 + 50 * 16 * 0.001)


def test_standstills_for_new_weights_take_their_share() -> None:
    quick = dataclasses.replace(SPEEDS, train_s=1e-6)
    plain = Simulation(make_config(buffer=ROOMY), quick).run(200)
    paused = Simulation(make_config(buffer=ROOMY), dataclasses.replace(quick, pause_s=0.1)).run(200)
    assert paused.step_s == pytest.approx(plain.step_s + 0.1, rel=0.1)


def test_twice_the_actors_halve_a_step_until_the_learner_is_the_slower() -> None:
    quick = dataclasses.replace(SPEEDS, train_s=1e-6)
    one = Simulation(make_config(buffer=ROOMY), quick).run(200)
    two = Simulation(make_config(buffer=ROOMY), dataclasses.replace(quick, actors=8)).run(200)
    assert two.step_s == pytest.approx(one.step_s / 2, rel=0.05)


def test_of_more_busy_parts_than_cores_each_is_slower() -> None:
    slow = dataclasses.replace(SPEEDS, train_s=1e-6, cores=2.0)  # Four actors on two cores.
    free = dataclasses.replace(slow, cores=math.inf)
    crowded, alone = (Simulation(make_config(buffer=ROOMY), speeds).run(200) for speeds in (slow, free))
    assert crowded.step_s == pytest.approx(2 * alone.step_s, rel=0.15)
    waiting = dataclasses.replace(SPEEDS, train_s=100.0, cores=1.0)  # Actors wait most of the time.
    assert Simulation(make_config(), waiting).run(40).step_s < 1.3 * 100.0


@pytest.mark.parametrize("sampler", ["uniform", "fresh", "oldest", "priority", "stratified"])
@pytest.mark.parametrize("publish_every", [1, 4])
def test_no_batch_is_older_than_the_bound(sampler: str, publish_every: int) -> None:
    config = make_config(
        buffer={"sampler": sampler, "max_staleness": 6}, weights={"publish_every": publish_every}
    )
    outcome = Simulation(config, dataclasses.replace(SPEEDS, arrive_s=2.0)).run(60)
    assert outcome.staleness[2] <= 6


def test_groups_used_twice_need_half_of_the_generation() -> None:
    quick = dataclasses.replace(SPEEDS, train_s=1e-6)
    reuse = {**ROOMY, "uses_per_group": 2, "samples_per_insert": [2.0, 2.0], "sampler": "uniform"}
    once = Simulation(make_config(buffer=ROOMY), quick).run(200)
    twice = Simulation(make_config(buffer=reuse), quick).run(200)
    assert twice.step_s == pytest.approx(once.step_s / 2, rel=0.15)


def test_the_same_arguments_give_the_same_run() -> None:
    first, second = (
        Simulation(make_config(buffer={"sampler": "uniform"}), SPEEDS, 3).run(50) for _ in range(2)
    )
    assert first == second


def test_a_run_that_stands_still_is_told_in_a_sentence() -> None:
    config = make_config(buffer={"max_staleness": 0, "capacity": 16}, weights={"publish_every": 4})
    with pytest.raises(ConfigError, match=r"nothing goes on after step \d.*publish_every"):
        Simulation(config, SPEEDS).run(20)
