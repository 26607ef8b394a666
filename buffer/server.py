"""One shard of the replay buffer as an asyncio class, with the waits of its callers.

A run wraps it as a Ray actor, tests run it as it is.

    actor    lease --> WorkItems ... renew ... insert(Groups) --> ids, acknowledged once committed; fail
    learner  sample(step) --> Batch ... set_ref_logprobs ... set_watermark(step of a checkpoint)

| wait   | of      | until                                    | ended by                                   |
|--------|---------|------------------------------------------|--------------------------------------------|
| lease  | actors  | open + stored-unconsumed < admitted, and | sample, eviction, fail, a lease that runs  |
|        |         | not held back, or an item is to be       | out                                        |
|        |         | issued again                             |                                            |
| lease  | actor   | its weights are new enough for the next  | a publication: it is told at once, and     |
|        |         | batch                                    | asks again (with several shards: when the  |
|        |         |                                          | items are there)                           |
| sample | learner | `num_groups` groups are stored           | insert                                     |

Neither waits for the other for ever: a learner waits only while fewer than `groups_per_step <= admitted`
groups are here, and then an actor may lease. For the band `samples_per_insert` it waits only while some
groups may still come.

Actors that wait are woken in the order in which they came, as many as there are items for: a change costs
the same with one actor waiting and with hundreds (buffer/waits.py).

All changes happen in shard.py, each in one synchronous section. Insertions that wait together are one
transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from pathlib import Path
from typing import NamedTuple

from buffer.shard import Shard
from buffer.sources import Part
from buffer.waits import Line, Waiter, WaitTimer
from core.config import Config
from core.newest import MAX_GONE, Newest
from core.records import encode


class Offer(NamedTuple):
    """What a shard has now.

    num_leasable    items that it would lease
    num_takeable    groups that a batch may take
    recorded        groups it gave to this step's batch, of `total` groups on all shards; 0 and 0: none
    is_forgotten    says that it is past the step, and has no part in its batch
    is_closed       says that nothing comes of it any more
    """

    num_leasable: int = 0
    num_takeable: int = 0
    recorded: int = 0
    total: int = 0
    is_forgotten: bool = False
    is_closed: bool = False


LOOK_AGAIN_S = 0.02
"""After so long the next caller is told of items that the one before was told of and has not come for."""


class ReplayBuffer:
    """Leases, groups and batches of one shard; it recovers what `run_dir` holds. Times come from the event
    loop's clock.

        buffer = ReplayBuffer(config, run_dir, num_prompts=300)
        items = await buffer.lease("actor-0", max_groups=4, timeout_s=1.0)
        await buffer.insert("actor-0", [encode(group)])
        payload = await buffer.sample(step=0, num_groups=32, timeout_s=1.0)

    Raises ConfigError when `run_dir` belongs to another prompt stream, StoreError when its database cannot be
    used.
    """

    def __init__(
        self, config: Config, run_dir: str, num_prompts: int, shard: int = 0, parts: tuple[Part, ...] = ()
    ) -> None:
        self._changed = asyncio.Event()
        self._line = Line()
        self._told: dict[str, Waiter] = {}  # By actor, its newest wait in `leasable`.
        self._alarm_s = math.inf  # When waits are looked at next, whatever changes.
        self._step_seen = 0
        self._is_closed = False
        self._shard = Shard(config, Path(run_dir), num_prompts, shard, self._notice, parts)
        self._gone: Newest[None] = Newest(MAX_GONE)
        self._admission_wait = WaitTimer()
        self._batch_wait = WaitTimer()

    # Actors

    async def lease(
        self,
        actor: str,
        max_groups: int,
        timeout_s: float,
        version: int | None = None,
        holding: list[int] | None = None,
    ) -> list[bytes] | None:
        """Returns up to `max_groups` encoded WorkItems as soon as one is admitted; none after `timeout_s`
        seconds or when closed.

        Returns None instead of a list when samples of policy `version` would be too stale for the next batch:
        the caller should ask again with newer weights. `holding` is what `renew` takes. Raises DiskFullError.
        """
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        if actor in self._gone:
            return []  # This call was on its way when the actor died.
        if holding is not None:
            self._shard.renew(actor, holding, clock())
        waiter = Waiter(actor, max_groups, version)
        ordinals: list[int] = []
        try:
            with self._admission_wait.running(clock):
                if self._shard.is_outdated(version):
                    return None
                ordinals = self._shard.lease(actor, max_groups, clock())
                while not ordinals and clock() < deadline_s and not self._is_closed:
                    await self._wait_in_line(waiter, deadline_s)
                    if actor in self._gone:
                        break  # The actor died while this call of it waited.
                    if self._shard.is_outdated(version):
                        return None
                    ordinals = self._shard.lease(actor, max_groups, clock())
        finally:
            if not ordinals and self._line:  # What it was woken for is for whoever comes next.
                self._line.wake(self._shard.num_admitted())
        return [encode(self._shard.item(ordinal)) for ordinal in ordinals]

    async def renew(self, actor: str, holding: list[int]) -> None:
        """Restarts the leases of the items that the actor still works on, so that a generation may take
        longer than `run.timeout_s`.

        Other items that it was given are issued again, since it does not know of them (an answer was lost
        with this process).
        """
        if actor not in self._gone:
            self._shard.renew(actor, holding, asyncio.get_running_loop().time())

    async def insert(self, actor: str, payloads: list[bytes]) -> list[int]:
        """Stores encoded, scored Groups; returns all their ids once that is durable: none of them need be
        sent again.

        Idempotent: an item ends once, whoever reports it, also after its lease ran out; later reports of it
        are counted as duplicates. Raises msgspec.ValidationError, DataError (unscored) or LeaseError (never
        leased), with nothing stored; DiskFullError: send them again later.

        Calls that came while a transaction was under way are written together by the next: none waits longer
        than for the one before it, and its own.
        """
        group_ids = self._shard.insert(actor, payloads)
        # Whoever else has come meanwhile is noted too, before the first of them commits.
        await asyncio.sleep(0)
        self._shard.commit()
        return group_ids

    async def fail(self, actor: str, ordinals: list[int], reason: str) -> None:
        """Ends items that cannot be generated. Ignored, and counted, for those that ended or are
        another actor's by now.
        """
        self._shard.fail(actor, ordinals, reason)

    async def give_back(self, actor: str, ordinals: list[int]) -> None:
        """Hands leases back unfinished; the items are issued again, first of all. Others than the
        actor's are ignored, counted.
        """
        self._shard.give_back(actor, ordinals)

    async def release_actor(self, actor: str) -> None:
        """Takes back all leases of an actor that is gone for good; calls of it that still wait, or come
        later, get none.
        """
        self._gone[actor] = None
        self._line.wake_those(lambda waiter: waiter.actor == actor)
        self._give_up(actor)
        self._shard.release_actor(actor)

    async def release_all(self) -> None:
        """Takes back the leases of all actors: they were those of an earlier start of the run."""
        self._gone.clear()
        self._shard.release_all()

    # Learner

    async def sample(
        self, step: int, num_groups: int, timeout_s: float, total: int | None = None
    ) -> bytes | None:
        """Returns the encoded Batch of learner step `step` as soon as `num_groups` groups are stored; None
        after `timeout_s` seconds or when closed.

        `Group.uses` counts this batch too: it is 1 at the first use. The same step again is the same batch,
        whatever `num_groups` says. `total` is the number of groups of the whole batch, when this is a part of
        one. Raises StalenessError rather than hand out a group older than `max_staleness`, and DataError for
        a step whose batch was forgotten.
        """
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        with self._batch_wait.running(clock):
            batch = self._shard.sample(step, num_groups, total or num_groups)
            while batch is None and clock() < deadline_s and not self._is_closed:
                await _until(self._changed, deadline_s)
                batch = self._shard.sample(step, num_groups, total or num_groups)
        return batch

    async def set_step(self, step: int) -> None:
        """Tells the learner's step: groups that no later batch may hold are evicted."""
        self._shard.advance(step)

    async def set_watermark(self, step: int) -> None:
        """Notes that a checkpoint of learner step `step` is durable: no batch before it will be asked for
        again.
        """
        self._shard.forget_batches(step)

    async def set_ref_logprobs(self, ref_logprobs: dict[int, list[float]]) -> int:
        """Caches reference log-prob sums (nats; group id -> one per sample, in the batch's order) with the
        groups still stored.

        Returns the number of groups updated. Raises DataError, nothing changed, for a wrong length or a
        non-finite value.
        """
        return self._shard.put_ref_logprobs(ref_logprobs)

    # Everybody

    async def offer(
        self,
        step: int | None = None,
        waited_s: float = 0.0,
        actor: str = "",
        holding: list[int] | None = None,
    ) -> Offer:
        """Returns what may be leased (step None), or what a batch of learner step `step` may take, now.

        It evicts what is stale at that step. `waited_s` is how long the caller has waited for the same since
        it last asked. A wait of `actor` in `leasable` ends: another shard has ended it. `holding` is what
        `renew` takes.
        """
        if self._is_closed:
            return Offer(is_closed=True)
        if step is None:
            if holding is not None:
                await self.renew(actor, holding)
            self._give_up(actor)
            self._admission_wait.add(waited_s)
            return Offer(num_leasable=self._shard.num_leasable(asyncio.get_running_loop().time()))
        self._batch_wait.add(waited_s)
        if batch := self._shard.recorded(step):
            return Offer(recorded=len(batch.entries), total=batch.total)
        if self._shard.is_past(step):
            return Offer(is_forgotten=True)
        self._shard.advance(step)
        return Offer(num_takeable=self._shard.num_takeable(step))

    async def leasable(self, actor: str, max_groups: int, timeout_s: float) -> None:
        """Returns as soon as there are items for the actor, whose turn it is, or after `timeout_s`.

        A wait of the same actor that came before ends: it has been given up.
        """
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        if actor in self._gone:
            await asyncio.sleep(timeout_s)  # This call was on its way when the actor died.
            return
        self._give_up(actor)
        waiter = self._told[actor] = Waiter(actor, max_groups)
        while not self._shard.num_leasable(clock()) and clock() < deadline_s and not self._is_closed:
            await self._wait_in_line(waiter, deadline_s)
            if self._told.get(actor) is not waiter or actor in self._gone:
                return
        self._give_up(actor)

    async def takeable(self, step: int, count: int, timeout_s: float) -> None:
        """Returns as soon as a batch of learner step `step` may take `count` groups here, or has been made,
        or after `timeout_s`.
        """
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        while not self._shard.is_past(step) and clock() < deadline_s and not self._is_closed:
            # What comes too old for the step would keep what is young enough from being leased.
            self._shard.advance(step)
            if self._shard.num_takeable(step) >= count:
                return
            await _until(self._changed, deadline_s)

    async def stats(self) -> dict[str, float]:
        """Returns the metrics; counts and waits are cumulative, counts over restarts too.

        At any time `frontier = inserted + evicted_too_small + failed + leased + rested`, and `inserted` is
        the sum of `groups` and of all buffer.replay.EVICTIONS.
        """
        now_s = asyncio.get_running_loop().time()
        values = self._shard.stats()
        values |= {
            "wait_admission_s": self._admission_wait.total_s(now_s),
            "wait_batch_s": self._batch_wait.total_s(now_s),
        }
        return {f"buffer/{name}": float(value) for name, value in values.items()}

    async def next_step(self) -> int:
        """Returns the learner step after the newest whose batch was asked for: no sample is of a newer
        version.
        """
        return self._shard.next_step

    async def error_summary(self) -> tuple[int, int, dict[str, int]]:
        """Returns samples that failed, samples in all, and the last error texts of this process: one of each
        kind, with how often that came, oldest first.
        """
        counts = self._shard.counts
        return counts["samples_error"], counts["samples_total"], self._shard.error_texts.newest()

    async def close(self) -> None:
        """Ends all waits and closes the files; a second call does nothing. What is open or stored stays so,
        for the next start.
        """
        self._is_closed = True
        self._shard.stop()
        self._shard.close()

    def _give_up(self, actor: str) -> None:
        """Ends the actor's wait in `leasable`, if there is one; who follows is told of what it leaves."""
        if (waiter := self._told.pop(actor, None)) is None:
            return
        waiter.num_items = 0
        waiter.woken.set()
        if self._line:
            self._set_alarm(asyncio.get_running_loop().time() + LOOK_AGAIN_S)

    async def _wait_in_line(self, waiter: Waiter, deadline_s: float) -> None:
        """Returns when there may be items for the waiter, or when the loop's clock shows `deadline_s`."""
        with self._line.waiting(waiter):
            self._set_alarm(self._shard.admission.next_expiry_s)
            await _until(waiter.woken, deadline_s)

    def _set_alarm(self, at_s: float) -> None:
        """Has the waits looked at when the loop's clock shows `at_s`: a lease runs out."""
        if at_s < self._alarm_s:
            self._alarm_s = at_s
            loop = asyncio.get_running_loop()
            loop.call_at(max(at_s, loop.time()), self._ring, at_s)

    def _ring(self, alarm_s: float) -> None:
        """Wakes the first who waits: it takes back the leases that ran out, and what changes wakes others."""
        if alarm_s != self._alarm_s:
            return  # An earlier one was set since.
        self._alarm_s = math.inf
        self._line.wake(1)
        if self._line:
            again_s = asyncio.get_running_loop().time() + LOOK_AGAIN_S
            self._set_alarm(max(self._shard.admission.next_expiry_s, again_s))

    def _notice(self) -> None:
        """Wakes whoever waits for what has changed."""
        self._changed.set()
        self._changed.clear()
        if not self._line:
            return
        if self._is_closed or self._shard.next_step != self._step_seen:
            self._step_seen = self._shard.next_step
            self._line.wake_those(lambda waiter: self._is_closed or self._shard.is_outdated(waiter.version))
        self._line.wake(self._shard.num_admitted())


async def _until(event: asyncio.Event, deadline_s: float) -> None:
    """Returns when the event is set, or when the loop's clock shows `deadline_s`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(deadline_s):
            await event.wait()
