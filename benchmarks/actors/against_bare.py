"""Compares rollout actors with bare vLLM, in turns: while one half of a pair works, the other rests."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import ray

from benchmarks.actors.bare import BareClient, BareEngine, Pause, Spent
from benchmarks.actors.rig import ENVIRONMENT, TIMEOUT_S, MeasuredActor, Prepared, Rig
from benchmarks.pairs import compare, interleave
from core.calls import Calls
from core.processes import remote

ROUNDS = 5
WINDOW_S, WARM_S = 6.0, 4.0


class Engines:
    """Bare engines, each in a process of its own."""

    def __init__(self, prepared: Prepared, count: int = 1) -> None:
        self.calls = Calls(TIMEOUT_S)
        engine_class = remote(BareEngine).options(num_cpus=0, runtime_env=ENVIRONMENT)
        made = [engine_class.remote(prepared.config, prepared.prompts) for _ in range(count)]
        self._clients = [BareClient(engine, "a bare engine") for engine in made]

    def spend(self, seconds: float) -> Spent:
        """Returns what they make and spend, all at once."""
        running = [self.calls.start(client.generate(seconds)) for client in self._clients]
        spent = [one.wait() for one in running]
        rate = sum(one.samples / one.wall_s for one in spent)
        total = Spent(*map(sum, zip(*spent, strict=True)))
        return total._replace(wall_s=total.samples / rate)

    def pause(self) -> Pause:
        """Returns how long the one engine takes to load its weights."""
        return self.calls.ask(self._clients[0].load())

    def close(self) -> None:
        """Ends the processes."""
        for client in self._clients:
            ray.kill(client.handle)


@contextlib.contextmanager
def both(directory: Path, prepared: Prepared, count: int = 1) -> Iterator[tuple[Rig, Engines]]:
    """Starts so many actors and as many bare engines, and ends them."""
    bare = Engines(prepared, count)
    rig = Rig(prepared, str(directory), [f"actor-{number}" for number in range(count)], MeasuredActor)
    yield rig, bare
    rig.close()
    bare.close()


def speed(rig: Rig, bare: Engines, *, rounds: int = ROUNDS, window_s: float = WINDOW_S) -> dict[str, float]:
    """Returns samples a second, and CPU milliseconds a sample, of the actors and of the bare engines, and
    what share of the latter the former reach.
    """
    spent: dict[str, list[Spent]] = {"actor": [], "bare": []}

    def measure(name: str, spend: Callable[[float], Spent]) -> float:
        rig.rest() if name == "bare" else rig.consume(1.0)
        spent[name].append(spend(window_s if spent[name] else WARM_S))
        return spent[name][-1].samples / spent[name][-1].wall_s

    rates = interleave(
        {"actor": lambda: measure("actor", rig.spend), "bare": lambda: measure("bare", bare.spend)},
        rounds,
        warm_rounds=1,
    )
    cpu_ms = {name: [1e3 * one.cpu_s / one.samples for one in all_[1:]] for name, all_ in spent.items()}
    return {
        "samples_per_s": statistics.median(rates["actor"]),
        "bare_samples_per_s": statistics.median(rates["bare"]),
        **compare(rates["actor"], rates["bare"]).fields("of_bare"),
        "cpu_ms_a_sample": statistics.median(cpu_ms["actor"]),
        "bare_cpu_ms_a_sample": statistics.median(cpu_ms["bare"]),
        **compare(cpu_ms["bare"], cpu_ms["actor"]).fields("of_bare_cpu"),
        "tokens_a_sample": spent["actor"][-1].tokens / spent["actor"][-1].samples,
    }


def pause(rig: Rig, bare: Engines, rounds: int = 15) -> dict[str, float]:
    """Returns for how long the one actor does not generate at an update, and for how long vLLM needs by
    itself.
    """
    pauses: dict[str, list[Pause]] = {"actor": [], "bare": []}

    def measure(name: str, take: Callable[[], Pause]) -> float:
        pauses[name].append(take())
        return pauses[name][-1].wall_s

    walls = interleave(
        {"actor": lambda: measure("actor", rig.pause), "bare": lambda: measure("bare", bare.pause)},
        rounds,
        warm_rounds=2,
    )
    cpus = {name: [one.cpu_s for one in all_[2:]] for name, all_ in pauses.items()}
    return {
        "pause_s": statistics.median(walls["actor"]),
        "bare_load_s": statistics.median(walls["bare"]),
        **compare(walls["actor"], walls["bare"]).fields("of_bare"),
        "pause_cpu_s": statistics.median(cpus["actor"]),
        "bare_load_cpu_s": statistics.median(cpus["bare"]),
        **compare(cpus["actor"], cpus["bare"]).fields("of_bare_cpu"),
    }
