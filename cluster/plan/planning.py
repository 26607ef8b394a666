"""A whole plan: parts, memory, simulation and split of one config on given machines."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.plan import parts, rates
from cluster.plan.fit import Fit, engine_problems, fit_of
from cluster.plan.rates import CASES, Case
from cluster.plan.shapes import experts_note
from cluster.plan.simulation import Outcome, Simulation, Speeds
from cluster.plan.splits import Split, best_split
from cluster.plan.workload import Machines, Workload, workload_of
from cluster.preparation.memory import estimate_memory
from core.config import Config
from core.errors import ConfigError

SECONDS_AN_HOUR = 3600.0
SPLIT_STEPS = 40
"""Steps at most for which another split is simulated."""
MORE_RANKS = (2, 4, 8, 16, 32)
"""Times the ranks of a config that are tried where its cards are too small."""
RARELY_BUSY = 0.7
"""Where both are busy for less than this share of the time, neither is what the other waits for."""
NEARLY_EQUAL = 1.15
"""Generation and training whose times differ by less are called equal: the rates are not known better."""


@dataclass(frozen=True)
class Plan:
    """What a run takes. `outcome` is simulated at the likely rates; `split` may be None: none is better."""

    job: Workload
    fit: Fit
    outcome: Outcome
    split: Split | None
    notes: tuple[str, ...]

    def step_s(self, case: Case) -> float:
        """Returns the seconds of a step: simulated at the likely rates, and as far from it as the bounds of
        the other cases are.
        """
        bound_s = parts.bound_s(self.job, "likely")
        return self.outcome.step_s * parts.bound_s(self.job, case) / bound_s

    def gpu_hours(self, case: Case) -> float:
        """Returns the GPU-hours of all steps, start and evaluations left out."""
        return self.job.num_gpus * self.job.steps * self.step_s(case) / SECONDS_AN_HOUR

    @property
    def bottleneck(self) -> str:
        """Returns who the others wait for: the learner, the actors, neither, or each for the other."""
        busy = max(self.outcome.learner_busy, self.outcome.slots_busy)
        if busy < RARELY_BUSY:
            arrive_s = parts.publish_times(self.job, "likely").until_used_s
            return (
                f"neither alone: both wait for each other, a version takes {arrive_s:.2g} s to the last actor; a larger "
                "buffer.max_staleness, buffer.capacity or weights.publish_every lets them overlap"
            )
        training_s = parts.learner_times(self.job, "likely").total_s
        generation_s = parts.generation_s(self.job, "likely")
        if max(training_s, generation_s) < NEARLY_EQUAL * min(training_s, generation_s):
            return "neither: generation and training take about as long"
        return "the learner" if training_s > generation_s else "the actors"


def speeds_of(job: Workload, case: Case) -> Speeds:
    """Returns how quick the parts of a simulation are."""
    publish = parts.publish_times(job, case)
    evaluating = 1 + job.evaluated_tokens / job.generated_tokens
    return Speeds(
        actors=job.actors,
        slots=max(1, int(parts.running_slots(job))),
        engine_step_s=lambda running: evaluating * parts.engine_step_s(job, running, case),
        train_s=parts.learner_times(job, case).total_s,
        arrive_s=publish.until_used_s,
        pause_s=publish.pause_s,
        new_tokens=job.new_tokens,
        max_new_tokens=job.max_new_tokens,
        cores=_cores_left(job, case),
    )


def _cores_left(job: Workload, case: Case) -> float:
    """Returns the cores that actors and ranks share where there are no GPUs: all but what the services take,
    half at least.
    """
    if job.machines.device is not None:
        return math.inf
    services = job.samples * rates.CPU_SERVICE_S.at(case) / parts.bound_s(job, case)
    return max(job.machines.cores / 2, job.machines.cores - services)


def make_plan(
    config: Config,
    machines: Machines,
    prompt_tokens: float | None = None,
    new_tokens: float | None = None,
    seed: int = 0,
) -> Plan:
    """Returns the plan of a config on the machines. Raises ConfigError where there can be none."""
    job, notes = workload_of(config, machines, prompt_tokens, new_tokens)
    if note := experts_note(config):
        notes.append(note)
    if config.buffer.skip_equal_rewards or config.data.curriculum is not None:
        notes.append(
            "groups that are left out, by equal rewards or as solved, are not counted: there is more to generate"
        )
    if config.buffer.num_shards > 1:
        notes.append("the simulation has one shard of the buffer")
    if parts.running_slots(job) < 1:
        raise ConfigError(f"nothing to plan: {engine_problems(job)[0]}")

    def fit(dealt: Workload, **learner: Any) -> Fit:
        changed = config.learner.model_copy(update={"ranks": dealt.ranks, **learner})
        return fit_of(dealt, estimate_memory(config.model_copy(update={"learner": changed}), job.shape))

    def simulated_s(dealt: Workload) -> float:
        if dealt is job and outcome.num_steps <= SPLIT_STEPS:
            return outcome.step_s
        simulation = Simulation(config, speeds_of(dealt, "likely"), seed)
        try:
            return simulation.run(min(outcome.num_steps, SPLIT_STEPS)).step_s
        except ConfigError:  # It would stand still.
            return math.inf

    outcome = Simulation(config, speeds_of(job, "likely"), seed).run()
    now = _with_remedies(job, fit)

    def fits(dealt: Workload) -> bool:
        other = fit(dealt)
        return not other.problems and len(other.hints) <= len(now.hints)

    return Plan(job, now, outcome, best_split(job, simulated_s, fits), tuple(notes))


def _with_remedies(job: Workload, fit: Callable[..., Fit]) -> Fit:
    """Returns the job's fit; where a rank wants more than its card, with the settings that make it fit, each
    by itself.
    """
    found = fit(job)
    if not found.problems or "learner rank" not in found.problems[0]:
        return found
    tried: dict[str, Callable[[], Fit]] = {
        "learner.gradient_checkpointing=true": lambda: fit(job, gradient_checkpointing=True),
        "learner.offload=all": lambda: fit(dataclasses.replace(job, is_offloaded=True), offload="all"),
    }
    for factor in MORE_RANKS:
        ranks = factor * job.ranks
        tried[f"learner.ranks={ranks}"] = functools.partial(fit, job.dealt(ranks, job.actors))
    typed = [setting for setting, of in tried.items() if not of().problems]
    # Of the numbers of ranks the least is enough.
    fewest = next((setting for setting in typed if "ranks" in setting), "")
    remedies = [setting for setting in typed if "ranks" not in setting or setting == fewest]
    remedy = f"Set {' or '.join(remedies)}."
    if not remedies:
        remedy = (
            "Lower learner.micro_batch_tokens, share rows (learner.sequence_parallel), train adapters (learner.lora_rank), or "
            "take larger cards."
        )
    return dataclasses.replace(found, problems=(f"{found.problems[0]} {remedy}", *found.problems[1:]))


def ranges(plan: Plan) -> dict[str, dict[Case, float]]:
    """Returns the seconds of a step's parts by name and case."""
    found: dict[str, dict[Case, float]] = {}
    for case in CASES:
        times = parts.learner_times(plan.job, case)
        rows = {
            "compute": times.compute_s,
            "exchange not hidden": times.exchange_s,
            "optimizer": times.optimizer_s,
            "publication": times.publish_s,
            "checkpoint": times.checkpoint_s,
            "training": times.total_s,
            "generation": parts.generation_s(plan.job, case),
            "step": plan.step_s(case),
        }
        for name, value in rows.items():
            found.setdefault(name, {})[case] = value
    return found
