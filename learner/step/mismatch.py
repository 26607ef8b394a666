"""The test that the learner computes what the actors sampled from: both their log-probs of the same tokens
under the same weights.

    d = log pi - log mu        pi by the learner (transformers), mu by the actors (vLLM): 0 but for rounding
    k1 = mean(-d),  k3 = mean(exp(d) - 1 - d)        both estimate KL(mu, pi), since mu drew the tokens

Compared are the samples of staleness 0, all of whose tokens were sampled by exactly the version that the
learner has now; mixed, stale and offline samples say nothing. On the first of them a run stops, before its
policy is updated, when the mean |d| is above the bound of its dtype; later that is an alarm
(learner/step/guards.py). With `actors.top_p` below 1 mu is renormalised over what the cut leaves, at least
top_p of the mass, which the learner does not repeat: -d may lie anywhere from 0 to -log top_p, and only what
lies outside is a mismatch.

A run that goes on from a checkpoint may meet samples of a version number that it has yet to reach: they are
of the life before, which need not have had the same weights under it. They are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.config import Config
from core.config.checks import longest_sequence
from core.errors import TrainingError
from core.model_shape import rope_parameters
from learner.step.samples import SampleArrays

BOUNDS_NATS = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Mean |d| up to which actors and learner count as one function, by model.dtype."""
FAR_NATS = 0.1
NUM_ERRORS, FAR_FACTOR = 3.0, 10.0
"""A mean of few tokens scatters: it is above the bound when it is by so many standard errors, or so
many times as large.
"""
MIN_TOKENS = 32
"""Fewer do not show that actors and learner agree: the next fresh samples are looked at, too."""
_MAX_EXPONENT = 80.0


class Mismatch(NamedTuple):
    """How far log-probs of actors and learner are apart on the fresh samples of one learner step, over all
    ranks; nats a token.
    """

    num_tokens: int
    mean: float
    standard_error: float
    max: float
    share_above: float
    k1: float
    k3: float

    def metrics(self) -> dict[str, float]:
        """Returns the numbers by their names in metrics.jsonl."""
        return {
            "mismatch/tokens": float(self.num_tokens),
            "mismatch/mean": self.mean,
            "mismatch/standard_error": self.standard_error,
            "mismatch/max": self.max,
            f"mismatch/share_above_{FAR_NATS}": self.share_above,
            "mismatch/k1": self.k1,
            "mismatch/k3": self.k3,
        }


class Sums(NamedTuple):
    """What one rank contributes to a Mismatch.

    `excess`, `squares` and `max` are the sum, sum of squares and maximum of what |d| is too much, `num_far`
    the tokens beyond FAR_NATS; `k1` and `k3` are sums for the two estimates.
    """

    num_tokens: int = 0
    excess: float = 0.0
    squares: float = 0.0
    max: float = 0.0
    num_far: int = 0
    k1: float = 0.0
    k3: float = 0.0


def bound_nats(config: Config) -> float:
    """Returns the mean |d| up to which a run goes on.

    Adapters merged in half precision round the weights once more: twice as much. A temperature below 1
    enlarges what logits differ by.
    """
    is_rounded = (
        config.learner.lora_rank > 0
        and config.weights.transport != "adapters"
        and config.model.dtype != "float32"
    )
    factor = 2.0 if is_rounded else 1.0
    return factor * BOUNDS_NATS[config.model.dtype] / min(1.0, config.actors.temperature)


def is_above(mean: float, standard_error: float, bound: float) -> bool:
    """Says whether a mean is more than rounding (NUM_ERRORS, FAR_FACTOR). What is not a number is."""
    return not (mean - NUM_ERRORS * standard_error <= bound and mean <= FAR_FACTOR * bound)


class MismatchCheck:
    """Compares the fresh samples of every step, and stops the run at the first that differ. The same on every
    rank.

        parts = ranks.gather(check.sums(samples, logprobs_T, step))
        metrics = check.judge(step, parts)
    """

    def __init__(
        self,
        config: Config,
        model_config: Any,
        *,
        start_step: int = 0,
        known_until: int = 0,
        tell: Callable[[str], Any] = lambda _: None,
    ) -> None:
        """`model_config` is the Hugging Face config, `start_step` where this learner starts.

        `known_until` is the newest version that an earlier life of the run may have had. `tell` is given,
        once, how near actors and learner are.
        """
        self._config, self._model_config, self._tell = config, model_config, tell
        self._start_step, self._known_until = start_step, known_until
        self._bound, self._is_passed = bound_nats(config), False

    def fresh(self, samples: SampleArrays, step: int) -> Tensor:
        """Returns [N] bool: whether all tokens of a sample are of the weights that the learner has at this
        step.
        """
        return samples.is_fresh_N & (step == self._start_step or step > self._known_until)

    def any_fresh(self, samples: SampleArrays, step: int) -> bool:
        """Says whether there is anything to compare."""
        return bool((self.fresh(samples, step) & (samples.sizes_N > 0)).any())

    def sums(
        self, samples: SampleArrays, logprobs_T: Tensor, step: int, is_sound_N: Tensor | None = None
    ) -> Sums:
        """Returns what this rank contributes, once it has the policy's log-probs of its samples.

        Samples that are not sound, having a number that is not finite, are left to the guard of those.
        """
        chosen_N = self.fresh(samples, step)
        if is_sound_N is not None:
            chosen_N = chosen_N & is_sound_N
        chosen_T = chosen_N[samples.sequence_T]
        if not bool(chosen_T.any()):
            return Sums()
        d_T = (logprobs_T.double() - samples.behaviour_logprobs_T.double())[chosen_T].cpu()
        excess_T = torch.maximum(d_T, -d_T + math.log(self._config.actors.top_p)).clamp_min(0.0)
        return Sums(
            num_tokens=len(d_T),
            excess=float(excess_T.sum()),
            squares=float(excess_T.square().sum()),
            max=float(excess_T.max()),
            num_far=int((excess_T > FAR_NATS).sum()),
            k1=float(-d_T.sum()),
            k3=float((d_T.clamp_max(_MAX_EXPONENT).exp() - 1 - d_T).sum()),
        )

    def judge(self, step: int, parts: Iterable[Sums]) -> dict[str, float]:
        """Returns the metrics of a step from the `sums` of all ranks; none where nothing was fresh.

        Raises TrainingError with the numbers, the likely cause and what to set, unless fresh samples have
        agreed before.
        """
        found = combined(parts)
        if found is None:
            return {}
        if not self._is_passed and is_above(found.mean, found.standard_error, self._bound):
            raise TrainingError(self._explained(step, found))
        if not self._is_passed and found.num_tokens >= MIN_TOKENS and found.mean <= self._bound:
            self._is_passed = True
            self._tell(
                f"actors and learner agree at learner step {step}: log-probs of {found.num_tokens} fresh "
                "tokens "
                f"differ by {found.mean:.2g} nats on average, at most {found.max:.2g} "
                f"(bound of the mean for {self._config.model.dtype}: {self._bound:g})"
            )
        return found.metrics()

    def _explained(self, step: int, found: Mismatch) -> str:
        architecture = (getattr(self._model_config, "architectures", None) or ["no architecture named"])[0]
        return (
            f"the actors do not sample from what the learner computes: log-probs of {found.num_tokens} "
            f"tokens of version {step}, the "
            f"learner's own, differ by {found.mean:.3g} nats a token on average (bound {self._bound:g} for "
            f"{self._config.model.dtype}), at "
            f"most {found.max:.3g}, by more than {FAR_NATS} for {found.share_above:.1%}. Step {step} was not "
            "done.\n"
            f"Likely for {self._model_config.model_type} ({architecture}): "
            f"{'; or '.join(likely_causes(self._config, self._model_config))}."
        )


def combined(parts: Iterable[Sums]) -> Mismatch | None:
    """Combines what all ranks contribute; None where there is no token."""
    known = [part for part in parts if part.num_tokens]
    if not known:
        return None
    count = sum(part.num_tokens for part in known)
    mean = math.fsum(part.excess for part in known) / count
    variance = max(0.0, math.fsum(part.squares for part in known) / count - mean**2)
    return Mismatch(
        num_tokens=count,
        mean=mean,
        standard_error=math.sqrt(variance / count),
        max=max(part.max for part in known),
        share_above=sum(part.num_far for part in known) / count,
        k1=math.fsum(part.k1 for part in known) / count,
        k3=math.fsum(part.k3 for part in known) / count,
    )


def likely_causes(config: Config, model_config: Any) -> list[str]:
    """Says why vLLM may compute another function of the weights than transformers: a clause each with what to
    set, the likeliest first.
    """
    text = model_config.get_text_config()
    longest = config.max_sequence_tokens
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    ropes = {rope.get("rope_type", "default") for rope in rope_parameters(model_config)} - {"default"}
    experts = any(
        getattr(text, name, None)
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    )
    causes = {
        "its experts, which vLLM keeps in an order and a packing of its own: use a model without "
        "experts": experts,
        "its own code (model.trust_remote_code): use an implementation of "
        "transformers": config.model.trust_remote_code,
        "its attention's caps or sinks: set model.attention=eager": config.model.attention != "eager"
        and any(getattr(text, name, None) for name in ("attn_logit_softcapping", "logits_soft_cap", "sinks")),
        f"its attention's window of {window} tokens: keep {longest_sequence(config)} = "
        f"{longest} within it": window and longest > window,
        f"its rotary embedding ({', '.join(sorted(ropes))}): use a model with rope_type default": bool(ropes),
        "adapters that vLLM applies otherwise: set weights.transport=snapshot": config.weights.transport
        == "adapters",
        f"rounding in {config.model.dtype}: set model.dtype=float32 to see": config.model.dtype != "float32",
    }
    found = [cause for cause, applies in causes.items() if applies]
    return found or [
        "weights that vLLM loaded otherwise than transformers: compare the two on model.path, "
        "and try model.attention=eager"
    ]
