"""Adapters under the real ZeRO-3: trained as plain PyTorch and peft train them, and for everybody else
merged weights like any others.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.studies.lag_lab import PlainPolicy
from core.config import LORA_ALPHA, Config
from core.config.files import dump_config
from core.errors import CheckpointError, ConfigError
from core.model_shape import adapted_layers
from learner.catalogue import parse_config
from learner.checkpoints.checkpoint import TensorPart, checkpoint_dirs
from learner.checkpoints.export import export
from learner.checkpoints.writer import CheckpointWriter
from learner.objectives import load_objective
from learner.policy.lora import ADAPTER, adapters_off, add_adapters, merged, weights_of
from learner.step.frozen import frozen_names
from learner.step.packing import ModelInputs, token_logprobs
from learner.step.share import Share
from learner.step.update import Updater
from tests.support.configs import LR, RANK, lora_config
from tests.support.learning.ranks import run_ranks
from tests.support.learning.resumed import Run
from tests.support.learning.updates import random_batches
from tests.support.runs import rows_of, start_train
from tests.support.scenarios import lora_scenario
from tests.support.scenarios.lora_scenario import SEED, STEPS

# Moving: as in tests/learner/policy/test_zero.py, ratios pi/pi_prox enlarge the differences.
TOLERANCE = {False: 1e-5, True: 4e-5}


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def with_peft(model: Any) -> Any:
    """The model in peft's own wrapper, with the adapters as the learner's are said to begin."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear"))


class PlainLora(PlainPolicy):
    """peft and AdamW."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, trained=True)
        # In float64, copies made by merging are what they are copies of: no ratio between them is a rounding.
        self.module = with_peft(self.module).to(
            torch.float64 if config.objective.reference_moves_every else torch.float32
        )
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained, lr=LR, betas=(0.9, 0.99), eps=1e-8, weight_decay=config.learner.weight_decay
        )

    def logprobs(self, inputs: ModelInputs, temperature: float) -> Tensor:
        return token_logprobs(self.module(**inputs.model_kwargs()).logits, inputs, temperature)

    def own_weights(self, bucket_bytes: int) -> Iterable[tuple[str, Tensor]]:
        return copy.deepcopy(self.module).merge_and_unload().named_parameters()

    def adapters(self) -> dict[str, Tensor]:
        named = self.module.named_parameters()
        return {
            name.removeprefix("base_model.model."): parameter.detach()
            for name, parameter in named
            if parameter.requires_grad
        }


def run_plain(config: Config) -> tuple[PlainLora, list[dict[str, float]]]:
    objective = load_objective(config.objective)
    policy = PlainLora(config)
    frozen = {name: PlainPolicy(config, trained=False) for name in frozen_names(objective)}
    for plain in frozen.values():
        plain.module.to(policy.module.dtype)
    updater = Updater(config, policy, objective, frozen, pad_id=0, device=torch.device("cpu"))
    return policy, [
        updater.update(Share.of(batch), LR).metrics()
        for batch in random_batches(load(Path(config.model.path)).config.vocab_size)[:STEPS]
    ]


def run_scenario(config: Config, out_dir: Path) -> dict[str, Any]:
    """The scenario in real processes over gloo."""
    (out_dir / "config.json").write_text(config.model_dump_json())
    run_ranks(lora_scenario.main, config.learner.ranks, out_dir)
    found: dict[str, Any] = torch.load(out_dir / "found.pt")
    return found


@pytest.fixture(
    scope="module",
    params=[
        ("tied", 1, "packed", False, False),
        ("untied", 2, "padded", True, False),
        ("tied", 2, "packed", False, True),
    ],
    ids=["one-rank", "two-ranks", "moving"],
)
def trained(
    request: pytest.FixtureRequest, tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Path, dict[str, Any]]:
    """(config, directory, what the ranks found)."""
    name, num_ranks, layout, checkpointing, moving = request.param
    directory = tmp_path_factory.mktemp(request.param[0])
    config = lora_config(
        tiny_models[name], moving=moving, ranks=num_ranks, layout=layout, gradient_checkpointing=checkpointing
    )
    return config, directory, run_scenario(config, directory)


@pytest.mark.slow
def test_adapters_train_as_in_plain_pytorch_with_peft(trained: tuple[Config, Path, dict[str, Any]]) -> None:
    """`moving`: reference and proximal policy are copies of the adapters there, of merged models here."""
    config, _, found = trained
    plain, metrics = run_plain(
        parse_config(
            {**config.model_dump(), "learner": {**config.learner.model_dump(), "micro_batch_tokens": 4096}}
        )
    )
    expected = plain.adapters()
    assert found["adapters"].keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(
            found["adapters"][name],
            values.float(),
            atol=TOLERANCE[bool(config.objective.reference_moves_every)],
            rtol=0,
        )
        if "lora_B" in name:
            assert values.abs().max() > 1e-3  # It was zero.
    for mine, theirs in zip(found["metrics"], metrics, strict=True):
        for name in theirs:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5, nan_ok=True), name


@pytest.mark.slow
def test_version_0_is_the_base_bit_for_bit(trained: tuple[Config, Path, dict[str, Any]]) -> None:
    config, _, found = trained
    base = dict(load(Path(config.model.path)).named_parameters())
    assert found["metadata"] == [(name, tuple(parameter.shape)) for name, parameter in base.items()]
    assert list(found["base"]) == list(base)
    assert all(torch.equal(found["base"][name], parameter) for name, parameter in base.items())


@pytest.mark.slow
def test_published_and_saved_weights_are_what_peft_merges(
    trained: tuple[Config, Path, dict[str, Any]],
) -> None:
    config, directory, found = trained
    model = with_peft(load(Path(config.model.path)))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(found["adapters"][name.removeprefix("base_model.model.")])
    expected, saved = model.merge_and_unload(), load(directory / "policy")
    moved = 0.0
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(found["published"][name], parameter.detach(), atol=1e-6, rtol=0)
        assert torch.equal(dict(saved.named_parameters())[name], found["published"][name]), name
        moved = max(moved, float((parameter - found["base"][name]).detach().abs().max()))
    assert moved > 1e-3
    assert all(torch.equal(found["again"][name], values) for name, values in found["adapters"].items()), (
        "publishing changed the policy"
    )


@pytest.mark.slow
def test_the_reference_with_adapters_off_is_the_base(trained: tuple[Config, Path, dict[str, Any]]) -> None:
    _, _, found = trained
    torch.testing.assert_close(found["reference"], found["frozen"], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_exact_its_checkpoints_are_small_and_its_export_is_the_merged_policy(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    tree = lora_config(tiny_models["untied"], moving=True, ranks=2, schedule=(2, "constant")).model_dump()
    tree["run"] = {"steps": 6, "deterministic": True, "timeout_s": 120.0, "seed": SEED}
    tree["checkpoint"] = {"every": 3}
    straight, killed = (Run(tmp_path / name, parse_config(tree)) for name in ("straight", "killed"))
    straight.start()
    straight.finish()
    killed.start()
    killed.kill_when(lambda: len(killed.rows()) >= 4 and bool(checkpoint_dirs(killed.dir)))
    killed.start()
    killed.finish()
    assert killed.rows() == straight.rows()
    files = [(run.dir / "policy" / "model.safetensors").read_bytes() for run in (straight, killed)]
    assert files[0] == files[1]
    mine, theirs = killed.checkpoint(6), straight.checkpoint(6)
    of_ranks = [
        [file for file in each.manifest.files if file.name.startswith("rank")] for each in (mine, theirs)
    ]
    assert of_ranks[0] == of_ranks[1]
    assert {key.rpartition(".lora_")[2] for key in mine.tensors} == {"A.default.weight", "B.default.weight"}
    assert {key.partition("/")[0] for key in mine.tensors} == {
        "master",
        "exp_avg",
        "exp_avg_sq",
        "reference",
        "proximal",
    }
    exported, policy = load(export(killed.dir, 6, tmp_path / "out")), load(killed.dir / "policy")
    for name, parameter in policy.named_parameters():
        assert torch.equal(exported.get_parameter(name), parameter), name


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["snapshot", "adapters"])
def test_the_whole_system_trains_adapters_and_exports_merged_ones(
    transport: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """vLLM evaluates merged weights or applies the adapters; the policy and the checkpoint's export are
    the same whole model.
    """
    # Of the right answer a random model has no signal.
    reward = "rewards.functions={tests.support.reward_functions:length: 1}"
    more = (
        "learner.lora_rank=4",
        "learner.lr=0.01",
        "checkpoint.every=6",
        "actors.count=1",
        f"weights.transport={transport}",
        reward,
    )
    process = start_train(tiny_models["tied"], tmp_path / "run", 6, *more)
    out, err = process.communicate(timeout=560)
    assert process.returncode == 0, out + err
    rows, evaluations = rows_of(tmp_path / "run"), rows_of(tmp_path / "run", "evaluations")
    assert [row["progress/step"] for row in rows] == list(range(1, 7))
    assert rows[0]["objective/kl_ref"] == 0  # The reference is the policy, which is the base.
    assert rows[-1]["objective/kl_ref"] != 0
    assert [evaluation["policy_version"] for evaluation in evaluations] == [0, 6]
    policy, base = load(tmp_path / "run" / "policy"), load(tiny_models["tied"])
    changed = {
        name
        for name, parameter in policy.named_parameters()
        if not torch.equal(parameter, base.get_parameter(name))
    }
    assert changed == {f"{name}.weight" for name in adapted_layers(base)}
    exported = load(export(tmp_path / "run", 6, tmp_path / "out"))
    assert all(
        torch.equal(exported.get_parameter(name), parameter) for name, parameter in policy.named_parameters()
    )


# --- without ranks ---


def test_adapters_are_a_function_of_the_seed_alone_and_leave_the_generator_alone(
    tiny_models: dict[str, Path],
) -> None:
    learner = lora_config(tiny_models["tied"]).learner
    adapters = []
    for before, seed in ((1, SEED), (2, SEED), (2, SEED + 1)):
        torch.manual_seed(before)
        model, state = load(tiny_models["tied"]), torch.get_rng_state()
        add_adapters(model, learner, seed)
        assert torch.equal(state, torch.get_rng_state())
        adapters.append([parameter for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*adapters[:2], strict=True))
    assert not torch.equal(adapters[0][0], adapters[2][0])


def test_what_is_adapted_is_what_peft_calls_all_linear(tiny_models: dict[str, Path]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = load(tiny_models["untied"])
    names = list(adapted_layers(model))
    wrapped = with_peft(model)
    assert names == [
        name.removeprefix("base_model.model.")
        for name, layer in wrapped.named_modules()
        if hasattr(layer, "lora_A")
    ]
    assert len(names) == 2 * 7
    with pytest.raises(ConfigError, match="no linear layers"):
        # Its layers are of a kind of its own.
        adapted_layers(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16)))


def test_adapters_go_off_and_come_back_even_after_an_error(tiny_models: dict[str, Path]) -> None:
    model, ids = load(tiny_models["tied"]), torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    add_adapters(model, lora_config(tiny_models["tied"]).learner, SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    changed = model(ids).logits
    with adapters_off(model):
        assert torch.equal(model(ids).logits, before)
    with pytest.raises(IndexError), adapters_off(model):
        model(ids + 1000)
    assert torch.equal(model(ids).logits, changed)
    assert not torch.allclose(changed, before)


def test_merging_rounds_once_to_the_weights_dtype() -> None:
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)
    torch.testing.assert_close(merged(weight, a, b, 0.5), weight + 0.5 * b @ a)
    low, low_a, low_b = (tensor.bfloat16() for tensor in (weight, a, b))
    exact = low.double() + 0.5 * low_b.double() @ low_a.double()
    assert torch.equal(merged(low, low_a, low_b, 0.5), exact.float().bfloat16())


# --- export ---


def save_adapters(run_dir: Path, model: Any, config: Config) -> None:
    with CheckpointWriterOf(run_dir) as writer:
        parts = (
            TensorPart(f"master/{name}", tuple(parameter.shape), parameter.detach().flatten().float())
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        )
        writer.save(5, parts, {"config": dump_config(config)})


class CheckpointWriterOf(CheckpointWriter):
    """One rank's, closed at the end."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, 0, 1, session="s")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@pytest.mark.parametrize("max_shard_size", ["10GB", "40kB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_merges_the_adapters_into_a_base_of_one_or_many_files(
    max_shard_size: str, dtype: str, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    base = load(tiny_models["untied"])
    base.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
    AutoTokenizer.from_pretrained(tiny_models["untied"]).save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == (max_shard_size == "40kB")
    tree = lora_config(tmp_path / "base").model_dump()
    tree["model"]["dtype"] = dtype
    config = parse_config(tree)
    model = base.to(getattr(torch, dtype))
    add_adapters(model, config.learner, SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapters(tmp_path / "run", model, config)
    out = export(tmp_path / "run", None, tmp_path / "out", shard_bytes=40_000)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    exported = load(out)
    expected = {weight.name: weight.value() for weight in weights_of(model)}
    assert dict(exported.named_parameters()).keys() == expected.keys()
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, expected[name].float()), name
    assert all(ADAPTER not in name for name in expected)


def test_an_export_whose_base_is_gone_or_another_says_so(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    model = load(tiny_models["untied"])
    config = lora_config(tmp_path / "base")
    add_adapters(model, config.learner, SEED)
    save_adapters(tmp_path / "run", model, config)
    with pytest.raises(CheckpointError, match=r"(?s)no safetensors.*policy/"):
        export(tmp_path / "run", None, tmp_path / "out")
    other = load(tiny_models["untied"])
    other.config.num_hidden_layers = 1
    type(other)(other.config).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"(?s)has no model\.layers\.1\.\S+.*policy/"):
        export(tmp_path / "run", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
