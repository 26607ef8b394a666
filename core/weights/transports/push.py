"""Pushes weights to the actors there are, and makes a snapshot for everybody else: what nccl and ipc have in
common.

    board --members--> those that answer --start--> one pass over the source --finish--> new version in place
                                                      |--> snapshot, in the background, where it is needed
                                                      `--> checksums of a few parameters, to be confirmed

An actor that fails or does not answer is stale: it keeps its version, its samples say so, and it is left out
until its loop has answered again. One that evaluates, or has no weights yet, declines, and takes snapshots. A
pass is made once and to its end, by all ranks, whatever becomes of the actors; ranks other than 0 only
iterate, which is all that vLLM's engines do there.
"""

from __future__ import annotations

import collections
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from core.calls import Pending
from core.staleness import StalenessBound
from core.weights.board import ReceiverClient
from core.weights.snapshots import SnapshotWriter, checksum
from core.weights.transports.base import Sender, Transport
from core.weights.transports.client import ActorsClient
from core.weights.transports.passes import Pass, probe_names
from core.weights.transports.snapshot import SnapshotTransport


class PushTransport(Transport):
    """The base of transports that push: a subclass implements `send`, to all of `client.members`."""

    coupled: ClassVar[bool]
    make_pass: ClassVar[type[Pass]]

    def __init__(self, sender: Sender) -> None:
        config = sender.config
        self._sender, self._snapshots = sender, SnapshotTransport(sender)
        ranks_each = max(1, int(config.actors.num_gpus))
        self.client = ActorsClient(
            sender.calls, config.run.timeout_s, ranks_each=ranks_each, coupled=self.coupled
        )
        self._probe_names = probe_names(sender.source)
        self._probes: dict[str, str] = {}
        self._owing: dict[str, Pending[str]] = {}  # Stale actors, and the answer that each owes.
        self._writer: SnapshotWriter | None = None
        self._newest_snapshot: int | None = None
        self._announced: int | None = None

    @abstractmethod
    def send(self, weights: Pass) -> None:
        """Sends everything in `weights` to all of `client.members`. Raises GroupBroken, or RuntimeError where
        vLLM or NCCL does.
        """

    def publish(self, version: int, *, evaluate: Sequence[str]) -> None:
        """Pushes `version` to the actors that answer; makes a snapshot where somebody needs one."""
        if self._sender.rank != 0:
            collections.deque(self._sender.source, maxlen=0)
            return
        # A snapshot that came to the board after newer weights were announced would take the actors back.
        self.flush()
        sender, self._writer, self._probes = self._sender, None, {}
        self._announced = version
        sender.calls.ask(sender.board.announce(version))
        actors = sender.calls.ask(sender.board.members())

        def begin() -> None:
            if evaluate or self._is_snapshot_due(version) or actors.keys() - self.client.members.keys():
                self._writer = self._snapshots.begin()

        weights = self.make_pass(sender.source, begin, self._look)
        try:
            self._send_to_those_who_answer(weights, version, actors)
        finally:
            weights.finish()
        if self._writer is not None:
            self._snapshots.store(self._writer, version, evaluate=evaluate)
            self._newest_snapshot = version

    def flush(self) -> None:
        """Waits for the snapshot, if one is being stored."""
        self._snapshots.flush()

    def republish(self) -> None:
        """Publishes the snapshots once more, and announces what was pushed since."""
        self._snapshots.republish(lambda: self._announced)

    def metrics(self) -> dict[str, float]:
        """Returns what the snapshots say, and how many actors are stale."""
        if self._sender.rank != 0:
            return {}
        return {**self._snapshots.metrics(), "weights/stale_actors": float(len(self._owing))}

    def _send_to_those_who_answer(
        self, weights: Pass, version: int, actors: dict[str, ReceiverClient]
    ) -> None:
        """Sends, and as long as nothing was sent, again without those that were lost."""
        members = self._answering(actors)
        self.client.failed = {}
        self.client.begin({}, version, self._probes)
        while members and not weights.has_begun:
            self.client.begin(members, version, self._probes)
            try:
                self.send(weights)
            # GroupBroken, and what NCCL, CUDA and torch's store raise when a peer is gone.
            except (RuntimeError, TimeoutError) as error:
                self.client.break_off(str(error))
                # It is nobody's fault that we know of: snapshots, this time.
                if self.client.members == members:
                    self._sender.tell(f"pushing version {version} failed: {str(error).splitlines()[0]}")
                    self.client.members = {}
                members = self.client.members
        if weights.has_begun and self.client.failure.done():
            self.client.members = {}
        for name, reason in self.client.failed.items():
            self._sender.tell(
                f"{name} keeps its weights, and is left out until it answers again: version "
                f"{version}, {reason}"
            )
            self._owing[name] = self._ask_for_an_answer(actors[name])

    def _answering(self, actors: dict[str, ReceiverClient]) -> dict[str, ReceiverClient]:
        """Returns all actors but the stale ones that have not answered since."""
        for name in self._owing.keys() - actors.keys():
            self._owing.pop(name).give_up()
        for name, answer in list(self._owing.items()):
            if not answer.is_done():
                continue
            if answer.error() is None:
                del self._owing[name]
                self._sender.tell(f"{name} answers again: weights are pushed to it")
            else:
                self._owing[name] = self._ask_for_an_answer(actors[name])
        return {name: actor for name, actor in actors.items() if name not in self._owing}

    def _ask_for_an_answer(self, actor: ReceiverClient) -> Pending[str]:
        return self._sender.calls.start(actor.receive("hello", self.client.number + 1), math.inf)

    def _is_snapshot_due(self, version: int) -> bool:
        """Returns whether the newest snapshot would be too old to generate with for an actor that joins
        before the next publication, and takes it.
        """
        config = self._sender.config
        bound = StalenessBound(config.buffer.max_staleness)
        return bound.is_snapshot_too_old(self._newest_snapshot, version + config.weights.publish_every)

    def _look(self, name: str, tensor: torch.Tensor) -> None:
        if self._writer is not None:
            self._writer.add(name, tensor)
        if name in self._probe_names:
            self._probes[name] = checksum(tensor)
