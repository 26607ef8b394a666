"""The learner's log-probs against the actors' on fresh samples: what is compared, what stops a run, and
before what.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
import transformers

from core.arrays import Float32s
from core.config import Config
from core.errors import TrainingError
from core.metrics import METRICS
from core.records import Batch, Group, Sample, VersionSpan
from learner.objectives import load_objective
from learner.step.guards import QUIET_STEPS, Alarms
from learner.step.mismatch import (
    BOUNDS_NATS,
    FAR_FACTOR,
    MIN_TOKENS,
    MismatchCheck,
    Sums,
    bound_nats,
    combined,
    likely_causes,
)
from learner.step.samples import arrays_of
from learner.step.share import Share
from tests.support.configs import LR, update_config
from tests.support.learning.updates import plain_updater, random_batches
from tests.support.scenarios.guards_scenario import drawn

LLAMA = transformers.LlamaConfig()


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def sample_of(step: int, *versions: int, d: float | list[float] = 0.0, mu: float = -1.0) -> Any:
    """Its arrays, and its log-probs by the policy. One token of each version, drawn with log-prob `mu`; the
    policy says `mu + d`.
    """
    spans = tuple(VersionSpan(version, place, place + 1) for place, version in enumerate(versions))
    count = max(1, len(versions))
    logprobs = (mu,) * len(versions)
    sample = Sample.one_turn(
        (1,),
        (5,) * count,
        logprobs,
        version_spans=spans,
        finish_reason="stop",
        text="",
        reward=1.0,
    )
    group = Group(group_id=1, prompt_index=0, source_row=0, prompt="", samples=(sample,))
    return arrays_of([(group, 0)], step, frozenset(), "cpu"), torch.full((count,), mu) + torch.tensor(d)


def check_of(**arguments: Any) -> MismatchCheck:
    return MismatchCheck(arguments.pop("config", update_config("none")), LLAMA, **arguments)


# --- what is compared ---


@pytest.mark.parametrize(
    ("step", "versions", "start", "known_until", "is_fresh"),
    [
        (0, (0, 0), 0, 0, True),
        (4, (4, 4), 0, 0, True),
        (4, (3, 3), 0, 0, False),
        (4, (3, 4), 0, 0, False),  # Begun by older weights: its keys and values are theirs.
        (4, (4, 5), 0, 0, False),
        (4, (5, 5), 0, 9, False),  # Of a learner that died, further than this one.
        (4, (), 0, 0, False),  # Offline.
        (50, (50, 50), 50, 60, True),  # The checkpoint's own weights.
        (52, (52, 52), 50, 60, False),  # Version 52 of the life before may be another one.
        (60, (60, 60), 50, 60, False),
        (61, (61, 61), 50, 60, True),
    ],
)
def test_samples_are_compared_whose_every_token_is_of_the_learners_weights(
    step: int, versions: tuple[int, ...], start: int, known_until: int, is_fresh: bool
) -> None:
    check = check_of(start_step=start, known_until=known_until)
    samples, logprobs_T = sample_of(step, *versions)
    assert check.fresh(samples, step).tolist() == [is_fresh]
    assert check.any_fresh(samples, step) == is_fresh
    assert check.sums(samples, logprobs_T, step).num_tokens == (len(versions) if is_fresh else 0)


def test_rows_that_are_not_finite_are_left_to_the_guard_of_those() -> None:
    check, (samples, logprobs_T) = check_of(), sample_of(0, 0, 0, d=[math.nan, 0.0])
    found = check.sums(samples, logprobs_T, 0, torch.tensor([False]))
    assert found == Sums()
    assert check.judge(0, [found]) == {}


def test_the_numbers_are_those_of_their_formulas() -> None:
    d_T = torch.tensor([0.3, -0.2, 0.05, 0.0], dtype=torch.float64)
    check = check_of()
    parts = [
        check.sums(*sample_of(0, 0, 0, d=[0.3, -0.2]), 0),
        Sums(),
        check.sums(*sample_of(0, 0, 0, d=[0.05, 0.0]), 0),
    ]
    found = combined(parts)
    assert found is not None
    error = d_T.abs().std(correction=0) / 2
    expected = (4, d_T.abs().mean(), error, 0.3, 0.5, -d_T.mean(), (d_T.exp() - 1 - d_T).mean())
    assert tuple(found) == pytest.approx(tuple(map(float, expected)), abs=1e-6)
    assert found.metrics().keys() <= METRICS.keys()
    assert combined([Sums(), Sums()]) is None


@pytest.mark.parametrize(
    ("top_p", "d", "excess"),
    [
        (1.0, -0.2, 0.2),
        (0.5, -0.2, 0.0),
        (0.5, math.log(0.5), 0.0),
        (0.5, math.log(0.5) - 0.3, 0.3),
        (0.5, 0.2, 0.2),
    ],
)
def test_what_top_p_cuts_off_is_no_mismatch_and_what_it_does_not_explain_is(
    top_p: float, d: float, excess: float
) -> None:
    """A nucleus holds between top_p and all of the mass: its tokens' log-probs rise by 0 to -log top_p."""
    check = check_of(config=changed(update_config("none"), actors={"top_p": top_p}))
    found = check.sums(*sample_of(0, 0, d=d), 0)
    assert found.excess == pytest.approx(excess, abs=1e-6)
    assert found.k1 == pytest.approx(-d, abs=1e-6)


# --- what stops a run ---


def part(mean: float, num_tokens: int = 1000) -> Sums:
    """With a standard deviation as large as the mean."""
    squares = 2 * mean**2 * num_tokens
    return Sums(
        num_tokens=num_tokens,
        excess=mean * num_tokens,
        squares=squares,
        max=3 * mean,
        num_far=num_tokens // 4,
    )


@pytest.mark.parametrize("dtype", BOUNDS_NATS)
@pytest.mark.parametrize(
    ("times_bound", "num_tokens", "is_stopped"),
    [
        (0.9, 1000, False),
        (1.2, 1000, True),
        (1.2, 100, False),  # Three standard errors are 0.36 of the bound.
        (1.2, 4000, True),
        (2.0, 40, True),
        (0.9 * FAR_FACTOR, 4, False),
        (1.1 * FAR_FACTOR, 4, True),
        (1.1 * FAR_FACTOR, 1, True),
        (math.nan, 1000, True),
    ],
)
def test_a_mean_clearly_above_the_bound_of_the_dtype_stops_the_run(
    dtype: str, times_bound: float, num_tokens: int, is_stopped: bool
) -> None:
    config = changed(update_config("none"), model={"dtype": dtype})
    assert bound_nats(config) == {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}[dtype]
    given = part(times_bound * BOUNDS_NATS[dtype], num_tokens)
    if not is_stopped:
        assert check_of(config=config).judge(0, [given])["mismatch/tokens"] == num_tokens
        return
    with pytest.raises(TrainingError, match="the actors do not sample from what the learner computes"):
        check_of(config=config).judge(0, [given])


def test_merged_adapters_in_half_precision_are_rounded_once_more_than_their_weights() -> None:
    config = update_config("none", lora_rank=4)
    assert bound_nats(config) == BOUNDS_NATS["float32"]
    assert bound_nats(changed(config, model={"dtype": "bfloat16"})) == 2 * BOUNDS_NATS["bfloat16"]
    alone = changed(config, model={"dtype": "bfloat16"}, weights={"transport": "adapters"})
    assert bound_nats(alone) == BOUNDS_NATS["bfloat16"]


def test_what_logits_differ_by_is_divided_by_the_temperature() -> None:
    bounds = [
        bound_nats(changed(update_config("none"), actors={"temperature": temperature}))
        for temperature in (0.5, 1.0, 2.0)
    ]
    assert bounds == [2e-4, 1e-4, 1e-4]


def test_the_first_fresh_samples_count_whenever_they_come_and_later_ones_are_metrics() -> None:
    told: list[str] = []
    check = check_of(tell=told.append)
    assert check.judge(0, [Sums()]) == check.judge(1, []) == {}
    check.judge(2, [part(2e-6, MIN_TOKENS - 1)])
    assert told == [], "too few to be sure"
    assert check.judge(3, [part(2e-6)])["mismatch/mean"] == pytest.approx(2e-6)
    assert len(told) == 1
    assert "agree at learner step 3: log-probs of 1000 fresh tokens differ by 2e-06 nats" in told[0]
    assert check.judge(4, [part(3.0)])["mismatch/mean"] == pytest.approx(3.0)
    with pytest.raises(TrainingError):
        check_of().judge(7, [part(3.0)])


def test_the_error_says_the_numbers_the_cause_and_what_to_set() -> None:
    moe = transformers.OlmoeConfig(architectures=["OlmoeForCausalLM"])
    with pytest.raises(TrainingError) as error:
        MismatchCheck(update_config("none"), moe, start_step=3).judge(3, [part(3.71)])
    text = str(error.value)
    for words in (
        "1000 tokens of version 3",
        "3.71 nats",
        "bound 0.0001 for float32",
        "at most 11.1",
        "for 25.0%",
        "Step 3 was not done",
    ):
        assert words in text
    assert "Likely for olmoe (OlmoeForCausalLM): its experts" in text
    assert text.count("\n") == 1


def test_causes_are_those_that_the_model_and_the_run_can_have() -> None:
    config = update_config("none")  # Sequences of up to 20 tokens.

    def causes(model_config: Any, **sections: Any) -> str:
        return "; ".join(likely_causes(changed(config, **sections), model_config))

    assert causes(LLAMA).startswith("weights that vLLM loaded otherwise")
    assert "window of 16 tokens: keep data.max_prompt_tokens + actors.max_new_tokens = 20" in causes(
        transformers.MistralConfig(sliding_window=16)
    )
    assert "window" not in causes(transformers.MistralConfig(sliding_window=20))
    assert "set model.attention=eager" in causes(transformers.Gemma2Config())
    assert "model.dtype=float32" in causes(LLAMA, model={"dtype": "bfloat16"})
    assert "weights.transport=snapshot" in causes(LLAMA, weights={"transport": "adapters"})
    yarn = transformers.LlamaConfig(
        rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    )
    assert "rotary embedding (yarn)" in causes(yarn)


def test_an_alarm_tells_of_a_mismatch_on_the_way_and_is_quiet_for_a_while() -> None:
    alarms = Alarms(1e-4)
    agreeing, differing = part(1e-5), part(0.2)
    told = []
    for step in range(2 * QUIET_STEPS):
        found = combined([differing if step >= 10 else agreeing])
        told += [
            (step, event) for event in alarms.observe(step, found.metrics() if found and step != 12 else {})
        ]
    assert [step for step, _ in told] == [10, 10 + QUIET_STEPS]
    assert (
        "log-probs by actors and learner of 1000 fresh tokens differ by 0.2 nats on average, above 0.0001"
        in told[0][1]
    )
    assert alarms.count == 2
    assert Alarms().observe(0, part_metrics(0.2)) == []


def part_metrics(mean: float) -> dict[str, float]:
    found = combined([part(mean)])
    assert found is not None
    return found.metrics()


# --- within an update ---


def test_an_update_is_not_done_where_the_actors_sampled_from_something_else(
    tiny_models: dict[str, Any],
) -> None:
    config = update_config(str(tiny_models["untied"]))
    policy, updater = plain_updater(config, load_objective(config.objective))
    updater.mismatch = MismatchCheck(config, policy.module.config)
    batch = drawn(random_batches(policy.module.config.vocab_size)[0], policy, config.learner.layout)
    before = {name: value.detach().clone() for name, value in policy.module.named_parameters()}
    wrong = [
        msgspec.structs.replace(group, samples=tuple(colder(s) for s in group.samples))
        for group in batch.groups
    ]
    with pytest.raises(TrainingError, match="Step 0 was not done"):
        updater.update(Share.of(Batch(0, tuple(wrong))), LR)
    assert all(torch.equal(before[name], value) for name, value in policy.module.named_parameters())
    policy.module.zero_grad()
    metrics = updater.update(Share.of(batch), LR).metrics()
    assert metrics["mismatch/tokens"] == sum(
        sample.num_sampled for group in batch.groups for sample in group.samples
    )
    assert 0 <= metrics["mismatch/mean"] < 1e-5
    assert metrics["mismatch/share_above_0.1"] == 0
    assert any(not torch.equal(before[name], value) for name, value in policy.module.named_parameters())
    stale = Batch(1, batch.groups)
    assert not [
        name for name in updater.update(Share.of(stale), LR).metrics() if name.startswith("mismatch/")
    ], "absent, not zero"


def colder(sample: Sample) -> Sample:
    """As if drawn at a lower temperature."""
    return msgspec.structs.replace(sample, logprobs=Float32s.of(sample.logprobs.numpy() / 0.7))
