"""The learner's step under the real ZeRO-3: one rank, two ranks and a plain PyTorch loop give the same parameters."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from buffer.records import Batch, Group, Sample, VersionSpan
from cluster.config import Config, parse_config
from learner.objectives import load_objective
from learner.update import Updater

SCENARIO = Path(__file__).with_name("zero_scenario.py")
STEPS = 4
LR = 1e-3
# fp32: sums over ranks and micro-batches are taken in another order; after AdamW's division small gradients keep the difference.
TOLERANCE = 2e-5


def config_for(model_dir: str, **learner: object) -> Config:
    return parse_config(
        {
            "model": {"path": model_dir},
            "data": {"path": "unused", "max_prompt_tokens": 12},
            "rewards": {"functions": [{"name": "exact_match"}]},
            "actors": {"max_new_tokens": 8},
            "learner": {"groups_per_step": 5, "lr": LR, "grad_clip": 0.5, "micro_batch_tokens": 96, **learner},
            "agro": {"beta": 0.1},
        }
    )


def random_batches(vocab_size: int) -> list[Batch]:
    """Groups of mixed sizes, lengths and ages; some too large for one micro-batch of 96 tokens."""
    rng = random.Random(0)
    batches = []
    for step in range(STEPS):
        groups = []
        for number in range(5):
            samples = []
            for _ in range(rng.choice([2, 3, 8])):
                length = rng.randint(1, 8)
                samples.append(
                    Sample(
                        token_ids=tuple(rng.randrange(vocab_size) for _ in range(length)),
                        logprobs=tuple(-rng.uniform(1, 4) for _ in range(length)),
                        version_spans=(VersionSpan(max(0, step - rng.randint(0, 3)), 0, length),),
                        finish_reason="stop",
                        text="",
                        reward=float(rng.random() < 0.5),
                    )
                )
            prompt_ids = tuple(rng.randrange(3, vocab_size) for _ in range(rng.randint(3, 12)))
            groups.append(Group(group_id=100 * step + number, row=number, prompt="", prompt_ids=prompt_ids, samples=tuple(samples)))
        batches.append(Batch(step, tuple(groups)))
    return batches


class PlainPolicy:
    """The same model and optimizer without DeepSpeed: what ZeRO-3 is compared with."""

    def __init__(self, model_dir: str, config: Config) -> None:
        from transformers import AutoModelForCausalLM

        self.module = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._clip = config.learner.grad_clip
        self._optimizer = torch.optim.AdamW(self.module.parameters(), lr=LR, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)

    def logprobs(self, inputs, temperature):  # type: ignore[no-untyped-def]
        from learner.packing import token_logprobs

        return token_logprobs(self.module(**inputs.model_kwargs()).logits, inputs, temperature)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        del last
        loss.backward()

    def step(self, lr: float) -> float:
        del lr
        norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clip))
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm


@pytest.fixture(scope="module")
def plain(tiny_models: dict[str, Path]) -> dict:
    """Parameters and gradient norms of the plain loop."""
    model_dir = str(tiny_models["untied"])
    config = config_for(model_dir, micro_batch_tokens=4096)
    policy, reference = PlainPolicy(model_dir, config), PlainPolicy(model_dir, config)
    reference.module.requires_grad_(False)
    updater = Updater(config, policy, reference, load_objective("agro", config.agro), 0, torch.device("cpu"))
    metrics = [updater.update(batch, LR)[0] for batch in random_batches(policy.module.config.vocab_size)]
    return {"parameters": dict(policy.module.named_parameters()), "metrics": metrics}


def run_ranks(model_dir: Path, out_dir: Path, num_ranks: int, layout: str) -> dict:
    """The scenario in `num_ranks` real processes over gloo."""
    config = config_for(str(model_dir), ranks=num_ranks, layout=layout)
    (out_dir / "config.json").write_text(config.model_dump_json())
    processes = [subprocess.Popen([sys.executable, str(SCENARIO), str(out_dir), str(rank)]) for rank in range(num_ranks)]
    assert [process.wait(timeout=240) for process in processes] == [0] * num_ranks
    return {"metrics": json.loads((out_dir / "metrics.json").read_text()), "dir": out_dir / "policy"}


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "layout"), [(1, "padded"), (2, "padded"), (2, "packed")])
def test_zero_ranks_give_the_parameters_of_a_plain_loop(
    num_ranks: int, layout: str, plain: dict, tiny_models: dict, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    result = run_ranks(tiny_models["untied"], tmp_path, num_ranks, layout)
    saved = dict(AutoModelForCausalLM.from_pretrained(result["dir"], dtype=torch.float32).named_parameters())
    start = dict(AutoModelForCausalLM.from_pretrained(tiny_models["untied"], dtype=torch.float32).named_parameters())
    assert saved.keys() == plain["parameters"].keys()
    for name, parameter in plain["parameters"].items():
        assert torch.allclose(saved[name], parameter, atol=TOLERANCE, rtol=0), (name, (saved[name] - parameter).abs().max())
    moved = max(float((saved[name] - start[name]).detach().abs().max()) for name in saved)
    assert moved > 100 * TOLERANCE  # The tolerance is small against what training changed.
    for mine, theirs in zip(result["metrics"], plain["metrics"], strict=True):
        for name in theirs:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), name


def test_a_batch_with_a_non_finite_log_prob_is_refused_before_the_parameters_change(tiny_models: dict[str, Path]) -> None:
    import msgspec

    from cluster.errors import TrainingError

    model_dir = str(tiny_models["tied"])
    config = config_for(model_dir)
    policy, reference = PlainPolicy(model_dir, config), PlainPolicy(model_dir, config)
    updater = Updater(config, policy, reference, load_objective("agro", config.agro), 0, torch.device("cpu"))
    batch = random_batches(policy.module.config.vocab_size)[0]
    bad = msgspec.structs.replace(batch.groups[0].samples[0], logprobs=(float("nan"),) * len(batch.groups[0].samples[0].token_ids))
    groups = (msgspec.structs.replace(batch.groups[0], samples=(bad, *batch.groups[0].samples[1:])), *batch.groups[1:])
    before = {name: parameter.clone() for name, parameter in policy.module.named_parameters()}
    with pytest.raises(TrainingError, match="group 0 "):
        updater.update(Batch(0, groups), LR)
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.module.named_parameters())
