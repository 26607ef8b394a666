"""The cases of benchmarks/gpu/: `python -m benchmarks.gpu.checks NAME [--on-cpu]` prints one line of JSON."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.learner.gpu import Model, measure_case, measure_gpu, save_model

SMALL = Model(hidden=256, mlp=512, layers=4, heads=4, kv_heads=2, vocabulary=1000, groups=4)
HALF_B = Model(hidden=1024, mlp=4096, layers=24, heads=16, kv_heads=8, vocabulary=64_000)
TINY = Model(hidden=64, mlp=128, layers=2, heads=2, kv_heads=1, vocabulary=100, groups=2, steps=1)
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.15}
"""Of a token's log-prob between engine and transformers, at most."""
PROMPT = tuple(3 + place * place % 90 for place in range(40))


def _engine(model: Model, directory: str, *, on_gpu: bool, slots: int, max_new_tokens: int) -> Any:
    """Makes an engine of random weights, whose tokenizer is that of the quickstart."""
    from actors.engine import Engine
    from core.config import ActorsConfig, ModelConfig
    from recipes.arithmetic import make_tokenizer

    save_model(model, directory)
    make_tokenizer().save_pretrained(directory)
    config = ActorsConfig(slots=slots, max_new_tokens=max_new_tokens, num_gpus=int(on_gpu), engine_memory=0.3)
    return Engine(
        ModelConfig.model_validate({"path": directory, "dtype": model.dtype}),
        config,
        max_model_len=len(PROMPT) + max_new_tokens,
    )


def _changed(directory: str, dtype: torch.dtype) -> tuple[Any, list[tuple[str, torch.Tensor]]]:
    """Returns transformers' model of the directory, and other weights for it."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    noise = torch.Generator().manual_seed(1)
    scale = {name: tensor.float().std() for name, tensor in module.state_dict().items()}
    return module, [
        (name, (tensor + scale[name] * torch.randn(tensor.shape, generator=noise)).to(tensor.dtype))
        for name, tensor in module.state_dict().items()
    ]


@torch.no_grad()
def span_errors_nats(
    modules: Mapping[int, Any], prompt: Sequence[int], generation: Any
) -> list[torch.Tensor]:
    """Returns by how much the tokens' log-probs differ, span by span, from those of transformers' model of
    the span's version, `modules[version]`, over the keys and values that the spans before have left.
    """
    said = generation.tokens.numpy().tolist()
    device = next(iter(modules.values())).device
    fed = torch.tensor([[*prompt, *said]], device=device)
    errors, keys_and_values, begin = [], None, 0
    for span in generation.version_spans:
        end = len(prompt) + span.end - 1  # The last token of a span is read by the weights of the next.
        out = modules[span.version](fed[:, begin:end], past_key_values=keys_and_values, use_cache=True)
        keys_and_values, begin = out.past_key_values, end
        own = slice(span.start, span.end)
        expected = out.logits[0, -(span.end - span.start) :].float().log_softmax(-1).cpu()
        expected = expected[torch.arange(span.end - span.start), said[own]]
        errors.append((expected - torch.tensor(generation.logprobs.numpy()[own])).abs())
    return errors


def judge_flying(
    modules: Mapping[int, Any], prompt: Sequence[int], generations: Sequence[Any]
) -> dict[str, float]:
    """Says how far what was sampled through an update from version 0 to 1 is, at most, from the weights that
    its labels name, and how far, in the mean, the first tokens labelled 1 are from the old ones: of a pass
    that the update did not wait for they are made with these.
    """
    worst, from_old = 0.0, []
    for generation in generations:
        errors = span_errors_nats(modules, prompt, generation)
        worst = max(worst, *(float(error.max()) for error in errors))
        if len(errors) > 1:
            as_old = span_errors_nats({0: modules[0], 1: modules[0]}, prompt, generation)
            from_old.append(float(as_old[1][0]))
    return {"worst_nats": worst, "from_old_nats": sum(from_old) / max(len(from_old), 1)}


def check_engine(dtype: str, *, on_gpu: bool) -> dict[str, Any]:
    """Compares an engine's log-probs with transformers', of what was sampled through an update in flight,
    before and after it, and of what is sampled afresh.
    """
    with tempfile.TemporaryDirectory() as directory:
        model = SMALL._replace(dtype=dtype)
        engine = _engine(model, directory, on_gpu=on_gpu, slots=8, max_new_tokens=24)
        module, other = _changed(directory, getattr(torch, dtype))
        modules = {0: module, 1: copy.deepcopy(module)}
        modules[1].load_state_dict(dict(other))
        for each in modules.values():
            each.to("cuda" if on_gpu else "cpu")
        for number in range(8):
            engine.submit(f"flying-{number}", PROMPT, seed=number)
        flying = [generation for _ in range(6) for _, generation in engine.step()]
        # Without a pass under way there is nothing that the update could meet.
        passes = engine._engine.engine_core.engine_core.batch_queue or ()
        under_way = sum(scheduled.total_num_scheduled_tokens for _, scheduled, *_ in passes)
        engine.load_weights(1, other)
        while engine.num_unfinished:
            flying += [generation for _, generation in engine.step()]
        found = judge_flying(modules, PROMPT, flying)
        labels = {generation.version_spans[0].version for generation in flying}
        for number in range(8):
            engine.submit(f"fresh-{number}", PROMPT, seed=number)
        fresh = []
        while engine.num_unfinished:
            fresh += [generation for _, generation in engine.step()]
        after = max(float(span_errors_nats(modules, PROMPT, generation)[0].max()) for generation in fresh)
    ok = labels == {0} and max(found["worst_nats"], after) < TOLERANCE_NATS[dtype] < found["from_old_nats"]
    return {"ok": ok, **found, "fresh_nats": after, "first_versions": sorted(labels), "under_way": under_way}


def check_attention(*, on_gpu: bool) -> dict[str, Any]:
    """Compares flash attention with attention in buckets, with grouped heads, a window and shared tokens."""
    from learner.policy import attention

    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    rows = [torch.randn(1, heads, 1400, 64, device=device, dtype=dtype) for heads in (8, 2, 2)]
    layer = torch.nn.Module()
    layer.num_key_value_groups = 4  # type: ignore[assignment]
    worst = 0.0
    # Two sequences that begin with the same 400 tokens, which the row holds once.
    shared = np.concatenate([np.arange(900), np.arange(400), np.arange(900, 1200)])
    packings = (([900, 300, 200], None), ([900, 700], shared))
    for window, (lengths, tokens) in itertools.product((None, 100), packings):
        found: list[list[torch.Tensor]] = []
        for has_kernel in (attention.has_kernel, lambda *rows: False):
            held, attention.has_kernel = attention.has_kernel, has_kernel
            num_places = sum(lengths) if tokens is None else int(tokens.max()) + 1
            given = [row[:, :, :num_places].detach().clone().requires_grad_() for row in rows]
            packing = attention.Packing(lengths, device, tokens)
            out, _ = attention.packed_sdpa(
                layer, given[0], given[1], given[2], None, packing=packing, sliding_window=window
            )
            (out.float() ** 2).sum().backward()
            found.append([out.detach(), *(row.grad for row in given if row.grad is not None)])
            attention.has_kernel = held
        for one, other in zip(*found, strict=True):
            worst = max(worst, float((one - other).float().norm() / other.float().norm()))
    return {"ok": worst < 0.02, "relative": worst, "has_kernel": attention.has_kernel(*rows)}


def check_row_softmax(*, on_gpu: bool) -> dict[str, Any]:
    """Compares liger's kernel with torch."""
    from learner.step.row_softmax import TOLERANCE, compare, kernel_for

    logits = torch.randn(4, 1000, device="cuda" if on_gpu else "cpu")
    kernel = kernel_for(logits)
    if kernel is None:
        return {"ok": not on_gpu, "found": "torch computes the log-probs"}
    difference = compare(kernel, logits.device)
    return {"ok": difference <= TOLERANCE, "difference": difference}


def check_memory(*, on_gpu: bool) -> dict[str, Any]:
    """Compares a step's peak with the estimate."""
    if not on_gpu:
        return {"ok": True, **measure_case("ours", 400, TINY, "cpu")}
    row = measure_case("ours", 8192)
    return {"ok": abs(row["estimate_gib"] / row["peak_gib"] - 1) <= 0.15, **row}


def check_offload(*, on_gpu: bool) -> dict[str, Any]:
    """Compares the loss of a step with everything in CPU memory with that of one without."""
    from benchmarks.learner.cases import Shape, free_port, make_batch
    from benchmarks.learner.gpu import make_config
    from learner.objectives import load_objective
    from learner.policy.zero import ZeroPolicy, init_process_group
    from learner.step.share import Share
    from learner.step.update import Updater

    model, device = (SMALL, "cuda") if on_gpu else (TINY, "cpu")
    shape = Shape("", model.hidden, model.layers, model.vocabulary, model.groups, 2048, 1)
    batch = make_batch(shape, lengths=[(40, 60)] * 8)
    init_process_group(0, 1, "127.0.0.1", free_port(), use_gpu=on_gpu, timeout_s=120)
    norms = []
    with tempfile.TemporaryDirectory() as directory:
        save_model(model, directory)
        config = make_config(model, directory, 2048, on_gpu=on_gpu)
        for offload in ("none", "all"):
            learner = config.learner.model_copy(update={"offload": offload})
            policy = ZeroPolicy(config.model, learner)
            updater = Updater(
                config, policy, load_objective(config.objective), pad_id=0, device=torch.device(device)
            )
            result = updater.update(Share.of(batch), config.learner.lr)
            norms.append(result.metrics()["optim/grad_norm"])
    return {"ok": abs(norms[0] - norms[1]) <= 0.02 * max(norms), "grad_norms": norms}


def check_run(transport: str, *, on_gpu: bool) -> dict[str, Any]:
    """Trains the quickstart for a few steps with everything on the card, or one card each."""
    shares = {
        "snapshot": "actors.num_gpus=0.25 actors.engine_memory=0.2 learner.num_gpus=0.4",
        "ipc": "actors.count=1 actors.num_gpus=0.4 actors.engine_memory=0.3 learner.num_gpus=0.4 weights.transport=ipc",
        "nccl": "actors.count=1 actors.num_gpus=1 learner.num_gpus=1 weights.transport=nccl",
    }
    settings = shares[transport].split() if on_gpu else []
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        command = [sys.executable, "launch.py", "train", "configs/quickstart.yaml", "run.steps=20"]
        ran = subprocess.run(
            [*command, f"run.dir={run_dir}", *settings], capture_output=True, text=True, check=False
        )
        words = (ran.stderr or ran.stdout).strip().splitlines() or [""]
        return {"ok": ran.returncode == 0, "found": "" if ran.returncode == 0 else words[-1][:300]}


def measure_actor(*, on_gpu: bool) -> dict[str, Any]:
    """Measures an engine's tokens/s and those of vLLM's own loop over the same engine, in turns."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    model, slots, length = (HALF_B, 256, 256) if on_gpu else (TINY._replace(dtype="float32"), 8, 16)
    speeds: dict[str, list[float]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory() as directory:
        engine = _engine(model, directory, on_gpu=on_gpu, slots=slots, max_new_tokens=length)
        bare = engine._engine
        for turn in range(4):
            start_s = time.perf_counter()
            for number in range(slots):
                engine.submit(f"{turn}-{number}", PROMPT, seed=number)
            tokens = 0
            while engine.num_unfinished:
                tokens += sum(len(generation.tokens) for _, generation in engine.step())
            speeds["ours"].append(tokens / (time.perf_counter() - start_s))
            params = SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False)
            start_s = time.perf_counter()
            for number in range(slots):
                bare.add_request(f"bare-{turn}-{number}", TokensPrompt(prompt_token_ids=[*PROMPT]), params)
            while bare.has_unfinished_requests():
                bare.step()
            speeds["bare"].append(slots * length / (time.perf_counter() - start_s))
    ours, plain = (sorted(values[1:])[1] for values in speeds.values())  # The first turn warms up.
    return {"ok": True, "tokens_per_s": round(ours), "bare": round(plain), "ratio": round(ours / plain, 3)}


def measure_update(*, on_gpu: bool) -> dict[str, Any]:
    """Measures the pause of updates while all slots generate."""
    model, slots = (HALF_B, 256) if on_gpu else (TINY._replace(dtype="float32"), 8)
    pauses = []
    with tempfile.TemporaryDirectory() as directory:
        engine = _engine(model, directory, on_gpu=on_gpu, slots=slots, max_new_tokens=128)
        _, other = _changed(directory, getattr(torch, model.dtype))
        for number in range(slots):
            engine.submit(f"{number}", PROMPT, seed=number)
        for version in range(1, 6):
            engine.step()
            start_s = time.perf_counter()
            engine.load_weights(version, other)
            pauses.append(round(time.perf_counter() - start_s, 4))
    return {"ok": True, "pause_s": sorted(pauses)[2], "pauses_s": pauses}


def main() -> None:
    """Runs the case that the command line names."""
    name, on_gpu = sys.argv[1], "--on-cpu" not in sys.argv
    kind, _, detail = name.partition("-")
    found: dict[str, Any]
    if kind == "engine":
        found = check_engine(detail, on_gpu=on_gpu)
    elif kind == "run":
        found = check_run(detail, on_gpu=on_gpu)
    elif name == "learner":
        found = {"ok": True, "rows": measure_gpu()}
    else:
        cases = {
            "attention": check_attention,
            "row-softmax": check_row_softmax,
            "memory": check_memory,
            "offload": check_offload,
            "actor": measure_actor,
            "update": measure_update,
        }
        found = cases[name](on_gpu=on_gpu)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
