"""One learner rank as a Ray actor: the training loop.

    buffer --Batch--> rank 0 --broadcast--> all ranks --update--> step --every k steps--> snapshot --> board
       ^                                                         |  `--metrics, samples--> monitor
       `--watermark-- checkpoint, written while training goes on <'

A run that goes on from a checkpoint publishes its weights first, and asks the buffer for the batches since
then by their steps: they are the same batches again.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import ray
import torch
import torch.distributed as dist

from buffer.client import BufferClient
from core.calls import Calls
from core.config import Config
from core.config.files import dump_config
from core.errors import ConfigError, PeerTimeout
from core.monitor_client import MonitorClient
from core.records import BatchIndex, open_batch
from core.staleness import StalenessBound
from core.weights.board import BoardClient
from core.weights.transports import NoTransport, Sender, Transport, load_transport
from learner.checkpoints.checkpoint import Checkpoint, TensorPart, verify
from learner.checkpoints.writer import CheckpointWriter, code_version, set_random_states
from learner.objectives import load_objective
from learner.policy.source import ZeroSource
from learner.step.batch_metrics import batch_metrics, shown_samples
from learner.step.frozen import frozen_names
from learner.step.guards import Guards
from learner.step.mismatch import MismatchCheck, bound_nats
from learner.step.result import StepResult
from learner.step.share import Share, receive_share
from learner.step.update import Updater

BATCH_POLL_S = 2.0


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of step number `step` (from 0): linear warm-up, then constant or down to 10 % at
    the last step.
    """
    (warmup_steps, course), peak = config.learner.schedule, config.learner.lr
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if course == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, config.run.steps - 1 - warmup_steps)
    shape = 1.0 - progress if course == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (0.1 + 0.9 * shape)


class Progress(msgspec.Struct):
    """How far the run is: what the loop counts, and a checkpoint carries on. Staleness in learner
    steps; NaN: of offline samples only.
    """

    step: int = 0
    published: int = -1
    samples: int = 0
    tokens: int = 0
    staleness_sum: float = 0.0
    staleness_max: float = math.nan

    def totals(self) -> dict[str, float]:
        """Totals of the run, for its summary."""
        return {
            "steps": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "staleness_mean": self.staleness_sum / max(1, self.step),
            "staleness_max": self.staleness_max,
        }


def _in_words(generation: Mapping[str, tuple[tuple[float, float], float]]) -> str:
    """Who generated how much: of `Monitor.generation`."""
    said = [
        f"{name} {sum(tokens):.0f} tokens so far, last heard of {silent_s:.0f} s ago"
        for name, (tokens, silent_s) in generation.items()
    ]
    return "; ".join(said) or "no actor was ever heard of"


class LearnerRank:
    """One ZeRO-3 rank. `start` on all ranks at once, then `train` on all ranks at once; the other
    methods at any time.
    """

    def __init__(self, rank: int, config: Config, pad_id: int) -> None:
        self._rank, self._config, self._pad_id = rank, config, pad_id
        self._stopping = False
        self._transport: Transport = NoTransport()

    def address(self) -> tuple[str, int]:
        """Host and a free port, for the ranks to meet at (asked of rank 0)."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, address: tuple[str, int]) -> None:
        """Join the other ranks and build the policy, and reference and proximal policy where the
        objective needs them.
        """
        from learner.policy.zero import ZeroAdapters, ZeroFrozen, ZeroPolicy, init_process_group

        config = self._config
        use_gpu = config.learner.num_gpus > 0
        if not use_gpu:
            torch.set_num_threads(1 if config.run.deterministic else max(1, int(config.learner.num_cpus)))
        torch.use_deterministic_algorithms(config.run.deterministic)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(config.run.seed)
        device = init_process_group(
            self._rank, config.learner.ranks, *address, use_gpu=use_gpu, timeout_s=config.run.timeout_s
        )
        self._policy = ZeroPolicy(config.model, config.learner, config.run.seed)
        objective = load_objective(config.objective)
        self._frozen: dict[str, ZeroAdapters | ZeroFrozen] = {
            name: ZeroAdapters(self._policy)
            if config.learner.lora_rank
            else ZeroFrozen(config.model, config.learner)
            for name in frozen_names(objective)
        }
        self._updater = Updater(
            config, self._policy, objective, self._frozen, pad_id=self._pad_id, device=device
        )

    def ping(self) -> int:
        """This rank's number: its process answers."""
        return self._rank

    def request_stop(self) -> None:
        """End `train` in order after the step in progress, with a checkpoint."""
        self._stopping = True

    def republish(self) -> None:
        """The board was started again: tell it of the published weights once more, if there are any."""
        self._transport.republish()

    def train(
        self,
        buffer: BufferClient,
        board: BoardClient,
        monitor: MonitorClient,
        policy_dir: str,
        resume_from: str | None = None,
    ) -> dict[str, float]:
        """All steps: batch, update, publication, checkpoint; then the trained policy in `policy_dir`. Totals
        of the run (rank 0).

        Checkpoints lie beside `policy_dir`, in `checkpoints/`;
        `resume_from` is one of them that verified (`latest_checkpoint`). Raises CheckpointError when it does
        not fit.
        """
        self._connect(buffer, board, monitor, Path(policy_dir).parent)
        progress, config = self._restore(resume_from), self._config
        self._updater.mismatch = self._mismatch_check(progress.step)
        publish_s = self._publish(progress)
        while progress.step < config.run.steps:
            step_start_s = time.perf_counter()
            taken = self._next_batch(progress.step)
            if taken is None:
                break
            share, payload = taken
            wait_s = time.perf_counter() - step_start_s
            StalenessBound(config.buffer.max_staleness).check_batch(share.index)
            result = self._updater.update(share, learning_rate(progress.step, config))
            metrics = result.metrics()
            self._guards.judge(share.index.step, payload, metrics, result.skip)
            progress.step += 1
            if progress.step % config.weights.publish_every == 0 or progress.step == config.run.steps:
                publish_s = self._publish(progress)
            if self._rank == 0:
                row = {**batch_metrics(share.index), **metrics, "weights/publish_s": publish_s}
                self._report(progress, share.index, row, result, wait_s, time.perf_counter() - step_start_s)
                self._show(progress.step, payload, result)
            if config.checkpoint.every and progress.step % config.checkpoint.every == 0:
                self._save(progress)
        if progress.published != progress.step:
            self._publish(progress, evaluate=False)
        self._transport.flush()
        if config.checkpoint.every:
            self._save(progress)
        self._checkpoints.close()  # Durable before the policy is written, which a full disk may prevent.
        return {**progress.totals(), "policy_written": float(self._write_policy(policy_dir))}

    # --- verbs of the loop ---

    def _connect(
        self, buffer: BufferClient, board: BoardClient, monitor: MonitorClient, run_dir: Path
    ) -> None:
        self._buffer, self._monitor = buffer, monitor
        self._calls = Calls(self._config.run.timeout_s, monitor.event, name=f"learner rank {self._rank}")
        self._run_dir, self._saved = run_dir, -1
        self._code_version = code_version()  # Once: it asks git.
        source = ZeroSource(
            self._policy, self._bucket_bytes, adapters_alone=self._config.weights.transport == "adapters"
        )
        self._transport = load_transport(
            Sender(self._rank, self._config, source, board, self._calls, ray.put, self._calls.tell)
        )
        self._guards = Guards(
            run_dir / "bad-batches",
            self._rank,
            tell=self._calls.tell,
            share=self._broadcast,
            mismatch_bound_nats=bound_nats(self._config),
        )
        (session,) = self._broadcast(secrets.token_hex(4))
        self._checkpoints = CheckpointWriter(
            run_dir,
            self._rank,
            dist.get_world_size(),
            session=session,
            keep=self._config.checkpoint.keep,
            timeout_s=self._config.run.timeout_s,
            on_event=self._calls.tell,
            on_durable=self._set_watermark,
        )

    def _mismatch_check(self, start_step: int) -> MismatchCheck:
        """For a learner that starts at that step. Collective."""
        is_first = self._rank == 0
        # The buffer may hold samples of versions up to this one, made by a learner that died since.
        (known_until,) = self._broadcast(self._calls.ask(self._buffer.next_step()) if is_first else None)
        return MismatchCheck(
            self._config,
            self._policy.module.config,
            start_step=start_step,
            known_until=known_until,
            tell=self._calls.tell if is_first else lambda _: None,
        )

    @property
    def _bucket_bytes(self) -> int:
        return self._config.learner.bucket_bytes

    def _broadcast(self, value: Any) -> list[Any]:
        """Rank 0's value on every rank, as a list of one. Collective."""
        box = [value]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box

    def _next_batch(self, step: int) -> tuple[Share, bytes] | None:
        """This rank's share of the batch of this step, and on rank 0 all of it, encoded (b"" on the others);
        None to stop. Raises PeerTimeout when the actors deliver nothing. Collective.
        """
        answers = self._ask_for_batch(step) if self._rank == 0 else itertools.repeat((False, b""))
        for is_over, payload in answers:
            # Every two seconds, come or not: the other ranks wait in a collective, which has a limit of its
            # own.
            ((is_over, is_there),) = self._broadcast((is_over, payload is not None))
            if is_over and not is_there:
                return None
            if is_over:
                return receive_share(open_batch(payload or b"") if self._rank == 0 else None), payload or b""
        raise AssertionError("unreachable: the last answer ends the wait")

    def _ask_for_batch(self, step: int) -> Iterator[tuple[bool, bytes | None]]:
        """(False, None) as long as there is none, then (True, the batch, or None to stop)."""
        config = self._config
        until_s, seen = time.monotonic() + config.run.timeout_s, None
        while not self._stopping:
            payload = self._calls.ask(self._buffer.sample(step, config.learner.groups_per_step, BATCH_POLL_S))
            if payload is not None:
                yield True, payload
            stats = self._calls.ask(self._buffer.stats())
            generation = self._calls.ask(self._monitor.generation())
            now = stats["buffer/inserted"], {name: tokens for name, (tokens, _) in generation.items()}
            # Slow, but coming: a first batch of long samples, or at an enforced lag, takes its time.
            if now != seen:
                until_s, seen = time.monotonic() + config.run.timeout_s, now
            if time.monotonic() > until_s:
                raise PeerTimeout(
                    f"no group came for {config.run.timeout_s:.0f} s (run.timeout_s) while the learner "
                    f"waited at step {step} "
                    f"for {config.learner.groups_per_step} groups, and no token was generated: "
                    f"{_in_words(generation)}. "
                    f"{self._why_no_group()}"
                )
            yield False, None
        yield True, None

    def _why_no_group(self) -> str:
        errors, samples, texts = self._calls.ask(self._buffer.error_summary())
        if not texts:
            return "See events.jsonl; raise run.timeout_s if generation is merely slow."
        shown = "\n  ".join(dict.fromkeys(texts))
        return f"{errors} of {samples} samples got no reward so far, the last because of:\n  {shown}"

    def _publish(self, progress: Progress, evaluate: bool | None = None) -> float:
        """Bring the weights on their way to the actors as version `progress.step`; seconds that the
        learner stood still. Collective.
        """
        start_s = time.perf_counter()
        version = progress.published = progress.step
        self._transport.publish(
            version, evaluate=self._is_evaluated(version) if evaluate is None else evaluate
        )
        return time.perf_counter() - start_s

    def _is_evaluated(self, version: int) -> bool:
        """The base, the last version, and the first publication at or after each multiple of `eval.every`."""
        every, publish_every = self._config.eval.every, self._config.weights.publish_every
        return version in (0, self._config.run.steps) or version // every > (version - publish_every) // every

    def _report(
        self,
        progress: Progress,
        batch: BatchIndex,
        row: dict[str, float],
        result: StepResult,
        wait_s: float,
        step_s: float,
    ) -> None:
        step = progress.step
        # None of a skipped step.
        are_trained = result.by_group("advantage").keys()
        trained = [group for group in batch.groups if group.group_id in are_trained]
        progress.samples += sum(len(group.samples) for group in trained)
        progress.tokens += sum(sample.num_sampled for group in trained for sample in group.samples)
        progress.staleness_sum += row["staleness/mean"]
        progress.staleness_max = float(np.fmax(progress.staleness_max, row["staleness/oldest_token"]))
        row["progress/step"], row["progress/samples"], row["progress/sampled_tokens"] = (
            step,
            progress.samples,
            progress.tokens,
        )
        row["weights/version"] = float(progress.published)
        row["time/learner_busy_fraction"] = 1.0 - wait_s / step_s
        row["perf/trained_all_tokens_per_s"] = sum(group.num_tokens for group in trained) / step_s
        whole = row | self._guards.metrics() | self._transport.metrics() | self._checkpoints.metrics()
        self._calls.post(self._monitor.log_step(whole), "a step's metrics")
        if self._config.buffer.uses_per_group > 1 and self._updater.keeps_reference:
            cached = self._buffer.set_ref_logprobs(result.by_group("ref_logprob"))
            self._calls.post(cached, "the reference's log-probs, which are computed again")

    def _show(self, step: int, payload: bytes, result: StepResult) -> None:
        """Tell the monitor of a few samples of the batch, if it is time."""
        if self._config.monitor.shows_samples(step):
            shown = shown_samples(open_batch(payload), result.by_group("advantage"))
            self._calls.post(self._monitor.log_samples(step, shown), "samples to show")

    def _write_policy(self, policy_dir: str) -> bool:
        """Whether it was written (rank 0). Collective.

        A disk that refuses it, or a base whose files are gone, costs nothing else where there are
        checkpoints: the newest holds the same.
        """
        try:
            self._policy.save_pretrained(policy_dir, self._bucket_bytes)
        except (OSError, ConfigError) as error:
            if not self._config.checkpoint.every:
                raise
            self._calls.tell(
                f"the policy was not written to {policy_dir}: {error}; `launch.py "
                "export` makes it of a checkpoint"
            )
            return False
        return True

    # --- checkpoints ---

    def _save(self, progress: Progress) -> None:
        """Begin the checkpoint of this step, unless it is what the run has already. Raises
        CheckpointError for a NaN.
        """
        if progress.step == max(0, self._saved):
            return
        self._saved = progress.step
        self._transport.flush()  # What it calls published can be had.
        self._checkpoints.save(progress.step, self._parts(), self._state(progress))

    def _parts(self) -> Iterator[TensorPart]:
        return chain(
            self._policy.parts(), *(self._frozen[name].parts(name) for name in sorted(self._updater.moved))
        )

    def _state(self, progress: Progress) -> dict[str, Any]:
        wandb_id = self._run_dir / "wandb_id"
        return {
            "progress": msgspec.to_builtins(progress),
            "adam_steps": self._policy.adam_steps,
            "updater": self._updater.get_state(),
            "guards": self._guards.get_state(),
            "config": dump_config(self._config),
            "wandb_run_id": wandb_id.read_text(encoding="utf-8").strip() if wandb_id.is_file() else None,
            "code_version": self._code_version,
        }

    def _restore(self, path: str | None) -> Progress:
        """The state saved in `path` on this rank; how far it was. A rank that the checkpoint has not
        keeps its own random state.
        """
        if path is None:
            return Progress()
        checkpoint = Checkpoint(Path(path), verify(Path(path), contents=False))
        state = checkpoint.state
        self._policy.restore(checkpoint.read, state["adam_steps"])
        self._updater.set_state(state["updater"])
        self._guards.set_state(state["guards"])
        for name in self._updater.moved:
            self._frozen[name].restore(name, checkpoint.read)
        if metadata := checkpoint.rank_metadata(self._rank):
            set_random_states(json.loads(metadata["rng"]))
        progress = msgspec.convert(state["progress"], Progress)
        self._saved = progress.step
        return progress

    def _set_watermark(self, oldest_step: int) -> None:
        """Batches since the OLDEST checkpoint are kept: it is what the run goes on from when the newer
        ones are damaged.
        """
        self._calls.ask(self._buffer.set_watermark(oldest_step))
