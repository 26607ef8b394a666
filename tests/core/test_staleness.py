"""Staleness by hand-counted examples, and what follows from `max_staleness` for those who plan ahead."""

from __future__ import annotations

import math

import numpy as np
import pytest

from core.errors import StalenessError
from core.records import Batch, Group, Sample, VersionSpan, index_of
from core.staleness import (
    AGELESS,
    STALENESS_BUCKETS,
    StalenessBound,
    counted_version,
    is_fresh,
    mean_staleness,
    sample_staleness,
    staleness_masks,
    staleness_metrics,
    staleness_of,
)


def sample_of(*versions: int) -> Sample:
    """A sample with one token of each version; without any, an offline one of three tokens."""
    spans = tuple(VersionSpan(version, index, index + 1) for index, version in enumerate(versions))
    ids, logprobs = tuple(range(len(versions) or 3)), (-0.5,) * len(versions)
    return Sample.one_turn(
        (1,), ids, logprobs, version_spans=spans, finish_reason="stop", text="x", reward=1.0
    )


def group_of(number: int, *samples: Sample) -> Group:
    return Group(group_id=number, prompt_index=0, source_row=0, prompt="p", samples=samples)


def test_a_sample_is_as_old_as_its_oldest_token_and_its_mean_weighs_tokens():
    mixed = Sample.one_turn(
        (1,),
        (1, 2, 3, 4),
        (-0.5,) * 4,
        version_spans=(VersionSpan(5, 0, 1), VersionSpan(9, 1, 4)),
        finish_reason="stop",
        text="x",
    )
    assert (sample_staleness(mixed, 9), mean_staleness(mixed, 9)) == (4, pytest.approx(1.0))
    assert (sample_staleness(sample_of(), 9), mean_staleness(sample_of(), 9)) == (None, None), (
        "an offline sample has no age"
    )
    assert [is_fresh(each, 9) for each in (sample_of(9, 9), mixed, sample_of(8), sample_of())] == [
        True,
        False,
        False,
        False,
    ]


def test_versions_that_are_ageless_or_still_to_come_count_as_fresh_in_arrays():
    assert staleness_of(np.array([3, 7, 8, AGELESS]), 7).tolist() == [4, 0, 0, 0]


def test_every_staleness_is_in_exactly_one_bucket_and_no_staleness_in_none():
    ages = np.array([0, 1, 3, 4, 15, 16, 63, 64, 10_000, math.nan])
    masks = staleness_masks(ages)
    assert masks.keys() == STALENESS_BUCKETS.keys()
    assert [[name for name, mask in masks.items() if mask[index]] for index in range(len(ages))] == [
        ["0"], ["1-3"], ["1-3"], ["4-15"], ["4-15"], ["16-63"], ["16-63"], ["64+"], ["64+"], [],
    ]  # fmt: skip


def test_metrics_of_a_batch_tell_offline_samples_and_mixed_versions():
    groups = (
        group_of(0, sample_of(5, 7), sample_of()),
        group_of(1, sample_of(8), sample_of(8)),
        group_of(2, sample_of(), sample_of()),
    )
    metrics = staleness_metrics(Batch(9, groups))
    assert metrics == staleness_metrics(index_of(Batch(9, groups)))
    assert metrics["staleness/mean"] == pytest.approx((4 + 2 + 1 + 1) / 4)
    assert (metrics["staleness/max"], metrics["staleness/oldest_token"]) == (3, 4)
    assert (metrics["staleness/offline_fraction"], metrics["staleness/fresh_fraction"]) == (0.5, 0.0)
    assert metrics["staleness/mixed_version_fraction"] == pytest.approx(1 / 3)
    offline = staleness_metrics(Batch(9, groups[2:]))
    assert all(math.isnan(offline[f"staleness/{name}"]) for name in ("mean", "max", "oldest_token"))


def test_a_group_counts_as_of_its_oldest_token_and_is_stale_above_the_bound_only():
    bound = StalenessBound(3)
    group = group_of(7, sample_of(8), sample_of(9, 5), sample_of())
    assert counted_version(group) == 5
    assert counted_version(group_of(8, sample_of(), sample_of())) == AGELESS
    assert (bound.oldest_allowed(8), bound.is_stale(5, 8), bound.is_stale(5, 9)) == (5, False, True)
    assert not bound.is_stale(None, 10**6)
    assert not bound.is_stale(AGELESS, 10**6)
    bound.check_batch(Batch(8, (group,)))
    with pytest.raises(
        StalenessError,
        match=r"group 7 has a token of version 5 at learner step 9: staleness 4 .*max_staleness = 3\.",
    ):
        bound.check_batch(Batch(9, (group,)))


@pytest.mark.parametrize(
    ("samples", "max_staleness", "is_refused"),
    [
        ([sample_of(6), sample_of(8)], 3, False),
        ([sample_of(8), sample_of(9, 5)], 3, True),  # Its oldest token counts, wherever it is.
        ([sample_of(), sample_of()], 0, False),  # Offline: no age.
        ([sample_of(), sample_of(2)], 6, True),
        ([sample_of(9)], 0, False),
    ],
)
def test_a_sample_that_is_too_old_is_an_error_though_the_buffer_let_it_through(
    samples: list[Sample], max_staleness: int, is_refused: bool
) -> None:
    batch = index_of(Batch(9, (group_of(7, *samples),)))
    if not is_refused:
        StalenessBound(max_staleness).check_batch(batch)
        return
    oldest = min(sample.oldest_version for sample in samples if sample.oldest_version is not None)
    with pytest.raises(
        StalenessError,
        match=rf"group 7 has a token of version {oldest} at learner step 9: .*= {max_staleness}\.",
    ):
        StalenessBound(max_staleness).check_batch(batch)


def test_a_sample_is_born_stale_only_when_newer_weights_are_there():
    bound = StalenessBound(2)
    born_stale = [bound.is_born_stale(version, 7, publish_every=3) for version in (0, 3, 4, 5, 6)]
    assert born_stale == [True, True, True, False, False], (
        "at step 7 version 6 is out, and 5 is the oldest allowed"
    )
    assert not StalenessBound(0).is_born_stale(6, 8, publish_every=3), (
        "too old for step 8, but nothing newer comes before step 9"
    )
    assert not bound.is_born_stale(None, 100, publish_every=1), (
        "whoever has no version yet is not told to fetch another"
    )


def test_plans_follow_from_the_bound():
    assert [StalenessBound(steps).max_untrained(32) for steps in (0, 1, 16)] == [32, 64, 17 * 32]
    assert [StalenessBound(steps).starving_step(3, 100) for steps in (0, 1, 2)] == [1, 2, None]
    assert StalenessBound(0).starving_step(3, 1) is None, "a run of one step is over before"
    assert [StalenessBound(steps).evicts_between_snapshots(3) for steps in (2, 3)] == [True, False]
    assert not StalenessBound(0).evicts_between_snapshots(1)
    assert [StalenessBound(9).is_snapshot_too_old(version, 10) for version in (5, 6, None)] == [
        True,
        False,
        True,
    ]
    assert [StalenessBound(10).is_near(oldest) for oldest in (8, 9, 10)] == [False, True, True]
    assert not StalenessBound(0).is_near(0)
