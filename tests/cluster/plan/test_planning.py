"""Plans of whole configs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.plan import parts
from cluster.plan.fit import Fit, fit_of, fullest_host_bytes
from cluster.plan.planning import make_plan, speeds_of
from cluster.plan.rates import DEVICES
from cluster.plan.report import render_plan
from cluster.plan.shapes import KNOWN, Known
from cluster.plan.simulation import Simulation
from cluster.plan.splits import Split, _deals, best_split
from cluster.plan.workload import Machines, Workload, machines_of, workload_of
from cluster.preparation.memory import ModelShape, estimate_memory, shape_of
from core.config import Config, LearnerConfig, ModelConfig
from core.errors import ConfigError
from core.model_shape import load_model_config
from launch import parser
from learner.catalogue import load_config
from tests.support.house import ROOT

LLAMA = str(ROOT / "configs" / "llama3_8b_math.yaml")
LENGTHS: dict[str, Any] = {"prompt_tokens": 300, "new_tokens": 600}


def config_of(*overrides: str) -> Config:
    return load_config(LLAMA, overrides)


def h100s() -> Machines:
    return Machines(DEVICES["h100"])


def test_a_plan_says_who_waits_what_it_costs_and_what_is_better() -> None:
    plan = make_plan(config_of("learner.ranks=8", "actors.count=8"), h100s(), **LENGTHS)
    assert plan.bottleneck == "the learner"
    assert plan.split is not None
    assert plan.split.ranks > 8
    assert plan.split.ranks + plan.split.actors == 16
    assert plan.fit.problems == ()
    best, likely, worst = (plan.step_s(case) for case in ("best", "likely", "worst"))  # type: ignore[arg-type]
    assert best < likely == plan.outcome.step_s < worst
    assert plan.gpu_hours("likely") == pytest.approx(16 * 2000 * likely / 3600)
    assert plan.outcome.staleness[2] <= 16
    text = render_plan(plan)
    for part in ("compute", "generation", "staleness", "object store: 48.2 GB", "GPU-hours", "bottleneck"):
        assert part in text
    assert f"learner.ranks={plan.split.ranks} actors.count={plan.split.actors}" in text


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", LLAMA, "learner.ranks=2", "actors.count=2", "--gpu", "H200", "--new-tokens", "200"]
    arguments = parser().parse_args(line)
    assert arguments.run(arguments) == 0
    text = capsys.readouterr().out
    assert "2 learner ranks on 2 and 2 actors on 2 x H200 SXM, 1 nodes" in text
    assert "assumed: --prompt-tokens 307 on average" in text


def test_a_learner_that_no_card_holds_is_told_what_to_type_and_the_exit_code_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["plan", LLAMA, "learner.ranks=1", "actors.count=1", "run.steps=1"]
    line += ["--prompt-tokens", "300", "--new-tokens", "600"]
    arguments = parser().parse_args(line)
    assert arguments.run(arguments) == 1
    (told,) = (text for text in capsys.readouterr().out.splitlines() if text.startswith("does not fit"))
    assert "a learner rank wants 1" in told
    typed = re.findall(r"learner\.\w+=\w+", told)
    assert "learner.offload=all" in typed
    assert any(setting.startswith("learner.ranks=") for setting in typed)
    for setting in typed:
        config = config_of("learner.ranks=1", "actors.count=1", setting)
        job, _ = workload_of(config, h100s(), **LENGTHS)
        assert fit_of(job, estimate_memory(config, job.shape)).problems == ()


def test_few_actors_are_the_bottleneck_and_get_more_gpus() -> None:
    plan = make_plan(config_of("learner.ranks=12", "actors.count=1", "actors.slots=16"), h100s(), **LENGTHS)
    assert plan.bottleneck == "the actors"
    assert plan.outcome.learner_busy < 0.9
    assert plan.split is not None
    assert plan.split.actors > 1


def test_lengths_are_assumed_aloud() -> None:
    _, notes = workload_of(config_of(), h100s())
    assert any("assumed: --prompt-tokens 307 --new-tokens 614" in note for note in notes)
    _, notes = workload_of(config_of(), h100s(), **LENGTHS)
    assert not any("assumed" in note for note in notes)


def test_a_plan_on_cpus_has_the_rates_of_cores(tmp_path: Path) -> None:
    tiny = Known("llama", 2, ModelShape(0, layers=2, hidden=256, mlp=512, kv_width=128, vocabulary=300))
    (tmp_path / "config.json").write_text(json.dumps(config_json(tiny)))
    overrides = ["learner.num_gpus=0", "actors.num_gpus=0", f"model.path={tmp_path}", "model.dtype=float32"]
    overrides += ["data.max_prompt_tokens=30", "actors.max_new_tokens=20", "actors.engine_memory=1"]
    plan = make_plan(config_of(*overrides), Machines(None))
    assert plan.job.num_gpus == 0
    assert plan.split is None
    assert "rates of a core" in render_plan(plan)


@pytest.mark.parametrize(
    ("overrides", "options", "sentence"),
    [
        ((), {"gpu": "h900"}, "--gpu h900: not one of a100"),
        ((), {"network_gbit": 0.0}, "--network 0: expected a number above 0"),
        ((), {"gpus_per_node": -1}, "--gpus-per-node -1: expected"),
        ((), {"host_gib": float("nan")}, "--host-memory nan: expected"),
        (("learner.num_gpus=0", "actors.num_gpus=0"), {"gpu": "h100"}, "runs on CPUs"),
        (
            ("actors.num_gpus=2", "actors.tensor_parallel=2"),
            {"gpus_per_node": 1},
            "actors.num_gpus = 2 with --gpus-per-node 1: an engine lies on one node",
        ),
        (
            ("actors.num_gpus=16", "actors.tensor_parallel=16"),
            {},
            "actors.num_gpus = 16 with --gpus-per-node 8: an engine lies on one node",
        ),
    ],
)
def test_machines_that_cannot_be_are_refused(
    overrides: tuple[str, ...], options: dict[str, Any], sentence: str
) -> None:
    told = {"gpu": None, "gpus_per_node": 8, "network_gbit": 400.0, "host_gib": 1000.0, **options}
    with pytest.raises(ConfigError) as refused:
        machines_of(config_of(*overrides), **told)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "lengths", "sentence"),
    [
        ((), {"new_tokens": 5000}, "--new-tokens 5000: expected a number of at least 1 and at most 1024"),
        ((), {"prompt_tokens": 0}, "--prompt-tokens 0: expected a number of at least 1"),
        ((), {"new_tokens": 0.0001}, "--new-tokens 0.0001: expected a number of at least 1"),
        ((), {"new_tokens": float("nan")}, "--new-tokens nan: expected a number of at least 1"),
        (
            ("actors.num_gpus=3", "actors.tensor_parallel=3"),
            {},
            "num_attention_heads = 32, intermediate_size = 14336, num_key_value_heads = 8. Set it to one of 2, 4",
        ),
        (
            ("learner.sequence_parallel=16", "learner.ranks=16"),
            {},
            "learner.sequence_parallel = 16 does not divide",
        ),
        (("model.path=someone/unheard-of",), {}, "Known by name: llama-3.1-70b"),
        (("learner.lora_rank=8",), {}, "learner.lora_rank = 8: adapters are sized by the model's layers"),
        (
            ("model.path=meta-llama/Llama-3.1-70B",),
            {},
            "141 GB leave no room on 1 x 80 GB at actors.engine_memory = 0.9. Set actors.num_gpus=4 actors.tensor_parallel=4.",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(
    overrides: tuple[str, ...], lengths: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        make_plan(config_of(*overrides), h100s(), **lengths)
    assert sentence in str(refused.value)


def four_and_four() -> Workload:
    return workload_of(config_of("learner.ranks=4", "actors.count=4"), h100s(), **LENGTHS)[0]


def told_of(config: Config, machines: Machines) -> tuple[str, ...]:
    job, _ = workload_of(config, machines, **LENGTHS)
    fit = fit_of(job, estimate_memory(config, job.shape))
    return (*fit.problems, *fit.hints)


def test_what_does_not_fit_is_told_with_numbers() -> None:
    found = told_of(config_of("learner.ranks=1", "actors.slots=4096"), h100s())
    assert any("a learner rank wants 1" in problem and "of a card of 80 GB" in problem for problem in found)
    assert any("of actors.slots = 4096" in problem for problem in found)
    small = Machines(DEVICES["h100"], host_memory_bytes=64e9)
    found = told_of(config_of(), small)
    assert any("--object-store-memory=" in problem for problem in found)


def test_a_divided_engine_wants_the_host_memory_that_a_dry_run_says() -> None:
    config = config_of(
        "model.path=meta-llama/Llama-3.1-70B",
        "learner.ranks=32",
        "actors.count=4",
        "actors.num_gpus=4",
        "actors.tensor_parallel=4",
    )
    job, _ = workload_of(config, h100s(), **LENGTHS)
    fit = fit_of(job, estimate_memory(config, job.shape))
    # New weights of 141.1 GB, and five processes of 0.6 GiB.
    assert fit.actor_host == pytest.approx(144.3e9, abs=0.1e9)
    assert fit.network_per_step == 2 * 2 * 70_553_706_496


@pytest.mark.parametrize(
    ("changes", "machines", "expected"),
    [
        # Four ranks of 10 bytes and four actors of 1 on one node; a version of 2 besides, and three stored.
        ({}, Machines(DEVICES["h100"]), 4 * 10 + 4 * 1 + 2 + 6),
        ({}, Machines(DEVICES["h100"], gpus_per_node=4), 4 * 10 + 2 + 6),
        ({"learner_gpus": 0}, Machines(DEVICES["h100"]), 4 * 10 + 4 * 1 + 2 + 6),
        ({"learner_gpus": 0, "actor_gpus": 0}, Machines(None), 4 * 10 + 4 * 1 + 2 + 6),
    ],
)
def test_ranks_and_actors_of_a_node_share_its_memory(
    changes: dict[str, Any], machines: Machines, expected: float
) -> None:
    changes = {"shape": ModelShape(1), "machines": machines, **changes}
    job = dataclasses.replace(four_and_four(), **changes)
    fit = Fit(learner_gpu=0, actor_gpu=0, rank_host=10, actor_host=1, store=6, network_per_step=0)
    assert fullest_host_bytes(job, fit) == expected


@pytest.mark.parametrize("overrides", [("learner.num_gpus=0",), ("learner.num_gpus=0", "actors.num_gpus=0")])
def test_host_memory_is_checked_without_gpus_too(overrides: tuple[str, ...]) -> None:
    config = config_of(*overrides, "learner.ranks=4", "actors.engine_memory=0.5")
    on_gpus = config.actors.num_gpus > 0
    machines = Machines(DEVICES["h100"] if on_gpus else None, host_memory_bytes=256 * 2**30)
    assert any("GB of host memory and has 275 GB" in problem for problem in told_of(config, machines))


@pytest.mark.parametrize(
    "broken",
    [
        '{"model_type": "llama", "hidden_size": "big"}',
        '{"model_type": "llama", "hidden_size": 0, "num_attention_heads": 0}',
        '{"model_type": "llama", "hidden_size": 0, "num_attention_heads": 4}',
        '{"model_type": "gpt2", "n_head": 0}',
        '{"model_type": "mamba"}',
        '{"model_type": "llama", "num_hidden_layers": 0, "hidden_size": 64}',
        '{"hidden_size": 64}',
        "[]",
        "{not json",
    ],
)
def test_a_config_that_is_broken_is_told_in_a_sentence(broken: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(broken)
    config = config_of(f"model.path={tmp_path}")
    with pytest.raises(ConfigError, match=f"model.path = {tmp_path}: .*config"):
        workload_of(config, h100s(), **LENGTHS)
    assert "no estimate" in estimate_memory(config).source  # Of a dry run.


def test_a_split_is_better_if_its_simulation_is() -> None:
    job = four_and_four()
    simulated: list[tuple[int, int]] = []

    def simulated_s(dealt: Workload) -> float:
        simulated.append((dealt.ranks, dealt.actors))
        return 50.0 - dealt.ranks if len(simulated) > 1 else 60.0

    best = best_split(job, simulated_s, lambda dealt: True)
    assert 3 <= len(set(simulated)) == len(simulated) <= 5
    assert simulated[0] == (4, 4)
    most = max(ranks for ranks, _ in simulated)
    assert best == Split(most, 8 - most, 50.0 - most)
    simulated.clear()
    # A step that takes as long as the slower part does needs no further simulation.
    assert best_split(job, lambda dealt: simulated_s(dealt) / 50, lambda dealt: True) is None
    assert simulated == [(4, 4)]


def test_a_split_takes_no_more_nodes() -> None:
    job = dataclasses.replace(four_and_four(), ranks=16, actors=2, actor_gpus=4)
    deals = [*_deals(job)]
    assert {len(dealt.nodes) for dealt in deals} == {3}
    assert job.num_gpus == 24
    assert (13, 2) in {(dealt.ranks, dealt.actors) for dealt in deals}
    # Ranks fill two nodes and five cards of the third: of eight cards, three are left, for no engine of four.
    assert all(dealt.actors < 2 for dealt in deals if dealt.ranks > 20)


def test_prompts_are_shared_by_one_attention_alone() -> None:
    jobs = [
        workload_of(config_of(f"model.attention={name}"), h100s(), **LENGTHS)[0] for name in ("sdpa", "eager")
    ]
    assert [job.shares_prompts for job in jobs] == [True, False]
    assert jobs[1].trained_tokens == 64 * 8 * 900


@pytest.mark.parametrize("setting", ["buffer.skip_equal_rewards=true", "data.curriculum=3"])
def test_groups_that_are_left_out_are_told(setting: str) -> None:
    plan = make_plan(config_of(setting, "learner.groups_per_step=4"), h100s(), **LENGTHS)
    assert "groups that are left out" in render_plan(plan)


def test_evaluations_and_pushes_are_in_the_work() -> None:
    more = ["data.eval_rows=500", "eval.every=100", "eval.sampling=[4, 1.0]", "weights.transport=nccl"]
    job, _ = workload_of(config_of(*more), h100s(), **LENGTHS)
    assert job.evaluated_tokens == 500 * 4 / 100 * 600
    assert job.pushes == "nccl"
    speeds = [
        speeds_of(dataclasses.replace(job, evaluated_tokens=tokens), "likely") for tokens in (0.0, 307_200.0)
    ]
    assert speeds[1].engine_step_s(8) == pytest.approx(2 * speeds[0].engine_step_s(8))


def test_a_synchronous_run_is_told_a_split_with_its_real_time() -> None:
    config = config_of("buffer.max_staleness=0", "weights.publish_every=1", "learner.groups_per_step=16")
    plan = make_plan(config, h100s(), **LENGTHS)
    both = parts.bound_s(plan.job, "likely")
    assert plan.outcome.step_s > 1.5 * both  # Nothing overlaps.
    assert plan.bottleneck.startswith("neither alone: both wait for each other, a version takes")
    if plan.split is not None:
        dealt = plan.job.dealt(plan.split.ranks, plan.split.actors)
        again = Simulation(config, speeds_of(dealt, "likely")).run(40)
        assert again.step_s == plan.split.step_s < 0.95 * plan.outcome.step_s


def config_json(known: Known) -> dict[str, Any]:
    shape = known.shape
    head_dim = shape.hidden // known.heads
    return {
        "model_type": known.kind,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_attention_heads": known.heads,
        "num_key_value_heads": shape.kv_width // head_dim,
        "head_dim": head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.hidden < 2048,
    }


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "llama-3.1-70b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-8b"]
)
def test_shapes_that_are_known_are_those_that_transformers_makes(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(KNOWN[name])))
    assert shape_of(ModelConfig(path=str(tmp_path)), LearnerConfig()) == KNOWN[name].shape
    found, known = load_model_config(ModelConfig(path=str(tmp_path))), KNOWN[name].model_config()
    for part in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert getattr(found, part) == getattr(known, part)
