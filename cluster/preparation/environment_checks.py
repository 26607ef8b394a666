"""Checks the environments of a run before it starts: what they are, whether the chat template can go on after
an answer, whether the rows have the columns they need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.dialogue import Dialogue
from actors.prompts import PromptSet, joined
from actors.sources import Source, report_bad_rows
from core.config import Config, RewardsConfig
from core.config.environments import all_paths, suite_names
from core.config.rewards import ENVIRONMENT
from core.errors import ConfigError, DataError
from core.text import shown_name
from environments.spec import EnvironmentSpec, describe
from rewards.check import check_environments_read


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
    notes = dict.fromkeys(_reward_notes(config, specs))
    for spec in specs.values():
        dialogue = Dialogue(tokenizer, spec.tools, data.template_options, data.chat_template, end_ids=end_ids)
        try:
            notes |= dict.fromkeys(dialogue.check())
        except DataError as error:
            raise DataError(f"{spec.path}: {error}") from None
    return Acted(specs, tuple(notes))


def _check_rewards(config: Config, specs: Mapping[str, EnvironmentSpec]) -> None:
    _check_rewards_of(config, config.rewards.functions, [specs[name] for name in config.environment_paths])
    for suite in config.suites:
        found = [specs[name] for name in suite_names(config, suite).values()]
        _check_rewards_of(config, suite.functions, found, suite.key("functions"))


def _check_rewards_of(
    config: Config,
    functions: Mapping[str, float],
    specs: Sequence[EnvironmentSpec],
    key: str = "rewards.functions",
) -> None:
    """Raises ConfigError or RewardError where the functions, those of config key `key`, ask of all these
    environments what they do not give.
    """
    for spec in specs if ENVIRONMENT in functions else ():
        if not spec.has_reward:
            raise ConfigError(
                f"{key}: {spec.path} has no reward of its own, which the reward function {ENVIRONMENT!r} asks for: "
                "give it get_reward(), or name other functions"
            )
    if specs and all(spec.kind == "harness" for spec in specs):
        why = f"{specs[0].path} is a harness, which has no attributes to show: name another function"
        check_environments_read(rewards_of(config, functions), why, key)


def rewards_of(config: Config, functions: Mapping[str, float]) -> RewardsConfig:
    """Returns the section with other functions, those of a suite."""
    return config.rewards.model_copy(update={"functions": dict(functions)})


def _reward_notes(config: Config, specs: Mapping[str, EnvironmentSpec]) -> Iterator[str]:
    """Yields what is to be told of rewards that environments give and nobody asks for."""
    giving = [specs[name].path for name in config.environment_paths if specs[name].has_reward]
    if giving and ENVIRONMENT not in config.rewards.functions:
        yield (
            f"warning: rewards.functions does not name {ENVIRONMENT!r}: what {', '.join(giving)} may give as a reward "
            f"counts for nothing. Name it there, `{ENVIRONMENT}: 1.0`, or 0 where that is meant"
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
        if row.environment is None:
            continue
        spec = acted.specs[row.environment]
        if missing := [name for name in spec.columns if name not in row.columns]:
            bad[row.source_row] = (
                f"no column {', '.join(map(repr, missing))}, which the environment {shown_name(spec.name, spec.path)!r} needs; it has "
                f"{', '.join(map(repr, row.columns)) or 'none'}"
            )
    if not bad:
        return prompts
    rows = [row for row in prompts.rows if row.source_row not in bad]
    source = Source(prompts.source, "row", {row.source_row: row.columns for row in prompts.rows})
    report_bad_rows(source, bad, len(rows), config.data.on_bad_row)
    return dataclasses.replace(prompts, rows=rows, num_bad_rows=prompts.num_bad_rows + len(bad))
