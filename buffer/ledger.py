"""The ledger: what happened to every item, one JSON object a line, appended only; and the auditor who reads it from outside.

    leased --+--> inserted --> trained* --> evicted(reason)
      ^      +--> failed(reason)
      |      +--> cancelled
      +--- expired(reason): the lease was taken back; the item will be leased again, or a late report still ends it

Lines are written after the database's commit, and never forced to the disk: a kill, a full disk or a power cut can lose the last ones.
The buffer adds what leads to the database's state when it starts again; how often a lost item was trained on is not told then.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from cluster.errors import DataError

AT_RESTART = "written at restart"
EventName: TypeAlias = Literal["leased", "inserted", "trained", "evicted", "failed", "expired", "cancelled"]


class LedgerEvent(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One line. `step`: the learner step known to the buffer; `version`: the group's oldest; `time_s`: seconds since 1970."""

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


class Ledger:
    """Appends to `path`. Events are kept until `flush`; what a full disk refuses is kept for the next one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._encoder = msgspec.json.Encoder()
        self._new: list[bytes] = []
        self._unwritten = b"" if _ends_a_line(self.path) else b"\n"
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._pid = os.getpid()

    @property
    def num_unwritten(self) -> int:
        """Lines that could not be written so far: above 0 means the disk refuses them."""
        return self._unwritten.count(b"\n")

    def record(self, event: EventName, group_id: int, *, step: int, version: int | None = None, actor: str = "", reason: str = "") -> None:
        """Notes an event, to be written by `flush`."""
        line = LedgerEvent(
            event=event, group_id=group_id, step=step, pid=self._pid, time_s=time.time(), version=version, actor=actor, reason=reason
        )
        self._new.append(self._encoder.encode(line) + b"\n")

    def flush(self) -> None:
        """Writes what was noted. An error of the disk is no error here: the database is the truth; see `num_unwritten`."""
        self._unwritten += b"".join(self._new)
        self._new.clear()
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError:
            return

    def close(self) -> None:
        """Flushes and closes the file; again is no error."""
        if self._file >= 0:
            self.flush()
            os.close(self._file)
            self._file = -1


def audit(path: str | Path) -> dict[str, Any]:
    """Follows every item through the ledger at `path`.

    Returns `status` (items by where they are now: leased, waiting, stored, failed, cancelled, evicted), `events` (lines by
    event), `evictions` (by reason), `max_staleness` (largest step - version trained on, learner steps), `torn_lines`, and
    `violations`: a sentence for every event that may not follow what came before, such as a second ending.
    """
    status: dict[int, str] = {}
    events: Counter[str] = Counter()
    evictions: Counter[str] = Counter()
    violations: list[str] = []
    torn_lines, max_staleness = 0, 0
    for line_number, event in _read(path):
        if event is None:
            torn_lines += 1
            continue
        before = status.get(event.group_id, "new")
        if not _follow(status, event):
            violations.append(f"line {line_number}: group {event.group_id} {event.event} when {before}")
            continue
        events[event.event] += 1
        evictions[event.reason] += event.event == "evicted"
        if event.event == "trained" and event.version is not None:
            max_staleness = max(max_staleness, event.step - event.version)
    return {
        "status": dict(Counter(status.values())),
        "events": dict(events),
        "evictions": dict(+evictions),
        "max_staleness": max_staleness,
        "torn_lines": torn_lines,
        "violations": violations,
    }


def audit_run(run_dir: str | Path) -> dict[str, Any]:
    """`audit` of all ledgers of a run together, and `balance`: where every generated item is now, as one line.

    Raises DataError when the run has no ledger.
    """
    paths = sorted(Path(run_dir).glob("ledger*.jsonl"))
    if not paths:
        raise DataError(f"{run_dir} holds no ledger*.jsonl: is it the directory of a run?")
    found = [audit(path) for path in paths]
    merged: dict[str, Any] = {
        name: dict(sum((Counter(each[name]) for each in found), Counter())) for name in ("status", "events", "evictions")
    }
    merged["max_staleness"] = max(each["max_staleness"] for each in found)
    merged["torn_lines"] = sum(each["torn_lines"] for each in found)
    merged["violations"] = [
        f"{path.name}, {text}" if len(paths) > 1 else text for path, each in zip(paths, found, strict=True) for text in each["violations"]
    ]
    status, used = merged["status"], merged["evictions"].get("evicted_used", 0)
    places = {
        "trained": used,
        "buffered": status.get("stored", 0),
        "evicted": status.get("evicted", 0) - used,
        "failed": status.get("failed", 0) + status.get("cancelled", 0),
        "in flight": status.get("leased", 0) + status.get("waiting", 0),
    }
    merged["balance"] = f"{sum(status.values())} generated = " + " + ".join(f"{count} {place}" for place, count in places.items())
    return merged


def missing_events(
    statuses: Mapping[int, str], issued: Iterable[int], leases: Mapping[int, str], stored: Set[int], used_up: Set[int]
) -> Iterator[tuple[EventName, int, str]]:
    """What leads from the ledger (`statuses`) to the database, as (event, item, reason).

    `issued`: all items leased so far; of those, `leases`: the open ones ('': waiting to be issued again), `stored`, and `used_up`: those
    that left after their last use, as far as that is known.
    """
    for ordinal in issued:
        status, reason = statuses.get(ordinal, "new"), AT_RESTART
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


def read_statuses(path: str | Path) -> dict[int, str]:
    """Where each item is according to the ledger, violations ignored; empty when there is no ledger."""
    status: dict[int, str] = {}
    for _, event in _read(path):
        if event is not None:
            _follow(status, event)
    return status


def _follow(status: dict[int, str], event: LedgerEvent) -> bool:
    """Moves the event's item on in `status`; False, and nothing moved, when it may not go that way."""
    after = _NEXT_STATUS.get((status.get(event.group_id, "new"), event.event))
    if after is not None:
        status[event.group_id] = after
    return after is not None


def _read(path: str | Path) -> Iterator[tuple[int, LedgerEvent | None]]:
    """Line numbers and events; None for a line that a kill cut short."""
    if not Path(path).exists():
        return
    decoder = msgspec.json.Decoder(LedgerEvent)
    with open(path, "rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield line_number, decoder.decode(line)
                except msgspec.DecodeError:
                    yield line_number, None


def _ends_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return True
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
