"""The buffer as actors and learner meet it: leases, acknowledgement, waits, restarts, kills; times are
virtual where they can be.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import msgspec
import pytest

from buffer.admission import MAX_LOSSES, LeaseError, work_item
from buffer.client import connect_buffer
from buffer.ledger import audit
from buffer.server import ReplayBuffer
from buffer.store import DiskFullError
from core.calls import Local
from core.errors import DataError
from core.records import WorkItem, decode_batch, decode_group, encode
from learner.catalogue import parse_config
from tests.support.buffers import (
    LEDGER_NAME,
    NUM_PROMPTS,
    check_sums,
    ids_of,
    make_offline_payload,
    make_payload,
    ordinals_of,
    scenario,
)
from tests.support.configs import buffer_config


@scenario
async def test_a_group_goes_from_lease_to_batch(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=4, uses_per_group=2, sampler="oldest"), run_dir, NUM_PROMPTS)
    items = [msgspec.msgpack.decode(item, type=WorkItem) for item in await buffer.lease("a", 3, 1.0)]
    assert items == [work_item(ordinal, seed=5, num_prompts=NUM_PROMPTS) for ordinal in range(3)]
    assert await buffer.insert("a", [make_payload(1), make_payload(0)]) == [1, 0]
    for use in (1, 2):
        batch = decode_batch(await buffer.sample(use, 2, 1.0) or b"")
        assert batch.step == use
        assert [(group.group_id, group.uses, len(group.samples)) for group in batch.groups] == [
            (1, use, 2),
            (0, use, 2),
        ]
    stats = await check_sums(buffer)
    assert (stats["groups"], stats["evicted_used"], stats["leased"], stats["frontier"]) == (0, 2, 1, 3)


@scenario
async def test_a_group_that_claims_to_be_used_arrives_unused(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=4, uses_per_group=2), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 1, 1.0)
    claims = msgspec.structs.replace(decode_group(make_payload(0)), uses=2)
    await buffer.insert("a", [encode(claims)])
    for use in (1, 2):
        assert [group.uses for group in decode_batch(await buffer.sample(use, 1, 1.0) or b"").groups] == [use]


@scenario
async def test_insertion_is_idempotent_also_after_the_group_has_left(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=4), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 4, 1.0)
    assert await buffer.insert("a", [make_payload(0), make_payload(0, version=3)]) == [0, 0]
    assert await asyncio.gather(*(buffer.insert("a", [make_payload(1)]) for _ in range(4))) == [[1]] * 4
    assert sorted(ids_of(await buffer.sample(0, 2, 1.0))) == [0, 1]
    assert await buffer.insert("a", [make_payload(0)]) == [0]
    stats = await check_sums(buffer)
    assert (stats["inserted"], stats["duplicates"], stats["groups"]) == (2, 5, 0)


@scenario
async def test_a_wrong_insert_changes_nothing(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=4), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 2, 1.0)
    with pytest.raises(LeaseError, match="group 9 was never leased"):
        await buffer.insert("a", [make_payload(0), make_payload(9)])
    with pytest.raises(DataError, match="reward nan"):
        await buffer.insert("a", [make_payload(0), make_payload(1, rewards=(1.0, float("nan")))])
    with pytest.raises(msgspec.ValidationError):
        await buffer.insert("a", [make_payload(0), encode(work_item(1, seed=0, num_prompts=1))])
    stats = await check_sums(buffer)
    assert (stats["inserted"], stats["leased"]) == (0, 2)


@scenario
async def test_failed_samples_are_counted_and_too_small_groups_not_stored(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=4), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 3, 1.0)
    payloads = [make_payload(0, rewards=(1.0, None, 0.5)), make_payload(1, rewards=(1.0, None, None))]
    assert await buffer.insert("a", payloads) == [0, 1], "both are acknowledged"
    await buffer.fail("a", [2], "prompt too long")
    stats = await check_sums(buffer)
    assert (stats["groups"], stats["evicted_too_small"], stats["failed"], stats["leased"]) == (1, 1, 1, 0)
    assert await buffer.error_summary() == (3, 6, {"ValueError: boom": 3})
    ledger = audit(f"{run_dir}/{LEDGER_NAME}")
    assert (ledger["violations"], ledger["status"]) == ([], {"stored": 1, "failed": 2})


@scenario
async def test_the_one_sample_left_of_a_group_waits_through_a_restart_for_the_next_such_group_of_its_row(
    run_dir,
):
    config = buffer_config(capacity=8, max_staleness=3)
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    await buffer.lease("a", 6, 1.0)
    await buffer.set_step(4)
    await buffer.insert("a", [make_payload(0, version=2, rewards=(0.25, None))])
    await buffer.close()

    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    await buffer.insert(
        "a",
        [
            make_payload(1, version=4, rewards=(1.0, None)),
            make_payload(2, version=4),
            make_payload(3, version=1, rewards=(None, 0.75)),
        ],
    )
    await buffer.set_step(5)
    await buffer.insert("a", [make_payload(4, version=4), make_payload(5, version=4, rewards=(None, 0.5))])
    groups = {group.group_id: group for group in decode_batch(await buffer.sample(5, 3, 1.0) or b"").groups}
    assert [sample.reward for sample in groups[1].samples] == [1.0, 0.25]
    assert (groups[1].oldest_version, groups[2].oldest_version) == (2, 4)
    assert len(groups[4].samples) == 2, "version 1 is stale at step 5"
    stats = await check_sums(buffer)
    assert [
        stats[name] for name in ("evicted_too_small", "held_samples", "joined_samples", "held_stale")
    ] == [3, 3, 1, 1]
    lines = [json.loads(line) for line in Path(run_dir, LEDGER_NAME).read_text().splitlines()]
    assert [line["reason"] for line in lines if line["event"] == "failed"] == ["too_small_held"] * 3
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []


@scenario
async def test_an_actor_whose_weights_are_too_old_for_the_next_batch_is_told_so_at_once_and_nobody_else_waits(
    run_dir,
):
    buffer = ReplayBuffer(buffer_config(capacity=2, max_staleness=0), run_dir, NUM_PROMPTS)
    assert len(await buffer.lease("a", 2, 1.0, 0) or []) == 2
    waiting = asyncio.create_task(buffer.lease("a", 2, 100.0, 0))
    await buffer.insert("a", [make_payload(0), make_payload(1)])
    assert not waiting.done(), "the buffer is full, but version 0 is new enough so far"
    assert ids_of(await buffer.sample(0, 2, 1.0)) == [0, 1]
    assert await waiting is None, "what version 0 generates now comes to step 1"
    assert await buffer.lease("a", 2, 100.0, 0) is None
    assert len(await buffer.lease("b", 1, 1.0, 1) or []) == 1
    assert len(await buffer.lease("feeder", 1, 1.0) or []) == 1, "offline samples have no version"
    stats = await check_sums(buffer)
    assert stats["evicted_stale"] == 0


@scenario
async def test_weights_that_are_not_published_yet_are_not_asked_for(run_dir):
    config = parse_config(
        {**buffer_config(capacity=8, max_staleness=1).model_dump(), "weights": {"publish_every": 3}}
    )
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    for step in range(3):  # Version 3 is published after step 2; until then nothing newer than 0 can be had.
        ordinals = ordinals_of(await buffer.lease("a", 2, 1.0, 0) or [])
        assert len(ordinals) == 2, step
        await buffer.insert("a", [make_payload(ordinal, version=max(0, step - 1)) for ordinal in ordinals])
        assert await buffer.sample(step, 2, 1.0) is not None
    assert await buffer.lease("a", 2, 1.0, 0) is None
    assert len(await buffer.lease("a", 2, 1.0, 3) or []) == 2


@scenario
async def test_offline_groups_are_stored_without_a_version_through_a_restart_and_never_stale(run_dir):
    config = buffer_config(capacity=4, max_staleness=1, uses_per_group=2)
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    await buffer.lease("offline", 2, 1.0)
    assert await buffer.insert("offline", [make_offline_payload(0), make_offline_payload(1)]) == [0, 1]
    assert len(ids_of(await buffer.sample(500, 2, 1.0))) == 2
    await buffer.close()
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    groups = decode_batch(await buffer.sample(900, 2, 1.0) or b"").groups
    assert [group.oldest_version for group in groups] == [None, None]
    assert (await check_sums(buffer))["evicted_used"] == 2
    result = audit(f"{run_dir}/{LEDGER_NAME}")
    assert (result["violations"], result["max_staleness"]) == ([], 0)


@scenario
async def test_a_lease_waits_for_admission_and_an_insert_wakes_the_learner(run_dir):
    clock = asyncio.get_running_loop().time
    buffer = ReplayBuffer(buffer_config(capacity=2), run_dir, NUM_PROMPTS)
    assert ordinals_of(await buffer.lease("a", 5, 1.0)) == [0, 1]
    assert await buffer.lease("b", 1, 7.0) == []
    assert clock() == pytest.approx(7.0)
    learner = asyncio.create_task(buffer.sample(0, 2, 100.0))
    waiting = asyncio.create_task(buffer.lease("b", 1, 50.0))
    await asyncio.sleep(3.0)
    assert (await check_sums(buffer))["wait_batch_s"] == pytest.approx(3.0), "a wait counts while it lasts"
    await buffer.insert("a", [make_payload(0), make_payload(1)])
    assert sorted(ids_of(await learner)) == [0, 1]
    assert ordinals_of(await waiting) == [2], "the groups that were consumed made room"
    assert clock() == pytest.approx(10.0)
    stats = await check_sums(buffer)
    assert (stats["wait_batch_s"], stats["wait_admission_s"]) == (pytest.approx(3.0), pytest.approx(10.0))


@scenario
async def test_leases_of_a_dead_actor_go_to_the_living_not_to_a_call_of_it_that_still_waits(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=2, max_staleness=1), run_dir, NUM_PROMPTS)
    ordinals = ordinals_of(await buffer.lease("a", 2, 1.0))
    of_the_dead = asyncio.create_task(buffer.lease("a", 2, 50.0))
    of_the_living = asyncio.create_task(buffer.lease("b", 2, 50.0))
    await asyncio.sleep(1.0)
    await buffer.release_actor("a")
    assert ordinals_of(await of_the_living) == ordinals
    assert await of_the_dead == []


@scenario
async def test_every_way_of_making_room_wakes_a_waiting_actor_at_once(run_dir):
    clock = asyncio.get_running_loop().time
    buffer = ReplayBuffer(buffer_config(capacity=2, max_staleness=1), run_dir, NUM_PROMPTS)
    ways_with_open_items = [
        lambda ordinals: buffer.fail("a", ordinals, "random"),
        lambda ordinals: buffer.give_back("a", ordinals),
        lambda ordinals: buffer.insert(
            "a", [make_payload(ordinal, rewards=(None, None)) for ordinal in ordinals]
        ),
    ]
    ways_with_stored_groups = [
        lambda _: buffer.sample(0, 2, 0.0),
        lambda _: buffer.set_step(2),
        lambda _: buffer.sample(2, 2, 0.0),  # finds stale groups only: no batch, but room
    ]
    ordinals = ordinals_of(await buffer.lease("a", 2, 1.0))
    for make_room in ways_with_open_items + ways_with_stored_groups:
        if make_room in ways_with_stored_groups:
            await buffer.insert("a", [make_payload(ordinal) for ordinal in ordinals])
        waiting = asyncio.create_task(buffer.lease("a", 2, 50.0))
        await asyncio.sleep(1.0)
        assert not waiting.done()
        start_s = clock()
        await make_room(ordinals)
        ordinals = ordinals_of(await waiting)
        assert (len(ordinals), clock()) == (2, start_s)


@scenario
async def test_a_batch_that_does_not_come_is_none(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=2), run_dir, NUM_PROMPTS)
    assert await buffer.sample(0, 1, 30.0) is None
    assert asyncio.get_running_loop().time() == pytest.approx(30.0)


@scenario
async def test_a_lease_that_runs_out_wakes_who_waits_and_its_late_insert_counts_once(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=2, timeout_s=10.0), run_dir, NUM_PROMPTS)
    await buffer.lease("dead", 2, 1.0)
    again = await buffer.lease("alive", 1, 100.0)
    assert asyncio.get_running_loop().time() == pytest.approx(10.0)
    assert again == [encode(work_item(0, seed=5, num_prompts=NUM_PROMPTS))], "the same item"
    assert await buffer.insert("dead", [make_payload(0)]) == [0]
    assert await buffer.insert("alive", [make_payload(0)]) == [0]
    stats = await check_sums(buffer)
    assert (stats["inserted"], stats["duplicates"], stats["reissued"], stats["expired"]) == (1, 1, 1, 2)
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []


@scenario
async def test_items_handed_back_or_of_an_actor_gone_are_issued_again(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=4), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 2, 1.0)
    await buffer.lease("b", 2, 1.0)
    waiting = asyncio.create_task(buffer.lease("c", 4, 50.0))
    await asyncio.sleep(1)
    await buffer.give_back("a", [1, 2])
    assert ordinals_of(await waiting) == [1], "2 is another's"
    await buffer.release_actor("b")
    assert ordinals_of(await buffer.lease("c", 4, 1.0)) == [2, 3]
    assert (await check_sums(buffer))["ignored_reports"] == 1


@scenario
async def test_the_learners_step_evicts_stale_groups_and_makes_room(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=2, max_staleness=3), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 2, 1.0)
    await buffer.insert("a", [make_payload(0, version=1), make_payload(1, version=2)])
    await buffer.set_step(4)
    assert (await check_sums(buffer))["evicted_stale"] == 0
    await buffer.set_step(5)
    assert (await check_sums(buffer))["evicted_stale"] == 1
    assert ordinals_of(await buffer.lease("a", 2, 1.0)) == [2]
    assert await buffer.sample(6, 1, 1.0) is None, "the last one went stale too"
    assert (await check_sums(buffer))["groups"] == 0


@scenario
async def test_reference_logprobs_are_cached_with_groups_still_stored(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=2, uses_per_group=2), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 1, 1.0)
    await buffer.insert("a", [make_payload(0, rewards=(1.0, None, 0.0))])
    await buffer.sample(0, 1, 1.0)
    with pytest.raises(DataError, match="expected 2 finite numbers"):
        await buffer.set_ref_logprobs({0: [-1.0, -2.0, -3.0]})
    assert await buffer.set_ref_logprobs({0: [-1.5, -2.5], 77: [-1.0]}) == 1
    (group,) = decode_batch(await buffer.sample(1, 1, 1.0) or b"").groups
    assert [sample.ref_logprob for sample in group.samples] == [-1.5, -2.5]
    assert group.uses == 2


@scenario
async def test_the_batch_of_a_step_is_the_same_batch_until_the_watermark_has_passed_it(run_dir):
    config = buffer_config(capacity=8, uses_per_group=2, groups_per_step=2)
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    await buffer.lease("a", 6, 1.0)
    await buffer.insert("a", [make_payload(ordinal) for ordinal in range(6)])
    batches = []
    for step in range(4):
        batches.append(await buffer.sample(step, 2, 1.0))
        await buffer.set_ref_logprobs({group_id: [-1.0, -2.0] for group_id in ids_of(batches[-1])})
    before = await check_sums(buffer)
    await buffer.close()
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    assert [await buffer.sample(step, 2, 1.0) for step in range(4)] == batches, (
        "also what was used up meanwhile, to the last bit"
    )
    after = await check_sums(buffer)
    assert after["taken"] == before["taken"] == 8
    await buffer.set_watermark(2)
    assert [await buffer.sample(step, 2, 1.0) for step in (2, 3)] == batches[2:]
    with pytest.raises(DataError, match="batch of step 1 was forgotten"):
        await buffer.sample(1, 2, 1.0)
    await buffer.set_watermark(4)
    assert buffer._shard.store._db.execute("SELECT count(*) FROM groups").fetchone()[0] == after["groups"], (
        "nothing is kept for nobody"
    )
    assert audit(f"{run_dir}/{LEDGER_NAME}")["max_staleness"] == 3


@scenario
async def test_items_given_in_an_answer_that_was_lost_are_issued_again_when_their_actor_asks_next(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=4), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 2, 1.0)
    assert ordinals_of(await buffer.lease("a", 1, 1.0, None, [0])) == [1], "it knows of 0 only"
    assert ordinals_of(await buffer.lease("a", 1, 1.0, None, [0, 1])) == [2]


@scenario
@pytest.mark.parametrize("num_shards", [1, 2])
async def test_a_generation_longer_than_the_timeout_is_not_issued_again_while_its_actor_works_on_it(
    run_dir, num_shards
):
    config = buffer_config(capacity=8, timeout_s=10.0, num_shards=num_shards)
    parts = [ReplayBuffer(config, run_dir, NUM_PROMPTS, shard) for shard in range(num_shards)]
    buffer = connect_buffer([Local(part) for part in parts])
    held = ordinals_of(await buffer.lease("slow", 2, 1.0))
    (lost,) = ordinals_of(await buffer.lease("dead", 1, 1.0))
    for number in range(40):
        await asyncio.sleep(4.0)
        if number % 2:
            await buffer.renew("slow", held)
        else:
            assert await buffer.lease("slow", 0, 0.0, None, held) == []
    again = ordinals_of(await buffer.lease("other", 8, 1.0))
    assert lost in again
    assert not set(again) & set(held)
    await buffer.insert("slow", [make_payload(ordinal) for ordinal in held])
    stats = await buffer.stats()
    assert [
        stats[f"buffer/{name}"] for name in ("inserted", "duplicates", "failed", "expired", "reissued")
    ] == [2, 0, 0, 1, 1]


@scenario
async def test_an_item_that_every_actor_dies_of_fails_in_the_end(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=2), run_dir, NUM_PROMPTS)
    for number in range(MAX_LOSSES):
        assert 0 in ordinals_of(await buffer.lease(f"actor-{number}", 2, 1.0))
        if number == 1:
            await buffer.close()
            buffer = ReplayBuffer(buffer_config(capacity=2), run_dir, NUM_PROMPTS)
        await buffer.give_back(f"actor-{number}", [1])
        await buffer.release_actor(f"actor-{number}")
    stats = await check_sums(buffer)
    assert (stats["lost_too_often"], stats["failed"]) == (1, 1)
    assert ordinals_of(await buffer.lease("last", 2, 1.0)) == [1, 2]
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []


@scenario
async def test_the_band_of_samples_per_insert_holds_back_the_learner_and_the_actors(run_dir):
    config = buffer_config(capacity=4, groups_per_step=2, uses_per_group=4, samples_per_insert=(1.0, 1.5))
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    await buffer.lease("a", 4, 1.0)
    await buffer.insert("a", [make_payload(ordinal) for ordinal in range(3)])
    for step in range(2):
        assert await buffer.sample(step, 2, 1.0) is not None
    assert await buffer.sample(2, 2, 10.0) is None, "4 + 2 > 1.5 * 3, and one more group is to come"
    await buffer.insert("a", [make_payload(3)])
    assert await buffer.sample(2, 2, 10.0) is not None
    assert len(await buffer.lease("a", 9, 1.0)) >= 2
    tight = ReplayBuffer(
        buffer_config(capacity=4, groups_per_step=2, uses_per_group=4, samples_per_insert=(2.0, 4.0)),
        f"{run_dir}/2",
        NUM_PROMPTS,
    )
    ordinals = ordinals_of(await tight.lease("a", 9, 1.0))
    await tight.insert("a", [make_payload(ordinal) for ordinal in ordinals])
    await tight.sample(0, 2, 1.0)
    assert len(ordinals_of(await tight.lease("a", 9, 1.0))) == 1, (
        "two uses pay for one group, though two were used"
    )
    await tight.sample(1, 2, 1.0)
    assert len(ordinals_of(await tight.lease("a", 9, 1.0))) == 1


@scenario
async def test_closing_ends_all_waits(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=2), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 2, 1.0)
    waits = asyncio.gather(buffer.lease("b", 1, 1e6), buffer.sample(0, 1, 1e6))
    await asyncio.sleep(1.0)
    await buffer.close()
    await buffer.close()
    assert await waits == [[], None]
    assert asyncio.get_running_loop().time() < 100


def test_a_core_inserts_and_samples_300_groups_per_second(tmp_path):
    num_groups = 600

    async def pump() -> float:
        buffer = ReplayBuffer(buffer_config(capacity=256, groups_per_step=32), str(tmp_path), NUM_PROMPTS)
        start_s = time.process_time()  # Of a core: what others on the machine do is not counted.
        for step in range(num_groups // 30):
            for _ in range(30):
                (ordinal,) = ordinals_of(await buffer.lease("a", 1, 1.0))
                await buffer.insert("a", [make_payload(ordinal, step, rewards=(1.0,) * 8)])
            assert await buffer.sample(step, 30, 1.0)
        return num_groups / (time.process_time() - start_s)

    groups_per_s = asyncio.run(pump())
    print(f"{groups_per_s:.0f} groups/s")
    assert groups_per_s > 300


@scenario
async def test_insertions_that_wait_together_are_one_transaction_and_each_is_acknowledged_after_it(
    run_dir, monkeypatch
):
    buffer = ReplayBuffer(buffer_config(capacity=32), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 12, 1.0)
    shard, happened = buffer._shard, []
    flush = shard.store.flush
    monkeypatch.setattr(shard.store, "flush", lambda: (flush(), happened.append("commit")))

    async def insert(ordinal: int) -> None:
        assert await buffer.insert("a", [make_payload(ordinal)]) == [ordinal]
        assert shard.store.num_pending == 0
        happened.append(ordinal)

    await asyncio.gather(*map(insert, range(8)))
    assert happened == ["commit", *range(8)]
    happened.clear()
    for ordinal in (8, 9):
        await insert(ordinal)
    assert happened == ["commit", 8, "commit", 9]
    happened.clear()
    # Another change takes along what is noted: then there is nothing left to commit.
    await asyncio.gather(insert(10), buffer.sample(0, 2, 1.0), insert(10), insert(11))
    assert happened.count("commit") == 2
    assert happened[0] == "commit"
    assert (await check_sums(buffer))["duplicates"] == 1


@scenario
async def test_insertions_that_a_full_disk_refused_together_are_all_refused_and_none_is_told_of_as_waiting(
    run_dir, monkeypatch
):
    buffer = ReplayBuffer(buffer_config(capacity=32), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 8, 1.0)
    flush = buffer._shard.store.flush

    def refuse() -> None:
        raise DiskFullError("no room")

    monkeypatch.setattr(buffer._shard.store, "flush", refuse)
    inserts = [asyncio.ensure_future(buffer.insert("a", [make_payload(ordinal)])) for ordinal in range(4)]
    await asyncio.sleep(0)
    assert (await buffer.stats())["buffer/changes_unwritten"] == 0, "nothing is wrong so far"
    assert all(
        isinstance(error, DiskFullError) for error in await asyncio.gather(*inserts, return_exceptions=True)
    )
    assert (await buffer.stats())["buffer/changes_unwritten"] > 0
    monkeypatch.setattr(buffer._shard.store, "flush", flush)
    again = [buffer.insert("a", [make_payload(ordinal)]) for ordinal in range(4)]
    assert await asyncio.gather(*again) == [[0], [1], [2], [3]]
    stats = await check_sums(buffer)
    assert (stats["inserted"], stats["duplicates"], stats["changes_unwritten"]) == (4, 4, 0)
