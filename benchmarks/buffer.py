"""Measures what the replay buffer costs: `make bench-buffer`. One process, ratios within one run.

rate       CPU time of a durable insertion, one a commit and eight, against bare sqlite that commits the same
           bytes with the same pragmas as often, and against a store written by hand; samples per second
latency    p50 and p99 of a batch of 32 groups at 1,000, 10,000 and 100,000 stored groups: must not grow
recovery   opening again, per 10,000 groups
memory     resident bytes at 100,000 groups; the payloads stay on disk
"""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.pairs import compare
from benchmarks.results import measure_load, save, show
from buffer.server import ReplayBuffer
from buffer.store import WAL_PAGES
from core.config import Config
from core.records import Group, Sample, VersionSpan, decode_group, encode
from learner.catalogue import parse_config

NUM_ROWS = 1000
BATCH_GROUPS = 32
ROUNDS = 15
SIZES = (1_000, 10_000, 100_000)
SAMPLERS = ("uniform", "fresh", "oldest", "stratified", "priority")


def make_config(sampler: str = "uniform", fsync: str = "normal", capacity: int = 1_000_000) -> Config:
    """Returns a config whose buffer admits everything and forgets nothing."""
    tree = {
        "model": {"path": "none"},
        "data": {"path": "none"},
        "rewards": {"functions": {"exact_match": 1.0}},
        "learner": {"groups_per_step": BATCH_GROUPS},
        "buffer": {
            "sampler": sampler,
            "fsync": fsync,
            "capacity": capacity,
            "max_staleness": 1_000_000,
            "uses_per_group": 1_000_000,
        },
        "checkpoint": {"every": 0},
    }
    return parse_config(tree)


def make_payload(ordinal: int, num_samples: int = 8, num_tokens: int = 100) -> bytes:
    """Returns a group of about 10 KiB: 8 samples of 100 tokens."""
    samples = tuple(
        Sample.one_turn(
            range(50),
            range(1000, 1000 + num_tokens),
            (-0.5,) * num_tokens,
            version_spans=(VersionSpan(ordinal % 50, 0, num_tokens),),
            finish_reason="stop",
            text="four" * 30,
            reward=float(number % 2),
        )
        for number in range(num_samples)
    )
    return encode(
        Group(group_id=ordinal, prompt_index=0, source_row=0, prompt="p" * 100, samples=samples, actor="a")
    )


def bare_sqlite(path: Path, fsync: str) -> sqlite3.Connection:
    """Returns a bare database with the pragmas of the buffer's own, and one table of payloads."""
    bare = sqlite3.connect(path, isolation_level=None)
    pragmas = ("locking_mode=EXCLUSIVE", "journal_mode=WAL", f"wal_autocheckpoint={WAL_PAGES}")
    for pragma in (*pragmas, f"synchronous={fsync.upper()}"):
        bare.execute(f"PRAGMA {pragma}")
    bare.execute("CREATE TABLE groups (group_id INTEGER PRIMARY KEY, payload BLOB)")
    return bare


async def rates(fsync: str, together: int = 1) -> dict[str, float]:
    """Returns what a durable insertion costs when so many are one commit, and groups sampled per second.

    `ratio` is bare sqlite's cost, which commits as many bytes as often, as a share of what insertions cost
    that wait together; `one_call` the same where one call brings them, as an actor's does; `by_hand` what the
    shortest store that checks its groups costs, as a share of that. All are CPU time, in which other programs
    on the machine hardly count.
    """
    with tempfile.TemporaryDirectory() as directory:
        buffer = ReplayBuffer(make_config(fsync=fsync), directory, NUM_ROWS)
        bare = bare_sqlite(Path(directory) / "bare.sqlite", fsync)
        by_hand = bare_sqlite(Path(directory) / "by_hand.sqlite", fsync)
        by_hand.execute("CREATE TABLE leases (ordinal INTEGER PRIMARY KEY, actor TEXT)")
        per_round, next_ids = 208, Counter[object]()
        places = {"ours": buffer, "one_call": buffer, "by_hand": by_hand, "bare": bare}
        found: dict[str, list[float]] = {name: [] for name in (*places, "ours_s")}
        for turn in range(ROUNDS):
            for name in tuple(places)[:: 1 if turn % 2 else -1]:
                next_id = next_ids[places[name]]
                next_ids[places[name]] += per_round
                payloads = [make_payload(next_id + number) for number in range(per_round)]
                if name == "by_hand":
                    leases = [(next_id + number, "a") for number in range(per_round)]
                    by_hand.executemany("INSERT INTO leases VALUES (?, ?)", leases)
                elif places[name] is buffer:
                    await buffer.lease("a", per_round, 1.0)
                start_s, start_cpu_s = time.perf_counter(), time.process_time()
                if name == "ours":
                    await _insert_all(buffer, payloads, together)
                    found["ours_s"].append((time.perf_counter() - start_s) / per_round)
                elif name == "one_call":
                    for first in range(0, per_round, together):
                        await buffer.insert("a", payloads[first : first + together])
                elif name == "by_hand":
                    _insert_by_hand(by_hand, payloads, together)
                else:
                    _insert_bare(bare, payloads, next_id, together)
                found[name].append((time.process_time() - start_cpu_s) / per_round)
        start_s = time.perf_counter()
        for step in range(100):
            await buffer.sample(step, BATCH_GROUPS, 1.0)
        sampled = 100 * BATCH_GROUPS / (time.perf_counter() - start_s)
        await buffer.close()
    return {
        **{f"{name}_cpu_us": statistics.median(found[name]) * 1e6 for name in places},
        **compare(found["bare"], found["ours"]).fields("ratio"),
        **compare(found["bare"], found["one_call"]).fields("one_call"),
        **compare(found["by_hand"], found["one_call"]).fields("by_hand"),
        "inserts_per_s": 1 / statistics.median(found["ours_s"]),
        "sampled_groups_per_s": sampled,
        "payload_bytes": len(make_payload(0)),
    }


async def _insert_all(buffer: ReplayBuffer, payloads: list[bytes], together: int) -> None:
    for first in range(0, len(payloads), together):
        calls = [buffer.insert("a", [payload]) for payload in payloads[first : first + together]]
        await (calls[0] if together == 1 else asyncio.gather(*calls))


def _insert_bare(bare: sqlite3.Connection, payloads: list[bytes], next_id: int, together: int) -> None:
    for first in range(0, len(payloads), together):
        bare.execute("BEGIN IMMEDIATE")
        for number in range(first, min(first + together, len(payloads))):
            bare.execute("INSERT INTO groups VALUES (?, ?)", (next_id + number, payloads[number]))
        bare.execute("COMMIT")


def _insert_by_hand(by_hand: sqlite3.Connection, payloads: list[bytes], together: int) -> None:
    """Decodes each group, so that none is stored that cannot be read, stores it, and ends its lease."""
    for first in range(0, len(payloads), together):
        by_hand.execute("BEGIN IMMEDIATE")
        for payload in payloads[first : first + together]:
            group = decode_group(payload)
            by_hand.execute("INSERT INTO groups VALUES (?, ?)", (group.group_id, payload))
            by_hand.execute("DELETE FROM leases WHERE ordinal = ?", (group.group_id,))
        by_hand.execute("COMMIT")


async def filled(directory: str, num_groups: int) -> None:
    """Makes a run directory with so many groups."""
    buffer = ReplayBuffer(make_config(), directory, NUM_ROWS)
    for first in range(0, num_groups, 500):
        await buffer.lease("a", 500, 1.0)
        await buffer.insert("a", [make_payload(first + number, 2, 20) for number in range(500)])
    await buffer.close()


async def at_size(num_groups: int) -> dict[str, Any]:
    """Returns recovery time, resident memory and sampling latency with so many stored groups."""
    found: dict[str, Any] = {"groups": num_groups}
    with tempfile.TemporaryDirectory() as directory:
        await filled(directory, num_groups)
        step = 0
        for sampler in SAMPLERS:
            before = psutil.Process().memory_info().rss
            start_s = time.perf_counter()
            buffer = ReplayBuffer(make_config(sampler), directory, NUM_ROWS)
            found.setdefault(
                "recovery_s_per_10k_groups", (time.perf_counter() - start_s) / num_groups * 10_000
            )
            found.setdefault("resident_mib", (psutil.Process().memory_info().rss - before) / 2**20)
            latencies_ms = []
            for _ in range(200):
                start_s = time.perf_counter()
                await buffer.sample(step, BATCH_GROUPS, 1.0)
                latencies_ms.append((time.perf_counter() - start_s) * 1e3)
                step += 1
            found[sampler] = {
                "p50_ms": float(np.percentile(latencies_ms, 50)),
                "p99_ms": float(np.percentile(latencies_ms, 99)),
            }
            await buffer.close()
    return found


async def main() -> None:
    """Measures all rows, prints them and writes them to benchmarks/results/."""
    load = measure_load()
    cases = [(fsync, together) for fsync in ("normal", "full") for together in (1, 8)]
    found = [{"fsync": each[0], "together": each[1], **await rates(*each)} for each in cases]
    show("durable groups of 10 KB against bare sqlite, in CPU time", found)
    sizes = [await at_size(size) for size in SIZES]
    show(f"p50/p99 ms of {BATCH_GROUPS} groups, by groups stored", [_in_a_row(size) for size in sizes])
    print(f"written to {save('buffer', {'rates': found, 'sizes': sizes, 'load': load})}")


def _in_a_row(size: dict[str, Any]) -> dict[str, Any]:
    """Returns the row of a table: both percentiles of a sampler in one cell."""
    latencies = {name: f"{size[name]['p50_ms']:.1f}/{size[name]['p99_ms']:.1f}" for name in SAMPLERS}
    return {name: value for name, value in size.items() if name not in SAMPLERS} | latencies


if __name__ == "__main__":
    asyncio.run(main())
