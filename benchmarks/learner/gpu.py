"""What only a GPU can tell about the learner: the part `gpu` of benchmarks/learner/.

A Llama of `MODELS` from a config, bf16, at some tokens a micro-batch. Each case has a process of its own, and
with it a peak of its own:

    ours           ZeroPolicy and Updater on one rank: float32 master weights, log-probs by liger's kernel
    torch softmax  the same without the kernel
    whole logits   the same without the chunks
    plain loop     the shortest loop that trains the same: float32 weights, autocast, AdamW, whole logits

mfu: 6 x parameters x tokens/s over the GPU's dense bf16 peak; attention's products are left out.
peak_gib: what torch had of the card at most, from the first step on.
estimate_gib: what --dry-run says of the GPU's memory, for `ours`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

CASES = ("ours", "torch softmax", "whole logits", "plain loop")
BUDGETS_TOKENS = (2048, 8192)
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}
GIB = 2**30


class Model(NamedTuple):
    """Describes a Llama from a config, and how many groups a step trains on."""

    hidden: int = 2048
    mlp: int = 5632
    layers: int = 22
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32_000
    groups: int = 32
    dtype: str = "bfloat16"
    steps: int = 5
    tied: bool = False


MODELS = {
    "tiny": Model(hidden=64, mlp=128, layers=2, heads=2, kv_heads=1, vocabulary=100, groups=2, steps=1),
    "10M": Model(hidden=256, mlp=512, layers=4, heads=4, kv_heads=2, vocabulary=1000, groups=4),
    "0.5B": Model(hidden=1024, mlp=4096, layers=24, heads=16, kv_heads=8, vocabulary=64_000),
    "1.1B": Model(),
    "1.5B": Model(hidden=1536, mlp=8960, layers=28, heads=12, kv_heads=2, vocabulary=151_936, tied=True),
}
"""By what they are called; the last has the sizes of Qwen2.5's."""


def measure_gpu(
    name: str = "1.1B",
    budgets_tokens: Sequence[int] = BUDGETS_TOKENS,
    cases: Sequence[str] = CASES,
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Returns a row for each of the cases with the model of this name at each budget."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return [{"case": case, "result": "not measured (no GPU)"} for case in cases]
    rows: list[dict[str, Any]] = []
    for budget in budgets_tokens:
        for case in cases:
            command = [
                sys.executable,
                "-m",
                "benchmarks.learner",
                "gpu-case",
                case,
                str(budget),
                name,
                device,
            ]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:  # Whole logits may not fit: that is a result.
                said = ran.stderr.strip().splitlines() or ["no word"]
                rows.append({"case": case, "budget_tokens": budget, "result": said[-1][:200]})
            else:
                rows.append(json.loads(ran.stdout.splitlines()[-1]))
    plain = {row["budget_tokens"]: row.get("tokens_per_s") for row in rows if row["case"] == "plain loop"}
    for row in rows:
        if (speed := plain[row["budget_tokens"]]) and "tokens_per_s" in row:
            row["ratio"] = round(row["tokens_per_s"] / speed, 3)
    return rows


def measure_case(case: str, budget_tokens: int, name: str, device: str) -> dict[str, Any]:
    """Returns one row; on a CPU (to try it) without peak and MFU."""
    import torch

    from benchmarks.learner.cases import Shape, make_batch
    from cluster.preparation.memory import estimate_memory

    on_gpu, model = device != "cpu", MODELS[name]
    # So short that a group fits the smallest budget, and of prompts that hardly count: what samples share is
    # computed once, and a micro-batch would not hold the tokens that the estimate is of.
    lengths = [(8, 40 + 110 * number // 99) for number in range(100)]
    batch = make_batch(
        Shape("", model.hidden, model.layers, model.vocabulary, model.groups, budget_tokens, model.steps),
        lengths=lengths,
    )
    with tempfile.TemporaryDirectory() as model_dir:
        save_model(model, model_dir)
        config = make_config(model, model_dir, budget_tokens, on_gpu=on_gpu)
        estimate = sum(part.num_bytes for part in estimate_memory(config).learner if not part.on_host)
        step, num_parameters = make_step(case, config, device)
    if on_gpu:  # A model is loaded whole, and may have been made here.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(model.steps + 1):
        start_s = time.perf_counter()
        step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_s)
    tokens = sum(group.num_tokens for group in batch.groups)
    speed = tokens / min(seconds[1:])
    row: dict[str, Any] = {
        "case": case,
        "budget_tokens": budget_tokens,
        "parameters": num_parameters,
        "tokens_per_s": round(speed),
    }
    if on_gpu:
        peak = next(
            (tflops for name, tflops in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None
        )
        row["mfu"] = (
            round(6 * num_parameters * speed / (peak * 1e12), 3) if peak else "peak of this GPU unknown"
        )
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        if case == "ours":
            row["estimate_gib"] = round(estimate / GIB, 2)
    return row


def make_step(case: str, config: Any, device: str) -> tuple[Callable[[Any], Any], int]:
    """Returns the case's step on a batch, and how many parameters it trains."""
    import torch

    import learner.step.packing
    from benchmarks.learner.cases import free_port
    from benchmarks.learner.plain_loop import PlainLoop
    from learner.objectives import load_objective
    from learner.step import row_softmax
    from learner.step.share import Share
    from learner.step.update import Updater

    if case == "plain loop":
        loop = PlainLoop(config, device, autocast=config.model.dtype == "bfloat16")
        return loop.step, sum(parameter.numel() for parameter in loop.module.parameters())
    from learner.policy.zero import ZeroPolicy, init_process_group

    # Names in place of which the learner finds nothing: there is no setting that makes it slower.
    if case == "torch softmax":
        row_softmax.kernel_for = lambda logits_RV: None
    if case == "whole logits":
        learner.step.packing.install_logprob_head = lambda module: None
    init_process_group(0, 1, "127.0.0.1", free_port(), use_gpu=device != "cpu", timeout_s=120)
    policy = ZeroPolicy(config.model, config.learner)
    objective = load_objective(config.objective)
    updater = Updater(config, policy, objective, pad_id=0, device=torch.device(device))
    return (lambda batch: updater.update(Share.of(batch), config.learner.lr)), sum(
        parameter.ds_numel for parameter in policy.module.parameters()
    )


def save_model(model: Model, model_dir: str) -> None:
    """Saves a Llama of random weights as a Hugging Face directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=model.tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    # A CPU draws a billion numbers in ten seconds.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = LlamaForCausalLM(shape).to(getattr(torch, model.dtype))
    made.cpu().save_pretrained(model_dir)
    del made
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_config(model: Model, model_dir: str, budget_tokens: int, *, on_gpu: bool) -> Any:
    """Returns a run's config for this model and budget."""
    from learner.catalogue import parse_config

    return parse_config(
        {
            "model": {"path": model_dir, "dtype": model.dtype},
            "data": {"path": "unused", "max_prompt_tokens": 100},
            "rewards": {"functions": {"exact_match": 1.0}},
            "actors": {"max_new_tokens": 150, "temperature": 1.0},
            "learner": {
                "groups_per_step": model.groups,
                "micro_batch_tokens": budget_tokens,
                "num_gpus": float(on_gpu),
            },
            "objective": {"importance_weight": "none"},
            "checkpoint": {"every": 0},
        }
    )
