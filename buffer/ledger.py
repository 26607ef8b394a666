"""The ledger tells what happened to every item, one JSON object a line, appended only; the audit reads it
from outside.

    leased --+--> inserted --> trained* --> evicted(reason)
      ^      +--> failed(reason)
      |      +--> cancelled                          rested: never leased, since its prompt is solved
      +--- expired(reason): the lease was taken back; the item is leased again, or a late report still ends it

Lines are in the database's transaction first, then in the file, so that neither a kill nor a full disk loses
one, and a start reads only the end of the file. Where the file does not fit the database (after a power cut,
or a line deleted by hand), all of it is read once, and what leads to the database's state is added; how often
a lost item was trained on, or whether it was passed over, is then unknown.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from core.errors import DataError
from core.staleness import staleness

AT_RESTART = "written at restart"
SYNC_BYTES = 2**20
"""So much of the file may be lost in a power cut, and is kept in the database until it cannot."""
LONGEST_LINE = 2**16
MOST_SENTENCES = 1000
EventName: TypeAlias = Literal[
    "leased", "inserted", "trained", "evicted", "failed", "expired", "cancelled", "rested"
]


class LedgerEvent(msgspec.Struct, gc=False, frozen=True, omit_defaults=True, kw_only=True):
    """One line of the ledger:
    `{"event":"leased","group_id":7,"step":3,"pid":41,"time_s":1.7e9,"actor":"actor-0"}`.

    `step` is the learner step known to the buffer, `version` the group's oldest policy version, `time_s`
    seconds since 1970.
    """

    event: EventName
    group_id: int
    step: int
    pid: int
    time_s: float
    version: int | None = None
    actor: str = ""
    reason: str = ""


# (status, event) -> status; a pair that is missing here is a violation.
_NEXT_STATUS: dict[tuple[str, str], str] = {
    ("new", "leased"): "leased",
    ("new", "rested"): "rested",
    ("leased", "expired"): "waiting",
    ("waiting", "leased"): "leased",
    ("leased", "inserted"): "stored",
    ("waiting", "inserted"): "stored",
    ("leased", "failed"): "failed",
    ("waiting", "failed"): "failed",
    ("leased", "cancelled"): "cancelled",
    ("waiting", "cancelled"): "cancelled",
    ("stored", "trained"): "stored",
    ("stored", "evicted"): "evicted",
}

_STATUSES = ("new", *dict.fromkeys(_NEXT_STATUS.values()))
_MOST_AHEAD = 2**24  # A larger gap in ids that rise is no gap but a damaged number.


class Ledger:
    """Appends to the file at `path` in chunks, each at a place that is known before it is written.

        record(event) ... take_chunk() --database's transaction--> flush() --file--> the database forgets it

    A kill anywhere in between loses nothing: `recover` puts what the database still has where it belongs.
    What a full disk refuses is kept for the next `flush`. `end` is the file's length once all that was taken
    is written; `synced` is how much of it a power cut cannot take.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._encoder = msgspec.json.Encoder()
        self._new: list[bytes] = []
        # Without O_APPEND, with which pwrite would ignore the place.
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self.end = self.synced = self._written = os.fstat(self._file).st_size
        self._unwritten = b""
        self._pid = os.getpid()

    @property
    def num_unwritten(self) -> int:
        """Returns how many lines could not be written so far; above 0 the disk refuses them."""
        return self._unwritten.count(b"\n")

    def recover(self, end: int, chunks: Sequence[tuple[int, bytes]]) -> bool:
        """Completes the file from what the database knows of it: its length, and (place, lines) of its last
        part. Reads nothing else.

        Returns False, and changes nothing, when that does not fit: the file is shorter than what was durable,
        or longer than was ever written.
        """
        first = chunks[0][0] if chunks else end
        if not first <= self.end <= end:
            return False
        self.end, self.synced, self._written = end, first, first
        self._unwritten = b"".join(lines for _, lines in chunks)
        self.flush()
        return True

    def end_line(self) -> None:
        """Ends a last line that was cut short, so that the file goes on in a new one. Not needed after
        `recover`.
        """
        if self.end and os.pread(self._file, 1, self.end - 1) != b"\n":
            self._new.insert(0, b"\n")

    def record(
        self,
        event: EventName,
        group_id: int,
        *,
        step: int,
        version: int | None = None,
        actor: str = "",
        reason: str = "",
    ) -> None:
        """Notes an event for the next chunk."""
        line = LedgerEvent(
            event=event,
            group_id=group_id,
            step=step,
            pid=self._pid,
            time_s=time.time(),
            version=version,
            actor=actor,
            reason=reason,
        )
        self._new.append(self._encoder.encode(line) + b"\n")

    def take_chunk(self) -> tuple[int, bytes] | None:
        """Returns (place in the file, lines) of what was noted since the last chunk; `flush` writes it once
        the database has it.
        """
        if not self._new:
            return None
        place, chunk = self.end, b"".join(self._new)
        self._new.clear()
        self._unwritten += chunk
        self.end += len(chunk)
        return place, chunk

    def flush(self) -> None:
        """Writes what was noted. An error of the disk is not raised: the database keeps the lines, and
        `num_unwritten` counts them.
        """
        self.take_chunk()
        try:
            while self._unwritten:
                num_bytes = os.pwrite(self._file, self._unwritten, self._written)
                self._unwritten = self._unwritten[num_bytes:]
                self._written += num_bytes
            if self._written - self.synced >= SYNC_BYTES:
                os.fdatasync(self._file)
                self.synced = self._written
        except OSError:
            return

    def close(self, *, keep_back: bool = False) -> None:
        """Flushes and closes the file; a second call does nothing.

        With `keep_back` the file gets nothing more, because the database has refused the newest lines.
        """
        if self._file >= 0:
            if not keep_back:
                self.flush()
            os.close(self._file)
            self._file = -1


class Statuses:
    """Knows where each item is, in one byte an item, so that a run of months fits into memory.

        statuses = read_statuses(path)
        statuses.get(7)                         # "stored"

    The ids of one file are `num_shards` apart.
    """

    def __init__(self, num_shards: int = 1) -> None:
        self._num_shards = num_shards
        self._codes = bytearray()
        # Ids that are no ordinals of the shard occur in a ledger that contradicts itself.
        self._strange: dict[int, int] = {}
        self._shard: int | None = None

    def get(self, group_id: int) -> str:
        """Returns the status of an item: `new` before it was leased."""
        place = self._place(group_id)
        if place is None:
            return _STATUSES[self._strange.get(group_id, 0)]
        return _STATUSES[self._codes[place]] if place < len(self._codes) else "new"

    def follow(self, event: LedgerEvent) -> bool:
        """Moves the event's item on and returns True, or returns False and moves nothing when the item may
        not go that way.
        """
        after = _NEXT_STATUS.get((self.get(event.group_id), event.event))
        if after is None:
            return False
        place = self._place(event.group_id)
        if place is None:
            self._strange[event.group_id] = _STATUSES.index(after)
            return True
        if place >= len(self._codes):
            self._codes.extend(bytes(max(place + 1 - len(self._codes), len(self._codes) // 8)))
        self._codes[place] = _STATUSES.index(after)
        return True

    def count(self) -> dict[str, int]:
        """Returns the number of items by status, without the statuses that no item has."""
        counts = Counter(_STATUSES[code] for code in self._strange.values())
        counts.update({status: self._codes.count(code) for code, status in enumerate(_STATUSES) if code})
        return dict(+counts)

    def _place(self, group_id: int) -> int | None:
        if self._shard is None:
            self._shard = group_id % self._num_shards
        place, shard = divmod(group_id, self._num_shards)
        is_near = 0 <= place <= len(self._codes) + _MOST_AHEAD
        return place if is_near and shard == self._shard else None


def audit(path: str | Path, num_shards: int = 1) -> dict[str, Any]:
    """Follows every item through the ledger at `path`, one of `num_shards`.

    Returns `status` (items by where they are now: leased, waiting, stored, failed, cancelled, evicted,
    rested), `events` (lines by event), `evictions` (by reason), `max_staleness` (the largest trained on,
    learner steps), `torn_lines`, and `violations`: a sentence for every event that may not follow what
    came before, such as a second ending, and for what is wrong with the file, such as lines that cannot be
    read. There are at most `MOST_SENTENCES` of them, and one that counts the others. Raises DataError for a
    file that cannot be opened.
    """
    statuses = Statuses(num_shards)
    events: Counter[str] = Counter()
    evictions: Counter[str] = Counter()
    violations = _Sentences()
    torn_lines = oldest = line_number = 0
    for line_number, event in _read(path):
        if isinstance(event, str):
            torn_lines += 1
            violations.add(f"line {line_number}: {event}")
            continue
        before = statuses.get(event.group_id)
        if not statuses.follow(event):
            violations.add(f"line {line_number}: group {event.group_id} {event.event} when {before}")
            continue
        events[event.event] += 1
        evictions[event.reason] += event.event == "evicted"
        if event.event == "trained" and event.version is not None:
            oldest = max(oldest, staleness(event.step, event.version))
    if not line_number:
        violations.add("the ledger is empty: nothing was leased in this run so far, or its lines are gone")
    return {
        "status": statuses.count(),
        "events": dict(events),
        "evictions": dict(+evictions),
        "max_staleness": oldest,
        "torn_lines": torn_lines,
        "violations": violations.all(),
    }


def audit_run(run_dir: str | Path) -> dict[str, Any]:
    """Returns the `audit` of all ledgers of a run together, with `balance`: where every generated item is
    now, as one line.

    A ledger that is missing, or shorter than its shard's database says, is a violation too. Raises DataError
    when there is no ledger at all.
    """
    directory = Path(run_dir)
    paths = sorted(directory.glob("ledger*.jsonl"))
    stores = sorted(directory.glob("buffer*.sqlite"))
    if not paths:
        what = (
            f"{stores[0].name} is there: it was deleted, or moved"
            if stores
            else "is it the directory of a run?"
        )
        raise DataError(f"{run_dir} holds no ledger*.jsonl: {what}")
    num_shards = max(len(paths), len(stores))
    found = [audit(path, num_shards) for path in paths]
    merged: dict[str, Any] = {
        name: dict(sum((Counter(each[name]) for each in found), Counter()))
        for name in ("status", "events", "evictions")
    }
    merged["max_staleness"] = max(each["max_staleness"] for each in found)
    merged["torn_lines"] = sum(each["torn_lines"] for each in found)
    merged["violations"] = [
        f"{path.name}, {text}" if len(paths) > 1 else text
        for path, each in zip(paths, found, strict=True)
        for text in each["violations"]
    ]
    merged["violations"] += [sentence for store in stores if (sentence := _what_is_missing(store))]
    status, used = merged["status"], merged["evictions"].get("evicted_used", 0)
    places = {
        "trained": used,
        "buffered": status.get("stored", 0),
        "evicted": status.get("evicted", 0) - used,
        "failed": status.get("failed", 0) + status.get("cancelled", 0),
        "in flight": status.get("leased", 0) + status.get("waiting", 0),
    }
    rested = status.get("rested", 0)
    merged["balance"] = f"{sum(status.values()) - rested} generated = " + " + ".join(
        f"{count} {place}" for place, count in places.items()
    )
    if rested:
        merged["balance"] += f"; {rested} passed over, their prompts rested"
    return merged


def _what_is_missing(store: Path) -> str | None:
    """Returns a sentence when the ledger of a shard's database is missing or too short; None otherwise, and
    while the shard runs.
    """
    path = store.with_name(store.name.replace("buffer", "ledger").replace(".sqlite", ".jsonl"))
    if not path.exists():
        return f"{path.name} is missing: {store.name}, of the same shard, is there"
    size = path.stat().st_size
    with (
        contextlib.suppress(sqlite3.Error, msgspec.MsgspecError, TypeError),
        contextlib.closing(_read_only(store)) as db,
    ):
        state = db.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()
        waiting = db.execute("SELECT min(place) FROM ledger").fetchone()[0]
        end = msgspec.json.decode(state[0])["ledger_end"]
        if size < end:
            is_kept = waiting is not None and waiting <= size
            why = (
                f"the rest is in {store.name}, and is written when the run goes on"
                if is_kept
                else "lines are missing"
            )
            return f"{path.name} has {size:,} bytes of the {end:,} that the buffer wrote: {why}"
    return None


def _read_only(store: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{store.absolute().as_uri()}?mode=ro", uri=True, timeout=0)


def missing_events(
    statuses: Statuses, issued: Iterable[int], leases: Mapping[int, str], stored: Set[int], used_up: Set[int]
) -> Iterator[tuple[EventName, int, str]]:
    """Yields what leads from the ledger (`statuses`) to the database, as (event, item, reason).

    `issued` are all items leased so far. Of those, `leases` are the open ones (with '' for an item that waits
    to be issued again), `stored` are in the buffer, and `used_up` left after their last use, as far as that
    is known.
    """
    for ordinal in issued:
        status, reason = statuses.get(ordinal), AT_RESTART
        if status == "new":
            yield "leased", ordinal, reason
            status = "leased"
        if ordinal in leases:
            if status == "leased" and not leases[ordinal]:
                yield "expired", ordinal, reason
            elif status == "waiting" and leases[ordinal]:
                yield "leased", ordinal, reason
            continue
        is_ended = ordinal not in stored
        if status in ("leased", "waiting"):
            if is_ended and ordinal not in used_up:
                yield "failed", ordinal, reason
                continue
            yield "inserted", ordinal, reason
            status = "stored"
        if status == "stored" and is_ended:
            yield "evicted", ordinal, "evicted_used" if ordinal in used_up else reason


def read_statuses(path: str | Path, num_shards: int = 1) -> Statuses:
    """Returns where each item is according to the ledger, violations ignored. Reads the whole file."""
    statuses = Statuses(num_shards)
    for _, event in _read(path):
        if not isinstance(event, str):
            statuses.follow(event)
    return statuses


class _Sentences:
    """Keeps the first `MOST_SENTENCES` sentences, and counts the others."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._num_more = 0

    def add(self, sentence: str) -> None:
        if len(self._first) < MOST_SENTENCES:
            self._first.append(sentence)
        else:
            self._num_more += 1

    def all(self) -> list[str]:
        return [*self._first, f"{self._num_more} more"] if self._num_more else self._first


def _read(path: str | Path) -> Iterator[tuple[int, LedgerEvent | str]]:
    """Yields line numbers with the event, or with why it cannot be read; a line without an end is read in
    small pieces.
    """
    decoder = msgspec.json.Decoder(LedgerEvent)
    try:
        with open(path, "rb") as file:
            for line_number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
                try:
                    yield line_number, decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    if line.strip():
                        yield line_number, _what_it_is(line)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _what_it_is(line: bytes) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        # The line was cut within a character, or it is no text.
        text = line[: error.start].decode() if error.end == len(line) else "\0"
    if "\0" in text:
        return "not text: the file was overwritten, or damaged by its disk"
    shown = text[:40]
    if not line.endswith(b"\n"):
        return (
            f"cut short at {shown!r}: its buffer was killed, and completes it when it starts again; or the "
            "rest is lost"
        )
    return f"no event: {shown!r}"
