"""The buffer's contract with 1 and 3 shards, as their users see it; what happens between the shards of
one batch.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from buffer.admission import LeaseError
from buffer.client import BufferClient, apportion, connect_buffer
from buffer.layout import store_name
from buffer.ledger import audit_run
from buffer.server import ReplayBuffer
from cluster.plan.virtual_time import run_virtually
from core.calls import Local
from core.errors import ConfigError, DataError
from core.records import decode_batch
from tests.support.buffers import NUM_PROMPTS, check_sums, ids_of, make_payload, ordinals_of
from tests.support.configs import buffer_config


def open_buffer(run_dir: str, num_shards: int, **buffer: Any) -> BufferClient:
    config = buffer_config(num_shards=num_shards, **buffer)
    parts = range(num_shards)
    return connect_buffer([Local(ReplayBuffer(config, run_dir, NUM_PROMPTS, shard)) for shard in parts])


def with_1_and_3_shards(test: Callable[..., Coroutine[Any, Any, None]]) -> Any:
    def run(tmp_path: Path, num_shards: int) -> None:
        run_virtually(test(str(tmp_path), num_shards))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return pytest.mark.parametrize("num_shards", [1, 3])(run)


async def fill(buffer: BufferClient, count: int, version: int = 0) -> list[int]:
    """Leases until `count` items are had, and inserts their groups."""
    ordinals: list[int] = []
    while len(ordinals) < count:
        ordinals += ordinals_of(await buffer.lease("a", count - len(ordinals), 1.0) or [])
    assert await buffer.insert("a", [make_payload(ordinal, version) for ordinal in ordinals]) == ordinals
    return ordinals


@with_1_and_3_shards
async def test_every_prompt_is_leased_once_and_every_group_trained_on(run_dir, num_shards):
    buffer = open_buffer(run_dir, num_shards, capacity=12, groups_per_step=6)
    leased, trained = [], []
    for step in range(10):
        leased += await fill(buffer, 6, version=step)
        trained += ids_of(await buffer.sample(step, 6, 1.0))
    assert sorted(leased) == sorted(trained)
    for shard in range(num_shards):  # Each leaves out nothing of its part of the stream.
        part = [ordinal for ordinal in sorted(leased) if ordinal % num_shards == shard]
        assert part == [shard + number * num_shards for number in range(len(part))]
    stats = await check_sums(buffer)
    assert (stats["inserted"], stats["taken"], stats["evicted_used"], stats["groups"]) == (60, 60, 60, 0)
    found = audit_run(run_dir)
    assert (found["violations"], found["balance"]) == (
        [],
        "60 generated = 60 trained + 0 buffered + 0 evicted + 0 failed + 0 in flight",
    )


@with_1_and_3_shards
async def test_admission_is_what_it_was_with_one_shard_and_room_wakes_who_waits(run_dir, num_shards):
    buffer = open_buffer(run_dir, num_shards, capacity=7, groups_per_step=4)
    held: list[int] = []
    while more := ordinals_of(await buffer.lease("a", 3, 0.0) or []):
        held += more
    assert sorted(held) == list(range(7)) if num_shards == 1 else len(held) == 7
    start_s = asyncio.get_running_loop().time()
    waiting = asyncio.ensure_future(buffer.lease("b", 1, 100.0))
    learner = asyncio.ensure_future(buffer.sample(0, 4, 100.0))
    await asyncio.sleep(3.0)
    await buffer.insert("a", [make_payload(ordinal) for ordinal in held])
    assert len(ids_of(await learner)) == 4
    assert len(await waiting or []) == 1
    assert asyncio.get_running_loop().time() == pytest.approx(start_s + 3.0)
    stats = await check_sums(buffer)
    assert stats["wait_admission_s"] == pytest.approx(3.0)
    assert stats["wait_batch_s"] == pytest.approx(3.0)


@with_1_and_3_shards
async def test_a_learner_that_goes_back_is_given_every_batch_again_also_by_shards_without_a_part_in_it(
    run_dir, num_shards
):
    settings = {"capacity": 12, "groups_per_step": 2}
    buffer = open_buffer(run_dir, num_shards, **settings)
    await fill(buffer, 12)
    batches = [await buffer.sample(step, 2, 1.0) for step in range(6)]
    assert [await buffer.sample(step, 2, 1.0) for step in range(6)] == batches
    await buffer.close()
    # A user may change it between two starts.
    buffer = open_buffer(run_dir, num_shards, **{**settings, "groups_per_step": 5})
    assert [await buffer.sample(step, 5, 0.0) for step in range(6)] == batches
    await buffer.set_watermark(3)
    assert await buffer.sample(3, 5, 0.0) == batches[3]
    with pytest.raises(DataError, match="the batch of step 2 was forgotten"):
        await buffer.sample(2, 5, 0.0)
    assert (await check_sums(buffer))["taken"] == 12


@with_1_and_3_shards
async def test_who_is_gone_is_given_nothing_any_more_until_the_run_starts_again(run_dir, num_shards):
    buffer = open_buffer(run_dir, num_shards, capacity=6, groups_per_step=2)
    await buffer.release_actor("a")
    assert await buffer.lease("a", 6, 0.0) == []
    assert len(await buffer.lease("b", 6, 0.0) or []) == 6
    await buffer.release_all()
    assert len(await buffer.lease("a", 6, 0.0) or []) == 6


@with_1_and_3_shards
async def test_reports_reach_the_shard_of_their_item_and_wrong_ones_are_refused(run_dir, num_shards):
    buffer = open_buffer(run_dir, num_shards, capacity=12, groups_per_step=4)
    ordinals: list[int] = []
    while len(ordinals) < 9:
        ordinals += ordinals_of(await buffer.lease("a", 9 - len(ordinals), 1.0) or [])
    await buffer.fail("a", ordinals[:3], "too long")
    await buffer.give_back("a", ordinals[3:6])
    with pytest.raises(LeaseError, match="never leased"):
        await buffer.insert("a", [make_payload(100)])
    assert (
        await buffer.insert("a", [make_payload(ordinal) for ordinal in (*ordinals[6:], *ordinals[6:])])
        == ordinals[6:] * 2
    )
    again: list[int] = []
    while not set(ordinals[3:6]) <= set(again):
        again += ordinals_of(await buffer.lease("b", 1, 1.0) or [])
    assert len(again) == len(set(again))
    await buffer.release_actor("b")
    stats = await check_sums(buffer)
    assert [stats[name] for name in ("failed", "inserted", "duplicates", "leased", "reissued")] == [
        3,
        3,
        3,
        len(again),
        3,
    ]
    assert await buffer.set_ref_logprobs({ordinal: [-1.0, -2.0] for ordinal in ordinals}) == 3


@with_1_and_3_shards
async def test_an_outdated_actor_is_told_so_by_every_shard(run_dir, num_shards):
    buffer = open_buffer(run_dir, num_shards, capacity=6, groups_per_step=6, max_staleness=0)
    await fill(buffer, 6)
    await buffer.sample(0, 6, 1.0)
    assert await buffer.lease("a", 6, 100.0, 0) is None
    assert len(await buffer.lease("a", 6, 100.0, 1) or []) == 6


@with_1_and_3_shards
async def test_all_shards_go_on_after_a_restart_with_leases_uses_and_batches(run_dir, num_shards):
    settings = {"capacity": 12, "groups_per_step": 6, "uses_per_group": 2}
    buffer = open_buffer(run_dir, num_shards, **settings)
    assert await buffer.next_step() == 0
    await fill(buffer, 9)
    held = ordinals_of(await buffer.lease("a", 3, 1.0) or [])
    batches = [await buffer.sample(step, 6, 1.0) for step in range(2)]
    before = await check_sums(buffer)
    await buffer.close()
    buffer = open_buffer(run_dir, num_shards, **settings)
    assert await buffer.next_step() == 2, "what a learner that starts anew must know"
    after = await check_sums(buffer)
    assert (before.pop("starts"), after.pop("starts")) == (num_shards, 2 * num_shards)
    waits = ("wait_admission_s", "wait_batch_s")
    assert {k: v for k, v in after.items() if k not in waits} == {
        k: v for k, v in before.items() if k not in waits
    }
    assert [await buffer.sample(step, 6, 1.0) for step in range(2)] == batches
    await buffer.release_all()
    assert set(held) <= {
        ordinal for _ in range(4) for ordinal in ordinals_of(await buffer.lease("b", 9, 1.0) or [])
    }
    await buffer.set_watermark(2)
    with pytest.raises(DataError, match="was forgotten"):
        await buffer.sample(1, 6, 1.0)
    tables = [sqlite3.connect(Path(run_dir) / store_name(shard, num_shards)) for shard in range(num_shards)]
    assert len(tables) == num_shards
    assert audit_run(run_dir)["violations"] == []


def test_a_batch_half_taken_when_its_caller_died_is_completed_by_the_next_call(tmp_path: Path) -> None:
    async def scenario() -> None:
        buffer = open_buffer(str(tmp_path), 3, capacity=12, groups_per_step=6)
        await fill(buffer, 12)
        part = decode_batch(await buffer.shards[1].sample(0, 2, 0.0, 6) or b"").groups
        batch = await buffer.sample(0, 6, 1.0)
        assert len(set(ids_of(batch))) == 6
        assert {group.group_id for group in part} <= set(ids_of(batch))
        assert await buffer.sample(0, 6, 1.0) == batch
        assert (await check_sums(buffer))["taken"] == 6

    run_virtually(scenario())


def test_a_batch_is_taken_in_proportion_to_what_each_shard_holds(tmp_path: Path) -> None:
    async def scenario() -> None:
        buffer = open_buffer(str(tmp_path), 3, capacity=30, groups_per_step=6)
        ordinals = ordinals_of([item for _ in range(3) for item in await buffer.lease("a", 10, 1.0) or []])
        kept = [ordinal for ordinal in ordinals if ordinal % 3 == 0] + [
            ordinal for ordinal in ordinals if ordinal % 3 == 1
        ][:5]
        await buffer.insert("a", [make_payload(ordinal) for ordinal in kept])
        batch = ids_of(await buffer.sample(0, 6, 1.0))
        assert sorted(group_id % 3 for group_id in batch) == [0, 0, 0, 0, 1, 1]

    run_virtually(scenario())


def test_another_number_of_shards_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        await open_buffer(str(tmp_path), 1).close()
        with pytest.raises(ConfigError, match=r"another buffer\.num_shards than 3: it holds buffer\.sqlite"):
            open_buffer(str(tmp_path), 3)

    run_virtually(scenario())


@pytest.mark.parametrize(
    ("total", "available", "parts"),
    [(6, [10, 5, 0], [4, 2, 0]), (3, [1, 1, 1], [1, 1, 1]), (0, [0, 0], [0, 0]), (1, [9, 1], [1, 0])],
)
def test_apportion(total: int, available: list[int], parts: list[int]) -> None:
    assert apportion(total, available) == parts


class Counted(Local):
    """A handle that notes which methods were called, in order."""

    def __init__(self, part: object) -> None:
        super().__init__(part)
        self.called: list[str] = []

    def __getattr__(self, method: str) -> Any:
        self.called.append(method)
        return super().__getattr__(method)


def test_a_lease_asks_each_shard_once_and_says_in_that_what_the_actor_holds(tmp_path):
    async def scene() -> None:
        config = buffer_config(num_shards=3, capacity=12, groups_per_step=6)
        parts = [ReplayBuffer(config, str(tmp_path), NUM_PROMPTS, shard) for shard in range(3)]
        handles = [Counted(part) for part in parts]
        buffer = connect_buffer(handles)
        lost = ordinals_of(await buffer.lease("a", 1, 0.0) or [])
        for handle in handles:
            handle.called.clear()

        held = ordinals_of(await buffer.lease("a", 12, 0.0, None, []) or [])

        assert set(lost) <= set(held), "what the actor does not name is issued again"
        assert sorted(name for handle in handles for name in handle.called) == [
            *["lease"] * 3,
            *["offer"] * 3,
        ]
        assert ordinals_of(await buffer.lease("a", 12, 0.0, None, held) or []) == []
        await check_sums(buffer)

    run_virtually(scene())
