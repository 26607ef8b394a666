"""A policy, a board and an object store in this process: what roads for weights are tested with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import torch

from actors.receiver import Receiver
from core.weights.board import Held
from core.weights.snapshots import Manifest, read_snapshot


class Plain:
    """A policy on one rank: what `named_weights` yields IS the parameter, as with ZeRO-3 on one rank."""

    def __init__(self, size: int = 64) -> None:
        self.module = torch.nn.Sequential(
            torch.nn.Linear(size, size), torch.nn.LayerNorm(size), torch.nn.Linear(size, 3)
        )

    def named_weights(
        self, bucket_bytes: int, *, adapters_alone: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, parameter.data) for name, parameter in self.module.named_parameters())

    def copy(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}


class Method:
    """`handle.method`: `remote` makes the call at once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    async def remote(self, *arguments: Any, **named: Any) -> Any:
        return self._function(*arguments, **named)


class Board:
    """A handle that keeps what is published. `actors`: by name, those that can be pushed weights."""

    def __init__(self) -> None:
        self.published: dict[int, dict[str, torch.Tensor]] = {}
        self.needs: dict[int, list[np.ndarray]] = {}  # By version, all that was read for it.
        self.evaluated: list[int] = []
        self.board = "board"
        self.actors: dict[str, Any] = {}
        self.publish, self.members, self.announce = (
            Method(self._publish),
            Method(lambda: self.actors),
            Method(lambda version: None),
        )

    def _publish(
        self, manifest: bytes, buckets: list[np.ndarray], version: int, *, evaluate: Sequence[str]
    ) -> Held:
        self.needs[version] = buckets
        self.published[version] = dict(
            read_snapshot(msgspec.msgpack.decode(manifest, type=Manifest), buckets)
        )
        self.evaluated += [version] * len(evaluate)
        return Held(self.board, sorted({*self.evaluated, *sorted(self.published)[-2:]}))


class Store:
    """An object store: `delay_s` for a bucket, `error` instead of taking one; `gate` closed: none is
    taken.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s, self.error, self.num_stored = delay_s, "", 0
        self.sizes: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, bucket: np.ndarray) -> np.ndarray:
        self.gate.wait(60)
        if self.error:
            raise OSError(self.error)
        time.sleep(self.delay_s)
        self.num_stored += 1
        self.sizes.append(bucket.nbytes)
        return bucket.copy()


class Piecewise:
    """An engine that takes weights in pieces, and notes what is asked of it."""

    def __init__(self) -> None:
        self.version = 4
        self.asked: list[str] = []
        self.fails_at = ""
        self.all_are_there = threading.Event()
        self.all_are_there.set()
        self._has_arrived = False

    def note(self, verb: str) -> None:
        self.asked.append(verb)
        if verb == self.fails_at:
            raise RuntimeError(f"{verb} broke")

    def connect_transfer(self, init_info: dict[str, Any]) -> int:
        self.note("connect")
        assert self.all_are_there.wait(60)
        return int(init_info.get("group", 0))

    def use_connection(self, connection: int) -> None:
        self.note(f"use {connection}")

    def drop_connection(self, connection: int) -> None:
        self.note(f"drop {connection}")

    def start_transfer(self) -> None:
        self._has_arrived = False
        self.note("start")

    def update_transfer(self, update_info: dict[str, Any]) -> None:
        self._has_arrived = True
        self.note("update")

    def finish_transfer(self, version: int, probes: Any) -> int:
        self.note("finish")
        self.version = version
        return len(probes)

    def undo_transfer(self) -> None:
        self.asked.append("undo")
        self.version = -1 if self._has_arrived else self.version

    def abort_transfer(self) -> None:
        self.asked.append("abort")


class Loop:
    """An actor's loop that only looks for orders; they come from other threads."""

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.engine, self.told, self.declines, self.beats, self.updated = Piecewise(), list[str](), "", 0, 0
        self.receiver = Receiver(
            self.engine,
            timeout_s,
            may_start=lambda: self.declines,
            on_updated=lambda start_s: setattr(self, "updated", self.updated + 1),
            beat=lambda: setattr(self, "beats", self.beats + 1),
            tell=self.told.append,
        )
        self._threads = ThreadPoolExecutor(4)
        self._ended = threading.Event()
        self._running = self._threads.submit(self._run)

    def _run(self) -> None:
        while not self._ended.wait(0.001):
            self.receiver.poll()

    def start_order(self, verb: str, number: int = 1, *arguments: Any) -> Future[str]:
        return self._threads.submit(self.receiver.order, verb, number, *arguments)

    def order(self, verb: str, number: int = 1, *arguments: Any) -> str:
        return self.start_order(verb, number, *arguments).result(60)

    def close(self) -> None:
        self._ended.set()
        self._running.result(60)
