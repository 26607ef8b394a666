"""The rollout actor: leases prompts, generates with whatever weights it has, has them scored, inserts whole groups.

With offline data, some samples of each group are taken from there; where all are, this actor only evaluates.

    buffer --lease--> WorkItems --engine--> Samples --reward pool--> Group --insert--> buffer
    board  --poll---> newer snapshot: fetched while generation goes on, applied between two engine steps
                      evaluation items: exactly their version is loaded, and kept until they are done

The loop never waits while there is something to generate. Its waits are counters: `wait_admission_s` (the buffer admits
no more work), `wait_weights_s` (before the first snapshot: an actor is not eligible until it has one) and
`wait_evaluation_s` (it only evaluates, and there is nothing to).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import ray

from actors.engine import Engine
from actors.offline import choose_samples, with_scores
from actors.prompts import PromptRow, PromptSet
from buffer.records import EvalItem, EvalSample, Group, Sample, WorkItem, encode
from cluster.board import Directive
from cluster.config import Config
from cluster.errors import SnapshotError
from cluster.weights import Manifest, read_snapshot
from rewards.pool import RewardPool
from rewards.scoring import Scored

POLL_S = 5.0
REPORT_EVERY_S = 1.0
IDLE_S = 0.1
SCORING_S = 0.002
RETRY_S = 1.0


@dataclass
class OpenGroup:
    """A prompt whose samples are being generated: those that are None; the others are offline samples."""

    item: WorkItem | EvalItem
    row: PromptRow
    samples: list[Sample | None]
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = self.samples.count(None)


class RolloutActor:
    """One vLLM engine and its loop; `cluster.run` makes it a Ray actor. `run` returns when the board retires it."""

    def __init__(
        self, name: str, config: Config, prompts: PromptSet, eval_prompts: PromptSet, buffer: Any, board: Any, monitor: Any
    ) -> None:
        self._name, self._config = name, config
        if config.actors.num_cpus < 1 and not config.actors.num_gpus:
            os.nice(4)  # Sharing a core with the learner, which is what everything waits for: step back.
        self._prompts, self._eval_prompts = prompts, eval_prompts
        self._buffer, self._board, self._monitor = buffer, board, monitor
        self._rewards = RewardPool(config.rewards)
        seed = (config.run.seed * 1_000_003 + sum(name.encode()) * 7919) % 2**31
        self._engine = Engine(config.model, config.actors, max_model_len=config.max_sequence_tokens, seed=seed, version=-1)
        self._work: deque[WorkItem] = deque()
        self._ordinals: set[int] = set()  # Of the groups being generated or scored here.
        self._open: dict[str, tuple[OpenGroup, int]] = {}
        self._scoring: list[tuple[OpenGroup, Future]] = []
        self._evaluating = 0
        self._directive: Directive | None = None
        self._buckets: tuple[Manifest, list] | None = None
        self._calls: dict[str, Any] = {}  # At most one outstanding Ray call of each kind.
        self._inserts: list[Any] = []
        self._leasing_version = self._outdated_version = -1  # What the newest lease was asked with; what the buffer refused.
        self._retry_at_s = self._reported_s = 0.0
        self._retired = False
        waits = ("wait_admission_s", "wait_evaluation_s", "wait_weights_s")
        counted = ("generated_tokens", "generated_samples", "groups", "busy_s", *waits, "updates", "errors")
        self._counters: dict[str, float] = dict.fromkeys(counted, 0.0)

    def run(self) -> dict[str, float]:
        """Generate until retired; the final counters."""
        while not self._retired:
            self._follow_board()
            self._take_work()
            if self._engine.num_unfinished:
                self._generate()
            else:
                self._idle()
            self._deliver()
            self._report()
        ray.get(self._inserts, timeout=self._timeout_s)
        # What is leased, or about to be: the buffer hands it to another actor, or to the next start of the run.
        ray.get(self._buffer.release_actor.remote(self._name), timeout=self._timeout_s)
        self._rewards.close()
        return dict(self._counters)

    @property
    def _timeout_s(self) -> float:
        return self._config.run.timeout_s

    # --- the board: weights and evaluations -----------------------------------------------------------------------

    def _follow_board(self) -> None:
        if self._directive is None and not self._evaluating and time.monotonic() >= self._retry_at_s:
            if "poll" not in self._calls:
                max_items = max(1, self._config.actors.slots // self._config.eval.samples)
                self._calls["poll"] = self._board.poll.remote(self._name, self._engine.version, max_items, POLL_S)
            elif (payload := self._answer("poll")) is not None:
                self._obey(msgspec.msgpack.decode(payload, type=Directive))
        if self._directive is not None:
            self._fetch_snapshot(self._directive)

    def _obey(self, directive: Directive) -> None:
        self._retired = directive.retire
        if directive.version != self._engine.version:
            self._directive = directive
        else:
            self._start_evaluating(directive.eval_items)

    def _fetch_snapshot(self, directive: Directive) -> None:
        """Pull the directive's snapshot, over as many turns of the loop as it takes; apply it when all of it is here."""
        if self._buckets is None:
            if "snapshot" not in self._calls:
                self._calls["snapshot"] = self._board.snapshot.remote(directive.version)
            elif self._is_ready("snapshot"):
                snapshot = self._answer("snapshot")
                if snapshot is None:  # Dropped for newer ones since: ask again.
                    self._drop_directive()
                    return
                self._buckets = (msgspec.msgpack.decode(snapshot[0], type=Manifest), snapshot[1])
        if self._buckets is not None:
            manifest, references = self._buckets
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=True)
            if len(ready) == len(references):
                self._apply(directive, manifest, ray.get(references, timeout=self._timeout_s))

    def _apply(self, directive: Directive, manifest: Manifest, buckets: list[np.ndarray]) -> None:
        self._directive = self._buckets = None
        start_s = time.perf_counter()
        try:
            weights = read_snapshot(manifest, buckets)
        except SnapshotError as error:  # The old weights stay; the samples say so.
            self._counters["errors"] += 1
            self._monitor.event.remote(f"{self._name} keeps version {self._engine.version}: {error}")
            self._drop_directive()
            return
        self._engine.load_weights(manifest.version, weights)
        self._counters["apply_s"] = time.perf_counter() - start_s
        self._counters["updates"] += 1
        self._start_evaluating(directive.eval_items)

    def _drop_directive(self) -> None:
        """Not to be done: evaluation items go back to the board, and the board is asked again in a while."""
        self._directive = None
        self._retry_at_s = time.monotonic() + RETRY_S
        self._inserts.append(self._board.give_back.remote(self._name))

    def _start_evaluating(self, items: tuple[EvalItem, ...]) -> None:
        for item in items:
            self._evaluating += 1
            self._submit(item, self._eval_prompts[item.row], self._config.eval.samples, self._config.eval.temperature)

    # --- work -----------------------------------------------------------------------------------------------------

    def _take_work(self) -> None:
        """Keep the engine's slots full, and a few leases at hand to refill them."""
        actors = self._config.actors
        if self._engine.version < 0 or self._config.is_offline:
            return
        reserve = max(1, actors.slots // (2 * actors.group_size))
        if "lease" in self._calls and self._is_ready("lease"):
            payloads = self._answer("lease")
            if payloads is None:
                self._outdated_version = self._leasing_version
            self._work.extend(msgspec.msgpack.decode(payload, type=WorkItem) for payload in payloads or ())
        if "lease" not in self._calls and len(self._work) < reserve and self._engine.version != self._outdated_version:
            self._leasing_version = self._engine.version
            self._calls["lease"] = self._buffer.lease.remote(self._name, reserve, POLL_S, self._leasing_version)
        while self._work and self._engine.num_unfinished < actors.slots:
            item = self._work.popleft()
            if item.ordinal in self._ordinals:
                continue  # Its lease ran out while it is still being generated here: the one under way will do.
            self._ordinals.add(item.ordinal)
            row = self._prompts[item.row]
            offline = choose_samples(row, self._config.offline_samples, item.seed)
            self._submit(item, row, actors.group_size - len(offline), actors.temperature, offline)

    def _submit(self, item: WorkItem | EvalItem, row: PromptRow, count: int, temperature: float, offline: Sequence[Sample] = ()) -> None:
        """Generate `count` samples; `offline`: those that make up the group with them."""
        group = OpenGroup(item, row, [*[None] * count, *offline])
        key = f"train-{item.ordinal}" if isinstance(item, WorkItem) else f"eval-{item.evaluation_id}-{item.row}"
        for index in range(count):
            request_id = f"{key}-{index}"
            self._open[request_id] = (group, index)
            self._engine.submit(request_id, row.token_ids, seed=(item.seed + index) % 2**31, temperature=temperature)

    def _generate(self) -> None:
        start_s = time.perf_counter()
        for request_id, sample in self._engine.step():
            group, index = self._open.pop(request_id)
            group.samples[index] = sample
            group.missing -= 1
            if isinstance(group.item, WorkItem):
                self._counters["generated_tokens"] += len(sample.token_ids)
                self._counters["generated_samples"] += 1
            if not group.missing:
                texts = [sample.text for sample in group.samples if sample is not None]
                self._scoring.append((group, self._rewards.submit(group.row.text, texts, group.row.columns)))
        self._counters["busy_s"] += time.perf_counter() - start_s

    def _deliver(self) -> None:
        """Insert the groups whose rewards are there; hand evaluations to the board."""
        groups, evaluated = [], []
        scored = self._take_scored()
        for group, scores in scored:
            samples = with_scores([sample for sample in group.samples if sample is not None], scores)
            self._counters["errors"] += sum(sample.error is not None for sample in samples)
            if isinstance(group.item, WorkItem):
                self._ordinals.discard(group.item.ordinal)
                groups.append(encode(self._group(group.item, group.row, samples)))
            else:
                evaluated.append(_eval_sample(group.item, group.row, samples))
        if groups:
            self._counters["groups"] += len(groups)
            self._inserts.append(self._buffer.insert.remote(self._name, groups))
        if evaluated:
            self._evaluating -= len(evaluated)
            self._inserts.append(self._board.finish.remote(msgspec.msgpack.encode(evaluated)))
        if self._inserts:
            done, self._inserts = ray.wait(self._inserts, num_returns=len(self._inserts), timeout=0)
            ray.get(done)  # Raises here what the buffer refused.

    def _take_scored(self) -> list[tuple[OpenGroup, list[Scored]]]:
        """The groups whose rewards are there, no longer among those being scored."""
        scored, waiting = [], []
        for group, future in self._scoring:  # Each asked once: a future may be done a moment after it was not.
            if future.done():
                scored.append((group, future.result()))
            else:
                waiting.append((group, future))
        self._scoring = waiting
        return scored

    def _group(self, item: WorkItem, row: PromptRow, samples: list[Sample]) -> Group:
        return Group(
            group_id=item.ordinal, row=row.row, prompt=row.text, prompt_ids=row.token_ids, samples=tuple(samples), actor=self._name
        )

    # --- waiting and telling --------------------------------------------------------------------------------------

    def _is_ready(self, call: str) -> bool:
        return bool(ray.wait([self._calls[call]], timeout=0)[0])

    def _answer(self, call: str) -> Any:
        """The result of an outstanding call, or None while there is none."""
        return ray.get(self._calls.pop(call), timeout=self._timeout_s) if self._is_ready(call) else None

    def _idle(self) -> None:
        """Nothing to generate: wait for an answer, and count what for."""
        start_s = time.perf_counter()
        waiting = [*self._calls.values(), *self._inserts]
        limit_s = SCORING_S if self._scoring else IDLE_S
        if waiting:
            ray.wait(waiting, num_returns=1, timeout=limit_s)
        else:
            time.sleep(limit_s)
        wait = "wait_evaluation_s" if self._config.is_offline else "wait_admission_s"
        wait = "wait_weights_s" if self._engine.version in (-1, self._outdated_version) else wait
        self._counters[wait] += time.perf_counter() - start_s

    def _report(self) -> None:
        if time.monotonic() - self._reported_s >= REPORT_EVERY_S:
            self._reported_s = time.monotonic()
            self._monitor.log_actor.remote(self._name, {**self._counters, "version": self._engine.version})


def _eval_sample(item: EvalItem, row: PromptRow, samples: list[Sample]) -> EvalSample:
    return EvalSample(
        item=item,
        prompt=row.text,
        texts=tuple(sample.text for sample in samples),
        rewards=tuple(sample.reward for sample in samples),
        errors=tuple(sample.error for sample in samples),
        version_spans=tuple(sample.version_spans for sample in samples),
    )
