"""How old samples are, and how old they may be: the only file that knows. Every other room asks it.

    staleness        learner step at which a sample is used, minus the version of its oldest token
    mean staleness   the same, weighted by tokens, over all versions that sampled it
    the rule         a batch of learner step s holds no group that is staler at s than `buffer.max_staleness`

Version v names the weights after v optimizer steps, so both are learner steps. An offline sample, whose
policy is unknown, has no version and no staleness, and never goes stale; where a number is needed, its
version is AGELESS, newer than every other.

Who wants another rule changes `counted_version` and `StalenessBound`: the buffer's index keeps of each
group what `counted_version` says, ordered by it, and evicts all that come before `oldest_allowed`; the
learner looks again with `check_batch`.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core.errors import StalenessError
from core.records import Batch, BatchIndex, Group, GroupHead, Sample, SampleHead

if TYPE_CHECKING:  # The configuration needs this file, and loads in a moment without numpy.
    import numpy as np
    import numpy.typing as npt

AGELESS = 2**62
"""The version of what has none: a number, so that it can be compared and stored as one."""

STALENESS_BUCKETS: dict[str, tuple[float, float]] = {
    "0": (0, 0),
    "1-3": (1, 3),
    "4-15": (4, 15),
    "16-63": (16, 63),
    "64+": (64, math.inf),
}
"""Ranges of staleness by which metrics are told apart: first and last learner step of each."""


def staleness(step: int, version: int) -> int:
    """The staleness at learner step `step` of what the weights of `version` sampled."""
    return step - version


def sample_staleness(sample: Sample | SampleHead, step: int) -> int | None:
    """The staleness of a sample's oldest token at learner step `step`; None for an offline sample."""
    oldest = sample.oldest_version
    return None if oldest is None else staleness(step, oldest)


def mean_staleness(sample: Sample | SampleHead, step: int) -> float | None:
    """The token-weighted mean of the staleness of a sample's tokens; None for an offline sample."""
    if sample.is_offline:
        return None
    spans = sample.version_spans
    total = sum(staleness(step, span.version) * (span.end - span.start) for span in spans)
    return total / sum(span.end - span.start for span in spans)


def is_fresh(sample: Sample | SampleHead, step: int) -> bool:
    """Says whether all tokens of the sample come from exactly the weights that learner step `step` begins
    with.
    """
    return {span.version for span in sample.version_spans} == {step}


def counted_version(of: Group | GroupHead | Sample | SampleHead) -> int:
    """The version of a group or a sample that counts: of its oldest token; AGELESS for what is wholly
    offline.
    """
    oldest = of.oldest_version
    return AGELESS if oldest is None else oldest


def staleness_of(versions_N: npt.NDArray[np.int64], step: int) -> npt.NDArray[np.int64]:
    """The staleness of each of N versions, int64[N]; 0 for those that are AGELESS or still to come."""
    return (step - versions_N).clip(min=0)


def oldest_version_within(max_steps: int, step: int) -> int:
    """The oldest version whose staleness at learner step `step` is at most `max_steps`; below 0 where all
    are.
    """
    return step - max_steps


def staleness_masks(staleness_N: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.bool_]]:
    """Which of N samples are in which of STALENESS_BUCKETS, bool[N] each; those without a staleness (NaN)
    are in none.
    """
    return {
        name: (staleness_N >= first) & (staleness_N <= last)
        for name, (first, last) in STALENESS_BUCKETS.items()
    }


def staleness_metrics(batch: Batch | BatchIndex) -> dict[str, float]:
    """The metrics `staleness/*` of a batch, at its learner step. Ages are over the samples that have one;
    NaN when all are offline.
    """
    samples = [sample for group in batch.groups for sample in group.samples]
    means = [(sample, age) for sample in samples if (age := mean_staleness(sample, batch.step)) is not None]
    weights = [sum(span.end - span.start for span in sample.version_spans) for sample, _ in means]
    total = sum(age * weight for (_, age), weight in zip(means, weights, strict=True))
    oldest = [age for sample in samples if (age := sample_staleness(sample, batch.step)) is not None]
    versions = [
        {span.version for sample in group.samples for span in sample.version_spans} for group in batch.groups
    ]
    return {
        "staleness/mean": total / sum(weights) if weights else math.nan,
        "staleness/max": max((age for _, age in means), default=math.nan),
        "staleness/oldest_token": float(max(oldest, default=math.nan)),
        "staleness/offline_fraction": statistics.fmean(sample.is_offline for sample in samples),
        "staleness/fresh_fraction": statistics.fmean(is_fresh(sample, batch.step) for sample in samples),
        "staleness/mixed_version_fraction": statistics.fmean(len(found) > 1 for found in versions),
    }


@dataclass(frozen=True)
class StalenessBound:
    """What `buffer.max_staleness` means, in every place that asks. All arguments and results are learner
    steps, versions or groups.
    """

    max_staleness: int

    # The rule itself.

    def oldest_allowed(self, step: int) -> int:
        """The oldest version that a batch of learner step `step` may hold; what is older is evicted."""
        return oldest_version_within(self.max_staleness, step)

    def is_stale(self, version: int | None, step: int) -> bool:
        """Says whether what counts as of `version` is too old for a batch of learner step `step`; None and
        AGELESS never are.
        """
        return version is not None and version < self.oldest_allowed(step)

    def check(self, group_id: int, version: int | None, step: int) -> None:
        """Raises StalenessError when a group that counts as of `version` is too old for a batch of learner
        step `step`.
        """
        if version is not None and self.is_stale(version, step):
            raise StalenessError(
                f"group {group_id} has a token of version {version} at learner step {step}: staleness "
                f"{staleness(step, version)} is above buffer.max_staleness = {self.max_staleness}. It should have been "
                "evicted: a bug, unless that bound was lowered before the run went on. Raise it again, or report the bug "
                "with ledger.jsonl."
            )

    def check_batch(self, batch: Batch | BatchIndex) -> None:
        """Raises StalenessError when a group of the batch is too old: here the samples themselves are
        looked at, not an index.
        """
        for group in batch.groups:
            self.check(group.group_id, counted_version(group), batch.step)

    # What follows from it for those who plan ahead.

    def max_untrained(self, groups_per_step: int) -> int:
        """Groups that may exist untrained: one started when this many are ahead of it is trained
        `max_staleness` steps later.
        """
        return (self.max_staleness + 1) * groups_per_step

    def is_born_stale(self, version: int | None, step: int, publish_every: int) -> bool:
        """Says whether a sample begun now with `version` could be in no batch from learner step `step` on.

        False while no newer snapshot exists: then waiting for one would not help.
        """
        newest = step // publish_every * publish_every
        return version is not None and version < newest and self.is_stale(version, step)

    def is_snapshot_too_old(self, version: int | None, step: int) -> bool:
        """Says whether an actor that took the snapshot `version` until learner step `step` would have used
        up half of the bound.
        """
        return version is None or staleness(step, version) > self.max_staleness // 2

    def starving_step(self, publish_every: int, num_steps: int) -> int | None:
        """The first learner step for which, between two snapshots, every group is too old; None when there
        is none.
        """
        step = self.max_staleness + 1
        return step if step < min(publish_every, num_steps) else None

    def evicts_between_snapshots(self, publish_every: int) -> bool:
        """Says whether some of what is generated ahead of the next snapshot must go stale."""
        return publish_every > 1 and self.max_staleness < publish_every

    def is_near(self, oldest: float) -> bool:
        """Says whether a batch whose oldest token has the staleness `oldest` has come within a tenth of the
        bound.
        """
        return self.max_staleness > 0 and oldest >= 0.9 * self.max_staleness
