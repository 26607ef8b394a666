"""Says what a command is doing before its processes can say so themselves."""
# ruff: noqa: T201 (the output of the command line)

from __future__ import annotations

import contextlib


def say(text: str) -> None:
    """Prints a line on what begins now, unless the output was closed by its reader."""
    with contextlib.suppress(OSError):
        print(f"{text} ...", flush=True)
