"""What models of some sizes take, as docs/cluster.md has it: `python -m cluster.plan.sizes` prints the table.

All of them are configs/llama3_8b_math.yaml with another model and other numbers of GPUs: batches of 64 groups
of 8 samples, prompts of 300 tokens, answers of 600, H100s of 80 GB in nodes of eight with 400 Gbit/s.
"""
# ruff: noqa: T201 (the output of the command line)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.plan import parts
from cluster.plan.planning import Plan, make_plan
from cluster.plan.rates import DEVICES
from cluster.plan.workload import Machines
from core.config import Config
from learner.catalogue import load_config

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "llama3_8b_math.yaml"
PROMPT_TOKENS, NEW_TOKENS, STEPS = 300.0, 600.0, 1000


class Size(NamedTuple):
    """A model, and how many cards go to what: `ranks`, and `actors` of `engine_gpus` each."""

    title: str
    path: str
    ranks: int
    actors: int
    engine_gpus: int

    @property
    def settings(self) -> list[str]:
        """Returns what is typed behind the config."""
        return [
            f"model.path={self.path}",
            f"learner.ranks={self.ranks}",
            f"actors.count={self.actors}",
            f"actors.num_gpus={self.engine_gpus}",
            f"actors.tensor_parallel={self.engine_gpus}",
            f"run.steps={STEPS}",
        ]


SIZES = (
    Size("1.5 B", "Qwen/Qwen2.5-1.5B-Instruct", 1, 1, 1),
    Size("8 B", "meta-llama/Meta-Llama-3-8B-Instruct", 5, 3, 1),
    Size("32 B", "Qwen/Qwen2.5-32B-Instruct", 16, 4, 2),
    Size("70 B", "meta-llama/Llama-3.1-70B-Instruct", 32, 4, 4),
)


def plan_size(size: Size) -> Plan:
    """Returns the plan of one size."""
    config: Config = load_config(CONFIG, size.settings)
    machines = Machines(DEVICES["h100"])
    return make_plan(config, machines, PROMPT_TOKENS, NEW_TOKENS)


def table(sizes: Sequence[Size] = SIZES) -> Iterator[str]:
    """Yields the lines of the table in markdown."""
    yield "| model | H100s | learner | engines | s a step | waits for | a learner's card | object store | GPU-hours |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for size in sizes:
        plan = plan_size(size)
        job, fit = plan.job, plan.fit
        step = " to ".join(f"{plan.step_s(case):.0f}" for case in ("best", "worst"))
        hours = " to ".join(f"{plan.gpu_hours(case):,.0f}" for case in ("best", "worst"))
        slower = "training" if plan.bottleneck == "the learner" else "generation"
        if plan.bottleneck.startswith("neither"):
            slower = "neither"
        yield (
            f"| {size.title} | {job.num_gpus:g} | {job.ranks} ranks | {job.actors} of {size.engine_gpus} | "
            f"{plan.outcome.step_s:.0f} ({step}) | {slower} | {fit.learner_gpu / 1e9:.0f} GB | {fit.store / 1e9:.0f} GB | "
            f"{hours} |"
        )


def main() -> None:
    """Prints the table, and what does not fit or could be dealt better."""
    print("\n".join(table()))
    for size in SIZES:
        plan = plan_size(size)
        training_s = parts.learner_times(plan.job, "likely").total_s
        generation_s = parts.generation_s(plan.job, "likely")
        print(
            f"{size.title}: trains {training_s:.1f} s, generates {generation_s:.1f} s; better: {plan.split}"
        )
        print("\n".join(f"  {problem}" for problem in (*plan.fit.problems, *plan.fit.hints)))


if __name__ == "__main__":
    main()
