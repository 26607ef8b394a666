"""Groups on disk: sqlite with a write-ahead log. What was committed survives the death of any process (not a power cut).

    groups(position, group_id, oldest_version, num_tokens, uses, payload)   payload: a Group as msgpack
    meta(key, value)                                                        the buffer's state as JSON

`synchronous=NORMAL` costs no fsync per commit. The database is locked for one process: two buffers on one run directory
would each believe to be the truth.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from buffer.records import Group, decode_group, encode
from buffer.replay import meta_of
from buffer.sampling import GroupMeta
from cluster.errors import AgroError

LOCK_TIMEOUT_S = 10.0
"""How long opening waits for another process to let go of the database: one that was just killed needs a moment."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    position INTEGER PRIMARY KEY, group_id INTEGER NOT NULL UNIQUE, oldest_version INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL, uses INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value BLOB NOT NULL);
"""


class StoreError(AgroError, RuntimeError):
    """The buffer's database cannot be opened, read or written."""


class Store:
    """One connection to `path`, made if missing. Not for concurrent use: calls must come one after another."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._explained():
            # Ray constructs an asyncio actor in one thread and runs its coroutines in another; never both at once.
            self._db = sqlite3.connect(self.path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.executescript(_SCHEMA)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All calls inside are committed together on leaving, or none on an exception. Nested ones join the outer one."""
        if self._db.in_transaction:
            yield
            return
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                # A full disk makes sqlite roll back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def put_many(self, groups: Iterable[Group]) -> list[int]:
        """Stores groups in one transaction; returns the ids that were new. An id that is stored stays as it is."""
        new = []
        with self.transaction():
            for group in groups:
                meta = meta_of(group)
                row = (meta.group_id, meta.oldest_version, meta.num_tokens, meta.uses, encode(group))
                cursor = self._db.execute(
                    "INSERT OR IGNORE INTO groups(group_id, oldest_version, num_tokens, uses, payload) VALUES (?, ?, ?, ?, ?)", row
                )
                if cursor.rowcount:
                    new.append(group.group_id)
        return new

    def get_many(self, group_ids: Iterable[int]) -> list[Group]:
        """The groups in the order asked for, `uses` as set last. Raises StoreError for an id that is not stored."""
        groups = []
        with self._explained():
            for group_id in group_ids:
                row = self._db.execute("SELECT uses, payload FROM groups WHERE group_id = ?", (group_id,)).fetchone()
                if row is None:
                    raise StoreError(f"group {group_id} is not in {self.path}; was it deleted by another process?")
                groups.append(msgspec.structs.replace(decode_group(row[1]), uses=row[0]))
        return groups

    def set_uses(self, uses: Mapping[int, int]) -> None:
        """Sets the uses of groups, by id."""
        with self.transaction():
            self._db.executemany("UPDATE groups SET uses = ? WHERE group_id = ?", [(count, group_id) for group_id, count in uses.items()])

    def update_payloads(self, groups: Iterable[Group]) -> None:
        """Replaces the contents of stored groups; version, tokens, uses and position stay."""
        with self.transaction():
            rows = [(encode(group), group.group_id) for group in groups]
            self._db.executemany("UPDATE groups SET payload = ? WHERE group_id = ?", rows)

    def delete_many(self, group_ids: Iterable[int]) -> None:
        """Deletes groups; ids that are not stored are no error."""
        with self.transaction():
            self._db.executemany("DELETE FROM groups WHERE group_id = ?", [(group_id,) for group_id in group_ids])

    def save_state(self, state: dict[str, Any]) -> None:
        """Replaces the state (JSON values only)."""
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO meta(key, value) VALUES ('state', ?)", (msgspec.json.encode(state),))

    def load_state(self) -> dict[str, Any] | None:
        """The state saved last; None in a new database."""
        with self._explained():
            row = self._db.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()
        return None if row is None else msgspec.json.decode(row[0])

    def recover(self) -> list[GroupMeta]:
        """The index of all stored groups, in order of insertion."""
        with self._explained():
            rows = self._db.execute("SELECT group_id, oldest_version, num_tokens, uses FROM groups ORDER BY position").fetchall()
        return [GroupMeta(*row) for row in rows]

    def close(self) -> None:
        """Closes the connection; the log is folded into the database file."""
        self._db.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"buffer database {self.path}: {error}. {_remedy(str(error))}") from error


def _remedy(message: str) -> str:
    if "locked" in message:
        return f"Another process has held it for {LOCK_TIMEOUT_S:g} s: is a second run, or a sqlite shell, using this run directory?"
    if "full" in message or "I/O" in message:
        return "Free space on that disk; nothing acknowledged is lost, and the caller may try again."
    if "malformed" in message or "not a database" in message:
        return "Move the file away: the run goes on from its checkpoint without the groups it held."
    return "Check that run.dir exists and can be written."
