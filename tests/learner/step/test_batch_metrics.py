"""What the learner sees of offline samples, and of groups of mixed versions."""

from __future__ import annotations

import pytest

from core.arrays import Bits, Float32s, Int32s
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
from learner.progress import Progress
from learner.step.batch_metrics import batch_metrics, shown_samples, source_metrics
from tests.support.configs import make_config


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


def test_metrics_of_several_turns_count_what_was_sampled():
    """Two samples at learner step 9: 2 tokens of version 5, 40 shown, 4 of version 8; and 3 of version 9."""
    spans = (VersionSpan(5, 0, 2), VersionSpan(8, 2, 6))
    long = Sample(
        tokens=Int32s.of([1] * 56),
        is_sampled=Bits.runs(10, 2, 40, 4),
        logprobs=Float32s.of([-0.5] * 6),
        version_spans=spans,
        turns=2,
        num_tool_calls=3,
        finish_reason="length",
        text="b",
        transcript=(("assistant", "a"), ("tool", "shown"), ("assistant", "b")),
        reward=1.0,
    )
    short = Sample.one_turn(
        (1,) * 30,
        (1,) * 3,
        (-0.5,) * 3,
        version_spans=(VersionSpan(9, 0, 3),),
        finish_reason="stop",
        reward=0.0,
    )
    group = Group(group_id=0, prompt_index=0, source_row=0, prompt="p", samples=(long, short))
    batch = Batch(9, (group,))
    metrics = batch_metrics(index_of(batch))
    assert metrics["completions/mean_length"] == pytest.approx((6 + 3) / 2)
    assert metrics["completions/truncated_fraction"] == 0.5
    assert (metrics["completions/turns"], metrics["completions/tool_calls"]) == (1.5, 1.5)
    assert metrics["staleness/mean"] == pytest.approx((2 * 4 + 4 * 1 + 3 * 0) / 9)
    assert (metrics["staleness/oldest_token"], metrics["staleness/max"]) == (4, pytest.approx(12 / 6))
    assert (metrics["staleness/fresh_fraction"], metrics["staleness/mixed_version_fraction"]) == (0.5, 1)
    progress = Progress()
    progress.observe(index_of(batch).groups, metrics)
    assert progress.metrics()["progress/sampled_tokens"] == 9
    (shown,) = shown_samples(open_batch(encode_batch(9, [StoredGroup.of(group)])), {0: [0.25, -0.25]})
    assert (shown["completion"], shown["turns"], shown["tool_calls"]) == ("b", 2, 3)
    assert shown["transcript"] == [["assistant", "a"], ["tool", "shown"], ["assistant", "b"]]


def test_rewards_are_told_by_source_where_there_are_several():
    def group(ordinal: int, reward: float | None) -> Group:
        sample = Sample.one_turn((1,), (2,), version_spans=(), finish_reason="stop", reward=reward)
        return Group(group_id=ordinal, prompt_index=0, source_row=0, prompt="p", samples=(sample,))

    batch = index_of(Batch(0, (group(0, 1.0), group(1, 0.25), group(2, 0.5), group(3, 0.5), group(5, None))))
    path = {"reasoning_gym:chain_sum?size=9": 2, "data/sums.jsonl": 1, "other/sums.jsonl": 1}
    assert source_metrics(batch, make_config()) == {}
    # By name chain_sum is the last of three; the turns come in the order 2, 0, 1, 2.
    assert source_metrics(batch, make_config(data={"path": path})) == {
        "by_source/reward_sums": 0.25,
        "by_source/reward_sums-2": 0.5,
        "by_source/reward_chain_sum": 0.75,
    }
    dealt = make_config(data={"path": path, "curriculum": 2}, buffer={"num_shards": 2})
    assert source_metrics(batch, dealt) == {
        "by_source/reward_sums": 0.5,
        "by_source/reward_chain_sum": 0.625,
    }, "each of two shards has turns of its own"
