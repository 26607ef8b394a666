"""The store and the ledger: what was acknowledged survives kill -9; the auditor finds what may not be."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import sqlite3
import struct
import time
from typing import Any

import pytest

from buffer import store as store_module
from buffer.ledger import MOST_SENTENCES, Ledger, LedgerEvent, Statuses, audit, audit_run, read_statuses
from buffer.replay import meta_of
from buffer.sampling import GroupMeta
from buffer.store import MOST_ROWS, BatchEntry, DiskFullError, RecordedBatch, Store, StoreError
from core.records import Group, Sample, StoredGroup, VersionSpan, decode_group


def make_group(group_id: int, version: int = 0, num_tokens: int = 4) -> Group:
    sample = Sample.one_turn(
        (1, 2),
        range(num_tokens),
        (-0.5,) * num_tokens,
        version_spans=(VersionSpan(version, 0, num_tokens),),
        finish_reason="stop",
        text=f"answer {group_id}",
        reward=1.0,
    )
    return Group(
        group_id=group_id,
        prompt_index=group_id,
        source_row=group_id,
        prompt="p",
        samples=(sample, sample),
        actor="a0",
    )


def put(store: Store, *groups: Group) -> None:
    for group in groups:
        store.put_group(meta_of(group), len(group.samples), StoredGroup.of(group))
    store.flush()


def read(store: Store, *group_ids: int) -> list[Group]:
    return [decode_group(stored.payload) for stored in store.read_groups(group_ids)]


def ids(store: Store) -> list[int]:
    return [meta.group_id for meta in store.load_groups()]


def test_a_store_opened_again_holds_groups_uses_order_and_state(tmp_path):
    store = Store(tmp_path / "b.sqlite")
    assert store.load_state() is None
    put(store, make_group(7), make_group(3, version=5))
    store.put_batch(4, RecordedBatch(2, [BatchEntry(3, 1, False)]))
    store.put_ref_logprobs(3, [-1.0, -2.0])
    store.put_lease(9, "a", 2)
    store.put_lease(8, "", 0)
    store.put_held(5, make_group(1).samples[0])
    store.put_state({"frontier": 8})
    store.flush()
    store.close()
    store = Store(tmp_path / "b.sqlite")
    assert [
        (meta.group_id, meta.oldest_version, meta.uses, meta.num_tokens) for meta in store.load_groups()
    ] == [
        (7, 0, 0, 12),
        (3, 5, 1, 12),
    ]
    assert (store.load_state(), store.load_leases()) == ({"frontier": 8}, [(8, "", 0), (9, "a", 2)])
    assert (store.load_batches(), store.load_held()) == (
        {4: RecordedBatch(2, [BatchEntry(3, 1, False)])},
        {5: make_group(1).samples[0]},
    )
    assert read(store, 3, 7)[1] == make_group(7)
    assert [stored.ref_logprobs for stored in store.read_groups([3, 7])] == [[-1.0, -2.0], None]


def test_putting_an_id_again_changes_nothing(tmp_path):
    store = Store(tmp_path / "b.sqlite")
    put(store, make_group(1))
    put(store, make_group(1, version=9), make_group(2), make_group(2, version=9))
    assert read(store, 1, 2) == [make_group(1), make_group(2)]


@pytest.mark.parametrize("count", [1, 3, MOST_ROWS - 1, MOST_ROWS + 5, 2 * MOST_ROWS])
def test_changes_of_one_kind_are_the_same_however_many_are_written_together(tmp_path, count):
    store = Store(tmp_path / "b.sqlite")
    groups = [make_group(2 * place, version=place) for place in range(count)]
    for group in groups:
        store.put_lease(group.group_id, "a", 0)
    store.put_lease(0, "b", 1)  # The later of two is what stays.
    put(store, *groups, make_group(0, version=99))
    assert store.load_leases() == [
        (2 * place, "a" if place else "b", int(not place)) for place in range(count)
    ]
    assert ids(store) == [group.group_id for group in groups]
    store.put_batch(4, RecordedBatch(count, [BatchEntry(group.group_id, 1, False) for group in groups]))
    for group in groups[1:]:
        store.leave(GroupMeta(group.group_id, 0, 12, 1))
        store.end_lease(group.group_id)
    store.flush()
    backwards = [group.group_id for group in reversed(groups)]
    assert read(store, *backwards) == groups[::-1]
    assert [(meta.group_id, meta.uses) for meta in store.load_groups()] == [(0, 1)]
    assert store.load_leases() == [(0, "b", 1)]
    with pytest.raises(StoreError, match="group 1 is not in"):
        read(store, *backwards, 1)


def test_a_large_group_is_a_statement_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "LARGE_BYTES", len(StoredGroup.of(make_group(1)).payload))
    store = Store(tmp_path / "b.sqlite")
    large = [make_group(number, num_tokens=2000) for number in (9, 10)]
    for group in (make_group(1), make_group(2), *large):
        store.put_group(meta_of(group), len(group.samples), StoredGroup.of(group))
    said: list[str] = []
    store._db.set_trace_callback(said.append)
    store.flush()
    assert [one.count("(") for one in said if "INTO groups" in one] == [2, 1, 1]
    assert ids(store) == [1, 2, 9, 10]


def test_whose_reference_log_probs_are_known_is_seen_before_they_are_written(tmp_path):
    store = Store(tmp_path / "b.sqlite")
    put(store, make_group(1), make_group(2))
    store.put_ref_logprobs(2, [-1.0, -2.0])
    store.flush()
    store.put_group(meta_of(make_group(3)), 2, StoredGroup.of(make_group(3)))
    store.put_group(meta_of(make_group(4)), 2, StoredGroup.of(make_group(4)))
    store.put_ref_logprobs(4, [-3.0, -4.0])
    for _ in range(2):
        assert store.with_ref_logprobs([4, 3, 2, 1]) == {2, 4}
        assert [stored.ref_logprobs for stored in store.read_groups([4, 3])] == [[-3.0, -4.0], None]
        store.flush()


def test_a_group_that_left_stays_while_a_batch_needs_it(tmp_path):
    store = Store(tmp_path / "b.sqlite")
    put(store, make_group(1), make_group(2), make_group(3))
    store.put_batch(4, RecordedBatch(1, [BatchEntry(1, 1, False)]))
    store.put_batch(6, RecordedBatch(1, [BatchEntry(2, 1, False)]))
    for group_id, uses in ((1, 1), (2, 1), (3, 0)):
        store.leave(GroupMeta(group_id, 0, 12, uses))
    store.flush()
    assert ids(store) == []
    assert read(store, 1, 2) == [make_group(1), make_group(2)]
    with pytest.raises(StoreError, match="group 3 is not in"):
        read(store, 3)
    store.forget_batches(6)
    store.flush()
    assert store.load_batches().keys() == {6}
    assert read(store, 2) == [make_group(2)]
    with pytest.raises(StoreError, match="group 1 is not in"):
        read(store, 1)


@pytest.mark.parametrize(("fsync", "level"), [("normal", 1), ("full", 2)])
def test_fsync_is_what_was_asked_for(tmp_path, fsync, level):
    assert Store(tmp_path / "b.sqlite", fsync)._db.execute("PRAGMA synchronous").fetchone() == (level,)


def test_a_database_of_another_format_is_refused(tmp_path):
    with sqlite3.connect(tmp_path / "b.sqlite") as db:
        db.execute("CREATE TABLE groups (group_id)")
    with pytest.raises(StoreError, match="has format 1, this version writes 7"):
        Store(tmp_path / "b.sqlite")


def test_a_missing_group_is_an_error_that_names_it(tmp_path):
    with pytest.raises(StoreError, match="group 5 is not in"):
        read(Store(tmp_path / "b.sqlite"), 5)


def test_a_full_disk_is_explained_and_loses_nothing(tmp_path):
    store = Store(tmp_path / "b.sqlite")
    put(store, make_group(1))
    num_pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count={num_pages}")
    with pytest.raises(DiskFullError, match="Free space on that disk"):
        put(store, make_group(2), make_group(3, num_tokens=50_000))
    assert ids(store) == [1]
    assert read(store, 3, 1) == [make_group(3, num_tokens=50_000), make_group(1)], (
        "what is not written yet can be read"
    )
    store._db.execute(f"PRAGMA max_page_count={num_pages + 1000}")
    store.flush()
    assert ids(store) == [1, 2, 3]
    assert store.num_pending == 0


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EDQUOT, DiskFullError, "Free space on that disk"),
        (errno.ESTALE, StoreError, r"goes on \(another file beside it meets: Stale file handle\)"),
        (
            None,
            StoreError,
            r"Its disk fails, or the network to it; .* \(another file beside it can be written now\)",
        ),
    ],
)
def test_a_disk_that_fails_is_not_a_full_one(tmp_path, monkeypatch, number, kind, words):
    class Failing:
        def execute(self, *_: object) -> None:
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
            raise error

    found = None if number is None else OSError(number, os.strerror(number))
    store = Store(tmp_path / "b.sqlite")
    monkeypatch.setattr(store, "_db", Failing())
    if found is not None:
        monkeypatch.setattr(store_module, "_why_not_writable", lambda directory: found)
    with pytest.raises(StoreError, match=words) as caught:
        put(store, make_group(1))
    assert type(caught.value) is kind


def test_a_second_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_TIMEOUT_S", 0.1)
    held = Store(tmp_path / "c.sqlite")
    put(held, make_group(1))
    with pytest.raises(StoreError, match="is a second run"):
        Store(tmp_path / "c.sqlite")


def test_a_file_that_is_no_database_is_explained(tmp_path):
    (tmp_path / "b.sqlite").write_bytes(b"not sqlite " * 100)
    with pytest.raises(StoreError, match=r"Move it and ledger\*\.jsonl away"):
        Store(tmp_path / "b.sqlite")


def _write_until_killed(path, first_id: int, seed: int, acks: int) -> None:
    """Puts groups in batches of random sizes; tells each batch's last id after its commit."""
    rng = random.Random(seed)
    store = Store(path)
    next_id = first_id
    while True:
        batch = [
            make_group(next_id + i, num_tokens=rng.choice([4, 50, 900])) for i in range(rng.randint(1, 4))
        ]
        store.put_state({"frontier": next_id + len(batch)})
        put(store, *batch)
        os.write(acks, struct.pack("<q", batch[-1].group_id))
        next_id += len(batch)


def test_invariant_2_acknowledged_groups_survive_25_kills_of_the_writer(tmp_path):
    path = tmp_path / "b.sqlite"
    fork = multiprocessing.get_context("fork")
    rng = random.Random(0)
    num_acknowledged, first_id = 0, 0
    for kill in range(25):
        reader, writer = os.pipe()
        process = fork.Process(target=_write_until_killed, args=(path, first_id, kill, writer))
        process.start()
        os.close(writer)
        last = os.read(reader, 8)
        while struct.unpack("<q", last[-8:])[0] < first_id + 25:  # However slow the machine is.
            last = os.read(reader, 8)
        time.sleep(rng.uniform(0.0, 0.06))
        process.kill()
        process.join()
        with os.fdopen(reader, "rb") as pipe:
            last += pipe.read()
        acknowledged_to = struct.unpack("<q", last[-8:])[0]

        store = Store(path)
        stored = ids(store)
        assert stored == list(range(len(stored))), "a hole or a duplicate"
        assert len(stored) > acknowledged_to
        assert (store.load_state() or {"frontier": 0})["frontier"] > acknowledged_to
        num_acknowledged += acknowledged_to + 1 - first_id
        first_id = len(stored)
        store.close()
    store = Store(path)
    assert all(group.group_id == group_id for group_id, group in enumerate(read(store, *range(first_id))))
    store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert num_acknowledged > 500


def _write_ledger(path, events: list[tuple[Any, int]]) -> None:
    ledger = Ledger(path)
    for event, group_id in events:
        ledger.record(event, group_id, step=9, version=4, reason="because" if event == "evicted" else "")
    ledger.close()


def test_audit_follows_every_item(tmp_path):
    path = tmp_path / "ledger.jsonl"
    history = [("leased", i) for i in range(6)] + [
        ("expired", 0),
        ("leased", 0),
        ("inserted", 0),
        ("trained", 0),
        ("trained", 0),
    ]
    history += [("evicted", 0), ("failed", 1), ("cancelled", 2), ("inserted", 3), ("expired", 4)]
    _write_ledger(path, history)
    found = audit(path)
    assert found["violations"] == []
    assert found["status"] == {
        "evicted": 1,
        "failed": 1,
        "cancelled": 1,
        "stored": 1,
        "waiting": 1,
        "leased": 1,
    }
    assert found["events"]["trained"] == 2
    assert found["evictions"] == {"because": 1}
    assert found["max_staleness"] == 5


@pytest.mark.parametrize(
    "planted",
    [
        ["leased", "inserted", "inserted"],
        ["leased", "inserted", "failed"],
        ["leased", "failed", "inserted"],
        ["leased", "cancelled", "failed"],
        ["leased", "leased"],
        ["inserted"],
        ["leased", "trained"],
        ["leased", "inserted", "evicted", "trained"],
        ["leased", "inserted", "evicted", "evicted"],
    ],
)
def test_audit_finds_a_planted_double_ending(tmp_path, planted):
    path = tmp_path / "ledger.jsonl"
    _write_ledger(path, [("leased", 1), *((event, 2) for event in planted), ("inserted", 1)])
    violations = audit(path)["violations"]
    assert len(violations) == 1
    assert f"group 2 {planted[-1]}" in violations[0]


def test_a_ledger_cut_inside_a_line_goes_on_in_a_new_one_and_the_audit_names_the_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    _write_ledger(path, [("leased", 1), ("leased", 2)])
    path.write_bytes(path.read_bytes()[:-20])
    ledger = Ledger(path)
    ledger.end_line()
    ledger.record("inserted", 1, step=9)
    ledger.close()
    found = audit(path)
    assert found["torn_lines"] == 1
    assert [sentence[:16] for sentence in found["violations"]] == ["line 2: no event"]
    assert read_statuses(path).count() == {"stored": 1}


def test_a_ledger_is_completed_from_wherever_a_kill_left_it_and_only_its_end_is_read(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    chunks = []
    for group_id in range(4):
        ledger.record("leased", group_id, step=0)
        chunks.append(ledger.take_chunk())
        ledger.flush()
    ledger.close()
    whole = path.read_bytes()
    for cut in range(chunks[1][0], len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = Ledger(path)
        assert again.recover(len(whole), chunks[1:])
        again.record("leased", 4, step=0)
        again.close()
        assert path.read_bytes().startswith(whole)
        assert audit(path)["events"] == {"leased": 5}
    # What was durable is gone; what was never written is there.
    for size in (chunks[1][0] - 1, len(whole) + 1):
        path.write_bytes((whole + b"x")[:size])
        assert not Ledger(path).recover(len(whole), chunks[1:])
        assert path.stat().st_size == size


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the ledger is empty"),
        (b"\n\n", "the ledger is empty"),
        (b"\x00" * 5000, "line 1: not text"),
        (os.urandom(100_000), ": not text"),
        (b"no json\n", "line 1: no event: 'no json"),
        (b'{"event":"leased"}\n', "line 1: no event"),
        (b'{"event":"leased","group_', "line 1: cut short at"),
        (b"x" * 300_000, "line 1: cut short at"),
        ('{"event":"failed","reason":"\u592a\u957f'.encode()[:-1], "line 1: cut short at"),
    ],
)
def test_what_is_no_ledger_is_no_clean_audit(tmp_path, content, said):
    (tmp_path / "ledger.jsonl").write_bytes(content)
    violations = audit_run(tmp_path)["violations"]
    assert any(said in sentence for sentence in violations), violations
    assert len(violations) <= MOST_SENTENCES + 1


def test_an_audit_keeps_a_byte_an_item(tmp_path):
    statuses = Statuses(num_shards=3)
    for event in ("leased", "inserted"):
        for group_id in (1, 4, 3_000_001, 2, 10**15):  # The last two are none of this shard's.
            assert statuses.follow(LedgerEvent(event=event, group_id=group_id, step=0, pid=0, time_s=0.0))
    assert statuses.count() == {"stored": 5}
    assert [statuses.get(group_id) for group_id in (1, 2, 7, 10**15)] == ["stored", "stored", "new", "stored"]
    assert len(statuses._codes) < 1_200_000


def test_a_ledger_on_a_full_disk_keeps_its_lines():
    ledger = Ledger("/dev/full")
    for group_id in range(2):
        ledger.record("leased", group_id, step=0)
        ledger.flush()
    assert ledger.num_unwritten == 2
