"""Rollout actors without an engine, for the fleet's tests: they sleep, and do what a board without a network tells them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from actors.heartbeat import Heartbeat
from cluster.errors import DataError


class SleepingActor(Heartbeat):
    """`run` returns when `directory/<name>.retire` exists; `behaviour` is a word for what goes wrong.

    boot: the constructor raises. boot-later: the same, where an actor has run before. raise: run raises. data: it raises a
    DataError. exit: the process ends. return: run returns at once. deaf: it never retires. stuck: its loop
    stands still.
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
