"""How long a sequence may be: one length, from the settings that an error names."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from core.config import Config
from core.errors import ConfigError
from learner.catalogue import load_config
from tests.support.configs import EXAMPLE


@pytest.fixture
def load(tmp_path: Any) -> Any:
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump(EXAMPLE))

    def load(*overrides: str) -> Config:
        return load_config(path, list(overrides))

    return load


@pytest.mark.parametrize(
    ("overrides", "longest"),
    [
        ([], 4 + 8),
        (["actors.max_sequence_tokens=9"], 9),
        (["environments=mine:Game"], 4 + 8 * 8),
        (["environments=mine:Game", "actors.max_turns=2"], 4 + 2 * 8),
        (["environments={game: mine:Game}", "actors.max_sequence_tokens=30"], 30),
        (["eval.suites={games: {path: data, environments: mine:Game}}"], 4 + 8 * 8),
    ],
)
def test_the_longest_sequence_is_the_prompt_and_all_turns(
    load: Any, overrides: list[str], longest: int
) -> None:
    config = load("data.max_prompt_tokens=4", "actors.max_new_tokens=8", *overrides)
    assert config.max_sequence_tokens == longest


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["actors.max_sequence_tokens=8", "data.max_prompt_tokens=8"],
            r"actors\.max_sequence_tokens = 8 leaves no token .* data\.max_prompt_tokens = 8\. Raise it",
        ),
        (
            ["actors.max_sequence_tokens=9000"],
            r"the longest sequence, actors\.max_sequence_tokens = 9000\. Raise it to at least that",
        ),
        (
            ["environments=mine:Game", "actors.max_new_tokens=2000", "actors.max_turns=5"],
            r"longest sequence, data\.max_prompt_tokens \+ actors\.max_turns \* actors\.max_new_tokens = 100\d\d",
        ),
        (["actors.max_turns=0"], r"actors\.max_turns = 0"),
        (["actors.turn_timeout_s=0"], r"actors\.turn_timeout_s = 0"),
        (["actors.max_assistant_turns=4"], r"write actors\.max_turns"),
        (["actors.max_model_len=4"], r"write actors\.max_sequence_tokens"),
    ],
)
def test_lengths_that_cannot_be_are_refused_by_name(load: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*overrides)
