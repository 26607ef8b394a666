"""Measures how much memory a process and its descendants use: pages that are theirs and were touched, not
what they have reserved.

A reservation costs nothing and is large: node, WebAssembly, CUDA and a mapped file take tens of GiB of
address space. Pages of mapped files are not counted either, since the kernel takes them back when it needs
them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable

import psutil

_OWN_PAGES = re.compile(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", re.MULTILINE)
_SHARED_OUT = re.compile(r"^(?:Pss_Anon|Pss_Shmem):\s+(\d+) kB", re.MULTILINE)


def family(pid: int) -> list[int]:
    """Returns the ids of the process and of its descendants; none when the process is gone."""
    with contextlib.suppress(psutil.Error):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []


def used_bytes(pids: Iterable[int], limit_bytes: int) -> int:
    """Returns the bytes that the processes use. Memory that several share counts once where the plain sum
    exceeds `limit_bytes`.
    """
    pids = list(pids)
    used = sum(_bytes_in(f"/proc/{pid}/status", _OWN_PAGES) for pid in pids)
    if used <= limit_bytes or len(pids) < 2:
        return used
    return sum(_bytes_in(f"/proc/{pid}/smaps_rollup", _SHARED_OUT) for pid in pids)  # Exact, and slow.


def _bytes_in(path: str, pattern: re.Pattern[str]) -> int:
    with contextlib.suppress(OSError), open(path, encoding="ascii") as file:
        return 1024 * sum(int(kilobytes) for kilobytes in pattern.findall(file.read()))
    return 0
