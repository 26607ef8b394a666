"""The replay buffer as other processes see it: its shards as one buffer, whether there is one shard or many.

    actor, learner, driver --> BufferClient --> ShardClient --> ReplayBuffer (server.py) --> Shard (shard.py)

An item belongs to shard `ordinal % num_shards`, and so does its group. Each shard admits its part of the
prompt stream and is durable by itself; nothing is kept here, so that every process may have its own
BufferClient.

With several shards a batch is taken in proportion to what each could give, and is complete once all have
recorded their parts. A caller or a shard that dies in between leaves parts behind; the next call for the step
finds and completes them. Waiting is apart from taking (`offer`, `leasable`, `takeable`), so that a wait that
is given up takes nothing with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from buffer.outline import group_id_in
from buffer.refusals import forgotten
from buffer.server import Offer, ReplayBuffer
from buffer.store import DiskFullError
from buffer.usable import ErrorTexts
from core.calls import Client, as_call, asks
from core.records import merge_batches

T = TypeVar("T")

BUFFER = "the replay buffer"
# Callers wait for all shards at once, and tell each how long.
_MEANS = ("buffer/wait_admission_s", "buffer/wait_batch_s")


class ShardClient(Client):
    """One shard: what may be asked of its ReplayBuffer."""

    lease = asks(ReplayBuffer.lease)
    renew = asks(ReplayBuffer.renew)
    insert = asks(ReplayBuffer.insert)
    fail = asks(ReplayBuffer.fail)
    give_back = asks(ReplayBuffer.give_back)
    release_actor = asks(ReplayBuffer.release_actor)
    release_all = asks(ReplayBuffer.release_all)

    sample = asks(ReplayBuffer.sample)
    set_step = asks(ReplayBuffer.set_step)
    set_watermark = asks(ReplayBuffer.set_watermark)
    set_ref_logprobs = asks(ReplayBuffer.set_ref_logprobs)

    offer = asks(ReplayBuffer.offer)
    leasable = asks(ReplayBuffer.leasable)
    takeable = asks(ReplayBuffer.takeable)
    stats = asks(ReplayBuffer.stats)
    next_step = asks(ReplayBuffer.next_step)
    error_summary = asks(ReplayBuffer.error_summary)
    close = asks(ReplayBuffer.close)


class BufferClient:
    """All shards as one buffer. Its methods are those of a ReplayBuffer, and mean the same."""

    who = BUFFER

    def __init__(self, shards: Sequence[ShardClient]) -> None:
        self.shards = list(shards)
        self._turn = 0

    # Actors

    @as_call
    async def lease(
        self,
        actor: str,
        max_groups: int,
        timeout_s: float,
        version: int | None = None,
        holding: list[int] | None = None,
    ) -> list[bytes] | None:
        """Leases from the shards that have something, beginning with another shard every time."""
        if len(self.shards) == 1:
            return await self.shards[0].lease(actor, max_groups, timeout_s, version, holding)
        clock = asyncio.get_running_loop().time
        deadline_s, waited_s = clock() + timeout_s, 0.0
        # Told to all shards, also those that have nothing to lease; once.
        held = None if holding is None else self._by_shard(holding, int)
        while True:
            offers = await _gather(
                shard.offer(None, waited_s, actor, None if held is None else held.get(index, []))
                for index, shard in enumerate(self.shards)
            )
            held = None
            items = await self._lease_offered(offers, actor, max_groups, version)
            left_s = deadline_s - clock()
            if items or items is None or left_s <= 0 or any(offer.is_closed for offer in offers):
                return items
            waited_s = await _first(shard.leasable(actor, max_groups, left_s) for shard in self.shards)

    @as_call
    async def renew(self, actor: str, holding: list[int]) -> None:
        """Renews the leases at every shard, also where the actor holds nothing: what it does not name is lost
        to it.
        """
        parts = self._by_shard(holding, int)
        await _gather(shard.renew(actor, parts.get(index, [])) for index, shard in enumerate(self.shards))

    @as_call
    async def insert(self, actor: str, payloads: list[bytes]) -> list[int]:
        """Inserts each group at its shard. When a shard refuses its part, others may have taken theirs: send
        all again.
        """
        if len(self.shards) == 1:
            return await self.shards[0].insert(actor, payloads)
        groups = [(group_id_in(payload), payload) for payload in payloads]
        parts = self._by_shard(groups, lambda group: group[0])
        await _gather(
            self.shards[index].insert(actor, [payload for _, payload in part])
            for index, part in parts.items()
        )
        return [group_id for group_id, _ in groups]

    @as_call
    async def fail(self, actor: str, ordinals: list[int], reason: str) -> None:
        """Ends items that cannot be generated."""
        parts = self._by_shard(ordinals, int)
        await _gather(self.shards[index].fail(actor, part, reason) for index, part in parts.items())

    @as_call
    async def give_back(self, actor: str, ordinals: list[int]) -> None:
        """Hands leases back unfinished."""
        parts = self._by_shard(ordinals, int)
        await _gather(self.shards[index].give_back(actor, part) for index, part in parts.items())

    @as_call
    async def release_actor(self, actor: str) -> None:
        """Takes back all leases of an actor that is gone for good."""
        await _gather(shard.release_actor(actor) for shard in self.shards)

    @as_call
    async def release_all(self) -> None:
        """Takes back the leases of all actors."""
        await _gather(shard.release_all() for shard in self.shards)

    # Learner

    @as_call
    async def sample(self, step: int, num_groups: int, timeout_s: float) -> bytes | None:
        """Takes the batch of a learner step, in proportion to what each shard could give."""
        if len(self.shards) == 1:
            return await self.shards[0].sample(step, num_groups, timeout_s)
        clock = asyncio.get_running_loop().time
        deadline_s, waited_s = clock() + timeout_s, 0.0
        while True:
            offers = await _gather(shard.offer(step, waited_s) for shard in self.shards)
            parts = await self._take_parts(offers, step, num_groups)
            if parts is not None:
                return merge_batches(parts)
            left_s = deadline_s - clock()
            if left_s <= 0 or any(offer.is_closed for offer in offers):
                return None
            total = max(offer.total for offer in offers) or num_groups
            missing = total - sum(offer.num_takeable + offer.recorded for offer in offers)
            # Once all have enough together, one of them has got its share of what is missing.
            more = max(1, -(-missing // len(self.shards)))
            waited_s = await _first(
                shard.takeable(step, offer.num_takeable + more, left_s)
                for shard, offer in zip(self.shards, offers, strict=True)
                if not offer.recorded
            )

    @as_call
    async def set_step(self, step: int) -> None:
        """Tells the learner's step."""
        await _gather(shard.set_step(step) for shard in self.shards)

    @as_call
    async def set_watermark(self, step: int) -> None:
        """Tells that a checkpoint of learner step `step` is durable."""
        await _gather(shard.set_watermark(step) for shard in self.shards)

    @as_call
    async def set_ref_logprobs(self, ref_logprobs: dict[int, list[float]]) -> int:
        """Caches reference log-prob sums (nats; group id -> one per sample); the number of groups updated."""
        parts = self._by_shard(ref_logprobs, int)
        counts = await _gather(
            self.shards[index].set_ref_logprobs({key: ref_logprobs[key] for key in part})
            for index, part in parts.items()
        )
        return sum(counts)

    # Everybody

    @as_call
    async def stats(self) -> dict[str, float]:
        """The metrics of `ReplayBuffer.stats`: sums over the shards, and the means of waits."""
        found = await _gather(shard.stats() for shard in self.shards)
        merged = {name: sum(stats[name] for stats in found) for name in found[0]}
        return merged | {name: merged[name] / len(found) for name in _MEANS}

    @as_call
    async def next_step(self) -> int:
        """The learner step after the newest whose batch was asked for, of the shard that is furthest."""
        return max(await _gather(shard.next_step() for shard in self.shards))

    @as_call
    async def error_summary(self) -> tuple[int, int, dict[str, int]]:
        """Samples that failed, samples in all, and the last error texts of all shards, with their counts."""
        found = await _gather(shard.error_summary() for shard in self.shards)
        texts = ErrorTexts()
        for _, _, counts in found:
            texts.note(counts.items())
        return (
            sum(failed for failed, _, _ in found),
            sum(total for _, total, _ in found),
            texts.newest(),
        )

    @as_call
    async def close(self) -> None:
        """Ends all waits and closes the files."""
        await _gather(shard.close() for shard in self.shards)

    # Inside

    async def _lease_offered(
        self, offers: Sequence[Offer], actor: str, max_groups: int, version: int | None
    ) -> list[bytes] | None:
        """Leases of the shards that have some; None when `version` is outdated.

        Raises DiskFullError only when no shard has given any: what one gave must reach the actor.
        """
        self._turn += 1
        items: list[bytes] = []
        for number in range(len(self.shards)):
            index = (self._turn + number) % len(self.shards)
            if not offers[index].num_leasable or len(items) == max_groups:
                continue
            try:
                answer = await self.shards[index].lease(actor, max_groups - len(items), 0.0, version)
            except DiskFullError:
                if items:
                    return items
                raise
            if answer is None:
                return items or None
            items += answer
        return items

    async def _take_parts(self, offers: Sequence[Offer], step: int, num_groups: int) -> list[bytes] | None:
        """The parts of the step's batch; None while they are not enough. Raises DataError for a forgotten
        step.
        """
        total = max(offer.total for offer in offers) or num_groups
        missing = total - sum(offer.recorded for offer in offers)
        if missing and any(offer.is_forgotten for offer in offers):
            raise forgotten(step)  # A shard that is past a step has seen its batch complete.
        if missing > sum(offer.num_takeable for offer in offers):
            return None
        shares = apportion(missing, [offer.num_takeable for offer in offers])
        parts = await _gather(
            shard.sample(step, max(1, share), 0.0, total)
            for shard, offer, share in zip(self.shards, offers, shares, strict=True)
            if offer.recorded or share
        )
        taken = [part for part in parts if part is not None]
        return taken if len(taken) == len(parts) else None

    def _by_shard(self, things: Iterable[T], id_of: Callable[[T], int]) -> dict[int, list[T]]:
        """The things of each shard that has some, by its index."""
        parts: dict[int, list[T]] = {}
        for thing in things:
            parts.setdefault(id_of(thing) % len(self.shards), []).append(thing)
        return parts


def connect_buffer(handles: Sequence[object]) -> BufferClient:
    """The replay buffer whose shards are behind these handles."""
    if len(handles) == 1:
        return BufferClient([ShardClient(handles[0], BUFFER)])
    shards = (ShardClient(handle, f"shard {index} of {BUFFER}") for index, handle in enumerate(handles))
    return BufferClient(list(shards))


def apportion(total: int, available: Sequence[int]) -> list[int]:
    """Shares of `total <= sum(available)` in proportion to `available`, by largest remainders.

    No share is above what is available.
    """
    have = sum(available)
    exact = [total * count / have if have else 0.0 for count in available]
    parts = [int(share) for share in exact]
    order = sorted(range(len(parts)), key=lambda index: exact[index] - parts[index], reverse=True)
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts


async def _first(calls: Iterable[Awaitable[None]]) -> float:
    """Seconds until the first of them answered; the others end by themselves, and take nothing."""
    clock = asyncio.get_running_loop().time
    start_s = clock()
    waits = [asyncio.ensure_future(call) for call in calls]
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in pending:
        wait.cancel()
    for wait in done:
        wait.result()
    return clock() - start_s


async def _gather(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The answers of all, asked at once."""
    return list(await asyncio.gather(*calls))
