"""What only a GPU can show: the cases of `make test-gpu`, each of which returns what it found, and whether
that is `ok`.
"""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.cases import SAID_LINES
from benchmarks.gpu.engines import (
    ADAPTERS,
    PROMPT,
    adapted,
    adapters_alone,
    changed,
    finished,
    load_module,
    make_engine,
    tokens_under_way,
)
from benchmarks.learner.gpu import MODELS, measure_case, save_model

TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.15}
"""Of a token's log-prob between engine and transformers, at most."""
SLOTS, NEW_TOKENS = 8, 24
STEPS_BEFORE = 5
"""Before an update: after an odd number a pass is under way, also where a CPU does as if."""


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


def check_engine(dtype: str, parallel: int = 1, *, on_gpu: bool) -> dict[str, Any]:
    """Compares an engine's log-probs with transformers', of what was sampled through an update in flight,
    before and after it, and of what is sampled afresh. Its model may be divided among GPUs.
    """
    with tempfile.TemporaryDirectory() as directory:
        model = MODELS["10M"]._replace(dtype=dtype)
        engine = make_engine(
            model, directory, on_gpu=on_gpu, slots=SLOTS, max_new_tokens=NEW_TOKENS, parallel=parallel
        )
        module = load_module(directory, dtype)
        modules = {0: module, 1: copy.deepcopy(module)}
        other = changed(module)
        modules[1].load_state_dict(dict(other))
        return _through_an_update(engine, modules, other, TOLERANCE_NATS[dtype], on_gpu=on_gpu)


def check_adapters(*, on_gpu: bool) -> dict[str, Any]:
    """Compares the same of an engine that gets adapters alone; vLLM's kernels for them take 16 bits."""
    dtype = "bfloat16" if on_gpu else "float32"
    with tempfile.TemporaryDirectory() as directory:
        model = MODELS["10M"]._replace(dtype=dtype)
        engine = make_engine(
            model, directory, on_gpu=on_gpu, slots=SLOTS, max_new_tokens=NEW_TOKENS, adapters=ADAPTERS
        )
        modules = {version: adapted(directory, dtype, version) for version in (0, 1)}
        engine.load_weights(0, adapters_alone(modules[0]))
        other = adapters_alone(modules[1])
        return _through_an_update(engine, modules, other, TOLERANCE_NATS[dtype], on_gpu=on_gpu)


def _through_an_update(
    engine: Any,
    modules: Mapping[int, Any],
    other: Sequence[tuple[str, torch.Tensor]],
    tolerance_nats: float,
    *,
    on_gpu: bool,
) -> dict[str, Any]:
    """Takes an engine of `modules[0]` to `other`, the weights of `modules[1]`, while all its slots are busy.

    Without a pass under way there would be nothing that the update could meet: that is no proof.
    """
    for number in range(SLOTS):
        engine.submit(f"flying-{number}", PROMPT, seed=number)
    flying = [generation for _ in range(STEPS_BEFORE) for _, generation in engine.step()]
    under_way = tokens_under_way(engine)
    engine.load_weights(1, other)
    flying += finished(engine)
    for module in modules.values():
        module.to("cuda" if on_gpu else "cpu")
    found = judge_flying(modules, PROMPT, flying)
    labels = {generation.version_spans[0].version for generation in flying}
    for number in range(SLOTS):
        engine.submit(f"fresh-{number}", PROMPT, seed=number)
    after = max(
        float(span_errors_nats(modules, PROMPT, generation)[0].max()) for generation in finished(engine)
    )
    # Tokens of the old weights with a new label must stand out.
    agrees = max(found["worst_nats"], after) < min(tolerance_nats, found["from_old_nats"] / 2)
    return {
        "ok": agrees and labels == {0} and under_way > 0,
        **found,
        "fresh_nats": after,
        "first_versions": sorted(labels),
        "under_way": under_way,
    }


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
    asked = attention.has_kernel(*rows)
    return {"ok": worst < 0.02 and asked == on_gpu, "relative": worst, "has_kernel": asked}


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
        return {"ok": True, **measure_case("ours", 400, "tiny", "cpu")}
    row = measure_case("ours", 8192, "1.1B", "cuda")
    return {"ok": abs(row["estimate_gib"] / row["peak_gib"] - 1) <= 0.15, **row}


def check_offload(*, on_gpu: bool) -> dict[str, Any]:
    """Compares the loss of a step with everything in CPU memory with that of one without."""
    from benchmarks.learner.cases import Shape, free_port, make_batch
    from benchmarks.learner.gpu import make_config
    from learner.objectives import load_objective
    from learner.policy.zero import ZeroPolicy, init_process_group
    from learner.step.share import Share
    from learner.step.update import Updater

    model, device = (MODELS["10M"], "cuda") if on_gpu else (MODELS["tiny"], "cpu")
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


RUNS = {
    "snapshot": ("actors.num_gpus=0.25 actors.engine_memory=0.2 learner.num_gpus=0.4", ""),
    "adapters": (
        "actors.num_gpus=0.25 actors.engine_memory=0.2 learner.num_gpus=0.4 model.dtype=bfloat16",
        "learner.lora_rank=8 weights.transport=adapters",
    ),
    "ipc": (
        "actors.count=1 actors.num_gpus=0.4 actors.engine_memory=0.3 learner.num_gpus=0.4 weights.transport=ipc",
        "",
    ),
    "nccl": ("actors.count=1 actors.num_gpus=1 learner.num_gpus=1 weights.transport=nccl", ""),
}
"""By case: what is set on a GPU alone, and what is set everywhere."""


def check_run(transport: str, *, on_gpu: bool) -> dict[str, Any]:
    """Trains the quickstart for a few steps with everything on the card, or one card each."""
    on_card, everywhere = RUNS[transport]
    settings = [*everywhere.split(), *(on_card.split() if on_gpu else ())]
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        command = [sys.executable, "launch.py", "train", "configs/quickstart.yaml", "run.steps=20"]
        ran = subprocess.run(
            [*command, f"run.dir={run_dir}", *settings], capture_output=True, text=True, check=False
        )
        words = (ran.stderr or ran.stdout).strip().splitlines() or [""]
        if ran.returncode == 0:
            return {"ok": True}
        return {"ok": False, "found": words[-1][:300], "said": words[-SAID_LINES:]}
