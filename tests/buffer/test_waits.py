"""Whose turn it is, and that a change costs the same however many wait."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import pytest

from buffer.client import connect_buffer
from buffer.server import ReplayBuffer
from buffer.waits import Line, Waiter
from cluster.plan.virtual_time import run_virtually
from core.calls import Local
from tests.support.buffers import NUM_PROMPTS, make_payload, ordinals_of, scenario
from tests.support.configs import buffer_config

NUM_WAITING = 40


def waiting_in(stack: contextlib.ExitStack, line: Line, *sizes: int) -> list[Waiter]:
    found = [Waiter(f"actor-{number}", size) for number, size in enumerate(sizes)]
    for waiter in found:
        stack.enter_context(line.waiting(waiter))
    return found


def woken(line: list[Waiter]) -> list[bool]:
    return [waiter.woken.is_set() for waiter in line]


def test_the_first_are_woken_and_no_more_than_there_are_items_for():
    line = Line()
    with contextlib.ExitStack() as stack:
        waiting = waiting_in(stack, line, 4, 4, 4)
        line.wake(5)
        assert woken(waiting) == [True, True, False]
        line.wake(5)
        assert woken(waiting) == [True, True, False], "who was woken and has not come yet counts"
        line.wake(9)
        assert woken(waiting) == [True, True, True]


def test_who_was_woken_for_nothing_is_the_first_again():
    line = Line()
    late = Waiter("late", 1)
    with line.waiting(late):
        line.wake(1)
    with contextlib.ExitStack() as stack:
        (other,) = waiting_in(stack, line, 1)
        stack.enter_context(line.waiting(late))
        assert not late.woken.is_set()
        line.wake(1)
        assert woken([late, other]) == [True, False]
    assert not len(line)


class Counted:
    """Counts what is asked of a part."""

    def __init__(self, part: Any, counts: Counter[str]) -> None:
        self._part, self._counts = part, counts

    def __getattr__(self, name: str) -> Any:
        self._counts[name] += 1
        return getattr(self._part, name)


def test_a_batch_wakes_as_many_waiting_actors_as_it_makes_room_for(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        buffer = ReplayBuffer(buffer_config(capacity=4, groups_per_step=2), str(tmp_path), NUM_PROMPTS)
        ordinals = ordinals_of(await buffer.lease("first", 4, 1.0) or [])
        waits = [asyncio.create_task(buffer.lease(f"actor-{n}", 1, 100.0)) for n in range(NUM_WAITING)]
        await asyncio.sleep(0.1)
        lease, asked = buffer._shard.lease, []
        monkeypatch.setattr(
            buffer._shard, "lease", lambda actor, *more: (asked.append(actor), lease(actor, *more))[1]
        )
        await buffer.insert("first", [make_payload(ordinal) for ordinal in ordinals])
        await asyncio.sleep(0.1)
        assert asked == [], "an insertion makes room for nobody"
        await buffer.sample(0, 2, 1.0)
        await asyncio.sleep(0.1)
        assert asked == ["actor-0", "actor-1"], "those that came first, and nobody else"
        await buffer.close()
        answers = await asyncio.gather(*waits)
        assert [len(items or []) for items in answers] == [1, 1, *[0] * (NUM_WAITING - 2)]

    run_virtually(run())


@scenario
async def test_calls_of_actors_that_wait_at_several_shards_do_not_grow_with_what_others_do(run_dir):
    config = buffer_config(capacity=6, groups_per_step=3, num_shards=3)
    counts: Counter[str] = Counter()
    shards = [ReplayBuffer(config, run_dir, NUM_PROMPTS, shard) for shard in range(3)]
    buffer = connect_buffer([Counted(Local(shard), counts) for shard in shards])
    ordinals = ordinals_of([item for _ in range(3) for item in await buffer.lease("first", 6, 0.0) or []])
    waits = [asyncio.ensure_future(buffer.lease(f"actor-{n}", 1, 100.0)) for n in range(NUM_WAITING)]
    await asyncio.sleep(0.1)
    counts.clear()
    for ordinal in ordinals:
        await buffer.insert("first", [make_payload(ordinal)])
    await asyncio.sleep(0.1)
    assert set(counts) == {"insert"}
    await buffer.sample(0, 3, 1.0)
    await asyncio.sleep(1.0)
    assert sum(wait.done() for wait in waits) == 3
    assert counts["offer"] + counts["leasable"] < NUM_WAITING, counts
    for wait in waits:
        wait.cancel()


@scenario
async def test_items_whose_turn_was_given_up_go_to_those_that_wait_behind(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=2, groups_per_step=1), run_dir, NUM_PROMPTS)
    await buffer.lease("first", 2, 1.0)
    gone = asyncio.create_task(buffer.leasable("gone", 2, 100.0))  # Is told, and never comes.
    behind = asyncio.create_task(buffer.lease("behind", 2, 100.0))
    await asyncio.sleep(0.1)
    await buffer.release_actor("first")
    await gone
    assert len(await asyncio.wait_for(behind, 1.0) or []) == 2


@pytest.mark.parametrize("who", ["dying", "cancelled"])
def test_what_a_wait_was_woken_for_and_does_not_take_goes_to_who_waits_behind(
    who: str, tmp_path: Any
) -> None:
    async def run() -> None:
        buffer = ReplayBuffer(buffer_config(capacity=4, groups_per_step=1), str(tmp_path), NUM_PROMPTS)
        await buffer.lease("dying", 4, 1.0)
        head = asyncio.create_task(buffer.lease(who, 4, 100.0))
        behind = asyncio.create_task(buffer.lease("behind", 4, 100.0))
        await asyncio.sleep(0.1)
        await buffer.release_actor("dying")
        if who == "dying":
            assert await head == []
        else:
            head.cancel()
        assert len(await asyncio.wait_for(behind, 0.5) or []) == 4

    run_virtually(run())


@scenario
async def test_a_wait_that_another_shard_has_ended_takes_no_turn(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=2, groups_per_step=1), run_dir, NUM_PROMPTS)
    await buffer.lease("first", 2, 1.0)
    served = [asyncio.create_task(buffer.leasable(f"served-{n}", 2, 100.0)) for n in range(NUM_WAITING)]
    behind = asyncio.create_task(buffer.lease("behind", 2, 100.0))
    await asyncio.sleep(0.1)
    for number in range(NUM_WAITING):
        await buffer.offer(None, 0.0, f"served-{number}")
    await asyncio.gather(*served)
    await buffer.release_actor("first")
    assert len(await asyncio.wait_for(behind, 0.1) or []) == 2


@scenario
async def test_closed_shards_end_the_calls_of_their_client(run_dir):
    config = buffer_config(capacity=6, groups_per_step=3, num_shards=3)
    shards = [ReplayBuffer(config, run_dir, NUM_PROMPTS, shard) for shard in range(3)]
    buffer = connect_buffer([Local(shard) for shard in shards])
    waits = [asyncio.ensure_future(buffer.lease("a", 1, 100.0)) for _ in range(2)]
    await asyncio.gather(*waits)
    learner = asyncio.ensure_future(buffer.sample(0, 3, 100.0))
    await asyncio.sleep(0.1)
    await buffer.close()
    assert await asyncio.wait_for(learner, 1.0) is None
    assert await asyncio.wait_for(asyncio.ensure_future(buffer.lease("b", 6, 100.0)), 1.0) == []
