"""One shard of the replay buffer as an asyncio class; a run wraps it as a Ray actor, tests run it as it is.

    actor    lease --> WorkItems ... insert(Groups) --> ids acknowledged after the commit, or fail, or give_back
    learner  sample(step) --> Batch ... set_ref_logprobs ... set_watermark(step of a checkpoint)

| wait   | of      | until                                             | ended by                                      |
|--------|---------|---------------------------------------------------|-----------------------------------------------|
| lease  | actors  | open + stored-unconsumed < admitted, or a re-issue | sample, eviction, fail, a lease that runs out |
| lease  | actor   | its weights are new enough for the next batch      | a publication; it is told at once, and asks again |
| sample | learner | `num_groups` stored groups, old enough             | insert                                        |

Neither waits for the other for ever: a learner waits only while fewer than `groups_per_step <= admitted` groups are here,
and then an actor may lease. For groups as old as `min_staleness`, and for the band `samples_per_insert`, it waits only while
some may still come.

The process may be killed at any moment. Every change is one synchronous section, written to disk in one transaction before
an insertion is acknowledged or an item handed out; a new process finds leases, uses, batches and the frontier as they were.
A full disk refuses insertions and leases; sampling goes on from memory, ahead of the disk, and `disk_errors` counts.

The batch of a step is recorded: asked for again it is the same batch, until `set_watermark` says that a checkpoint has passed it.
So a learner that goes back to its checkpoint is given what it was given before, and no use is counted twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple

from buffer.admission import Admission, work_item
from buffer.layout import check_num_shards, ledger_name, share_of, store_name
from buffer.ledger import Ledger, missing_events, read_statuses
from buffer.records import Group, decode_group, encode, encode_batch
from buffer.replay import EVICTIONS, Replay, meta_of
from buffer.sampling import GroupMeta
from buffer.store import BatchEntry, DiskFullError, RecordedBatch, Store
from buffer.usable import MIN_SAMPLES, HeldSamples, usable_group
from buffer.waits import WaitTimer
from cluster.config import Config
from cluster.errors import ConfigError, DataError

_NUM_ERROR_TEXTS = 5


class Offer(NamedTuple):
    """What a shard has now.

    change          counts its changes, for `changed_since`
    recorded        groups it gave to this step's batch, which is one of `total` groups on all shards; 0 and 0: none
    is_forgotten    it is past the step, and has no part in its batch
    """

    change: int
    num_leasable: int = 0
    num_takeable: int = 0
    recorded: int = 0
    total: int = 0
    is_forgotten: bool = False


class ReplayBuffer:
    """Leases, groups and batches of one shard; recovers what `run_dir` holds. Times come from the event loop's clock.

    Raises ConfigError when `run_dir` belongs to another prompt stream, StoreError when its database cannot be used.
    """

    def __init__(self, config: Config, run_dir: str, num_rows: int, shard: int = 0) -> None:
        self._config, self._num_rows, self._shard = config, num_rows, shard
        self._num_shards = config.buffer.num_shards
        self._stream = {"seed": config.run.seed, "num_rows": num_rows}
        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        check_num_shards(directory, self._num_shards)
        allowed, capacity = (share_of(total, shard, self._num_shards) for total in (config.admitted_groups, config.buffer.capacity))
        self._admission = Admission(allowed, config.run.timeout_s, shard, self._num_shards)
        self._replay = Replay(config.buffer.model_copy(update={"capacity": capacity}), config.run.seed + shard)
        self._held = HeldSamples(config.buffer.max_staleness)
        self._counts: Counter[str] = Counter()
        self._batches: dict[int, RecordedBatch] = {}
        self._left: list[tuple[GroupMeta, str]] = []  # Groups that left, to be written.
        self._error_texts: deque[str] = deque(maxlen=_NUM_ERROR_TEXTS)
        self._step = self._next_step = 0  # The newest step told, and that of the batch to come.
        self._watermark = 0
        self._closed = False
        self._gone: set[str] = set()
        self._change = 0
        self._changed = asyncio.Condition()
        self._admission_wait = WaitTimer()
        self._batch_wait = WaitTimer()
        self._store = Store(directory / store_name(shard, self._num_shards), config.buffer.fsync)
        self._recover(directory)
        self._ledger = self._open_ledger(directory / ledger_name(shard, self._num_shards))
        self._counts["starts"] += 1
        self._write_or_count()  # It may have died of a full disk.

    # Actors

    async def lease(
        self, actor: str, max_groups: int, timeout_s: float, version: int | None = None, holding: list[int] | None = None
    ) -> list[bytes] | None:
        """Up to `max_groups` encoded WorkItems, as soon as one is admitted; none after `timeout_s` seconds or when closed.

        None instead of a list: samples of policy `version` would be too stale for the next batch; ask again with newer weights.
        `holding`: the items the actor still works on; others that it was given are issued again, since it does not know of them
        (an answer was lost with this process). Raises DiskFullError.
        """
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        async with self._changed:
            if actor in self._gone:
                return []  # It is gone: this call of it was on its way when it died.
            if holding is not None and (unknown := [o for o in self._admission.held_by(actor) if o not in set(holding)]):
                self._take_back(actor, self._admission.give_back(actor, unknown), "not known to its actor")
            with self._admission_wait.running(clock):
                if self._is_outdated(version):
                    return None
                ordinals = self._lease_now(actor, max_groups, clock())
                while not ordinals and clock() < deadline_s and not self._closed:
                    await self._wait_for_change(min(deadline_s, self._admission.next_expiry_s))
                    if actor in self._gone:
                        break  # The actor died while this call of it waited.
                    if self._is_outdated(version):
                        return None
                    ordinals = self._lease_now(actor, max_groups, clock())
        return [encode(work_item(ordinal, seed=self._config.run.seed, num_rows=self._num_rows)) for ordinal in ordinals]

    async def insert(self, actor: str, payloads: list[bytes]) -> list[int]:
        """Stores encoded, scored Groups; returns all their ids once that is durable: none of them need be sent again.

        Idempotent: an item ends once, whoever reports it, also after its lease ran out; later reports of it are counted as
        duplicates. Raises msgspec.ValidationError, DataError (unscored) or LeaseError (never leased), with nothing stored;
        DiskFullError: send them again later.
        """
        groups = [decode_group(payload) for payload in payloads]
        # All checks come before any change.
        checked = [(group, payload, *usable_group(group)) for group, payload in zip(groups, payloads, strict=True)]
        for group in groups:
            self._admission.is_open(group.group_id)
        async with self._changed:
            self._flush()
            for entry in checked:
                self._end_item(actor, *entry)
            self._write()
        return [group.group_id for group in groups]

    async def fail(self, actor: str, ordinals: list[int], reason: str) -> None:
        """Ends items that cannot be generated. Ignored, and counted, for those that ended or are another actor's by now."""
        async with self._changed:
            for ordinal in self._admission.fail(actor, ordinals):
                self._record("failed", ordinal, actor=actor, reason=reason)
            self._write()

    async def give_back(self, actor: str, ordinals: list[int]) -> None:
        """Hands leases back unfinished; the items are issued again, first of all. Others than the actor's are ignored, counted."""
        async with self._changed:
            self._take_back(actor, self._admission.give_back(actor, ordinals), "given back")

    async def release_actor(self, actor: str) -> None:
        """Takes back all leases of an actor that is gone for good; calls of it that still wait, or come later, get none."""
        async with self._changed:
            self._gone.add(actor)
            again, ended = self._admission.lose_actor(actor)
            self._take_back(actor, again, "actor gone", ended)

    async def release_all(self) -> None:
        """Takes back the leases of all actors: they were those of an earlier start of the run."""
        async with self._changed:
            self._gone.clear()
            self._take_back("", self._admission.release_all(), "run started again")

    # Learner

    async def sample(self, step: int, num_groups: int, timeout_s: float, total: int | None = None) -> bytes | None:
        """The encoded Batch of learner step `step` as soon as `num_groups` groups are stored; None after `timeout_s` seconds
        or when closed. `Group.uses` counts this batch too: 1 at the first use. The same step again is the same batch, whatever
        `num_groups` says. `total`: groups of the whole batch, when this is a part of one. Raises StalenessError rather than hand
        out a group older than `max_staleness`, DataError for a step whose batch was forgotten."""
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        async with self._changed:
            with self._batch_wait.running(clock):
                batch = self._sample_now(step, num_groups, total or num_groups)
                while batch is None and clock() < deadline_s and not self._closed:
                    await self._wait_for_change(deadline_s)
                    batch = self._sample_now(step, num_groups, total or num_groups)
        return batch

    async def set_step(self, step: int) -> None:
        """Tells the learner's step: groups that no later batch may hold are evicted."""
        async with self._changed:
            self._advance(step)

    async def set_watermark(self, step: int) -> None:
        """A checkpoint of learner step `step` is durable: no batch before it will be asked for again."""
        async with self._changed:
            self._forget_batches(step)
            self._write_or_count()

    async def set_ref_logprobs(self, ref_logprobs: dict[int, list[float]]) -> int:
        """Caches reference log-prob sums (nats; group id -> one per sample, in the batch's order) with the groups still stored.

        Returns the number of groups updated. Raises DataError, nothing changed, for a wrong length or a non-finite value.
        """
        async with self._changed:
            found = {group_id: values for group_id, values in ref_logprobs.items() if group_id in self._replay}
            for group_id, values in found.items():
                _check_ref_logprobs(group_id, values, self._store.num_samples(group_id))
            for group_id, values in found.items():
                self._store.put_ref_logprobs(group_id, values)
            self._write_or_count()
        return len(found)

    # Everybody

    async def offer(self, step: int | None = None, waited_s: float = 0.0) -> Offer:
        """What may be leased (step None) or what a batch of learner step `step` may take, now; evicts what is stale at that step.

        `waited_s`: how long the caller has waited for the same since it last asked.
        """
        async with self._changed:
            if step is None:
                self._admission_wait.add(waited_s)
                return Offer(self._change, num_leasable=self._num_leasable(asyncio.get_running_loop().time()))
            self._batch_wait.add(waited_s)
            if batch := self._batches.get(step):
                return Offer(self._change, recorded=len(batch.entries), total=batch.total)
            if self._is_past(step):
                return Offer(self._change, is_forgotten=True)
            self._advance(step)
            return Offer(self._change, num_takeable=self._num_takeable(step))

    async def changed_since(self, change: int, timeout_s: float) -> None:
        """Returns as soon as there was another change than number `change`, or after `timeout_s`."""
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        async with self._changed:
            while self._change == change and clock() < deadline_s and not self._closed:
                await self._wait_for_change(min(deadline_s, self._admission.next_expiry_s))
                if self._admission.next_expiry_s <= clock():
                    self._expire(clock())

    async def stats(self) -> dict[str, float]:
        """Metrics; counts and waits are cumulative, counts over restarts too.

        `frontier = inserted + evicted_too_small + failed + leased` and
        `inserted` = `groups` and all of buffer.replay.EVICTIONS at any time.
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
            "changes_unwritten": self._store.num_pending,
        }
        values |= {name: replay[name] for name in ("inserted", *EVICTIONS, "taken_young", "strata_short")}
        values |= {name: admission[name] for name in ("failed", "expired", "reissued", "lost_too_often", "ignored_reports")}
        names = ("evicted_too_small", "samples_error", "samples_total", "taken", "starts", "disk_errors")
        values |= {name: self._counts[name] for name in names}
        values |= {name: self._held.counts[name] for name in ("held_samples", "joined_samples", "held_stale")}
        return {f"buffer/{name}": float(value) for name, value in values.items()}

    async def next_step(self) -> int:
        """The learner step after the newest whose batch was asked for: no sample is of a newer version."""
        return self._next_step

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

    def _blocking(self) -> int:
        """Groups that count against admission: those in no batch yet, or, below the band, as many as its lower end misses."""
        band, unconsumed = self._config.buffer.samples_per_insert, self._replay.num_unconsumed
        if band is None or not band[0]:
            return unconsumed
        low = band[0]
        missing = low * self._replay.counts["inserted"] - self._counts["taken"] - self._counts["uses_forgone"]
        return max(unconsumed, math.ceil(missing / low))

    def _num_leasable(self, now_s: float) -> int:
        self._expire(now_s)
        return 0 if self._closed else self._admission.num_leasable(self._blocking())

    def _expire(self, now_s: float) -> None:
        if self._admission.next_expiry_s <= now_s:
            again, ended = self._admission.expire(now_s)
            if again or ended:
                self._take_back("", again, f"no answer within {self._config.run.timeout_s:g} s", ended)

    def _take_back(self, actor: str, again: list[int], reason: str, ended: list[int] | tuple[()] = ()) -> None:
        """Records items that are waiting to be issued again, and those that were lost too often; a full disk may learn of it later."""
        for ordinal in (*again, *ended):
            self._record("expired", ordinal, actor=actor, reason=reason)
        for ordinal in ended:
            self._record("failed", ordinal, actor=actor, reason="lost too often: whoever had it died or was late")
        self._write_or_count()

    def _lease_now(self, actor: str, max_groups: int, now_s: float) -> list[int]:
        if not self._num_leasable(now_s):
            return []
        self._flush()
        ordinals = self._admission.lease(actor, max_groups, self._blocking(), now_s)
        for ordinal in ordinals:
            self._record("leased", ordinal, actor=actor)
        try:
            self._write()
        except DiskFullError:
            self._take_back(actor, self._admission.give_back(actor, ordinals), "the disk is full")
            raise
        return ordinals

    def _end_item(self, actor: str, group: Group, payload: bytes, usable: Group, errors: list[str]) -> None:
        """Ends the group's item and stores what is usable of it, unless the item ended before or too little is left."""
        if not self._admission.end(group.group_id):
            self._counts["duplicates"] += 1
            return
        self._counts["samples_total"] += len(group.samples)
        self._counts["samples_error"] += len(errors)
        self._error_texts.extend(errors)
        kept = self._held.join(usable, self._step)
        if len(kept.samples) < MIN_SAMPLES:
            self._counts["evicted_too_small"] += 1
            reason = "too_small_held" if self._held.hold(kept) else "too_small"
            self._record("failed", group.group_id, actor=actor, reason=reason)
            return
        meta = meta_of(kept)
        self._store.put_group(meta, len(kept.samples), payload if kept is group else encode(kept))
        self._replay.insert(meta)
        self._record("inserted", group.group_id, actor=actor, version=meta.version)

    def _sample_now(self, step: int, num_groups: int, total: int) -> bytes | None:
        """The batch; None when there are too few groups, or when closed."""
        if self._closed:
            return None
        if step in self._batches:
            return self._read_batch(step)
        if self._is_past(step):
            raise forgotten(step)
        self._advance(step)
        if self._exceeds_band(num_groups):
            return None
        chosen = self._replay.take(num_groups, step, is_full=self._is_full())
        if not chosen:
            return None
        return self._hand_out(step, chosen, total)

    def _is_past(self, step: int) -> bool:
        """Whether a batch of this step, unless it is recorded, is none to be made any more."""
        return step < max(self._watermark, self._next_step)

    def _hand_out(self, step: int, chosen: list[int], total: int) -> bytes:
        # Those taken for the last time have left the index already.
        self._left += self._replay.pop_evicted()
        left = {group.group_id: group for group, _ in self._left}
        metas = [left[group_id] if group_id in left else self._replay[group_id] for group_id in chosen]
        refs = [ref for _, ref in self._store.read_groups(chosen)]
        for meta in metas:
            self._record("trained", meta.group_id, version=meta.version)
        entries = [BatchEntry(meta.group_id, meta.uses, ref is not None) for meta, ref in zip(metas, refs, strict=True)]
        self._counts["taken"] += len(entries)
        self._next_step = step + 1
        batch = self._batches[step] = RecordedBatch(total, entries)
        self._store.put_batch(step, batch)
        if not self._config.checkpoint.every:
            self._forget_batches(step)
        self._write_or_count()
        return self._read_batch(step)

    def _read_batch(self, step: int) -> bytes:
        entries = self._batches[step].entries
        stored = self._store.read_groups(entry.group_id for entry in entries)
        # Reference log-probs cached since are left out: a batch asked for again is the same to the last bit.
        pairs = zip(entries, stored, strict=True)
        return encode_batch(step, [(entry.uses, ref if entry.has_ref_logprobs else None, payload) for entry, (payload, ref) in pairs])

    def _num_takeable(self, step: int) -> int:
        return 0 if self._closed else self._replay.num_takeable(step)

    def _is_full(self) -> bool:
        """Whether no group will come before one leaves."""
        return not self._admission.num_open and not self._admission.num_leasable(self._blocking())

    def _exceeds_band(self, num_groups: int) -> bool:
        band = self._config.buffer.samples_per_insert
        if band is None or self._is_full():
            return False
        return self._counts["taken"] + num_groups > band[1] * self._replay.counts["inserted"]

    def _advance(self, step: int) -> None:
        """Takes note of the learner's step and evicts what is stale at it."""
        self._step = max(self._step, step)
        self._replay.evict_stale(self._step)
        if self._replay.has_evicted:
            self._write_or_count()

    def _forget_batches(self, before_step: int) -> None:
        self._watermark = max(self._watermark, before_step)
        for step in [step for step in self._batches if step < before_step]:
            del self._batches[step]
        self._store.forget_batches(before_step)

    async def _wait_for_change(self, until_s: float) -> None:
        """Returns when something changed, or when the loop's clock shows `until_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                await self._changed.wait()

    def _record(self, event: Any, group_id: int, **details: Any) -> None:
        self._ledger.record(event, group_id, step=self._step, **details)

    # Disk

    def _write(self) -> None:
        """Writes every change so far, then the ledger, and tells who waits. Raises DiskFullError; the changes are kept then."""
        for ordinal in self._admission.pop_changed():
            lease = self._admission.lease_of(ordinal)
            if lease is None:
                self._store.end_lease(ordinal)
            else:
                self._store.put_lease(ordinal, lease.actor, lease.losses)
        for row, sample in self._held.pop_changed():
            if sample is None:
                self._store.end_held(row)
            else:
                self._store.put_held(row, sample)
        for group, reason in (*self._left, *self._replay.pop_evicted()):
            self._record("evicted", group.group_id, version=group.version, reason=reason)
            self._store.leave(group)
            if self._config.buffer.samples_per_insert:
                self._counts["uses_forgone"] += max(0, math.ceil(self._config.buffer.samples_per_insert[0]) - group.uses)
        self._left.clear()
        self._store.put_state(self._state())
        self._change += 1
        if self._changed.locked():  # But for the constructor, always.
            self._changed.notify_all()
        self._flush()

    def _flush(self) -> None:
        try:
            self._store.flush()
        except DiskFullError:
            self._counts["disk_errors"] += 1
            raise
        self._ledger.flush()

    def _write_or_count(self) -> None:
        """As `_write`; a full disk is counted, not raised: nobody was promised that this is durable."""
        with contextlib.suppress(DiskFullError):
            self._write()

    def _state(self) -> dict[str, Any]:
        return {
            "stream": self._stream,
            "step": self._step,
            "next_step": self._next_step,
            "watermark": self._watermark,
            "frontier": self._admission.frontier,
            "admission_counts": dict(self._admission.counts),
            "replay_counts": dict(self._replay.counts),
            "held_counts": dict(self._held.counts),
            "counts": dict(self._counts),
        }

    def _recover(self, directory: Path) -> None:
        """Takes over what the disk holds, if anything."""
        state = self._store.load_state()
        if state is None:
            return
        if state["stream"] != self._stream:
            self._store.close()
            before, now = state["stream"], self._stream
            raise ConfigError(
                f"{directory} was started with run.seed = {before['seed']} and {before['num_rows']} rows of data, now run.seed = "
                f"{now['seed']} and there are {now['num_rows']}: its group ids would mean other prompts. "
                "Restore seed and data, or set another run.dir."
            )
        self._step, self._next_step, self._watermark = state["step"], state["next_step"], state["watermark"]
        self._counts = Counter(state["counts"])
        self._batches = self._store.load_batches()
        self._held.set_state({"samples": self._store.load_held(), "counts": state["held_counts"]})
        leases = self._store.load_leases()
        self._admission.set_state({"frontier": state["frontier"], "counts": state["admission_counts"], "leases": leases})
        self._replay.set_state({"groups": self._store.load_groups(), "counts": state["replay_counts"]})

    def _open_ledger(self, path: Path) -> Ledger:
        """The ledger, with the lines added that the last process committed but could not write."""
        statuses, state = read_statuses(path), self._admission.get_state()
        ledger = Ledger(path)
        issued = (position * self._num_shards + self._shard for position in range(state["frontier"]))
        leases = {ordinal: actor for ordinal, actor, _ in state["leases"]}
        stored = {group.group_id for group in self._replay.get_state()["groups"]}
        entries = [entry for batch in self._batches.values() for entry in batch.entries]
        used_up = {entry.group_id for entry in entries if entry.uses >= self._config.buffer.max_uses}
        for event, ordinal, reason in missing_events(statuses, issued, leases, stored, used_up):
            ledger.record(event, ordinal, step=self._step, actor=leases.get(ordinal, ""), reason=reason)
        return ledger


def forgotten(step: int) -> DataError:
    """The error of whoever asks for a batch that a checkpoint, or another batch, has passed."""
    return DataError(f"the batch of step {step} was forgotten: the buffer is past it. Resume from a newer checkpoint.")


def _check_ref_logprobs(group_id: int, values: list[float], num_samples: int | None) -> None:
    if (num_samples is not None and len(values) != num_samples) or not all(map(math.isfinite, values)):
        raise DataError(f"reference log-probs of group {group_id}: {values}; expected {num_samples} finite numbers, one per sample.")
