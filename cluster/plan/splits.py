"""The same GPUs dealt to learner and actors in other ways. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from cluster.plan import parts
from cluster.plan.workload import Workload

WORTH = 0.95
"""A split is told where a step takes at most this share of the present one."""


class Split(NamedTuple):
    """A deal: ranks of the learner, actors, and the seconds of a step as the slower of both has it."""

    ranks: int
    actors: int
    step_s: float


def best_split(job: Workload, fits: Callable[[Workload], bool]) -> Split | None:
    """Returns the quickest split of the job's GPUs that `fits`, None where none is quicker than the present
    one by 5 % or more, or where learner and actors are not on GPUs of their own.
    """
    if job.machines.device is None or min(job.learner_gpus, job.actor_gpus) < 1:
        return None
    found = []
    for ranks in range(job.sequence_parallel, int(job.num_gpus), job.sequence_parallel):
        actors = math.floor((job.num_gpus - ranks * job.learner_gpus) / job.actor_gpus + 1e-9)
        if actors < 1 or ranks > job.groups:
            break
        dealt = job.dealt(ranks, actors)
        if parts.running_slots(dealt) >= 1 and fits(dealt):
            found.append(Split(ranks, actors, parts.bound_s(dealt, "likely")))
    best = min(found, key=lambda split: split.step_s, default=None)
    now_s = parts.bound_s(job, "likely")
    if best is None or best.step_s > WORTH * now_s:
        return None
    return best
