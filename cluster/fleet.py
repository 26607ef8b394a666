"""The rollout actors as a fleet: placed, watched, replaced, added and retired while the run goes on.

    waiting for placement --> loading --> running --> retiring --> gone
              ^                  |           |            (drain: started groups are finished; now: handed back)
              '---- a successor, under a name of its own: its role's actor died or hung

Nothing here waits: `look`, called at least every half second, takes every actor as far as it can go. An actor
has a placement group of its own and is created once that is placed, so that one that cannot be placed blocks
nobody.

| what happens                                       | noticed by                  | what is done                            |
|----------------------------------------------------|-----------------------------|-----------------------------------------|
| killed, out of memory, node lost, exception in run | its call of `run` ends      | leases handed back, replaced            |
| hung (SIGSTOP), or a loop that stands still        | pings unanswered, or so old | the same, and killed                    |
| five deaths of a role within five minutes          | counted                     | TrainingError: cause, log, hint         |
| an error of ours (AgroError) in run                | its call of `run` ends      | raised: it is the end of the run        |
| the constructor raises before any actor ever ran   | its call of `run` ends      | raised: another one would do no better  |
| a retiring actor dies, hangs or takes too long     | the same, and the clock     | leases handed back; not replaced        |
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from cluster.pulse import STOPPED_LIMIT_S, Pulse, look_at, stopped_child
from core.errors import AgroError, TrainingError
from core.processes import (
    bundle_of,
    could_not_start,
    death_cause,
    explained,
    is_placed,
    make_group,
    memory_hint,
    on_bundle,
    shortage,
    whereabouts,
)

State: TypeAlias = Literal["waiting for placement", "loading", "running", "retiring", "gone"]

MAX_DEATHS = 5
DEATHS_WINDOW_S = 300.0
DRAIN_S = 60.0
HAND_BACK_S = 20.0
ASK_FREE_S, TELL_WAITING_S = 1.0, 5.0
NUM_GONE_SHOWN = 8
_RETIRING = {"drain": "finishes what it has begun", "now": "hands everything back"}


class DeathCount:
    """Deaths by role, of the last `window_s` seconds."""

    def __init__(self, window_s: float = DEATHS_WINDOW_S) -> None:
        self.total, self._window_s = 0, window_s
        self._times_s: dict[str, deque[float]] = {}
        self._by_role: Counter[str] = Counter()

    def of(self, role: str) -> int:
        """Deaths of the role so far."""
        return self._by_role[role]

    def note(self, role: str, now_s: float) -> int:
        """One more; how many they are within the window."""
        self.total += 1
        self._by_role[role] += 1
        times_s = self._times_s.setdefault(role, deque())
        times_s.append(now_s)
        while now_s - times_s[0] > self._window_s:
            times_s.popleft()
        return len(times_s)


@dataclass(frozen=True)
class Kind:
    """How the actors of a role are made: `spawn(name, options)` gives the Ray handle. Without `is_placed`
    they reserve nothing.

    The class has `run()`, which returns once the board retires the actor, and, where it is to be found hung,
    `ping()`, answered by a second thread.
    """

    spawn: Callable[[str, dict[str, Any]], Any]
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    is_placed: bool = True


@dataclass
class Actor:
    """One actor, from the request for its place to its end."""

    name: str
    role: str
    kind: Kind
    since_s: float
    state: State = "waiting for placement"
    group: PlacementGroup | None = None
    handle: Any = None
    run: Any = None
    calls: dict[str, Any] = field(default_factory=dict)  # "where" until it is known, then "ping".
    pid: int | None = None  # None: not known yet, or of another node.
    pulse: Pulse | None = None
    is_told: bool = False  # That it waits for placement, or that draining takes too long.
    how: Literal["", "drain", "now"] = ""  # It retires.
    note: str = ""
    asked_s: float = 0.0  # When it was last asked what is free.

    def enter(self, state: State, now_s: float, note: str = "") -> None:
        """Into the next state."""
        self.state, self.since_s, self.note, self.is_told = state, now_s, note, False


class Fleet:
    """See the module's docstring. Raises AgroError from `look`."""

    def __init__(
        self,
        rollouts: Kind,
        *,
        retire: Callable[[Sequence[str], Literal["drain", "now"]], Any],
        release: Callable[[str], Any],
        tell: Callable[[str], Any],
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`retire(names, how)` tells actors to end, `release(name)` hands the work of one that is gone out
        again, `tell` notes an event: none of them may wait. `timeout_s` limits loading, and one turn of an
        actor's loop.
        """
        self._rollouts, self._retire, self._release, self._tell = rollouts, retire, release, tell
        self._timeout_s, self._clock = timeout_s, clock
        self._actors: dict[str, Actor] = {}
        self._gone: deque[Actor] = deque(maxlen=NUM_GONE_SHOWN)
        self._deaths = DeathCount()
        self._successors: dict[str, int] = {}
        self._num_roles = 0
        self._ever_ran = False
        self._node_id = ray.get_runtime_context().get_node_id()

    # --- what there is ---

    @property
    def num_deaths(self) -> int:
        """Actors that died or hung so far."""
        return self._deaths.total

    @property
    def target(self) -> int:
        """Rollout actors meant to be there: those that are not retiring."""
        return len(self._serving())

    def names(self, *states: State) -> list[str]:
        """Of all actors, or of those in one of these states, the feeder included."""
        return [name for name, actor in self._actors.items() if not states or actor.state in states]

    def rollout_names(self, *states: State) -> list[str]:
        """The same without the feeder."""
        return [name for name in self.names(*states) if self._actors[name].kind is self._rollouts]

    def handles(self) -> dict[str, Any]:
        """The actors that exist as processes."""
        return {name: actor.handle for name, actor in self._actors.items() if actor.handle is not None}

    def status(self) -> list[dict[str, Any]]:
        """One entry an actor, those that went last at the end: name, state, seconds in it, and what is
        missing or was the cause.
        """
        now_s = self._clock()
        shown = [*self._actors.values(), *self._gone]
        return [
            {
                "name": actor.name,
                "state": actor.state,
                "since_s": round(now_s - actor.since_s, 1),
                "pid": actor.pid,
                "note": actor.note,
            }
            for actor in shown
        ]

    def _serving(self) -> list[Actor]:
        return [
            actor
            for actor in self._actors.values()
            if actor.kind is self._rollouts and actor.state != "retiring"
        ]

    # --- orders ---

    def add_feeder(self, kind: Kind) -> None:
        """The one actor that makes groups without an engine; replaced like the others, never scaled."""
        self._start("offline", "offline", kind)

    def scale_to(self, count: int) -> tuple[list[str], list[str]]:
        """So many rollout actors: names of those added, and of those retired, the newest first."""
        serving = self._serving()
        surplus = list(reversed(serving))[: max(0, len(serving) - count)]
        added = []
        for _ in range(count - len(serving)):
            added.append(f"actor-{self._num_roles}")
            self._num_roles += 1
            self._start(added[-1], added[-1], self._rollouts)
        for actor in surplus:
            self._begin_retiring(actor, "drain")
        return added, [actor.name for actor in surplus]

    def end(self) -> None:
        """The run is over: nobody finishes what it has started, and nobody is replaced."""
        for actor in list(self._actors.values()):
            self._begin_retiring(actor, "now")

    def kill(self) -> None:
        """Whatever is left, at once."""
        for actor in list(self._actors.values()):
            self._remove(actor, "killed")

    def look(self) -> None:
        """Take every actor as far as it can go; see the table above for what is raised."""
        waited = [
            call
            for actor in self._actors.values()
            for call in (actor.run, *actor.calls.values())
            if call is not None
        ]
        ready = set(ray.wait(waited, num_returns=len(waited), timeout=0)[0]) if waited else set()
        for actor in list(self._actors.values()):
            if actor.run in ready:
                self._ended(actor)
            elif actor.state == "waiting for placement":
                self._place(actor)
            elif actor.state == "loading":
                self._load(actor, ready)
            else:
                self._watch(actor, ready)

    # --- a life ---

    def _start(self, name: str, role: str, kind: Kind) -> None:
        group = make_group([bundle_of(kind.num_cpus, kind.num_gpus)]) if kind.is_placed else None
        actor = self._actors[name] = Actor(
            name, role, kind, self._clock(), group=group, asked_s=self._clock()
        )
        if group is None:
            self._create(actor, {"num_cpus": 0})

    def _place(self, actor: Actor) -> None:
        group, now_s = actor.group, self._clock()
        assert group is not None
        if is_placed(group):
            self._create(actor, on_bundle(group, 0, actor.kind.num_cpus, actor.kind.num_gpus))
        elif now_s - actor.asked_s > ASK_FREE_S:  # Placing takes a moment also where there is room.
            actor.asked_s, actor.note = now_s, shortage(group)
            if now_s - actor.since_s > TELL_WAITING_S and not actor.is_told:
                actor.is_told = True
                self._tell(f"{actor.name} waits for placement: {actor.note}")

    def _create(self, actor: Actor, options: dict[str, Any]) -> None:
        actor.handle = actor.kind.spawn(actor.name, options)
        # Before `run`: it is answered when loading is over.
        actor.calls["where"] = actor.handle.__ray_call__.remote(whereabouts)
        actor.run = actor.handle.run.remote()
        actor.enter("loading", self._clock())

    def _load(self, actor: Actor, ready: set[Any]) -> None:
        now_s = self._clock()
        if actor.calls["where"] in ready:
            with contextlib.suppress(RayError):  # Died since: the end of `run` says so at the next look.
                node_id, pid = ray.get(actor.calls["where"])
                del actor.calls["where"]
                actor.pid = pid if node_id == self._node_id else None
                actor.pulse = Pulse(now_s)
                actor.enter("running", now_s)
                self._ever_ran |= actor.kind is self._rollouts
        elif now_s - actor.since_s > self._timeout_s:
            self._died(actor, f"it did not finish loading within {self._timeout_s:.0f} s (run.timeout_s)")

    def _watch(self, actor: Actor, ready: set[Any]) -> None:
        """A running or retiring actor: its pulse, and how long it may take to retire."""
        if cause := self._feel_pulse(actor, ready):
            self._died(actor, cause)
        elif actor.state == "retiring":
            self._hurry(actor)

    def _feel_pulse(self, actor: Actor, ready: set[Any]) -> str | None:
        """Why the actor counts as hung, or None; keeps one ping outstanding."""
        if actor.pulse is None or not hasattr(actor.handle, "ping"):
            return None
        now_s, ping = self._clock(), actor.calls.get("ping")
        if ping is not None and ping not in ready:
            return actor.pulse.missed(now_s, look_at(actor.pid))
        actor.pulse.answered(now_s)
        actor.calls["ping"] = actor.handle.ping.remote()
        stuck_s = 0.0
        with contextlib.suppress(RayError):  # Died: the end of `run` says so.
            stuck_s = 0.0 if ping is None else ray.get(ping)
        if stuck_s > self._timeout_s:
            return f"its loop has not turned for {stuck_s:.0f} s (run.timeout_s)"
        return stopped_child(actor.pid) if stuck_s > STOPPED_LIMIT_S else None

    def _hurry(self, actor: Actor) -> None:
        elapsed_s, drain_s = self._clock() - actor.since_s, DRAIN_S if actor.how == "drain" else 0.0
        if elapsed_s > drain_s + HAND_BACK_S:
            self._tell(
                f"{actor.name} did not retire within {elapsed_s:.0f} s; killed, its leases are handed back"
            )
            self._remove(actor, "killed")
        elif drain_s and elapsed_s > drain_s and not actor.is_told:
            actor.is_told = True
            self._retire([actor.name], "now")

    def _begin_retiring(self, actor: Actor, how: Literal["drain", "now"]) -> None:
        if actor.state in ("waiting for placement", "loading"):  # It has begun nothing.
            self._remove(actor, "retired")
            return
        if actor.state != "retiring" or how == "now":
            actor.how = how
            actor.enter("retiring", self._clock(), _RETIRING[how])
            self._retire([actor.name], how)

    # --- an end ---

    def _ended(self, actor: Actor) -> None:
        """`run` returned or failed; raises what ends the run."""
        cause = "its run() returned although nobody retired it"
        try:
            ray.get(actor.run)
            if actor.state == "retiring":
                self._tell(f"{actor.name} retired after {self._clock() - actor.since_s:.0f} s")
                self._remove(actor, "retired")
                return
        except RayError as error:
            is_fatal = isinstance(error, RayTaskError) and isinstance(error.cause, AgroError)
            if actor.state != "retiring" and (is_fatal or (could_not_start(error) and not self._ever_ran)):
                raise explained(error, f"actor {actor.name}") from None
            cause = death_cause(error)
        self._died(actor, cause)

    def _died(self, actor: Actor, cause: str) -> None:
        """Hand its work out again, and start another in its place unless it was retiring anyway."""
        was_retiring = actor.state == "retiring"
        self._remove(actor, f"died: {cause.splitlines()[0]}")
        if was_retiring:
            self._tell(f"{actor.name} died while retiring, its leases are handed back: {cause}")
            return
        count = self._deaths.note(actor.role, self._clock())
        if count >= MAX_DEATHS:
            raise TrainingError(f"{crash_loop(actor.role, count, cause)}\n{memory_hint(cause)}")
        number = self._successors[actor.role] = self._successors.get(actor.role, 0) + 1
        # A name of its own: what its predecessor still asks for is refused by name.
        successor = f"{actor.role}.{number}"
        self._tell(
            f"{actor.name} died, restarted as {successor} (the run stops at {MAX_DEATHS} within "
            f"{DEATHS_WINDOW_S / 60:.0f} min): {cause}"
        )
        self._start(successor, actor.role, actor.kind)
        self._keep_order(successor)

    def _keep_order(self, successor: str) -> None:
        """The successor takes its role's place, so that scaling down still retires the newest role first."""
        order = sorted(self._actors.values(), key=lambda actor: _role_number(actor.role))
        self._actors = {actor.name: actor for actor in order}

    def _remove(self, actor: Actor, note: str) -> None:
        """End its process, hand its leases back, free its place."""
        del self._actors[actor.name]
        if actor.handle is not None:
            ray.kill(actor.handle)
            self._release(actor.name)
        if actor.group is not None:
            remove_placement_group(actor.group)
        actor.enter("gone", self._clock(), note)
        self._gone.append(actor)


def crash_loop(role: str, count: int, cause: str) -> str:
    """The message of a run that stops because one part keeps dying."""
    return f"{role} died {count} times within {DEATHS_WINDOW_S / 60:.0f} min; the last time: {cause}"


def _role_number(role: str) -> int:
    return int(role.rpartition("-")[2]) if "-" in role else -1
