"""Environments that do what none should, when they are told to: `step("hang")`."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np

CHILD = [sys.executable, "-c", "import time; time.sleep(600)"]
HELD: list[object] = []


def do(what: str) -> Any:
    """Does it, and returns an observation."""
    word, _, rest = what.partition(" ")
    return DEEDS[word](rest)


def _raise(rest: str) -> None:
    raise ValueError(rest)


def _cancel(rest: str) -> None:
    raise asyncio.CancelledError


class _Unreadable(Exception):
    def __str__(self) -> str:
        raise KeyError("no message")


def _raise_unreadable(rest: str) -> None:
    raise _Unreadable


def _spin(rest: str) -> bool:
    return re.match(r"(a+)+$", "a" * 60 + "b") is not None  # It holds the GIL for longer than anybody waits.


def _flood(rest: str) -> None:
    while True:
        HELD.append(bytearray(b"x") * 2**22)
        time.sleep(0.005)


def _flood_elsewhere(rest: str) -> None:
    code = "held = []\nwhile True: held.append(bytearray(b'x') * 2**22)"
    subprocess.run([sys.executable, "-c", code], check=False)


def _child(rest: str) -> str:
    return str(subprocess.Popen(CHILD).pid)


def _grandchild(rest: str) -> str:
    """Starts a process whose parent ends at once and which has a session of its own."""
    code = f"import subprocess; print(subprocess.Popen({CHILD!r}, start_new_session=True, stdout=-3, stderr=-3).pid)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    ).stdout.strip()


def _fork(rest: str) -> str:
    """Starts a process that holds all file descriptors of this one."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    return str(process.pid)


def _thread(rest: str) -> str:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return "started"


def _print(rest: str) -> str:
    for fd in (1, 2):
        os.write(fd, b"\x00\x00\x00\x05hello" * 20)
    print("x" * 1000, flush=True)
    return "printed"


def _move(rest: str) -> str:
    os.chdir("/")
    os.environ["AGRO_TEST_MOVED"] = "1"
    return "moved"


DEEDS: dict[str, Any] = {
    "say": lambda rest: rest,
    "raise": _raise,
    "raise_half": lambda rest: _raise("half \ud83d"),
    "raise_unreadable": _raise_unreadable,
    "cancel": _cancel,
    "show": lambda rest: [{"role": "user", "content": "a", **eval(rest)}],
    "exit": lambda rest: sys.exit(rest),
    "end": lambda rest: os._exit(int(rest)),
    "kill": lambda rest: os.kill(os.getpid(), 9),
    "hang": lambda rest: time.sleep(600),
    "spin": _spin,
    "flood": _flood,
    "flood_elsewhere": _flood_elsewhere,
    "child": _child,
    "grandchild": _grandchild,
    "fork": _fork,
    "thread": _thread,
    "print": _print,
    "close_files": lambda rest: os.closerange(3, 1024),
    "pid": lambda rest: str(os.getpid()),
    "move": _move,
    "where": lambda rest: f"{os.getcwd()} {os.environ.get('AGRO_TEST_MOVED')}",
    "draw": lambda rest: f"{random.random()} {np.random.random()} {list({'a', 'b', 'c', 'd', 'e'})}",
    "sleep": lambda rest: time.sleep(float(rest)),
}


class Bad:
    """Does what it is told; its row may have something to be done by its constructor, `reset` and `close`."""

    def __init__(self, ready: str = "say") -> None:
        self.said: list[str] = []
        do(ready)

    def reset(self, reset: str = "say", close: str = "say", **row: Any) -> Any:
        self._close = close
        return do(reset)

    def step(self, text: str) -> Any:
        self.said.append(text)
        if text.startswith("return "):
            return eval(text.removeprefix("return "))
        return do(text), None, text == "say bye"

    def close(self) -> None:
        do(self._close)


class BadAsync:
    """Does the same on an event loop."""

    async def reset(self, **row: Any) -> None:
        self.row = row

    async def close(self) -> None:
        await asyncio.sleep(self.row.get("close_s", 0))

    async def step(self, text: str) -> Any:
        if text == "await":
            await asyncio.sleep(600)
        if text == "insist":
            while True:
                try:
                    await asyncio.sleep(600)
                except asyncio.CancelledError:
                    self.row["insisted"] = True
        if text == "soon":
            await asyncio.sleep(0.3)
            return "there", 0.5, True
        return do(text), None, False
