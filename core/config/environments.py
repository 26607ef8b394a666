"""The field `environments` of a config: what the policy acts in, one environment or several by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import pydantic
from pydantic import Field

from core.config.section import Section, shown
from core.text import ONLY

if TYPE_CHECKING:
    from core.config import Config
    from core.config.evaluation import Suite

Environments: TypeAlias = str | dict[str, str] | None
_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(\?.*)?", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w-]*")


def check_environments(value: Any, key: str, more: str = "") -> None:
    """Raises ValueError where the value of config key `key` is neither a path nor paths by name; `more` says
    what else it may be.
    """
    expected = f"expected module:Class, or names and such paths, for example {{game: mine:Game}}{more}"
    if not isinstance(value, str | dict) or not value:
        raise ValueError(f"{key} = {shown(value)}: {expected}")
    named = (
        {f"{key}.{name}": path for name, path in value.items()} if isinstance(value, dict) else {key: value}
    )
    for each, path in named.items():
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            raise ValueError(f"{each} = {shown(path)}: {expected}")
    for name in value if isinstance(value, dict) else ():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{key}: {shown(name)} is no name of one; expected letters, digits, _ and -")


def paths_by_name(environments: str | Mapping[str, str] | None) -> dict[str, str]:
    """Returns environments by name; one without a name is `environment`, and null is none."""
    if isinstance(environments, str):
        return {ONLY: environments}
    return dict(environments or {})


def suite_names(config: Config, suite: Suite) -> dict[str, str]:
    """Returns how the environments of a suite are called in its rows, and in the whole run, where several
    suites may have others of the same name.
    """
    is_the_runs = suite.environments == config.environments
    names = paths_by_name(suite.environments)
    return {name: name if is_the_runs else f"{suite.name}.{name}" for name in names}


def all_paths(config: Config) -> dict[str, str]:
    """Returns the environments of the run and of its suites by their names in the whole run."""
    found = config.environment_paths
    for suite in config.suites:
        paths = paths_by_name(suite.environments)
        found |= {of_run: paths[name] for name, of_run in suite_names(config, suite).items()}
    return found


class EnvironmentsField(Section):
    """A base of `Config` that adds `environments`, which is no section: a path, or paths by name."""

    environments: Environments = Field(
        None,
        description="What the policy acts in: `module:Class`, or several by name, of which each row's column `environment` "
        "chooses one: `{game: mine:Game, agent: mine:agent}`. A class has `reset(**row)`, and public typed methods as tools or "
        "`step(text)`; a function is a harness, which calls the OpenAI API. `?name=value` behind the path is given to the "
        "constructor, or to the harness. Null: a prompt and its answer.",
    )

    @property
    def environment_paths(self) -> dict[str, str]:
        """The environments by name; one without a name is `environment`, and with null there is none."""
        return paths_by_name(self.environments)

    @pydantic.field_validator("environments", mode="before")
    @classmethod
    def _environments_are_paths(cls, value: Any) -> Any:
        if value is not None:
            check_environments(value, "environments")
        return value
