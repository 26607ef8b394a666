"""Reward models by their names in a config: `reward_model:PATH?num_gpus=1&batch=16`.

A name is read into a `HostedModel` here; the model itself runs once for all actors in a process of its own
(actors/reward_model/), which the driver starts (cluster/services.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from core.config.section import LEAST_SHARE
from core.errors import RewardError
from rewards.registry import read_name

if TYPE_CHECKING:
    from core.config import Config

PREFIX = "reward_model:"


class HostedModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Hugging Face sequence classifier as a reward: its parameters behind the `?`.

    num_cpus, num_gpus  what its process asks Ray for; with num_gpus=0 it runs on CPUs, in float32
    batch               conversations of one forward pass, whichever actors ask
    label               which of several labels counts, by its name in the model's config; the reward is its
                        logit. Not needed where there is one logit
    chat_template       whether the conversation is rendered by the model's own chat template; false gives the
                        model the prompt and the completion as a pair of texts
    max_tokens          longest conversation; 0: what the model says. A longer one is an error of its sample:
                        nothing is truncated
    timeout_s           seconds that a group's answer may take
    trust_remote_code   whether to run Python code that comes with the model
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    batch: int = 16
    label: str = ""
    chat_template: bool = True
    max_tokens: int = 0
    timeout_s: float = 120.0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for field, value, least in (
            ("num_cpus", self.num_cpus, 0),
            ("num_gpus", self.num_gpus, 0),
            ("batch", self.batch, 1),
            ("max_tokens", self.max_tokens, 0),
            ("timeout_s", self.timeout_s, 0.001),
        ):
            if not least <= value < 1e9:
                raise ValueError(f"{field}={value:g}, expected at least {least:g}")
        if self.num_gpus > 1:
            raise ValueError(f"num_gpus={self.num_gpus:g}, expected at most 1: a reward model is on one GPU")
        for field, share in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            if 0 < share < LEAST_SHARE:
                raise ValueError(
                    f"{field}={share:g}, expected 0 or at least {LEAST_SHARE:g}, which is what Ray counts in"
                )


def hosted_models(names: Iterable[str]) -> dict[str, HostedModel]:
    """Returns the reward models among names of reward functions. Raises RewardError where a path is missing
    or a parameter is not one.
    """
    found = {}
    for name in names:
        read = read_name(name)
        if not read.plain.startswith(PREFIX) and read.plain != PREFIX.rstrip(":"):
            continue
        if not path_of(name):
            raise RewardError(
                f"reward function {name!r} names no model; write {PREFIX}PATH, a Hugging Face directory or a hub id"
            )
        try:
            found[name] = msgspec.convert(dict(read.parameters), HostedModel, strict=False)
        except msgspec.ValidationError as error:
            known = ", ".join(field.name for field in msgspec.structs.fields(HostedModel))
            raise RewardError(f"reward function {name!r}: {error}; its parameters are {known}") from None
    return found


def models_of(config: Config) -> dict[str, HostedModel]:
    """Returns the reward models that a run and its evaluations ask, by their names in its config."""
    of_suites = (name for suite in config.suites for name in suite.functions or ())
    return hosted_models([*config.rewards.functions, *of_suites])


def path_of(name: str) -> str:
    """Returns the directory or hub id that a name of a reward model holds; a directory that is there by its
    whole path.
    """
    path = read_name(name).plain.partition(":")[2]
    folder = os.path.expanduser(path)
    return os.path.abspath(folder) if os.path.isdir(folder) else path
