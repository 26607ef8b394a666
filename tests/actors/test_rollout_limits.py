"""Deadlines of samples and groups in the actor's real loop, on a simulated engine and by its clock: a
straggler holds up no group, and a loop that hangs is told of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from core.records import Sample
from tests.support.clocks.simulated import SleptClock, TurnedClock, set_clock
from tests.support.clocks.waits import until
from tests.support.configs import LONG, actor_config
from tests.support.in_process import Bench
from tests.support.simulated import STEP_S, UNBOUNDED, SimulatedActor, benches, ledger, rows

pytestmark = pytest.mark.timed


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    with benches(tmp_path) as make:
        yield make


def straggler(seed: int) -> int:
    """One sample of every four consecutive seeds does not end by itself."""
    return LONG if seed % 4 == 0 else 5


def test_a_group_goes_in_at_its_deadline_with_its_straggler_truncated(bench, monkeypatch):
    actors = {"straggler_timeouts_s": (None, 0.8), "max_new_tokens": LONG, "slots": 32}
    run = bench(actor_config(actors=actors, buffer={"capacity": 4}))
    actor = SimulatedActor(run, num_tokens=straggler, step_s=STEP_S)
    set_clock(monkeypatch, actor, SleptClock())
    run.publish(0)
    run.start(actor)
    groups = [group for step in range(3) for group in run.train(step, 4)]
    for group in groups:
        lengths = sorted(sample.num_sampled for sample in group.samples)
        assert lengths[:3] == [5, 5, 5]
        assert 5 < lengths[3] < 200
        assert sorted(sample.finish_reason for sample in group.samples) == ["length", "stop", "stop", "stop"]
    counters = actor._all_counters()
    assert counters["samples_truncated_late"] >= len(groups)
    assert counters["groups_partial"] == counters["samples_dropped"] == 0


def test_samples_without_a_token_are_dropped_and_two_others_are_enough(bench, monkeypatch):
    run = bench(
        actor_config(actors={"straggler_timeouts_s": (None, 0.6), "max_new_tokens": LONG, "slots": 2})
    )
    actor = SimulatedActor(run, num_tokens=(LONG, LONG), step_s=STEP_S)
    set_clock(monkeypatch, actor, SleptClock())
    run.publish(0)
    ended = run.start(actor)
    assert {len(group.samples) for group in run.train(0, 4)} == {2}
    run.board.get("retire", ["actor-0"], "now")
    counters = ended.result(60)  # While it runs, one of two may have been counted.
    assert counters["samples_dropped"] == counters["samples_truncated_late"] >= 8
    assert counters["groups_partial"] >= 4


def test_a_group_with_one_sample_fails_with_the_reason(bench, monkeypatch):
    run = bench(
        actor_config(actors={"straggler_timeouts_s": (None, 0.6), "max_new_tokens": LONG, "slots": 1})
    )
    actor = SimulatedActor(run, num_tokens=(LONG, LONG), step_s=STEP_S)
    set_clock(monkeypatch, actor, SleptClock())
    run.publish(0)
    run.start(actor)
    until(lambda: run.stats()["failed"] >= 3)
    assert {event["reason"] for event in ledger(run) if event["event"] == "failed"} == {"group_timeout"}
    assert run.stats()["groups"] == actor._all_counters()["groups_partial"] == 0


def test_offline_samples_count_as_members(bench, monkeypatch):
    offline = (
        Sample.one_turn((5, 0), (7, 8), version_spans=(), text="45", reward=1.0, finish_reason="length"),
    )
    data = {"offline": "none?share=0.5"}
    actors = {"straggler_timeouts_s": (None, 0.6), "max_new_tokens": LONG, "slots": 1, "group_size": 2}
    run = bench(
        actor_config(data=data, actors=actors, objective={"importance_weight": "none"}),
        rows=rows(offline=offline),
    )
    actor = SimulatedActor(run, num_tokens=(LONG, LONG), step_s=STEP_S)
    set_clock(monkeypatch, actor, SleptClock())
    run.publish(0)
    run.start(actor)
    for group in run.train(0, 4):
        assert [sample.is_offline for sample in group.samples] == [False, True]
        assert group.samples[0].finish_reason == "length"


def test_a_sample_over_its_time_ends_as_truncated_counted_from_its_slot(bench, monkeypatch):
    run = bench(
        actor_config(actors={"straggler_timeouts_s": (0.6, None), "max_new_tokens": LONG, "slots": 2})
    )
    actor = SimulatedActor(run, num_tokens=(LONG, LONG), step_s=STEP_S)
    set_clock(monkeypatch, actor, SleptClock())
    run.publish(0)
    run.start(actor)
    groups = run.train(0, 4)
    assert {len(group.samples) for group in groups} == {4}, "those that waited for a slot got their time, too"
    assert {sample.finish_reason for group in groups for sample in group.samples} == {"length"}
    assert actor._all_counters()["samples_dropped"] == 0


def test_an_evaluation_has_no_group_deadline_but_its_samples_have_theirs(bench, monkeypatch):
    actors = {"straggler_timeouts_s": (0.6, 0.1), "max_new_tokens": LONG}
    run = bench(actor_config(actors=actors), eval_rows=rows(3))
    run.publish(0, evaluate=True)
    actor = SimulatedActor(run, num_tokens=(LONG, LONG), step_s=STEP_S)
    set_clock(monkeypatch, actor, SleptClock())
    run.start(actor)
    until(lambda: run.evaluations)
    result, shown = run.evaluations[0]
    assert (result.num_problems, result.num_samples, result.num_errors) == (3, 6, 0)
    assert all(len(sample["completion"]) > 0.3 / STEP_S / 2 for sample in shown)


def test_ping_and_stacks_tell_a_loop_that_hangs_in_its_engine(bench, monkeypatch):
    clock, is_over = TurnedClock(), threading.Event()
    run = bench(actor_config(buffer=UNBOUNDED))
    actor = SimulatedActor(run, step_s=0.001)
    set_clock(monkeypatch, actor, clock)
    assert actor.ping() == 0
    run.publish(0)
    run.start(actor)
    run.train(0, 4)
    until(lambda: actor.ping() < 1)
    monkeypatch.setattr(clock, "sleep", lambda seconds: is_over.wait(60))
    until(lambda: actor.ping() > 1)
    stacks = actor.stacks()
    is_over.set()
    assert "actor_0" in stacks
    assert "fake_engine.py" in stacks
