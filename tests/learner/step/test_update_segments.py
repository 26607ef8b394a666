"""The segments of a sample are sequences of their own to the model, and one sample to the objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from core.arrays import Bits, Float32s, Int32s
from core.config import Config
from core.records import Batch, Group, Sample, VersionSpan
from core.staleness import sample_staleness
from learner.step.packing import plan_micro_batches
from learner.step.samples import arrays_of, sequences_of
from tests.support.configs import make_config
from tests.support.learning.exact import Fp64Policy, flat, step_gradient

BETA, CAP, CLIP, TEMPERATURE = 0.3, 1.5, 0.2, 0.7
KNOBS: dict[str, dict[str, Any]] = {
    "agro": {"beta": BETA, "importance_weight": "token", "importance_cap": CAP},
    "gspo": {"beta": BETA, "clip_low": CLIP, "clip_high": CLIP},
    "grpo": {"beta": BETA, "clip_low": CLIP, "clip_high": CLIP},
}


def sample_of(reward: float, *segments: Sequence[list[int]], versions: tuple[int, ...] = (2,)) -> Sample:
    """What was shown and what was said in turn, segment by segment; the last `versions` say all the rest."""
    tokens = [token for segment in segments for piece in segment for token in piece]
    mask = [bool(place % 2) for segment in segments for place, piece in enumerate(segment) for _ in piece]
    ends = [
        sum(len(piece) for segment in segments[:number] for piece in segment)
        for number in range(len(segments))
    ]
    count = sum(mask)
    cuts = [*range(len(versions)), count]
    spans = (VersionSpan(version, *cuts[place : place + 2]) for place, version in enumerate(versions))
    return Sample(
        tokens=Int32s.of(tokens),
        is_sampled=Bits.of(mask),
        logprobs=Float32s.of([-1.5 - 0.5 * (place % 3) for place in range(count)]),
        version_spans=tuple(spans),
        turns=sum(len(segment) // 2 for segment in segments),
        segments=tuple(ends[1:]),
        finish_reason="stop",
        reward=reward,
    )


def batch_of(*groups: Sequence[Sample]) -> Batch:
    """At step 5, since at step 0 the reference is the policy."""
    return Batch(
        5,
        tuple(
            Group(group_id=number, prompt_index=number, source_row=number, prompt="", samples=tuple(samples))
            for number, samples in enumerate(groups)
        ),
    )


def mixed_batch() -> Batch:
    """Samples of one segment, two and four, of one turn and several; the longest has 28 tokens, its longest
    segment 11.
    """
    first, second = [3, 4, 5], [6, 7]
    return batch_of(
        [
            sample_of(1.0, [first, [8, 9], [10, 11, 12], [13, 1]], [[5, 5], [9, 1]]),
            sample_of(0.0, [first, [9], [4, 4], [5, 6, 1]]),
            sample_of(
                0.5,
                [first, [8, 8, 8, 1]],
                [[2], [7, 6]],
                [[9, 9, 4, 4], [3, 5], [8], [10, 2, 2, 1]],
                [[3, 4, 5], [12, 1], [6], [9]],
            ),
        ],
        [sample_of(0.0, [second, [3], [5], [7], [9]]), sample_of(1.0, [second, [3, 1]], [[8], [5], [9]])],
        [sample_of(0.2, [[4], [6]]), sample_of(1.0, [[4], [6, 1]]), sample_of(0.1, [[4], [7]], [[7], [4]])],
    )


def config_of(name: str, model_dir: Path, layout: str, micro_batch_tokens: int) -> Config:
    return make_config(
        model={"path": str(model_dir)},
        data={"max_prompt_tokens": 4},
        actors={"max_new_tokens": 8, "temperature": TEMPERATURE},
        learner={"micro_batch_tokens": micro_batch_tokens, "layout": layout},
        objective={"name": name, **KNOBS[name]},
    )


def logprobs_of(policy: Fp64Policy, sample: Sample) -> Tensor:
    """Log-probs of all that was said, each segment passed alone."""
    tokens, mask = sample.tokens.numpy().tolist(), sample.is_sampled.numpy().tolist()
    bounds, found = [0, *sample.segments, len(tokens)], []
    for first, last in pairwise(bounds):
        logits = policy.module(torch.tensor([tokens[first:last]])).logits[0] / TEMPERATURE
        distribution = logits.log_softmax(-1)
        found += [
            distribution[place - first - 1, tokens[place]] for place in range(first, last) if mask[place]
        ]
    return torch.stack(found)


def agro_terms(
    rewards: list[float], own: list[Tensor], refs: list[Tensor], mus: list[Tensor]
) -> list[Tensor]:
    """learner/objectives/agro.py, token by token."""
    ells = [float((mine - ref).detach().sum()) for mine, ref in zip(own, refs, strict=True)]
    residuals = [reward - BETA * ell for reward, ell in zip(rewards, ells, strict=True)]
    terms = []
    for index, (mine, mu) in enumerate(zip(own, mus, strict=True)):
        others = residuals[:index] + residuals[index + 1 :]
        advantage = residuals[index] - sum(others) / len(others)
        weights = [min(CAP, math.exp(float(a) - float(b))) for a, b in zip(mine.detach(), mu, strict=True)]
        terms.append(-sum(w * advantage * value for w, value in zip(weights, mine, strict=True)))
    return terms


def terms_of(
    name: str, rewards: list[float], own: list[Tensor], refs: list[Tensor], mus: list[Tensor]
) -> list[Tensor]:
    """What the samples of a group add; learner/objectives/gspo.py and grpo.py without importance weights."""
    if name == "agro":
        return agro_terms(rewards, own, refs, mus)
    mean, std = (float(f(torch.tensor(rewards, dtype=torch.float64))) for f in (torch.mean, torch.std))
    terms = []
    for reward, mine, ref, mu in zip(rewards, own, refs, mus, strict=True):
        advantage = (reward - mean) / (std + 1e-6)
        kl = sum(BETA * (torch.exp(q - p) - (q - p) - 1) for p, q in zip(mine, ref, strict=True)) / len(mine)
        logs = (mine - mu).mean()[None] if name == "gspo" else mine - mu
        ratios = [torch.exp(log) for log in logs]
        gains = [torch.minimum(r * advantage, r.clamp(1 - CLIP, 1 + CLIP) * advantage) for r in ratios]
        terms.append(kl - sum(gains) / len(gains))
    return terms


def plain_gradient(name: str, policy: Fp64Policy, reference: Fp64Policy, batch: Batch) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for group in batch.groups:
        rewards = [float(sample.reward or 0.0) for sample in group.samples]
        own = [logprobs_of(policy, sample) for sample in group.samples]
        with torch.no_grad():
            refs = [logprobs_of(reference, sample) for sample in group.samples]
        mus = [torch.tensor(sample.logprobs.numpy()).double() for sample in group.samples]
        terms = terms_of(name, rewards, own, refs, mus)
        loss = loss + sum(terms) / len(group.samples) / len(batch.groups)
    return flat(torch.autograd.grad(loss, list(policy.module.parameters())))


@pytest.mark.parametrize("name", list(KNOBS))
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("micro_batch_tokens", "num_ranks"), [(256, 1), (40, 2), (16, 1), (16, 3)])
def test_the_gradient_of_segments_is_that_of_separate_passes(
    name: str, layout: str, micro_batch_tokens: int, num_ranks: int, tiny_models: dict[str, Path]
) -> None:
    """Passes of 40 tokens hold no group whole, those of 16 not every sample."""
    config, batch = config_of(name, tiny_models["untied"], layout, micro_batch_tokens), mixed_batch()
    found, policy, reference = step_gradient(config, batch, num_ranks)
    exact = plain_gradient(name, policy, reference, batch)
    assert exact.norm() > 0.01
    assert ((found - exact).norm() / exact.norm()).item() < 1e-12


def test_segments_that_saw_each_other_would_change_the_gradient(tiny_models: dict[str, Path]) -> None:
    config, batch = config_of("agro", tiny_models["untied"], "packed", 256), mixed_batch()
    joined = tuple(
        msgspec.structs.replace(group, samples=tuple(without_segments(one) for one in group.samples))
        for group in batch.groups
    )
    found, policy, reference = step_gradient(config, Batch(5, joined))
    exact = plain_gradient("agro", policy, reference, batch)
    assert ((found - exact).norm() / exact.norm()).item() > 0.01


def without_segments(sample: Sample) -> Sample:
    return msgspec.structs.replace(sample, segments=())


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_sample_in_several_passes_counts_once_in_what_a_step_tells(
    layout: str, tiny_models: dict[str, Path]
) -> None:
    from learner.objectives import load_objective
    from learner.step.share import Share
    from learner.step.update import Updater

    found = []
    for micro_batch_tokens in (256, 16):
        config = config_of("agro", tiny_models["untied"], layout, micro_batch_tokens)
        policy, reference = Fp64Policy(config, seed=1), Fp64Policy(config, trained=False)
        updater = Updater(
            config,
            policy,
            load_objective(config.objective),
            {"reference": reference},
            pad_id=0,
            device=torch.device("cpu"),
        )
        found.append(updater.update(Share.of(mixed_batch()), 0.0))
    whole, split = found
    assert whole.samples.keys() == split.samples.keys()
    for name, values in whole.samples.items():
        torch.testing.assert_close(
            torch.tensor(split.samples[name]), torch.tensor(values), rtol=1e-12, atol=1e-12
        )
    assert len(whole.samples["reward"]) == 8
    assert whole.metrics() == pytest.approx(split.metrics(), rel=1e-9, nan_ok=True)


def test_lengths_ages_and_log_ratios_are_of_all_segments_of_a_sample() -> None:
    one = sample_of(1.0, [[3, 4], [5, 6]], [[3], [7, 8, 9]], versions=(4, 2))
    group = batch_of([one, one]).groups[0]
    arrays = arrays_of([(group, 0), (group, 1)], 5, {"completions"}, "cpu")
    assert arrays.sizes_N.tolist() == [5, 5]
    assert arrays.staleness_N.tolist() == [3, 3] == [sample_staleness(one, 5)] * 2
    assert [sequence.tokens.tolist() for sequence in sequences_of(one)] == [[3, 4, 5, 6], [3, 7, 8, 9]]
    assert (one.num_tokens, one.num_sampled, one.turns) == (8, 5, 2)


def test_the_same_tokens_cut_into_other_segments_are_another_completion() -> None:
    whole = sample_of(1.0, [[3, 4], [5, 6], [3], [7]])
    cut = sample_of(1.0, [[3, 4], [5, 6]], [[3], [7]])
    group = batch_of([whole, cut, cut]).groups[0]
    arrays = arrays_of([(group, place) for place in range(3)], 5, {"completions"}, "cpu")
    assert arrays.completions_N is not None
    first, second, third = arrays.completions_N.tolist()
    assert first != second == third


def test_the_budget_is_one_of_segments_and_a_sample_beyond_it_comes_last_in_order() -> None:
    """Groups 0 and 1; sample 1 has three segments, which no pass of 10 tokens holds together."""
    lengths, groups, samples = [4, 6, 5, 4, 3, 9], [0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 2, 3]
    plan = plan_micro_batches(lengths, groups, 10, "packed", samples)
    assert [(micro.indices, micro.whole) for micro in plan] == [
        ((5,), True),
        ((0, 4), False),
        ((1,), False),
        ((2, 3), False),
    ]
    padded = plan_micro_batches(lengths, groups, 10, "padded", samples)
    assert [micro.indices for micro in padded] == [(5,), (0, 4), (1,), (2, 3)]
