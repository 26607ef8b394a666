"""Refuses what no card can hold, by arithmetic that leaves no doubt, before a process of the run starts.

    nodes --largest_card--> bytes, or None where nobody knows --check_cards--> PlacementError

What a card might just hold is for the warnings of a dry run, and for `launch.py plan`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence

from cluster.plan.rates import DEVICES
from cluster.preparation.memory import GIB, MemoryEstimate, estimate_memory
from core.config import Config
from core.config.actors import GPU_MEMORY_SHARE
from core.errors import PlacementError

CARD_MEMORY = "card_memory"
"""Of a node's resources: the bytes of its largest card, where we looked ourselves."""
_TYPE = "accelerator_type:"
_KEPT = (
    "parameters",
    "adapters",
    "gradients",
    "float32 master",
    "Adam moments",
    "reference",
    "proximal policy",
)
"""Parts of a rank that are there all the time."""
_MOST_PARTS = 64


def largest_card(nodes: Sequence[Mapping[str, float]]) -> float | None:
    """Returns the bytes of the largest card of the nodes; None where some have cards that are not known.

    Ray tells the kind of a node's cards as a resource, such as `accelerator_type:H100`. The 80 GB of a data
    sheet are 2^30 bytes each, or nearly.
    """
    found = []
    for node in nodes:
        if not node.get("GPU"):
            continue
        kinds = [DEVICES.get(key.removeprefix(_TYPE).lower()) for key in node if key.startswith(_TYPE)]
        known = [kind.memory_bytes * GIB / 1e9 for kind in kinds if kind is not None]
        if CARD_MEMORY in node:
            known = [node[CARD_MEMORY]]
        if not known:
            return None
        found += known
    return max(found, default=None)


def own_card_memory() -> dict[str, float]:
    """Returns this machine's largest card as a resource, nothing where the driver's own tool tells none.

    torch would tell too, but keeps a context of some hundred megabytes on the card of whoever asks.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        return {CARD_MEMORY: max(float(line) for line in told.split()) * 2**20}
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


def check_cards(config: Config, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raises PlacementError for a learner whose weights and moments, or an engine whose weights, are more
    than the largest card's whole memory. What is not known is not refused.
    """
    card = largest_card(nodes) if config.learner.num_gpus or config.actors.num_gpus else None
    if card is None:
        return
    estimate = estimate_memory(config)
    _check_learner(config, estimate, card)
    _check_engine(config, estimate, card)


def _check_learner(config: Config, estimate: MemoryEstimate, card: float) -> None:
    learner, own = config.learner, card * config.learner.num_gpus
    kept = sum(part.num_bytes for part in estimate.learner if part.name in _KEPT and not part.on_host)
    if not learner.num_gpus or kept <= own:
        return
    team = learner.sequence_parallel
    enough = team * -(-int(learner.ranks * kept / card + 1) // team)
    whole = "learner.num_gpus=1 " if learner.num_gpus < 1 else ""
    raise PlacementError(
        f"model.path = {config.model.path}: weights, gradients and moments are {kept / 1e9:.0f} GB for each of learner.ranks = "
        f"{learner.ranks}, and {_named(own, card)}. Set {whole}learner.ranks={enough}, or more for what comes besides, or "
        "learner.offload=all, or train adapters (learner.lora_rank)."
    )


def _check_engine(config: Config, estimate: MemoryEstimate, card: float) -> None:
    actors, own = config.actors, card * config.actors.gpu_memory_share
    weights = sum(part.num_bytes for part in estimate.actor if part.name == "weights" and not part.on_host)
    if not actors.num_gpus or weights < own:
        return
    share = actors.gpu_memory_share if actors.num_gpus >= 1 else GPU_MEMORY_SHARE
    parts = actors.tensor_parallel
    while parts < _MOST_PARTS and weights * actors.tensor_parallel / parts >= card * share:
        parts *= 2
    more = f"actors.tensor_parallel={parts} " if parts > 1 else ""
    raise PlacementError(
        f"model.path = {config.model.path}: an engine's weights are {weights / 1e9:.0f} GB on each of its GPUs, and "
        f"{_named(own, card)} (actors.engine_memory). Set {more}actors.num_gpus={parts}, or take cards with more memory."
    )


def _named(own: float, card: float) -> str:
    return f"{own / 1e9:.0f} GB of the largest card's {card / 1e9:.0f} GB are its own"
