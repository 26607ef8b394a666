"""A buffer that starts again: after a kill, on a full disk, with a ledger that lost lines; and what a
full disk costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from buffer.ledger import audit, audit_run
from buffer.server import ReplayBuffer
from buffer.store import DiskFullError, Store
from cluster.plan.virtual_time import run_virtually
from core.errors import ConfigError, DataError
from core.records import decode_batch
from tests.support.buffers import (
    LEDGER_NAME,
    NUM_PROMPTS,
    check_sums,
    ids_of,
    make_payload,
    ordinals_of,
    scenario,
)
from tests.support.configs import buffer_config


@scenario
async def test_a_restart_goes_on_where_the_last_process_stood(run_dir):
    config = buffer_config(capacity=6, uses_per_group=2, sampler="oldest")
    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    await buffer.lease("a", 6, 1.0)
    await buffer.insert(
        "a", [make_payload(3), make_payload(1), make_payload(2, rewards=(None, None)), make_payload(4)]
    )
    await buffer.sample(7, 2, 1.0)
    before = await check_sums(buffer)
    await buffer.close()

    buffer = ReplayBuffer(config, run_dir, NUM_PROMPTS)
    after = await check_sums(buffer)
    other = {"wait_admission_s", "wait_batch_s", "starts"}
    assert {name: value for name, value in after.items() if name not in other} == {
        k: v for k, v in before.items() if k not in other
    }
    assert (before["starts"], after["starts"]) == (1, 2)
    assert ordinals_of(await buffer.lease("b", 9, 1.0)) == [6, 7, 8], "open leases stay with their holder"
    assert await buffer.insert("a", [make_payload(0), make_payload(1)]) == [0, 1], (
        "an actor that outlived the buffer"
    )
    await buffer.release_all()
    assert ordinals_of(await buffer.lease("b", 4, 1.0)) == [5, 6, 7, 8]
    assert [(g.group_id, g.uses) for g in decode_batch(await buffer.sample(8, 4, 1.0) or b"").groups] == [
        (3, 2),
        (1, 2),
        (4, 1),
        (0, 1),
    ]
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []


@scenario
async def test_another_prompt_stream_in_the_same_directory_is_refused(run_dir):
    await ReplayBuffer(buffer_config(), run_dir, NUM_PROMPTS).close()
    with pytest.raises(ConfigError, match=r"13 usable prompts, now run\.seed = 5 and there are 14"):
        ReplayBuffer(buffer_config(), run_dir, 14)
    await ReplayBuffer(buffer_config(), run_dir, NUM_PROMPTS).close()


@contextlib.contextmanager
def full_disk(buffer: ReplayBuffer) -> Iterator[None]:
    """sqlite may not grow inside."""
    database = buffer._shard.store._db
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.execute("PRAGMA max_page_count=1")  # That is: what it has.
    try:
        yield
    finally:
        database.execute("PRAGMA max_page_count=100000")


@scenario
async def test_a_full_disk_refuses_insert_and_lease_and_training_goes_on_until_both_succeed(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=8, uses_per_group=2), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 6, 1.0)
    await buffer.insert("a", [make_payload(0), make_payload(1)])
    with full_disk(buffer):
        with pytest.raises(DiskFullError, match="Free space"):
            await buffer.insert("a", [make_payload(2, num_tokens=5000), make_payload(3, num_tokens=5000)])
        with pytest.raises(DiskFullError):
            await buffer.insert("a", [make_payload(4, num_tokens=5000)])
        with pytest.raises(DiskFullError):
            await buffer.lease("b", 2, 1.0)
        seen = [group_id for step in range(3) for group_id in ids_of(await buffer.sample(step, 2, 1.0))]
        assert len(seen) == 6, "also what could not be written is trained on"
        assert set(seen) <= {0, 1, 2, 3}
        stats = await check_sums(buffer)
        assert stats["disk_errors"] > 3
        assert stats["changes_unwritten"] > 0
    assert await buffer.insert("a", [make_payload(ordinal, num_tokens=5000) for ordinal in (2, 3, 4)]) == [
        2,
        3,
        4,
    ]
    assert (await check_sums(buffer))["changes_unwritten"] == 0
    await buffer.close()
    buffer = ReplayBuffer(buffer_config(capacity=8, uses_per_group=2), run_dir, NUM_PROMPTS)
    after = await check_sums(buffer)
    assert (after["inserted"], after["taken"]) == (5, 6)
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []


def _train_on_a_full_disk(run_dir: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # No file may grow: every write is refused.

    async def train() -> None:
        buffer = ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS)
        assert len(ids_of(await buffer.sample(0, 2, 1.0))) == 2
        with pytest.raises(DiskFullError):
            await buffer.lease("a", 1, 0.0)
        assert (await check_sums(buffer))["disk_errors"] >= 3

    asyncio.run(train())
    os._exit(0)


@scenario
async def test_a_buffer_that_was_killed_starts_again_on_a_full_disk_and_training_goes_on(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 4, 1.0)
    await buffer.insert("a", [make_payload(0), make_payload(1), make_payload(2)])
    buffer._shard.store.close()
    process = multiprocessing.get_context("fork").Process(target=_train_on_a_full_disk, args=(run_dir,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (await check_sums(ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS)))["groups"] == 3


@pytest.mark.parametrize("num_lines_left", range(0, 15, 2))
def test_lines_that_the_ledger_lost_are_written_again_at_the_next_start(tmp_path, num_lines_left):
    async def scenario() -> None:
        buffer = ReplayBuffer(buffer_config(capacity=8, sampler="oldest"), str(tmp_path), NUM_PROMPTS)
        await buffer.lease("a", 6, 1.0)
        await buffer.insert("a", [make_payload(ordinal) for ordinal in range(4)])
        await buffer.fail("a", [4], "too long")
        assert ids_of(await buffer.sample(0, 2, 1.0)) == [0, 1]
        await buffer.close()
        path = tmp_path / LEDGER_NAME
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 15
        path.write_bytes(b"".join(lines[:num_lines_left]))
        buffer = ReplayBuffer(buffer_config(capacity=8, sampler="oldest"), str(tmp_path), NUM_PROMPTS)
        await buffer.insert("a", [make_payload(5)])
        await buffer.close()

    run_virtually(scenario())
    found = audit_run(tmp_path)
    assert found["violations"] == []
    assert found["balance"] == "6 generated = 2 trained + 3 buffered + 0 evicted + 1 failed + 0 in flight"


@scenario
async def test_what_a_full_disk_refused_and_a_kill_took_was_never_acknowledged(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 3, 1.0)
    await buffer.insert("a", [make_payload(0)])
    with full_disk(buffer), pytest.raises(DiskFullError):
        await buffer.insert("a", [make_payload(1, num_tokens=5000)])
    buffer._shard.store.close()  # As a kill: nothing is flushed.
    buffer = ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS)
    stats = await check_sums(buffer)
    assert (stats["inserted"], stats["leased"]) == (1, 2), "the group is its actor's to send again"
    assert await buffer.insert("a", [make_payload(1), make_payload(2)]) == [1, 2]
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []


@scenario
async def test_reports_that_are_sent_again_and_again_to_a_full_disk_do_not_pile_up(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 3, 1.0)
    with full_disk(buffer):
        with pytest.raises(DiskFullError):
            await buffer.insert("a", [make_payload(1, num_tokens=5000)])
        waiting = (await check_sums(buffer))["changes_unwritten"]
        for _ in range(5):
            with pytest.raises(DiskFullError):
                await buffer.fail("a", [2], "refused")
        stats = await check_sums(buffer)
        assert (stats["changes_unwritten"], stats["failed"], stats["ignored_reports"]) == (waiting, 0, 0)
    await buffer.fail("a", [2], "refused")
    stats = await check_sums(buffer)
    assert (stats["changes_unwritten"], stats["failed"], stats["ignored_reports"]) == (0, 1, 0)


@scenario
async def test_what_a_full_disk_refused_is_written_at_the_end_where_there_is_room_by_then(run_dir):
    buffer = ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 3, 1.0)
    await buffer.insert("a", [make_payload(0)])
    with full_disk(buffer):
        with pytest.raises(DiskFullError):
            await buffer.insert("a", [make_payload(1, num_tokens=5000)])
        assert len(ids_of(await buffer.sample(0, 2, 1.0))) == 2
    await buffer.close()
    await buffer.close()
    stats = await check_sums(buffer := ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS))
    assert (stats["inserted"], stats["taken"], await buffer.next_step()) == (2, 2, 1), (
        "no group is trained on as if it were for the first time"
    )
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []


@scenario
async def test_a_kill_between_the_databases_commit_and_the_ledgers_line_loses_no_line_and_reads_nothing(
    run_dir, monkeypatch
):
    monkeypatch.setattr("buffer.shard.read_statuses", lambda *_: pytest.fail("the whole ledger was read"))
    buffer = ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS)
    await buffer.lease("a", 3, 1.0)
    monkeypatch.setattr(buffer._shard.ledger, "flush", lambda: None)  # The process is gone before it.
    await buffer.insert("a", [make_payload(0), make_payload(1)])
    await buffer.sample(0, 2, 1.0)
    buffer._shard.store.close()
    assert audit(f"{run_dir}/{LEDGER_NAME}")["status"] == {"leased": 3}
    buffer = ReplayBuffer(buffer_config(capacity=8), run_dir, NUM_PROMPTS)
    found = audit_run(run_dir)
    assert (found["violations"], found["events"]["trained"]) == ([], 2)
    assert found["balance"] == "3 generated = 2 trained + 0 buffered + 0 evicted + 0 failed + 1 in flight"


@scenario
async def test_what_the_ledger_has_for_certain_is_forgotten_by_the_database(run_dir, monkeypatch):
    monkeypatch.setattr("buffer.ledger.SYNC_BYTES", 1000)
    buffer = ReplayBuffer(buffer_config(capacity=64), run_dir, NUM_PROMPTS)
    for _ in range(30):
        (ordinal,) = ordinals_of(await buffer.lease("a", 1, 1.0))
        await buffer.insert("a", [make_payload(ordinal)])
    kept = sum(len(lines) for _, lines in buffer._shard.store.load_ledger())
    assert 0 < kept < 2000 < buffer._shard.ledger.end
    buffer._shard.store.close()
    path = Path(run_dir, LEDGER_NAME)
    whole = path.read_bytes()
    path.write_bytes(whole[: 500 - kept])  # A power cut.
    await ReplayBuffer(buffer_config(capacity=64), run_dir, NUM_PROMPTS).close()
    assert path.read_bytes() == whole


@scenario
async def test_a_start_takes_no_longer_after_ten_million_items(run_dir, monkeypatch):
    monkeypatch.setattr("buffer.shard.read_statuses", lambda *_: pytest.fail("the whole ledger was read"))
    buffer = ReplayBuffer(buffer_config(capacity=64), run_dir, NUM_PROMPTS)
    buffer._shard.admission.frontier, size = 10_000_000, 6 * 10**9
    await buffer.lease("a", 2, 1.0)
    await buffer.close()
    os.truncate(Path(run_dir, LEDGER_NAME), size)  # A hole where ten million items' lines would be.
    store = Store(Path(run_dir, "buffer.sqlite"))
    store.forget_ledger()
    store.put_state({**(store.load_state() or {}), "ledger_end": size})
    store.flush()
    store.close()
    start_s = time.process_time()  # What a disk is late with says nothing of the start.
    buffer = ReplayBuffer(buffer_config(capacity=64), run_dir, NUM_PROMPTS)
    assert ordinals_of(await buffer.lease("b", 1, 1.0)) == [10_000_002]
    assert time.process_time() - start_s < 1.0
    assert (await buffer.stats())["buffer/leased"] == 3


def test_ledgers_that_lack_lines_or_are_missing_beside_their_databases_are_told(tmp_path):
    async def fill() -> None:
        shards = [
            ReplayBuffer(buffer_config(capacity=8, num_shards=2), str(tmp_path), NUM_PROMPTS, shard)
            for shard in range(2)
        ]
        for shard in shards:
            await shard.lease("a", 3, 1.0)
            await shard.close()

    run_virtually(fill())
    assert audit_run(tmp_path)["violations"] == []
    path = tmp_path / "ledger-1.jsonl"
    whole = path.read_bytes()
    # Lines are gone, and none of those that are left tells of it.
    path.write_bytes(whole.partition(b"\n")[0] + b"\n")
    (violation,) = audit_run(tmp_path)["violations"]
    assert f"of the {len(whole)} that the buffer wrote: the rest is in buffer-1.sqlite" in violation
    store = Store(tmp_path / "buffer-1.sqlite")
    store.forget_ledger()  # As after more lines than the database keeps.
    store.flush()
    store.close()
    assert "lines are missing" in audit_run(tmp_path)["violations"][0]
    path.unlink()
    assert audit_run(tmp_path)["violations"] == [
        "ledger-1.jsonl is missing: buffer-1.sqlite, of the same shard, is there"
    ]
    (tmp_path / "ledger-0.jsonl").unlink()
    with pytest.raises(DataError, match=r"holds no ledger\*\.jsonl: buffer-0\.sqlite is there"):
        audit_run(tmp_path)
