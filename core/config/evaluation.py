"""The section `eval` of a config: what is held out, and how it is evaluated."""

from __future__ import annotations

from typing import Any

import pydantic
from pydantic import Field

from core.config.section import MAX_NUMBER, Section, shown

MAX_SAMPLES = 65_536
"""Of one prompt."""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_NUMBER


class EvalConfig(Section):
    """Held-out evaluation, by the actors, at a named policy version."""

    every: int = Field(
        50, ge=1, description="Learner steps between evaluations (rounded up to the next publication)."
    )
    sampling: tuple[int, float] = Field(
        (4, 1.0),
        description="`[completions, temperature]`: completions per held-out prompt, and the temperature they are sampled at; 0: "
        "greedy, else 0.01 or more. For example `[1, 0]`.",
    )

    @property
    def samples(self) -> int:
        """Completions per held-out prompt."""
        return self.sampling[0]

    @property
    def temperature(self) -> float:
        """Sampling temperature of evaluations; 0: greedy."""
        return self.sampling[1]

    @pydantic.field_validator("sampling", mode="before")
    @classmethod
    def _sampling_is_number_and_temperature(cls, value: Any) -> Any:
        samples, temperature = value if isinstance(value, tuple) and len(value) == 2 else (None, None)
        if type(samples) is int and 1 <= samples <= MAX_SAMPLES and _is_number(temperature):
            return value
        raise ValueError(
            f"eval.sampling = {shown(value)}: expected completions per prompt, from 1 to {MAX_SAMPLES}, and their temperature, "
            "for example [4, 1.0]"
        )
