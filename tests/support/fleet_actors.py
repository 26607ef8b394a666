"""Rollout actors without an engine, for the fleet's tests: they sleep, and do what a board without a
network tells them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from actors.heartbeat import Heartbeat
from core.errors import DataError


class SleepingActor(Heartbeat):
    """`run` returns when `directory/<name>.retire` exists; `behaviour` is a word for what goes wrong.

    boot: the constructor raises. boot-later: the same, where an actor has run before. raise: run raises.
    data: it raises a DataError. exit: the process ends. return: run returns at once. deaf: it never retires.
    stuck: its loop stands still.
    """

    def __init__(self, name: str, directory: str, behaviour: str = "", load_s: float = 0.0) -> None:
        self._name, self._directory, self._behaviour = name, Path(directory), behaviour
        time.sleep(load_s)
        if behaviour == "boot":
            raise ValueError("no such engine")

    def run(self) -> dict[str, float]:
        """Sleeps until it is retired."""
        if self._behaviour == "raise":
            raise ValueError("the engine broke")
        if self._behaviour == "data":
            raise DataError("row 3 is empty")
        if self._behaviour == "exit":
            print("last words of the engine", file=sys.stderr, flush=True)
            os._exit(9)
        while self._behaviour != "return":
            told = self._directory / f"{self._name}.retire"
            if told.exists() and self._behaviour != "deaf":
                return {}
            if self._behaviour != "stuck" or self._turned_s is None:
                self._beat()
            time.sleep(0.02)
        return {}


class UnluckyRank:
    """In place of a LearnerRank: of a run named `dies-loading` the last rank dies while it loads; of one
    named `hangs`, it is stopped in training, of which the others learn by an error that names nobody.
    """

    def __init__(self, rank: int, config: Any, pad_id: int) -> None:
        self.rank, self.name, self.is_last = rank, config.run.name, rank == config.learner.ranks - 1

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def ping(self) -> int:
        return self.rank

    def start(self, address: tuple[str, int]) -> None:
        if self.is_last and self.name == "dies-loading":
            os.kill(os.getpid(), signal.SIGKILL)

    def train(self, *arguments: Any) -> None:
        if self.is_last:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)
        raise RuntimeError("[gloo] Timed out waiting 90000ms for recv operation to complete")


class IdleActor(Heartbeat):
    """In place of a RolloutActor in a whole supervisor: it never works, and lives until it is killed."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def run(self) -> None:
        while True:
            self._beat()
            time.sleep(0.05)


class IdleRank:
    """In place of a LearnerRank in a whole supervisor: it trains until it is killed."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    def ping(self) -> int:
        return 0

    def start(self, address: tuple[str, int]) -> None:
        pass

    def train(self, *arguments: Any) -> None:
        time.sleep(600)
