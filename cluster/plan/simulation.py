"""A run in virtual time: the buffer's own admission, sampler and staleness, with engines and a learner that
only take their time. Pure, and the same for the same arguments.

    actors   lease items (buffer/admission.py), one at a time as slots become free; a group's samples are sequences
             of their own lengths; an engine's step gives each a token, and takes longer the more there are
    buffer   buffer/replay.py with the config's sampler, capacity, uses, band and bound
    learner  takes a batch as soon as the buffer has one, trains for its time, publishes every few steps
    weights  reach all actors some seconds later; each stands still while it loads, and goes on with what it had begun

Time jumps from event to event. Left out are deaths, rewards that take long, and shards; evaluations make the
engines slower by their share of the tokens.
"""

from __future__ import annotations

import functools
import heapq
import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

from buffer.admission import Admission
from buffer.band import Band
from buffer.replay import EVICTIONS, Replay
from buffer.sampling import GroupMeta
from core.config import Config
from core.errors import ConfigError
from core.staleness import StalenessBound, staleness

LENGTH_SPREAD = 0.6
"""Standard deviation of the logarithm of an answer's length."""
_NORMAL = NormalDist()
HALVINGS = 50
GRAINS = 50
"""Of an average answer, at which sequences end: those of one engine that end together are one event."""
IN_VAIN = 10
"""Times all that may exist untrained: so much generated without a batch, and there will be none."""
MAX_SAMPLES = 120_000
"""Samples of one simulation: some seconds of one core."""
MIN_STEPS, WARM_SHARE = 12, 0.4
"""Steps at least, and the share of them that is not counted: the buffer fills."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """How quick the parts are, in seconds. `engine_step_s` gives those of an engine's step by its running
    sequences; `train_s` holds what publishing takes of a step. Of more busy parts than `cores` each is slower
    by as much.
    """

    actors: int
    slots: int
    engine_step_s: Callable[[float], float]
    train_s: float
    arrive_s: float = 0.0
    pause_s: float = 0.0
    new_tokens: float = 100.0
    max_new_tokens: int = 1024
    cores: float = math.inf


@dataclass(frozen=True)
class Outcome:
    """What a simulated run did once it was warm.

    step_s             of an optimizer step, waits included
    learner_busy       share of the time that the learner trained
    slots_busy         share of all slots in which a sequence ran
    admission_wait     share of the actors' time in which some slot waited to be admitted
    staleness          mean, 95th percentile and largest staleness of the groups trained on
    num_steps          steps that were played, the first ones included that are not counted
    evicted            groups that left untrained, a trained one, by reason
    """

    step_s: float
    learner_busy: float
    slots_busy: float
    admission_wait: float
    staleness: tuple[float, float, float]
    num_steps: int
    evicted: dict[str, float]


@dataclass
class _Begun:
    """A group that is generated: samples that have not begun, and those that have not ended."""

    ordinal: int
    to_begin: int
    to_end: int
    oldest_version: int | None = None


@dataclass
class _Actor:
    """An engine: `tokens` counts its steps, in which each running sequence got one."""

    name: str
    step_s: float = math.inf
    tokens: float = 0.0
    at_s: float = 0.0
    resumes_at_s: float = 0.0
    version: int = 0
    stamp: int = 0
    waits_since_s: float | None = None
    ends: list[tuple[float, int, _Begun]] = field(default_factory=list)
    beginning: _Begun | None = None


def cut_mean(log_mean: float, limit: float) -> float:
    """Returns the mean of lognormal lengths of spread LENGTH_SPREAD that are cut at 1 and at `limit`.

    With z the normal distribution, m the mean of the logarithm and s its spread, between the two cuts it is
    exp(m + s^2/2) (z((ln limit - m)/s - s) - z(-m/s - s)).
    """
    below = _NORMAL.cdf(-log_mean / LENGTH_SPREAD)
    high = (math.log(limit) - log_mean) / LENGTH_SPREAD
    inner = _NORMAL.cdf(high - LENGTH_SPREAD) - _NORMAL.cdf(-log_mean / LENGTH_SPREAD - LENGTH_SPREAD)
    return below + math.exp(log_mean + LENGTH_SPREAD**2 / 2) * inner + limit * _NORMAL.cdf(-high)


def log_mean_of(mean: float, limit: float) -> float:
    """Returns the mean of the logarithm with which lengths that are cut have this mean, by halving."""
    low, high = -10 * LENGTH_SPREAD, math.log(limit) + 10 * LENGTH_SPREAD
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cut_mean(middle, limit) < mean else (low, middle)
    return high


class Simulation:
    """Plays a run: `Simulation(config, speeds).run()`. Raises ConfigError where nothing goes on."""

    def __init__(self, config: Config, speeds: Speeds, seed: int = 0) -> None:
        self._config, self._speeds = config, speeds
        self._size = config.actors.group_size - config.offline_samples
        self._groups = config.learner.groups_per_step
        batch = 0 if config.buffer.samples_per_insert else self._groups
        self._admission = Admission(config.admitted_groups, math.inf, batch=batch)
        self._replay = Replay(config.buffer, seed)
        self._band = Band(config.buffer.samples_per_insert)
        self._bound = StalenessBound(config.buffer.max_staleness)
        self._random = random.Random(seed)
        self._actors = [_Actor(f"actor-{number}") for number in range(speeds.actors)]
        self._waiting: deque[_Actor] = deque()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._now_s = 0.0
        self._step = 0
        self._taken = self._forgone = self._inserted_before = 0
        self._is_training = False
        self._trained_s = self._running_s = self._waited_s = 0.0
        self._ages: list[int] = []
        self._versions: dict[int, int] = {}
        self._log_mean = log_mean_of(speeds.new_tokens, speeds.max_new_tokens)
        self._grain = max(1.0, speeds.new_tokens / GRAINS)
        self._step_s_of = functools.cache(speeds.engine_step_s)

    def run(self, num_steps: int | None = None) -> Outcome:
        """Plays so many steps (None: as many as take some seconds) and returns what they did when warm."""
        per_step = max(1, self._groups * self._size)
        num_steps = num_steps or max(MIN_STEPS, min(200, MAX_SAMPLES // per_step))
        warm_step = int(WARM_SHARE * num_steps)
        for actor in self._actors:
            self._fill(actor)
        self._play_until(warm_step)
        start_s, counts = self._now_s, self._counts()
        self._trained_s = self._running_s = 0.0
        waited_s = self._waited_until_now_s()
        self._ages.clear()
        self._play_until(num_steps)
        took_s = max(1e-9, self._now_s - start_s)
        trained = (num_steps - warm_step) * self._groups
        left = self._counts() - counts
        ages = sorted(self._ages)
        return Outcome(
            step_s=took_s / (num_steps - warm_step),
            learner_busy=min(1.0, self._trained_s / took_s),
            slots_busy=self._running_s / (took_s * len(self._actors) * self._speeds.slots),
            admission_wait=(self._waited_until_now_s() - waited_s) / (took_s * len(self._actors)),
            staleness=(sum(ages) / len(ages), float(ages[int(0.95 * (len(ages) - 1))]), float(ages[-1])),
            num_steps=num_steps,
            evicted={
                name: left[name] / trained for name in EVICTIONS if left[name] and name != "evicted_used"
            },
        )

    # --- time ---

    def _play_until(self, step: int) -> None:
        while self._step < step:
            in_vain = self._replay.counts["inserted"] - self._inserted_before
            if not self._events or in_vain > IN_VAIN * (self._config.admitted_groups + self._groups):
                raise ConfigError(
                    f"in the simulation nothing goes on after step {self._step}: no batch comes of what is generated. Lower "
                    f"weights.publish_every = {self._config.weights.publish_every}, or raise buffer.max_staleness = "
                    f"{self._config.buffer.max_staleness} or buffer.capacity."
                )
            self._now_s, _, happens = heapq.heappop(self._events)
            happens()

    def _at(self, at_s: float, happens: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, happens))

    def _counts(self) -> Counter[str]:
        return Counter(self._replay.counts)

    def _waited_until_now_s(self) -> float:
        open_s = sum(
            self._now_s - actor.waits_since_s for actor in self._waiting if actor.waits_since_s is not None
        )
        return self._waited_s + open_s

    def _crowding(self) -> float:
        """Returns how many times longer what begins now takes, by who is busy."""
        if math.isinf(self._speeds.cores):
            return 1.0
        busy = self._is_training + sum(bool(actor.ends) for actor in self._actors)
        return max(1.0, busy / self._speeds.cores)

    # --- actors ---

    def _advance(self, actor: _Actor) -> None:
        """Counts the steps that the engine has done by now."""
        running_s = self._now_s - max(actor.at_s, actor.resumes_at_s)
        if running_s > 0 and actor.ends:
            actor.tokens += running_s / actor.step_s
            self._running_s += running_s * len(actor.ends)
        actor.at_s = self._now_s

    def _fill(self, actor: _Actor) -> None:
        """Begins samples while slots are free and items are admitted, then waits for the next to end.

        An actor asks for a few items at once, for more when the others had theirs; a real one asks for more
        at a time, and before its slots are free (actors/rollout.py).
        """
        may_lease = max(1, self._speeds.slots // (2 * self._size))
        while len(actor.ends) < self._speeds.slots:
            if actor.beginning is None and not may_lease:
                self._at(self._now_s, lambda: self._begin(actor))
                break
            group = actor.beginning or self._lease(actor)
            if group is None:
                break
            may_lease -= actor.beginning is None
            group.to_begin -= 1
            actor.beginning = group if group.to_begin else None
            if group.oldest_version is None:
                group.oldest_version = actor.version
            self._number += 1
            end = round((actor.tokens + self._draw_length()) / self._grain) * self._grain
            heapq.heappush(actor.ends, (max(end, actor.tokens), self._number, group))
        actor.stamp += 1
        if actor.ends:
            actor.step_s = self._step_s_of(len(actor.ends)) * self._crowding()
            left = max(0.0, actor.ends[0][0] - actor.tokens)
            stamp = actor.stamp
            self._at(
                max(self._now_s, actor.resumes_at_s) + left * actor.step_s,
                lambda: self._ended(actor, stamp),
            )

    def _begin(self, actor: _Actor) -> None:
        self._advance(actor)
        self._fill(actor)

    def _lease(self, actor: _Actor) -> _Begun | None:
        """Returns a group to begin, None where the actor has to wait, in line."""
        if actor.waits_since_s is not None:
            return None
        outdated = self._bound.is_born_stale(actor.version, self._step, self._config.weights.publish_every)
        ordinals = [] if outdated else self._admission.lease(actor.name, 1, self._blocking(), self._now_s)
        if not ordinals:
            actor.waits_since_s = self._now_s
            self._waiting.append(actor)
            return None
        return _Begun(ordinals[0], self._size, self._size)

    def _blocking(self) -> int:
        return self._band.blocking(
            self._replay.num_unconsumed,
            stored=self._replay.num_stored,
            taken=self._taken,
            forgone=self._forgone,
        )

    def _draw_length(self) -> float:
        drawn = self._random.lognormvariate(self._log_mean, LENGTH_SPREAD)
        return max(1.0, min(float(self._speeds.max_new_tokens), drawn))

    def _ended(self, actor: _Actor, stamp: int) -> None:
        if stamp != actor.stamp:
            return  # More began or weights came since this was foreseen.
        self._advance(actor)
        actor.tokens = max(actor.tokens, actor.ends[0][0])
        while actor.ends and actor.ends[0][0] <= actor.tokens:
            _, _, group = heapq.heappop(actor.ends)
            group.to_end -= 1
            if not group.to_end:
                self._insert(group)
        self._fill(actor)

    def _insert(self, group: _Begun) -> None:
        self._admission.end(group.ordinal)
        self._versions[group.ordinal] = version = group.oldest_version or 0
        self._replay.insert(GroupMeta(group.ordinal, version, self._size, 0, self._random.random()))
        self._note_left()
        self._train()

    def _wake(self) -> None:
        """Lets those that wait ask again, in their order."""
        for _ in range(len(self._waiting)):
            if not self._admission.num_leasable(self._blocking()):
                return
            actor = self._waiting.popleft()
            self._waited_s += self._now_s - (actor.waits_since_s or 0.0)
            actor.waits_since_s = None
            self._begin(actor)

    # --- learner ---

    def _train(self) -> None:
        """Takes the batch of the next step, if the learner waits for one and it is there."""
        if self._is_training or self._exceeds():
            return
        before = self._replay.num_unconsumed
        chosen = self._replay.take(self._groups, self._step)
        if chosen:
            self._taken += len(chosen)
            self._inserted_before = self._replay.counts["inserted"]
            self._ages += [staleness(self._step, self._versions[group_id]) for group_id in chosen]
            self._is_training = True
            began_s = self._now_s
            self._at(self._now_s + self._speeds.train_s * self._crowding(), lambda: self._trained(began_s))
        self._note_left()
        if self._replay.num_unconsumed < before:
            self._wake()

    def _exceeds(self) -> bool:
        stored, blocking = self._replay.num_stored, self._blocking()
        is_full = not self._admission.num_open and not self._admission.num_leasable(blocking)
        return not is_full and self._band.exceeds(taken=self._taken, num_groups=self._groups, stored=stored)

    def _note_left(self) -> None:
        for group, _ in self._replay.pop_evicted():
            del self._versions[group.group_id]
            self._forgone += self._band.forgone(group.uses)

    def _trained(self, began_s: float) -> None:
        self._trained_s += self._now_s - began_s
        self._step += 1
        self._is_training = False
        self._admission.pop_changed()  # Nobody writes it.
        if self._step % self._config.weights.publish_every == 0:
            version = self._step
            self._at(self._now_s + self._speeds.arrive_s, lambda: self._arrived(version))
        self._replay.evict_stale(self._step)
        self._note_left()
        self._train()
        self._wake()

    def _arrived(self, version: int) -> None:
        for actor in self._actors:
            self._advance(actor)
            actor.version = version
            actor.resumes_at_s = self._now_s + self._speeds.pause_s
            if actor.ends:
                self._fill(actor)
        self._wake()
