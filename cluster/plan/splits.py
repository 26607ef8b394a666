"""The same GPUs dealt to learner and actors in other ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from cluster.plan import parts
from cluster.plan.workload import Workload

WORTH = 0.95
"""A split is told where a step takes at most this share of the present one."""
TRIED = 2
"""Splits that are simulated of those that are best where generation and training overlap, and as many of the
best where they take turns.
"""


class Split(NamedTuple):
    """A deal: ranks of the learner, actors, and the seconds of a step, simulated."""

    ranks: int
    actors: int
    step_s: float


def best_split(
    job: Workload, simulated_s: Callable[[Workload], float], fits: Callable[[Workload], bool]
) -> Split | None:
    """Returns the quickest split of the job's GPUs that `fits`, None where none takes 5 % less than the
    present one, or where learner and actors are not on GPUs of their own.

    `simulated_s` gives the seconds of a step of a split, the present one's too. What the bounds of its parts
    forbid to be better is not simulated.
    """
    if job.machines.device is None or min(job.learner_gpus, job.actor_gpus) < 1:
        return None
    most_s = WORTH * simulated_s(job)
    found = [dealt for dealt in _deals(job) if _overlapped_s(dealt) <= most_s and fits(dealt)]
    tried = {
        (dealt.ranks, dealt.actors): dealt
        for key in (_overlapped_s, _in_turns_s)
        for dealt in sorted(found, key=key)[:TRIED]
    }
    splits = [Split(*numbers, simulated_s(dealt)) for numbers, dealt in tried.items()]
    best = min(splits, key=lambda split: split.step_s, default=None)
    return None if best is None or best.step_s > most_s else best


def _deals(job: Workload) -> Iterator[Workload]:
    """Yields the other deals on as many nodes: no rank without a group, and an actor at least."""
    for ranks in range(job.sequence_parallel, int(job.num_gpus), job.sequence_parallel):
        actors = math.floor((job.num_gpus - ranks * job.learner_gpus) / job.actor_gpus + 1e-9)
        if actors < 1 or ranks > job.groups * job.sequence_parallel:
            return
        dealt = job.dealt(ranks, actors)
        if (ranks, actors) != (job.ranks, job.actors) and len(dealt.nodes) <= len(job.nodes):
            yield dealt


def _overlapped_s(job: Workload) -> float:
    return parts.bound_s(job, "likely")


def _in_turns_s(job: Workload) -> float:
    return parts.generation_s(job, "likely") + parts.learner_times(job, "likely").total_s
