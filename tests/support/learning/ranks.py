"""Processes of learner ranks: forked from one that has imported already what all of them need, which
takes half a minute of a core.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "deepspeed",
        "peft",
        "ray",
        "transformers.integrations.deepspeed",
        "transformers.models.llama.modeling_llama",
        "learner.worker",
    ]
)


def start_ranks(target: Callable[..., None], num_ranks: int, *arguments: Any) -> list[ForkServerProcess]:
    """`target(*arguments, rank)` in a process for each rank."""
    ranks = [PROCESSES.Process(target=target, args=(*arguments, rank)) for rank in range(num_ranks)]
    for rank in ranks:
        rank.start()
    return ranks


def run_ranks(target: Callable[..., None], num_ranks: int, *arguments: Any, timeout_s: float = 240.0) -> None:
    """As `start_ranks`, to their end, which must be a good one."""
    ranks = start_ranks(target, num_ranks, *arguments)
    for rank in ranks:
        rank.join(timeout_s)
    assert [rank.exitcode for rank in ranks] == [0] * num_ranks
