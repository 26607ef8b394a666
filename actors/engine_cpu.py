"""What vLLM's CPU engine is given when it is built: where it computes another function than its GPU code and
the learner, and where it spends more on a token than the token is worth.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SEED = "agro_seed"
"""The seed of a request, among the `extra_args` of its SamplingParams: vLLM's own is a generator each."""
SMALL_WEIGHTS = 2**20
"""A linear layer of so many weights, or fewer, is torch's own: see `keep_small_linears`."""


def keep_small_linears() -> None:
    """Lets small float32 layers be computed by torch in place of oneDNN, in this process, for engines that
    are built from now on.

    vLLM packs a layer anew with every update, and then oneDNN makes itself a plan for each number of tokens
    that it has not met since: 0.3 to 1.1 ms each, where 600 tokens times 96 x 288 weights take 0.2.
    """
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    if hasattr(pack, "__wrapped__"):
        return

    @functools.wraps(pack)
    def dispatch(layer: Any, remove_weight: bool) -> None:
        weight = layer.weight
        is_small = weight.ndim == 2 and weight.numel() <= SMALL_WEIGHTS and not weight.is_meta
        # Not a head, whose weights an embedding needs too: it is asked for as many tokens as there are slots.
        if is_small and remove_weight and weight.dtype == torch.float32:
            layer.cpu_linear = torch.nn.functional.linear
        else:
            pack(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch


def mend(runner: Any) -> None:
    """Mends vLLM's CPU model runner and the model that it has loaded, once."""
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    for layer in runner.model.modules():
        # vLLM's own makes a tensor too many. (Its kernel for RMSNorm, quicker by far, is too far from the
        # learner's: up to 1.2e-4 nats with adapters.)
        if type(layer) is SiluAndMul:
            layer._forward_method = silu_and_mul
        # The kernel for rotary embeddings of interleaved pairs takes the heads of a [tokens, heads, size]
        # query for one (DeepSeek).
        if getattr(layer, "is_neox_style", True) is False and hasattr(layer, "_forward_method"):
            layer._forward_method = layer.forward_native
        # The router knows corrections of the scores, and sigmoids, only in groups of experts: all experts are
        # one group then (Ernie 4.5, MiniMax).
        router = getattr(layer, "router", None)
        if isinstance(router, CPURouter) and not router.use_grouped_topk:
            is_corrected = router.e_score_correction_bias is not None and router.scoring_func == "softmax"
            if is_corrected or router.scoring_func == "sigmoid":
                router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1
    runner.sampler.topk_topp_sampler.forward = SeededSampler(runner)


def silu_and_mul(gate_and_up: torch.Tensor) -> torch.Tensor:
    """Returns silu(gate) * up, [N, D] of [N, 2 D], with one tensor less than vLLM's own; bit for bit the
    same.
    """
    size = gate_and_up.shape[-1] // 2
    return torch.nn.functional.silu(gate_and_up[..., :size]).mul_(gate_and_up[..., size:])


class SeededSampler:
    """Draws the next token of every row at once. What is drawn is a function of the request's seed and of how
    many tokens are before, as in the model runner that vLLM has for GPUs (its second).

    vLLM's CPU sampler seeds the noise of a row by a draw from the generator of its request: a Python loop, a
    tenth of the time of a short answer, and a generator that cannot go back where a prompt comes in pieces.
    """

    def __init__(self, runner: Any) -> None:
        """Takes over from the sampler of `runner`, with its logprobs mode `processed_logprobs`."""
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        self._runner, self._cut = runner, apply_top_k_top_p

    def __call__(
        self, logits: torch.Tensor, generators: object, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the tokens drawn, [N], and the log-probs that they are drawn by, [N, V]. The logits may be
        changed.
        """
        logits = self._cut(logits, k, p)
        batch, requests = self._runner.input_batch, self._runner.requests
        arguments = [requests[request_id].sampling_params.extra_args for request_id in batch.req_ids]
        drawn = torch.randint(0, 2**31, (len(arguments),)).tolist()
        seeds = [given[SEED] if given else other for given, other in zip(arguments, drawn, strict=True)]
        noise = mixed(np.array(seeds, np.uint64), batch.num_tokens_no_spec[: len(seeds)].astype(np.uint64))
        tokens: torch.Tensor = torch.ops._C.fused_gumbel_argmax(logits, torch.from_numpy(noise))
        return tokens, logits.log_softmax(dim=-1, dtype=torch.float32)


def mixed(seeds: npt.NDArray[np.uint64], places: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Returns a seed of 63 bits for each pair of a request's seed and a place in it, [N]: those of neighbours
    have nothing to do with one another.

    Each of the two goes through the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    found: npt.NDArray[np.int64] = (_scrambled(_scrambled(seeds) + places) >> np.uint64(1)).astype(np.int64)
    return found


def _scrambled(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
