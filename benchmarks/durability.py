"""Measures what it costs that the buffer loses nothing: `make bench-buffer`, after benchmarks/buffer.py.

long       groups of eight episodes of 32k tokens: inserts and megabytes a CPU second against bare sqlite
beside     inserting and sampling them alone, and while another process writes a checkpoint of 1 GB
kill       groups that were acknowledged and lost when their writer was killed, and what that costs a second
reused     leases and batches at 1,000 and 100,000 stored groups, used again and again, with a curriculum

Takes two minutes. The buffer runs in this process: calls of Ray's are not in these figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.buffer import NUM_ROWS, bare_sqlite, make_config, make_payload
from benchmarks.pairs import compare, interleave, timed
from benchmarks.results import measure_load, save, show
from buffer.layout import store_name
from buffer.server import ReplayBuffer
from buffer.store import Store
from core.records import Group, Sample, VersionSpan, WorkItem, decode_group, encode

LONG_TOKENS, LONG_PROMPT, SAMPLES = 32_768, 2_048, 8
LONG_BATCH = 8
CHECKPOINT_BYTES = 2**30
NUM_KILLS = 5
STEP_GROUPS_PER_S = 131.0
"""Groups that a quickstart trains a second on two cores: what an insertion costs is told at this pace too."""


def long_payload(ordinal: int) -> bytes:
    """Returns a group of eight samples of 32k tokens, 2 MB encoded."""
    num_sampled = LONG_TOKENS - LONG_PROMPT
    rng = np.random.default_rng(ordinal)
    samples = tuple(
        Sample.one_turn(
            range(LONG_PROMPT),
            rng.integers(0, 150_000, num_sampled).tolist(),
            rng.standard_normal(num_sampled).tolist(),
            version_spans=(VersionSpan(0, 0, num_sampled),),
            finish_reason="stop",
            reward=float(number % 2),
        )
        for number in range(SAMPLES)
    )
    return encode(
        Group(group_id=ordinal, prompt_index=0, source_row=0, prompt="", samples=samples, actor="a")
    )


def decode_item(payload: bytes) -> WorkItem:
    """Returns the item that a lease gave."""
    return msgspec.msgpack.decode(payload, type=WorkItem)


def _percentiles(latencies_s: list[float]) -> dict[str, float]:
    return {f"p{rank}_ms": float(np.percentile(latencies_s, rank)) * 1e3 for rank in (50, 99)}


def _again(payload: bytes, ordinal: int) -> bytes:
    """Returns the group under another id; its samples stay encoded in the same number of bytes or so."""
    return encode(msgspec.structs.replace(decode_group(payload), group_id=ordinal))


def long_groups(rounds: int = 7, per_round: int = 8) -> dict[str, Any]:
    """Returns inserts and megabytes a CPU second of long groups, one a commit; the ratio to bare sqlite."""
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner() as runner:
        buffer = ReplayBuffer(make_config(), directory, NUM_ROWS)
        bare = bare_sqlite(Path(directory) / "bare.sqlite", "normal")
        count = rounds * per_round
        first = long_payload(0)
        payloads = [_again(first, ordinal) for ordinal in range(count)]
        runner.run(buffer.lease("a", count, 1.0))
        mine, theirs = iter(payloads), iter(enumerate(payloads))

        async def insert() -> None:
            for _ in range(per_round):
                await buffer.insert("a", [next(mine)])

        def insert_bare() -> None:
            for _ in range(per_round):
                bare.execute("INSERT INTO groups VALUES (?, ?)", next(theirs))

        clock = time.process_time
        calls = {"ours": timed(lambda: runner.run(insert()), clock), "bare": timed(insert_bare, clock)}
        found = interleave(calls, rounds)
        runner.run(buffer.close())
    per_s = per_round / float(np.median(found["ours"]))
    rates = {
        "inserts_per_cpu_s": per_s,
        "mb_per_cpu_s": per_s * len(first) / 1e6,
        "group_mb": len(first) / 1e6,
    }
    return rates | compare(found["bare"], found["ours"]).fields("of_bare")


def _write_checkpoint(path: str, has_begun: Any, is_done: Any) -> None:
    """Writes 1 GB to the disk, again until it is told that it is enough."""
    chunk = os.urandom(2**24)
    while not is_done.is_set():
        with open(path, "wb") as file:
            for _ in range(CHECKPOINT_BYTES // len(chunk)):
                file.write(chunk)
                has_begun.set()
                if is_done.is_set():
                    return
            os.fsync(file.fileno())


async def _insert_and_sample(buffer: ReplayBuffer, first: int, payload: bytes, count: int) -> dict[str, Any]:
    """Returns how long inserting one long group and sampling a batch of them takes, in turns."""
    inserts, samples = [], []
    for number in range(count):
        await buffer.lease("a", 1, 1.0)
        encoded = _again(payload, first + number)
        inserts.append(await _seconds(partial(buffer.insert, "a", [encoded])))
        step = first + number
        samples.append(await _seconds(partial(buffer.sample, step, LONG_BATCH, 1.0)))
    return {"insert": _percentiles(inserts), "sample": _percentiles(samples)}


async def _seconds(call: Callable[[], Awaitable[Any]]) -> float:
    start_s = time.perf_counter()
    await call()
    return time.perf_counter() - start_s


async def beside_a_checkpoint(count: int = 100) -> list[dict[str, Any]]:
    """Returns latencies of long groups, alone and beside a process that writes a checkpoint."""
    spawn = multiprocessing.get_context("spawn")
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        buffer = ReplayBuffer(make_config(), directory, NUM_ROWS)
        payload = long_payload(0)
        await buffer.lease("a", LONG_BATCH, 1.0)
        await buffer.insert("a", [_again(payload, ordinal) for ordinal in range(LONG_BATCH)])
        for turn, name in enumerate(("alone", "1 GB beside")):
            has_begun, is_done = spawn.Event(), spawn.Event()
            path = str(Path(directory) / "checkpoint")
            writer = spawn.Process(target=_write_checkpoint, args=(path, has_begun, is_done), daemon=True)
            if turn:
                writer.start()
                has_begun.wait(60.0)
            found = await _insert_and_sample(buffer, LONG_BATCH + turn * count, payload, count)
            is_done.set()
            if turn:
                writer.join()
            rows.append(
                {"": name} | {f"{what}_{key}": ms for what, row in found.items() for key, ms in row.items()}
            )
        await buffer.close()
    return rows


def _insert_until_killed(directory: str, acknowledged: Connection) -> None:
    async def work() -> None:
        buffer = ReplayBuffer(make_config(), directory, NUM_ROWS)
        await buffer.release_all()
        while True:
            for item in await buffer.lease("a", 100, 1.0) or []:
                (group_id,) = await buffer.insert("a", [make_payload(decode_item(item).ordinal)])
                acknowledged.send(group_id)

    asyncio.run(work())


def killed() -> dict[str, Any]:
    """Returns how many groups were acknowledged to writers that were killed, and how many are gone."""
    spawn = multiprocessing.get_context("spawn")
    told: set[int] = set()
    with tempfile.TemporaryDirectory() as directory:
        for kill in range(NUM_KILLS):
            reader, writer = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_insert_until_killed, args=(directory, writer))
            process.start()
            writer.close()
            told |= {reader.recv() for _ in range(200 + 37 * kill)}
            process.kill()
            process.join()
            with contextlib.suppress(EOFError):
                while True:
                    told.add(reader.recv())
        store = Store(Path(directory) / store_name(0, 1))
        kept = {group.group_id for group in store.load_groups()}
        store.close()
    return {"kills": NUM_KILLS, "acknowledged": len(told), "lost": len(told - kept)}


async def cost_of_durability(fsync: str, count: int = 1000) -> dict[str, Any]:
    """Returns what a group of 10 KB waits for the disk, and what that comes to at a quickstart's pace."""
    with tempfile.TemporaryDirectory() as directory:
        buffer = ReplayBuffer(make_config(fsync=fsync), directory, NUM_ROWS)
        await buffer.lease("a", count, 1.0)
        payloads = [make_payload(ordinal) for ordinal in range(count)]
        shard = buffer._shard
        flush, spent_s = shard._flush, 0.0

        def timed_flush() -> None:
            nonlocal spent_s
            start_s = time.perf_counter()
            flush()
            spent_s += time.perf_counter() - start_s

        shard._flush = timed_flush  # type: ignore[method-assign]
        whole_s = await _seconds(lambda: _insert_all(buffer, payloads))
        shard._flush = flush  # type: ignore[method-assign]
        await buffer.close()
    return {
        "fsync": fsync,
        "insert_us": whole_s / count * 1e6,
        "of_which_disk_us": spent_s / count * 1e6,
        "ms_a_second_of_quickstart": spent_s / count * 1e3 * STEP_GROUPS_PER_S,
    }


async def _insert_all(buffer: ReplayBuffer, payloads: list[bytes]) -> None:
    for payload in payloads:
        await buffer.insert("a", [payload])


async def reused(num_groups: int, count: int = 200) -> dict[str, Any]:
    """Returns latencies of leases and batches with so many stored groups, none of which leaves, while the
    prompts that are solved rest.
    """
    config = make_config("priority")
    config = config.model_copy(update={"data": config.data.model_copy(update={"curriculum": "1?reward=0"})})
    with tempfile.TemporaryDirectory() as directory:
        buffer = ReplayBuffer(config, directory, NUM_ROWS)
        for _ in range(num_groups // 500):
            items = [decode_item(item) for item in await buffer.lease("a", 500, 1.0) or []]
            await buffer.insert("a", [make_payload(item.ordinal, 2, 20) for item in items])
        leases, samples = [], []
        for step in range(count):
            leases.append(await _seconds(partial(buffer.lease, "a", 32, 1.0)))
            samples.append(await _seconds(partial(buffer.sample, step, 32, 1.0)))
        passed_over = (await buffer.stats())["buffer/rested"]
        await buffer.close()
    row: dict[str, Any] = {"groups": num_groups, "passed_over": passed_over}
    found = {"lease": _percentiles(leases), "sample": _percentiles(samples)}
    return row | {f"{what}_{key}": ms for what, each in found.items() for key, ms in each.items()}


def main() -> None:
    """Measures all rows, prints them and writes them to benchmarks/results/."""
    load = measure_load()
    result: dict[str, Any] = {"load": load, "long": long_groups()}
    show("groups of eight episodes of 32k tokens, one a commit, against bare sqlite", [result["long"]])
    result["beside"] = asyncio.run(beside_a_checkpoint())
    show("the same, in turns with batches of eight", result["beside"])
    result["kill"] = killed()
    show("writers killed", [result["kill"]])
    result["cost"] = [asyncio.run(cost_of_durability(fsync)) for fsync in ("normal", "full")]
    show("what an insertion of 10 KB waits for the disk", result["cost"])
    result["reused"] = [asyncio.run(reused(size)) for size in (1_000, 100_000)]
    show("reuse and a curriculum: leases of 32 items, batches of 32 groups", result["reused"])
    print(f"written to {save('durability', result)}")


if __name__ == "__main__":
    main()
