"""What is measured on a GPU: the cases of `make bench-gpu`, each against what is bare."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engines import PROMPT, make_engine, shape_of
from benchmarks.learner.gpu import make_config, measure_gpu, save_model

REPEATS = 5
STORE_BYTES = 12 * 2**30
"""Of Ray's object store: three versions of 1.5 B parameters."""
AIM, TIMEOUT_S = 0.6, 240.0
"""The mean reward that both ways of training are to reach, and how long they may take."""
TASK = "reasoning_gym:chain_sum?max_terms=3&max_digits=1&size=2000"
ON_CARD = (
    "model.dtype=bfloat16",
    "actors.num_gpus=0.5",
    "actors.engine_memory=0.35",
    "actors.slots=256",
    "buffer.capacity=96",
    "buffer.max_staleness=16",
    "learner.num_gpus=0.5",
    "learner.groups_per_step=32",
    "learner.lr=5e-6",
    "learner.micro_batch_tokens=16384",
    "run.steps=400",
)
TRIED = (
    "actors.slots=4",
    "actors.group_size=2",
    "actors.max_new_tokens=4",
    "learner.groups_per_step=1",
    "run.steps=2",
)
"""Settings of the task on a GPU, and where it is only tried."""


def measure_actor(name: str, *, on_gpu: bool) -> dict[str, Any]:
    """Measures an engine's tokens/s and those of vLLM's own loop over the same engine, in turns."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    model = shape_of(name, on_gpu=on_gpu)
    slots, length = (256, 256) if on_gpu else (8, 16)
    speeds: dict[str, list[float]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory() as directory:
        engine = make_engine(model, directory, on_gpu=on_gpu, slots=slots, max_new_tokens=length)
        bare = engine._engine
        for turn in range(1 + REPEATS):
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
    ours, plain = (statistics.median(values[1:]) for values in speeds.values())  # The first warms up.
    return {"ok": True, "tokens_per_s": round(ours), "bare": round(plain), "ratio": round(ours / plain, 3)}


def _start_ray(*, on_gpu: bool) -> None:
    """Starts a Ray whose object store holds the versions of a measurement."""
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=STORE_BYTES if on_gpu else 2**27,
    )


def measure_publish(name: str, *, on_gpu: bool) -> dict[str, Any]:
    """Measures how long a learner of one rank stands still for a snapshot, how long it is stored beside the
    next step, and a bare copy of as many bytes from the card to pinned memory.
    """
    import ray

    from benchmarks.learner.cases import free_port
    from benchmarks.pairs import timed
    from benchmarks.weights import board_of
    from core.calls import Calls
    from core.weights.transports import Sender, load_transport
    from learner.policy.source import ZeroSource
    from learner.policy.zero import ZeroPolicy, init_process_group

    model = shape_of(name, on_gpu=on_gpu)
    device = init_process_group(0, 1, "127.0.0.1", free_port(), use_gpu=on_gpu, timeout_s=120)
    stalls_s, stores_s = [], []
    with tempfile.TemporaryDirectory() as directory:
        save_model(model, directory)
        config = make_config(model, directory, 2048, on_gpu=on_gpu)
        source = ZeroSource(ZeroPolicy(config.model, config.learner), config.learner.bucket_bytes)
        _start_ray(on_gpu=on_gpu)
        transport = load_transport(Sender(0, config, source, board_of(), Calls(300), ray.put, print))
        for version in range(1 + REPEATS):
            stalls_s.append(timed(lambda: transport.publish(version, evaluate=()))())  # noqa: B023
            transport.flush()
            stores_s.append(transport.metrics()["weights/store_s"])
        num_bytes = sum(parameter.num_bytes for parameter in source.metadata())
        ray.shutdown()
    return {
        "ok": True,
        "gb": round(num_bytes / 1e9, 2),
        "stall_s": round(statistics.median(stalls_s[1:]), 4),  # The first makes buffers.
        "bare_copy_s": round(_copy_s(num_bytes, device), 4),
        "store_s": round(statistics.median(stores_s[1:]), 4),
    }


def _copy_s(num_bytes: int, device: torch.device) -> float:
    """Returns the seconds of one copy from the device into host memory that is used again."""
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    given = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(1 + REPEATS):
        start_s = time.perf_counter()
        pinned.copy_(given)
        seconds.append(time.perf_counter() - start_s)
    return min(seconds)


def measure_update(name: str, *, on_gpu: bool) -> dict[str, Any]:
    """Measures what an actor does for a snapshot that lies in Ray's object store, while all slots generate:
    it verifies it beside generation, then stands still for the load.
    """
    import ray
    from safetensors.torch import load_file

    from core.config import LearnerConfig
    from core.weights.snapshots import SnapshotWriter, read_snapshot

    model, slots = shape_of(name, on_gpu=on_gpu), 256 if on_gpu else 8
    verifies_s, pauses_s = [], []
    with tempfile.TemporaryDirectory() as directory:
        engine = make_engine(model, directory, on_gpu=on_gpu, slots=slots, max_new_tokens=128)
        _start_ray(on_gpu=on_gpu)
        writer = SnapshotWriter(LearnerConfig().bucket_bytes, ray.put)
        for parameter, tensor in load_file(Path(directory, "model.safetensors")).items():
            writer.add(parameter, tensor)
        manifest, references = writer.finish(1)
        for number in range(slots):
            engine.submit(f"{number}", PROMPT, seed=number)
        for version in range(1, 2 + REPEATS):
            for _ in range(4):
                engine.step()
            start_s = time.perf_counter()
            tensors = list(read_snapshot(manifest, ray.get(references)))
            verified_s = time.perf_counter()
            engine.load_weights(version, tensors)
            if on_gpu:
                torch.cuda.synchronize()
            verifies_s.append(verified_s - start_s)
            pauses_s.append(time.perf_counter() - verified_s)
        unfinished = engine.num_unfinished
        ray.shutdown()
    return {
        "ok": unfinished > 0 or not on_gpu,
        "gb": round(manifest.num_bytes / 1e9, 2),
        "verify_s": round(statistics.median(verifies_s[1:]), 4),
        "pause_s": round(statistics.median(pauses_s[1:]), 4),
        "pauses_s": [round(one, 4) for one in pauses_s],
    }


def measure_learner(name: str, budget_tokens: int, *, on_gpu: bool) -> dict[str, Any]:
    """Measures a learner's steps against the shortest loop that trains the same."""
    if not on_gpu:
        name, budget_tokens = "tiny", 400
    cases = "ours", "plain loop"
    rows = measure_gpu(name, (budget_tokens,), cases, "cuda" if on_gpu else "cpu")
    needed = rows[:1] if on_gpu else rows  # Whole logits may not fit a card: that is a result.
    return {"ok": all("tokens_per_s" in row for row in needed), "rows": rows}


def measure_reward(mode: str, *, on_gpu: bool) -> dict[str, Any]:
    """Measures how long SmolLM2 takes on a reasoning-gym task to a mean reward of `AIM`, an actor and a
    learner on one card, both at once (`together`) or in turns (`alternating`).
    """
    import ray

    from benchmarks.actors.rig import prepare
    from benchmarks.bound.reward import train

    settings = (f"data.path={TASK}", "data.eval_rows=0", *(ON_CARD if on_gpu else TRIED))
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as directory:
        prepared = prepare(Path(directory), *settings, config_path="configs/smollm2_sums.yaml")
        found = train(prepared, Path(directory, mode), mode, AIM, TIMEOUT_S)
    ray.shutdown()
    return {"ok": True, "aim": AIM, "is_reached": found["reward"] >= AIM, **found}
