"""Knobs that several objectives have, as bases of their `Config`. Imports core only.

An objective takes what it has, and no more: a knob that it lacks is an unknown key of the run's file. It
gives its own `name` and its own default of `beta`: 0 where the method has no KL term of its own.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import pydantic
from pydantic import Field

from core.config import ObjectiveConfig
from core.config.section import Section


def strength(default: float) -> Any:
    """Returns the field `beta` with another default than ObjectiveConfig's."""
    return Field(default, ge=0, description=ObjectiveConfig.model_fields["beta"].description)


class ReferenceConfig(ObjectiveConfig):
    """Knobs of an objective that pulls towards a reference, which can move."""

    ref_update_every: int = Field(
        0, ge=0, description="Learner steps between moves of the reference to the policy; 0: it never moves."
    )

    @property
    def reference_moves_every(self) -> int:
        """Learner steps between moves of the reference; 0: it never moves."""
        return self.ref_update_every

    @pydantic.model_validator(mode="after")
    def _reference_is_there_to_move(self) -> Self:
        if self.ref_update_every and self.beta == 0:
            raise ValueError(
                f"objective.ref_update_every = {self.ref_update_every} with objective.beta = 0: there is no "
                "reference to move."
            )
        return self


class RegressionConfig(ObjectiveConfig):
    """Knobs of an objective that divides by beta."""

    beta: float = strength(0.03)

    @pydantic.model_validator(mode="after")
    def _beta_divides(self) -> Self:
        if self.beta == 0:
            raise ValueError(
                f"objective.beta = 0: objective.name = {self.name} divides by beta. Set objective.beta above "
                "0, or another objective.name."
            )
        return self


class ClipConfig(Section):
    """Knobs of an objective with PPO's clipped surrogate."""

    clip_low: float = Field(
        0.2, gt=0, lt=1, description="Ratios below 1 - clip_low are clipped (PPO's epsilon)."
    )
    clip_high: float = Field(0.2, gt=0, description="Ratios above 1 + clip_high are clipped.")


class WeightConfig(Section):
    """Knobs of an objective that can have importance weights, of each token or of the sequence
    (_common.py).
    """

    importance_weight: Literal["none", "tis_token", "tis_sequence", "mis_token", "mis_sequence"] = Field(
        "none",
        description="Importance weights against stale data: truncated at `importance_cap` (tis) or masked "
        "above it (mis).",
    )
    importance_cap: float = Field(2.0, gt=0, description="Cap of the importance weights.")


class SequenceWeightConfig(Section):
    """Knobs of an objective with one term per sequence: no token can have a weight of its own."""

    importance_weight: Literal["none", "tis_sequence", "mis_sequence"] = Field(
        "none",
        description="Importance weights against stale data: truncated at `importance_cap` (tis) or masked "
        "above it (mis).",
    )
    importance_cap: float = Field(2.0, gt=0, description="Cap of the importance weights.")


Weights = WeightConfig | SequenceWeightConfig


class ProximalConfig(ObjectiveConfig):
    """Knobs of an objective whose ratio runs against a proximal policy, always or where it has importance
    weights.
    """

    proximal_every: int = Field(
        4,
        ge=1,
        description="Steps between copies of the policy that serve as its proximal policy, where there is "
        "one.",
    )

    @property
    def proximal_moves_every(self) -> int:
        """Learner steps between copies of the policy that serve as its proximal policy."""
        return self.proximal_every


class RatioConfig(ReferenceConfig, ClipConfig, WeightConfig, ProximalConfig):
    """Knobs of an objective with PPO's clipped ratio of each token."""
