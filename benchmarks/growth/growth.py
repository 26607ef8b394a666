"""Measures how what a run does besides generating and training grows with its size: `make bench-growth`.

The buffer, the board, the monitor and what the driver does with them are the real ones; actors and learner
only make their calls. All are in one process, on virtual time, so that 256 actors fit on one core.

    per trained group   calls, bytes and CPU microseconds of each part, by actors and by groups a step
    slope               of the logarithm of these against that of the size: 0 is flat, 1 grows with the size
    steps/s             of the learner on virtual time: what is done once a step, or once a version by every
                        actor, costs by these
    of a core           what each part needs of one core at that speed

An actor has 16 groups under way, each for 0.25 to 4 s (1 s on average). The learner takes a tenth longer for
a step than the actors for its groups, so that actors wait to be admitted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.growth.driver import Driver
from benchmarks.growth.metered import Parts
from benchmarks.results import measure_load, save
from buffer.client import connect_buffer
from buffer.server import ReplayBuffer
from cluster.monitor.monitor import Monitor
from cluster.plan.virtual_time import VirtualCalls, run_virtually
from core.config import Config
from core.evaluation.open_evaluation import SuiteSize
from core.evaluation.records import EvalItem, EvalSample
from core.metrics import METRICS
from core.monitor_client import MONITOR, MonitorClient
from core.records import Group, Sample, VersionSpan, WorkItem, encode
from core.weights.board import BOARD, Board, BoardClient, Directive
from learner.catalogue import parse_config

ACTORS = (1, 4, 16, 64, 256)
GROUPS_PER_STEP = (64, 512, 4096)
SOME_ACTORS, SOME_GROUPS = 16, 64
"""What is held while the other grows."""
GROUPS_AN_ACTOR = 16
"""Of a step, where both grow."""
SERIES = {
    "by_actors": [(actors, SOME_GROUPS, 1) for actors in ACTORS],
    "by_actors_in_shards": [(actors, SOME_GROUPS, 4) for actors in ACTORS],
    "by_groups": [(SOME_ACTORS, groups, 1) for groups in GROUPS_PER_STEP],
    "by_both": [(actors, GROUPS_AN_ACTOR * actors, 1) for actors in ACTORS],
    "by_both_in_shards": [(actors, GROUPS_AN_ACTOR * actors, 4) for actors in ACTORS],
}
"""Actors, groups a step and shards of each row."""
OPEN_GROUPS, MEAN_GROUP_S = 16, 1.0
INSERT_EVERY_S = 0.05  # As in actors/rollout.py, which imports vLLM.
SAMPLES, TOKENS = 8, 32
LEARNER_SLOWER = 1.1
EVALUATE_EVERY, EVAL_PROMPTS = 8, 64
WARM_STEPS, MIN_GROUPS, MIN_STEPS = 4, 2048, 4
POLL_S, REPORT_EVERY_S, LEARNER_POLL_S = 5.0, 1.0, 2.0
PARTS = ("buffer", "board", "monitor", "driver")


def make_config(groups_per_step: int, num_shards: int) -> Config:
    """Returns the config of a run with batches of so many groups."""
    return parse_config(
        {
            "model": {"path": "none"},
            "data": {"path": "none"},
            "rewards": {"functions": {"exact_match": 1.0}},
            "run": {"steps": 10**9},
            "actors": {"group_size": SAMPLES, "slots": OPEN_GROUPS * SAMPLES},
            "learner": {"groups_per_step": groups_per_step},
            "buffer": {"capacity": 10**6, "max_staleness": 4, "num_shards": num_shards},
            "checkpoint": {"every": 20},
        }
    )


def make_group(item: WorkItem, version: int, actor: str) -> bytes:
    """Returns the group of an item, of samples of `TOKENS` tokens by one version."""
    samples = tuple(
        Sample.one_turn(
            range(16),
            range(1000, 1000 + TOKENS),
            (-0.5,) * TOKENS,
            version_spans=(VersionSpan(version, 0, TOKENS),),
            finish_reason="stop",
            text="four",
            reward=float(number % 2),
        )
        for number in range(SAMPLES)
    )
    return encode(
        Group(group_id=item.ordinal, prompt_index=0, source_row=0, prompt="p", samples=samples, actor=actor)
    )


def make_evaluated(item: EvalItem) -> EvalSample:
    """Returns what an actor says of an evaluation's item."""
    return EvalSample(
        item=item,
        prompt="p",
        texts=("four",),
        rewards=(1.0,),
        errors=(None,),
        version_spans=((VersionSpan(item.policy_version, 0, TOKENS),),),
        lengths=(TOKENS,),
        truncated=(False,),
        answer_ids=(1,),
    )


class Run:
    """A run of so many actors on virtual time; `costs()` per trained group after `measure()`."""

    def __init__(self, directory: Path, num_actors: int, groups_per_step: int, num_shards: int = 1) -> None:
        self.parts = Parts()
        self._num_actors, self._groups_per_step = num_actors, groups_per_step
        self._config = config = make_config(groups_per_step, num_shards)
        clock = asyncio.get_running_loop().time
        monitor = Monitor(config, str(directory), clock=clock)
        self.monitor = MonitorClient(self.parts.handle("monitor", monitor), MONITOR)
        shards = [ReplayBuffer(config, str(directory), 1000, shard) for shard in range(num_shards)]
        self.buffer = connect_buffer([self.parts.handle("buffer", shard) for shard in shards])
        board = Board(config.run, {"held_out": SuiteSize(EVAL_PROMPTS, 1)}, monitor.log_evaluation)
        self.board = BoardClient(self.parts.handle("board", board), BOARD)
        self._driver = Driver(
            config,
            directory,
            num_actors,
            VirtualCalls(config.run.timeout_s),
            self.buffer,
            self.board,
            self.monitor,
        )
        self._versions = [-1] * num_actors
        self._holding: list[set[int]] = [set() for _ in range(num_actors)]
        self._counters = [0.0] * num_actors
        self._unsent: list[dict[int, bytes]] = [{} for _ in range(num_actors)]
        self._inserted_s = [0.0] * num_actors
        self._tasks: set[asyncio.Task[Any]] = set()
        self._row = dict.fromkeys(METRICS, 0.123456789)

    async def measure(self) -> dict[str, Any]:
        """Runs to warm up, then to measure; returns calls, bytes and CPU microseconds a trained group by
        part, the learner's steps a second, and how much of a core each part needed.
        """
        for number in range(self._num_actors):
            self._begin(self._follow(number))
            self._begin(self._work(number))
            self._begin(self._report(number))
        self._begin(self._drive())
        await self.board.publish(b"", [], 0, evaluate=())
        await self._train(0, WARM_STEPS)
        self.parts.clear()
        num_steps = max(MIN_STEPS, MIN_GROUPS // self._groups_per_step)
        clock = asyncio.get_running_loop().time
        start_s = clock()
        await self._train(WARM_STEPS, WARM_STEPS + num_steps)
        elapsed_s, num_groups = clock() - start_s, num_steps * self._groups_per_step
        found = {
            name: {
                "calls": cost.calls / num_groups,
                "bytes": cost.size_bytes / num_groups,
                "cpu_us": 1e6 * cost.cpu_s / num_groups,
            }
            for name, cost in self.parts.costs.items()
        }
        of_core = {name: cost.cpu_s / elapsed_s for name, cost in self.parts.costs.items()}
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks, timeout=1.0)
        await self.buffer.close()
        return {"steps_per_s": num_steps / elapsed_s, "of_core": of_core, "per_group": found}

    def _begin(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    # --- an actor's calls: those of actors/rollout.py ---

    async def _follow(self, number: int) -> None:
        name = _name(number)
        while True:
            payload, _ = await self.board.poll(name, self._versions[number], OPEN_GROUPS, POLL_S)
            directive = msgspec.msgpack.decode(payload, type=Directive)
            self._versions[number] = directive.version
            if directive.eval_items:
                await asyncio.sleep(MEAN_GROUP_S)
                evaluated = [make_evaluated(item) for item in directive.eval_items]
                await self.board.finish(msgspec.msgpack.encode(evaluated))

    async def _work(self, number: int) -> None:
        reserve, part = OPEN_GROUPS // 2, self._groups_per_step // self._num_actors
        free = asyncio.Semaphore(OPEN_GROUPS)
        outdated = -1
        while True:
            version = self._versions[number]
            if version in (-1, outdated):
                await asyncio.sleep(0.1)
                continue
            holding = sorted(self._holding[number])
            # What it holds is under way, or ended just now.
            wanted = max(reserve, min(OPEN_GROUPS, part), OPEN_GROUPS - len(holding))
            items = await self.buffer.lease(_name(number), wanted, POLL_S, version, holding)
            outdated = version if items is None else outdated
            for payload in items or ():
                item = msgspec.msgpack.decode(payload, type=WorkItem)
                self._holding[number].add(item.ordinal)
                await free.acquire()
                self._begin(self._generate(number, item, free))

    async def _generate(self, number: int, item: WorkItem, free: asyncio.Semaphore) -> None:
        version = self._versions[number]
        # A heavy tail: exponential, at least a quarter of the mean and at most four times as long.
        drawn = random.Random(item.seed).expovariate(1.0)
        await asyncio.sleep(MEAN_GROUP_S * min(4.0, max(0.25, drawn)))
        free.release()
        self._counters[number] += SAMPLES * TOKENS
        self._unsent[number][item.ordinal] = make_group(item, version, _name(number))
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(max(0.0, self._inserted_s[number] + INSERT_EVERY_S - clock()))
        if item.ordinal in self._unsent[number]:  # Else it went with another's.
            unsent, self._unsent[number] = self._unsent[number], {}
            self._inserted_s[number] = clock()
            await self.buffer.insert(_name(number), list(unsent.values()))
            self._holding[number].difference_update(unsent)

    async def _report(self, number: int) -> None:
        await asyncio.sleep(REPORT_EVERY_S * number / self._num_actors)
        counters = [name for name, _ in zip(METRICS, range(40), strict=False)]
        while True:
            tokens = self._counters[number]
            row = {
                **dict.fromkeys(counters, tokens),
                "generated_tokens": tokens,
                "busy_s": tokens / 1e6,
                "version": self._versions[number],
            }
            await self.monitor.log_actor(_name(number), row)
            await asyncio.sleep(REPORT_EVERY_S)

    # --- the driver's and the learner's ---

    async def _drive(self) -> None:
        while True:
            start_s = time.thread_time()
            self._driver.turn()
            self.parts.add("driver", time.thread_time() - start_s)
            await asyncio.sleep(self._driver.turn_s)

    async def _train(self, first: int, end: int) -> None:
        step_s = LEARNER_SLOWER * self._groups_per_step * MEAN_GROUP_S / (OPEN_GROUPS * self._num_actors)
        for step in range(first, end):
            while await self.buffer.sample(step, self._groups_per_step, LEARNER_POLL_S) is None:
                await self.buffer.stats()
                await self.monitor.generation()
            await asyncio.sleep(step_s)
            done = step + 1
            due = ("held_out",) if done % EVALUATE_EVERY == 0 else ()
            await self.board.publish(b"", [], done, evaluate=due)
            await self.monitor.log_step({**self._row, "progress/step": done})
            if done % self._config.checkpoint.every == 0:
                await self.buffer.set_watermark(done)


def _name(number: int) -> str:
    return f"actor-{number}"


def measure(num_actors: int, groups_per_step: int, num_shards: int = 1) -> dict[str, Any]:
    """Returns the costs of a run of this size, per trained group by part."""

    async def run(directory: Path) -> dict[str, Any]:
        return await Run(directory, num_actors, groups_per_step, num_shards).measure()

    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        found = run_virtually(run(Path(directory)))
    return {
        "actors": num_actors,
        "groups_per_step": groups_per_step,
        "shards": num_shards,
        **found,
        "wall_s": round(time.perf_counter() - start_s, 1),
    }


def slopes(rows: list[dict[str, Any]], size: str) -> dict[str, dict[str, float]]:
    """Returns, by part, the slope of the logarithm of each cost against that of `size`."""
    found: dict[str, dict[str, float]] = {}
    sizes = np.log([row[size] for row in rows])
    for part in PARTS:
        costs = [row["per_group"][part] for row in rows]
        found[part] = {
            what: float(np.polyfit(sizes, np.log([max(1e-9, cost[what]) for cost in costs]), 1)[0])
            for what in costs[0]
            if all(cost[what] for cost in costs)
        }
    return found


def _shown(row: Mapping[str, Any]) -> str:
    costs = "  ".join(
        f"{part} {cost['calls']:6.2f} {cost['bytes'] / 1e3:6.1f} {cost['cpu_us']:6.0f}"
        for part in PARTS
        for cost in [row["per_group"][part]]
    )
    size = f"{row['actors']:>4} actors {row['groups_per_step']:>5} groups {row['shards']} shards"
    return f"{size} {row['steps_per_s']:6.3f} steps/s  {costs}"


def main() -> None:
    """Measures the series asked for (all by default), prints them and writes them to benchmarks/results/."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("series", nargs="*", metavar="SERIES", help=", ".join(SERIES))
    asked = parser.parse_args().series or list(SERIES)
    if unknown := set(asked) - set(SERIES):
        parser.error(f"unknown series {sorted(unknown)}; expected some of {', '.join(SERIES)}")
    result: dict[str, Any] = {"load": measure_load()}
    print("per trained group, of each part: calls, kB, CPU us")
    for name in asked:
        rows = []
        for size in SERIES[name]:
            rows.append(measure(*size))
            print(_shown(rows[-1]), f" ({rows[-1]['wall_s']} s)", flush=True)
        varied = "groups_per_step" if name == "by_groups" else "actors"
        found = slopes(rows, varied) if len(rows) > 1 else {}
        for part, slope in found.items():
            print(
                f"  slope of {part} by {varied}: "
                + ", ".join(f"{what} {value:+.2f}" for what, value in slope.items())
            )
        result[name] = {"rows": rows, "slopes": found}
        path = save("growth", result, keep=True)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
