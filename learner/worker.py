"""One learner rank as a Ray actor: the training loop.

buffer --Batch--> rank 0 --broadcast--> all ranks --update--> step --every k steps--> snapshot --> board
                                                             `--metrics, samples--> monitor
"""

from __future__ import annotations

import math
import socket
import time
from typing import Any

import msgspec
import ray
import torch
import torch.distributed as dist

from buffer.records import Batch, decode_batch
from cluster.config import Config
from cluster.errors import PeerTimeout
from cluster.weights import SnapshotWriter
from learner.batch_metrics import batch_metrics, shown_samples
from learner.objectives import load_objective
from learner.update import Updater, frozen_policies

BATCH_POLL_S = 2.0
MIB = 2**20


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of step number `step` (from 0): linear warm-up, then constant or down to 10 % at the last step."""
    learner, steps = config.learner, config.run.steps
    if step < learner.warmup_steps:
        return learner.lr * (step + 1) / learner.warmup_steps
    progress = (step - learner.warmup_steps) / max(1, steps - 1 - learner.warmup_steps)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[learner.decay]
    return learner.lr * (shape if learner.decay == "constant" else 0.1 + 0.9 * shape)


class LearnerRank:
    """One ZeRO-3 rank. `start` on all ranks at once, then `train` on all ranks at once."""

    def __init__(self, rank: int, config: Config, pad_id: int) -> None:
        self._rank, self._config, self._pad_id = rank, config, pad_id
        self._stopping = False
        self._samples = self._tokens = 0

    def address(self) -> tuple[str, int]:
        """Host and a free port, for the ranks to meet at (asked of rank 0)."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: tuple[str, int]) -> None:
        """Join the other ranks and build the policy, and reference and proximal policy where the objective needs them."""
        from learner.zero import ZeroFrozen, ZeroPolicy, init_process_group

        config = self._config
        use_gpu = config.learner.num_gpus > 0
        if not use_gpu:
            torch.set_num_threads(max(1, int(config.learner.num_cpus)))
        torch.manual_seed(config.run.seed)
        device = init_process_group(self._rank, config.learner.ranks, *address, use_gpu=use_gpu, timeout_s=config.run.timeout_s)
        self._policy = ZeroPolicy(config.model, config.learner)
        objective = load_objective(config.learner.objective, config.agro, config.rivals)
        reference, proximal = (ZeroFrozen(config.model, config.learner) if needed else None for needed in frozen_policies(objective))
        self._updater = Updater(config, self._policy, reference, objective, self._pad_id, device, proximal)

    def request_stop(self) -> None:
        """End `train` in order after the step in progress."""
        self._stopping = True

    def train(self, buffer: Any, board: Any, monitor: Any, policy_dir: str) -> dict[str, float]:
        """All steps: batch, update, publication; then the trained policy in `policy_dir`. Totals of the run (rank 0)."""
        self._buffer, self._board, self._monitor = buffer, board, monitor
        steps, publish_every = self._config.run.steps, self._config.weights.publish_every
        staleness: list[tuple[float, float]] = []
        published = 0
        publish_s = self._publish(0)
        step = 0
        while step < steps:
            step_start_s = time.perf_counter()
            batch = self._next_batch(step)
            if batch is None:
                break
            wait_s = time.perf_counter() - step_start_s
            metrics, diagnostics = self._updater.update(batch, learning_rate(step, self._config))
            step += 1
            if step % publish_every == 0 or step == steps:
                publish_s, published = self._publish(step), step
            if self._rank == 0:
                row = {**batch_metrics(batch), **metrics, "weights/version": float(published), "weights/publish_s": publish_s}
                staleness.append((row["staleness/mean"], row["staleness/oldest_token"]))
                self._report(step, batch, row, diagnostics, wait_s, time.perf_counter() - step_start_s)
        if published != step:
            self._publish(step, evaluate=False)
        self._policy.save_pretrained(policy_dir, self._bucket_bytes)
        return {
            "steps": step,
            "samples": self._samples,
            "tokens": self._tokens,
            "staleness_mean": sum(mean for mean, _ in staleness) / max(1, len(staleness)),
            "staleness_max": max((oldest for _, oldest in staleness), default=0.0),
        }

    # --- verbs of the loop ----------------------------------------------------------------------------------------

    @property
    def _bucket_bytes(self) -> int:
        return int(self._config.weights.bucket_mib * MIB)

    def _next_batch(self, step: int) -> Batch | None:
        """The batch of this step on every rank, or None to stop. Raises PeerTimeout when the actors deliver nothing."""
        box: list[bytes | None] = [self._ask_for_batch(step) if self._rank == 0 else None]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return None if box[0] is None else decode_batch(box[0])

    def _ask_for_batch(self, step: int) -> bytes | None:
        config = self._config
        until_s, delivered = time.monotonic() + config.run.timeout_s, -1.0
        while not self._stopping:
            answer = self._buffer.sample.remote(step, config.learner.groups_per_step, BATCH_POLL_S)
            payload = ray.get(answer, timeout=config.run.timeout_s)
            if payload is not None:
                return payload
            stats = ray.get(self._buffer.stats.remote(), timeout=config.run.timeout_s)
            if stats["buffer/inserted"] > delivered:  # Slow, but coming: a first batch at an enforced lag needs many groups.
                until_s, delivered = time.monotonic() + config.run.timeout_s, stats["buffer/inserted"]
            if time.monotonic() > until_s:
                raise PeerTimeout(
                    f"no group came for {config.run.timeout_s:.0f} s (run.timeout_s) while the learner waited at step {step} "
                    f"for {config.learner.groups_per_step} groups. See events.jsonl; raise run.timeout_s if generation is merely slow."
                )
        return None

    def _publish(self, version: int, evaluate: bool | None = None) -> float:
        """Gather the weights and put them on the board as `version`; seconds it took. Collective."""
        start_s = time.perf_counter()
        writer = SnapshotWriter(self._bucket_bytes, store=ray.put)
        for name, tensor in self._policy.named_weights(self._bucket_bytes):
            if self._rank == 0:
                writer.add(name, tensor)
        if self._rank == 0:
            manifest, references = writer.finish(version)
            publication = self._board.publish.remote(
                msgspec.msgpack.encode(manifest),
                references,
                version,
                evaluate=self._is_evaluated(version) if evaluate is None else evaluate,
            )
            ray.get(publication, timeout=self._config.run.timeout_s)
        return time.perf_counter() - start_s

    def _is_evaluated(self, version: int) -> bool:
        """The base, the last version, and the first publication at or after each multiple of `eval.every`."""
        every, publish_every = self._config.eval.every, self._config.weights.publish_every
        return version in (0, self._config.run.steps) or version // every > (version - publish_every) // every

    def _report(
        self, step: int, batch: Batch, row: dict[str, float], diagnostics: dict[int, list[dict[str, float]]], wait_s: float, step_s: float
    ) -> None:
        self._samples += sum(len(group.samples) for group in batch.groups)
        self._tokens += sum(len(sample.token_ids) for group in batch.groups for sample in group.samples)
        row["progress/step"], row["progress/samples"], row["progress/tokens"] = step, self._samples, self._tokens
        row["time/learner_busy_fraction"] = 1.0 - wait_s / step_s
        row["perf/trained_tokens_per_s"] = sum(group.num_tokens for group in batch.groups) / step_s
        self._monitor.log_step.remote(row)
        if step == 1 or step % self._config.monitor.samples_every == 0:
            self._monitor.log_samples.remote(step, shown_samples(batch, diagnostics))
        if self._config.buffer.max_uses > 1 and self._updater.keeps_reference:
            self._buffer.set_ref_logprobs.remote({gid: [d["ref_logprob"] for d in rows] for gid, rows in diagnostics.items()})
