"""Two ranks against twice one, a thread each, over the same batch: the part `ranks` of benchmarks/learner/.

All four processes are loaded before anything is measured. One rank, two, and two strangers of one rank each
take steps in turns, by the clock: whoever does not step sleeps. Strangers share nothing but the machine, and
take a whole batch each: they say what two cores give to two who need not hear of one another. Beside the
clock the CPU seconds, which say how much of a step two ranks do that one does not: gathers, reductions and
the wait for one another, and what memory that both use costs.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.learner.cases import SHAPES, Shape, config_of, free_port, make_batch, make_model
from benchmarks.pairs import compare, interleave

RANKS = 2
ROUNDS, WARM_ROUNDS = 3, 2
SHARED = tuple(
    shape._replace(groups=groups, rounds=ROUNDS) for shape, groups in zip(SHAPES[2:], (24, 16), strict=True)
)
"""Work large enough: each of two ranks has micro-batches that are full."""


def measure_ranks(shapes: tuple[Shape, ...] = SHARED) -> list[dict[str, Any]]:
    """Returns for each shape the seconds of a step by one rank, by two, and of strangers at once.

    `of_twice` is half of how much sooner two are done than one, `strangers_of_twice` what strangers reach of
    that, `of_strangers` how much sooner two are done than strangers would be with half a batch each, and
    `cpu_of_one` the CPU time of one over that of both.
    """
    return [_compared(shape) for shape in shapes]


def _compared(shape: Shape) -> dict[str, Any]:
    cpu_s: dict[str, list[float]] = {"one": [], "two": [], "strangers": []}
    with tempfile.TemporaryDirectory() as model_dir:
        make_model(shape).save_pretrained(model_dir)
        with (
            _gang(shape, model_dir, 1) as one,
            _gang(shape, model_dir, 1) as stranger,
            _gang(shape, model_dir, RANKS) as two,
        ):
            calls = {
                "one": lambda: _step(one, cpu_s["one"]),
                "two": lambda: _step(two, cpu_s["two"]),
                "strangers": lambda: _step(one + stranger, cpu_s["strangers"]),
            }
            steps_s = interleave(calls, shape.rounds, warm_rounds=WARM_ROUNDS)
    twice = [RANKS * step_s for step_s in steps_s["two"]]
    return {
        "case": shape.name,
        "tokens_per_step": sum(group.num_tokens for group in make_batch(shape).groups),
        "one_rank_s": statistics.median(steps_s["one"]),
        "two_ranks_s": statistics.median(steps_s["two"]),
        "strangers_s": statistics.median(steps_s["strangers"]),
        **compare(steps_s["one"], twice).fields("of_twice"),
        **compare(steps_s["one"], steps_s["strangers"]).fields("strangers_of_twice"),
        **compare(steps_s["strangers"], twice).fields("of_strangers"),
        "cpu_of_one": compare(cpu_s["one"], cpu_s["two"]).median,
    }


@contextmanager
def _gang(shape: Shape, model_dir: str, count: int) -> Iterator[list[Connection]]:
    """Lets `count` ranks load, and yields a connection to each; they end when it is closed."""
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    ours, ranks = [], []
    try:
        for rank in range(count):
            mine, theirs = spawn.Pipe()
            ranks.append(
                spawn.Process(target=_rank, args=(theirs, shape, model_dir, rank, count, port), daemon=True)
            )
            ranks[-1].start()
            theirs.close()  # So that a rank that dies is an end of its connection here.
            ours.append(mine)
        yield ours
    finally:
        for mine in ours:
            mine.close()
        for each in ranks:
            each.join(10)
            each.kill()


def _step(ranks: list[Connection], cpu_s: list[float]) -> float:
    """Lets all of these ranks take a step; returns the seconds until the last is done, and notes their CPU
    seconds.
    """
    for rank in ranks:
        rank.send(True)
    told = [rank.recv() for rank in ranks]
    cpu_s.append(sum(spent_s for _, spent_s in told))
    return max(step_s for step_s, _ in told)


def _rank(orders: Connection, shape: Shape, model_dir: str, rank: int, count: int, port: int) -> None:
    """Takes a step for each order, until there are no more."""
    import torch

    from learner.objectives import load_objective
    from learner.policy.zero import ZeroPolicy, init_process_group
    from learner.step.share import Share
    from learner.step.update import Updater

    torch.set_num_threads(1)
    device = init_process_group(rank, count, "127.0.0.1", port, use_gpu=False, timeout_s=120)
    config = config_of(shape, model_dir, "cpu")
    policy, objective = ZeroPolicy(config.model, config.learner), load_objective(config.objective)
    updater, share = Updater(config, policy, objective, pad_id=0, device=device), Share.of(make_batch(shape))
    try:
        while orders.recv():
            start_s, before_s = time.perf_counter(), time.process_time()
            updater.update(share, config.learner.lr)
            orders.send((time.perf_counter() - start_s, time.process_time() - before_s))
    except EOFError:
        return
