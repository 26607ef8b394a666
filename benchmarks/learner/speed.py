"""Trained tokens a second against a plain PyTorch loop: the part `speed` of benchmarks/learner/."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.learner.cases import SHAPES, Shape, config_of, free_port, make_batch, make_model
from benchmarks.learner.plain_loop import PlainLoop
from benchmarks.pairs import compare, interleave, timed


def make_plain_policy(config: Any, device: str) -> Any:
    """Returns a policy with ZeroPolicy's way to log-probs, without DeepSpeed."""
    from benchmarks.studies.lag_lab import PlainPolicy
    from learner.step.packing import TokenLogprobs

    class Policy(PlainPolicy):
        shares_beginnings = True

        def logprobs(self, inputs: Any, temperature: float) -> Any:
            return token_logprobs(self.module, inputs, temperature)

    policy = Policy(config, trained=True)
    policy.module.to(device)
    token_logprobs = TokenLogprobs(policy.module, config.learner.layout, config.model.attention)
    return policy


def measure_speed(device: str, shapes: Sequence[Shape] = SHAPES) -> list[dict[str, Any]]:
    """Measures ours and the plain loop, step by step in turn."""
    import torch

    from learner.policy.zero import init_process_group

    own_linear = torch.nn.functional.linear
    init_process_group(0, 1, "127.0.0.1", free_port(), use_gpu=device != "cpu", timeout_s=120)
    return [measure_shape(shape, device, own_linear) for shape in shapes]


def measure_shape(shape: Shape, device: str, own_linear: Callable) -> dict[str, Any]:
    """Returns one row of `measure_speed`."""
    import torch

    from learner.objectives import load_objective
    from learner.policy.zero import ZeroPolicy
    from learner.step.share import Share
    from learner.step.update import Updater

    with tempfile.TemporaryDirectory() as model_dir:
        make_model(shape).save_pretrained(model_dir)
        config = config_of(shape, model_dir, device)
        objective = load_objective(config.objective)
        zero = Updater(
            config,
            ZeroPolicy(config.model, config.learner),
            objective,
            pad_id=0,
            device=torch.device(device),
        )
        bare = Updater(
            config, make_plain_policy(config, device), objective, pad_id=0, device=torch.device(device)
        )
        loop = PlainLoop(config, device)
    # DeepSpeed replaces it for the whole process.
    batch, zero_linear = make_batch(shape), torch.nn.functional.linear
    share = Share.of(batch)

    def plain(step: Callable[[], Any]) -> None:
        torch.nn.functional.linear = own_linear
        step()
        torch.nn.functional.linear = zero_linear

    calls = {
        "ours": clocked(lambda: zero.update(share, config.learner.lr), device),
        "bare": clocked(lambda: plain(lambda: bare.update(share, config.learner.lr)), device),
        "loop": clocked(lambda: plain(lambda: loop.step(batch)), device),
    }
    steps_s = interleave(calls, shape.rounds, warm_rounds=1)
    tokens = sum(group.num_tokens for group in batch.groups)
    return {
        "case": shape.name,
        "parameters": sum(parameter.numel() for parameter in loop.module.parameters()),
        "tokens_per_step": tokens,
        "tokens_per_s": tokens / statistics.median(steps_s["ours"]),
        "without_deepspeed": tokens / statistics.median(steps_s["bare"]),
        "plain_loop": tokens / statistics.median(steps_s["loop"]),
        **compare(steps_s["loop"], steps_s["ours"]).fields("of_plain"),
        "of_plain_without_deepspeed": compare(steps_s["loop"], steps_s["bare"]).median,
    }


def clocked(call: Callable[[], Any], device: str) -> Callable[[], float]:
    """Returns a call that gives the seconds that `call` takes: CPU seconds of this process, or a GPU's."""
    if device == "cpu":
        return timed(call, time.process_time)
    import torch

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    return timed(finished)
