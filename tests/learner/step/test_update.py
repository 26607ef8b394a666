"""The gradient of a step is that of the sampled tokens alone, however they were cut into turns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from actors.episode import Generation, Trajectory
from core.arrays import Bits, Float32s, Int32s
from core.config import Config
from core.records import Batch, Group, Sample, VersionSpan
from tests.support.configs import make_config
from tests.support.learning.exact import Fp64Policy, flat, step_gradient

BETA, CAP, TEMPERATURE = 0.3, 1.5, 0.7


def config_of(model_dir: Path, layout: str, micro_batch_tokens: int) -> Config:
    return make_config(
        model={"path": str(model_dir)},
        data={"max_prompt_tokens": 4},
        actors={"max_new_tokens": 12, "temperature": TEMPERATURE},
        learner={"micro_batch_tokens": micro_batch_tokens, "layout": layout},
        objective={"name": "agro", "beta": BETA, "importance_weight": "token", "importance_cap": CAP},
    )


def trajectory(reward: float, *pieces: list[int]) -> Sample:
    """What was shown and what was said in turn, by hand; log-probs differ from token to token."""
    mask = Bits.runs(*map(len, pieces))
    logprobs = [-1.5 - 0.5 * (place % 3) for place in range(mask.count())]
    return Sample(
        tokens=Int32s.of([token for piece in pieces for token in piece]),
        is_sampled=mask,
        logprobs=Float32s.of(logprobs),
        version_spans=(VersionSpan(2, 0, mask.count()),),
        turns=len(pieces) // 2,
        finish_reason="stop",
        reward=reward,
    )


def two_turn_batch() -> Batch:
    """Trajectories of one turn, two and three; at step 5, since at step 0 the reference is the policy."""
    first, second = [3, 4, 5], [6, 7]
    groups = [
        [
            trajectory(1.0, first, [8, 9], [10, 11, 12], [13, 1]),
            trajectory(0.0, first, [9], [4, 4], [5, 6, 1]),
            trajectory(0.5, first, [8, 8, 8, 1]),
        ],
        [
            trajectory(
                0.0, second, [3], [5], [7], [9], [11]
            ),  # It ends in an observation: the environment had the last word.
            trajectory(1.0, second, [3, 1]),
        ],
    ]
    return Batch(
        5,
        tuple(
            Group(group_id=number, prompt_index=number, source_row=number, prompt="", samples=tuple(samples))
            for number, samples in enumerate(groups)
        ),
    )


def plain_gradient(policy: Fp64Policy, reference: Fp64Policy, batch: Batch) -> torch.Tensor:
    """The formula of learner/objectives/agro.py, one trajectory and one token after the other."""

    def logprobs(model: Any, sample: Sample) -> list[torch.Tensor]:
        tokens = sample.tokens.numpy().tolist()
        distribution = (model(torch.tensor([tokens])).logits[0] / TEMPERATURE).log_softmax(-1)
        places = [place for place, is_sampled in enumerate(sample.is_sampled.numpy()) if is_sampled]
        return [distribution[place - 1, tokens[place]] for place in places]

    loss = torch.zeros((), dtype=torch.float64)
    for group in batch.groups:
        mine = [logprobs(policy.module, sample) for sample in group.samples]
        with torch.no_grad():
            residuals = [
                sample.reward - BETA * float(sum(values) - sum(logprobs(reference.module, sample)))
                for sample, values in zip(group.samples, mine, strict=True)
            ]
        for index, (sample, values) in enumerate(zip(group.samples, mine, strict=True)):
            others = residuals[:index] + residuals[index + 1 :]
            advantage = residuals[index] - sum(others) / len(others)
            for value, behaviour in zip(values, sample.logprobs.numpy().tolist(), strict=True):
                weight = min(CAP, math.exp(float(value.detach()) - behaviour))
                loss = loss - weight * advantage * value / len(group.samples) / len(batch.groups)
    return flat(torch.autograd.grad(loss, list(policy.module.parameters())))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("micro_batch_tokens", [256, 16])
def test_the_gradient_of_turns_is_the_masked_one_of_a_plain_loop(
    layout: str, micro_batch_tokens: int, tiny_models: dict[str, Path]
) -> None:
    """No pass of 16 tokens holds the first group: its gradient takes a first pass and split ones."""
    config, batch = config_of(tiny_models["untied"], layout, micro_batch_tokens), two_turn_batch()
    found, policy, reference = step_gradient(config, batch)
    exact = plain_gradient(policy, reference, batch)
    assert exact.norm() > 0.01
    assert ((found - exact).norm() / exact.norm()).item() < 1e-12


def test_an_observation_that_counted_as_sampled_would_change_the_gradient(
    tiny_models: dict[str, Path],
) -> None:
    config, batch = config_of(tiny_models["untied"], "packed", 256), two_turn_batch()
    first, *others = batch.groups
    spoilt = trajectory(1.0, [3, 4, 5], [8, 9, 10, 11, 12, 13, 1])
    changed = Batch(5, (msgspec.structs.replace(first, samples=(spoilt, *first.samples[1:])), *others))
    found, policy, reference = step_gradient(config, changed)
    exact = plain_gradient(policy, reference, batch)
    assert ((found - exact).norm() / exact.norm()).item() > 0.01


def test_invariant_7_the_gradient_does_not_depend_on_how_a_trajectory_is_cut_into_turns(
    tiny_models: dict[str, Path],
) -> None:
    """The same tokens, said at once or in pieces with nothing in between, give the same to the last bit."""
    config = config_of(tiny_models["untied"], "packed", 256)
    tokens, logprobs = [7, 8, 9, 10, 1], [-1.0, -0.5, -2.0, -1.25, -0.75]

    def sample(reward: float, *cuts: int) -> Sample:
        said, start = Trajectory([3, 4]), 0
        for end in (*cuts, len(tokens)):
            span = VersionSpan(2, 0, end - start)
            piece = Int32s.of(tokens[start:end]), Float32s.of(logprobs[start:end])
            said.say(Generation(*piece, (span,), "stop", ""))
            start = end
        return said.sample(finish_reason="stop", turns=1 + len(cuts), reward=reward)

    def gradient(*cuts: int) -> torch.Tensor:
        samples = (sample(1.0, *cuts), trajectory(0.0, [3, 4], [9, 1]))
        group = Group(group_id=0, prompt_index=0, source_row=0, prompt="", samples=samples)
        return step_gradient(config, Batch(5, (group,)))[0]

    assert [sample(1.0, *cuts).turns for cuts in ((), (2,), (1, 2, 4))] == [1, 2, 4]
    whole = gradient()
    assert torch.equal(gradient(2), whole)
    assert torch.equal(gradient(1, 2, 4), whole)
