"""An enforced lag, for studies: a replay buffer whose batches hold only groups of a given age, while such
groups can be had.

    insert --> too young: kept aside --ripe at step s when version <= max(0, s - lag)--> Replay --> take

A batch of k groups at step s takes only ripe groups, and only once (lag + 1) * k groups are stored. The
second condition is what makes the first one satisfiable. Versions above s - lag appear only after the take of
step s - lag, which left lag * k groups that are all old enough at step s; the lag - 1 takes in between used
at most (lag - 1) * k of them, so k are left, unless some went stale meanwhile (`max_staleness` close to the
lag). For that case: when the buffer is full, so that nothing older can come, the batch is the oldest k
groups, and those too young are counted (`taken_young`).
"""

from __future__ import annotations

from collections import Counter

from buffer.replay import Replay
from buffer.sampling import GroupMeta
from core.config.buffer import BufferConfig
from core.staleness import AGELESS, oldest_version_within


class LaggedReplay:
    """A `Replay` behind a lag of `lag` learner steps, each of whose groups is in one batch; with lag 0 it is
    that `Replay`.

    Raises ValueError for a lag above `config.max_staleness`, at which what is old enough would be too old,
    and for a `config.uses_per_group` above 1.
    """

    def __init__(self, config: BufferConfig, seed: int, lag: int) -> None:
        if lag > config.max_staleness:
            raise ValueError(
                f"a lag of {lag} learner steps with buffer.max_staleness = {config.max_staleness}: raise that to {lag}."
            )
        if config.uses_per_group > 1:
            raise ValueError(f"a lag with buffer.uses_per_group = {config.uses_per_group}: set that to 1.")
        self.lag = lag
        self.taken_young = 0
        self._replay = Replay(config, seed)
        self._young: list[GroupMeta] = []  # In the order of their insertion.

    def __len__(self) -> int:
        return len(self._replay) + len(self._young)

    @property
    def counts(self) -> Counter[str]:
        """Returns the counts of the replay, and `taken_young`."""
        return self._replay.counts + Counter(taken_young=self.taken_young)

    def insert(self, group: GroupMeta) -> None:
        """Stores a group; it is in no batch before it is old enough."""
        self._young.append(group)

    def take(self, k: int, step: int, *, is_full: bool = False) -> list[int]:
        """Returns the ids of the `k` groups of learner step `step`, or nothing when fewer may be taken.

        `is_full` says that no group will come before one leaves.
        """
        self._ripen(oldest_version_within(self.lag, step))
        self._replay.evict_stale(step)
        num_young = max(0, k - len(self._replay))
        if len(self) < (k if is_full else (self.lag + 1) * k) or (num_young and not is_full):
            return []
        if num_young:
            self._young.sort(key=lambda group: group.oldest_version)
            self._let_in(self._young[:num_young])
            self.taken_young += num_young
        return self._replay.take(k, step)

    def pop_evicted(self) -> list[tuple[GroupMeta, str]]:
        """Returns the groups that left since the last call, with the reason."""
        return self._replay.pop_evicted()

    def _ripen(self, newest: int) -> None:
        """Lets in what is old enough: of version `newest` or older, of the base policy, or of no version."""
        self._let_in(
            [
                group
                for group in self._young
                if group.oldest_version <= max(0, newest) or self._is_always_ripe(group)
            ]
        )

    def _is_always_ripe(self, group: GroupMeta) -> bool:
        return not self.lag or group.oldest_version == AGELESS

    def _let_in(self, groups: list[GroupMeta]) -> None:
        ids = {group.group_id for group in groups}
        self._young = [group for group in self._young if group.group_id not in ids]
        for group in groups:
            self._replay.insert(group)
