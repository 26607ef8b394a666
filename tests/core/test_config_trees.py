"""Whatever is done to a tree, the outcome is a Config or a ConfigError."""

from __future__ import annotations

import copy

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.config import Config
from core.config.files import dump_config
from core.errors import ConfigError
from learner.catalogue import load_config, parse_config, parse_text
from tests.support import ROOT
from tests.support.configs import EXAMPLE, MAX_LINES, SECTION_MODELS

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(["1e-5", "-1E400", "nan", "0x10", "bfloat16", "math_verify"]),
)


VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


SECTIONS = [*Config.model_fields, "lerner", "", "über"]


KEYS = [
    *sorted({name for model in SECTION_MODELS.values() for name in model.model_fields}),
    "lrr",
    "",
    "a\nb",
]


def config_or_message(function, *arguments) -> Config | str:
    try:
        return function(*arguments)
    except ConfigError as error:
        return str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.sampled_from(SECTIONS), st.sampled_from(KEYS) | st.text(max_size=8) | st.none(), VALUES),
        min_size=1,
        max_size=4,
    )
)
def test_a_mutated_tree_is_a_config_or_a_short_config_error(mutations):
    tree = copy.deepcopy(EXAMPLE)
    for section, key, value in mutations:
        if key is None or not isinstance(tree.setdefault(section, {}), dict):
            tree[section] = value
        else:
            tree[section][key] = value
    outcome = config_or_message(parse_config, tree)
    if isinstance(outcome, Config):
        assert parse_text(dump_config(outcome), "the dump") == outcome
    else:
        assert len(outcome.splitlines()) <= MAX_LINES


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.sampled_from(["", "learner.lr=", "run.name=", "rewards.functions={", "model."]),
)
def test_any_text_as_an_override_is_a_config_or_a_config_error(text, before):
    path = ROOT / "configs" / "llama3_8b_math.yaml"
    outcome = config_or_message(load_config, path, [before + text])
    assert isinstance(outcome, Config) or len(outcome.splitlines()) <= MAX_LINES
