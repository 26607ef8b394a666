"""Measures how near training and generation at once come to the slower of the two alone: `make bench-bound`.

A real rollout actor and a real learner rank, with a real buffer and board, are let run and held in turns,
some rounds of it. All figures are seconds a learner's step, or the groups of one:

g            the actor alone, until it has made so many steps' groups
t            the rank alone, as many steps from the groups that lie in the buffer
together     both at once, until twice as many steps are made and trained: the later of the two counts
alternating  the actor makes the groups of a step, then the rank trains on it: what synchronous means

`of_bound` is max(g, t) / together, 1 at best where each has a core; with `learner.num_cpus: auto` it may be
more. CPU milliseconds a step are told by process while both run, and of actor and rank while they are alone:
where these spend more together, they share the machine's caches, or the actor, being faster, made groups
beyond the steps counted; what the others spend is lost to both.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray

from actors.rollout import RolloutActor
from benchmarks.actors.__main__ import prepare
from benchmarks.actors.rig import TIMEOUT_S, Deaf, Prepared
from benchmarks.pairs import compare
from benchmarks.results import measure_load, save, show
from buffer.client import connect_buffer
from buffer.server import ReplayBuffer
from cluster.fleet import ActorClient
from cluster.gang import RankClient
from core.calls import Calls, asks
from core.monitor_client import MonitorClient
from core.processes import remote, threads, whereabouts
from core.weights.board import BOARD, Board, BoardClient
from learner.worker import LearnerRank

ROUNDS = 3
LOOK_S = 0.01
STOCK_STEPS = 2
"""Steps whose groups lie in the buffer before a round: else the rank would begin with a wait."""


class Halves(NamedTuple):
    """What is measured, and how many steps a half of a round has."""

    steps: int
    overrides: tuple[str, ...]
    model: str = ""


LARGE = "actors.max_new_tokens=48", "actors.slots=64", "learner.groups_per_step=8"
JOBS = {
    "2:1": Halves(8, ("actors.slots=16", "buffer.capacity=1600")),
    "1:1": Halves(8, ("actors.slots=128", "buffer.capacity=1600")),
    "1:2": Halves(3, (*LARGE, "buffer.capacity=400"), "8M"),
    "1:2 auto": Halves(3, (*LARGE, "buffer.capacity=400", "learner.num_cpus=auto"), "8M"),
}


class HeldActor(RolloutActor):
    """A rollout actor that generates while it is let."""

    def __init__(self, *arguments: Any) -> None:
        self._may_run = threading.Event()
        super().__init__(*arguments)

    def let(self, runs: bool) -> None:
        """Lets it generate, or holds it."""
        self._may_run.set() if runs else self._may_run.clear()

    def _generate(self) -> None:
        if self._may_run.wait(LOOK_S):
            super()._generate()


class HeldRank(LearnerRank):
    """A learner rank that takes as many steps as it is let."""

    def __init__(self, *arguments: Any) -> None:
        self._may_step = threading.Semaphore(0)
        self._ends_s: tuple[float, ...] = ()
        super().__init__(*arguments)

    def let(self, steps: int) -> None:
        """Lets it take so many steps more."""
        self._may_step.release(steps)

    def ends(self) -> tuple[float, ...]:
        """Returns the moments at which its steps ended, by `time.perf_counter`."""
        return self._ends_s

    def _update(self, *arguments: Any) -> Any:
        self._may_step.acquire()
        return super()._update(*arguments)

    def _report(self, *arguments: Any) -> None:
        super()._report(*arguments)
        self._ends_s = (*self._ends_s, time.perf_counter())


class Listening(Deaf):
    """Stands for the monitor, also to the learner."""

    def log_step(self, row: Mapping[str, float]) -> None:
        """Ignores a step's metrics."""

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Ignores samples to show."""

    def generation(self) -> dict[str, Any]:
        """Knows of nobody."""
        return {}


class HeldActorClient(ActorClient):
    """The actor of a measurement."""

    let = asks(HeldActor.let)


class HeldRankClient(RankClient):
    """The rank of a measurement."""

    let = asks(HeldRank.let)
    ends = asks(HeldRank.ends)


class Measurement:
    """Holds the processes of one job: `Measurement(prepared, run_dir, steps).round()`."""

    def __init__(self, prepared: Prepared, run_dir: Path, steps: int) -> None:
        config, prompts, _ = prepared
        self._steps, self._groups, self.calls = steps, config.learner.groups_per_step, Calls(TIMEOUT_S)
        ask, served = self.calls.ask, {"num_cpus": 0, "max_concurrency": 1000}
        shard = remote(ReplayBuffer).options(**served).remote(config, str(run_dir), len(prompts), 0)
        self._buffer = connect_buffer([shard])
        board_class = remote(Board).options(**served)
        board = BoardClient(board_class.remote(config.run, {}, _ignore), BOARD)
        monitor = MonitorClient(remote(Listening).options(num_cpus=0).remote(), "nobody")
        peers = self._buffer, board, monitor
        held = {"num_cpus": 0, "max_concurrency": 3}
        rank_class = remote(HeldRank).options(runtime_env=threads(1), **held)
        actor_class = remote(HeldActor).options(runtime_env=threads(1, engine=True), **held)
        self._rank = HeldRankClient(rank_class.remote(0, config, 0), "the rank")
        self._actor = HeldActorClient(actor_class.remote("actor-0", config, prompts, {}, *peers), "the actor")
        ask(self._rank.start(ask(self._rank.address())))
        ask(self._actor.ping())
        trained = self._rank.train(*peers, str(run_dir / "policy"))
        self._runs = [self.calls.start(call, math.inf) for call in (trained, self._actor.run())]
        parts = {"actor": self._actor, "rank": self._rank, "shard": self._buffer.shards[0], "board": board}
        self._clients = {**parts, "monitor": monitor}
        places = {name: ask(client.inside(whereabouts)) for name, client in self._clients.items()}
        self._processes = {name: psutil.Process(place.pid) for name, place in places.items()}

    def warm(self) -> None:
        """Makes the stock of a round, and takes the first steps."""
        self._generate(STOCK_STEPS + self._steps)
        self._train(self._steps)

    def round(self) -> dict[str, float]:
        """Returns the seconds a step of each kind, and the CPU milliseconds a step by process."""
        found: dict[str, float] = {}

        def measure(name: str, steps: int, call: Callable[[int], float], *shown: str) -> None:
            before = {part: _cpu_s(process) for part, process in self._processes.items()}
            found[name] = call(steps)
            for part in shown:
                found[f"cpu_ms_{part}_{name}"] = 1e3 * (_cpu_s(self._processes[part]) - before[part]) / steps

        measure("g", self._steps, self._generate, "actor")
        measure("t", self._steps, self._train, "rank")
        measure("together", 2 * self._steps, self._both, *self._processes)
        measure("alternating", self._steps, self._alternate)
        return found

    def close(self) -> None:
        """Ends all processes."""
        for run in self._runs:
            run.give_up()
        for client in self._clients.values():
            ray.kill(client.handle)

    def _generate(self, steps: int) -> float:
        start_s, before = time.perf_counter(), self._inserted()
        self.calls.ask(self._actor.let(True))
        while self._inserted() < before + steps * self._groups:
            self._wait()
        spent_s, made = time.perf_counter() - start_s, self._inserted() - before
        self.calls.ask(self._actor.let(False))
        return spent_s * self._groups / made

    def _train(self, steps: int) -> float:
        start_s, until = time.perf_counter(), len(self._ends()) + steps
        self.calls.ask(self._rank.let(steps))
        while len(self._ends()) < until:
            self._wait()
        return (self._ends()[-1] - start_s) / steps

    def _both(self, steps: int) -> float:
        start_s, until = time.perf_counter(), len(self._ends()) + steps
        self.calls.ask(self._rank.let(steps))
        generated_s = self._generate(steps)
        # The actor goes on while the rank trains on what it made: neither has the machine alone.
        self.calls.ask(self._actor.let(True))
        while len(self._ends()) < until:
            self._wait()
        self.calls.ask(self._actor.let(False))
        return max(generated_s, (self._ends()[-1] - start_s) / steps)

    def _alternate(self, steps: int) -> float:
        start_s = time.perf_counter()
        for _ in range(steps):
            self._generate(1)
            self._train(1)
        return (time.perf_counter() - start_s) / steps

    def _inserted(self) -> float:
        return self.calls.ask(self._buffer.stats())["buffer/inserted"]

    def _ends(self) -> tuple[float, ...]:
        return self.calls.ask(self._rank.ends())

    def _wait(self) -> None:
        """Waits for the next look. Raises what a process died of."""
        time.sleep(LOOK_S)
        for run in self._runs:
            if run.is_done():
                run.result()


def measure(directory: Path, name: str, rounds: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Returns the row of a job, and the CPU milliseconds a step by process."""
    job = JOBS[name]
    directory.mkdir()
    prepared = prepare(directory, "actors.num_cpus=1", *job.overrides, model=job.model)
    measurement = Measurement(prepared, directory, job.steps)
    measurement.warm()
    found = [measurement.round() for _ in range(rounds)]
    measurement.close()
    figures = {key: [one[key] for one in found] for key in found[0]}
    middle = {key: statistics.median(values) for key, values in figures.items()}
    slower = [max(one["g"], one["t"]) for one in found]
    row = {
        "job": name,
        **{key: middle[key] for key in ("g", "t", "together", "alternating")},
        "g_to_t": middle["g"] / middle["t"],
        **compare(slower, figures["together"]).fields("of_bound"),
        **compare(figures["together"], figures["alternating"]).fields("of_alternating"),
    }
    return row, {key.removeprefix("cpu_ms_"): middle[key] for key in middle if key.startswith("cpu_ms_")}


def main() -> None:
    """Measures the jobs asked for (all by default, six minutes on two quiet cores), prints and saves them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of all phases, the more the surer")
    arguments = parser.parse_args()
    asked = arguments.jobs or list(JOBS)
    if unknown := set(asked) - set(JOBS):
        parser.error(f"unknown jobs {sorted(unknown)}; expected some of {', '.join(JOBS)}")
    load = measure_load()
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as directory:
        for number, name in enumerate(asked):
            row, cpu_ms = measure(Path(directory, str(number)), name, arguments.rounds)
            show(f"g:t = {name}, seconds a step", [row])
            show("CPU milliseconds a step", [cpu_ms])
            path = save("bound", {name: {**row, "cpu_ms": cpu_ms}, "load": load}, keep=True)
    print(f"written to {path}")
    ray.shutdown()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _ignore(evaluation: Any, samples: Any) -> None:
    """Ignores an evaluation: none is asked for."""


if __name__ == "__main__":
    main()
