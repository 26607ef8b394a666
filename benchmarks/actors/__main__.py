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
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from actors.prompts import load_prompts
from benchmarks.actors.bare import BareClient, BareEngine, Pause, Spent
from benchmarks.actors.rig import ENVIRONMENT, TIMEOUT_S, MeasuredActor, Prepared, Rig, SimulatedActor
from benchmarks.pairs import compare, interleave
from benchmarks.results import measure_load, save, show
from cluster.preparation.prepare import ensure_model
from core.calls import Calls
from core.processes import remote
from core.tokenizer import load_tokenizer
from learner.catalogue import load_config

ROUNDS = 5
WINDOW_S, WARM_S = 6.0, 4.0
SIMULATED_S = 10.0
MODELS: dict[str, dict[str, Any]] = {
    "8M": {"hidden": 256, "layers": 10},
    "30M": {"hidden": 512, "layers": 10},
}


def prepare(directory: Path, *overrides: str, model: str = "") -> Prepared:
    """Returns config, prompts and weights of the quickstart; with a `model` of MODELS, that of random
    weights, which ends an answer after a dozen tokens on average.
    """
    from safetensors.torch import load_file

    more = ["buffer.max_staleness=100000", "checkpoint.every=0", "weights.publish_every=1", *overrides]
    if model:
        more += [f"model.path={_make_model(directory, model)}", "model.make=null"]
    config = ensure_model(load_config("configs/quickstart.yaml", more))
    prompts = load_prompts(config.data, load_tokenizer(config.model))
    return Prepared(config, prompts, list(load_file(Path(config.model.path, "model.safetensors")).items()))


def _make_model(directory: Path, name: str) -> Path:
    from recipes.arithmetic import make_llama, make_tokenizer

    path, tokenizer = directory / name, make_tokenizer()
    if not path.exists():
        make_llama(len(tokenizer), **MODELS[name]).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


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


def against_bare(
    directory: Path, prepared: Prepared, *, count: int = 1, rounds: int = ROUNDS, window_s: float = WINDOW_S
) -> dict[str, float]:
    """Returns samples a second, and CPU milliseconds a sample, of so many actors and of so many bare engines,
    and what share of the latter the former reach.
    """
    bare = Engines(prepared, count)
    rig = Rig(prepared, str(directory), [f"actor-{number}" for number in range(count)], MeasuredActor)
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
    rig.close()
    bare.close()
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


def pause(directory: Path, prepared: Prepared, rounds: int = 15) -> dict[str, float]:
    """Returns for how long an actor does not generate at an update, and for how long vLLM needs by itself."""
    bare, rig = Engines(prepared), Rig(prepared, str(directory), ["actor-0"], MeasuredActor)
    pauses: dict[str, list[Pause]] = {"actor": [], "bare": []}

    def measure(name: str, take: Callable[[], Pause]) -> float:
        pauses[name].append(take())
        return pauses[name][-1].wall_s

    walls = interleave(
        {"actor": lambda: measure("actor", rig.pause), "bare": lambda: measure("bare", bare.pause)},
        rounds,
        warm_rounds=2,
    )
    rig.close()
    bare.close()
    cpus = {name: [one.cpu_s for one in all_[2:]] for name, all_ in pauses.items()}
    return {
        "pause_s": statistics.median(walls["actor"]),
        "bare_load_s": statistics.median(walls["bare"]),
        **compare(walls["actor"], walls["bare"]).fields("of_bare"),
        "pause_cpu_s": statistics.median(cpus["actor"]),
        "bare_load_cpu_s": statistics.median(cpus["bare"]),
        **compare(cpus["actor"], cpus["bare"]).fields("of_bare_cpu"),
    }


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
    long = *sums, "actors.max_new_tokens=48", "actors.slots=64"
    measures: dict[str, Callable[[Path], Any]] = {
        "sums": lambda at: against_bare(at / "sums", prepare(at, *sums)),
        "large": lambda at: against_bare(at / "large", prepare(at, *long, model="8M"), window_s=10),
        "together": lambda at: against_bare(at / "together", prepare(at, *sums), count=2),
        "pause": lambda at: pause(at / "pause", prepare(at, *sums)),
        "pause_30M": lambda at: pause(at / "pause-30M", prepare(at, *sums, model="30M")),
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
            found = measures[row](Path(directory))
            show(row, found if isinstance(found, list) else [found])
            path = save("actors", {row: found, "load": load}, keep=True)
    print(f"written to {path}")
    ray.shutdown()


if __name__ == "__main__":
    main()
