"""A buffer that starts again: after a kill, on a full disk, with a ledger that lost lines; and what a full disk costs."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator

import pytest

from buffer.ledger import audit, audit_run
from buffer.records import decode_batch
from buffer.server import ReplayBuffer
from buffer.store import DiskFullError
from cluster.errors import ConfigError
from tests.test_buffer_server import (
    LEDGER_NAME,
    NUM_ROWS,
    check_sums,
    ids_of,
    make_config,
    make_payload,
    ordinals_of,
    run_virtually,
    scenario,
)


@scenario
async def test_a_restart_goes_on_where_the_last_process_stood(run_dir):
    config = make_config(capacity=6, max_uses=2, sampler="oldest")
    buffer = ReplayBuffer(config, run_dir, NUM_ROWS)
    await buffer.lease("a", 6, 1.0)
    await buffer.insert("a", [make_payload(3), make_payload(1), make_payload(2, rewards=(None, None)), make_payload(4)])
    await buffer.sample(7, 2, 1.0)
    before = await check_sums(buffer)
    await buffer.close()

    buffer = ReplayBuffer(config, run_dir, NUM_ROWS)
    after = await check_sums(buffer)
    other = {"wait_admission_s", "wait_batch_s", "starts"}
    assert {name: value for name, value in after.items() if name not in other} == {k: v for k, v in before.items() if k not in other}
    assert (before["starts"], after["starts"]) == (1, 2)
    assert ordinals_of(await buffer.lease("b", 9, 1.0)) == [6, 7, 8], "open leases stay with their holder"
    assert await buffer.insert("a", [make_payload(0), make_payload(1)]) == [0, 1], "an actor that outlived the buffer"
    await buffer.release_all()
    assert ordinals_of(await buffer.lease("b", 4, 1.0)) == [5, 6, 7, 8]
    assert [(g.group_id, g.uses) for g in decode_batch(await buffer.sample(8, 4, 1.0) or b"").groups] == [(3, 2), (1, 2), (4, 1), (0, 1)]
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []


@scenario
async def test_another_prompt_stream_in_the_same_directory_is_refused(run_dir):
    await ReplayBuffer(make_config(), run_dir, NUM_ROWS).close()
    with pytest.raises(ConfigError, match=r"13 rows of data, now run\.seed = 5 and there are 14"):
        ReplayBuffer(make_config(), run_dir, 14)
    await ReplayBuffer(make_config(), run_dir, NUM_ROWS).close()


@contextlib.contextmanager
def full_disk(buffer: ReplayBuffer) -> Iterator[None]:
    """sqlite may not grow inside."""
    database = buffer._store._db
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.execute("PRAGMA max_page_count=1")  # That is: what it has.
    yield
    database.execute("PRAGMA max_page_count=100000")


@scenario
async def test_a_full_disk_refuses_insert_and_lease_and_training_goes_on_until_both_succeed(run_dir):
    buffer = ReplayBuffer(make_config(capacity=8, max_uses=2), run_dir, NUM_ROWS)
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
    assert await buffer.insert("a", [make_payload(ordinal, num_tokens=5000) for ordinal in (2, 3, 4)]) == [2, 3, 4]
    assert (await check_sums(buffer))["changes_unwritten"] == 0
    await buffer.close()
    buffer = ReplayBuffer(make_config(capacity=8, max_uses=2), run_dir, NUM_ROWS)
    after = await check_sums(buffer)
    assert (after["inserted"], after["taken"]) == (5, 6)
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []


def _train_on_a_full_disk(run_dir: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # No file may grow: every write is refused.

    async def train() -> None:
        buffer = ReplayBuffer(make_config(capacity=8), run_dir, NUM_ROWS)
        assert len(ids_of(await buffer.sample(0, 2, 1.0))) == 2
        with pytest.raises(DiskFullError):
            await buffer.lease("a", 1, 0.0)
        assert (await check_sums(buffer))["disk_errors"] >= 3

    asyncio.run(train())
    os._exit(0)


@scenario
async def test_a_buffer_that_was_killed_starts_again_on_a_full_disk_and_training_goes_on(run_dir):
    buffer = ReplayBuffer(make_config(capacity=8), run_dir, NUM_ROWS)
    await buffer.lease("a", 4, 1.0)
    await buffer.insert("a", [make_payload(0), make_payload(1), make_payload(2)])
    buffer._store.close()
    process = multiprocessing.get_context("fork").Process(target=_train_on_a_full_disk, args=(run_dir,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (await check_sums(ReplayBuffer(make_config(capacity=8), run_dir, NUM_ROWS)))["groups"] == 3


@pytest.mark.parametrize("num_lines_left", range(0, 15, 2))
def test_lines_that_the_ledger_lost_are_written_again_at_the_next_start(tmp_path, num_lines_left):
    async def scenario() -> None:
        buffer = ReplayBuffer(make_config(capacity=8, sampler="oldest"), str(tmp_path), NUM_ROWS)
        await buffer.lease("a", 6, 1.0)
        await buffer.insert("a", [make_payload(ordinal) for ordinal in range(4)])
        await buffer.fail("a", [4], "too long")
        assert ids_of(await buffer.sample(0, 2, 1.0)) == [0, 1]
        await buffer.close()
        path = tmp_path / LEDGER_NAME
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 15
        path.write_bytes(b"".join(lines[:num_lines_left]))
        buffer = ReplayBuffer(make_config(capacity=8, sampler="oldest"), str(tmp_path), NUM_ROWS)
        await buffer.insert("a", [make_payload(5)])
        await buffer.close()

    run_virtually(scenario())
    found = audit_run(tmp_path)
    assert found["violations"] == []
    assert found["balance"] == "6 generated = 2 trained + 3 buffered + 0 evicted + 1 failed + 0 in flight"


@scenario
async def test_what_a_full_disk_refused_and_a_kill_took_was_never_acknowledged(run_dir):
    buffer = ReplayBuffer(make_config(capacity=8), run_dir, NUM_ROWS)
    await buffer.lease("a", 3, 1.0)
    await buffer.insert("a", [make_payload(0)])
    with full_disk(buffer), pytest.raises(DiskFullError):
        await buffer.insert("a", [make_payload(1, num_tokens=5000)])
    buffer._store.close()  # As a kill: nothing is flushed.
    buffer = ReplayBuffer(make_config(capacity=8), run_dir, NUM_ROWS)
    stats = await check_sums(buffer)
    assert (stats["inserted"], stats["leased"]) == (1, 2), "the group is its actor's to send again"
    assert await buffer.insert("a", [make_payload(1), make_payload(2)]) == [1, 2]
    assert audit(f"{run_dir}/{LEDGER_NAME}")["violations"] == []
