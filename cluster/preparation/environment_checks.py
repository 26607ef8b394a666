"""Checks the environments of a run before it starts: what they are, whether the chat template can go on after
an answer, whether the rows have the columns they need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.dialogue import Dialogue
from actors.prompts import PromptSet, joined
from actors.sources import Source, report_bad_rows
from core.config import Config
from core.config.environments import all_paths, suite_names
from core.config.rewards import ENVIRONMENT
from core.errors import ConfigError, DataError
from environments.spec import EnvironmentSpec, describe


@dataclass(frozen=True)
class Acted:
    """The environments of a run and its suites, by their names in the whole run; `notes` are to be told."""

    specs: Mapping[str, EnvironmentSpec]
    notes: tuple[str, ...] = ()

    def tools(self, names: Iterable[str]) -> dict[str, tuple[dict[str, Any], ...]]:
        """Returns the tools of environments, by name."""
        return {name: self.specs[name].tools for name in names}


def check_environments(config: Config, tokenizer: Any, end_ids: Sequence[int]) -> Acted:
    """Returns what the environments are, and what to tell about them; no process starts where there are none.

    Raises ConfigError when one cannot be loaded or is asked for a reward it does not have, and DataError when
    the chat template does not go on after an answer.
    """
    paths = all_paths(config)
    if not paths:
        return Acted({})
    specs, data = describe(paths), config.data
    _check_rewards(config, specs)
    notes: dict[str, None] = {}
    for spec in specs.values():
        dialogue = Dialogue(tokenizer, spec.tools, data.template_options, data.chat_template, end_ids=end_ids)
        try:
            notes |= dict.fromkeys(dialogue.check())
        except DataError as error:
            raise DataError(f"{spec.path}: {error}") from None
    return Acted(specs, tuple(notes))


def _check_rewards(config: Config, specs: Mapping[str, EnvironmentSpec]) -> None:
    asked = [(list(config.environment_paths), set(config.rewards.functions))]
    asked += [(list(suite_names(config, suite).values()), set(suite.functions)) for suite in config.suites]
    for names, functions in asked:
        for spec in map(specs.__getitem__, names if ENVIRONMENT in functions else ()):
            if not spec.has_reward:
                raise ConfigError(
                    f"{spec.path} has no reward of its own, which the reward function {ENVIRONMENT!r} asks for: "
                    "give it get_reward(), or name other functions"
                )


def playable(config: Config, acted: Acted, prompts: PromptSet) -> PromptSet:
    """Returns the prompts whose rows have the columns without which their environment cannot begin.

    Raises DataError where others may not be skipped.
    """
    if not acted.specs:
        return prompts
    found = [_playable(config, acted, part) for part in prompts.split()]
    whole = joined(found, [member.share for member in prompts.members])
    return dataclasses.replace(whole, source=prompts.source, notes=prompts.notes)


def _playable(config: Config, acted: Acted, prompts: PromptSet) -> PromptSet:
    bad = {}
    for row in prompts.rows:
        columns = () if row.environment is None else acted.specs[row.environment].columns
        if missing := [name for name in columns if name not in row.columns]:
            bad[row.source_row] = (
                f"no column {', '.join(map(repr, missing))}, which the environment {row.environment!r} needs; it has "
                f"{', '.join(map(repr, row.columns)) or 'none'}"
            )
    if not bad:
        return prompts
    rows = [row for row in prompts.rows if row.source_row not in bad]
    source = Source(prompts.source, "row", {row.source_row: row.columns for row in prompts.rows})
    report_bad_rows(source, bad, len(rows), config.data.on_bad_row)
    return dataclasses.replace(prompts, rows=rows, num_bad_rows=prompts.num_bad_rows + len(bad))
