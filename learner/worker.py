"""One learner rank as a Ray actor: the training loop.

    buffer --Batch--> rank 0 --shares--> all ranks --update--> step --every k steps--> snapshot --> board
       ^                                                        |  `--metrics, samples--> monitor
       `--watermark-- checkpoint, written while training goes on <'

A run that goes on from a checkpoint publishes its weights first, and asks the buffer for the batches since
then by their steps: they are the same batches again.
"""

from __future__ import annotations

import json
import random
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import ray
import torch

from buffer.client import BufferClient
from core.calls import Calls
from core.config import Config
from core.config.files import dump_config
from core.errors import ConfigError
from core.machine import collect_as_usual, collect_seldom
from core.metrics import shows_samples
from core.monitor_client import MonitorClient
from core.records import GroupHead, open_batch
from core.staleness import StalenessBound
from core.weights.board import BoardClient
from core.weights.transports import NoTransport, Sender, Transport, load_transport
from learner.batches import BatchSource, Taken
from learner.checkpoints.checkpoint import Checkpoint, TensorPart, verify
from learner.checkpoints.writer import CheckpointWriter, code_version, set_random_states
from learner.cores import Threads
from learner.objectives import load_objective
from learner.policy.source import ZeroSource
from learner.progress import Progress, learning_rate
from learner.step.batch_metrics import batch_metrics, shown_samples, source_metrics
from learner.step.frozen import frozen_names
from learner.step.guards import Guards
from learner.step.mismatch import MismatchCheck, bound_nats
from learner.step.ranks import Ranks
from learner.step.result import StepResult
from learner.step.update import Updater


class LearnerRank:
    """One ZeRO-3 rank: `start` on all ranks at once, then `train` on all ranks at once; the other methods at
    any time.

        rank = remote(LearnerRank).remote(0, config, pad_id)
        rank.start.remote(address)
        totals = rank.train.remote(buffer, board, monitor, policy_dir)
    """

    def __init__(self, rank: int, config: Config, pad_id: int) -> None:
        self._rank, self._config, self._pad_id = rank, config, pad_id
        self._stopping = self._is_target_reached = False
        self._transport: Transport = NoTransport()
        self._meeting = socket.socket()

    def address(self) -> tuple[str, int]:
        """Returns this host and a port, for the ranks to meet at (asked of rank 0, once). Until they have met
        no other process is given it: they load for seconds first, beside engines that ask for ports, too.
        """
        # The ranks' own server can listen there beside it, since it has this option, too.
        self._meeting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._meeting.bind(("", 0))
        return ray.util.get_node_ip_address(), self._meeting.getsockname()[1]

    def start(self, address: tuple[str, int]) -> None:
        """Joins the other ranks and builds the policy, and reference and proximal policy where the objective
        needs them.
        """
        collect_seldom()
        from learner.policy.zero import ZeroFrozen, ZeroPolicy, init_process_group
        from learner.policy.zero_adapters import ZeroAdapters

        config = self._config
        use_gpu = config.learner.num_gpus > 0
        self._threads = Threads(config, _num_nodes())
        self._threads.follow()
        torch.use_deterministic_algorithms(config.run.deterministic)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(config.run.seed)
        device = init_process_group(
            self._rank,
            config.learner.ranks,
            *address,
            use_gpu=use_gpu,
            timeout_s=config.run.timeout_s,
            sequence_parallel=config.learner.sequence_parallel,
        )
        self._meeting.close()
        self._policy = ZeroPolicy(config.model, config.learner, config.run.seed)
        objective = load_objective(config.objective)
        self._frozen: dict[str, ZeroAdapters | ZeroFrozen] = {
            name: ZeroAdapters(self._policy)
            if config.learner.lora_rank
            else ZeroFrozen(config.model, config.learner)
            for name in frozen_names(objective)
        }
        self._ranks = Ranks()
        self._updater = Updater(
            config, self._policy, objective, self._frozen, pad_id=self._pad_id, device=device
        )
        collect_as_usual()

    def ping(self) -> int:
        """Returns this rank's number: its process answers."""
        return self._rank

    def request_stop(self, *, is_target_reached: bool = False) -> None:
        """Ends `train` in order after the step in progress, with a checkpoint; where the target is reached
        (`eval.stop_at`), with an evaluation as after the last step.
        """
        self._is_target_reached |= is_target_reached  # First: `train` may look at once, in its own thread.
        self._stopping = True

    def republish(self) -> None:
        """Tells a board that was started again of the published weights, if there are any."""
        self._transport.republish()

    def train(
        self,
        buffer: BufferClient,
        board: BoardClient,
        monitor: MonitorClient,
        policy_dir: str,
        resume_from: str | None = None,
    ) -> dict[str, float]:
        """Takes all steps, then writes the trained policy to `policy_dir`; returns totals of the run.

        Checkpoints lie beside `policy_dir`, in `checkpoints/`; `resume_from` is one of them that verified
        (`latest_checkpoint`). Raises CheckpointError when it does not fit.
        """
        self._connect(buffer, board, monitor, Path(policy_dir).parent)
        progress = self._restore(resume_from)
        self._updater.mismatch = self._mismatch_check(progress.step)
        self._publish(progress)
        while progress.step < self._config.run.steps:
            taken = self._batches.next(progress.step)
            if taken is None:
                break
            result = self._update(taken, progress)
            row = self._judge(taken, result, progress)
            if self._is_published(progress.step):
                self._publish(progress)
            self._report(taken, result, row, progress)
            if self._is_saved(progress.step):
                self._save(progress)
        return self._finish(progress, policy_dir)

    # --- verbs of the loop ---

    def _connect(
        self, buffer: BufferClient, board: BoardClient, monitor: MonitorClient, run_dir: Path
    ) -> None:
        self._buffer, self._monitor = buffer, monitor
        self._calls = Calls(self._config.run.timeout_s, monitor.event, name=f"learner rank {self._rank}")
        self._batches = BatchSource(
            self._calls,
            buffer,
            monitor,
            groups_per_step=self._config.learner.groups_per_step,
            timeout_s=self._config.run.timeout_s,
            is_stopping=lambda: self._stopping,
            sequence_parallel=self._config.learner.sequence_parallel,
        )
        self._run_dir, self._saved, self._publish_s = run_dir, -1, 0.0
        self._code_version = code_version()  # Once: it asks git.
        self._row: Future[Any] | None = None  # The newest that was sent to the monitor.
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
            share=self._ranks.first,
            mismatch_bound_nats=bound_nats(self._config),
        )
        session = self._ranks.first(secrets.token_hex(4))
        self._checkpoints = CheckpointWriter(
            run_dir,
            self._rank,
            self._ranks.count,
            session=session,
            timeout_s=self._config.run.timeout_s,
            on_event=self._calls.tell,
            on_durable=self._set_watermark,
        )

    def _mismatch_check(self, start_step: int) -> MismatchCheck:
        """Makes the check for a learner that starts at `start_step`. Collective."""
        is_first = self._rank == 0
        # The buffer may hold samples of versions up to this one, made by a learner that died since.
        known_until = self._ranks.first(self._calls.ask(self._buffer.next_step()) if is_first else 0)
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

    def _update(self, taken: Taken, progress: Progress) -> StepResult:
        """Takes one optimizer step. Raises StalenessError for a batch that is too old."""
        StalenessBound(self._config.buffer.max_staleness).check_batch(taken.share.index)
        self._num_threads = self._threads.follow()
        return self._updater.update(
            taken.share, learning_rate(progress.step, self._config.learner, self._config.run.steps)
        )

    def _judge(self, taken: Taken, result: StepResult, progress: Progress) -> dict[str, float]:
        """Lets the step count; returns the metrics of batch and step. Raises TrainingError as Guards do."""
        index = taken.share.index
        row = {**batch_metrics(index), **source_metrics(index, self._config), **result.metrics()}
        self._guards.judge(progress.step, taken.payload, row, result.skip)
        progress.observe(_trained(taken, result), row)
        return row

    def _is_published(self, step: int) -> bool:
        return step % self._config.weights.publish_every == 0 or step == self._config.run.steps

    def _is_saved(self, step: int) -> bool:
        every = self._config.checkpoint.every
        return every > 0 and step % every == 0

    def _publish(self, progress: Progress, evaluate: Sequence[str] | None = None) -> None:
        """Brings the weights on their way to the actors as version `progress.step`. Collective.

        `evaluate` names the suites to evaluate it on; None: those whose time has come.
        """
        start_s = time.perf_counter()
        version = progress.published = progress.step
        due = self._suites_due(version) if evaluate is None else evaluate
        self._transport.publish(version, evaluate=due)
        self._publish_s = time.perf_counter() - start_s

    def _suites_due(self, version: int) -> tuple[str, ...]:
        """Returns the suites to evaluate `version` on: those for which it is time, and at the end all."""
        is_last, every = version == self._config.run.steps, self._config.weights.publish_every
        return tuple(
            suite.name
            for suite in self._config.suites
            if is_last or suite.last_due(version, every) == version
        )

    def _report(self, taken: Taken, result: StepResult, row: Mapping[str, float], progress: Progress) -> None:
        """Tells monitor and buffer, from rank 0, what came of a step; `row` is what `_judge` returned."""
        if self._rank:
            return
        step_s = time.perf_counter() - taken.asked_s
        trained_tokens = sum(group.num_tokens for group in _trained(taken, result))
        whole = {
            **row,
            **progress.metrics(),
            "weights/publish_s": self._publish_s,
            "time/learner_busy_fraction": 1.0 - taken.wait_s / step_s,
            "perf/trained_all_tokens_per_s": trained_tokens / step_s,
            "perf/learner_threads": self._num_threads,
            **self._guards.metrics(),
            **self._transport.metrics(),
            **self._checkpoints.metrics(),
        }
        # In the order of the steps: a row takes back those of later steps.
        self._row = self._calls.post(self._monitor.log_step(whole), "a step's metrics", after=self._row)
        if self._config.buffer.uses_per_group > 1 and self._updater.keeps_reference:
            cached = self._buffer.set_ref_logprobs(result.by_group("ref_logprob"))
            self._calls.post(cached, "the reference's log-probs, which are computed again")
        if shows_samples(progress.step):
            shown = shown_samples(open_batch(taken.payload), result.by_group("advantage"))
            self._calls.post(self._monitor.log_samples(progress.step, shown), "samples to show")

    def _finish(self, progress: Progress, policy_dir: str) -> dict[str, float]:
        """Publishes and saves what is not yet, and writes the policy; returns totals. Collective."""
        is_evaluated = self._ranks.first(self._is_target_reached)
        if is_evaluated or progress.published != progress.step:
            self._publish(progress, evaluate=[suite.name for suite in self._config.suites if is_evaluated])
        self._transport.flush()
        if self._config.checkpoint.every:
            self._save(progress)
        self._checkpoints.close()  # Durable before the policy is written, which a full disk may prevent.
        return {**progress.totals(), "policy_written": float(self._write_policy(policy_dir))}

    def _write_policy(self, policy_dir: str) -> bool:
        """Writes the policy, and says whether it could (rank 0). Collective.

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
        """Begins the checkpoint of this step, unless it is what the run has already. Raises CheckpointError
        for a NaN.
        """
        if progress.step == max(0, self._saved):
            return
        self._saved = progress.step
        self._transport.flush()  # What it calls published can be had.
        # The monitor has the step's row first: a run that goes on from here has no other to write.
        self._checkpoints.save(progress.step, self._parts(), self._state(progress), first=self._row)

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
        """Takes over the state saved in `path`, and returns how far it was. A rank that the checkpoint has
        not keeps its random state.
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
        """Keeps the batches since the OLDEST checkpoint: the run goes on from it when the newer ones are
        damaged.
        """
        self._calls.ask(self._buffer.set_watermark(oldest_step))


def _trained(taken: Taken, result: StepResult) -> list[GroupHead]:
    """Returns the groups that the step trained: all of its batch, or none where it was skipped."""
    return [] if result.skip else list(taken.share.index.groups)


def _num_nodes() -> int:
    """Returns how many nodes a run can be on; a rank that Ray has not started is where its run is."""
    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
