"""The rollout actor: leases prompts, generates with whatever weights it has, has them scored, inserts whole
groups.

    buffer --lease--> WorkItems --engine--> Samples --reward pool--> Group --insert--> buffer  groups.py, exchange.py
    board  --poll---> newer snapshot: fetched beside generation, applied between two steps    follower.py
                      evaluation items: exactly their version is loaded, and kept until they are done
                      retire: 'drain' finishes what was begun, 'now' hands everything back

With offline data, some samples of each group are taken from there; where all are, this actor only evaluates.

The loop never waits while there is something to generate. Its waits are counters: `wait_admission_s` (the
buffer admits no more work), `wait_rewards_s` (the same while groups await their rewards, or so many do that
no others are started: `rewards.max_pending`), `wait_disk_s` (the buffer takes no work: its disk is full),
`wait_weights_s` (before the first snapshot: an actor is not eligible until it has one), `wait_environment_s`
(all that is open waits for its environment) and `wait_evaluation_s` (it only evaluates, and there is nothing
to).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

import msgspec
import ray

from actors.engine import Engine
from actors.engine_settings import Adapters
from actors.evaluating import Evaluating, eval_sample
from actors.exchange import RETRY_S, Outbox
from actors.follower import POLL_S, Follower
from actors.groups import Generator, Groups, OpenGroup
from actors.heartbeat import Heartbeat
from actors.offline import choose_samples
from actors.playing.player import Player, make_player
from actors.prompts import PromptSet
from actors.receiver import Receiver, Receiving
from actors.reward_model import RewardModelClient
from actors.reward_model.asked import ModelRewards
from actors.scored import group_of
from actors.scoring import Scorer, Scoring
from buffer.client import BufferClient
from buffer.store import DiskFullError
from core.calls import Calls, Pending, settle
from core.config import LORA_ALPHA, Config
from core.config.environments import all_paths
from core.errors import SnapshotError
from core.machine import ENGINE_THREAD, call_thread
from core.monitor_client import MonitorClient
from core.records import Group, Sample, WorkItem, encode
from core.weights.board import BoardClient, ReceiverClient

REPORT_EVERY_S = 1.0
RENEWALS_PER_LEASE = 10.0
IDLE_S = 0.1
INSERT_EVERY_S = 0.05
"""Groups that end within this time of one another are sent in one call, while the engine works: a call to
another process costs this one as much as several samples.
"""
RETIRE_LIMIT_S = 30.0
HAND_BACK_LIMIT_S = 10.0


class RolloutActor(Heartbeat):
    """One vLLM engine and its loop; `cluster/supervisor.py` makes it a Ray actor. `run` returns when the
    board retires it.
    """

    def __init__(
        self,
        name: str,
        config: Config,
        prompts: PromptSet,
        eval_prompts: Mapping[str, PromptSet],
        buffer: BufferClient,
        board: BoardClient,
        monitor: MonitorClient,
        models: Mapping[str, RewardModelClient] | None = None,
    ) -> None:
        """Takes its peers; `models` are the hosted reward models by their names in the config."""
        self._name, self._config = name, config
        self._prompts = prompts
        self._buffer, self._board, self._monitor = buffer, board, monitor
        self._calls = Calls(config.run.timeout_s, monitor.event, name=name)
        models_for = partial(
            ModelRewards, clients=models or {}, calls=self._calls, system_prompt=config.data.system_prompt
        )
        loading = self._calls.in_background(
            lambda: Scorer(config.rewards, models_for, all_paths(config)), "the reward functions"
        )
        self._engine = self._make_engine()
        scorer = loading.wait()
        self._scoring = Scoring(scorer, config.rewards.max_pending)
        self._groups = Groups(self._engine, config.actors, player=self._make_player())
        self._follower = Follower(name, config, board, self._calls)
        self._receiver = self._make_receiver()
        self._outbox = Outbox(self._calls)
        self._evaluating = Evaluating(config, eval_prompts, self._groups, board, self._outbox, scorer)
        self._work: deque[WorkItem] = deque()
        # Ordinals from their lease to the acknowledgement of what became of them.
        self._holding: set[int] = set()
        self._joined: str | None = None  # The board that pushes weights here.
        self._lease: Pending[list[bytes] | None] | None = None
        # What the newest lease was asked with; what the buffer refused.
        self._leasing_version = self._outdated_version = -1
        self._lease_at_s = self._reported_s = self._renewed_s = self._inserted_s = 0.0
        self._unsent: list[Group] = []
        self._retire_deadline_s = math.inf  # Until it is told to drain.
        kinds = ("admission", "rewards", "disk", "environment", "evaluation", "weights")
        waits = (f"wait_{kind}_s" for kind in kinds)
        self._counters: dict[str, float] = dict.fromkeys(
            ("groups", "groups_failed", "leases_refused", "busy_s", *waits, "errors"), 0.0
        )

    def run(self) -> dict[str, float]:
        """Generates until it is retired and returns the final counters. Raises PeerTimeout when buffer or
        board does not answer.
        """
        call_thread(ENGINE_THREAD)
        while not self._is_over():
            self._beat()
            self._follow_board()
            self._take_work()
            self._renew()
            # Else a transfer was broken off: a snapshot comes first.
            if self._engine.num_unfinished and self._engine.version >= 0:
                self._generate()
            else:
                self._idle()
            self._deliver()
            self._report()
        self._hand_back()
        return self._all_counters()

    def _make_engine(self) -> Generator:
        """Returns the engine, without weights that count. Benchmarks and tests of the loop put a simulated
        one in its place.
        """
        seed = (self._config.run.seed * 1_000_003 + sum(self._name.encode()) * 7919) % 2**31
        config = self._config
        learner, weights = config.learner, config.weights
        return Engine(
            config.model,
            config.actors,
            max_model_len=config.max_sequence_tokens,
            seed=seed,
            version=-1,
            transport=weights.carrier,
            adapters=Adapters(learner.lora_rank, LORA_ALPHA) if weights.transport == "adapters" else None,
            skip_special_tokens=config.rewards.skip_special_tokens,
        )

    def _make_player(self) -> Player:
        """Returns what begins the episodes, as `_make_engine` makes the engine."""
        return make_player(self._config)

    def receive(self, verb: str, number: int, *arguments: Any) -> str:
        """Carries out an order of the learner about weights that it pushes, from any thread: see
        actors/receiver.py.
        """
        if self._receiver is None:
            raise SnapshotError(
                f"{self._name} takes snapshots only: weights.transport = {self._config.weights.transport}"
            )
        return self._receiver.order(verb, number, *arguments)

    def _make_receiver(self) -> Receiver | None:
        """Returns the receiver of pushed weights, or None where nobody pushes any."""
        if self._config.weights.is_pulled:
            return None
        timeout_s, engine = self._config.run.timeout_s, cast(Receiving, self._engine)
        return Receiver(
            engine,
            timeout_s,
            may_start=self._may_receive,
            on_updated=self._groups.updated,
            beat=self._beat,
            tell=lambda text: self._calls.tell(f"{self._name}: {text}"),
        )

    def _may_receive(self) -> str:
        """Returns why weights cannot be pushed now; empty when they can."""
        if self._engine.version < 0:
            return "it has no weights yet: its first are a snapshot's, which is checked to be complete"
        if self._follower.retire:
            return "it retires"
        return "it evaluates" if len(self._evaluating) or not self._follower.give_way() else ""

    def _own_handle(self) -> Any:
        return ray.get_runtime_context().current_actor

    # --- the board: weights, evaluations, the end ---

    def _follow_board(self) -> None:
        """Carries out what the learner pushes, and what the board wants as soon as all for it is here."""
        if self._receiver is not None:
            self._join_board()
            self._receiver.poll()
        evaluating = self._evaluating
        self._follower.poll(self._engine.version, is_evaluating=len(evaluating) > 0, room=evaluating.room)
        if self._follower.retire == "drain" and self._retire_deadline_s == math.inf:
            self._retire_deadline_s = time.monotonic() + RETIRE_LIMIT_S
        update = self._follower.update
        if update is None or (
            update.weights is not None and not self._groups.update(update.version, update.weights)
        ):
            return
        self._follower.update = None
        self._evaluating.start(update.eval_items)

    def _join_board(self) -> None:
        """Asks for weights to be pushed: at the start, and of every board that takes the place of another."""
        if self._joined == self._follower.board:
            return
        self._joined = self._follower.board
        self._calls.ask(self._board.join(self._name, ReceiverClient(self._own_handle(), self._name)))

    def _is_over(self) -> bool:
        """Returns whether to leave the loop: at once, or drained, or after RETIRE_LIMIT_S of draining."""
        if self._follower.retire != "drain":
            return self._follower.retire == "now"
        is_drained = not (len(self._groups) or len(self._scoring) or self._unsent or len(self._outbox))
        return is_drained or time.monotonic() > self._retire_deadline_s

    def _hand_back(self) -> None:
        """Hands what was not finished to another actor, or to the next start of the run; what was finished is
        still waited for.
        """
        self._insert()
        settle(self._outbox.pendings, HAND_BACK_LIMIT_S)
        self._outbox.poll()
        self._calls.ask(self._board.give_back(self._name))
        try:
            self._calls.ask(self._buffer.release_actor(self._name))
        except DiskFullError as error:
            self._calls.tell(
                f"{self._name} could not hand back {len(self._holding)} leases; they will run out: {error}"
            )
        self._groups.close()
        self._scoring.close()
        self._evaluating.close()

    # --- work ---

    def _take_work(self) -> None:
        """Keeps the engine's slots full, and a few leases at hand to refill them; a retired actor hands those
        back.
        """
        actors = self._config.actors
        self._receive_lease()
        if self._follower.retire:
            if unstarted := [self._work.popleft().ordinal for _ in range(len(self._work))]:
                self._outbox.deliver(self._buffer.give_back(self._name, unstarted), unstarted)
            return
        is_held_up = self._follower.update is not None or self._scoring.is_full
        while self._work and self._groups.has_room and not is_held_up:
            item = self._work.popleft()
            prompt = self._prompts[item.prompt_index]
            offline = choose_samples(prompt, self._config.offline_samples, item.seed)
            missing: list[Sample | None] = [None] * (actors.group_size - len(offline))
            self._groups.start(OpenGroup(item, prompt, missing, offline, actors.temperature))
        # After these were started: what is leased now arrives beside the next step, and fills what it frees.
        held = actors.slots // actors.group_size
        reserve = max(1, held // 2)
        if self._may_lease() and len(self._work) < reserve:
            # What is free, or as much as the engine holds, since a call costs as much as several samples. But
            # beyond what is free no more than the reserve or this actor's part of a batch: others wait, too.
            free = (actors.slots - self._engine.num_unfinished) // actors.group_size
            part = self._config.learner.groups_per_step // max(1, actors.fewest)
            wanted = max(reserve, min(held, part), free - len(self._work))
            self._leasing_version = self._engine.version
            self._renewed_s = time.monotonic()
            call = self._buffer.lease(
                self._name, wanted, POLL_S, self._leasing_version, sorted(self._holding)
            )
            self._lease = self._calls.start(call, POLL_S + self._config.run.timeout_s)

    def _may_lease(self) -> bool:
        if (
            self._lease is not None
            or self._buffer.who in self._outbox.refused_by
            or time.monotonic() < self._lease_at_s
            or self._config.is_offline
        ):
            return False
        return self._engine.version >= 0 and self._engine.version != self._outdated_version

    def _renew(self) -> None:
        """Tells the buffer what is still worked on here, also when nothing is leased for long: a sample may
        take longer than a lease.
        """
        if self._lease is not None or not self._holding:
            return  # What a lease under way may bring is not known here yet: it would count as lost.
        if time.monotonic() - self._renewed_s > self._config.run.timeout_s / RENEWALS_PER_LEASE:
            self._renewed_s = time.monotonic()
            self._calls.post(self._buffer.renew(self._name, sorted(self._holding)), "renewals of leases")

    def _receive_lease(self) -> None:
        if self._lease is None or not self._lease.is_done():
            return
        lease, self._lease = self._lease, None
        try:
            payloads = lease.result()
        except DiskFullError:
            self._lease_at_s = time.monotonic() + RETRY_S
            self._counters["leases_refused"] += 1
            return
        if payloads is None:
            self._outdated_version = self._leasing_version
        items = [msgspec.msgpack.decode(payload, type=WorkItem) for payload in payloads or ()]
        # One whose lease ran out while it is still being worked on here: that will do.
        self._work.extend(item for item in items if item.ordinal not in self._holding)
        self._holding.update(item.ordinal for item in items)

    def _generate(self) -> None:
        """Makes one step of the engine; the groups that ended with it are scored, or fail."""
        start_s = time.perf_counter()
        self._end(self._groups.step())
        self._counters["busy_s"] += time.perf_counter() - start_s

    def _end(self, ended: list[OpenGroup]) -> None:
        for group in ended:
            if group.is_too_small:
                self._fail(group)
            else:
                self._scoring.submit(group, self._evaluating.scorer(group))

    def _fail(self, group: OpenGroup) -> None:
        """Ends the item without a group, never with rewards of 0."""
        assert isinstance(group.item, WorkItem)
        ordinals = [group.item.ordinal]
        self._counters["groups_failed"] += 1
        if self._counters["groups_failed"] == 1:  # The ledger names them all.
            self._calls.tell(f"{self._name}: group {group.item.ordinal} failed: {group.reason}")
        self._outbox.deliver(self._buffer.fail(self._name, ordinals, group.reason), ordinals)

    def _deliver(self) -> None:
        """Sends off the groups whose rewards are there, and takes note of what has arrived."""
        evaluated = []
        for open_group, samples in self._scoring.take():
            self._counters["errors"] += sum(sample.error is not None for sample in samples)
            if isinstance(open_group.item, WorkItem):
                self._unsent.append(group_of(open_group.item, open_group.prompt, samples, self._name))
            else:
                evaluated.append(eval_sample(open_group.item, open_group, samples))
        is_due = time.monotonic() - self._inserted_s >= INSERT_EVERY_S
        if is_due or not self._engine.num_unfinished:
            self._insert()
        self._evaluating.deliver(evaluated)
        self._holding.difference_update(self._outbox.poll())

    def _insert(self) -> None:
        """Sends the groups that are done to the buffer."""
        groups, self._unsent = self._unsent, []
        if groups:
            self._inserted_s = time.monotonic()
            self._counters["groups"] += len(groups)
            payloads = [encode(group) for group in groups]
            group_ids = [group.group_id for group in groups]
            self._outbox.deliver(self._buffer.insert(self._name, payloads), group_ids)

    # --- waiting and telling ---

    def _idle(self) -> None:
        """Waits for any answer when there is nothing to generate, and counts what for; takes what
        environments have answered.
        """
        start_s = time.monotonic()
        self._groups.wait(self._awaited(), IDLE_S)
        wait = "wait_evaluation_s" if self._config.is_offline else "wait_admission_s"
        wait = "wait_rewards_s" if len(self._scoring) else wait
        if self._buffer.who in self._outbox.refused_by or start_s < self._lease_at_s:
            wait = "wait_disk_s"
        wait = "wait_weights_s" if self._engine.version in (-1, self._outdated_version) else wait
        wait = "wait_environment_s" if self._groups.is_waiting else wait
        self._counters[wait] += time.monotonic() - start_s
        self._end(self._groups.poll())

    def _awaited(self) -> Iterator[Future[Any]]:
        pendings = [*self._follower.pendings, *self._outbox.pendings]
        if self._lease is not None:
            pendings.append(self._lease)
        yield from (pending.future for pending in pendings)
        yield from self._scoring.futures

    def _report(self) -> None:
        if time.monotonic() - self._reported_s >= REPORT_EVERY_S:
            self._reported_s = time.monotonic()
            gauges = {
                "version": self._engine.version,
                "tokens_under_way": self._groups.num_tokens_under_way,
                "leases": len(self._holding),
            }
            report = self._monitor.log_actor(self._name, {**self._all_counters(), **gauges})
            self._calls.post(report, "an actor's counters")

    def _all_counters(self) -> dict[str, float]:
        counters = {**self._counters, **self._groups.counters, "fetch_s": self._follower.fetch_s}
        counters["transfers_failed"] = 0.0 if self._receiver is None else float(self._receiver.num_failed)
        counters["calls_failed"] = float(self._calls.num_failed_posts)
        return {
            **counters,
            **self._scoring.counters,
            "insert_retries": float(self._outbox.retries),
            "snapshots_failed": float(self._follower.num_failed),
        }
