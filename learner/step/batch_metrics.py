"""What a batch looks like, before it is learned from: rewards, ages, lengths, and a few samples to read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from buffer.sources import locate
from core.config import Config
from core.records import BatchIndex, EncodedBatch, decode_group
from core.staleness import sample_staleness, staleness_metrics

SHOWN_SAMPLES = 8


def batch_metrics(batch: BatchIndex) -> dict[str, float]:
    """Returns metrics of the batch by their names in metrics.jsonl, measured now, when it is consumed."""
    samples = [sample for group in batch.groups for sample in group.samples]
    rewards = [
        sample.reward for sample in samples if sample.reward is not None and math.isfinite(sample.reward)
    ]
    lengths = [sample.num_sampled for sample in samples]
    zero_std = [len({sample.reward for sample in group.samples}) <= 1 for group in batch.groups]
    known = rewards or [math.nan]
    return {
        "reward/mean": float(np.mean(known)),
        "reward/std": float(np.std(known)),
        "reward/zero_std_fraction": statistics.fmean(zero_std),
        **staleness_metrics(batch),
        "completions/mean_length": statistics.fmean(lengths),
        "completions/truncated_fraction": statistics.fmean(
            sample.finish_reason == "length" for sample in samples
        ),
        "completions/turns": statistics.fmean(sample.turns for sample in samples),
        "completions/tool_calls": statistics.fmean(sample.num_tool_calls for sample in samples),
    }


def source_metrics(batch: BatchIndex, config: Config) -> dict[str, float]:
    """Returns the mean reward of the batch's samples of each source, where `data.path` names several."""
    data = config.data
    shares = tuple(data.sources.values())
    if len(shares) < 2:
        return {}
    rewards: list[list[float]] = [[] for _ in shares]
    dealt = config.buffer.num_shards if data.curriculum is not None else 1
    for group in batch.groups:
        # Group ids are the ordinals of the prompt stream; with a curriculum each shard has turns of its own.
        source, _ = locate(group.group_id // dealt, shares)
        rewards[source] += [sample.reward for sample in group.samples if sample.reward is not None]
    return {
        f"by_source/reward_{label}": float(np.mean(found))
        for label, found in zip(data.source_labels, rewards, strict=True)
        if found
    }


def shown_samples(batch: EncodedBatch, advantages: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
    """Returns the first sample of the first trained groups, with everything a reader wants to know of it.

    `advantages` are those of each trained group, in the order of its samples. Only the groups shown are
    decoded. Of a sample with an environment there is the conversation: `transcript`, of roles and texts.
    """
    shown: list[dict[str, Any]] = []
    for head, payload in zip(batch.index.groups, batch.payloads, strict=True):
        if head.group_id not in advantages or len(shown) == SHOWN_SAMPLES:
            continue
        group = decode_group(payload)
        sample = group.samples[0]
        shown.append(
            {
                "prompt": group.prompt,
                "completion": sample.text,
                "reward": sample.reward,
                "error": sample.error,
                "advantage": advantages[group.group_id][0],
                "version": sample.oldest_version,
                "staleness": sample_staleness(sample, batch.index.step),
            }
        )
        if sample.transcript:
            told = {"turns": sample.turns, "tool_calls": sample.num_tool_calls}
            shown[-1] |= {**told, "transcript": [list(said) for said in sample.transcript]}
    return shown
