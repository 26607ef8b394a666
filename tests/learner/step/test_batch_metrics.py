"""What the learner sees of offline samples, and of groups of mixed versions."""

from __future__ import annotations

import pytest

from core.config import DataConfig
from core.records import (
    Batch,
    Group,
    Sample,
    StoredGroup,
    VersionSpan,
    encode_batch,
    index_of,
    open_batch,
)
from learner.step.batch_metrics import batch_metrics, shown_samples, source_metrics


def test_metrics_of_a_batch_tell_offline_samples_and_mixed_versions():
    def sample(*versions: int) -> Sample:
        spans = tuple(VersionSpan(version, index, index + 1) for index, version in enumerate(versions))
        ids, logprobs = tuple(range(len(versions) or 3)), (-0.5,) * len(versions)
        return Sample.one_turn(
            (1,), ids, logprobs, version_spans=spans, finish_reason="stop", text="x", reward=1.0
        )

    def group(number: int, *samples: Sample) -> Group:
        return Group(group_id=number, prompt_index=0, source_row=0, prompt="p", samples=samples)

    metrics = batch_metrics(
        index_of(
            Batch(
                9,
                (
                    group(0, sample(5, 7), sample()),
                    group(1, sample(8), sample(8)),
                    group(2, sample(), sample()),
                ),
            )
        )
    )
    assert metrics["staleness/mean"] == pytest.approx((4 + 2 + 1 + 1) / 4)
    assert (metrics["staleness/max"], metrics["staleness/oldest_token"]) == (3, 4)
    assert (metrics["staleness/offline_fraction"], metrics["staleness/mixed_version_fraction"]) == (
        0.5,
        pytest.approx(1 / 3),
    )
    offline = Batch(9, (group(0, sample(), sample()),))
    payload = encode_batch(9, map(StoredGroup.of, offline.groups))
    metrics = batch_metrics(index_of(offline))
    assert all(
        metrics[f"staleness/{name}"] != metrics[f"staleness/{name}"]
        for name in ("mean", "max", "oldest_token")
    ), "NaN"
    assert metrics["staleness/offline_fraction"] == 1
    (shown,) = shown_samples(open_batch(payload), {0: [0.0]})
    assert (shown["version"], shown["staleness"]) == (None, None)


def test_rewards_are_told_by_source_where_there_are_several():
    def group(ordinal: int, reward: float | None) -> Group:
        sample = Sample.one_turn((1,), (2,), version_spans=(), finish_reason="stop", reward=reward)
        return Group(group_id=ordinal, prompt_index=0, source_row=0, prompt="p", samples=(sample,))

    batch = index_of(Batch(0, (group(0, 1.0), group(1, 0.25), group(2, 0.5), group(3, 0.5), group(5, None))))
    path = {"reasoning_gym:chain_sum?size=9": 2, "data/sums.jsonl": 1, "other/sums.jsonl": 1}
    assert source_metrics(batch, DataConfig(path="data/sums.jsonl")) == {}
    # By name chain_sum is the last of three; the turns come in the order 2, 0, 1, 2.
    assert source_metrics(batch, DataConfig(path=path)) == {
        "by_source/reward_sums": 0.25,
        "by_source/reward_sums-2": 0.5,
        "by_source/reward_chain_sum": 0.75,
    }
