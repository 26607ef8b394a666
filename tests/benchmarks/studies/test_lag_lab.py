"""The staleness study's instrument: the lag is exact, the sampler's log-probs are the learner's, runs
are paired and records add up.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import staleness_study
from benchmarks.studies.lag_lab import LagRun, PlainPolicy, Task, arithmetic_task, sample
from core.config import Config
from core.errors import ConfigError
from learner.step.packing import TokenSequence, collate
from tests.support import ROOT
from tests.support.configs import quickstart

STEPS = 8


def config_for(model_dir: Path, lag: int, *more: str) -> Config:
    overrides = [
        f"run.steps={STEPS}",
        f"model.path={model_dir}",
        "learner.groups_per_step=3",
        "learner.schedule=[10,constant]",
        "actors.group_size=4",
        "weights.publish_every=1",
        f"buffer.max_staleness={lag}",
        f"buffer.capacity={3 * (lag + 2)}",
        "eval.sampling=[1,1.0]",
        *more,
    ]
    return quickstart(*overrides)


@pytest.fixture(scope="module")
def task(tiny_models: dict[str, Path]) -> Task:
    whole = arithmetic_task(str(tiny_models["tied"]), str(ROOT / "configs/arithmetic"))
    return Task(whole.train, whole.test[:5], whole.score, whole.eos_id)


@pytest.mark.parametrize("lag", [0, 1, 5])
def test_every_sample_is_exactly_as_old_as_the_lag_once_something_is(
    tiny_models: dict[str, Path], task: Task, lag: int
) -> None:
    run = LagRun(config_for(tiny_models["tied"], lag), task, lag)
    seen = []
    for step in range(STEPS):
        batch = run._batch(step)
        seen.append(
            {step - group.oldest_version for group in batch.groups if group.oldest_version is not None}
        )
    assert seen == [{min(step, lag)} for step in range(STEPS)]
    assert run._frontier == 3 * STEPS, "every run generates the same number of groups"


def test_the_first_batches_do_not_depend_on_the_method(tiny_models: dict[str, Path], task: Task) -> None:
    batches = [
        LagRun(config_for(tiny_models["tied"], 2, *more), task, 2)._batch(0)
        for more in ((), ("objective.name=grpo",))
    ]
    assert batches[0] == batches[1]


def test_the_samplers_log_probs_are_the_learners(tiny_models: dict[str, Path], task: Task) -> None:
    policy = PlainPolicy(config_for(tiny_models["tied"], 0), trained=False)
    prompts = [row["ids"] for row in task.train[:20]]
    made = sample(policy.module, prompts, 6, 0.7, task.eos_id, torch.Generator().manual_seed(0))
    inputs = collate(
        [TokenSequence.of_turn(ids, tokens) for ids, (tokens, _) in zip(prompts, made, strict=True)],
        "padded",
        0,
    )
    expected = torch.cat([torch.tensor(logprobs) for _, logprobs in made])
    torch.testing.assert_close(policy.logprobs(inputs, 0.7), expected, rtol=0, atol=2e-5)
    for tokens, _ in made:
        assert task.eos_id not in tokens[:-1]
        assert len(tokens) == 6 or tokens[-1] == task.eos_id


def test_a_run_learns_from_its_batches_and_reports_the_systems_metrics(
    tiny_models: dict[str, Path], task: Task
) -> None:
    # A random model adds nothing right.
    even = Task(task.train, task.test, lambda tokens, row: float(tokens[0] % 2 == 0), task.eos_id)
    run = LagRun(config_for(tiny_models["tied"], 1), even, 1, engine_noise=0.05)
    before = run.policy.module.lm_head.weight.detach().clone()
    rows = run.run(eval_every=4)
    assert [row["step"] for row in rows] == [0, 4, 8]
    assert not torch.equal(before, run.policy.module.lm_head.weight)
    assert 0 < rows[-1]["objective/ess_fraction"] <= 1


def test_an_objective_that_needs_fresh_samples_is_refused_where_none_is_ever_fresh(
    tiny_models: dict[str, Path], task: Task
) -> None:
    config = config_for(tiny_models["tied"], 2, "objective.on_policy_coef=0.01")
    with pytest.raises(ConfigError, match=r"lag = 2: none is ever fresh"):
        LagRun(config, task, 2)
    LagRun(config, task, 2, fresh_groups=1)


def record(method: str, lag: int, lr: float, seed: int, score: float) -> dict:
    return {
        "method": method,
        "lag": lag,
        "lr": lr,
        "seed": seed,
        "steps": 10,
        "score": score,
        "held_out": [0.4, score],
    }


def test_the_table_uses_the_rate_chosen_on_the_other_seed_and_missing_runs_are_run_once(
    tmp_path: Path,
) -> None:
    methods = list(staleness_study.METHODS)
    choice = staleness_study.CHOICE_SEED
    records = [
        record(m, lag, lr, choice, 0.9 if lr == 3e-4 else 0.5)
        for m in methods
        for lag in (0, 64)
        for lr in staleness_study.GRID
    ]
    assert set(staleness_study.chosen_rates(records).values()) == {3e-4}
    records += [record(methods[0], 4, 3e-4, seed, score) for seed, score in ((1, 0.6), (2, 0.8))] + [
        record(methods[0], 4, 1e-3, 1, 0.1)
    ]
    (row,) = staleness_study.table(records)
    assert (row["lag"], row["mean"], row["standard_error"], row["seeds"]) == (4, 0.7, 0.1, 2)
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    # Nothing is missing: nothing runs.
    staleness_study.run_missing(staleness_study.choice_jobs(10), path, 1, pytest.fail)
    knobs = [
        {"knob": "weight truncated, cap 5", "lag": lag, "seed": 1, "steps": 10, "score": 0.5}
        for lag in staleness_study.LAGS
    ]
    staleness_study.draw(records, knobs, tmp_path)
    assert "truncated, cap 5" in (tmp_path / "staleness_study.csv").read_text()
    assert (tmp_path / "staleness_study.png").stat().st_size > 10_000
