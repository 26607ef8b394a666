"""Configs for tests: `make_config` is the one maker, all others are it with what their tests have in
common.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.config import Config
from learner.catalogue import load_config, parse_config
from tests.support import ROOT

LONG = 100_000
"""More tokens than a simulated sample has before something else ends it."""

LR = 1e-3
"""The learning rate of `update_config`."""

MINIMAL: dict[str, Any] = {
    "model": {"path": "none"},
    "data": {"path": "none"},
    "rewards": {"functions": {"exact_match": 1.0}},
}
"""What a config must name; nothing of it is there."""


def changed(tree: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """`tree` with fields of its sections changed, or sections added."""
    new = {
        name: {**tree.get(name, {}), **fields} if isinstance(fields, dict) else fields
        for name, fields in sections.items()
    }
    return {**tree, **new}


def make_config(tree: dict[str, Any] | None = None, /, **sections: Any) -> Config:
    """MINIMAL, changed by `tree`, changed by `sections`."""
    return parse_config(changed(changed(MINIMAL, tree or {}), sections))


def quickstart(*overrides: str) -> Config:
    """The shipped quickstart with `section.key=value` overrides."""
    return load_config(ROOT / "configs" / "quickstart.yaml", list(overrides))


def actor_config(**sections: Any) -> Config:
    """A run whose actors generate with a simulated engine."""
    tree = {
        "run": {"timeout_s": 30.0},
        "data": {"chat_template": False, "max_prompt_tokens": 8},
        "actors": {"group_size": 4, "slots": 8, "max_new_tokens": 16},
        "buffer": {"capacity": 32, "max_staleness": 100},
        "learner": {"groups_per_step": 4, "micro_batch_tokens": 2 * LONG},
        "eval": {"sampling": (2, 1.0)},
    }
    return make_config(tree, **sections)


def buffer_config(
    *, timeout_s: float = 60.0, groups_per_step: int = 2, curriculum: int | str | None = None, **buffer: Any
) -> Config:
    """A run of which there is the buffer only."""
    return make_config(
        data={"curriculum": curriculum},
        run={"timeout_s": timeout_s, "seed": 5},
        learner={"groups_per_step": groups_per_step},
        buffer=buffer,
        weights={"publish_every": 1},
    )


def offline_config(offline: Path | str, **sections: Any) -> Config:
    """A run on a log alone."""
    tree = {
        "data": {"path": None, "offline": str(offline), "chat_template": False, "max_prompt_tokens": 8},
        "actors": {"count": 0, "group_size": 4, "max_new_tokens": 4},
        "buffer": {"capacity": 8},
        "learner": {"groups_per_step": 2},
        "objective": {"importance_weight": "none"},
    }
    return make_config(tree, **sections)


def update_config(model_dir: Path | str, *, moving: bool = False, **learner: object) -> Config:
    """A run whose learner takes small steps in fp32.

    `moving`: with copies of the policy that move: the reference every 2 steps, the proximal policy every 3;
    and with per-token references.
    """
    tree: dict[str, Any] = {
        "model": {"path": str(model_dir)},
        "data": {"max_prompt_tokens": 12},
        "actors": {"max_new_tokens": 8},
        "learner": {"groups_per_step": 5, "lr": LR, "grad_clip": 0.5, "micro_batch_tokens": 96, **learner},
        "objective": {"beta": 0.1},
    }
    if not moving:
        return make_config(tree)
    moves = {"name": "ppo_decoupled", "beta": 0.1, "ref_update_every": 2, "proximal_every": 3}
    return make_config(tree, objective=moves)


def pushing(transport: str, **sections: Any) -> Config:
    """A config that its own validator would refuse on a machine without a GPU."""
    config = actor_config(**{"run": {"timeout_s": 8.0}, **sections})
    return config.model_copy(update={"weights": config.weights.model_copy(update={"transport": transport})})


RANK = 4
"""Of the adapters of `lora_config`."""


def lora_config(model_dir: Path, *, moving: bool = False, **learner: object) -> Config:
    """`update_config` with adapters."""
    return update_config(model_dir, moving=moving, lora_rank=RANK, **learner)


EXAMPLE: dict[str, Any] = {
    "run": {"name": "example", "steps": 10},
    "model": {"path": ".cache/base"},
    "data": {"path": "configs/arithmetic", "chat_template": False, "max_prompt_tokens": 8},
    "rewards": {"functions": {"exact_match": 1.0}},
    "actors": {"count": 2, "num_cpus": 0.5, "max_new_tokens": 4},
    "buffer": {"capacity": 96},
    "learner": {"groups_per_step": 32, "lr": 3.0e-4},
}


SECTION_MODELS: dict[str, Any] = {
    name: field.annotation
    for name, field in Config.model_fields.items()
    if hasattr(field.annotation, "model_fields")
}


MAX_LINES = 12
