"""Checks and loads the prompts of a run's suites: what is held out, and whether its rewards can score it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from actors.prompts import PromptSet, joined, load_suite
from actors.sources import Source, report_bad_rows
from cluster.preparation.environment_checks import Acted, playable, rewards_of
from core.config import Config, RewardsConfig
from core.config.environments import suite_names
from core.config.evaluation import HELD_OUT, Suite
from core.errors import DataError, RewardError
from rewards.check import bad_rows, check_environments_read, check_functions


def no_evaluation(config: Config) -> str:
    """Returns why there is no evaluation, to be told; empty when there is one."""
    data = config.data
    if not config.suites:
        return "nothing is evaluated: data.eval_rows = 0"
    if config.actors.fewest == 0:
        afterwards = "afterwards, use `launch.py evaluate`"
        return f"warning: actors.count = 0: nothing is evaluated during the run; {afterwards}"
    if data.path is None and data.eval_path is None and not config.eval.suites:
        return (
            "warning: nothing is evaluated: there is neither data.eval_path nor data.path. "
            "Set data.eval_path, or actors.count=0"
        )
    return ""


def suite_notes(config: Config) -> Iterator[str]:
    """Yields what is to be told of what is evaluated, and what not."""
    if reason := no_evaluation(config):
        if config.eval.keep_best:
            reason += f"; nor is a best version kept (eval.keep_best = {config.eval.keep_best})"
        yield reason
    elif config.eval.suites and HELD_OUT not in {suite.name for suite in config.suites}:
        yield "evaluated are eval.suites alone; for the suite held_out beside them, set data.eval_path"


def check_suites(config: Config) -> None:
    """Raises RewardError, which names the suite, when its reward functions cannot be loaded, or read
    environments that it does not have.
    """
    for suite in config.suites:
        with _named(suite):
            check_functions(rewards_of(config, suite.functions))
        if not suite.environments:
            why = f"the suite has none: set {suite.key('environments')}"
            check_environments_read(rewards_of(config, suite.functions), why, suite.key("functions"))


def load_suites(config: Config, tokenizer: Any, acted: Acted) -> dict[str, PromptSet]:
    """Returns the prompts of each suite, by name; none where nothing is evaluated. Raises DataError."""
    return {} if no_evaluation(config) else load_prompts_of(config, tokenizer, acted)


def load_prompts_of(config: Config, tokenizer: Any, acted: Acted) -> dict[str, PromptSet]:
    """Returns the prompts of every suite, by name, each with its environment. Raises DataError."""
    found = {}
    for suite in config.suites:
        names = suite_names(config, suite)
        tools = {name: acted.specs[of_run].tools for name, of_run in names.items()}
        prompts = load_suite(suite, config.data, tokenizer, tools)
        rows = [
            dataclasses.replace(row, environment=names[row.environment]) if row.environment else row
            for row in prompts.rows
        ]
        found[suite.name] = playable(config, acted, dataclasses.replace(prompts, rows=rows))
    return found


def scorable_suites(config: Config, prompts: Mapping[str, PromptSet]) -> dict[str, PromptSet]:
    """Returns the prompts of each suite that its reward functions can score. Raises as `scorable`."""
    found = {}
    for suite in config.suites:
        if suite.name in prompts:
            with _named(suite):
                rewards = rewards_of(config, suite.functions)
                found[suite.name] = _scorable(rewards, prompts[suite.name], config.data.on_bad_row)
    return found


def scorable(config: Config, prompts: PromptSet) -> PromptSet:
    """Returns the prompts whose rows the reward functions can score.

    Raises DataError where others may not be skipped, and RewardError.
    """
    # A log that came with all its rewards asks no function, unless votes need the answers.
    needs_all = not config.is_offline or config.objective.compares_answers
    return _scorable(config.rewards, prompts, config.data.on_bad_row, needs_all=needs_all)


def _scorable(
    rewards: RewardsConfig, prompts: PromptSet, on_bad_row: str, *, needs_all: bool = True
) -> PromptSet:
    """Returns the prompts that can be scored, source by source."""
    found = [_scorable_part(rewards, part, on_bad_row, needs_all) for part in prompts.split()]
    whole = joined(found, [member.share for member in prompts.members])
    return dataclasses.replace(whole, source=prompts.source, notes=prompts.notes)


def _scorable_part(rewards: RewardsConfig, prompts: PromptSet, on_bad_row: str, needs_all: bool) -> PromptSet:
    scored = [
        row
        for row in prompts.rows
        if needs_all or not row.offline or any(sample.reward is None for sample in row.offline)
    ]
    bad = bad_rows(rewards, prompts.source, {row.source_row: row.columns for row in scored})
    if not bad:
        return prompts
    rows = [row for row in prompts.rows if row.source_row not in bad]
    report_bad_rows(
        Source(prompts.source, "row", {row.source_row: row.columns for row in prompts.rows}),
        bad,
        len(rows),
        on_bad_row,
    )
    return dataclasses.replace(prompts, rows=rows, num_bad_rows=prompts.num_bad_rows + len(bad))


@contextlib.contextmanager
def _named(suite: Suite) -> Iterator[None]:
    """Lets errors of the block name the suite, where its reward functions are its own."""
    try:
        yield
    except (DataError, RewardError) as error:
        raise type(error)(
            f"{suite.key('functions')}: {error}" if suite.has_own_functions else str(error)
        ) from None
