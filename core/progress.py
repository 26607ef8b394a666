"""What a command is doing before its processes can say so themselves."""
# ruff: noqa: T201 (the output of the command line)

from __future__ import annotations

import contextlib


def say(text: str) -> None:
    """A line on what begins now. Who closed the output does not want it."""
    with contextlib.suppress(OSError):
        print(f"{text} ...", flush=True)
