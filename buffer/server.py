"""The replay buffer as an asyncio class; a run wraps it as a Ray actor, tests run it as it is.

    actor    lease --> WorkItems ... insert(Groups) --> ids acknowledged after the commit, or fail, or give_back
    learner  sample(step) --> Batch ... set_ref_logprobs

| wait   | of      | until                                             | ended by                                      |
|--------|---------|---------------------------------------------------|-----------------------------------------------|
| lease  | actors  | open + stored-unconsumed < admitted, or a re-issue | sample, eviction, fail, a lease that runs out |
| lease  | actor   | its weights are new enough for the next batch      | a publication; it is told at once, and asks again |
| sample | learner | `num_groups` stored groups, old enough             | insert                                        |

Neither waits for the other for ever: a learner waits only while fewer than `groups_per_step <= admitted` groups are here,
and then an actor may lease. It waits for groups as old as `min_staleness` only while the buffer is not full. Every change is
one synchronous section that commits to disk before anyone sees it; the disk is the truth: after a failed commit the memory is
read back from it, just as after a restart.

A batch that was handed out counts as trained: if the learner dies with it, these uses are not taken back.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from buffer.admission import Admission, work_item
from buffer.ledger import Ledger, read_statuses
from buffer.records import Batch, Group, decode_group, encode
from buffer.replay import Replay, check_staleness, meta_of
from buffer.store import Store
from buffer.usable import MIN_SAMPLES, HeldSamples, usable_group
from cluster.config import Config
from cluster.errors import ConfigError, DataError

STORE_NAME = "buffer.sqlite"
LEDGER_NAME = "ledger.jsonl"
_NUM_ERROR_TEXTS = 5


class WaitTimer:
    """Seconds that callers spent waiting, all together; waits still going on count too."""

    def __init__(self) -> None:
        self._finished_s = 0.0
        self._started_s: list[float] = []

    @contextlib.contextmanager
    def running(self, clock: Callable[[], float]) -> Iterator[None]:
        """Counts the time inside as waiting."""
        start_s = clock()
        self._started_s.append(start_s)
        try:
            yield
        finally:
            self._started_s.remove(start_s)
            self._finished_s += clock() - start_s

    def total_s(self, now_s: float) -> float:
        """Seconds so far, `now_s` on the clock given to `running`."""
        return self._finished_s + sum(now_s - start_s for start_s in self._started_s)


class ReplayBuffer:
    """Leases, groups and batches of one run; recovers what `run_dir` holds. Times come from the event loop's clock.

    Raises ConfigError when `run_dir` belongs to another prompt stream, StoreError when its database cannot be used.
    """

    def __init__(self, config: Config, run_dir: str, num_rows: int) -> None:
        self._config = config
        self._num_rows = num_rows
        self._stream = {"seed": config.run.seed, "num_rows": num_rows}
        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._admission = Admission(config.admitted_groups, config.run.timeout_s)
        self._replay = Replay(config.buffer, config.run.seed)
        self._held = HeldSamples(config.buffer.max_staleness)
        self._counts: Counter[str] = Counter()
        self._error_texts: deque[str] = deque(maxlen=_NUM_ERROR_TEXTS)
        self._step = self._next_step = 0  # Of the newest call of `sample`, and of the batch to come.
        self._closed = False
        self._releases: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self._admission_wait = WaitTimer()
        self._batch_wait = WaitTimer()
        self._store = Store(directory / STORE_NAME)
        self._check_same_stream(directory)
        self._recover()
        statuses = read_statuses(directory / LEDGER_NAME)
        self._ledger = Ledger(directory / LEDGER_NAME)
        with self._commit():
            self._complete_ledger(statuses)

    # Actors

    async def lease(self, actor: str, max_groups: int, timeout_s: float, version: int | None = None) -> list[bytes] | None:
        """Up to `max_groups` encoded WorkItems, as soon as one is admitted; none after `timeout_s` seconds or when closed.

        None instead of a list: samples of policy `version` would be too stale for the next batch; ask again with newer weights.
        """
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        async with self._changed:
            with self._admission_wait.running(clock):
                if self._is_outdated(version):
                    return None
                ordinals = self._lease_now(actor, max_groups, clock())
                releases = self._releases[actor]
                while not ordinals and clock() < deadline_s and not self._closed:
                    await self._wait_for_change(min(deadline_s, self._admission.next_expiry_s))
                    if self._releases[actor] != releases:
                        break  # The actor died while this call of it waited.
                    if self._is_outdated(version):
                        return None
                    ordinals = self._lease_now(actor, max_groups, clock())
        return [encode(work_item(ordinal, seed=self._config.run.seed, num_rows=self._num_rows)) for ordinal in ordinals]

    async def insert(self, actor: str, payloads: list[bytes]) -> list[int]:
        """Stores encoded, scored Groups; returns all their ids once that is durable: none of them need be sent again.

        Idempotent: an item ends once, whoever reports it, also after its lease ran out; later reports of it are counted as
        duplicates. Raises msgspec.ValidationError, DataError (unscored) or LeaseError (never leased), with nothing stored.
        """
        groups = [decode_group(payload) for payload in payloads]
        # All checks come before any change.
        checked = [(group, *usable_group(group)) for group in groups]
        for group in groups:
            self._admission.is_open(group.group_id)
        async with self._changed:
            with self._commit():
                self._store.put_many([kept for kept in (self._end_item(actor, *entry) for entry in checked) if kept is not None])
            self._changed.notify_all()
        return [group.group_id for group in groups]

    async def fail(self, actor: str, ordinals: list[int], reason: str) -> None:
        """Ends items that cannot be generated. Ignored, and counted, for those that ended or are another actor's by now."""
        async with self._changed:
            with self._commit():
                for ordinal in self._admission.fail(actor, ordinals):
                    self._record("failed", ordinal, actor=actor, reason=reason)
            self._changed.notify_all()

    async def give_back(self, actor: str, ordinals: list[int]) -> None:
        """Hands leases back unfinished; the items are issued again, first of all. Others than the actor's are ignored, counted."""
        await self._take_back(actor, ordinals, "given back")

    async def release_actor(self, actor: str) -> None:
        """Takes back all leases of an actor that is gone; a call of it that still waits gets none."""
        self._releases[actor] += 1
        await self._take_back(actor, None, "actor gone")

    async def _take_back(self, actor: str, ordinals: list[int] | None, reason: str) -> None:
        async with self._changed:
            with self._commit():
                for ordinal in self._admission.give_back(actor, ordinals):
                    self._record("expired", ordinal, actor=actor, reason=reason)
            self._changed.notify_all()

    # Learner

    async def sample(self, step: int, num_groups: int, timeout_s: float) -> bytes | None:
        """The encoded Batch of learner step `step` as soon as `num_groups` groups are stored; None after `timeout_s` seconds
        or when closed. `Group.uses` counts this batch too: 1 at the first use. Raises StalenessError rather than hand out
        a group older than `max_staleness`."""
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        async with self._changed:
            with self._batch_wait.running(clock):
                groups = self._sample_now(step, num_groups)
                while not groups and clock() < deadline_s and not self._closed:
                    await self._wait_for_change(deadline_s)
                    groups = self._sample_now(step, num_groups)
        return encode(Batch(step, tuple(groups))) if groups else None

    async def set_step(self, step: int) -> None:
        """Tells the learner's step: groups that no later batch may hold are evicted."""
        async with self._changed:
            self._step = step
            self._replay.evict_stale(step)
            self._commit_evictions()

    async def set_ref_logprobs(self, ref_logprobs: dict[int, list[float]]) -> int:
        """Caches reference log-prob sums (nats; group id -> one per sample, in the batch's order) with the groups still stored.

        Returns the number of groups updated. Raises DataError, nothing changed, for a wrong length or a non-finite value.
        """
        async with self._changed:
            groups = self._store.get_many(group_id for group_id in ref_logprobs if group_id in self._replay)
            updated = [_with_ref_logprobs(group, ref_logprobs[group.group_id]) for group in groups]
            self._store.update_payloads(updated)
        return len(updated)

    # Everybody

    async def stats(self) -> dict[str, float]:
        """Metrics; counts and waits are cumulative, counts over restarts too.

        `frontier = inserted + evicted_too_small + failed + leased` and
        `inserted = groups + evicted_used + evicted_stale + evicted_capacity` at any time.
        """
        now_s = asyncio.get_running_loop().time()
        replay, admission = self._replay.counts, self._admission.counts
        values: dict[str, float] = {
            "groups": len(self._replay),
            "unconsumed": self._replay.num_unconsumed,
            "tokens": self._replay.num_tokens,
            "leased": self._admission.num_open,
            "frontier": self._admission.frontier,
            "duplicates": self._counts["duplicates"] + replay["duplicates"],
            "wait_admission_s": self._admission_wait.total_s(now_s),
            "wait_batch_s": self._batch_wait.total_s(now_s),
            "ledger_unwritten": self._ledger.num_unwritten,
        }
        values |= {name: replay[name] for name in ("inserted", "evicted_stale", "evicted_used", "evicted_capacity", "taken_young")}
        values |= {name: admission[name] for name in ("failed", "expired", "reissued", "ignored_reports")}
        values |= {name: self._counts[name] for name in ("evicted_too_small", "samples_error", "samples_total")}
        values |= {name: self._held.counts[name] for name in ("held_samples", "joined_samples", "held_stale")}
        return {f"buffer/{name}": float(value) for name, value in values.items()}

    async def error_summary(self) -> tuple[int, int, list[str]]:
        """Samples that failed, samples in all, and the last error texts of this process (at most 5, oldest first)."""
        return self._counts["samples_error"], self._counts["samples_total"], list(self._error_texts)

    async def close(self) -> None:
        """Ends all waits and closes the files. What is open or stored stays so, for the next start. Again is no error."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._ledger.close()
        self._store.close()

    # Synchronous sections: all changes happen in here, under the condition's lock.

    def _is_outdated(self, version: int | None) -> bool:
        """Whether what policy `version` generates now would be evicted as stale before any batch could take it."""
        if version is None:
            return False
        publish_every = self._config.weights.publish_every
        newest_version = self._next_step // publish_every * publish_every
        return version < min(self._next_step - self._config.buffer.max_staleness, newest_version)

    def _lease_now(self, actor: str, max_groups: int, now_s: float) -> list[int]:
        if self._closed:
            return []
        if self._admission.next_expiry_s <= now_s:
            with self._commit():
                for ordinal in self._admission.expire(now_s):
                    self._record("expired", ordinal, reason=f"no answer within {self._config.run.timeout_s:g} s")
            self._changed.notify_all()
        if not self._admission.num_leasable(self._replay.num_unconsumed):
            return []
        with self._commit():
            ordinals = self._admission.lease(actor, max_groups, self._replay.num_unconsumed, now_s)
            for ordinal in ordinals:
                self._record("leased", ordinal, actor=actor)
        return ordinals

    def _end_item(self, actor: str, group: Group, usable: Group, errors: list[str]) -> Group | None:
        """The group to store now; None when its item ended before or too little of it is left (`usable`: what is left)."""
        if not self._admission.end(group.group_id):
            self._counts["duplicates"] += 1
            return None
        self._counts["samples_total"] += len(group.samples)
        self._counts["samples_error"] += len(errors)
        self._error_texts.extend(errors)
        kept = msgspec.structs.replace(self._held.join(usable, self._step), uses=0)
        if len(kept.samples) < MIN_SAMPLES:
            self._counts["evicted_too_small"] += 1
            reason = "too_small_held" if self._held.hold(kept) else "too_small"
            self._record("failed", group.group_id, actor=actor, reason=reason)
            return None
        self._replay.insert(meta_of(kept))
        self._record("inserted", group.group_id, actor=actor, version=kept.oldest_version)
        return kept

    def _sample_now(self, step: int, num_groups: int) -> list[Group]:
        """The groups of the batch; empty when there are too few, or when closed."""
        if self._closed:
            return []
        self._step = step
        self._replay.evict_stale(step)  # What leaves makes room for groups that may be older.
        is_full = not self._admission.num_open and not self._admission.num_leasable(self._replay.num_unconsumed)
        chosen = self._replay.take(num_groups, step, is_full=is_full)
        if not chosen:
            self._commit_evictions()
            return []
        self._next_step = step + 1
        with self._commit():
            groups = [msgspec.structs.replace(group, uses=group.uses + 1) for group in self._store.get_many(chosen)]
            for group in groups:
                check_staleness(group.group_id, group.oldest_version, step, self._config.buffer.max_staleness)
                self._record("trained", group.group_id, version=group.oldest_version)
            self._store.set_uses({group.group_id: group.uses for group in groups})
        self._changed.notify_all()
        return groups

    def _commit_evictions(self) -> None:
        if self._replay.has_evicted:
            with self._commit():
                pass
            self._changed.notify_all()

    async def _wait_for_change(self, until_s: float) -> None:
        """Returns when something changed, or when the loop's clock shows `until_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                await self._changed.wait()

    def _record(self, event: Any, group_id: int, **details: Any) -> None:
        self._ledger.record(event, group_id, step=self._step, **details)

    # Disk

    @contextlib.contextmanager
    def _commit(self) -> Iterator[None]:
        """Commits the change made inside, with the evictions it caused and the state after it; then writes the ledger.

        On any exception nothing of it remains, neither on disk nor in memory.
        """
        try:
            with self._store.transaction():
                yield
                evicted = self._replay.pop_evicted()
                for group, reason in evicted:
                    self._record("evicted", group.group_id, version=group.version, reason=reason)
                self._store.delete_many(group.group_id for group, _ in evicted)
                self._store.save_state(self._state())
        except BaseException:
            self._ledger.discard()
            self._recover()
            raise
        self._ledger.flush()

    def _state(self) -> dict[str, Any]:
        return {
            "stream": self._stream,
            "step": self._step,
            "admission": self._admission.get_state(),
            "replay_counts": dict(self._replay.counts),
            "counts": dict(self._counts),
            "held": self._held.get_state(),
        }

    def _recover(self) -> None:
        """Reads the memory back from the disk. Leases on items still open stay with whoever holds them in this process."""
        state = self._store.load_state()
        if state is None:
            return
        self._step = self._next_step = state["step"]
        self._counts = Counter(state["counts"])
        self._held.set_state(state["held"])
        self._admission.set_state(state["admission"])
        self._replay.set_state({"groups": self._store.recover(), "counts": state["replay_counts"]})

    def _check_same_stream(self, directory: Path) -> None:
        state = self._store.load_state()
        if state is not None and state["stream"] != self._stream:
            self._store.close()
            raise ConfigError(
                f"{directory} was started with run.seed = {state['stream']['seed']} and {state['stream']['num_rows']} rows of data, "
                f"now run.seed = {self._stream['seed']} and there are {self._stream['num_rows']}: its group ids would mean other prompts. "
                "Restore seed and data, or set another run.dir."
            )

    def _complete_ledger(self, statuses: dict[int, str]) -> None:
        """Adds the lines that the last process committed but could not write, and says that its leases are void."""
        for ordinal, status in statuses.items():
            is_stored = ordinal in self._replay
            if status == "leased" and self._admission.is_open(ordinal):
                self._record("expired", ordinal, reason="buffer restarted")
            elif status in ("leased", "waiting") and is_stored:
                self._record("inserted", ordinal, version=self._replay[ordinal].version, reason="written at restart")
            elif status in ("leased", "waiting") and not self._admission.is_open(ordinal):
                self._record("failed", ordinal, reason="written at restart")
            elif status == "stored" and not is_stored:
                self._record("evicted", ordinal, reason="written at restart")


def _with_ref_logprobs(group: Group, ref_logprobs: list[float]) -> Group:
    if len(ref_logprobs) != len(group.samples) or not all(map(math.isfinite, ref_logprobs)):
        raise DataError(
            f"reference log-probs of group {group.group_id}: {ref_logprobs}; expected {len(group.samples)} finite numbers, one per sample."
        )
    pairs = zip(group.samples, ref_logprobs, strict=True)
    return msgspec.structs.replace(group, samples=tuple(msgspec.structs.replace(sample, ref_logprob=value) for sample, value in pairs))
