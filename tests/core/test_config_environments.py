"""The field `environments`: a path, or paths by name."""

from __future__ import annotations

import pytest
import yaml

from core.config.files import dump_config
from core.errors import ConfigError
from learner.catalogue import load_config, parse_config
from tests.support.configs import EXAMPLE


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump(EXAMPLE))
    return path


@pytest.mark.parametrize(
    ("written", "paths"),
    [
        ("null", {}),
        ("mine:Game", {"environment": "mine:Game"}),
        ("mine.games:Game?max_guesses=3", {"environment": "mine.games:Game?max_guesses=3"}),
        ("{game: 'mine:Game', agent: 'mine:agent'}", {"game": "mine:Game", "agent": "mine:agent"}),
    ],
)
def test_it_is_a_path_or_paths_by_name(example, written, paths):
    config = load_config(example, [f"environments={written}"])
    assert config.environment_paths == paths
    text = dump_config(config)
    assert load_config(example).environment_paths == {}, "none by default"
    assert parse_config(yaml.safe_load(text)).environment_paths == paths, text


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("mine", ["environments = 'mine'", "expected module:Class"]),
        ("mine/game.py:Game", ["environments = 'mine/game.py:Game'", "module:Class"]),
        ("{game: mine}", ["environments.game = 'mine'", "module:Class"]),
        ("{game: }", ["environments.game = None", "module:Class"]),
        ("{my game: 'mine:Game'}", ["'my game' is no name", "letters, digits"]),
        ("{}", ["environments = {}", "module:Class"]),
    ],
)
def test_what_is_no_path_is_told(example, written, told):
    with pytest.raises(ConfigError) as caught:
        load_config(example, [f"environments={written}"])
    assert all(part in str(caught.value) for part in told), str(caught.value)
