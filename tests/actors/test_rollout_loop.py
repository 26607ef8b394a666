"""The actor's real loop on a simulated engine, with buffer, board and monitor in this process: updates,
faults, retirement.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import math
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import actors.follower
import actors.rollout
from actors.engine import Engine
from benchmarks.fake_engine import FakeEngine
from buffer.ledger import audit_run
from buffer.replay import EVICTIONS
from buffer.store import DiskFullError
from core.calls import Call
from core.config import Config
from core.errors import PeerTimeout
from core.records import Group, Sample
from core.weights.board import Board
from tests.support.clocks.machine import machine_s
from tests.support.clocks.waits import until
from tests.support.configs import LONG, actor_config
from tests.support.in_process import Bench
from tests.support.simulated import STEP_S, UNBOUNDED, Feeder, SimulatedActor, benches, ledger, rows

pytestmark = pytest.mark.timed

REFUSED_ROW = 3


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    with benches(tmp_path) as make:
        yield make


def turned(actor: SimulatedActor) -> None:
    """Waits until the loop has turned once, whatever it was about, and what it then asked has arrived."""
    for _ in range(2):
        since_s = actor._turned_s
        until(lambda since_s=since_s: actor._turned_s != since_s)
    time.sleep(0.3)


def test_the_simulated_engine_has_the_methods_of_the_real_one_and_their_arguments():
    for name, method in inspect.getmembers(Engine, inspect.isfunction):
        if not name.startswith("_"):
            assert (
                inspect.signature(method).parameters.keys()
                == inspect.signature(getattr(FakeEngine, name)).parameters.keys()
            ), name


def test_an_item_gives_the_same_group_whoever_generates_it(bench):
    groups: list[dict[int, Any]] = []
    for _ in range(2):
        run = bench(actor_config())
        actor = SimulatedActor(run, num_tokens=(2, 9), step_s=0.001)
        run.publish(0)
        run.start(actor)
        groups.append({group.group_id: group for step in range(5) for group in run.train(step, 4)})
    same = groups[0].keys() & groups[1].keys()
    assert len(same) >= 10
    for group_id in same:
        first, second = groups[0][group_id], groups[1][group_id]
        assert len(first.samples) == 4
        assert [sample.tokens for sample in first.samples] == [sample.tokens for sample in second.samples]


def test_groups_wait_for_one_another_while_the_engine_works_and_none_stays_behind(bench, monkeypatch):
    monkeypatch.setattr(actors.rollout, "INSERT_EVERY_S", math.inf)
    run = bench(actor_config())
    actor = SimulatedActor(run, num_tokens=(2, 9), step_s=0.001)
    sent: list[list[int]] = []
    with monkeypatch.context() as context:
        context.setattr(actor._outbox, "deliver", lambda call, ordinals: sent.append(ordinals))
        actor.engine.submit("under way", [1], seed=0, temperature=None, max_tokens=None)
        for number in range(2):
            group = Group(group_id=number, prompt_index=0, source_row=0, prompt="", samples=())
            actor._unsent.append(group)
            actor._deliver()
        assert sent == []
        actor.engine.abort(["under way"])
        actor._deliver()
        actor._deliver()
        assert sent == [[0, 1]]
    run.publish(0)
    ended = run.start(actor)
    until(lambda: actor._groups.counters["generated_samples"] >= 8)
    run.board.get("retire", ["actor-0"], "now")
    counters = ended.result(60)
    assert actor._unsent == []
    assert counters["groups"] - 2 == sum(event["event"] == "inserted" for event in ledger(run))


def test_a_lease_is_for_what_the_engine_holds_and_beyond_what_is_free_at_most_a_part_of_a_batch(
    bench, monkeypatch
):
    def config(count: int, groups_per_step: int) -> Config:
        return actor_config(
            actors={"slots": 32, "count": count}, learner={"groups_per_step": groups_per_step}
        )

    async def nothing() -> list[bytes]:
        return []

    run = bench(config(1, 4))
    actor = SimulatedActor(run, num_tokens=(2, 9), step_s=0.001)
    actor.engine.version = 0
    wanted: list[int] = []
    with monkeypatch.context() as context:
        context.setattr(
            actor._buffer,
            "lease",
            lambda name, most, *rest: wanted.append(most) or Call("the replay buffer", "lease", nothing),
        )
        for number in range(33):
            if number in (0, 32):
                for actors, groups_per_step in ((1, 32), (2, 12), (2, 4)):
                    actor._config, actor._lease = config(actors, groups_per_step), None
                    actor._take_work()
            actor.engine.submit(str(number), [1], seed=0, temperature=None, max_tokens=None)
    assert wanted == [8, 8, 8, 8, 6, 4], "the first three with all slots free"
    actor._config, actor._lease = run.config, None
    actor.engine.abort([str(number) for number in range(33)])
    run.publish(1)
    ended = run.start(actor)
    until(lambda: actor._groups.counters["generated_samples"] >= 8)
    run.board.get("retire", ["actor-0"], "now")
    ended.result(60)


class TestUpdates:
    def start(
        self, bench: Callable[..., Bench], on_update: str, num_tokens: Any
    ) -> tuple[Bench, SimulatedActor]:
        run = bench(actor_config(actors={"on_update": on_update, "max_new_tokens": 400}))
        actor = SimulatedActor(run, num_tokens=num_tokens, step_s=STEP_S)
        run.publish(0)
        run.start(actor)
        until(lambda: actor.engine.num_unfinished)
        return run, actor

    def groups(
        self, run: Bench, actor: SimulatedActor, are_those: Callable[[list[Group]], Any]
    ) -> list[Group]:
        """Trains two steps, and then on until groups of around the update are among its own."""
        until(lambda: actor.engine.version == 1)
        groups = run.train(0, 4) + run.train(1, 4)
        for step in range(2, 10):
            if are_those(groups):
                break
            groups += run.train(step, 4)
        return groups

    @staticmethod
    def samples(groups: list[Group]) -> list[Sample]:
        return [sample for group in groups for sample in group.samples]

    @classmethod
    def crossing(cls, groups: list[Group]) -> list[Sample]:
        return [sample for sample in cls.samples(groups) if len(sample.version_spans) == 2]

    @classmethod
    def versions(cls, groups: list[Group]) -> set[int]:
        return {span.version for sample in cls.samples(groups) for span in sample.version_spans}

    def test_continue_goes_on_with_what_is_under_way_and_says_so(self, bench):
        run, actor = self.start(bench, "continue", lambda seed: 100 if seed % 4 == 0 else 5)
        time.sleep(0.1)
        run.publish(1)
        groups = self.groups(run, actor, self.crossing)
        assert self.crossing(groups)
        for sample in self.samples(groups):
            assert [span.end for span in sample.version_spans][-1] == sample.num_sampled
            assert len({span.version for span in sample.version_spans}) == len(sample.version_spans)

    def test_drain_finishes_first_and_starts_nothing(self, bench):
        run, actor = self.start(bench, "drain", lambda seed: 100 if seed % 4 == 0 else 5)
        time.sleep(0.1)
        run.publish(1)
        groups = self.groups(run, actor, lambda groups: len(self.versions(groups)) == 2)
        assert {len(sample.version_spans) for sample in self.samples(groups)} == {1}
        assert self.versions(groups) == {0, 1}
        assert (actor.unfinished_at_load, run.board.asked["snapshot"]) == ([0, 0], []), "none is asked for"

    def test_abort_starts_the_unfinished_again_with_their_seeds_and_keeps_the_finished(self, bench):
        run, actor = self.start(bench, "abort", lambda seed: 100 if seed % 4 == 0 else 5)
        time.sleep(0.25)
        run.publish(1)

        def mixed_of(groups: list[Group]) -> list[Group]:
            return [group for group in groups if self.versions([group]) == {0, 1}]

        groups = self.groups(run, actor, mixed_of)
        assert {len(sample.version_spans) for sample in self.samples(groups)} == {1}
        mixed = mixed_of(groups)
        assert mixed
        for group in mixed:
            assert {
                sample.num_sampled for sample in group.samples if sample.version_spans[0].version == 0
            } == {5}
        seeds: dict[str, set[int]] = {}
        for request_id, seed in actor.engine.submitted:
            seeds.setdefault(request_id, set()).add(seed)
        again = len(actor.engine.submitted) - len(seeds)
        assert again == actor._all_counters()["samples_restarted"] > 0
        assert {len(found) for found in seeds.values()} == {1}

    def test_generation_goes_on_while_a_snapshot_is_fetched_and_the_pause_is_the_load_alone(self, bench):
        run = bench(actor_config(buffer=UNBOUNDED))
        actor = SimulatedActor(run, num_tokens=(8, 8), step_s=0.002, load_s=0.05)
        run.publish(0)
        run.start(actor)
        counters = actor._groups.counters
        until(lambda: counters["updates"] == 1)
        pauses_s = [counters["apply_s"]]
        for version in (1, 2, 3):
            is_there = threading.Event()
            run.publish(version, is_there=is_there, delay_s=0.5)
            until(lambda: actor._follower._directive is not None)
            start_s, before = time.monotonic(), counters["generated_tokens"]
            until(lambda before=before: counters["generated_tokens"] - before > 8 * 100)
            fetching_s = time.monotonic() - start_s + 0.5
            assert actor.engine.version == version - 1
            is_there.set()
            until(lambda version=version: counters["updates"] == version + 1)
            assert actor._all_counters()["fetch_s"] >= fetching_s
            pauses_s.append(counters["apply_s"])
        loads_s = actor.load_times_s
        assert all(0.05 <= load_s <= pause_s for load_s, pause_s in zip(loads_s, pauses_s, strict=True))
        # The machine may make any of them longer, but not all.
        assert min(pause_s - load_s for load_s, pause_s in zip(loads_s[1:], pauses_s[1:], strict=True)) < 0.05
        assert counters["pause_total_s"] == pytest.approx(sum(pauses_s))

    def test_a_torn_snapshot_leaves_the_weights_and_a_sound_one_comes_after_it(self, bench):
        run, actor = self.start(bench, "continue", (5, 5))
        run.publish(1, torn=True)
        until(lambda: any("checksum" in event for event in run.told.events))
        assert actor.engine.version == 0
        run.publish(2)
        until(lambda: actor.engine.version == 2)
        assert actor.engine.loaded == [0, 2]
        assert actor._all_counters()["snapshots_failed"] >= 1

    def test_an_evaluation_is_of_its_version_whatever_is_published_meanwhile_and_never_enters_the_buffer(
        self, bench
    ):
        run = bench(actor_config(actors={"on_update": "abort", "max_new_tokens": 100}), eval_rows=rows(5))
        run.publish(0, evaluate=True)
        actor = SimulatedActor(run, num_tokens=(60, 60), step_s=STEP_S)
        run.start(actor)
        until(lambda: actor._evaluating)
        run.publish(1, evaluate=True)
        until(lambda: len(run.evaluations) == 2)
        assert [
            (result.policy_version, result.num_problems, result.num_errors) for result, _ in run.evaluations
        ] == [(0, 5, 0), (1, 5, 0)]
        until(lambda: actor._all_counters()["groups"] >= 4)
        assert run.stats()["inserted"] <= actor._all_counters()["groups"]


class TestFaults:
    def test_a_full_disk_loses_nothing_and_stops_leasing_until_it_has_room(self, bench):
        run = bench(actor_config())
        actor = SimulatedActor(run, num_tokens=(3, 3), step_s=0.001)
        run.buffer.faults["insert"].extend(DiskFullError("no space left") for _ in range(1000))
        run.publish(0)
        run.start(actor)
        until(lambda: actor._outbox.retries >= 1)
        turned(actor)  # One question may have been on its way.
        leases = len(run.buffer.asked["lease"])
        time.sleep(0.5)
        assert len(run.buffer.asked["lease"]) == leases
        del run.buffer.faults["insert"]
        for step in range(8):
            run.train(step, 4)
        until(
            lambda: (
                set(range(32)) <= {event["group_id"] for event in ledger(run) if event["event"] == "inserted"}
            )
        )
        assert actor._all_counters()["insert_retries"] >= 1
        assert run.told.events == [], "the driver tells of the disk, once for all actors"
        stats = run.stats()
        assert stats["duplicates"] == stats["reissued"] == 0

    def test_a_lease_that_a_full_disk_refuses_is_asked_for_again(self, bench):
        run = bench(actor_config())
        run.buffer.faults["lease"].append(DiskFullError("no space left"))
        run.publish(0)
        actor = SimulatedActor(run, num_tokens=(3, 3))
        run.start(actor)
        assert len(run.train(0, 4)) == 4
        assert actor._all_counters()["wait_disk_s"] > 0.5

    def test_a_board_that_was_started_again_is_followed_once_it_is_told_and_generation_goes_on_meanwhile(
        self, bench
    ):
        run = bench(actor_config())
        run.publish(0)
        actor = SimulatedActor(run, num_tokens=(3, 3), step_s=0.001)
        run.start(actor)
        run.train(0, 4)
        run.board._part = Board(run.config.run, {}, print)
        run.train(1, 4)
        assert actor.engine.loaded == [0], "it knows of nothing"
        run.publish(2)
        until(lambda: actor.engine.version == 2, 60.0)

    def test_a_sample_that_takes_longer_than_a_lease_stays_its_actors(self, bench):
        run = bench(actor_config(run={"timeout_s": 4.0}, actors={"max_new_tokens": LONG}))
        run.publish(0)
        # 10 s, more than twice as long as a lease.
        run.start(SimulatedActor(run, num_tokens=lambda seed: 1000, step_s=0.01))
        assert len(run.train(0, 1, 120.0)) == 1
        stats = run.stats()
        assert (stats["expired"], stats["reissued"], stats["duplicates"]) == (0, 0, 0)
        assert len(run.buffer.asked["renew"]) > 10

    def test_what_an_actor_holds_is_not_issued_again_and_what_it_does_not_know_of_is(self, bench):
        run = bench(actor_config())
        run.publish(0)
        lost = run.buffer.get("lease", "actor-0", 2, 1.0, 0, [])  # An answer that never reached it.
        run.start(SimulatedActor(run, num_tokens=(2, 20), step_s=0.001))
        groups = [group for step in range(10) for group in run.train(step, 4)]
        assert len(lost) == run.stats()["reissued"] == 2
        assert {0, 1} <= {group.group_id for group in groups}

    def test_a_prompt_the_engine_refuses_fails_with_the_reason_and_the_others_go_on(self, bench):
        run = bench(actor_config(), eval_rows=rows(5))
        run.publish(0, evaluate=True)
        run.start(
            SimulatedActor(run, refuses=lambda ids: "too long" if ids[1] == REFUSED_ROW else "", step_s=0.001)
        )
        groups = [group for step in range(12) for group in run.train(step, 4)]
        assert {group.prompt_index for group in groups} == set(range(16)) - {REFUSED_ROW}
        failed = [event for event in ledger(run) if event["event"] == "failed"]
        assert failed
        assert {event["reason"] for event in failed} == {"too long"}
        assert sum("too long" in event for event in run.told.events) == 1
        until(lambda: run.evaluations)
        result, shown = run.evaluations[0]
        assert (result.num_problems, result.num_errors) == (5, 2)
        assert [sample["error"] for sample in shown] == [None, None, None, "too long", None]

    @pytest.mark.parametrize(("method", "who"), [("lease", "the replay buffer"), ("poll", "the board")])
    def test_a_peer_that_does_not_answer_is_named(self, method, who, tmp_path, monkeypatch):
        for module in (actors.rollout, actors.follower):
            monkeypatch.setattr(module, "POLL_S", 0.1)
        with contextlib.closing(Bench(actor_config(run={"timeout_s": 0.3}), tmp_path / "run", rows())) as run:
            run.publish(0)
            actor = SimulatedActor(run, step_s=0.001)
            handle = run.buffer if method == "lease" else run.board
            if method == "lease":
                actor._follower._timeout_s = 60.0  # The board may be slow.
            monkeypatch.setattr(handle._part, method, lambda *arguments: asyncio.sleep(60))
            with pytest.raises(PeerTimeout, match=f"{who} did not answer actor-0 within"):
                actor.run()


class TestRetirement:
    def test_drained_actor_finishes_what_it_began_and_hands_back_the_rest(self, bench):
        run = bench(actor_config(actors={"max_new_tokens": 200}))
        first = SimulatedActor(run, "actor-0", num_tokens=(150, 150), step_s=STEP_S)
        run.publish(0)
        ended = run.start(first)
        until(lambda: len(first._groups) == 2 and first._work)
        begun, unstarted = (
            set(first._holding) - {item.ordinal for item in first._work},
            {item.ordinal for item in first._work},
        )
        run.board.get("retire", ["actor-0"], "drain")
        counters = ended.result(60)
        assert counters["groups"] >= 2
        events = [(event["event"], event["group_id"]) for event in ledger(run)]
        assert {("inserted", ordinal) for ordinal in begun} <= set(events)
        assert {("expired", ordinal) for ordinal in unstarted} <= set(events)
        run.start(SimulatedActor(run, "actor-1", num_tokens=(5, 5)))
        for step in range(3):
            run.train(step, 4)
        until(
            lambda: (
                begun | unstarted
                <= {event["group_id"] for event in ledger(run) if event["event"] == "inserted"}
            )
        )

    def test_draining_ends_after_its_limit_and_evaluation_items_go_back_to_the_board(
        self, bench, monkeypatch
    ):
        monkeypatch.setattr(actors.rollout, "RETIRE_LIMIT_S", 0.5)
        run = bench(actor_config(actors={"max_new_tokens": LONG}), eval_rows=rows(3))
        run.publish(0, evaluate=True)
        first = SimulatedActor(run, "actor-0", num_tokens=(LONG, LONG), step_s=STEP_S)
        ended = run.start(first)
        until(lambda: first._evaluating)
        run.board.get("retire", ["actor-0"], "drain")
        ended.result(60)
        assert not run.evaluations
        run.start(SimulatedActor(run, "actor-1", num_tokens=(5, 5), step_s=0.001))
        until(lambda: run.evaluations)
        assert run.evaluations[0][0].num_problems == 3

    def test_now_ends_at_once_also_in_the_middle_of_an_evaluation_and_of_draining(self, bench):
        run = bench(actor_config(actors={"max_new_tokens": LONG}), eval_rows=rows(3))
        run.publish(0, evaluate=True)
        actor = SimulatedActor(run, num_tokens=(LONG, LONG), step_s=STEP_S)
        ended = run.start(actor)
        until(lambda: actor._evaluating)
        run.board.get("retire", ["actor-0"], "drain")
        until(lambda: actor._follower.retire == "drain")
        run.board.get("retire", ["actor-0"], "now")
        start_s = machine_s()
        ended.result(60)
        assert machine_s() - start_s < 3
        assert run.board.get("evaluations")[0] == [("held_out", 0)]


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("on_update", ["continue", "drain", "abort"])
def test_nothing_is_lost_whatever_happens_in_between(bench, num_shards, on_update):
    limits = {"straggler_timeouts_s": (0.15, 0.2), "max_new_tokens": 64}
    config = actor_config(
        actors={"on_update": on_update, **limits}, buffer={"num_shards": num_shards, "max_staleness": 8}
    )
    run = bench(config, eval_rows=rows(4))
    run.publish(0, evaluate=True)
    dice, names, ends = random.Random(num_shards), iter(f"actor-{number}" for number in range(100)), []

    def start() -> str:
        name = next(names)
        ends.append(run.start(SimulatedActor(run, name, num_tokens=(1, 64), step_s=0.002, load_s=0.01)))
        return name

    alive = [start(), start()]
    for step in range(24):
        assert len(run.train(step, 4)) == 4
        if step % 2:
            run.publish(step + 1, evaluate=step % 8 == 1, torn=step == 11)
        if step % 6 == 5:
            run.board.get("retire", [alive.pop(0)], dice.choice(["drain", "now"]))
            alive.append(start())
        run.buffers[step % num_shards].faults[dice.choice(["insert", "fail", "give_back"])].append(
            DiskFullError("full")
        )
    run.board.get("retire", alive, "drain")
    concurrent.futures.wait(ends, 40)
    totals = [end.result(0) for end in ends]
    stats = run.stats()
    assert sum(found["insert_retries"] for found in totals) > 0
    assert stats["inserted"] == stats["groups"] + sum(stats[name] for name in EVICTIONS)
    assert (
        stats["frontier"]
        == stats["inserted"] + stats["evicted_too_small"] + stats["failed"] + stats["leased"]
    )
    assert stats["samples_error"] == 0
    assert audit_run(run.run_dir)["status"].get("leased", 0) == 0, "who retired left nothing with its name"


def test_the_feeder_keeps_its_groups_while_the_disk_is_full(bench):
    offline = tuple(
        Sample.one_turn((5, 0), (7, 8 + number), version_spans=(), text=str(number), finish_reason="length")
        for number in range(4)
    )
    run = bench(
        actor_config(data={"offline": "none"}, objective={"importance_weight": "none"}),
        rows=rows(offline=offline),
    )
    run.buffer.faults["insert"].extend(DiskFullError("no space left") for _ in range(2))
    run.buffer.faults["lease"].append(DiskFullError("no space left"))
    run.publish(0)
    feeder = Feeder("offline", run.config, run.prompts, *run.peers())
    ended = run.start(feeder)
    for step in range(3):
        assert {len(group.samples) for group in run.train(step, 4)} == {4}
    until(lambda: feeder.ping() < 5)
    run.board.get("retire", ["offline"], "drain")
    counters = ended.result(60)
    assert counters["insert_retries"] == 2
    assert counters["leases_refused"] == 1
    assert run.told.events == [], "the driver tells of the disk, once for all actors"
    assert run.stats()["reissued"] == run.stats()["duplicates"] == 0
