"""Tells what a run asks of the cluster, and whether the cluster has it, before anything starts, instead of
waiting without end.

    Config --bundles--> Placement --check--> warnings, or PlacementError
                            `------render---> the table of `train --dry-run`

The learner ranks are one placement group, every actor is one of its own: an actor that cannot be placed
blocks nobody. Everything here is pure but `available`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.preparation import nodes as on_nodes
from cluster.preparation.memory import GIB, MemoryEstimate, estimate_memory, host_bytes, render_memory
from cluster.preparation.nodes import MEMORY, SHM, STORE, Resources, ask_ray, name_of, this_machine, with_shm
from cluster.preparation.surroundings import cluster_address
from core.config import ActorsConfig, Config, LearnerConfig
from core.config.files import dump_config
from core.errors import PlacementError
from rewards.hosted import HostedModel, models_of

UNLIMITED = 1 << 30
BARE_PROCESS_GIB = 0.3
"""Half of what was measured: Python with torch and Ray imported, some of it shared."""


@dataclass(frozen=True)
class Bundle:
    """`count` bundles of `resources`, each of which must lie on one node: `Bundle(4, {"CPU": 4.0, "GPU":
    1.0})`.
    """

    role: str
    count: int
    resources: dict[str, float]


class Placement(NamedTuple):
    """The request of a run: a gang of learner ranks, one placement group of `learner.count` bundles,
    `actor.count` groups of one, and reward models, which are placed first.
    """

    learner: Bundle
    actor: Bundle
    models: tuple[Bundle, ...] = ()

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """Returns all of them."""
        return (self.learner, self.actor, *self.models)

    def total(self) -> dict[str, float]:
        """Returns the sum of what is asked, by resource."""
        return {
            key: sum(bundle.count * bundle.resources[key] for bundle in self.bundles)
            for key in ("CPU", "GPU")
        }


def bundles(actors: ActorsConfig, learner: LearnerConfig, models: Iterable[HostedModel] = ()) -> Placement:
    """Returns what actors, learner and reward models ask for."""
    return Placement(
        Bundle("learner", learner.ranks, {"CPU": learner.reserved_cpus, "GPU": learner.num_gpus}),
        Bundle("actor", actors.fewest, {"CPU": actors.num_cpus, "GPU": actors.num_gpus}),
        tuple(Bundle("reward", 1, {"CPU": model.num_cpus, "GPU": model.num_gpus}) for model in models),
    )


def check(placement: Placement, resources: Resources | Sequence[Resources]) -> list[str]:
    """Returns warnings about actors beyond what fits into `resources`: a mapping per node (`ask_ray`), or
    one, taken as a single node.

    Raises PlacementError, with what is asked and what there is, when the learner and one actor cannot be
    placed at all. What other jobs hold is not considered, nor nodes that an autoscaler may add.
    """
    nodes, (learner, actor, models) = _as_nodes(resources), placement
    num_actors = most_actors(_beside(models, nodes), placement)
    has = f"the cluster has {_in_words(_sum(nodes))} on {len(nodes)} node{'' if len(nodes) == 1 else 's'}"
    if num_actors is None or (actor.count and not num_actors):
        short = _short_of(placement, nodes)
        why = (
            f"too few: {short}"
            if short
            else "enough in sum, but each rank and each actor must lie on one "
            "node, and no arrangement does it"
        )
        gang = (
            f"a learner of {learner.count} x ({_in_words(learner.resources)}) and at least one actor of "
            f"({_in_words(actor.resources)}){_with_models(models)}"
        )
        raise PlacementError(
            f"this run cannot be placed. It asks for {gang}; {has}; {why}.\n"
            "Add nodes, or lower learner.ranks, learner.num_cpus, learner.num_gpus, actors.num_cpus or "
            f"actors.num_gpus{' or what the reward models ask for' if models else ''}."
        )
    if num_actors < actor.count:
        asked = (
            f"each asks for {_in_words(actor.resources)} beside a learner of {learner.count} x "
            f"({_in_words(learner.resources)})"
        )
        return [
            f"{num_actors} of actors.count = {actor.count} actors fit: {asked}; {has}. Lower "
            "actors.count or add nodes."
        ]
    return []


def check_or_wait(placement: Placement, nodes: Sequence[Resources], wait_s: float | None) -> list[str]:
    """Returns what `check` returns, for `nodes` to which a cluster may add others within `wait_s` seconds:
    what cannot be placed yet is then a warning. Raises PlacementError as `check` does where `wait_s` is None.
    """
    try:
        return check(placement, nodes)
    except PlacementError as error:
        if wait_s is None:
            raise PlacementError(
                f"{error} Where the cluster adds nodes on demand, set run.placement_timeout_s=900."
            ) from None
        too_few = str(error).partition("\n")[0]
        return [f"{too_few} It waits {wait_s:.0f} s for more nodes (run.placement_timeout_s)."]


def check_for(config: Config, placement: Placement, nodes: Sequence[Resources]) -> list[str]:
    """Returns what `check` returns; on a cluster, what `check_or_wait` does with the config's wait."""
    if cluster_address() is None:
        return check(placement, nodes)
    return check_or_wait(placement, nodes, config.run.placement_timeout_s)


def most_actors(nodes: Sequence[Resources], placement: Placement) -> int | None:
    """Returns the most actors that fit beside the whole learner, at most `actor.count`; None when the learner
    itself does not fit.

    It is exact, node by node: the best number of actors for every number of ranks placed so far.
    """
    learner, actor, _ = placement
    best = {0: 0}
    for node in nodes:
        reached: dict[int, int] = {}
        for num_ranks, num_actors in best.items():
            for here in range(min(_capacity(node, learner), learner.count - num_ranks) + 1):
                left = {key: amount - here * learner.resources.get(key, 0) for key, amount in node.items()}
                actors = min(actor.count, num_actors + _capacity(left, actor))
                reached[num_ranks + here] = max(actors, reached.get(num_ranks + here, 0))
        best = reached
    return best.get(learner.count)


def spread(placement: Placement, nodes: Sequence[Resources]) -> list[tuple[int, int]]:
    """Returns how many ranks and actors Ray may put on each of the nodes, beside the reward models.

    It fills a node with ranks before it takes another, and gives an actor to the node with the largest share
    free. What fits nowhere is left out.
    """
    free = [dict(node) for node in _beside(placement.models, nodes)]
    counts = [[0, 0] for _ in nodes]
    for role, bundle in enumerate((placement.learner, placement.actor)):
        here = -1
        for _ in range(bundle.count):
            if role or here < 0 or not _capacity(free[here], bundle):
                fits = [number for number, node in enumerate(free) if _capacity(node, bundle)]
                if not fits:
                    break
                here = max(fits, key=lambda number: _share_left(free[number], nodes[number], bundle))
            counts[here][role] += 1
            for key, amount in bundle.resources.items():
                free[here][key] = free[here].get(key, 0) - amount
    return [(ranks, actors) for ranks, actors in counts]


def _share_left(node: Resources, at_first: Resources, bundle: Bundle) -> float:
    asked = {key: amount for key, amount in bundle.resources.items() if amount}
    return sum((node[key] - amount) / at_first[key] for key, amount in asked.items())


def memory_warnings(
    config: Config, placement: Placement, estimate: MemoryEstimate, nodes: Sequence[Resources]
) -> list[str]:
    """Returns a sentence for each node whose memory will not do for what Ray may put there; where nothing can
    be placed, one where all nodes together have too little.
    """
    counts = spread(placement, nodes)
    if any(map(any, counts)):
        return on_nodes.memory_warnings(config, estimate, nodes, counts)
    asked, has = host_bytes(config.actors, config.learner, estimate), _sum(nodes)[MEMORY]
    if has and asked > has:
        return [
            f"learner and actors want about {asked / GIB:.1f} GiB of host memory, there are "
            f"{has / GIB:.1f} GiB."
        ]
    return []


def _beside(models: Sequence[Bundle], nodes: Sequence[Resources]) -> list[Resources]:
    """Returns what is left of the nodes when the reward models have taken theirs, the largest first, each
    from the first node that has it; nothing where one fits nowhere.
    """
    left = [dict(node) for node in nodes]
    for model in sorted(models, key=lambda model: -max(model.resources.values(), default=0)):
        node = next((node for node in left if _capacity(node, model)), None)
        if node is None:
            return []
        for key, amount in model.resources.items():
            node[key] = node.get(key, 0) - amount
    return [*left]


def _with_models(models: Sequence[Bundle]) -> str:
    if not models:
        return ""
    return " and reward models of " + ", ".join(f"({_in_words(model.resources)})" for model in models)


def _capacity(node: Resources, bundle: Bundle) -> int:
    """Returns how many of the bundle the node holds; the tolerance is for sums of fractions such as 0.1."""
    fits = [
        fitting(node.get(key, 0), amount) if key == "GPU" else math.floor(node.get(key, 0) / amount + 1e-9)
        for key, amount in bundle.resources.items()
        if amount > 0
    ]
    return min(fits, default=UNLIMITED)


def fitting(gpus: float, each: float) -> int:
    """Returns how many processes of `each` GPUs (above 0) a node with `gpus` free ones holds.

    A fraction is of one GPU, as Ray has it: eight GPUs hold 24 processes of 0.3 and not 26. What is free of a
    GPU that others have a part of is taken to be on one GPU.
    """
    whole = math.floor(gpus + 1e-9)
    if each >= 1:
        return math.floor(whole / each + 1e-9)
    return whole * math.floor(1 / each + 1e-9) + math.floor((gpus - whole) / each + 1e-9)


def _short_of(placement: Placement, nodes: Sequence[Resources]) -> str:
    """Returns which resources are too few in sum for the learner and one actor."""
    learner, actor, models = placement
    has = _sum(nodes)
    asked = {
        key: learner.count * learner.resources[key]
        + actor.resources[key]
        + sum(model.resources[key] for model in models)
        for key in learner.resources
    }
    return ", ".join(
        f"{key} {has.get(key, 0):g} of {amount:g}"
        for key, amount in asked.items()
        if amount > has.get(key, 0) + 1e-9
    )


def _as_nodes(resources: Resources | Sequence[Resources]) -> list[Resources]:
    return [resources] if isinstance(resources, Mapping) else list(resources)


def _sum(nodes: Sequence[Resources]) -> dict[str, float]:
    return {key: sum(node.get(key, 0) for node in nodes) for key in ("CPU", "GPU", MEMORY)}


def _in_words(resources: Resources) -> str:
    return ", ".join(f"{resources.get(key, 0):g} {key}" for key in ("CPU", "GPU"))


def check_machine(actors: ActorsConfig, learner: LearnerConfig) -> None:
    """Raises PlacementError when a local Ray's processes could not even be loaded here: CPUs may be
    shared, memory may not.
    """
    import psutil

    if cluster_address() is not None:
        return  # On a cluster `check` asks the other machines.
    cache = 0.0 if actors.num_gpus else actors.kv_cache_gib
    num_processes = learner.ranks + actors.fewest * actors.num_processes
    asked = num_processes * BARE_PROCESS_GIB + actors.fewest * cache
    has = psutil.virtual_memory().total / GIB
    if asked > has:
        raise PlacementError(
            f"this machine has {has:.1f} GiB of memory; learner.ranks = {learner.ranks} and actors.count = "
            f"{actors.fewest} take "
            f"{asked:,.1f} GiB before any model is loaded ({BARE_PROCESS_GIB} a process, actors.engine_memory "
            f"= {cache:g} an actor). "
            "Lower learner.ranks, actors.count or actors.engine_memory, or run on a cluster (RAY_ADDRESS)."
        )


def render(
    config: Config,
    placement: Placement,
    resources: Resources | Sequence[Resources] | None,
    memory: MemoryEstimate,
    where: str = "cluster",
) -> str:
    """Returns the text of a dry run: bundles, what there is (None: not asked), memory, and every warning."""
    warnings = config.warnings()
    lines = ["placement", f"  {'role':<9}{'count':>5}  each"]
    kinds = ["one placement group, all or nothing", "a placement group each"]
    kinds += ["for all actors"] * len(placement.models)
    for bundle, groups in zip(placement.bundles, kinds, strict=True):
        lines.append(f"  {bundle.role:<9}{bundle.count:>5}  {_in_words(bundle.resources):<16}  {groups}")
    lines.append(f"  {'together':<14}  {_in_words(placement.total())}")
    if resources is None:
        lines += [where, "  not asked"]
    else:
        nodes = _as_nodes(resources)
        lines.append(where)
        lines += [f"  {_described(node, number)}" for number, node in enumerate(nodes, start=1)]
        try:
            warnings += check_for(config, placement, nodes)
        except PlacementError as error:
            warnings.append(str(error))
        warnings += memory_warnings(config, placement, memory, nodes)
    lines += ["memory, estimated", *render_memory(config.actors, config.learner, memory)]
    return "\n".join(lines + [f"warning: {warning}" for warning in warnings])


def _described(node: Resources, number: int) -> str:
    titles = {MEMORY: "memory", STORE: "object store", SHM: "/dev/shm"}
    sizes = [f"{node[key] / GIB:.1f} GiB {title}" for key, title in titles.items() if key in node]
    return f"{name_of(node, number)}: {', '.join([_in_words(node), *sizes])}"


def available(
    actors: ActorsConfig, learner: LearnerConfig, models: Iterable[HostedModel] = ()
) -> tuple[str, list[Resources]]:
    """Returns where the run would go and what each node there has: the cluster at RAY_ADDRESS, else this
    machine. Starts nothing.

    Raises PlacementError when RAY_ADDRESS names a cluster that does not answer.
    """
    if (address := cluster_address()) is not None:
        from cluster.session import ray_session

        with ray_session(actors, learner, models):
            return f"cluster at {address}", with_shm(ask_ray())
    return "this machine (RAY_ADDRESS names no cluster; logical CPUs as asked)", [
        this_machine(bundles(actors, learner, models).total()["CPU"])
    ]


def dry_run(config: Config, place: tuple[str, Sequence[Resources]] | None = None) -> str:
    """Returns the resolved config, as a file that can be given back, and everything `render` says. `place` is
    what `available` found.
    """
    models = models_of(config).values()
    where, nodes = place or available(config.actors, config.learner, models)
    asked = bundles(config.actors, config.learner, models)
    return f"{dump_config(config)}\n{render(config, asked, nodes, estimate_memory(config), where)}"
