"""Names in configs: every objective by one word, and what is told for a name that a setting has elsewhere."""

from __future__ import annotations

import pytest

from core.config.other_names import INSTEAD
from core.errors import ConfigError
from learner.catalogue import OBJECTIVES, load_config
from tests.support import ROOT
from tests.support.configs import SECTION_MODELS

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.name for path in SHIPPED])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_word_trains_a_shipped_config_with_another_objective(path, name):
    assert load_config(path, [f"objective.name={name}"]).objective.name == name


@pytest.mark.parametrize("name", INSTEAD)
def test_a_name_of_elsewhere_is_told_what_to_write_instead(name):
    section, _, key = name.partition(".")
    with pytest.raises(ConfigError) as caught:
        load_config(SHIPPED[0], [f"{name}=1" if key else f"{section}.some=1"])
    assert f"{name} is not a known key; {INSTEAD[name]}" in str(caught.value)


def test_no_setting_is_told_to_be_written_otherwise():
    settings = {f"{section}.{key}" for section, model in SECTION_MODELS.items() for key in model.model_fields}
    assert not settings & INSTEAD.keys()
