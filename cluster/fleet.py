"""The rollout actors as a fleet: placed, watched, replaced, added and retired while the run goes on.

    waiting for placement --> loading --> running --> retiring --> gone
              ^                  |           |            (drain: started groups are finished; now: handed back)
              '---- a successor, under a name of its own: its role's actor died or hung

Nothing here waits. `poll` takes the answers that have come: a loaded actor's place, a ping's, the end of a
`run`. `tick`, called at least every half second, does what is due by the clock: it places, pings, hurries,
and gives up. An actor has a placement group of its own and is created once that is placed, so that one that
cannot be placed blocks nobody.

| what happens                                       | noticed by                        | what is done                       |
|----------------------------------------------------|-----------------------------------|------------------------------------|
| killed, out of memory, node lost, exception in run | `poll`: its call of `run` ended   | leases handed back, replaced       |
| hung (SIGSTOP), or a loop that stands still        | `tick`: pings unanswered, too old | the same, and killed               |
| five deaths of a role within five minutes          | counted (deaths.py)               | TrainingError: cause, log, hint    |
| an error of ours (AgroError) in run                | `poll`                            | raised: it is the end of the run   |
| the constructor raises before any actor ever ran   | `poll`                            | raised: another one does no better |
| a retiring actor dies, hangs or takes too long     | both                              | leases handed back; not replaced   |
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.heartbeat import Heartbeat
from cluster.deaths import ACTOR, Deaths
from cluster.pulse import STOPPED_LIMIT_S, Pulse, look_at, stopped_child
from core.calls import Calls, Client, Pending, asks
from core.causes import Cause, hung
from core.errors import AgroError
from core.processes import (
    Whereabouts,
    bundle_of,
    cause_of,
    could_not_start,
    is_placed,
    make_group,
    on_bundle,
    shortage,
    whereabouts,
)

State: TypeAlias = Literal["waiting for placement", "loading", "running", "retiring", "gone"]

DRAIN_S = 60.0
HAND_BACK_S = 20.0
ASK_FREE_S, TELL_WAITING_S = 1.0, 5.0
MAX_HOLD_S = 20.0
NUM_GONE_SHOWN = 8
_RETIRING = {"drain": "finishes what it has begun", "now": "hands everything back"}


@dataclass(frozen=True)
class Kind:
    """The way in which the actors of a role are made: `spawn(name, options)` gives the Ray handle. Without
    `is_placed` they reserve nothing.

    The class has `run()`, which returns once the board retires the actor, and, where it is to be found hung,
    `ping()`, answered by a second thread.
    """

    spawn: Callable[[str, dict[str, Any]], Any]
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    is_placed: bool = True


class RunsUntilRetired(Protocol):
    """What every actor does."""

    def run(self) -> dict[str, float]:
        """Works until the board retires it; its final counters."""
        ...


class ActorClient(Client):
    """An actor's process, as the driver sees it."""

    run = asks(RunsUntilRetired.run)
    ping = asks(Heartbeat.ping)


@dataclass
class Actor:
    """One actor, from the request for its place to its end."""

    name: str
    role: str
    kind: Kind
    since_s: float
    state: State = "waiting for placement"
    group: PlacementGroup | None = None
    client: ActorClient | None = None
    run: Pending[dict[str, float]] | None = None
    locating: Pending[Whereabouts] | None = None
    ping: Pending[float] | None = None
    where: Whereabouts | None = None  # None: not known yet.
    pid: int | None = None  # None: not known yet, or of another node.
    pulse: Pulse | None = None
    stuck_s: float = 0.0  # How long its loop had not turned when it last answered.
    is_told: bool = False  # That it waits for placement, or that draining takes too long.
    how: Literal["", "drain", "now"] = ""  # It retires.
    note: str = ""
    asked_s: float = 0.0  # When it was last asked what is free.

    def enter(self, state: State, now_s: float, note: str = "") -> None:
        """Moves the actor into the next state."""
        self.state, self.since_s, self.note, self.is_told = state, now_s, note, False


class Fleet:
    """Keeps the rollout actors alive and as many as wanted; `poll` and `tick` raise what ends the run.

    fleet = Fleet(Kind(spawn, num_cpus=1.0), retire=..., release=..., tell=print, deaths=deaths, ...)
    fleet.scale_to(2)
    while training:
        fleet.poll()
        fleet.tick(time.monotonic())
    """

    def __init__(
        self,
        rollouts: Kind,
        calls: Calls,
        *,
        retire: Callable[[Sequence[str], Literal["drain", "now"]], Any],
        release: Callable[[str], Any],
        tell: Callable[[str], Any],
        deaths: Deaths,
        timeout_s: float,
        held_by: Callable[[str], str] = lambda name: "",
        first_at_once: float = math.inf,
        may_place: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`retire(names, how)` tells actors to end, `release(name)` hands the work of one that is gone out
        again, `tell` notes an event: none of them may wait. `timeout_s` limits loading, and one turn of an
        actor's loop. Until an actor runs, so many load at once (`first_at_once`): loading takes a core, and
        what shares one is late together. While the learner waits for its place, `may_place()` is False:
        nobody takes it, and what was asked for and is not used yet is given back.
        """
        self._calls = calls
        self._rollouts, self._retire, self._release, self._tell = rollouts, retire, release, tell
        self._timeout_s, self._clock, self._first_at_once = timeout_s, clock, first_at_once
        self._may_place = may_place
        self._actors: dict[str, Actor] = {}
        self._gone: deque[Actor] = deque(maxlen=NUM_GONE_SHOWN)
        self._deaths, self._held_by = deaths, held_by
        self._successors: dict[str, int] = {}
        self._num_roles = 0
        self._ever_ran = False
        self._node_id = ray.get_runtime_context().get_node_id()

    # --- what there is ---

    @property
    def num_deaths(self) -> int:
        """The number of actors that died or hung so far."""
        return self._deaths.total(ACTOR)

    @property
    def target(self) -> int:
        """The number of rollout actors meant to be there: of those that are not retiring."""
        return len(self._serving())

    def names(self, *states: State) -> list[str]:
        """Names all actors, or those in one of these states, the feeder included."""
        return [name for name, actor in self._actors.items() if not states or actor.state in states]

    def rollout_names(self, *states: State) -> list[str]:
        """Names the same without the feeder."""
        return [name for name in self.names(*states) if self._actors[name].kind is self._rollouts]

    def clients(self) -> dict[str, Client]:
        """Returns the actors that exist as processes, by name."""
        return {name: actor.client for name, actor in self._actors.items() if actor.client is not None}

    def status(self) -> list[dict[str, Any]]:
        """Returns an entry an actor, those that went last at the end: name, state, seconds in it, and what is
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
        """Starts the one actor that makes groups without an engine; it is replaced like the others, never
        scaled.
        """
        self._start("offline", "offline", kind)

    def scale_to(self, count: int) -> tuple[list[str], list[str]]:
        """Makes the rollout actors so many; names those added, and those retired: first who waits for its
        place, then the newest. Ray places in an order of its own: a newer one may run while an older waits.
        """
        serving = self._serving()
        kept_first = sorted(serving, key=lambda actor: actor.state == "waiting for placement")
        surplus = kept_first[count:][::-1]
        added = []
        for _ in range(count - len(serving)):
            added.append(f"actor-{self._num_roles}")
            self._num_roles += 1
            self._start(added[-1], added[-1], self._rollouts)
            self._place(self._actors[added[-1]], self._clock())
        for actor in surplus:
            self._begin_retiring(actor, "drain")
        return added, [actor.name for actor in surplus]

    def end(self) -> None:
        """Retires everybody, since the run is over: nobody finishes what it has started, and nobody is
        replaced.
        """
        for actor in list(self._actors.values()):
            self._begin_retiring(actor, "now")

    def kill(self) -> None:
        """Kills whatever is left, at once."""
        for actor in list(self._actors.values()):
            self._remove(actor, "killed")

    # --- what goes on ---

    def poll(self) -> None:
        """Takes the answers that have come; see the table above for what is raised."""
        for actor in list(self._actors.values()):
            if actor.run is not None and actor.run.is_done():
                self._ended(actor, actor.run)
                continue
            # An error says that it died since: the end of `run` says so too, at the next poll.
            if actor.locating is not None and actor.locating.is_done():
                locating, actor.locating = actor.locating, None
                if locating.error() is None:
                    self._note_loaded(actor, locating.result())
            if actor.ping is not None and actor.ping.is_done():
                ping, actor.ping = actor.ping, None
                if ping.error() is None and actor.pulse is not None:
                    actor.stuck_s = ping.result()
                    actor.pulse.answered(self._clock())

    def tick(self, now_s: float) -> None:
        """Does what is due at `now_s` of the clock; see the table above for what is raised."""
        for actor in list(self._actors.values()):
            if actor.state == "waiting for placement":
                self._place(actor, now_s)
            elif actor.state == "loading":
                self._limit_loading(actor, now_s)
            elif hung_because := self._feel_pulse(actor, now_s):
                is_silent = actor.stuck_s <= STOPPED_LIMIT_S
                noticed = (
                    "its pings were not answered" if is_silent else "it answered, but its loop stood still"
                )
                self._died(actor, hung(hung_because), noticed)
            elif actor.state == "retiring":
                self._hurry(actor, now_s)

    # --- a life ---

    def _start(self, name: str, role: str, kind: Kind) -> None:
        actor = self._actors[name] = Actor(name, role, kind, self._clock(), asked_s=self._clock())
        if not kind.is_placed:
            self._create(actor, {"num_cpus": 0})

    def _place(self, actor: Actor, now_s: float) -> None:
        kind, group = actor.kind, actor.group
        if self._is_held(actor, now_s):
            return
        if not self._may_place():
            if group is not None:
                remove_placement_group(group)
            actor.group, actor.note = None, "the learner is placed first"
            return
        if group is None:
            group = actor.group = make_group([bundle_of(kind.num_cpus, kind.num_gpus)])
        if is_placed(group):
            self._create(actor, on_bundle(group, 0, kind.num_cpus, kind.num_gpus))
        elif now_s - actor.asked_s > ASK_FREE_S:  # Placing takes a moment also where there is room.
            actor.asked_s, actor.note = now_s, shortage(group)
            if now_s - actor.since_s > TELL_WAITING_S and not actor.is_told:
                actor.is_told = True
                self._tell(f"{actor.name} waits for placement: {actor.note}")

    def _is_held(self, actor: Actor, now_s: float) -> bool:
        """Whether the actor is to leave the cores to those that load, which the first step waits for; not for
        long, since one of them may hang.
        """
        if self._ever_ran or now_s - actor.since_s > MAX_HOLD_S:
            return False
        return len(self.rollout_names("loading")) >= self._first_at_once

    def _create(self, actor: Actor, options: dict[str, Any]) -> None:
        actor.client = client = ActorClient(actor.kind.spawn(actor.name, options), f"actor {actor.name}")
        # The fleet limits loading, pings and retiring itself. The first is answered when loading is over.
        actor.locating = self._calls.start(client.inside(whereabouts), math.inf)
        actor.run = self._calls.start(client.run(), math.inf)
        actor.enter("loading", self._clock())

    def _note_loaded(self, actor: Actor, where: Whereabouts) -> None:
        """Takes note that the actor has loaded, and where it is."""
        now_s = self._clock()
        actor.where = where
        actor.pid = where.pid if where.node_id == self._node_id else None
        actor.pulse = Pulse(now_s)
        actor.enter("running", now_s)
        self._ever_ran |= actor.kind is self._rollouts

    def _limit_loading(self, actor: Actor, now_s: float) -> None:
        if now_s - actor.since_s > self._timeout_s:
            cause = hung(f"it did not finish loading within {self._timeout_s:.0f} s (run.timeout_s)")
            self._died(actor, cause, "it had not said where it is")

    def _feel_pulse(self, actor: Actor, now_s: float) -> str | None:
        """Why the actor counts as hung, or None; keeps one ping outstanding."""
        if actor.pulse is None or actor.client is None or not hasattr(actor.client.handle, "ping"):
            return None
        if actor.ping is not None:
            return actor.pulse.missed(now_s, look_at(actor.pid))
        actor.ping = self._calls.start(actor.client.ping(), math.inf)
        if actor.stuck_s > self._timeout_s:
            return f"its loop has not turned for {actor.stuck_s:.0f} s (run.timeout_s)"
        return stopped_child(actor.pid) if actor.stuck_s > STOPPED_LIMIT_S else None

    def _hurry(self, actor: Actor, now_s: float) -> None:
        elapsed_s, drain_s = now_s - actor.since_s, DRAIN_S if actor.how == "drain" else 0.0
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

    def _ended(self, actor: Actor, run: Pending[dict[str, float]]) -> None:
        """`run` returned or failed; raises what ends the run."""
        cause, noticed = (
            Cause("exit code", "its run() returned although nobody retired it", 0),
            "its run() ended",
        )
        error = run.error()
        if error is None and actor.state == "retiring":
            self._tell(f"{actor.name} retired after {self._clock() - actor.since_s:.0f} s")
            self._remove(actor, "retired")
            return
        if error is not None:
            raised = error.__cause__  # What Ray said, where `error` is ours.
            if not isinstance(raised, RayError):
                raise error
            cause = cause_of(raised, actor.where)
            is_fatal = isinstance(raised, RayTaskError) and isinstance(raised.cause, AgroError)
            if actor.state != "retiring" and (is_fatal or (could_not_start(raised) and not self._ever_ran)):
                done = "the run ends: another actor would do no better"
                self._note(actor, cause, noticed, done, counts=False)
                raise error
        self._died(actor, cause, noticed)

    def _died(self, actor: Actor, cause: Cause, noticed: str) -> None:
        """Hands its work out again, and starts another in its place unless it was retiring anyway."""
        was_retiring = actor.state == "retiring"
        self._remove(actor, f"died: {cause.sentence}")
        if was_retiring:
            done = "its leases were handed back; it was retiring, so that nobody took its place"
            cause = self._note(actor, cause, noticed, done, counts=False)
            self._tell(f"{actor.name} died while retiring, its leases are handed back: {cause}")
            return
        number = self._successors[actor.role] = self._successors.get(actor.role, 0) + 1
        # A name of its own: what its predecessor still asks for is refused by name.
        successor = f"{actor.role}.{number}"
        done = f"its leases were handed out again, with the same seeds; {successor} took its place"
        cause = self._note(actor, cause, noticed, done)
        self._tell(
            f"{actor.name} died, restarted as {successor} (the run stops at {ACTOR.max_deaths} within "
            f"{ACTOR.window_s / 60:.0f} min): {cause}"
        )
        self._start(successor, actor.role, actor.kind)
        self._keep_order()

    def _note(self, actor: Actor, cause: Cause, noticed: str, done: str, *, counts: bool = True) -> Cause:
        return self._deaths.note(
            ACTOR,
            actor.name,
            cause,
            where=actor.where,
            noticed=noticed,
            held=self._held_by(actor.name),
            done=done,
            counts=counts,
        )

    def _keep_order(self) -> None:
        """The successor takes its role's place, so that the newest role that runs is retired first."""
        order = sorted(self._actors.values(), key=lambda actor: _role_number(actor.role))
        self._actors = {actor.name: actor for actor in order}

    def _remove(self, actor: Actor, note: str) -> None:
        """Ends its process, hands its leases back, frees its place."""
        del self._actors[actor.name]
        for pending in (actor.run, actor.locating, actor.ping):
            if pending is not None:
                pending.give_up()
        if actor.client is not None:
            ray.kill(actor.client.handle)
            self._release(actor.name)
        if actor.group is not None:
            remove_placement_group(actor.group)
        actor.enter("gone", self._clock(), note)
        self._gone.append(actor)


def _role_number(role: str) -> int:
    return int(role.rpartition("-")[2]) if "-" in role else -1
