"""Measures how near training and generation at once come to the slower of the two alone: `make bench-bound`.

A real rollout actor and a real learner rank, with a real buffer and board, are let run and held in turns,
some rounds of it. All figures are milliseconds a learner's step, or for the groups of one:

g            the actor alone
t            the rank alone, on groups that lie in the buffer
together     both at once, as in a run: no more is admitted than a quickstart admits, so that an actor that is
             faster waits, and so does a rank that is
alternating  the actor makes the groups of a step, then the rank trains on it: what synchronous means

`of_bound` is max(g, t) / together, 1 at best where each has a core; with `learner.num_cpus: auto` it may be
more. `cores_used` is how many cores all processes use while both run: where that is all there are, only less
work helps. Where the rest goes is told by process while both run, and of actor and rank while they are alone:
CPU time, time in which its threads could have run and had no core (`no_core`), and how long it waited for the
other (`waits`); of the shard also how many leases and insertions it was asked for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray

from benchmarks.actors.rig import Prepared, prepare
from benchmarks.bound.counters import Processes
from benchmarks.bound.held import HeldRun
from benchmarks.pairs import compare
from benchmarks.results import measure_load, save, show
from cluster.cores import CoreKeeper
from cluster.session import keep_no_call_events

ROUNDS, DEFAULT_TIMEOUT_S = 3, 360.0
WARM = 3
"""How many times a round's steps are taken before the first round."""
ADMITTED_STEPS, UNBOUNDED = 3, 10**6
"""Of groups that may exist untrained, while both run: a quickstart's. Else nothing is bounded. So many steps
are not measured either, in which whoever is faster fills or empties the buffer.
"""


class Halves(NamedTuple):
    """What is measured, and how many steps a half of a round has."""

    steps: int
    overrides: tuple[str, ...]
    model: str = ""


OVERRIDES = (
    "run.steps=100000",
    "data.eval_rows=0",
    "actors.num_cpus=1",
    "buffer.capacity=1600",
    "weights.publish_every=2",  # A quickstart's.
)
LARGE = "actors.max_new_tokens=48", "actors.slots=48", "learner.groups_per_step=8", "learner.lr=1e-12"
"""Nothing is learned: a policy that learns says less from phase to phase, which costs less."""
JOBS = {
    "2:1": Halves(8, ("actors.slots=48",)),
    "1:1": Halves(8, ("actors.slots=128",)),
    "1:2": Halves(3, LARGE, "8M"),
    "1:2 auto": Halves(3, (*LARGE, "learner.num_cpus=auto"), "8M"),
}


class Measurement:
    """Holds the processes of one job: `Measurement(prepared, run_dir, steps).round()`."""

    def __init__(self, prepared: Prepared, run_dir: Path, steps: int) -> None:
        self._run = run = HeldRun(prepared, run_dir)
        self._ask, self._until = run.ask, run.until
        self._shard, self._rank, self._actor = run.shard, run.rank, run.actor
        self._steps, self._groups = steps, prepared.config.learner.groups_per_step
        self._processes = Processes(run.pids())
        self._num_made = self._num_trained = 0

    def warm(self) -> None:
        """Lets each work alone for a while: an engine's first steps take twice as long."""
        self._generate(WARM * self._steps)
        self._use_up()

    def round(self) -> dict[str, float]:
        """Returns the milliseconds a step of each kind, and what processes spent of it: `cpu_ms.rank_t`."""
        found: dict[str, float] = {}

        def measure(name: str, call: Callable[[int], float], steps: int, *shown: str) -> None:
            before, start_s = self._told(), time.perf_counter()
            found[name] = 1e3 * call(steps)
            # A phase is a little longer than what is measured in it: it is told as if it were as long.
            share = found[name] / (time.perf_counter() - start_s)
            for part, told in self._told().items():
                for kind, spent_s in told.items() if part in shown else ():
                    found[f"{kind}.{part}_{name}"] = share * (spent_s - before[part][kind])

        everybody = tuple(self._processes.spent())
        # The rank takes a step more than is measured: what lies in the buffer must be enough for all of them.
        measure("g", self._generate, self._steps + 1, "actor")
        measure("t", self._train, self._steps, "rank")
        self._join()
        before, trained = self._ask(self._shard.calls()), self._num_trained
        measure("together", self._both, 2 * self._steps, *everybody)
        for kind, count in self._ask(self._shard.calls()).items():
            # One step more is let than is measured.
            found[f"{kind}.shard_together"] = (count - before[kind]) / (self._num_trained - trained)
        measure("alternating", self._alternate, self._steps)
        return found

    def close(self) -> None:
        """Ends all processes."""
        self._run.close()

    # --- phases, each in seconds a step ---

    def _generate(self, steps: int) -> float:
        self._count_made()
        self._ask(self._shard.admit(UNBOUNDED))
        self._ask(self._actor.let(True))
        first = self._until(self._actor.until, self._num_made + 1)
        self._num_made = self._until(self._actor.until, first + steps * self._groups)
        self._ask(self._actor.let(False))
        moments_s = self._ask(self._actor.since(first - 1))
        return (moments_s[-1] - moments_s[0]) * self._groups / (len(moments_s) - 1)

    def _train(self, steps: int) -> float:
        first = self._num_trained
        self._num_trained += steps + 1
        self._ask(self._rank.let(steps + 1))
        self._until(self._rank.until, self._num_trained)
        moments_s = self._ask(self._rank.since(first))
        return (moments_s[steps] - moments_s[0]) / steps

    def _join(self) -> None:
        """Lets both run from an empty buffer until they go on as they will for ever."""
        self._use_up()
        self._ask(self._shard.admit(ADMITTED_STEPS * self._groups))
        self._ask(self._actor.let(True))
        self._train(ADMITTED_STEPS)

    def _both(self, steps: int) -> float:
        step_s = self._train(steps)
        self._ask(self._actor.let(False))
        return step_s

    def _count_made(self) -> None:
        """Counts what was sent after the actor was told to hold: its moment is of the phase before."""
        self._num_made += len(self._ask(self._actor.since(self._num_made)))

    def _use_up(self) -> None:
        """Trains on what lies in the buffer: a step from a stock would be none of both."""
        self._count_made()
        if stock := self._num_made // self._groups - self._num_trained:
            self._num_trained += stock
            self._ask(self._rank.let(stock))
            self._until(self._rank.until, self._num_trained)

    def _alternate(self, steps: int) -> float:
        self._count_made()
        self._ask(self._shard.admit(UNBOUNDED))
        start_s = time.perf_counter()
        for _ in range(steps):
            self._ask(self._actor.let(True))
            self._num_made = self._until(self._actor.until, self._num_made + self._groups)
            self._ask(self._actor.let(False))
            self._num_trained += 1
            self._ask(self._rank.let(1))
            self._until(self._rank.until, self._num_trained)
        return (time.perf_counter() - start_s) / steps

    # --- counters ---

    def _told(self) -> dict[str, dict[str, float]]:
        """Returns what each process has spent and waited so far, in seconds, by kind."""
        told = {
            name: {"cpu_ms": spent.cpu_s, "no_core_ms": spent.delayed_s}
            for name, spent in self._processes.spent().items()
        }
        told["actor"]["waits_ms"] = self._ask(self._actor.waited_s())
        told["rank"]["waits_ms"] = self._ask(self._rank.waited_s())
        return told


def measure(directory: Path, name: str, rounds: int, deadline_s: float) -> dict[str, Any]:
    """Returns the row of a job, with the processes' figures under `parts`. Rounds that would begin after
    `deadline_s` are left out, but for the first.
    """
    job = JOBS[name]
    directory.mkdir()
    prepared = prepare(directory, *OVERRIDES, *job.overrides, model=job.model)
    measurement = Measurement(prepared, directory, job.steps)
    measurement.warm()
    found = [measurement.round()]
    while len(found) < rounds and time.monotonic() < deadline_s:
        found.append(measurement.round())
    measurement.close()
    figures = {key: [one[key] for one in found] for key in found[0]}
    middle = {key: statistics.median(values) for key, values in figures.items()}
    slower = [max(one["g"], one["t"]) for one in found]
    return {
        "job": name,
        "rounds": len(found),
        **{key: middle[key] for key in ("g", "t", "together", "alternating")},
        "g_to_t": middle["g"] / middle["t"],
        **compare(slower, figures["together"]).fields("of_bound"),
        **compare(figures["together"], figures["alternating"]).fields("of_alternating"),
        "cores_used": _cpu_ms(middle) / middle["together"],
        "parts": _parts(middle),
    }


def _cpu_ms(figures: dict[str, float]) -> float:
    """Returns the CPU time of all processes in a step of both at once."""
    is_meant = {key for key in figures if key.startswith("cpu_ms.") and key.endswith("_together")}
    return sum(figures[key] for key in is_meant)


def _parts(figures: dict[str, float]) -> dict[str, dict[str, float]]:
    """Returns the figures by process and phase, then by kind."""
    parts: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        kind, _, where = key.partition(".")
        if where:
            parts.setdefault(where, {})[kind] = value
    return parts


def main() -> None:
    """Measures the jobs asked for (all by default, six minutes on two quiet cores), prints and saves them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of all phases, the more the surer")
    parser.add_argument(
        "--timeout-s", type=float, default=DEFAULT_TIMEOUT_S, help="about how long, with fewer rounds"
    )
    arguments = parser.parse_args()
    asked = arguments.jobs or list(JOBS)
    if unknown := set(asked) - set(JOBS):
        parser.error(f"unknown jobs {sorted(unknown)}; expected some of {', '.join(JOBS)}")
    load, start_s = measure_load(), time.monotonic()
    keep_no_call_events()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    with CoreKeeper(num_ranks=1), tempfile.TemporaryDirectory() as directory:
        for number, name in enumerate(asked):
            deadline_s = start_s + arguments.timeout_s * (number + 1) / len(asked)
            row = measure(Path(directory, str(number)), name, arguments.rounds, deadline_s)
            _show(row)
            path = save("bound", {name: row, "load": load}, keep=True)
    print(f"written to {path}")
    ray.shutdown()


def _show(row: dict[str, Any]) -> None:
    parts = row["parts"]
    show("milliseconds a step", [{key: value for key, value in row.items() if key != "parts"}])
    kinds = {kind: "" for told in parts.values() for kind in told}
    show(
        "of that, by process and phase", [{"process": name, **kinds, **told} for name, told in parts.items()]
    )


if __name__ == "__main__":
    main()
