"""The learner's step under the real ZeRO-3: one, two and three ranks and a plain PyTorch loop give the
same parameters.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from actors.scored import with_scores
from core.arrays import Float32s
from core.config import Config
from core.records import Batch
from learner.catalogue import parse_config
from learner.objectives import load_objective
from learner.step.frozen import frozen_names
from learner.step.share import Share
from rewards.scoring import Scored
from tests.support.configs import LR, update_config
from tests.support.learning import ranks
from tests.support.learning.updates import Spy, plain_updater, random_batches, spied
from tests.support.scenarios import zero_scenario

# fp32: sums over ranks and micro-batches are taken in another order; after AdamW's division small gradients
# keep the difference.
TOLERANCE = {"agro": 2e-5, "moving": 4e-5}  # Ratios pi/pi_prox enlarge them further.


def run_plain(config: Config) -> dict:
    """Parameters and metrics of the same steps without DeepSpeed."""
    objective = load_objective(config.objective)
    policy, updater = plain_updater(config, objective)
    metrics = [
        updater.update(Share.of(batch), LR).metrics()
        for batch in random_batches(policy.module.config.vocab_size, segments=True)
    ]
    return {"parameters": dict(policy.module.named_parameters()), "metrics": metrics}


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> dict:
    """The plain loop: padded, one micro-batch a step, whole logits; and with a moving reference and
    proximal policy.
    """
    moving = request.param == "moving"
    name = "untied" if moving else request.param
    config = update_config(str(tiny_models[name]), moving=moving, micro_batch_tokens=4096, layout="padded")
    return {"moving": moving, "model_dir": tiny_models[name], **run_plain(config)}


def run_scenario(model_dir: Path, out_dir: Path, num_ranks: int, *, moving: bool, **learner: object) -> dict:
    """The scenario in `num_ranks` real processes over gloo."""
    config = update_config(str(model_dir), moving=moving, ranks=num_ranks, **learner)
    (out_dir / "config.json").write_text(config.model_dump_json())
    ranks.run_ranks(zero_scenario.main, num_ranks, out_dir)
    return {"metrics": json.loads((out_dir / "metrics.json").read_text()), "dir": out_dir / "policy"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plain", "num_ranks", "shared", "layout", "checkpointing", "offload"),
    [
        ("untied", 1, 1, "packed", False, "none"),
        ("untied", 2, 1, "padded", False, "none"),
        ("untied", 3, 1, "packed", True, "none"),
        ("tied", 2, 1, "packed", True, "none"),
        ("tied", 2, 2, "packed", False, "none"),
        ("moving", 2, 1, "packed", False, "all"),
        ("moving", 4, 2, "packed", True, "none"),
    ],
    indirect=["plain"],
)
def test_zero_ranks_give_the_parameters_of_a_plain_loop(
    num_ranks: int,
    shared: int,
    layout: str,
    checkpointing: bool,
    offload: str,
    plain: dict,
    tmp_path: Path,
) -> None:
    """More than one rank also loads under zero.Init; the head, tied or not, is gathered for log-probs
    in chunks. `shared` ranks have a part of each row.
    """
    from transformers import AutoModelForCausalLM

    moving = plain["moving"]
    settings = {
        "layout": layout,
        "gradient_checkpointing": checkpointing,
        "offload": offload,
        "sequence_parallel": shared,
    }
    result = run_scenario(plain["model_dir"], tmp_path, num_ranks, moving=moving, **settings)
    saved = dict(AutoModelForCausalLM.from_pretrained(result["dir"], dtype=torch.float32).named_parameters())
    start = dict(
        AutoModelForCausalLM.from_pretrained(plain["model_dir"], dtype=torch.float32).named_parameters()
    )
    assert saved.keys() == plain["parameters"].keys()
    tolerance = TOLERANCE["moving" if plain["moving"] else "agro"]
    for name, parameter in plain["parameters"].items():
        assert torch.allclose(saved[name], parameter, atol=tolerance, rtol=0), (
            name,
            (saved[name] - parameter).abs().max(),
        )
    moved = max(float((saved[name] - start[name]).detach().abs().max()) for name in saved)
    assert moved > 2e-3  # The tolerance is small against what training changed.
    for mine, theirs in zip(result["metrics"], plain["metrics"], strict=True):
        for name in theirs:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize(
    ("offload", "gpus", "policy", "reference"),
    [
        ("none", 1, "none", "none"),
        ("reference", 1, "none", "cpu"),
        ("reference", 0, "none", "none"),
        ("all", 1, "cpu", "cpu"),
    ],
)
def test_what_is_offloaded_from_a_gpu(offload: str, gpus: int, policy: str, reference: str) -> None:
    from learner.policy.zero import _deepspeed_config

    learner = update_config("unused", offload=offload, num_gpus=gpus).learner
    trained, frozen = (
        _deepspeed_config(learner, "bfloat16", training=training)["zero_optimization"]
        for training in (True, False)
    )
    assert trained["offload_param"] == trained["offload_optimizer"] == {"device": policy}
    assert frozen["offload_param"] == {"device": reference}


def test_on_a_gpu_the_next_layer_is_gathered_whole(tiny_models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    from learner.policy.zero import PREFETCHED_PARAMETERS, _gather_by_layer, _prefetch

    module = AutoModelForCausalLM.from_pretrained(tiny_models["tied"])
    layer = sum(parameter.numel() for parameter in module.model.layers[0].parameters())
    assert _gather_by_layer(module) == layer
    on_gpu = update_config("unused", num_gpus=1).learner
    assert _prefetch(on_gpu, 218_000_000) == {"stage3_prefetch_bucket_size": 218_000_000}
    assert _prefetch(on_gpu, layer) == {"stage3_prefetch_bucket_size": PREFETCHED_PARAMETERS}
    assert _prefetch(update_config("unused").learner, 218_000_000) == {}


def test_cudnn_is_kept_out_of_attention_on_a_gpu_and_gloo_listens_where_the_others_are(monkeypatch) -> None:
    from learner.policy import zero

    joined = {}
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, **kw: joined.update(kw))
    ops = SimpleNamespace(__compatible_ops__={})
    deepspeed = SimpleNamespace(ops=ops, init_distributed=lambda **kw: joined.update(kw))
    monkeypatch.setattr("learner.policy.zero._import_deepspeed", lambda: deepspeed)
    monkeypatch.setattr("os.environ", {"PATH": os.environ["PATH"]})
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        device = zero.init_process_group(1, 2, "127.0.0.1", 29500, use_gpu=True, timeout_s=5)
        assert (device.type, joined["world_size"], joined["dist_backend"]) == ("cuda", 2, "nccl")
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_batch_with_a_non_finite_log_prob_is_refused_before_the_parameters_change(
    tiny_models: dict[str, Path],
) -> None:
    import msgspec

    config = update_config(str(tiny_models["tied"]))
    policy, updater = plain_updater(config, load_objective(config.objective))
    batch = random_batches(policy.module.config.vocab_size)[0]
    bad = msgspec.structs.replace(
        batch.groups[0].samples[0],
        logprobs=Float32s.of([float("nan")] * batch.groups[0].samples[0].num_sampled),
    )
    groups = (
        msgspec.structs.replace(batch.groups[0], samples=(bad, *batch.groups[0].samples[1:])),
        *batch.groups[1:],
    )
    before = {name: parameter.clone() for name, parameter in policy.module.named_parameters()}
    skip = updater.update(Share.of(Batch(0, groups)), LR).skip
    assert skip is not None
    assert skip.reasons == {0: "behaviour log-probs"}
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.module.named_parameters())


def test_reference_and_proximal_policy_are_copies_of_the_policy_made_when_the_config_says_so(
    tiny_models: dict[str, Path],
) -> None:
    spy, _, _ = spied(tiny_models["untied"], 4, moving=True)
    assert len(spy.seen) == 4
    for step, batch in enumerate(spy.seen):
        is_policy = {
            "reference": torch.allclose(batch.needed("ref_logprobs_T"), batch.logprobs_T, atol=1e-6),
            "proximal": torch.allclose(batch.needed("proximal_logprobs_T"), batch.logprobs_T, atol=1e-6),
        }
        assert is_policy == {"reference": step in (0, 2), "proximal": step in (0, 3)}, step
        sums = batch.sequence_sums(batch.needed("ref_logprobs_T").double())
        torch.testing.assert_close(batch.ref_logprobs_N, sums, rtol=1e-6, atol=1e-6)


def test_an_objective_that_needs_no_reference_gets_none(tiny_models: dict[str, Path]) -> None:
    config = update_config(str(tiny_models["tied"]))
    config = parse_config({**config.model_dump(), "objective": {"name": "grpo", "beta": 0.0}})
    assert frozen_names(load_objective(config.objective)) == ()
    policy, updater = plain_updater(config, load_objective(config.objective))
    result = updater.update(Share.of(random_batches(policy.module.config.vocab_size)[0]), LR)
    metrics = result.metrics()
    assert metrics["optim/grad_norm"] > 0
    assert metrics["objective/kl_ref"] != metrics["objective/kl_ref"]  # Unknown, not zero.
    assert len(result.by_group("advantage")) == 5


def test_a_prompts_variance_is_that_of_its_earlier_visits(tiny_models: dict[str, Path]) -> None:
    spy, batches, _ = spied(tiny_models["untied"], 3)
    assert spy.seen[0].needed("prompt_variance_N").isnan().all()
    rewards = [sample.reward for sample in batches[0].groups[2].samples]
    first = spy.seen[0]
    members = first.groups_N == batches[0].groups[2].group_id
    ell = (first.sequence_sums(first.logprobs_T.detach().double()) - first.ref_logprobs_N)[members]
    expected = (torch.tensor(rewards, dtype=torch.float64) - 0.1 * ell).var()
    second = spy.seen[1].needed("prompt_variance_N")[spy.seen[1].groups_N == batches[1].groups[2].group_id]
    torch.testing.assert_close(second, expected.expand(len(second)))


def test_offline_samples_have_neither_age_nor_behaviour_and_still_train(tiny_models: dict[str, Path]) -> None:
    import msgspec

    config = update_config(str(tiny_models["tied"]))
    config = parse_config({**config.model_dump(), "objective": {"beta": 0.1, "importance_weight": "none"}})
    spy = Spy(load_objective(config.objective))
    policy, updater = plain_updater(config, spy)
    batch = random_batches(policy.module.config.vocab_size)[0]
    offline = tuple(
        msgspec.structs.replace(sample, logprobs=Float32s(), version_spans=())
        for sample in batch.groups[0].samples
    )
    mixed = Batch(0, (msgspec.structs.replace(batch.groups[0], samples=offline), *batch.groups[1:]))
    result = updater.update(Share.of(mixed), LR)
    assert result.metrics()["optim/grad_norm"] > 0
    assert all(math.isnan(staleness) for staleness in result.by_group("staleness")[0])
    seen = next(part for part in spy.seen if (part.groups_N == 0).any())
    of_group = (seen.groups_N == 0)[seen.sequence_T]
    assert seen.behaviour_logprobs_T[of_group].isnan().all()
    assert seen.behaviour_logprobs_T[~of_group].isfinite().all()


def test_equal_answers_and_equal_completions_have_equal_ids(tiny_models: dict[str, Path]) -> None:
    import msgspec

    config = update_config(str(tiny_models["tied"]))
    spy = Spy(load_objective(config.objective), "answers", "completions")
    policy, updater = plain_updater(config, spy)
    batch = random_batches(policy.module.config.vocab_size)[0]
    first = batch.groups[0].samples[0]
    said = {" 7": None, "7 ": None, "8": "7", "8 ": None}
    samples = [msgspec.structs.replace(first, text=text) for text in said]
    scored = with_scores(samples, [Scored(1.0, answer=answer) for answer in said.values()])
    group = msgspec.structs.replace(batch.groups[0], samples=tuple(scored))
    updater.update(Share.of(Batch(0, (group,))), LR)
    answers, completions = spy.seen[0].needed("answers_N"), spy.seen[0].needed("completions_N")
    assert (answers[:3] == answers[0]).all()
    assert answers[3] != answers[0]
    assert (completions == completions[0]).all()
