"""The groups an engine is generating: what becomes of their samples at a deadline, at an update, at a
refusal.

    start --> samples in the engine, refilled across groups --step--> groups without an unfinished sample
                    |-- `sample_timeout_s`, `group_timeout_s`: truncated, or dropped without a token
                    |-- update: they go on, finish first, or start again (`actors.on_update`)
                    `-- the engine refuses the prompt: dropped

A group that ends may lack samples; `OpenGroup.reason` says why. Evaluation groups have no deadline of their
own: their samples have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from actors.engine import PromptRefused
from actors.episode import Episode, Generation
from actors.prompts import PromptRow
from buffer.usable import MIN_SAMPLES
from core.config import ActorsConfig
from core.evaluation.records import EvalItem
from core.records import Sample, WorkItem
from environments.one_turn import OneTurn


class Generator(Protocol):
    """An engine, or what stands in for one; `actors.engine.Engine` says more of each method."""

    version: int

    @property
    def num_unfinished(self) -> int:
        """Returns the number of requests that are submitted and not finished."""
        ...

    @property
    def num_tokens_under_way(self) -> int:
        """Returns the tokens generated so far by these."""
        ...

    def submit(
        self,
        request_id: str,
        tokens: Sequence[int],
        *,
        seed: int | None,
        temperature: float | None,
        max_tokens: int | None,
        stop: Sequence[str] = (),
    ) -> None:
        """Queues a request to go on from `tokens`."""

    def step(self) -> list[tuple[str, Generation]]:
        """Makes one forward pass and returns what finished with it."""
        ...

    def overdue(self, timeout_s: float) -> list[str]:
        """Returns the requests that have run for longer than `timeout_s`."""
        ...

    def truncate(self, request_ids: list[str]) -> list[tuple[str, Generation]]:
        """Ends requests and returns what they have."""
        ...

    def abort(self, request_ids: list[str]) -> None:
        """Drops requests."""

    def load_weights(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Swaps in the weights of `version`."""


@dataclass
class OpenGroup:
    """A prompt whose samples are being generated.

    samples     by number: None while unfinished, and for good when dropped
    offline     those that make up the group with them
    unfinished  numbers of the samples still in the engine
    reason      why samples were cut or dropped; empty when none was
    """

    item: WorkItem | EvalItem
    prompt: PromptRow
    samples: list[Sample | None]
    offline: Sequence[Sample] = ()
    temperature: float | None = None
    submitted_s: float = 0.0
    reason: str = ""
    unfinished: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = {number for number, sample in enumerate(self.samples) if sample is None}

    @property
    def key(self) -> str:
        """Returns the name of the group among those open; its requests are `key-number`."""
        item = self.item
        return (
            f"train-{item.ordinal}"
            if isinstance(item, WorkItem)
            else f"eval-{item.suite}-{item.policy_version}-{item.prompt_index}"
        )

    @property
    def is_training(self) -> bool:
        """Returns whether the group is of the prompt stream, not of an evaluation."""
        return isinstance(self.item, WorkItem)

    @property
    def members(self) -> list[Sample]:
        """Returns the samples there are: those generated, in order, then the offline ones."""
        return [*(sample for sample in self.samples if sample is not None), *self.offline]

    @property
    def is_too_small(self) -> bool:
        """Returns whether this is a training group that carries no signal."""
        return self.is_training and len(self.members) < MIN_SAMPLES


class _Request(NamedTuple):
    group: OpenGroup
    number: int
    episode: Episode


class Groups:
    """The groups in `engine`, and counters of what happened to them.

    samples_truncated_late, samples_dropped   ended by a deadline, with tokens and without
    samples_restarted                         begun again at an update (`on_update: abort`)
    groups_partial                            training groups handed on with samples missing
    updates, apply_s, pause_total_s           weights loaded; seconds that generation paused, last and in all
    """

    def __init__(
        self, engine: Generator, config: ActorsConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine, self._config, self._clock = engine, config, clock
        self._requests: dict[str, _Request] = {}
        self._open: dict[str, OpenGroup] = {}  # In the order of their submission.
        counted = (
            "generated_tokens",
            "generated_samples",
            "samples_truncated_late",
            "samples_dropped",
            "samples_restarted",
        )
        self.counters: dict[str, float] = dict.fromkeys(
            (*counted, "groups_partial", "updates", "pause_total_s"), 0.0
        )

    def __len__(self) -> int:
        return len(self._open)

    def start(self, group: OpenGroup) -> None:
        """Submits the samples that are missing."""
        group.submitted_s = self._clock()
        self._open[group.key] = group
        for number in sorted(group.unfinished):
            self._submit(group, number)

    def step(self) -> list[OpenGroup]:
        """Applies the deadlines, makes one forward pass, and returns the groups that ended."""
        ended = self._end_late()
        if self._engine.num_unfinished:
            try:
                finished = self._engine.step()
            except PromptRefused as refused:
                return ended + self._refuse(refused)
            for request_id, sample in finished:
                ended += self._settle(request_id, sample)
        return ended

    def update(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> bool:
        """Loads weights as `actors.on_update` says.

        Returns False while unfinished samples come first (`drain`: the caller starts no others).
        """
        if self._config.on_update == "drain" and self._engine.num_unfinished:
            return False
        start_s = time.perf_counter()
        self._engine.load_weights(version, weights)
        self.updated(start_s)
        return True

    def updated(self, start_s: float) -> None:
        """Counts an update: new weights are in place, and generation has stood still since `start_s`
        (`time.perf_counter`).
        """
        if self._config.on_update == "abort":
            self._restart()
        pause_s = time.perf_counter() - start_s
        self.counters["apply_s"] = pause_s
        self.counters["pause_total_s"] += pause_s
        self.counters["updates"] += 1

    def _submit(self, group: OpenGroup, number: int) -> None:
        request_id = f"{group.key}-{number}"
        episode = Episode(OneTurn(), group.prompt.token_ids)
        self._requests[request_id] = _Request(group, number, episode)
        seed = (group.item.seed + number) % 2**31
        self._engine.submit(
            request_id, episode.tokens, seed=seed, temperature=group.temperature, max_tokens=None
        )

    def _restart(self) -> None:
        """Starts training samples under way again, by the new weights: nothing was generated since these were
        loaded.
        """
        again = {request_id: entry for request_id, entry in self._requests.items() if entry.group.is_training}
        self._engine.abort(list(again))
        for group, number, _ in again.values():
            self._submit(group, number)
        self.counters["samples_restarted"] += len(again)

    def _end_late(self) -> list[OpenGroup]:
        late = self._late()
        truncated = dict(self._engine.truncate(list(late))) if late else {}
        ended = []
        for request_id, reason in late.items():
            self._requests[request_id].group.reason = reason
            self.counters["samples_truncated_late" if request_id in truncated else "samples_dropped"] += 1
            ended += self._settle(request_id, truncated.get(request_id))
        return ended

    def _late(self) -> dict[str, str]:
        """Returns the requests past a deadline, and which deadline that is."""
        late: dict[str, str] = {}
        if self._config.sample_timeout_s is not None:
            late |= dict.fromkeys(self._engine.overdue(self._config.sample_timeout_s), "sample_timeout")
        if self._config.group_timeout_s is not None:
            deadline_s = self._clock() - self._config.group_timeout_s
            for group in self._open.values():
                if group.submitted_s >= deadline_s:
                    break  # So are all that follow.
                if group.is_training:
                    late |= {f"{group.key}-{number}": "group_timeout" for number in sorted(group.unfinished)}
        return late

    def _refuse(self, refused: PromptRefused) -> list[OpenGroup]:
        """Ends the whole group of a refused request, since its samples have one prompt."""
        group = self._requests[refused.request_id].group
        group.reason = str(refused)
        request_ids = [f"{group.key}-{number}" for number in sorted(group.unfinished)]
        self._engine.abort(request_ids)
        return [ended for request_id in request_ids for ended in self._settle(request_id, None)]

    def _settle(self, request_id: str, generation: Generation | None) -> list[OpenGroup]:
        """Notes that a request has ended, with what it generated or with nothing; returns its group if that
        was the last one.

        An environment that is not done would go on from here: its observation is given to the episode's
        `observe`, and the episode's tokens to the engine, under the same id. `OneTurn` is always done.
        """
        group, number, episode = self._requests.pop(request_id)
        group.unfinished.discard(number)
        if generation is not None:
            episode.act(generation)
            sample = group.samples[number] = episode.sample()
            if group.is_training:
                self.counters["generated_tokens"] += sample.num_sampled
                self.counters["generated_samples"] += 1
        if group.unfinished:
            return []
        del self._open[group.key]
        self.counters["groups_partial"] += (
            group.is_training and None in group.samples and not group.is_too_small
        )
        return [group]
