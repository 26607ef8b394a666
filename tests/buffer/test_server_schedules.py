"""The buffer under random schedules of actors and a learner, and under kill -9 of its own process: the
invariants by name.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import multiprocessing
import os
import random
import struct
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from buffer.client import connect_buffer
from buffer.equal_rewards import MAX_SKIPPED_BATCHES
from buffer.ledger import audit, audit_run
from buffer.replay import EVICTIONS
from buffer.server import ReplayBuffer
from cluster.plan.virtual_time import run_virtually
from core.calls import Local
from core.records import decode_batch
from tests.support.buffers import (
    LEDGER_NAME,
    NUM_PROMPTS,
    check_sums,
    make_payload,
    ordinals_of,
)
from tests.support.configs import buffer_config


class MortalShard:
    """A shard in a process that may be killed: calls in flight are made again to its successor, as Ray
    does.
    """

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments
        self._died = asyncio.Event()
        self._shard = ReplayBuffer(*arguments)

    def kill(self) -> None:
        """What was not on disk is gone."""
        self._shard._shard.store._db.close()
        self._shard._shard.ledger._new.clear()
        self._shard = ReplayBuffer(*self._arguments)
        died, self._died = self._died, asyncio.Event()
        died.set()

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            while True:
                died = asyncio.ensure_future(self._died.wait())
                answer = asyncio.ensure_future(getattr(self._shard, name)(*arguments))
                try:
                    await asyncio.wait([answer, died], return_when=asyncio.FIRST_COMPLETED)
                    if not died.done():
                        return answer.result()
                finally:
                    answer.cancel()
                    died.cancel()

        return call


class Schedule:
    """Random actors, some of which die, sleep too long or report twice, one learner, and shards that
    are killed, on virtual time.
    """

    def __init__(self, seed: int, run_dir: str, num_shards: int = 1) -> None:
        self.rng = rng = random.Random(seed)
        capacity = rng.randint(num_shards, 6)
        settings: dict[str, Any] = {
            "groups_per_step": rng.randint(1, capacity),
            "capacity": capacity,
            "max_staleness": rng.randint(0, 3),
            "uses_per_group": rng.randint(1, 3),
            "sampler": rng.choice(["uniform", "fresh", "oldest", "stratified", "priority"]),
        }
        settings["groups_per_step"] = max(
            settings["groups_per_step"], math.ceil(num_shards / (settings["max_staleness"] + 1))
        )
        if num_shards == 1 and rng.random() < 0.3:
            high = rng.uniform(1.0, settings["uses_per_group"])
            settings["samples_per_insert"] = (rng.uniform(0.0, high), high)
        settings["skip_equal_rewards"] = rng.random() < 0.4
        self.equal_share = rng.choice([0.0, 0.5, 0.95, 1.0])
        settings["curriculum"] = rng.choice([None, None, 1, 2, "1?reward=0.5"])
        self.config = buffer_config(timeout_s=5.0, num_shards=num_shards, **settings)
        self.shards = [MortalShard(self.config, run_dir, NUM_PROMPTS, shard) for shard in range(num_shards)]
        self.buffer = connect_buffer([Local(shard) for shard in self.shards])
        self.step = self.num_kills = self.num_lives = 0
        self.dead: set[str] = set()
        self.batches: dict[int, bytes] = {}  # Since the watermark.

    async def actor(self, name: str) -> None:
        while True:
            version, rng = self.step, self.rng
            holding = rng.choice([None, []])
            for item in (
                await self.buffer.lease(name, rng.randint(1, 3), rng.choice([0.0, 2.0, 20.0]), None, holding)
                or ()
            ):
                (ordinal,) = ordinals_of([item])
                await asyncio.sleep(rng.choice([0.0, 0.1, 0.5]))
                await self.report(name, ordinal, version)
                await self.check_admission()
                if name in self.dead:
                    self.num_lives += 1
                    name = f"successor-{self.num_lives}"
                    break
            await asyncio.sleep(0.01)

    async def report(self, name: str, ordinal: int, version: int) -> None:
        rng = self.rng
        rewards = (1.0, 1.0) if rng.random() < self.equal_share else (1.0, 0.0)
        payload = make_payload(ordinal, version, rewards)
        match rng.choice(
            ["insert"] * 6 + ["twice", "late", "fail", "give_back", "die", "forget", "too_small"]
        ):
            case "insert":
                assert await self.buffer.insert(name, [payload]) == [ordinal]
            case "twice":
                await asyncio.gather(
                    self.buffer.insert(name, [payload, payload]), self.buffer.insert(name, [payload])
                )
            case "late":
                await asyncio.sleep(8.0)
                assert await self.buffer.insert(name, [payload]) == [ordinal]
            case "fail":
                await self.buffer.fail(name, [ordinal], "random")
            case "give_back":
                await self.buffer.give_back(name, [ordinal])
            case "die":
                self.dead.add(name)
                await self.buffer.release_actor(name)
                assert await self.buffer.lease(name, 1, 0.0) == [], "it was on its way when the actor died"
            case "too_small":
                await self.buffer.insert(name, [make_payload(ordinal, version, rewards=(None, 1.0))])

    async def check_admission(self) -> None:
        stats = await check_sums(self.buffer)
        assert stats["leased"] + stats["unconsumed"] <= self.config.admitted_groups
        assert stats["evicted_capacity"] == 0
        num_skipped = stats["evicted_equal"]
        assert self.config.buffer.skip_equal_rewards or not num_skipped
        most = sum(MAX_SKIPPED_BATCHES * max(1, self.config.learner.groups_per_step) for _ in self.shards)
        assert num_skipped <= most + MAX_SKIPPED_BATCHES * (stats["inserted"] - num_skipped)

    async def learner(self, num_steps: int) -> None:
        while self.step < num_steps:
            batch = await self.buffer.sample(self.step, self.config.learner.groups_per_step, 1000.0)
            assert batch is not None, f"the learner starved at step {self.step}"
            self.batches[self.step] = batch
            if self.rng.random() < 0.2:
                assert await self.buffer.sample(self.step, 1, 1000.0) == batch, (
                    "the learner lost it and asks again"
                )
            if self.rng.random() < 0.1:  # It goes back to its checkpoint.
                assert {
                    step: await self.buffer.sample(step, 1, 1000.0) for step in self.batches
                } == self.batches
            groups = decode_batch(batch).groups
            assert len({group.group_id for group in groups}) == len(groups)
            for group in groups:
                assert self.step - group.oldest_version <= self.config.buffer.max_staleness
                assert 1 <= group.uses <= self.config.buffer.uses_per_group
            await self.check_admission()
            await asyncio.sleep(self.rng.choice([0.0, 0.1, 3.0]))
            self.step += 1
            if self.rng.random() < 0.5:
                await self.buffer.set_step(self.step)
            if self.rng.random() < 0.3:
                await self.buffer.set_watermark(self.step)
                self.batches.clear()

    async def reaper(self) -> None:
        while True:
            await asyncio.sleep(self.rng.choice([0.3, 2.0, 30.0]))
            self.rng.choice(self.shards).kill()
            self.num_kills += 1

    async def run(self) -> dict[str, float]:
        actors = [asyncio.create_task(self.actor(f"actor-{i}")) for i in range(self.rng.randint(1, 4))]
        actors.append(asyncio.create_task(self.reaper()))
        learner = asyncio.create_task(self.learner(8))
        await asyncio.wait([learner, *actors], return_when=asyncio.FIRST_COMPLETED)
        for task in actors:
            task.cancel()
        outcomes = await asyncio.gather(*actors, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes), outcomes
        await learner
        stats = await check_sums(self.buffer)
        await self.buffer.close()
        return stats


class Finished(NamedTuple):
    """What is left of a schedule that has come to its end."""

    step: int
    num_kills: int
    max_staleness: int
    stats: dict[str, float]
    ledger: dict[str, Any]


def finish(seed: int, base: Path, num_shards: int = 1) -> Finished:
    """Runs one; it asserts the bounds while it runs."""

    async def run() -> tuple[Schedule, dict[str, float]]:
        schedule = Schedule(seed, str(base / str(seed)), num_shards)
        return schedule, await schedule.run()

    schedule, stats = run_virtually(run())
    ledger = audit_run(base / str(seed))
    return Finished(
        schedule.step,
        schedule.num_kills,
        schedule.config.buffer.max_staleness,
        stats,
        ledger,
    )


def finish_all(count: int, base: Path, **settings: int) -> list[Finished]:
    """On two cores."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as processes:
        return list(processes.map(partial(finish, base=base, **settings), range(count), chunksize=10))


NUM_SCHEDULES = {1: 700, 3: 300}


@pytest.fixture(scope="module", params=NUM_SCHEDULES, ids=lambda shards: f"{shards} shards")
def schedules(request, tmp_path_factory) -> list[Finished]:
    """1,000 finished random schedules."""
    return finish_all(
        NUM_SCHEDULES[request.param], tmp_path_factory.mktemp("schedules"), num_shards=request.param
    )


@pytest.mark.slow
def test_invariant_1_every_leased_item_ends_exactly_once(schedules):
    for *_, stats, ledger in schedules:
        status = ledger["status"]
        assert ledger["violations"] == []
        assert sum(status.values()) == stats["frontier"]
        assert status.get("leased", 0) + status.get("waiting", 0) == stats["leased"]
        assert status.get("failed", 0) == stats["failed"] + stats["evicted_too_small"]
        assert status.get("stored", 0) == stats["groups"]
        assert status.get("rested", 0) == stats["rested"]
        told = {name: ledger["evictions"].get(name, 0) for name in EVICTIONS}
        assert sum(ledger["evictions"].values()) == sum(stats[name] for name in EVICTIONS)
        assert all(told[name] <= stats[name] for name in told), (
            "a line that a kill took is written again, without its reason"
        )
    totals = {name: sum(schedule.stats[name] for schedule in schedules) for name in schedules[0].stats}
    assert sum(schedule.num_kills for schedule in schedules) > 100
    assert all(
        totals[name] > 100
        for name in (
            "duplicates",
            "reissued",
            "expired",
            "failed",
            "evicted_stale",
            "evicted_used",
            "evicted_equal",
            "equal_let_through",
            "rested",
        )
    ), totals


@pytest.mark.slow
def test_invariant_3_the_staleness_bound_holds_in_every_schedule(schedules):
    for schedule in schedules:
        assert schedule.ledger["max_staleness"] <= schedule.max_staleness
    assert max(schedule.ledger["max_staleness"] for schedule in schedules) == 3


@pytest.mark.slow
def test_invariant_4_no_schedule_deadlocks_or_exceeds_admission(schedules):
    assert all(schedule.step == 8 for schedule in schedules)
    assert sum(schedule.stats["wait_admission_s"] for schedule in schedules) > 0
    assert sum(schedule.stats["wait_batch_s"] for schedule in schedules) > 0


# Kills


def _serve_until_killed(run_dir: str, seed: int, acks: int) -> None:
    """An actor and a learner in the buffer's own process; tells every id after its acknowledgement."""

    async def work() -> None:
        rng = random.Random(seed)
        config = buffer_config(capacity=8, uses_per_group=2, max_staleness=2)
        buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
        os.write(acks, struct.pack("<q", -1))
        step = buffer._shard._step
        for life in itertools.count():
            actor = f"a.{life}"
            ordinals = ordinals_of(await buffer.lease(actor, rng.randint(1, 5), 0.0))
            keep = [ordinal for ordinal in ordinals if rng.random() < 0.8]
            for ordinal in await buffer.insert(actor, [make_payload(ordinal, step) for ordinal in keep]):
                os.write(acks, struct.pack("<q", ordinal))
            await buffer.fail(
                actor,
                [ordinal for ordinal in ordinals if ordinal not in keep and rng.random() < 0.5],
                "random",
            )
            if await buffer.sample(step, 2, 0.0):
                step += 1
            await buffer.release_actor(actor)

    asyncio.run(work())


@pytest.mark.slow
def test_invariant_2_an_acknowledged_group_survives_the_death_of_the_buffer(tmp_path):
    fork = multiprocessing.get_context("fork")
    rng = random.Random(1)
    acknowledged: list[int] = []
    for kill in range(25):
        reader, writer = os.pipe()
        process = fork.Process(target=_serve_until_killed, args=(str(tmp_path), kill, writer))
        process.start()
        os.close(writer)
        told = b""
        while len(told) < 8 * 25:  # However slow the machine is.
            told += (read := os.read(reader, 8))
            assert read, "the writer ended by itself"
        time.sleep(rng.uniform(0.0, 0.08))
        process.kill()
        process.join()
        with os.fdopen(reader, "rb") as pipe:
            told += pipe.read()
        acknowledged += [ordinal for (ordinal,) in struct.iter_unpack("<q", told) if ordinal >= 0]

    async def look() -> dict[str, float]:
        buffer = ReplayBuffer(
            buffer_config(capacity=8, uses_per_group=2, max_staleness=2), str(tmp_path), NUM_PROMPTS
        )
        assert all(not buffer._shard.admission.is_open(ordinal) for ordinal in acknowledged), (
            "an acknowledged group would be made again"
        )
        stats = await check_sums(buffer)
        await buffer.close()
        return stats

    stats = asyncio.run(look())
    ledger = audit(tmp_path / LEDGER_NAME)
    assert ledger["violations"] == []
    assert len(set(acknowledged)) == len(acknowledged) > 500
    assert ledger["events"]["inserted"] == stats["inserted"] >= len(acknowledged)
    assert ledger["status"].get("stored", 0) == stats["groups"]
