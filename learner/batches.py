"""The batches of a run, as they come to the ranks of its learner.

    rank 0: asks the buffer, every two seconds --> all ranks are told whether it came
                                               --receive_share--> each rank has its groups

Rank 0 gives up when nothing comes for `run.timeout_s`: no group, and no token either.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from buffer.client import BufferClient
from buffer.usable import last_texts
from core.calls import Calls
from core.errors import PeerTimeout
from core.monitor_client import MonitorClient
from core.records import open_batch
from learner.step.ranks import Ranks
from learner.step.share import Share, receive_share

POLL_S = 2.0
"""How long one question to the buffer waits; the other ranks wait in a collective, which has a limit of its
own.
"""


class Taken(NamedTuple):
    """A batch that has come: this rank's share of it, and on rank 0 all of it, encoded; b"" on the others.

    `asked_s` is the moment at which the learner began to wait for it, `wait_s` how long it did.
    """

    share: Share
    payload: bytes
    asked_s: float
    wait_s: float


class BatchSource:
    """The source of the learner's batches: `taken = batches.next(step)`, on all ranks at once.

    groups_per_step  groups of a batch
    timeout_s        limits a wait without a new group and without a token
    is_stopping      is asked while rank 0 waits: no batch then
    """

    def __init__(
        self,
        calls: Calls,
        buffer: BufferClient,
        monitor: MonitorClient,
        *,
        groups_per_step: int,
        timeout_s: float,
        is_stopping: Callable[[], bool],
        sequence_parallel: int = 1,
    ) -> None:
        self._calls, self._buffer, self._monitor = calls, buffer, monitor
        self._groups_per_step, self._timeout_s, self._is_stopping = groups_per_step, timeout_s, is_stopping
        self._ranks, self._sequence_parallel = Ranks(), sequence_parallel

    def next(self, step: int) -> Taken | None:
        """Waits for the batch of this step; None when the learner is to stop. Collective.

        Raises PeerTimeout when the actors deliver nothing.
        """
        asked_s, is_first = time.perf_counter(), self._ranks.number == 0
        for is_over, payload in self._answers(step) if is_first else itertools.repeat((False, None)):
            is_over, has_come = self._ranks.first((is_over, payload is not None))
            if is_over and not has_come:
                return None
            if is_over:
                batch = None if payload is None else open_batch(payload)
                share = receive_share(batch, self._sequence_parallel)
                return Taken(share, payload or b"", asked_s, time.perf_counter() - asked_s)
        raise AssertionError("unreachable: the last answer ends the wait")

    def _answers(self, step: int) -> Iterator[tuple[bool, bytes | None]]:
        """Yields (False, None) while there is no batch, then (True, the batch), or (True, None) to stop."""
        deadline_s, seen = time.monotonic() + self._timeout_s, None
        while not self._is_stopping():
            payload = self._calls.ask(self._buffer.sample(step, self._groups_per_step, POLL_S))
            if payload is not None:
                yield True, payload
            stats = self._calls.ask(self._buffer.stats())
            generation = self._calls.ask(self._monitor.generation())
            now = stats["buffer/inserted"], {name: tokens for name, (tokens, _) in generation.items()}
            # Slow, but coming: a first batch of long samples takes its time.
            if now != seen:
                deadline_s, seen = time.monotonic() + self._timeout_s, now
            if time.monotonic() > deadline_s:
                raise PeerTimeout(
                    f"no group came for {self._timeout_s:.0f} s (run.timeout_s) while the learner waited at "
                    f"step {step} for {self._groups_per_step} groups, and no token was generated: "
                    f"{_in_words(generation)}. {self._why_no_group()}"
                )
            yield False, None
        yield True, None

    def _why_no_group(self) -> str:
        errors, samples, texts = self._calls.ask(self._buffer.error_summary())
        if not texts:
            return "See events.jsonl; raise run.timeout_s if generation is merely slow."
        shown = "\n  ".join(last_texts(texts))
        return f"{errors} of {samples} samples got no reward so far, the last because of:\n  {shown}"


def _in_words(generation: Mapping[str, tuple[tuple[float, float], float]]) -> str:
    """Says who generated how much, by what `Monitor.generation` returns."""
    said = [
        f"{name} {sum(tokens):.0f} tokens so far, last heard of {silent_s:.0f} s ago"
        for name, (tokens, silent_s) in generation.items()
    ]
    return "; ".join(said) or "no actor was ever heard of"
