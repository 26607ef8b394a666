"""The section `eval` of a config: what is held out, and how it is evaluated.

    data.eval_path, data.eval_rows, eval.sampling   one set, the suite `held_out`
    eval.suites: {math: {path: ..., samples: 8}}    several by name, each with settings of its own

`Config.suites` joins both into `Suite`s, of which everybody else knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic
from pydantic import Field

from core.config.environments import check_environments
from core.config.section import MAX_NUMBER, Section, shown

MAX_SAMPLES = 65_536
"""Of one prompt."""
MAX_SUITES = 100
HELD_OUT = "held_out"
"""The name of the suite that data.eval_path and data.eval_rows make."""
NO_ENVIRONMENT = "none"
"""What a suite writes to have prompts and answers where the run has an environment."""
_HELD_OUT_KEYS = {
    "path": "data.eval_path",
    "rows": "data.eval_rows",
    "samples": "eval.sampling",
    "temperature": "eval.sampling",
    "functions": "rewards.functions",
    "environments": "environments",
    "every": "eval.every",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_NUMBER


class SuiteConfig(Section):
    """One held-out set of `eval.suites`; what it leaves out is as in the run."""

    path: str = Field(
        ...,
        min_length=1,
        description="Its prompts, like `data.path`; the split is `test` unless `?split=` says otherwise.",
    )
    rows: int | None = Field(None, ge=1, description="Rows evaluated, the first so many; `data.eval_rows`.")
    samples: int | None = Field(
        None, ge=1, le=MAX_SAMPLES, description="Completions per prompt; that of `eval.sampling`."
    )
    temperature: float | None = Field(
        None, ge=0, description="Sampling temperature, 0: greedy; that of `eval.sampling`."
    )
    functions: dict[str, float] | None = Field(
        None, min_length=1, description="Reward functions and their weights; `rewards.functions`."
    )
    environments: str | dict[str, str] | None = Field(
        None,
        description="What its prompts are played in, like `environments`; `none`: prompts and answers.",
    )
    every: int | None = Field(None, ge=1, description="Learner steps between its evaluations; `eval.every`.")


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
    suites: dict[str, SuiteConfig] = Field(
        {},
        max_length=MAX_SUITES,
        description="Held-out sets by name, each a mapping of `path` and, where it differs from the run, `rows`, `samples`, "
        "`temperature`, `functions`, `environments` and `every`. For example `{math: {path: math.jsonl, samples: 8}}`. With "
        "suites, the set of `data.eval_path`, called `held_out`, is evaluated only where that is set.",
    )
    keep_best: str | None = Field(
        None,
        min_length=1,
        description="`SUITE/METRIC`, such as `math/avg@8`: the version with the highest value is kept in `RUN_DIR/best`, a "
        "policy directory. None: only the last version is.",
    )
    stop_at: tuple[str, float] | None = Field(
        None,
        description="`[SUITE/METRIC, value]`, such as `[held_out/avg@4, 0.9]`: the run ends, as after its last step, when a version "
        "is evaluated to the value or more. None: after `run.steps`, which are the most in any case.",
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

    @pydantic.field_validator("stop_at", mode="before")
    @classmethod
    def _stop_at_is_metric_and_value(cls, value: Any) -> Any:
        metric, least = value if isinstance(value, tuple) and len(value) == 2 else (None, None)
        if value is None or (isinstance(metric, str) and _is_number(least)):
            return value
        raise ValueError(
            f"eval.stop_at = {shown(value)}: expected SUITE/METRIC and the value to stop at, for example [held_out/avg@4, 0.9]"
        )

    @pydantic.field_validator("suites", mode="before")
    @classmethod
    def _suites_have_environments(cls, value: Any) -> Any:
        for name, suite in value.items() if isinstance(value, dict) else ():
            played = suite.get("environments") if isinstance(suite, dict) else None
            if played is not None and played != NO_ENVIRONMENT:
                more = f", or {NO_ENVIRONMENT}"
                check_environments(played, f"eval.suites.{name}.environments", more)
        return value

    @pydantic.field_validator("suites", mode="after")
    @classmethod
    def _suites_have_names(cls, value: dict[str, SuiteConfig]) -> dict[str, SuiteConfig]:
        for name in value:
            if name == HELD_OUT:
                raise ValueError(
                    f"eval.suites.{HELD_OUT}: the name is taken by the set of data.eval_path. Give the suite another one."
                )
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"eval.suites: {shown(name)} is no name of a suite: letters, digits and `._-`, at most 64, for example math"
                )
        return value


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A held-out set with all its settings: what `eval.suites` says of it, and else the run.

    path          its prompts; None: the split `test` of `data.path`
    rows          the first so many are evaluated
    samples       completions of each prompt, at `temperature`
    functions     reward functions and their weights; `has_own_functions`: others than the run's
    environments  as in the config; None: prompts and answers
    every         learner steps between evaluations
    """

    name: str
    path: str | None
    rows: int
    samples: int
    temperature: float
    functions: Mapping[str, float] = field(hash=False)
    has_own_functions: bool
    environments: str | Mapping[str, str] | None = field(hash=False)
    every: int

    def key(self, setting: str) -> str:
        """Returns the config's key of a setting, to be named in a message."""
        if self.name != HELD_OUT:
            return f"eval.suites.{self.name}.{setting}"
        return _HELD_OUT_KEYS[setting]

    def last_due(self, version: int, publish_every: int) -> int:
        """Returns the last version up to this one that is evaluated for its interval: the base, and the first
        publication at or after each multiple of `every`.
        """
        multiple = version // self.every * self.every
        while (due := -(-multiple // publish_every) * publish_every) > version:
            multiple -= self.every
        return due

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics by which a version may be called the best: `avg@4`, `pass@1`, `pass@2`, ..."""
        counts = sample_counts(self.samples)
        votes = [f"majority@{k}" for k in counts if k > 1]
        return (f"avg@{self.samples}", *(f"pass@{k}" for k in counts), *votes)


def sample_counts(num_samples: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, ... below `num_samples`, then `num_samples`: the k of pass@k and majority@k."""
    return (*(1 << power for power in range((num_samples - 1).bit_length())), num_samples)
