"""The actor's real loop on a simulated engine, with buffer, board and monitor in this process."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from actors.offline import OfflineActor
from actors.playing.played import EpisodeLimits
from actors.playing.player import EnvironmentPlayer, Player
from actors.prompts import PromptRow
from actors.rollout import RolloutActor
from benchmarks.fake_engine import FakeEngine
from core.config import Config
from tests.support.in_process import Bench
from tests.support.playing import Behaviour, DigitSpeech, ScriptedPlaces

STEP_S = 0.005
UNBOUNDED = {"capacity": 10**5, "max_staleness": 10**5}
"""A buffer that admits more groups than a test has time for: its actors never wait."""


def rows(count: int = 16, **more: Any) -> list[PromptRow]:
    return [PromptRow(row, f"prompt {row}", (5, row), {"answer": "1"}, **more) for row in range(count)]


def played_rows(count: int = 16) -> list[PromptRow]:
    return rows(count, environment="game", messages=({"role": "user", "content": "2"},))


class SimulatedActor(RolloutActor):
    """The real loop; `simulation` are the arguments of its engine, whose submissions and loads it notes.

    With `behave` every prompt is played in an environment that behaves so, in `places`.
    """

    def __init__(
        self, bench: Bench, name: str = "actor-0", behave: Behaviour | None = None, **simulation: Any
    ) -> None:
        self.simulation = simulation
        self.places = None if behave is None else ScriptedPlaces(behave)
        self.unfinished_at_load: list[int] = []
        self.load_times_s: list[float] = []
        super().__init__(name, bench.config, bench.prompts, bench.eval_prompts, *bench.peers())

    def run(self) -> dict[str, float]:
        """Generates as it always does; what it has started ends with it after a failure, too."""
        try:
            return super().run()
        except BaseException:  # In a run its workers would end with its process.
            self._groups.close()
            self._scoring.close()
            self._evaluating.close()
            raise

    def _make_engine(self) -> FakeEngine:
        actor = self

        class Noting(FakeEngine):
            def load_weights(self, version: int, weights: Iterable[tuple[str, Any]]) -> None:
                actor.unfinished_at_load.append(self.num_unfinished)
                start_s = time.perf_counter()
                super().load_weights(version, weights)
                actor.load_times_s.append(time.perf_counter() - start_s)

        self.engine = Noting(self._config.actors, **self.simulation)
        return self.engine

    def _make_player(self) -> Player:
        if self.places is None:
            return super()._make_player()
        actors = self._config.actors
        limits = EpisodeLimits(actors.max_turns, actors.max_new_tokens, self._config.max_sequence_tokens)
        return EnvironmentPlayer(self.places, {"game": DigitSpeech()}, limits)


class Feeder(OfflineActor):
    """The offline actor in a thread of its own."""

    def run(self) -> Any:
        return asyncio.run(super().run())


@contextlib.contextmanager
def benches(directory: Path) -> Iterator[Callable[..., Bench]]:
    """Makes benches; at the end their actors must end, with a clean audit.

    They end after a failure, too: other tests would find what went on running.
    """

    def end(bench: Bench) -> None:
        assert bench.close()["violations"] == []

    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def make(config: Config, **more: Any) -> Bench:
            bench = Bench(config, directory / f"run-{next(numbers)}", more.pop("rows", rows()), **more)
            stack.callback(end, bench)
            return bench

        yield make


class Late(concurrent.futures.Future):  # type: ignore[type-arg]
    """Its result, 7, comes at the moment at which whoever waited for it has given up."""

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self.set_result(7)
            raise TimeoutError
        return super().result(timeout)


def ledger(bench: Bench) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in bench.run_dir.glob("ledger*.jsonl")
        for line in path.read_text().splitlines()
    ]
