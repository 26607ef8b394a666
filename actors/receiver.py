"""The actor's end of weights that the learner pushes (core/weights/transports/push.py): orders, carried out
between two engine steps.

    Ray's threads
      receive(hello | start | update ... | finish) --queue--> the loop: poll() --> engine
      receive(init)  --> a thread: engine.connect_transfer --queue--> the loop: the connection counts
      receive(abort) --> the engine's communicator, at once

A group is met in a thread of its own, while the loop goes on: one that dies on its way there keeps nobody
else from generating. From start to finish of a transfer the loop does nothing else: the model is in pieces.
One that is broken off before anything has arrived leaves the engine as it was; one that had begun to arrive
leaves it without weights (version -1), and it does not generate until a snapshot has been loaded. An order is
of a transfer `number`; those of one that was broken off are refused.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from core.calls import Pending
from core.errors import SnapshotError

LOOK_S = 1.0
BROKEN_OFF = "this transfer was broken off"


class Receiving(Protocol):
    """An engine that takes weights in pieces; `actors.engine.Engine` says more of each method."""

    version: int

    def connect_transfer(self, init_info: dict[str, Any]) -> Any:
        """Meets the learner and the group's other actors; from any thread."""

    def use_connection(self, connection: Any) -> None:
        """Lets the next transfers arrive over this connection."""

    def drop_connection(self, connection: Any) -> None:
        """Leaves a group that will not be used."""

    def start_transfer(self) -> None:
        """Takes the model apart."""

    def update_transfer(self, update_info: dict[str, Any]) -> None:
        """Receives a part of the weights."""

    def finish_transfer(self, version: int, probes: Mapping[str, str]) -> int:
        """Puts the new weights in place; returns how many probes were confirmed."""
        ...

    def undo_transfer(self) -> None:
        """Puts the model together again."""

    def abort_transfer(self) -> None:
        """Ends a broadcast that nobody sends any more; from any thread."""


@dataclass
class _Order:
    verb: str
    number: int
    arguments: tuple[Any, ...]
    done: Future[str] = field(default_factory=Future)


class Receiver:
    """Carries out the learner's orders about weights: `order` may be called from any thread, `poll` only from
    the loop's.

    num_failed   counts transfers that were broken off, or whose weights were not confirmed
    """

    def __init__(
        self,
        engine: Receiving,
        timeout_s: float,
        *,
        may_start: Callable[[], str],
        on_updated: Callable[[float], None],
        beat: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        """Serves `engine`, within `timeout_s` seconds for every wait.

        `may_start` says why no transfer can begin now, '' if one can; `on_updated` gets the clock's value
        when generation stopped for the weights now in place; `beat` is called while the loop waits for
        orders.
        """
        self._engine, self._timeout_s = engine, timeout_s
        self._may_start, self._on_updated, self._beat, self._tell = may_start, on_updated, beat, tell
        self._orders: queue.Queue[_Order] = queue.Queue()
        self._connecting: _Order | None = None
        self._receiving: int | None = None
        self._num_updates = 0
        self._since_s = 0.0
        self._broken_off = -1  # No order up to this number counts any more.
        self.num_failed = 0

    # --- any thread ---

    def order(self, verb: str, number: int, *arguments: Any) -> str:
        """Has it carried out; '' or why it was declined. Raises what the engine raised, and PeerTimeout
        where the loop is too late.
        """
        order = _Order(verb, number, arguments)
        if verb == "abort":
            self._broken_off = max(self._broken_off, number)
            if self._receiving == number:
                self._engine.abort_transfer()
            self._orders.put(order)  # Wakes the loop, if it waits for the next order.
            return ""
        self._orders.put(order)
        timeout_s = 2 * self._timeout_s  # The learner gives up first: it knows who else has not answered.
        late = "the group did not meet" if verb == "init" else f"the actor's loop did not come to `{verb}`"
        return Pending(
            order.done, "the actor's loop", timeout_s, late=f"{late} within {timeout_s:.0f} s"
        ).wait()

    # --- the loop ---

    def poll(self) -> None:
        """Carries out what was ordered; with a transfer under way, until that is over."""
        silent_since_s = time.monotonic()
        while True:
            try:
                order = (
                    self._orders.get(timeout=LOOK_S)
                    if self._receiving is not None
                    else self._orders.get_nowait()
                )
            except queue.Empty:
                if self._receiving is None:
                    return
                self._beat()
                if time.monotonic() - silent_since_s > self._timeout_s / 2:
                    self._give_up(f"the learner has sent nothing for {self._timeout_s / 2:.0f} s")
                continue
            self._carry_out(order)
            silent_since_s = time.monotonic()

    def _carry_out(self, order: _Order) -> None:
        if order.verb == "connected":
            self._end_connecting(*order.arguments)
            return
        under_way = self._receiving if self._connecting is None else self._connecting.number
        # Of an older transfer: threads do not keep their order.
        is_late = under_way is not None and order.number < under_way
        if under_way is not None and not is_late and (order.number > under_way or order.verb == "abort"):
            self._break_off(
                str(order.arguments[0]) if order.verb == "abort" else "the learner has begun another transfer"
            )
        if order.verb == "abort" or not order.done.set_running_or_notify_cancel():
            return
        if is_late or order.number <= self._broken_off:
            order.done.set_result(BROKEN_OFF)
            return
        if order.verb == "init":
            self._connect(order)
            return
        try:
            order.done.set_result(self._obey(order))
        except Exception as error:  # noqa: BLE001 -- what vLLM, NCCL or CUDA raise goes to the learner
            if self._receiving is not None:
                self._give_up(f"{type(error).__name__}: {error}")
            order.done.set_exception(error)

    def _obey(self, order: _Order) -> str:
        match order.verb:
            case "start":
                if reason := self._may_start():
                    return reason
                self._since_s = time.perf_counter()
                self._engine.start_transfer()
                self._receiving, self._num_updates = order.number, 0
            case "update" | "finish" if self._receiving is None:
                return "it has not started"
            case "update":
                self._num_updates += 1
                self._engine.update_transfer(*order.arguments)
                self._refuse_if_aborted(order)
            case "finish":
                self._finish(*order.arguments)
        return ""

    def _connect(self, order: _Order) -> None:
        """Meets a group; the order is answered when all have met, when that fails, or when the learner gives
        it up.
        """
        self._connecting = order

        def meet() -> None:
            connection, error = None, None
            try:
                connection = self._engine.connect_transfer(*order.arguments)
            except Exception as raised:  # noqa: BLE001 -- as in `_carry_out`
                error = raised
            self._orders.put(_Order("connected", order.number, (order, connection, error)))

        threading.Thread(target=meet, name="weight transfer's rendezvous", daemon=True).start()

    def _end_connecting(self, order: _Order, connection: Any, error: Exception | None) -> None:
        if order is not self._connecting:  # Too late: the learner has given it up, or begun another.
            if error is None:  # In a thread: to leave a group can take NCCL seconds.
                threading.Thread(target=self._drop, args=(connection,), daemon=True).start()
            return
        self._connecting = None
        try:
            if error is not None:
                raise error
            self._engine.use_connection(connection)
            order.done.set_result("")
        except Exception as raised:  # noqa: BLE001 -- as in `_carry_out`
            order.done.set_exception(raised)

    def _drop(self, connection: Any) -> None:
        try:
            self._engine.drop_connection(connection)
        except Exception as error:  # noqa: BLE001 -- as in `_carry_out`; nobody waits for this
            self._tell(
                f"a group that was not needed any more could not be left: {type(error).__name__}: {error}"
            )

    def _finish(self, version: int, probes: Mapping[str, str]) -> None:
        num_confirmed = self._engine.finish_transfer(version, probes)
        self._receiving = None
        self._on_updated(self._since_s)
        if not num_confirmed:
            self._tell(
                f"version {version} arrived unconfirmed: none of {', '.join(probes)} is a parameter "
                "of vLLM's model by that name"
            )

    def _refuse_if_aborted(self, order: _Order) -> None:
        """Refuses an order after an abort: the communicator is gone, and what was received is whatever lay in
        its buffers.
        """
        if order.number <= self._broken_off:
            raise SnapshotError("the transfer was broken off while weights arrived")

    def _break_off(self, reason: str) -> None:
        """Ends what is under way: the meeting of a group, or a transfer."""
        if self._connecting is not None:
            self._connecting.done.set_result(BROKEN_OFF)
            self._connecting = None
        if self._receiving is not None:
            self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        """Goes back to the old weights, or to none."""
        self._receiving = None
        self.num_failed += 1
        self._engine.undo_transfer()
        kept = (
            f"keeps version {self._engine.version}" if self._engine.version >= 0 else "waits for a snapshot"
        )
        self._tell(f"a transfer of weights was broken off, the actor {kept}: {reason}")
