"""Plans of whole configs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.plan.planning import make_plan
from cluster.plan.rates import DEVICES
from cluster.plan.report import render_plan
from cluster.plan.shapes import KNOWN
from cluster.plan.workload import Machines, machines_of, workload_of
from cluster.preparation.memory import ModelShape, shape_of
from core.config import Config, LearnerConfig, ModelConfig
from core.errors import ConfigError
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
    tiny = ModelShape(0, layers=2, hidden=256, mlp=512, kv_width=128, vocabulary=300)
    (tmp_path / "config.json").write_text(json.dumps(config_json(tiny, "llama")))
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
        ((), {"new_tokens": 5000}, "--new-tokens 5000: expected a number above 0 and at most 1024"),
        ((), {"prompt_tokens": 0}, "--prompt-tokens 0: expected a number above 0"),
        (("model.path=someone/unheard-of",), {}, "Known by name: llama-3.1-70b"),
        (("learner.lora_rank=8",), {}, "learner.lora_rank = 8: adapters are sized by the model's layers"),
        (
            ("model.path=meta-llama/Llama-3.1-70B",),
            {},
            "an engine's weights of 141 GB leave no room on 1 x 80 GB",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(
    overrides: tuple[str, ...], lengths: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        make_plan(config_of(*overrides), h100s(), **lengths)
    assert sentence in str(refused.value)


def test_what_does_not_fit_is_told_with_numbers() -> None:
    found = make_plan(config_of("learner.ranks=1", "actors.slots=4096"), h100s(), **LENGTHS).fit.problems
    assert any("a learner rank wants 1" in problem and "of a card of 80 GB" in problem for problem in found)
    assert any("of actors.slots = 4096" in problem for problem in found)
    small = Machines(DEVICES["h100"], host_memory_bytes=64e9)
    found = make_plan(config_of(), small, **LENGTHS).fit.problems
    assert any("--object-store-memory=" in problem for problem in found)


def config_json(shape: ModelShape, kind: str) -> dict[str, Any]:
    head_dim = 64 if shape.hidden == 896 else 128
    return {
        "model_type": kind,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_attention_heads": shape.hidden // head_dim,
        "num_key_value_heads": shape.kv_width // head_dim,
        "head_dim": head_dim,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.hidden < 2048,
    }


@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "llama-3.1-70b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"]
)
def test_shapes_that_are_known_are_those_that_transformers_makes(name: str, tmp_path: Path) -> None:
    kind = "llama" if name.startswith("llama") else "qwen2"
    (tmp_path / "config.json").write_text(json.dumps(config_json(KNOWN[name], kind)))
    assert shape_of(ModelConfig(path=str(tmp_path)), LearnerConfig()) == KNOWN[name]
