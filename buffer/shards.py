"""The shards of the replay buffer as one buffer, with the same methods for one shard or many.

An item belongs to shard `ordinal % num_shards`, and so does its group. Each shard admits its part of the
prompt stream and is durable by itself; nothing is kept here, so that every process may have its own
ShardedBuffer.

With several shards a batch is taken in proportion to what each could give, and is complete once all have
recorded their parts. A caller that dies in between, or a shard that does, leaves parts that the next call for
the step finds and completes. Waiting is apart from taking (`offer`, `changed_since`), so that a wait that is
given up takes nothing with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from buffer.server import Offer
from buffer.shard import forgotten
from buffer.store import DiskFullError
from core.records import decode_group, merge_batches

WAIT_S = 0.5
"""Limit of one wait on all shards: those given up are forgotten by their shard within that time."""
# Callers wait for all shards at once, and tell each how long.
_MEANS = ("buffer/wait_admission_s", "buffer/wait_batch_s")


class ShardedBuffer:
    """`shards`: ReplayBuffers, or anything whose methods of the same names return awaitables."""

    def __init__(self, shards: Sequence[Any]) -> None:
        self._shards = list(shards)
        self._turn = 0

    # Actors

    async def lease(
        self,
        actor: str,
        max_groups: int,
        timeout_s: float,
        version: int | None = None,
        holding: list[int] | None = None,
    ) -> list[bytes] | None:
        """As `ReplayBuffer.lease`."""
        if len(self._shards) == 1:
            return await self._shards[0].lease(actor, max_groups, timeout_s, version, holding)
        clock = asyncio.get_running_loop().time
        deadline_s, waited_s = clock() + timeout_s, 0.0
        if holding is not None:  # Every shard is told, whether it has something to lease or not.
            await self.renew(actor, holding)
        while True:
            offers = await self._all("offer", None, waited_s)
            items = await self._lease_offered(offers, actor, max_groups, version)
            left_s = deadline_s - clock()
            if items or items is None or left_s <= 0:
                return items
            waited_s = await self._wait_for_any(offers, left_s)

    async def renew(self, actor: str, holding: list[int]) -> None:
        """As `ReplayBuffer.renew`."""
        mine = [
            [ordinal for ordinal in holding if ordinal % len(self._shards) == index]
            for index in range(len(self._shards))
        ]
        await _gather(shard.renew(actor, part) for shard, part in zip(self._shards, mine, strict=True))

    async def insert(self, actor: str, payloads: list[bytes]) -> list[int]:
        """As `ReplayBuffer.insert`. When a shard refuses its part, the others may have taken theirs:
        send all again.
        """
        if len(self._shards) == 1:
            return await self._shards[0].insert(actor, payloads)
        parts = self._by_shard(payloads, lambda payload: decode_group(payload).group_id)
        await _gather(shard.insert(actor, part) for shard, part in parts)
        return [decode_group(payload).group_id for payload in payloads]

    async def fail(self, actor: str, ordinals: list[int], reason: str) -> None:
        """As `ReplayBuffer.fail`."""
        await _gather(shard.fail(actor, part, reason) for shard, part in self._by_shard(ordinals, int))

    async def give_back(self, actor: str, ordinals: list[int]) -> None:
        """As `ReplayBuffer.give_back`."""
        await _gather(shard.give_back(actor, part) for shard, part in self._by_shard(ordinals, int))

    async def release_actor(self, actor: str) -> None:
        """As `ReplayBuffer.release_actor`."""
        await self._all("release_actor", actor)

    async def release_all(self) -> None:
        """As `ReplayBuffer.release_all`."""
        await self._all("release_all")

    # Learner

    async def sample(self, step: int, num_groups: int, timeout_s: float) -> bytes | None:
        """As `ReplayBuffer.sample`."""
        if len(self._shards) == 1:
            return await self._shards[0].sample(step, num_groups, timeout_s)
        clock = asyncio.get_running_loop().time
        deadline_s, waited_s = clock() + timeout_s, 0.0
        while True:
            offers = await self._all("offer", step, waited_s)
            total = max(offer.total for offer in offers) or num_groups
            missing = total - sum(offer.recorded for offer in offers)
            # A shard that is past a step has seen its batch complete.
            if missing and any(offer.is_forgotten for offer in offers):
                raise forgotten(step)
            if missing <= sum(offer.num_takeable for offer in offers):
                shares = apportion(missing, [offer.num_takeable for offer in offers])
                asked = [
                    shard
                    for shard, offer, share in zip(self._shards, offers, shares, strict=True)
                    if offer.recorded or share
                ]
                shares = [
                    max(1, share)
                    for offer, share in zip(offers, shares, strict=True)
                    if offer.recorded or share
                ]
                parts = await _gather(
                    shard.sample(step, share, 0.0, total) for shard, share in zip(asked, shares, strict=True)
                )
                if all(part is not None for part in parts):
                    return merge_batches(parts)
            left_s = deadline_s - clock()
            if left_s <= 0:
                return None
            waited_s = await self._wait_for_any(offers, left_s)

    async def set_step(self, step: int) -> None:
        """As `ReplayBuffer.set_step`."""
        await self._all("set_step", step)

    async def set_watermark(self, step: int) -> None:
        """As `ReplayBuffer.set_watermark`."""
        await self._all("set_watermark", step)

    async def set_ref_logprobs(self, ref_logprobs: dict[int, list[float]]) -> int:
        """As `ReplayBuffer.set_ref_logprobs`."""
        parts = self._by_shard(ref_logprobs, int)
        return sum(
            await _gather(
                shard.set_ref_logprobs({key: ref_logprobs[key] for key in part}) for shard, part in parts
            )
        )

    # Everybody

    async def stats(self) -> dict[str, float]:
        """As `ReplayBuffer.stats`: sums over the shards, of waits the mean."""
        found = await self._all("stats")
        merged = {name: sum(stats[name] for stats in found) for name in found[0]}
        return merged | {name: merged[name] / len(found) for name in _MEANS}

    async def next_step(self) -> int:
        """As `ReplayBuffer.next_step`: of the shard that is furthest."""
        return max(await self._all("next_step"))

    async def error_summary(self) -> tuple[int, int, list[str]]:
        """As `ReplayBuffer.error_summary`."""
        found = await self._all("error_summary")
        return (
            sum(each[0] for each in found),
            sum(each[1] for each in found),
            [text for each in found for text in each[2]],
        )

    async def close(self) -> None:
        """As `ReplayBuffer.close`."""
        await self._all("close")

    async def _lease_offered(
        self, offers: Sequence[Offer], actor: str, max_groups: int, version: int | None
    ) -> list[bytes] | None:
        """Leases of the shards that have some, beginning with another shard every time; None when `version`
        is outdated.

        Raises DiskFullError only when no shard has given any: what one gave must reach the actor.
        """
        self._turn += 1
        items: list[bytes] = []
        for number in range(len(self._shards)):
            index = (self._turn + number) % len(self._shards)
            if not offers[index].num_leasable or len(items) == max_groups:
                continue
            try:
                answer = await self._shards[index].lease(actor, max_groups - len(items), 0.0, version)
            except DiskFullError:
                if items:
                    return items
                raise
            if answer is None:
                return items or None
            items += answer
        return items

    async def _wait_for_any(self, offers: Sequence[Offer], timeout_s: float) -> float:
        """Seconds until any shard changed since its offer, or a while passed. The other waits end by
        themselves, and take nothing.
        """
        clock = asyncio.get_running_loop().time
        start_s = clock()
        waits = [
            asyncio.ensure_future(_awaited(shard.changed_since(offer.change, min(timeout_s, WAIT_S))))
            for shard, offer in zip(self._shards, offers, strict=True)
        ]
        done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()
        for wait in done:
            wait.result()
        return clock() - start_s

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return await _gather(getattr(shard, method)(*arguments) for shard in self._shards)

    def _by_shard(self, things: Iterable[Any], id_of: Callable[[Any], int]) -> list[tuple[Any, list[Any]]]:
        parts: dict[int, list[Any]] = {}
        for thing in things:
            parts.setdefault(id_of(thing) % len(self._shards), []).append(thing)
        return [(self._shards[index], part) for index, part in parts.items()]


def apportion(total: int, available: Sequence[int]) -> list[int]:
    """Splits `total <= sum(available)` in proportion to `available`, by largest remainders; no part exceeds
    what is available.
    """
    have = sum(available)
    exact = [total * count / have if have else 0.0 for count in available]
    parts = [int(share) for share in exact]
    order = sorted(range(len(parts)), key=lambda index: exact[index] - parts[index], reverse=True)
    for index in order[: total - sum(parts)]:
        parts[index] += 1
    return parts


async def _gather(calls: Iterable[Any]) -> list[Any]:
    return list(await asyncio.gather(*(_awaited(call) for call in calls)))


async def _awaited(call: Any) -> Any:
    return await call
