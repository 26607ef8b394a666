"""Measures what it costs to bring weights from the learner to the actors, as ratios within one run.

    python -m benchmarks.weights [tiny] [30M]     both by default; benchmarks/results/weights-<machine>.json

gather   a pass over the source by two ZeRO-3 ranks: in buckets, against one parameter at a time
publish  how long the learner stands still for a snapshot: stored in the background, against stored by itself;
         and how long the background works on it. The object store is Ray's
apply    checksums and `Engine.load_weights` of a snapshot by a real vLLM engine: the actor's pause
deltas   bytes and seconds of a version in bfloat16, steps of 1e-6 apart, where one in DELTAS_FULL_EVERY is
         whole, against all whole: to store it in Ray's object store, and to fetch and verify it
adapters the same where adapters of rank 16 come alone, and tokens/s with vLLM applying them
push     nccl (two GPUs) and ipc (one): stall of the learner, pause of the actor. NEVER RUN: there was no GPU
memcpy   of as many bytes into memory that is used again, which is what all bandwidths are compared with

Figures are medians of REPEATS, of memcpy the best; what is compared alternates. Two ranks and Ray share the
cores there are: see `cpus` in the results.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.pairs import compare, interleave, timed
from benchmarks.results import measure_load, save, show
from core.calls import Local
from core.config import Config
from core.processes import remote
from core.weights.board import BOARD, BoardClient, Held, ReceiverClient
from learner.catalogue import parse_config

REPEATS = 7
ADAPTER_RANK = 16
DELTAS_FULL_EVERY, DELTAS_LR = 8, 1e-6
MODELS = {"tiny": {"hidden": 96, "layers": 3}, "30M": {"hidden": 512, "layers": 10}}
NO_GPU = "not measured (no GPU)"
MIB = 2**20


class Shelf:
    """Stands for the board and keeps the newest snapshot. `actors` are those that weights are pushed to, by
    name.
    """

    def __init__(self, actors: dict[str, ReceiverClient] | None = None) -> None:
        self.newest: tuple[bytes, list[Any]] = b"", []
        self._actors = actors or {}

    def publish(self, manifest: bytes, buckets: list[Any], version: int, *, evaluate: Sequence[str]) -> Held:
        """Takes a snapshot."""
        self.newest = manifest, buckets
        return Held("shelf", [version])

    def announce(self, version: int) -> None:
        """Takes note of nothing."""

    def members(self) -> dict[str, ReceiverClient]:
        """The actors."""
        return self._actors


def board_of(actors: dict[str, ReceiverClient] | None = None) -> BoardClient:
    """Such a board, as a transport is given one."""
    return BoardClient(Local(Shelf(actors)), BOARD)


def make_config(model_dir: str, **sections: Any) -> Config:
    """Returns a run's config for the model."""
    tree: dict[str, Any] = {
        "model": {"path": model_dir},
        "data": {"path": "none"},
        "rewards": {"functions": {"exact_match": 1.0}},
    }
    return parse_config(tree | sections)


def memcpy_s(num_bytes: int) -> float:
    """Returns the seconds of one copy between two buffers whose pages exist.

    It is the fastest of many, since a copy is over before anybody can be in its way.
    """
    source, target = torch.ones(num_bytes, dtype=torch.uint8), torch.ones(num_bytes, dtype=torch.uint8)
    return min(timed(lambda: target.copy_(source))() for _ in range(5 * REPEATS))


# --- two learner ranks ---


def learn(rank: int, model_dir: str, port: int, out: str) -> None:
    """Runs one rank; rank 0 writes what it measured."""
    import ray

    from core.calls import Calls
    from core.weights.snapshots import SnapshotWriter
    from core.weights.transports import Sender, load_transport
    from learner.policy.source import ZeroSource
    from learner.policy.zero import ZeroPolicy, init_process_group

    torch.set_num_threads(1)
    config = make_config(model_dir, learner={"ranks": 2})
    init_process_group(rank, 2, "127.0.0.1", port, use_gpu=False, timeout_s=300)
    policy = ZeroPolicy(config.model, config.learner)
    bucket_bytes = config.learner.bucket_bytes
    source, one_by_one = ZeroSource(policy, bucket_bytes), ZeroSource(policy, 1)
    if rank == 0:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=2**30,
        )
    transport = load_transport(Sender(rank, config, source, board_of(), Calls(300), ray.put, print))

    def store_by_itself() -> None:
        writer = SnapshotWriter(bucket_bytes, ray.put)
        for name, tensor in source:
            if rank == 0:
                writer.add(name, tensor)
        writer.finish(0)

    versions, stores_s = itertools.count(), []

    def stall() -> float:
        took_s = timed(lambda: transport.publish(next(versions), evaluate=()))()
        transport.flush()
        stores_s.append(transport.metrics().get("weights/store_s", 0.0))
        return took_s

    calls = {
        "gather": timed(lambda: deque(source, maxlen=0)),
        "one_by_one": timed(lambda: deque(one_by_one, maxlen=0)),
        "by_itself": timed(store_by_itself),
        "stall": stall,
    }
    found = interleave(calls, REPEATS, warm_rounds=1)  # The first makes buffers and connections.
    if rank == 0:
        num_bytes = sum(parameter.num_bytes for parameter in source.metadata())
        Path(out).write_text(json.dumps({**found, "store": stores_s[1:], "bytes": num_bytes}))
        ray.shutdown()


def learner_side(model_dir: str, directory: Path) -> dict[str, float]:
    """Runs `learn` in two processes and returns its figures as bandwidths and ratios."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = directory / "ranks.json"
    spawn = multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=learn, args=(rank, model_dir, port, str(out))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(900)
    found = json.loads(out.read_text())
    copy_s, mib = memcpy_s(found["bytes"]), found["bytes"] / MIB
    gather_s, stall_s = statistics.median(found["gather"]), statistics.median(found["stall"])
    return {
        "mib": mib,
        "memcpy_mib_per_s": mib / copy_s,
        "gather_mib_per_s": mib / gather_s,
        "gather_against_memcpy": copy_s / gather_s,
        **compare(found["one_by_one"], found["gather"]).fields("gather_against_one_by_one"),
        "publish_stall_s": stall_s,
        "publish_against_memcpy": copy_s / stall_s,
        **compare(found["stall"], found["by_itself"]).fields("stall_against_storing_by_itself"),
        **compare(found["stall"], found["gather"]).fields("stall_against_bare_gather"),
        "background_s": statistics.median(found["store"]),
    }


# --- versions that differ little ---


def small_steps(weights: dict[str, torch.Tensor], count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yields `count` versions of the weights in bfloat16, an AdamW step of DELTAS_LR from one to the next.

    The gradients are noise about a direction that stays.
    """
    generator = torch.Generator().manual_seed(0)
    masters = [torch.nn.Parameter(tensor.float()) for tensor in weights.values()]
    directions = [0.3 * torch.randn(master.shape, generator=generator) for master in masters]
    optimizer = torch.optim.AdamW(masters, lr=DELTAS_LR, weight_decay=0.0)
    for _ in range(count):
        yield {name: master.detach().bfloat16() for name, master in zip(weights, masters, strict=True)}
        for master, direction in zip(masters, directions, strict=True):
            master.grad = direction + torch.randn(master.shape, generator=generator)
        optimizer.step()


def delta_side(model_dir: str) -> dict[str, float]:
    """Returns what a version costs with deltas and without, over two rounds from one whole version to the
    next.
    """
    import ray

    from core.weights.snapshots import Base, Buffers, SnapshotWriter, read_snapshot

    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=2**30
    )
    bucket_bytes = make_config(model_dir).learner.bucket_bytes
    base, num_bytes = None, 0
    buffers = Buffers(), Buffers()
    found: dict[str, list[float]] = {}
    for version, weights in enumerate(small_steps(whole_weights(model_dir), 2 * DELTAS_FULL_EVERY)):
        is_base = version % DELTAS_FULL_EVERY == 0
        for name in ("whole", "deltas"):
            sizes: list[int] = []

            def store(bucket: Any, sizes: list[int] = sizes) -> Any:
                sizes.append(bucket.nbytes)
                return ray.put(bucket)

            memory = buffers[is_base and name == "deltas"]
            memory.give_back()
            since = None if name == "whole" or is_base else base
            start_s = time.perf_counter()
            writer = SnapshotWriter(bucket_bytes, store, take=memory.take, base=since)
            for parameter, tensor in weights.items():
                writer.add(parameter, tensor)
            manifest, references = writer.finish(version)
            stored_s = time.perf_counter()
            list(read_snapshot(manifest, ray.get(references)))
            found.setdefault(f"{name}_read_s", []).append(time.perf_counter() - stored_s)
            found.setdefault(f"{name}_store_s", []).append(stored_s - start_s)
            found.setdefault(f"{name}_mb", []).append(sum(sizes) / 1e6)
            if is_base and name == "deltas":
                base = Base(writer.buckets, references)
        num_bytes = manifest.num_bytes
    ray.shutdown()
    means = {f"deltas/{name}": statistics.fmean(values) for name, values in found.items()}
    last_mb = found["deltas_mb"][-1]
    return means | {
        "deltas/of_whole": sum(found["deltas_mb"]) / sum(found["whole_mb"]),
        "deltas/last_of_whole": last_mb * 1e6 / num_bytes,
    }


# --- an actor ---


def apply(model_dir: str, out: str, rank: int) -> None:
    """Lets a real engine load snapshots of its own weights; with a `rank`, of adapters alone."""
    from actors.engine import Engine
    from actors.engine_settings import Adapters
    from core.weights.snapshots import SnapshotWriter, read_snapshot

    weights = whole_weights(model_dir) if not rank else adapters_alone(model_dir, rank)
    config = make_config(model_dir)
    actors = config.actors.model_copy(update={"slots": 8, "max_new_tokens": 32, "engine_memory": 1 / 16})
    engine = Engine(
        config.model, actors, max_model_len=64, adapters=Adapters(rank, 2.0 * rank) if rank else None
    )
    writer = SnapshotWriter(config.learner.bucket_bytes)
    for name, tensor in weights.items():
        writer.add(name, tensor)
    manifest, buckets = writer.finish(1)
    tensors, versions = list(read_snapshot(manifest, buckets)), itertools.count(2)

    def generate() -> None:
        for number in range(16):
            engine.submit(str(number), (4, 13, 5, 14), seed=number)
        while engine.num_unfinished:
            engine.step()

    calls = {
        "verify_s": timed(lambda: list(read_snapshot(manifest, buckets))),
        "pause_s": timed(lambda: engine.load_weights(next(versions), tensors)),
        "generate_s": timed(generate),
    }
    measured = interleave(calls, REPEATS, warm_rounds=1)
    found = {name: statistics.median(values) for name, values in measured.items()}
    Path(out).write_text(json.dumps(found | {"bytes": sum(tensor.nbytes for tensor in weights.values())}))


def whole_weights(model_dir: str) -> dict[str, torch.Tensor]:
    """Returns the model's weights by name."""
    from safetensors.torch import load_file

    return load_file(Path(model_dir) / "model.safetensors")


def adapters_alone(model_dir: str, rank: int) -> dict[str, torch.Tensor]:
    """Returns adapters as the learner has them before its first step, when they change nothing of what is
    sampled.
    """
    from transformers import AutoModelForCausalLM

    from core.config import LearnerConfig
    from learner.policy.lora import adapters_of, add_adapters

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    add_adapters(model, LearnerConfig(lora_rank=rank), 0)
    return {weight.name: weight.value() for weight in adapters_of(model)}


def actor_side(model_dir: str, directory: Path) -> dict[str, float]:
    """Runs `apply` in a process of its own; vLLM is not to be started twice in one."""

    def in_a_process(rank: int) -> dict[str, float]:
        out = directory / "apply.json"
        process = multiprocessing.get_context("spawn").Process(target=apply, args=(model_dir, str(out), rank))
        process.start()
        process.join(600)
        found: dict[str, float] = json.loads(out.read_text())
        return found

    found, alone = in_a_process(0), in_a_process(ADAPTER_RANK)
    copy_s = memcpy_s(int(found["bytes"]))
    return {
        "apply_pause_s": found["pause_s"],
        "apply_mib_per_s": found["bytes"] / MIB / found["pause_s"],
        "apply_against_memcpy": copy_s / found["pause_s"],
        "verify_against_memcpy": copy_s / found["verify_s"],
        "adapters_mib": alone["bytes"] / MIB,
        "adapters_pause_s": alone["pause_s"],
        "adapters_pause_against_weights": alone["pause_s"] / found["pause_s"],
        "adapters_generation_against_weights": found["generate_s"] / alone["generate_s"],
    }


# --- pushes: needs GPUs, never run ---


class PushedActor:
    """An engine in a Ray actor, with a loop that looks for orders; `pauses` tells how long each transfer kept
    it from generating.
    """

    def __init__(self, config: Config) -> None:
        from actors.engine import Engine
        from actors.receiver import Receiver

        engine = Engine(config.model, config.actors, max_model_len=64, transport=config.weights.transport)
        self._pauses: list[float] = []
        self._receiver = Receiver(
            engine,
            config.run.timeout_s,
            may_start=lambda: "",
            on_updated=lambda start_s: self._pauses.append(time.perf_counter() - start_s),
            beat=lambda: None,
            tell=print,
        )
        threading.Thread(target=self._turn, daemon=True).start()

    def _turn(self) -> None:
        while True:
            self._receiver.poll()
            time.sleep(0.0005)

    def receive(self, verb: str, number: int, *arguments: Any) -> str:
        """Takes an order as a rollout actor does."""
        return self._receiver.order(verb, number, *arguments)

    def pauses(self) -> list[float]:
        """Returns the seconds of each transfer."""
        return self._pauses


class PushingLearner:
    """Rank 0 in a Ray actor, with a whole model on its GPU, which is what ZeRO-3 on one rank is."""

    def __init__(self, config: Config) -> None:
        from transformers import AutoModelForCausalLM

        self._config = config
        model = AutoModelForCausalLM.from_pretrained(
            config.model.path, dtype=getattr(torch, config.model.dtype)
        )
        self.module = cast(Any, model).to("cuda")

    def named_weights(
        self, bucket_bytes: int, *, adapters_alone: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the weights; nothing has to be gathered."""
        return ((name, parameter.data) for name, parameter in self.module.named_parameters())

    def push(self, actor: Any) -> list[float]:
        """Returns the learner's stall at each publication but the first, which makes a snapshot and
        connections.
        """
        import ray

        from core.calls import Calls
        from core.weights.transports import Sender, load_transport
        from learner.policy.source import ZeroSource

        source = ZeroSource(self, self._config.learner.bucket_bytes)
        actors = {"actor-0": ReceiverClient(actor, "actor-0")}
        transport = load_transport(
            Sender(0, self._config, source, board_of(actors), Calls(300), ray.put, print)
        )
        stalls = [
            timed(functools.partial(transport.publish, version, evaluate=()))()
            for version in range(REPEATS + 1)
        ]
        return stalls[1:]


def push(model_dir: str, road: str) -> str | dict[str, float]:
    """Measures a learner and an actor on two GPUs (nccl) or one (ipc)."""
    needed = 2 if road == "nccl" else 1
    if torch.cuda.device_count() < needed:
        return NO_GPU if not torch.cuda.is_available() else f"not measured ({torch.cuda.device_count()} GPU)"
    import ray

    share = 1.0 if road == "nccl" else 0.5
    sections: dict[str, Any] = {
        "weights": {"transport": road},
        "learner": {"num_gpus": share},
        "buffer": {"max_staleness": 1000},
    }
    config = make_config(model_dir, actors={"num_gpus": share, "engine_memory": 0.3}, **sections)
    ray.init(address="local", include_dashboard=False)
    actor = remote(PushedActor).options(num_gpus=share, max_concurrency=4).remote(config)
    learner = remote(PushingLearner).options(num_gpus=share).remote(config)
    stalls, pauses = (
        ray.get(learner.push.remote(actor), timeout=600),
        ray.get(actor.pauses.remote(), timeout=60),
    )
    ray.shutdown()
    return {"stall_s": statistics.median(stalls), "pause_s": statistics.median(pauses[1:])}


def main() -> None:
    """Measures the models asked for (both by default), prints the figures and writes them to
    benchmarks/results/.
    """
    from recipes.arithmetic import make_llama, make_tokenizer

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)  # As in the processes that are measured.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], metavar="MODEL")
    asked = parser.parse_args().models or [*MODELS]
    tokenizer = make_tokenizer()
    result: dict[str, Any] = {"load": measure_load()}
    with tempfile.TemporaryDirectory() as directory:
        for name in asked:
            model_dir = Path(directory) / name
            make_llama(len(tokenizer), tied=False, **MODELS[name]).save_pretrained(model_dir)
            tokenizer.save_pretrained(model_dir)
            row: dict[str, Any] = {
                **learner_side(str(model_dir), Path(directory)),
                **actor_side(str(model_dir), Path(directory)),
                **delta_side(str(model_dir)),
            }
            row |= {road: push(str(model_dir), road) for road in ("nccl", "ipc")}
            result[name] = row
            show(name, [{"figure": key, "value": value} for key, value in row.items()])
    print(f"written to {save('weights', result, keep=True)}")


if __name__ == "__main__":
    main()
