"""One shard of the replay buffer without its waits: every method is one change, in memory and, in one
transaction, on disk. Insertions alone are noted, so that those that come together are one transaction:
`commit` writes them, unless another change has done so.

    admission, replay, usable   say what may be leased, what is stored, what of a group is kept (pure)
    store, ledger               keep both on disk

The process may be killed at any moment. Every change is written before an insertion is acknowledged or an
item handed out. A new process finds leases, uses, batches and the frontier as they were, and reads no more
than is open or stored: a start takes as long after months as on the first day. A full disk refuses insertions
and leases; sampling goes on from memory, ahead of the disk, and `disk_errors` counts.

The batch of a step is recorded: asked for again it is the same batch, until `forget_batches` says that a
checkpoint has passed it. So a learner that goes back to its checkpoint is given what it was given before, and
no use is counted twice.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from buffer.admission import Admission
from buffer.band import Band
from buffer.curriculum import Curriculum
from buffer.equal_rewards import EqualRewards
from buffer.layout import check_num_shards, ledger_name, share_of, store_name
from buffer.ledger import Ledger, missing_events, read_statuses
from buffer.refusals import another_stream, check_ref_logprobs, forgotten
from buffer.replay import EVICTIONS, Replay, meta_of
from buffer.sampling import GroupMeta
from buffer.sources import Part
from buffer.store import BatchEntry, DiskFullError, RecordedBatch, Store, StoreError
from buffer.stream import PromptStream
from buffer.usable import MIN_SAMPLES, ErrorTexts, HeldSamples, Usable, generated_rewards, usable_in
from core.config import Config
from core.records import StoredGroup, WorkItem, encode, encode_batch, head_of
from core.staleness import StalenessBound

_ADMISSION_COUNTS = ("failed", "expired", "reissued", "lost_too_often", "rested", "ignored_reports")
_COUNTS = ("evicted_too_small", "samples_error", "samples_total", "taken", "starts", "disk_errors")
_log = logging.getLogger(__name__)


class Shard:
    """Leases, groups and batches of one shard; it recovers what `directory` holds, and calls `on_change`
    after every change.

    `buffer/server.py` adds the waits of its callers. Times are seconds on any one monotonic clock, given by
    the caller. Raises ConfigError when the directory belongs to another prompt stream, StoreError when its
    database cannot be used.
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        num_prompts: int,
        shard: int,
        on_change: Callable[[], None],
        parts: tuple[Part, ...] = (),
    ) -> None:
        self._config, self._shard, self._on_change = config, shard, on_change
        self._num_shards = config.buffer.num_shards
        self._stream = PromptStream.of(config, num_prompts, parts)
        directory.mkdir(parents=True, exist_ok=True)
        check_num_shards(directory, self._num_shards)
        allowed, capacity, batch = (
            share_of(total, shard, self._num_shards)
            for total in (config.admitted_groups, config.buffer.capacity, config.learner.groups_per_step)
        )
        self._curriculum = Curriculum(
            config.data.curriculum_visits, config.data.curriculum_reward, self._stream.num_prompts_at(shard)
        )
        portioned = 0 if config.buffer.samples_per_insert else batch
        timeout_s = config.run.timeout_s
        self.admission = Admission(allowed, timeout_s, shard, self._num_shards, self._passes_over, portioned)
        self._replay = Replay(
            config.buffer.model_copy(update={"capacity": capacity}), config.run.seed + shard
        )
        self._bound = StalenessBound(config.buffer.max_staleness)
        self._held = HeldSamples(config.buffer.max_staleness)
        self._equal = EqualRewards(config.buffer.skip_equal_rewards, max(1, batch))
        self._band = Band(config.buffer.samples_per_insert)
        self.counts: Counter[str] = Counter()
        self._batches: dict[int, RecordedBatch] = {}
        self._left: list[tuple[GroupMeta, str]] = []  # Groups that left and are not written yet.
        self.error_texts = ErrorTexts()
        self._step = self.next_step = 0  # The newest step told; the step of the next batch.
        self._watermark = self._ledger_forgotten = 0
        self._closed = False
        self._has_noted = self._is_behind = False  # Insertions to commit; what the disk refused.
        self.store = Store(directory / store_name(shard, self._num_shards), config.buffer.fsync)
        state = self._recover(directory)
        self.ledger = self._open_ledger(directory / ledger_name(shard, self._num_shards), state)
        self.counts["starts"] += 1
        self._write_or_count()  # The process before may have died of a full disk.

    # Leases

    def is_outdated(self, version: int | None) -> bool:
        """Returns whether what policy `version` generates now would be evicted as stale before any batch
        could take it.
        """
        return self._bound.is_born_stale(version, self.next_step, self._config.weights.publish_every)

    def num_leasable(self, now_s: float) -> int:
        """Returns how many items `lease` would give, after taking back the leases that ran out."""
        self.expire(now_s)
        return self.num_admitted()

    def num_admitted(self) -> int:
        """Returns how many items may be leased before another lease runs out."""
        return 0 if self._closed else self.admission.num_leasable(self._blocking())

    def expire(self, now_s: float) -> None:
        """Takes back the leases that ran out."""
        if self.admission.next_expiry_s <= now_s:
            again, ended = self.admission.expire(now_s)
            if again or ended:
                self._take_back("", again, f"no answer within {self._config.run.timeout_s:g} s", ended)

    def renew(self, actor: str, holding: Sequence[int], now_s: float) -> None:
        """Restarts the leases in `holding`; other items that the actor was given, and does not know of, are
        issued again.
        """
        self.admission.renew(actor, holding, now_s)
        known = set(holding)
        if unknown := [ordinal for ordinal in self.admission.held_by(actor) if ordinal not in known]:
            self._take_back(actor, self.admission.give_back(actor, unknown), "not known to its actor")

    def lease(self, actor: str, max_groups: int, now_s: float) -> list[int]:
        """Leases items to `actor` and returns their ordinals, none where none is admitted. Raises
        DiskFullError, with nothing held then.
        """
        if not self.num_leasable(now_s):
            return []
        self._catch_up()
        ordinals = self.admission.lease(actor, max_groups, self._blocking(), now_s)
        for ordinal in self.admission.pop_passed_over():
            self._record("rested", ordinal)
        for ordinal in ordinals:
            self._record("leased", ordinal, actor=actor)
        try:
            self._write()
        except DiskFullError:
            self._take_back(actor, self.admission.give_back(actor, ordinals), "the disk is full")
            raise
        return ordinals

    def item(self, ordinal: int) -> WorkItem:
        """Returns the item at `ordinal` of this run's prompt stream."""
        return self._stream.item(ordinal)

    def _passes_over(self, ordinal: int) -> bool:
        is_due = self._curriculum.num_resting > 0
        return is_due and self._curriculum.passes_over(self.item(ordinal).prompt_index)

    def give_back(self, actor: str, ordinals: Sequence[int]) -> None:
        """Takes leases of `actor` back, unfinished; the items are issued again, first of all."""
        self._take_back(actor, self.admission.give_back(actor, ordinals), "given back")

    def release_actor(self, actor: str) -> None:
        """Takes back all leases of an actor that is gone; items that were lost too often end here."""
        again, ended = self.admission.lose_actor(actor)
        self._take_back(actor, again, "actor gone", ended)

    def release_all(self) -> None:
        """Takes back the leases of all actors: they were those of an earlier start of the run."""
        self._take_back("", self.admission.release_all(), "run started again")

    def _take_back(self, actor: str, again: Sequence[int], reason: str, ended: Sequence[int] = ()) -> None:
        """Records items that wait to be issued again, and those that were lost too often; a full disk may
        learn of it later.
        """
        for ordinal in (*again, *ended):
            self._record("expired", ordinal, actor=actor, reason=reason)
        for ordinal in ended:
            self._record(
                "failed", ordinal, actor=actor, reason="lost too often: whoever had it died or was late"
            )
        self._write_or_count()

    def fail(self, actor: str, ordinals: Sequence[int], reason: str) -> None:
        """Ends items without a group; of those that ended, or are another actor's by now, a count is kept."""
        self._catch_up()
        for ordinal in self.admission.fail(actor, ordinals):
            self._record("failed", ordinal, actor=actor, reason=reason)
        self._write()

    # Groups

    def insert(self, actor: str, payloads: Sequence[bytes]) -> list[int]:
        """Ends the items of encoded Groups and notes what is usable of them; returns all their ids, which are
        acknowledged once `commit` has returned. See `ReplayBuffer.insert`.
        """
        # All checks come before any change.
        found = [usable_in(payload) for payload in payloads]
        for usable in found:
            self.admission.is_open(usable.head.group_id)
        self._catch_up()
        self._has_noted = True
        for usable in found:
            self._end_item(actor, usable)
        if sentence := self._equal.pop_warning():
            _log.warning("%s%s", f"shard {self._shard}: " if self._num_shards > 1 else "", sentence)
        return [usable.head.group_id for usable in found]

    def commit(self) -> None:
        """Writes the insertions that are noted, all of them in one transaction. Raises DiskFullError."""
        if self._has_noted:
            self._write()
        else:  # Another change has taken them along, and the disk may have refused it.
            self._catch_up()

    def _end_item(self, actor: str, usable: Usable) -> None:
        """Ends the group's item, if it is open, and stores what is usable of it, unless too little is."""
        head, payload, errors, group = usable
        if not self.admission.end(head.group_id):
            self.counts["duplicates"] += 1
            return
        self.counts["samples_total"] += len(head.samples) + len(errors)
        self.counts["samples_error"] += len(errors)
        self.error_texts.note((text, 1) for text in errors)
        if self._config.data.curriculum is not None and len(head.samples) >= MIN_SAMPLES:
            self._curriculum.observe(self.item(head.group_id).prompt_index, generated_rewards(head))
        if group is not None:
            kept = self._held.join(group, self._step)
            if len(kept.samples) < MIN_SAMPLES:
                self.counts["evicted_too_small"] += 1
                reason = "too_small_held" if self._held.hold(kept) else "too_small"
                self._record("failed", group.group_id, actor=actor, reason=reason)
                return
            if kept is not group:
                head, payload = head_of(kept), encode(kept)
        meta = meta_of(head)
        self._record("inserted", head.group_id, actor=actor, version=meta.version)
        if self._equal.skips([sample.reward for sample in head.samples if sample.reward is not None]):
            self._replay.skip(meta)
            return
        self.store.put_group(meta, len(head.samples), StoredGroup(encode(head), payload))
        self._replay.insert(meta)

    def put_ref_logprobs(self, ref_logprobs: Mapping[int, Sequence[float]]) -> int:
        """Caches reference log-prob sums with the groups still stored and returns how many. Raises DataError,
        nothing changed, for wrong ones.
        """
        found = {group_id: values for group_id, values in ref_logprobs.items() if group_id in self._replay}
        for group_id, values in found.items():
            check_ref_logprobs(group_id, values, self.store.num_samples(group_id))
        for group_id, values in found.items():
            self.store.put_ref_logprobs(group_id, values)
        self._write_or_count()
        return len(found)

    # Batches

    def sample(self, step: int, num_groups: int, total: int) -> bytes | None:
        """Returns the encoded batch, or this shard's part of a batch of `total` groups; None when there are
        too few groups, or when closed.
        """
        if self._closed:
            return None
        if step in self._batches:
            return self._read_batch(step)
        if self.is_past(step):
            raise forgotten(step)
        self.advance(step)
        if self._exceeds_band(num_groups):
            return None
        chosen = self._replay.take(num_groups, step)
        if not chosen:
            return None
        return self._hand_out(step, chosen, total)

    def recorded(self, step: int) -> RecordedBatch | None:
        """Returns the batch of this step, if it was handed out."""
        return self._batches.get(step)

    def is_past(self, step: int) -> bool:
        """Returns whether no batch of this step is made any more; one that is recorded can still be had."""
        return step < max(self._watermark, self.next_step)

    def num_takeable(self, step: int) -> int:
        """Returns how many groups a batch of this step may take now."""
        return 0 if self._closed else self._replay.num_takeable(step)

    def advance(self, step: int) -> None:
        """Takes note of the learner's step and evicts what is stale at it."""
        self._step = max(self._step, step)
        self._replay.evict_stale(self._step)
        if self._replay.has_evicted:
            self._write_or_count()

    def forget_batches(self, before_step: int) -> None:
        """Deletes the batches before this step: none of them will be asked for again."""
        self._drop_batches(before_step)
        self._write_or_count()

    def _hand_out(self, step: int, chosen: list[int], total: int) -> bytes:
        # Groups taken for the last time have left the index already.
        self._left += self._replay.pop_evicted()
        left = {group.group_id: group for group, _ in self._left}
        metas = [left[group_id] if group_id in left else self._replay[group_id] for group_id in chosen]
        known = self.store.with_ref_logprobs(chosen)
        for meta in metas:
            self._record("trained", meta.group_id, version=meta.version)
        entries = [BatchEntry(meta.group_id, meta.uses, meta.group_id in known) for meta in metas]
        self.counts["taken"] += len(entries)
        self.next_step = step + 1
        batch = self._batches[step] = RecordedBatch(total, entries)
        self.store.put_batch(step, batch)
        if not self._config.checkpoint.every:
            self._drop_batches(step)
        self._write_or_count()
        return self._read_batch(step)

    def _read_batch(self, step: int) -> bytes:
        return encode_batch(step, self.store.read_batch(self._batches[step]))

    def _drop_batches(self, before_step: int) -> None:
        self._watermark = max(self._watermark, before_step)
        for step in [step for step in self._batches if step < before_step]:
            del self._batches[step]
        self.store.forget_batches(before_step)

    def _blocking(self) -> int:
        """Returns the groups that count against admission."""
        return self._band.blocking(
            self._replay.num_unconsumed,
            stored=self._replay.num_stored,
            taken=self.counts["taken"],
            forgone=self.counts["uses_forgone"],
        )

    def _is_full(self) -> bool:
        """Returns whether no group will come before one leaves."""
        return not self.admission.num_open and not self.admission.num_leasable(self._blocking())

    def _exceeds_band(self, num_groups: int) -> bool:
        taken, stored = self.counts["taken"], self._replay.num_stored
        return self._band.exceeds(taken=taken, num_groups=num_groups, stored=stored) and not self._is_full()

    # Everybody

    def stats(self) -> dict[str, float]:
        """Returns the metrics without the waits; counts are cumulative, over restarts too."""
        replay, admission = self._replay.counts, self.admission.counts
        values: dict[str, float] = {
            "groups": len(self._replay),
            "unconsumed": self._replay.num_unconsumed,
            "tokens": self._replay.num_tokens,
            "leased": self.admission.num_open,
            "frontier": self.admission.frontier,
            "duplicates": self.counts["duplicates"] + replay["duplicates"],
            "ledger_unwritten": self.ledger.num_unwritten,
            "changes_unwritten": self.store.num_pending if self._is_behind else 0,
        }
        values |= {name: replay[name] for name in ("inserted", *EVICTIONS, "strata_short")}
        values |= {name: admission[name] for name in _ADMISSION_COUNTS}
        values |= {name: self.counts[name] for name in _COUNTS}
        values["equal_let_through"] = self._equal.let_through
        values["resting"] = self._curriculum.num_resting
        return values | {
            name: self._held.counts[name] for name in ("held_samples", "joined_samples", "held_stale")
        }

    def stop(self) -> None:
        """Stops leasing and sampling for good."""
        self._closed = True
        self._on_change()

    def close(self) -> None:
        """Closes the files; a second call does nothing. What is open or stored stays for the next start."""
        with contextlib.suppress(StoreError):  # A full disk may have room by now.
            self.commit()
        self.ledger.close(keep_back=self.store.num_pending > 0)
        self.store.close()

    # Disk

    def _record(self, event: Any, group_id: int, **details: Any) -> None:
        self.ledger.record(event, group_id, step=self._step, **details)

    def _write(self) -> None:
        """Writes every change so far, with the ledger's lines, or raises DiskFullError and keeps them."""
        for ordinal in self.admission.pop_changed():
            lease = self.admission.lease_of(ordinal)
            if lease is None:
                self.store.end_lease(ordinal)
            else:
                self.store.put_lease(ordinal, lease.actor, lease.losses)
        for prompt_index, sample in self._held.pop_changed():
            if sample is None:
                self.store.end_held(prompt_index)
            else:
                self.store.put_held(prompt_index, sample)
        self.store.put_visits(*self._curriculum.pop_changed())
        for group, reason in (*self._left, *self._replay.pop_evicted()):
            self._record("evicted", group.group_id, version=group.version, reason=reason)
            if reason != "evicted_equal":  # That was never there.
                self.store.leave(group)
                self.counts["uses_forgone"] += self._band.forgone(group.uses)
        self._left.clear()
        self._note_ledger()
        self.store.put_state(self._state())
        self._has_noted = False
        self._on_change()
        self._flush()

    def _catch_up(self) -> None:
        """Writes what the disk refused before, or raises DiskFullError, so that nothing piles up."""
        if self._is_behind:
            self._flush()

    def _note_ledger(self) -> None:
        if self._ledger_forgotten < self.ledger.synced:
            self._ledger_forgotten = self.ledger.synced
            self.store.forget_ledger(self.ledger.synced)
        if chunk := self.ledger.take_chunk():
            self.store.put_ledger(*chunk)

    def _flush(self) -> None:
        self._is_behind = True
        try:
            self.store.flush()
        except DiskFullError:
            self.counts["disk_errors"] += 1
            raise
        self._is_behind = False
        self.ledger.flush()

    def _write_or_count(self) -> None:
        """Writes every change so far; a full disk is counted: nobody was promised that this is durable."""
        with contextlib.suppress(DiskFullError):
            self._write()

    def _state(self) -> dict[str, Any]:
        return {
            "stream": self._stream.state,
            "step": self._step,
            "next_step": self.next_step,
            "watermark": self._watermark,
            "frontier": self.admission.frontier,
            "admission_counts": dict(self.admission.counts),
            "replay_counts": dict(self._replay.counts),
            "held_counts": dict(self._held.counts),
            "equal_rewards": self._equal.get_state(),
            "reward_range": self._curriculum.get_state()["range"],
            "counts": dict(self.counts),
            "ledger_end": self.ledger.end,
        }

    def _recover(self, directory: Path) -> dict[str, Any] | None:
        """Takes over what the disk holds, if anything, and returns the state that was found."""
        state = self.store.load_state()
        if state is None:
            return None
        if state["stream"] != self._stream.state:
            self.store.close()
            raise another_stream(directory, state["stream"], self._stream.state)
        self._step, self.next_step, self._watermark = state["step"], state["next_step"], state["watermark"]
        self.counts = Counter(state["counts"])
        self._batches = self.store.load_batches()
        self._equal.set_state(state["equal_rewards"])
        self._curriculum.set_state({"visits": self.store.load_visits(), "range": state["reward_range"]})
        self._held.set_state({"samples": self.store.load_held(), "counts": state["held_counts"]})
        leases = self.store.load_leases()
        self.admission.set_state(
            {"frontier": state["frontier"], "counts": state["admission_counts"], "leases": leases}
        )
        self._replay.set_state({"groups": self.store.load_groups(), "counts": state["replay_counts"]})
        return state

    def _open_ledger(self, path: Path, state: Mapping[str, Any] | None) -> Ledger:
        """Opens the ledger as the database knows it; where they do not fit, adds the lines that lead to the
        database's state.
        """
        ledger = Ledger(path)
        if ledger.recover(0 if state is None else state["ledger_end"], self.store.load_ledger()):
            return ledger
        self.store.forget_ledger()
        ledger.end_line()
        admission = self.admission.get_state()
        issued = (position * self._num_shards + self._shard for position in range(admission["frontier"]))
        leases = {ordinal: actor for ordinal, actor, _ in admission["leases"]}
        stored = {group.group_id for group in self._replay.get_state()["groups"]}
        entries = [entry for batch in self._batches.values() for entry in batch.entries]
        used_up = {entry.group_id for entry in entries if entry.uses >= self._config.buffer.uses_per_group}
        statuses = read_statuses(path, self._num_shards)
        for event, ordinal, reason in missing_events(statuses, issued, leases, stored, used_up):
            ledger.record(event, ordinal, step=self._step, actor=leases.get(ordinal, ""), reason=reason)
        return ledger
