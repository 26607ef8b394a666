"""The text of a plan."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.plan import parts
from cluster.plan.fit import Fit
from cluster.plan.planning import SECONDS_AN_HOUR, Plan, ranges
from cluster.plan.rates import CASES, all_rates
from cluster.plan.workload import Workload
from core.weights.board import KEEP

_GPU_RATES = ("TRAIN_SHARE", "DECODE_BANDWIDTH", "ENGINE_STEP_S", "EXPOSED", "STORE_BYTES_PER_S")


def render_plan(plan: Plan) -> str:
    """Returns the lines of a plan; what does not fit and its warnings come last."""
    lines = [
        "work",
        *_work(plan),
        "seconds of a step       likely     best    worst",
        *_times(plan),
        "simulated, at the likely rates, with the run's own admission, sampler and bound",
        *_simulated(plan),
        "memory and network",
        *_fit(plan.job, plan.fit),
        "what it takes",
        *_cost(plan),
        "how sure",
        *_sure(plan.job),
    ]
    lines += [f"does not fit: {problem}" for problem in plan.fit.problems]
    return "\n".join(lines + [f"warning: {hint}" for hint in plan.fit.hints])


def _work(plan: Plan) -> Iterator[str]:
    job = plan.job
    yield from (f"  {note}" for note in plan.notes)
    yield (
        f"  {job.groups} groups of {job.group_size} a step: {job.generated_tokens:,.0f} tokens to generate, "
        f"{job.trained_tokens:,.0f} to train in {parts.num_passes(job)} passes"
    )
    device = job.machines.device
    if device is None:
        yield f"  {job.ranks} learner ranks and {job.actors} actors on {job.machines.cores:g} cores"
        return
    yield (
        f"  {job.ranks} learner ranks on {job.ranks * job.learner_gpus:g} and {job.actors} actors on "
        f"{job.actors * job.actor_gpus:g} x {device.title}, {len(job.nodes)} nodes"
    )


def _times(plan: Plan) -> Iterator[str]:
    for name, by_case in ranges(plan).items():
        indent = "  " if name in ("training", "generation", "step") else "    "
        numbers = " ".join(f"{_seconds(by_case[case]):>8}" for case in ("likely", "best", "worst"))
        yield f"{indent}{name:<{22 - len(indent)}}{numbers}"


def _seconds(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2g}" if value < 1 else f"{value:.1f}"


def _simulated(plan: Plan) -> Iterator[str]:
    outcome, job = plan.outcome, plan.job
    mean, high, most = outcome.staleness
    yield (
        f"  a step takes {_seconds(outcome.step_s)} s; the learner trains {outcome.learner_busy:.0%} of the time, "
        f"{outcome.slots_busy:.0%} of the slots generate"
    )
    yield f"  staleness {mean:.1f} on average, {high:.0f} at the 95th percentile, {most:.0f} at most"
    lost = ", ".join(
        f"{share:.1%} {name.removeprefix('evicted_')}" for name, share in outcome.evicted.items()
    )
    yield f"  untrained groups that leave, of those trained: {lost or 'none'}"
    speed = parts.actor_tokens_per_s(job, "likely")
    low, high_speed = (parts.actor_tokens_per_s(job, case) for case in ("worst", "best"))
    yield (
        f"  an actor generates {speed:,.0f} tokens/s ({low:,.0f} to {high_speed:,.0f}), {parts.running_slots(job):.0f} "
        f"sequences at once"
    )
    yield f"  the bottleneck is {plan.bottleneck}"


def _fit(job: Workload, fit: Fit) -> Iterator[str]:
    if job.machines.device is not None:
        yield (
            f"  a learner's card {fit.learner_gpu / 1e9:.0f} GB, an actor's {fit.actor_gpu / 1e9:.0f} GB with all slots at "
            f"average length, of {job.machines.device.memory_bytes / 1e9:.0f} GB"
        )
    yield (
        f"  host: a rank {fit.rank_host / 1e9:.1f} GB, rank 0 {job.snapshot_bytes / 1e9:.1f} GB besides, an actor "
        f"{fit.actor_host / 1e9:.1f} GB"
    )
    yield f"  object store: {fit.store / 1e9:.1f} GB for {KEEP} versions of {job.published_bytes / 1e9:.1f} GB"
    yield f"  out of the learner's node: {fit.network_per_step / 1e9:.1f} GB a step for other nodes' actors"


def _cost(plan: Plan) -> Iterator[str]:
    job = plan.job
    hours = {case: job.steps * plan.step_s(case) / SECONDS_AN_HOUR for case in CASES}
    yield f"  {job.steps} steps: {hours['likely']:.2g} hours ({hours['best']:.2g} to {hours['worst']:.2g})"
    if job.num_gpus:
        yield (
            f"  {plan.gpu_hours('likely'):,.0f} GPU-hours ({plan.gpu_hours('best'):,.0f} to {plan.gpu_hours('worst'):,.0f}); "
            "start and evaluations are not in it"
        )
    if plan.split is not None:
        ranks, actors, step_s = plan.split
        yield (
            f"  a better split of the same GPUs: learner.ranks={ranks} actors.count={actors}, about {_seconds(step_s)} s a step "
            f"for {_seconds(plan.outcome.step_s)}, simulated"
        )
    elif job.num_gpus:
        yield "  no other split of the same GPUs is quicker by a twentieth"


def _sure(job: Workload) -> Iterator[str]:
    rates = all_rates()
    if job.machines.device is None:
        yield "  rates of a core are those of benchmarks/results/, of two cores that others use too; between sizes by a line"
        return
    yield "  few rates were measured with this system, on one H200. Peaks are the maker's, the shares of them that are reached:"
    for name in _GPU_RATES:
        rate = rates[name]
        numbers = f"{rate.likely:g} ({rate.worst:g} to {rate.best:g})"
        yield f"    {name:<18} {numbers:<24} {rate.source}"
    yield "  all of them: cluster/plan/rates.py"
