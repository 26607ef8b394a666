"""The section `rewards` of a config."""

import pytest

from core.errors import ConfigError
from learner.catalogue import load_config

EXAMPLE = "configs/quickstart.yaml"


def test_the_environments_own_reward_is_the_reward_where_no_function_is_named():
    def functions(*overrides):
        return load_config(EXAMPLE, ["environments=games:Guess", *overrides]).rewards.functions

    assert functions("rewards.functions={}") == {"environment": 1.0}
    assert functions("rewards.functions={environment: 2, exact_match: 1}") == {
        "environment": 2,
        "exact_match": 1,
    }
    assert functions("rewards.functions={exact_match: 1}") == {"exact_match": 1}
    with pytest.raises(
        ConfigError, match=r"rewards\.functions\.environment = 1 is the environment's own reward, and"
    ):
        load_config(EXAMPLE, ["rewards.functions={environment: 1}"])
