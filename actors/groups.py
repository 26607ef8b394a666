"""The groups an engine is generating: what becomes of their samples at a deadline, at an update, at a
refusal.

    start --> samples in the engine, refilled across groups --step--> groups without an unfinished sample
                 ^  |-- `sample_timeout_s`, `group_timeout_s`: truncated, or dropped without a token
                 |  |-- update: they go on, finish first, or start again (`actors.on_update`)
                 |  `-- the engine refuses the prompt: dropped
                 `--poll-- samples that wait for their environment, which take no slot meanwhile

A group that ends may lack samples; `OpenGroup.reason` says why. Evaluation groups have no deadline of their
own: their samples have.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from actors.engine import PromptRefused
from actors.episode import MAX_NEW_TOKENS, Ask, Episode, Generation
from actors.playing.played import MAX_SEQUENCE_TOKENS, MAX_TURNS
from actors.playing.player import Player
from actors.prompts import PromptRow
from buffer.usable import MIN_SAMPLES
from core.config import ActorsConfig
from core.evaluation.records import EvalItem
from core.records import Sample, WorkItem

EPISODES_PER_SLOT = 2
"""Open at most: the slots of those that wait for their environments serve others, but each open episode has a
place in a process, and ages.
"""
RESET_SOON_S = 0.5
"""An environment that takes longer to begin with has no slot kept free for it."""
FINISH_LIMIT_S = 5.0
"""For an environment to say what an episode is worth that a deadline cut."""
_SEED_STEP = 1_000_003
"""Between the seeds of the turns of a sample; those of a group's samples follow one another."""
_KINDS = {"timeout": "timeouts", "crash": "crashes", "memory": "crashes"}
"""Which counter an environment's failure counts in, where that is not `environment_errors`."""
_LIMITS = (MAX_TURNS, MAX_NEW_TOKENS, MAX_SEQUENCE_TOKENS)


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
    unfinished  those still open, by number
    attributes  by number what reward functions may see of the environments of samples, packed
    silences    by number which environments of samples had not answered at a deadline, in words
    reason      why samples were cut or dropped; empty when none was
    """

    item: WorkItem | EvalItem
    prompt: PromptRow
    samples: list[Sample | None]
    offline: Sequence[Sample] = ()
    temperature: float | None = None
    submitted_s: float = 0.0
    reason: str = ""
    unfinished: dict[int, OpenSample | None] = field(init=False)
    attributes: dict[int, bytes] = field(default_factory=dict)
    silences: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.unfinished = {number: None for number, sample in enumerate(self.samples) if sample is None}

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
    def member_attributes(self) -> list[bytes | None]:
        """Returns the attributes of the environments of `members`, None where there are none."""
        generated = [number for number, sample in enumerate(self.samples) if sample is not None]
        return [*map(self.attributes.get, generated), *[None] * len(self.offline)]

    @property
    def is_too_small(self) -> bool:
        """Returns whether this is a training group that carries no signal."""
        return self.is_training and len(self.members) < MIN_SAMPLES


class OpenSample:
    """A sample of a group that is not finished.

    request_ids  its questions that the engine has, by their turn
    begun_s      when its episode was opened
    late_s       when a deadline cut it; None before
    """

    __slots__ = ("begun_s", "episode", "group", "late_s", "number", "request_ids")

    def __init__(self, group: OpenGroup, number: int, episode: Episode, begun_s: float) -> None:
        self.group, self.number, self.episode, self.begun_s = group, number, episode, begun_s
        self.request_ids: dict[int, str] = {}
        self.late_s: float | None = None

    @property
    def key(self) -> str:
        """Returns its name among those open."""
        return f"{self.group.key}-{self.number}"


class _Request(NamedTuple):
    sample: OpenSample
    turn: int


class Groups:
    """The groups that an actor generates, by `engine` and the episodes that `player` begins, and counters of
    what happened to them.

    samples_truncated_late, samples_dropped   ended by a deadline, with tokens and without
    samples_restarted                         begun again at an update (`on_update: abort`)
    groups_partial                            training groups handed on with samples missing
    turns, tool_calls, tool_errors            of finished samples; calls that gave no result
    cut_at_max_turns, _max_new_tokens, _max_sequence_tokens     finished samples that this limit cut
    environment_errors, _timeouts, _crashes   episodes that their environment ended by raising, by silence, by
                                              dying or using too much memory
    environment_s, environment_answers        seconds that episodes waited for their environments, and for how
                                              many answers
    updates, apply_s, pause_total_s           weights loaded; seconds that generation paused, last and in all
    """

    def __init__(
        self,
        engine: Generator,
        config: ActorsConfig,
        clock: Callable[[], float] = time.monotonic,
        player: Player | None = None,
    ) -> None:
        self._engine, self._config, self._clock = engine, config, clock
        self._player = player or Player()
        self._requests: dict[str, _Request] = {}
        self._waiting: dict[str, OpenSample] = {}
        self._open: dict[str, OpenGroup] = {}  # In the order of their submission.
        counted = (
            "generated_tokens",
            "generated_samples",
            "samples_truncated_late",
            "samples_dropped",
            "samples_restarted",
            "turns",
            "tool_calls",
            "tool_errors",
            *(f"cut_at_{limit}" for limit in _LIMITS),
            *(f"environment_{kind}" for kind in ("errors", "timeouts", "crashes", "s", "answers")),
        )
        self.counters: dict[str, float] = dict.fromkeys(
            (*counted, "groups_partial", "updates", "pause_total_s"), 0.0
        )

    def __len__(self) -> int:
        return len(self._open)

    @property
    def has_room(self) -> bool:
        """Returns whether a slot is free for another group: none of those whose environments are being reset
        will want it soon, and not too many are open.
        """
        slots, coming = self._config.slots, self._engine.num_unfinished
        if self._waiting:
            since_s = self._clock() - RESET_SOON_S
            coming += sum(
                sample.begun_s > since_s and not sample.episode.num_asked for sample in self._waiting.values()
            )
            if len(self._requests) + len(self._waiting) >= EPISODES_PER_SLOT * slots:
                return False
        return coming < slots

    @property
    def num_tokens_under_way(self) -> int:
        """Returns the tokens that the policy has said so far in samples that are not finished."""
        said = self._engine.num_tokens_under_way
        if self._player.has_environments:
            said += sum(sample.episode.num_sampled for sample in self._all_open())
        return said

    @property
    def is_waiting(self) -> bool:
        """Returns whether any sample waits for its environment."""
        return bool(self._waiting)

    def wait(self, futures: Iterable[Future[Any]], timeout_s: float) -> None:
        """Waits, for a caller that has nothing else to do, until one of `futures` is done or an environment
        has answered; at most for so long.
        """
        awaited = (future for sample in self._waiting.values() for future in sample.episode.futures)
        self._player.wait([*futures, *awaited], timeout_s)

    def start(self, group: OpenGroup) -> None:
        """Begins the samples that are missing."""
        group.submitted_s = self._clock()
        self._open[group.key] = group
        for number in sorted(group.unfinished):
            self._begin(group, number)

    def poll(self) -> list[OpenGroup]:
        """Applies the deadlines and takes what environments have answered; returns the groups that ended."""
        self._player.turn()
        ended = self._end_late()
        for sample in [sample for sample in self._waiting.values() if sample.episode.is_ready]:
            ended += self._go_on(sample)
        return ended

    def step(self) -> list[OpenGroup]:
        """Polls, makes one forward pass, and returns the groups that ended."""
        ended = self.poll()
        if self._engine.num_unfinished:
            try:
                finished = self._engine.step()
            except PromptRefused as refused:
                return ended + self._refuse(refused)
            for request_id, generation in finished:
                sample, turn = self._requests.pop(request_id)
                del sample.request_ids[turn]
                sample.episode.act(turn, generation)
                ended += self._go_on(sample)
            self._player.turn()  # They answer while the caller does other things.
        return ended

    def update(self, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> bool:
        """Loads weights as `actors.on_update` says.

        Returns False while unfinished samples come first (`drain`: the caller starts no others).
        """
        if self._config.on_update == "drain" and (self._engine.num_unfinished or self._waiting):
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

    def close(self) -> None:
        """Ends all environments."""
        self._player.close()

    def _begin(self, group: OpenGroup, number: int) -> None:
        # One seed for all samples of a group: they differ in what the policy says, not in what it is told.
        episode = self._player.begin(group.prompt, group.item.seed)
        sample = group.unfinished[number] = OpenSample(group, number, episode, self._clock())
        for ask in episode.poll():
            self._ask(sample, ask)
        if not sample.request_ids:
            self._waiting[sample.key] = sample

    def _ask(self, sample: OpenSample, ask: Ask) -> None:
        """Submits a question of an episode to the engine; the first has the name of the sample."""
        group, turn = sample.group, ask.turn
        request_id = f"{sample.key}-{turn}" if turn else sample.key
        sample.request_ids[turn] = request_id
        self._requests[request_id] = _Request(sample, turn)
        self._engine.submit(
            request_id,
            ask.tokens,
            seed=(group.item.seed + sample.number + turn * _SEED_STEP) % 2**31,
            temperature=group.temperature,
            max_tokens=ask.max_tokens,
            stop=ask.stop,
        )

    def _go_on(self, sample: OpenSample) -> list[OpenGroup]:
        """Asks the engine what an episode wants to know now, or takes what is left of it when it is over."""
        episode = sample.episode
        for ask in episode.poll():
            self._ask(sample, ask)
        if episode.is_over:
            return self._settle(sample, episode.sample())
        if episode.futures:
            self._waiting[sample.key] = sample
        else:
            self._waiting.pop(sample.key, None)
        return []

    def _restart(self) -> None:
        """Starts training samples under way again, by the new weights: nothing was generated since these were
        loaded. Those whose environment is being reset have nothing of the old ones.
        """
        again = [
            sample for sample in self._all_open() if sample.group.is_training and sample.episode.num_asked
        ]
        self._drop(again)
        for sample in again:
            sample.episode.close()
            self._begin(sample.group, sample.number)
        self.counters["samples_restarted"] += len(again)

    def _drop(self, samples: Iterable[OpenSample]) -> None:
        """Takes samples out of the engine and from those that wait."""
        request_ids: list[str] = []
        for sample in samples:
            request_ids += sample.request_ids.values()
            self._waiting.pop(sample.key, None)
        for request_id in request_ids:
            del self._requests[request_id]
        self._engine.abort(request_ids)

    def _end_late(self) -> list[OpenGroup]:
        ended = []
        for sample, reason in self._late():
            requests, sample.request_ids = sample.request_ids, {}
            truncated = dict(self._engine.truncate([*requests.values()])) if requests else {}
            for request_id in requests.values():
                del self._requests[request_id]
            said = {turn: truncated[name] for turn, name in requests.items() if name in truncated}
            sample.group.reason = reason
            if sample.late_s is None:
                is_kept = bool(said) or sample.episode.num_sampled > 0
                self.counters["samples_truncated_late" if is_kept else "samples_dropped"] += 1
            sample.late_s = self._clock()
            sample.episode.end_late(said)
            ended += self._go_on(sample)
        return ended

    def _late(self) -> list[tuple[OpenSample, str]]:
        """Returns the samples past a deadline, and which deadline that is. Those that one has cut before are
        among them once they have had FINISH_LIMIT_S.
        """
        sample_s, group_s = self._config.sample_timeout_s, self._config.group_timeout_s
        if sample_s is None and group_s is None:
            return []
        late: dict[str, tuple[OpenSample, str]] = {}
        now_s = self._clock()
        if sample_s is not None:
            found = [self._requests[request_id].sample for request_id in self._engine.overdue(sample_s)]
            if self._player.has_environments:
                found += [sample for sample in self._all_open() if now_s - sample.begun_s > sample_s]
            late |= {sample.key: (sample, "sample_timeout") for sample in found}
        if group_s is not None:
            for group in self._open.values():
                if group.submitted_s >= now_s - group_s:
                    break  # So are all that follow.
                if group.is_training:
                    late |= {sample.key: (sample, "group_timeout") for sample in _open_samples(group)}
        return [
            (sample, reason)
            for sample, reason in late.values()
            if sample.late_s is None or now_s - sample.late_s > FINISH_LIMIT_S
        ]

    def _all_open(self) -> Iterator[OpenSample]:
        return itertools.chain.from_iterable(map(_open_samples, self._open.values()))

    def _refuse(self, refused: PromptRefused) -> list[OpenGroup]:
        """Ends what a refused request belongs to: the whole group, since its samples have one prompt, but a
        sample with an environment alone.
        """
        sample = self._requests[refused.request_id].sample
        sample.group.reason = str(refused)
        ended = []
        for each in [sample] if self._player.has_environments else _open_samples(sample.group):
            self._drop([each])
            each.episode.fail(str(refused))
            ended += self._go_on(each)
        return ended

    def _settle(self, sample: OpenSample, finished: Sample | None) -> list[OpenGroup]:
        """Notes that a sample has ended, with what is kept of it or with nothing; returns its group if that
        was the last one.
        """
        group, number, episode = sample.group, sample.number, sample.episode
        del group.unfinished[number]
        episode.close()
        if finished is not None:
            group.samples[number] = finished
            self._count(episode, finished, group.is_training)
        if self._player.has_environments:
            self._waiting.pop(sample.key, None)
            self._count_environment(episode)
            if episode.attributes is not None:
                group.attributes[number] = episode.attributes
            if episode.silence:
                group.silences[number] = episode.silence
        if group.unfinished:
            return []
        del self._open[group.key]
        self.counters["groups_partial"] += (
            group.is_training and None in group.samples and not group.is_too_small
        )
        return [group]

    def _count(self, episode: Episode, finished: Sample, is_training: bool) -> None:
        counters = self.counters
        if episode.limit in _LIMITS:
            counters[f"cut_at_{episode.limit}"] += 1
        if is_training:
            counters["generated_tokens"] += finished.num_sampled
            counters["generated_samples"] += 1
            counters["turns"] += finished.turns

    def _count_environment(self, episode: Episode) -> None:
        counters = self.counters
        counters["environment_s"] += episode.environment_s
        counters["environment_answers"] += episode.num_answers
        counters["tool_calls"] += episode.num_tool_calls
        counters["tool_errors"] += episode.num_tool_errors
        if episode.failure:
            counters[f"environment_{_KINDS.get(episode.failure, 'errors')}"] += 1


def _open_samples(group: OpenGroup) -> list[OpenSample]:
    return [sample for _, sample in sorted(group.unfinished.items()) if sample is not None]
