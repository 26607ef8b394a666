"""Decides what of a group is worth storing, holds the sample of a group too small for that, and keeps why
samples failed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from buffer.outline import plain_head_in
from core.errors import DataError
from core.records import Group, GroupHead, Sample, decode_group, encode, head_of
from core.staleness import StalenessBound, counted_version

MIN_SAMPLES = 2
"""A group with fewer samples carries no signal: its leave-one-out mean does not exist."""


MAX_KINDS = 20
"""Kinds of errors that are kept."""
NUM_SHOWN = 5
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")


class Usable(NamedTuple):
    """What is usable of an encoded group: its head and its bytes.

    errors   the error texts of the samples that were left out
    group    is the same, decoded, where it had to be looked at; None for one that is whole
    """

    head: GroupHead
    payload: bytes
    errors: list[str]
    group: Group | None = None


def usable_in(payload: bytes) -> Usable:
    """Returns what is usable of the Group in `payload`, which is not decoded where it is plain and whole.

    Raises msgspec.MsgspecError for what is no group, and DataError as `usable_group` does.
    """
    head = plain_head_in(payload)
    if head is not None and len(head.samples) >= MIN_SAMPLES:
        return Usable(head, payload, [])
    kept, errors = usable_group(decode_group(payload))
    return Usable(head_of(kept), encode(kept) if errors else payload, errors, kept)


def usable_group(group: Group) -> tuple[Group, list[str]]:
    """Returns the group without the samples that have an `error` (a failure is never reward 0), and their
    error texts.

    Raises DataError for a sample without tokens, one with log-probs but no version, or one with neither a
    finite reward nor an error.
    """
    errors = [sample.error for sample in group.samples if sample.error is not None]
    kept = tuple(sample for sample in group.samples if sample.error is None)
    for index, sample in enumerate(kept):
        if sample.reward is None or not math.isfinite(sample.reward):
            raise DataError(
                f"group {group.group_id} from actor {group.actor!r}: reward {sample.reward} in scored sample "
                f"{index}. "
                "Score a group before inserting it, or set the sample's `error`."
            )
        if not sample.num_sampled or (sample.is_offline and sample.logprobs):
            what = "log-probs but no version" if sample.num_sampled else "no sampled tokens"
            raise DataError(f"group {group.group_id} from actor {group.actor!r}: sample {index} has {what}.")
    return (msgspec.structs.replace(group, samples=kept) if errors else group), errors


def generated_rewards(group: GroupHead) -> list[float]:
    """Returns the rewards of the samples that were generated for the group, not taken from a log."""
    return [sample.reward for sample in group.samples if sample.reward is not None and not sample.is_offline]


def error_kind(text: str) -> str:
    """Returns what error texts have in common that differ only in numbers and in what is quoted."""
    return _VARYING.sub("#", text)


def last_texts(texts: Mapping[str, int]) -> dict[str, int]:
    """Returns the last few of the texts that `ErrorTexts.newest` returned: those that are shown."""
    return dict([*texts.items()][-NUM_SHOWN:])


class ErrorTexts:
    """Keeps the newest error text of each kind, and how often that kind came; of kinds, the newest
    `MAX_KINDS`.

        texts.note([("ValueError: no 3", 1), ("ValueError: no 4", 1)])
        texts.newest()     # {"ValueError: no 4": 2}
    """

    def __init__(self) -> None:
        self._by_kind: dict[str, tuple[str, int]] = {}

    def note(self, counted: Iterable[tuple[str, int]]) -> None:
        """Takes texts, the oldest first, each with how many errors it stands for."""
        for text, count in counted:
            kind = error_kind(text)
            _, before = self._by_kind.pop(kind, ("", 0))
            self._by_kind[kind] = text, before + count
            if len(self._by_kind) > MAX_KINDS:
                del self._by_kind[next(iter(self._by_kind))]

    def newest(self) -> dict[str, int]:
        """Returns the texts with their counts, the kind that came last at the end."""
        return dict(self._by_kind.values())


class HeldSamples:
    """Holds the one usable sample of a group too small to be stored, until another such group of its prompt
    makes two of them.

        kept = held.join(usable, step)
        if len(kept.samples) < MIN_SAMPLES:
            held.hold(kept)

    `counts` has held_samples, joined_samples, and held_stale: samples that were dropped because they came to
    be older than `max_staleness`.
    """

    def __init__(self, max_staleness: int) -> None:
        self._bound = StalenessBound(max_staleness)
        self.counts: Counter[str] = Counter()
        self._by_prompt: dict[int, Sample] = {}
        self._changed: dict[int, None] = {}

    def join(self, group: Group, step: int) -> Group:
        """Returns a group too small by itself together with the sample held for its prompt, if one is held
        and not stale at `step`.

        A group that is large enough stays as it is: the held sample would only make it older.
        """
        if not 0 < len(group.samples) < MIN_SAMPLES or group.prompt_index not in self._by_prompt:
            return group
        sample = self._by_prompt.pop(group.prompt_index)
        self._changed[group.prompt_index] = None
        if self._bound.is_stale(counted_version(sample), step):
            self.counts["held_stale"] += 1
            return group
        self.counts["joined_samples"] += 1
        return msgspec.structs.replace(group, samples=(*group.samples, sample))

    def hold(self, group: Group) -> bool:
        """Keeps the group's only sample and returns True; False when it has none, or an offline one, which
        its prompt will bring again.
        """
        if not group.samples or group.samples[0].is_offline:
            return False
        (self._by_prompt[group.prompt_index],) = group.samples
        self._changed[group.prompt_index] = None
        self.counts["held_samples"] += 1
        return True

    def pop_changed(self) -> list[tuple[int, Sample | None]]:
        """Returns the prompts whose held sample changed since the last call, each with the sample or None."""
        changed = [(index, self._by_prompt.get(index)) for index in self._changed]
        self._changed.clear()
        return changed

    def get_state(self) -> dict[str, Any]:
        """Returns the samples by their prompts' indices, and the counts."""
        return {"samples": dict(self._by_prompt), "counts": dict(self.counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes over what `get_state` returned."""
        self._by_prompt = dict(state["samples"])
        self.counts = Counter(state["counts"])
        self._changed.clear()
