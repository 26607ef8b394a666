"""Measures how long it takes to a reward, asynchronously and synchronously: `make bench-reward`.

The job `1:1` of `make bench-bound`, in which generation and training take about as long, is trained from its
base until batches have a mean reward of 0.8, by the same parts twice: both at once, as a run does, or one
after the other, where the actor makes the groups of a step with the newest weights and waits for the next
ones. Pairs of both, every other one backwards; seconds count from the first group's lease on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from benchmarks.actors.rig import Prepared, prepare
from benchmarks.bound.held import HeldRun
from benchmarks.pairs import compare
from benchmarks.results import measure_load, save, show
from cluster.cores import CoreKeeper
from cluster.session import keep_no_call_events
from core.errors import TrainingError

ROUNDS, DEFAULT_TIMEOUT_S = 3, 540.0
REWARD, MEAN_OF = 0.8, 10
"""Of so many batches in a row."""
OVERRIDES = (
    "actors.num_cpus=1",
    "actors.slots=128",
    "buffer.max_staleness=16",
    "buffer.capacity=96",
    "data.eval_rows=0",
)
MODES = "together", "alternating"


def train(
    prepared: Prepared, run_dir: Path, mode: str, aim: float, timeout_s: float = math.inf
) -> dict[str, float]:
    """Returns seconds and steps until the reward is reached, all steps are done or `timeout_s` is over, and
    the reward at the end.
    """
    run, groups = HeldRun(prepared, run_dir), prepared.config.learner.groups_per_step
    start_s = time.perf_counter()
    is_alternating, steps = mode == "alternating", 0
    if is_alternating:
        run.ask(run.shard.admit(groups))
    else:
        run.ask(run.actor.let(True))
    reward = 0.0
    while reward < aim and steps < prepared.config.run.steps and time.perf_counter() < start_s + timeout_s:
        steps += 1
        if is_alternating:
            run.until(lambda _: run.actor.version(), steps - 1)
            run.ask(run.actor.let(True))
            run.until(run.actor.until, steps * groups)
            run.ask(run.actor.let(False))
        run.ask(run.rank.let(1))
        run.until(run.rank.until, steps)
        reward = statistics.mean(run.ask(run.rank.rewards())[-MEAN_OF:]) if steps >= MEAN_OF else 0.0
    seconds = time.perf_counter() - start_s
    run.close()
    return {"seconds": seconds, "steps": float(steps), "reward": reward}


def main() -> None:
    """Measures the rounds asked for, prints and saves what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--reward", type=float, default=REWARD, help="the aim (default: %(default)s)")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=DEFAULT_TIMEOUT_S,
        help="no round begins later than two thirds of it",
    )
    arguments = parser.parse_args()
    load, began_s = measure_load(), time.monotonic()
    keep_no_call_events()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    while len(found["together"]) < arguments.rounds:
        number = len(found["together"])
        if number and time.monotonic() > began_s + arguments.timeout_s * 2 / 3:
            break
        for mode in MODES[:: 1 if number % 2 == 0 else -1]:
            with CoreKeeper(num_ranks=1), tempfile.TemporaryDirectory() as directory:
                prepared = prepare(Path(directory), *OVERRIDES)
                one = train(prepared, Path(directory, mode), mode, arguments.reward)
            if one["reward"] < arguments.reward:
                raise TrainingError(
                    f"{mode}: a mean reward of {one['reward']:.2f} after all steps, not {arguments.reward}"
                )
            found[mode].append(one)
            show(f"{mode}, until a mean reward of {arguments.reward}", [found[mode][-1]])
    seconds = {mode: [one["seconds"] for one in rounds] for mode, rounds in found.items()}
    row: dict[str, Any] = {
        "rounds": len(found["together"]),
        **{f"{mode}_s": statistics.median(values) for mode, values in seconds.items()},
        **{
            f"{mode}_steps": statistics.median(one["steps"] for one in rounds)
            for mode, rounds in found.items()
        },
        **compare(seconds["together"], seconds["alternating"]).fields("of_alternating"),
    }
    show("time to reward", [row])
    if arguments.reward == REWARD:
        print(f"written to {save('reward', {'1:1': row, 'load': load})}")
    ray.shutdown()


if __name__ == "__main__":
    main()
