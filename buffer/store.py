"""Keeps groups on disk: sqlite with a write-ahead log. What `flush` has written survives the death of any
process.

    groups(group_id, position, ..., payload)   payload: a Group as msgpack, head: it without its tokens; a row
                                               is written once, since sqlite writes a changed one anew, whole
    used(group_id, uses, last_step, ...)       what became of it since: written once it was in a batch
    leases(ordinal, actor, losses)             the open items; actor '': waiting to be issued again
    batches(step, groups)                      what each batch held, from the watermark on
    held(prompt_index, sample)                 samples of groups that were too small
    visits(prompt_index, solved, rest)         prompts that are solved, and for how long they rest
    ledger(place, lines)                       the last part of the ledger, until its file has it for certain
    meta(key, value)                           the buffer's counters as JSON

Changes are noted in order and written together by `flush`. What a full disk refuses stays noted, is seen by
all reads, and is written by a later flush: the memory is ahead of the disk then, and nothing is acknowledged.

`fsync: normal` costs no fsync per flush; `full` is for power cuts. The database is locked for one process:
two buffers on one run directory would each believe to be the truth.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from buffer.curriculum import Visits
from buffer.sampling import GroupMeta
from core.errors import AgroError
from core.records import Sample, StoredGroup, decode_sample, encode

LOCK_TIMEOUT_S = 10.0
"""How long opening waits for another process to let go of the database: one that was just killed needs
a moment.
"""
FORMAT = 7
WAL_PAGES = 4096
"""Pages of the log, 16 MiB, before sqlite folds it into the database, which is when it syncs the disk."""

_SCHEMA = f"""
BEGIN;
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY, position INTEGER NOT NULL, oldest_version INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL, reward_std REAL NOT NULL, num_samples INTEGER NOT NULL,
    head BLOB NOT NULL, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS used (
    group_id INTEGER PRIMARY KEY, uses INTEGER NOT NULL DEFAULT 0, last_step INTEGER NOT NULL DEFAULT -1,
    has_left INTEGER NOT NULL DEFAULT 0, ref_logprobs BLOB);
CREATE INDEX IF NOT EXISTS groups_kept_for_a_batch ON used(last_step) WHERE has_left = 1;
CREATE TABLE IF NOT EXISTS leases (ordinal INTEGER PRIMARY KEY, actor TEXT NOT NULL, losses INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS batches (step INTEGER PRIMARY KEY, groups BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS held (prompt_index INTEGER PRIMARY KEY, sample BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS visits (
    prompt_index INTEGER PRIMARY KEY, solved INTEGER NOT NULL, rest INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS ledger (place INTEGER PRIMARY KEY, lines BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
PRAGMA user_version = {FORMAT};
COMMIT;
"""


MOST_ROWS = 64
"""A statement has so many rows, or a smaller power of two: sqlite keeps that few of them prepared."""
LARGE_BYTES = 2**16
"""A larger payload is a row by itself: a prepared statement keeps a copy of what it wrote last."""


class _Rows:
    """A statement that takes several rows: `texts` has it for 1, 2, 4, ... of them.

    At each statement sqlite lets go of the interpreter, and may have to wait for it.
    """

    def __init__(self, start: str, row: str, end: str = "") -> None:
        powers = (1 << power for power in range(MOST_ROWS.bit_length()))
        self.texts = {count: start + ", ".join([row] * count) + end for count in powers}


_PUT_GROUP = _Rows("INSERT OR IGNORE INTO groups VALUES ", "(?, ?, ?, ?, ?, ?, ?, ?)")
_PUT_USES = _Rows(
    "INSERT INTO used(group_id, uses, last_step) VALUES ",
    "(?, ?, ?)",
    " ON CONFLICT DO UPDATE SET uses = excluded.uses, last_step = excluded.last_step",
)
_LEAVE_USED = _Rows("UPDATE used SET has_left = 1 WHERE group_id IN (", "?", ")")
_PUT_LEASE = _Rows("INSERT OR REPLACE INTO leases VALUES ", "(?, ?, ?)")
_END_LEASE = _Rows("DELETE FROM leases WHERE ordinal IN (", "?", ")")
_READ_GROUPS = _Rows(
    "SELECT group_id, head, payload, ref_logprobs FROM groups LEFT JOIN used USING (group_id) "
    "WHERE group_id IN (",
    "?",
    ")",
)
_WITH_REF_LOGPROBS = _Rows(
    "SELECT group_id FROM used WHERE ref_logprobs IS NOT NULL AND group_id IN (", "?", ")"
)
_PUT_REF_LOGPROBS = """INSERT INTO used(group_id, ref_logprobs) VALUES (?, ?)
    ON CONFLICT DO UPDATE SET ref_logprobs = excluded.ref_logprobs"""
_FORGET_GROUPS = """DELETE FROM groups WHERE group_id IN
    (SELECT group_id FROM used WHERE has_left = 1 AND last_step < ?)"""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAKE_ROOM = "Free space on that disk; nothing acknowledged is lost, and the caller may try again."
_DISK_FAILS = (
    "Its disk fails, or the network to it; nothing acknowledged is lost. Once it works, the same command with this "
    "run.dir goes on"
)


class StoreError(AgroError, RuntimeError):
    """The buffer's database cannot be opened, read or written."""


class DiskFullError(StoreError):
    """The disk refuses writes. Nothing acknowledged is lost; what was not acknowledged can be sent again."""


class BatchEntry(msgspec.Struct, gc=False, frozen=True, array_like=True):
    """A group in a recorded batch: its `uses` with this one, and whether its reference log-probs were known
    then. See `RecordedBatch`.
    """

    group_id: int
    uses: int
    has_ref_logprobs: bool


class RecordedBatch(msgspec.Struct, gc=False, frozen=True, array_like=True):
    """A batch, or one shard's part of a batch that has `total` groups; `Store.put_batch` writes it,
    `Store.load_batches` reads it.
    """

    total: int
    entries: list[BatchEntry]


class Store:
    """One connection to the database at `path`, which is made if it is missing. Calls must come one after
    another.

        store.put_group(meta, num_samples, StoredGroup.of(group))
        store.flush()                                  # durable from here on
    """

    def __init__(self, path: str | Path, fsync: str = "normal") -> None:
        self.path = Path(path)
        self._pending: list[tuple[str | _Rows, Sequence[Any]]] = []
        # Payloads that are not on the disk yet.
        self._unwritten: dict[int, StoredGroup] = {}
        self._next_position: int | None = None  # Not known before the groups are read.
        with self._explained():
            # Ray constructs an asyncio actor in one thread and runs its coroutines in another; never both at
            # once.
            self._db = sqlite3.connect(
                self.path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            pragmas = ("locking_mode=EXCLUSIVE", "journal_mode=WAL", f"wal_autocheckpoint={WAL_PAGES}")
            for pragma in (*pragmas, f"synchronous={fsync.upper()}"):
                self._db.execute(f"PRAGMA {pragma}")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, FORMAT) or (
                found == 0 and self._db.execute("SELECT 1 FROM sqlite_master").fetchone()
            ):
                self._db.close()
                raise StoreError(
                    f"buffer database {self.path} has format {found or 1}, this version writes "
                    f"{FORMAT}. Set another run.dir, or move it and ledger*.jsonl away: the run then goes on "
                    "from its checkpoint."
                )
            if found != FORMAT:  # An existing database is opened without a write: the disk may be full.
                self._db.executescript(_SCHEMA)

    @property
    def num_pending(self) -> int:
        """Returns how many changes are noted and not written."""
        return len(self._pending)

    # Changes

    def put_group(self, meta: GroupMeta, num_samples: int, stored: StoredGroup) -> None:
        """Stores a group, encoded. An id that is stored stays as it is."""
        self._unwritten.setdefault(meta.group_id, stored)
        if self._next_position is None:
            self.load_groups()
        position = self._next_position or 0
        self._next_position = position + 1
        known = (meta.group_id, position, meta.oldest_version, meta.num_tokens, meta.reward_std)
        is_large = len(stored.payload) > LARGE_BYTES
        statement = _PUT_GROUP.texts[1] if is_large else _PUT_GROUP
        self._pending.append((statement, (*known, num_samples, stored.head, stored.payload)))

    def put_batch(self, step: int, batch: RecordedBatch) -> None:
        """Records the batch of learner step `step`, and its groups' uses with it."""
        self._pending.append(
            ("INSERT OR REPLACE INTO batches VALUES (?, ?)", (step, msgspec.msgpack.encode(batch)))
        )
        for entry in batch.entries:
            self._pending.append((_PUT_USES, (entry.group_id, entry.uses, step)))

    def leave(self, group: GroupMeta) -> None:
        """Takes a group out of the buffer; if it was in a batch, it stays for that until `forget_batches`."""
        if group.uses:
            self._pending.append((_LEAVE_USED, (group.group_id,)))
        else:
            self._pending.append(("DELETE FROM groups WHERE group_id = ?", (group.group_id,)))
            self._pending.append(("DELETE FROM used WHERE group_id = ?", (group.group_id,)))

    def forget_batches(self, before_step: int) -> None:
        """Deletes the batches of learner steps before `before_step`, and the groups kept for them."""
        self._pending.append(("DELETE FROM batches WHERE step < ?", (before_step,)))
        self._pending.append((_FORGET_GROUPS, (before_step,)))
        self._pending.append(("DELETE FROM used WHERE has_left = 1 AND last_step < ?", (before_step,)))

    def put_ref_logprobs(self, group_id: int, values: Sequence[float]) -> None:
        """Caches the reference log-prob sums of a group's samples (nats)."""
        if group_id in self._unwritten:
            self._unwritten[group_id] = self._unwritten[group_id]._replace(ref_logprobs=list(values))
        self._pending.append((_PUT_REF_LOGPROBS, (group_id, msgspec.msgpack.encode(values))))

    def put_lease(self, ordinal: int, actor: str, losses: int) -> None:
        """Notes an open item: who holds it ('' for nobody), and how often it was lost."""
        self._pending.append((_PUT_LEASE, (ordinal, actor, losses)))

    def end_lease(self, ordinal: int) -> None:
        """Notes that the item has ended."""
        self._pending.append((_END_LEASE, (ordinal,)))

    def put_held(self, prompt_index: int, sample: Sample) -> None:
        """Notes the held sample of a prompt."""
        self._pending.append(("INSERT OR REPLACE INTO held VALUES (?, ?)", (prompt_index, encode(sample))))

    def end_held(self, prompt_index: int) -> None:
        """Notes that the prompt's sample is held no more."""
        self._pending.append(("DELETE FROM held WHERE prompt_index = ?", (prompt_index,)))

    def put_visits(self, is_cleared: bool, changed: Iterable[tuple[int, Visits]]) -> None:
        """Notes what is known of prompts' visits, after all was forgotten if `is_cleared`; `Visits()`:
        nothing any more.
        """
        if is_cleared:
            self._pending.append(("DELETE FROM visits", ()))
        for prompt_index, visits in changed:
            if visits == Visits():
                self._pending.append(("DELETE FROM visits WHERE prompt_index = ?", (prompt_index,)))
            else:
                values = (prompt_index, *visits)
                self._pending.append(("INSERT OR REPLACE INTO visits VALUES (?, ?, ?)", values))

    def put_ledger(self, place: int, lines: bytes) -> None:
        """Notes lines of the ledger and where in the file they belong."""
        self._pending.append(("INSERT INTO ledger VALUES (?, ?)", (place, lines)))

    def forget_ledger(self, before_place: int | None = None) -> None:
        """Deletes the lines that the ledger's file has for certain, those before `before_place`; all of them
        for None.
        """
        if before_place is None:
            self._pending.append(("DELETE FROM ledger", ()))
        else:
            self._pending.append(("DELETE FROM ledger WHERE place < ?", (before_place,)))

    def put_state(self, state: Mapping[str, Any]) -> None:
        """Replaces the counters (JSON values only)."""
        self._pending.append(
            ("INSERT OR REPLACE INTO meta VALUES ('state', ?)", (msgspec.json.encode(state),))
        )

    def flush(self) -> None:
        """Writes all changes noted, or none: they stay noted then. Raises DiskFullError, and StoreError for
        what will not mend.
        """
        if not self._pending:
            return
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for statement, values in _together(self._pending):
                    self._db.execute(statement, values)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # A full disk makes sqlite roll back by itself.
                    self._db.execute("ROLLBACK")
                raise
        self._pending.clear()
        self._unwritten.clear()

    # Reads

    def read_groups(self, group_ids: Iterable[int]) -> list[StoredGroup]:
        """Returns the stored groups in the order asked for, changes not yet written included.

        Raises StoreError for an id that is not there.
        """
        wanted = list(group_ids)
        found = {group_id: self._unwritten[group_id] for group_id in wanted if group_id in self._unwritten}
        written = (group_id for group_id in wanted if group_id not in self._unwritten)
        for group_id, head, payload, refs in self._select(_READ_GROUPS, written):
            ref_logprobs = None if refs is None else msgspec.msgpack.decode(refs)
            found[group_id] = StoredGroup(head, payload, ref_logprobs=ref_logprobs)
        for group_id in wanted:
            if group_id not in found:
                raise StoreError(
                    f"group {group_id} is not in {self.path}; was it deleted by another process?"
                )
        return [found[group_id] for group_id in wanted]

    def with_ref_logprobs(self, group_ids: Sequence[int]) -> set[int]:
        """Returns those of the groups whose reference log-probs are stored, or known of a group that is not
        written yet.
        """
        found = {group_id for (group_id,) in self._select(_WITH_REF_LOGPROBS, group_ids)}
        return found | {
            group_id
            for group_id in group_ids
            if group_id in self._unwritten and self._unwritten[group_id].ref_logprobs is not None
        }

    def read_batch(self, batch: RecordedBatch) -> list[StoredGroup]:
        """Returns the groups of a recorded batch as they were then. Reference log-probs cached since are left
        out: a batch asked for again is the same to the last bit.
        """
        stored = self.read_groups(entry.group_id for entry in batch.entries)
        return [
            group._replace(
                uses=entry.uses, ref_logprobs=group.ref_logprobs if entry.has_ref_logprobs else None
            )
            for entry, group in zip(batch.entries, stored, strict=True)
        ]

    def num_samples(self, group_id: int) -> int | None:
        """Returns how many samples a group on disk has, or None when it is not there."""
        with self._explained():
            row = self._db.execute(
                "SELECT num_samples FROM groups WHERE group_id = ?", (group_id,)
            ).fetchone()
        return None if row is None else row[0]

    def load_state(self) -> dict[str, Any] | None:
        """Returns the counters saved last, or None in a new database."""
        with self._explained():
            row = self._db.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()
        return None if row is None else msgspec.json.decode(row[0])

    def load_groups(self) -> list[GroupMeta]:
        """Returns the index of the groups in the buffer, in order of insertion."""
        columns = "position, group_id, oldest_version, num_tokens, ifnull(uses, 0), reward_std, has_left"
        query = f"SELECT {columns} FROM groups LEFT JOIN used USING (group_id) ORDER BY position"
        with self._explained():
            rows = self._db.execute(query).fetchall()
        if self._next_position is None:
            self._next_position = 1 + max((row[0] for row in rows), default=-1)
        return [GroupMeta(*known) for _, *known, has_left in rows if not has_left]

    def load_leases(self) -> list[tuple[int, str, int]]:
        """Returns (ordinal, actor, losses) of the open items, by ordinal."""
        with self._explained():
            return self._db.execute("SELECT ordinal, actor, losses FROM leases ORDER BY ordinal").fetchall()

    def load_batches(self) -> dict[int, RecordedBatch]:
        """Returns the recorded batches, by step."""
        with self._explained():
            rows = self._db.execute("SELECT step, groups FROM batches ORDER BY step").fetchall()
        return {step: msgspec.msgpack.decode(groups, type=RecordedBatch) for step, groups in rows}

    def load_held(self) -> dict[int, Sample]:
        """Returns the held samples, by their prompts' indices."""
        with self._explained():
            rows = self._db.execute("SELECT prompt_index, sample FROM held").fetchall()
        return {prompt_index: decode_sample(sample) for prompt_index, sample in rows}

    def load_visits(self) -> dict[int, Visits]:
        """Returns what is known of prompts' visits, by their indices."""
        with self._explained():
            rows = self._db.execute("SELECT prompt_index, solved, rest FROM visits").fetchall()
        return {prompt_index: Visits(*known) for prompt_index, *known in rows}

    def load_ledger(self) -> list[tuple[int, bytes]]:
        """Returns (place, lines) of the last part of the ledger, in order."""
        with self._explained():
            return self._db.execute("SELECT place, lines FROM ledger ORDER BY place").fetchall()

    def close(self) -> None:
        """Closes the connection and folds the log into the database file. Changes not written are lost."""
        self._db.close()

    def _select(self, statement: _Rows, group_ids: Iterable[int]) -> Iterator[tuple[Any, ...]]:
        for text, values in _together([(statement, (group_id,)) for group_id in group_ids]):
            with self._explained():
                rows = self._db.execute(text, values).fetchall()
            yield from rows

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            found = _why_not_writable(self.path.parent) if code == sqlite3.SQLITE_IOERR else None
            kind, remedy = StoreError, _remedy(str(error))
            if code == sqlite3.SQLITE_FULL or (found is not None and found.errno in _NO_ROOM):
                kind, remedy = DiskFullError, _MAKE_ROOM
            elif code == sqlite3.SQLITE_IOERR:
                what = "can be written now" if found is None else f"meets: {found.strerror}"
                remedy = f"{_DISK_FAILS} (another file beside it {what})"
            raise kind(f"buffer database {self.path}: {error}. {remedy}") from error


def _together(changes: Sequence[tuple[str | _Rows, Sequence[Any]]]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yields these statements and their values in order; rows of one kind that follow one another are one
    statement, or a few.
    """
    first, end = 0, len(changes)
    while first < end:
        statement, values = changes[first]
        if isinstance(statement, str):
            yield statement, values
            first += 1
            continue
        last = first + 1
        while last < end and last - first < MOST_ROWS and changes[last][0] is statement:
            last += 1
        num_rows = 1 << (last - first).bit_length() - 1
        rows = [values for _, values in changes[first : first + num_rows]]
        yield statement.texts[num_rows], tuple(chain.from_iterable(rows))
        first += num_rows


def _why_not_writable(directory: Path) -> OSError | None:
    """Returns what a page that is written into `directory` meets; None where it can be written.

    sqlite does not tell a quota, or a limit on files, from a disk that fails, or from a network disk whose
    server is another by now.
    """
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            file.write(bytes(4096))
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _remedy(message: str) -> str:
    if "locked" in message:
        return (
            f"Another process has held it for {LOCK_TIMEOUT_S:g} s: is a second run, or a sqlite shell, "
            "using this run directory?"
        )
    if "malformed" in message or "not a database" in message:
        return (
            "Move it and ledger*.jsonl away: the run goes on from its checkpoint without the groups it held, "
            "its prompts begin anew."
        )
    return "Check that run.dir exists and can be written."
