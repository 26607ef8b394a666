"""Measures what the rollout actors cost and how they scale: `make bench-actors`. Real Ray, buffer and board;
ratios within one run, the halves of each pair in turns.

sums       an actor against bare vLLM `generate`, 0.3M parameters, the quickstart's sums of 3 to 4 tokens
large      the same with 8M parameters and up to 48 tokens, where an engine's step takes longer than all else
together   two actors at once against two bare engines at once, 0.3M
pause      how long an actor stands still for an update, against vLLM's own load of the same tensors; 0.3M, 30M
scaling    1, 2, 4, 8, 16 actors with a simulated engine: groups per second against linear
straggler  learner steps per second with one of four (simulated) actors five times slower, against none slower

Each engine has a process of its own. `of_bare` compares samples a second by the clock, `of_bare_cpu` samples
a CPU second of that process alone: other programs on the machine hardly count there.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from benchmarks.actors.against_bare import both, pause, speed
from benchmarks.actors.rig import Prepared, Rig, SimulatedActor, prepare
from benchmarks.results import measure_load, save, show

WARM_S = 4.0
SIMULATED_S = 10.0


def scaling(directory: Path) -> list[dict[str, float]]:
    """Returns groups/s of simulated actors by their number, and the share of linear growth from one."""
    prepared = prepare(directory, "actors.slots=32", "buffer.capacity=100000")
    rows: list[dict[str, float]] = []
    for count in (1, 2, 4, 8, 16):
        names = [f"actor-{index}" for index in range(count)]
        rig = Rig(prepared, str(directory / f"scaling-{count}"), names, SimulatedActor)
        rig.consume(WARM_S)
        rate = rig.groups_per_s(SIMULATED_S)
        rig.close()
        linear = count * rows[0]["groups_per_s"] if rows else rate
        rows.append({"actors": count, "groups_per_s": rate, "share_of_linear": rate / linear})
    return rows


def straggler(directory: Path) -> dict[str, float]:
    """Returns steps per second of a learner that needs half of what four simulated actors make, without and
    with a slow one.
    """
    more = "actors.slots=32", "learner.groups_per_step=8", "buffer.capacity=100000"
    prepared, rates = prepare(directory, *more), []
    for slow in (False, True):
        names = ["actor-0", "actor-1", "actor-2", "actor-3-slow" if slow else "actor-3"]
        rig = Rig(prepared, str(directory / f"straggler-{slow}"), names, SimulatedActor)
        rig.consume(WARM_S)
        rates.append(rig.consume(SIMULATED_S, step_s=0.8) / SIMULATED_S)
        rig.close()
    return {"steps_per_s": rates[0], "with_a_slow_actor": rates[1], "kept": rates[1] / rates[0]}


def main() -> None:
    """Measures the rows asked for (all by default), prints them and writes them to benchmarks/results/; other
    rows stay.
    """
    sums = "actors.num_cpus=1", "buffer.capacity=256"
    long = "actors.num_cpus=1", "buffer.capacity=64", "actors.max_new_tokens=48", "actors.slots=64"

    def compared(
        at: Path, prepared: Prepared, compare: Callable[..., Any] = speed, count: int = 1, **how: Any
    ) -> Any:
        with both(at / "run", prepared, count) as (rig, bare):
            return compare(rig, bare, **how)

    measures: dict[str, Callable[[Path], Any]] = {
        "sums": lambda at: compared(at, prepare(at, *sums)),
        "large": lambda at: compared(at, prepare(at, *long, model="8M"), rounds=3),
        "together": lambda at: compared(at, prepare(at, *sums), count=2),
        "pause": lambda at: compared(at, prepare(at, *sums), pause),
        "pause_30M": lambda at: compared(at, prepare(at, *sums, model="30M"), pause),
        "scaling": scaling,
        "straggler": straggler,
    }
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(measures))
    asked = parser.parse_args().rows or measures
    if unknown := set(asked) - set(measures):
        parser.error(f"unknown rows {sorted(unknown)}; expected some of {', '.join(measures)}")
    load = measure_load()
    ray.init(address="local", num_cpus=64, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as directory:
        for row in asked:
            found = measures[row](Path(tempfile.mkdtemp(dir=directory)))
            show(row, found if isinstance(found, list) else [found])
            path = save("actors", {row: found, "load": load}, keep=True)
    print(f"written to {path}")
    ray.shutdown()


if __name__ == "__main__":
    main()
