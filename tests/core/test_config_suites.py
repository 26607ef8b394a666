"""Suites in a config: what they leave out is the run's, overrides reach them, and errors name their key."""

from __future__ import annotations

import pytest

from cluster.cli.reference import config_reference
from core.config.evaluation import SuiteConfig
from core.config.files import dump_config
from core.errors import ConfigError
from core.text import key_of
from learner.catalogue import load_config, parse_config, parse_text
from tests.support import ROOT
from tests.support.configs import MINIMAL, make_config

MATH = {"path": "math.jsonl", "rows": 20, "samples": 8, "temperature": 0.6, "every": 5}


def suites(**changes):
    return make_config(eval={"suites": {"math": MATH, "words": {"path": "words.jsonl"}}, **changes})


def test_what_a_suite_leaves_out_is_as_in_the_run():
    math, words = suites(sampling=(2, 0.5), every=7).suites
    assert (math.name, math.rows, math.samples, math.temperature, math.every) == ("math", 20, 8, 0.6, 5)
    assert (words.rows, words.samples, words.temperature, words.every) == (128, 2, 0.5, 7)
    assert (words.functions, words.has_own_functions) == ({"exact_match": 1.0}, False)


def test_the_simple_evaluation_is_the_suite_held_out():
    (held_out,) = make_config(data={"path": "p", "eval_path": "e", "eval_rows": 5}).suites
    assert (held_out.name, held_out.path, held_out.rows, held_out.samples) == ("held_out", "e", 5, 4)
    assert [suite.name for suite in suites().suites] == ["math", "words"], "not beside others, unless asked"
    both = make_config(data={"path": "p", "eval_path": "e"}, eval={"suites": {"math": MATH}})
    assert [suite.name for suite in both.suites] == ["held_out", "math"]
    assert make_config(data={"path": "p", "eval_rows": 0}).suites == ()


def test_a_suite_has_an_environment_of_its_own_or_none():
    own = {
        "game": {**MATH, "environments": "mine:Game"},
        "bare": {**MATH, "environments": "none"},
        "as": MATH,
    }
    tree = {**MINIMAL, "environments": "mine:Other", "eval": {"suites": own}}
    config = parse_config({**tree, "learner": {"micro_batch_tokens": 65536}})
    assert [suite.environments for suite in config.suites] == ["mine:Game", None, "mine:Other"]


def test_overrides_reach_a_suite(tmp_path):
    path = ROOT / "configs" / "quickstart.yaml"
    overrides = ["eval.suites.math.path=m.jsonl", "eval.suites.math.rows=10"]
    overrides += ["eval.suites.math.functions={exact_match: 0.5}", "eval.suites.v1.5.path=1.5.jsonl"]
    config = load_config(path, overrides)
    found = {suite.name: suite for suite in config.suites}
    assert (found["math"].path, found["math"].rows) == ("m.jsonl", 10)
    assert found["math"].functions == {"exact_match": 0.5}
    assert found["v1.5"].path == "1.5.jsonl"
    more = ["eval.suites.v1.5.functions.mine.judges:judge=0.25", "eval.suites.v1.5.functions.exact_match=1"]
    more += ["eval.suites.v1.5.environments.game=mine.games:Game"]
    _, other = load_config(path, [*overrides, *more, "learner.micro_batch_tokens=65536"]).suites
    assert other.functions == {"mine.judges:judge": 0.25, "exact_match": 1.0}
    assert other.environments == {"game": "mine.games:Game"}
    assert parse_text(dump_config(config), "the dump") == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.suites.math.rows=0", ["eval.suites.math.rows = 0", "greater than or equal to 1"]),
        ("eval.suites.math.row=3", ["eval.suites.math.row is not a known key", "did you mean 'rows'"]),
        ("eval.suites.math.temperature=0.001", ["eval.suites.math.temperature = 0.001", "0.01 or more"]),
        ("eval.suites.held_out.path=x", ["eval.suites.held_out", "data.eval_path", "another"]),
        ("eval.suites={a b: {path: x}}", ["'a b' is no name of a suite"]),
        ("eval.suites.other.rows=3", ["eval.suites.other.path is missing", "eval.suites.other.path=<value>"]),
        ("eval.suites=3", ["eval.suites = 3", "expected names and the settings", "{math: {path: math.jsonl"]),
        ("eval.suites.math.functions=3", ["eval.suites.math.functions = 3", "names and their weights"]),
        (
            "eval.suites.math.functions.exact_match=x",
            ["eval.suites.math.functions.exact_match = 'x'", "number"],
        ),
        ("eval.suites.math.rows.most=3", ["eval.suites.math.rows.path is missing"]),
        ("data.eval_rows=0", ["eval.suites.words.rows is missing", "data.eval_rows = 0"]),
        ("eval.keep_best=math/avg@4", ["eval.keep_best = 'math/avg@4'", "did you mean math/avg@8"]),
        ("eval.keep_best=loss", ["eval.keep_best = 'loss'", "words/pass@4"]),
        ("eval.stop_at=[math/avg@4, 0.9]", ["eval.stop_at = 'math/avg@4'", "did you mean math/avg@8"]),
        ("eval.stop_at=0.9", ["eval.stop_at = 0.9", "expected SUITE/METRIC", "[held_out/avg@4, 0.9]"]),
        ("eval.stop_at=[math/avg@8, much]", ["eval.stop_at = ", "expected SUITE/METRIC and the value"]),
    ],
)
def test_what_is_wrong_with_a_suite_is_said_by_its_key(tmp_path, override, words):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(suites()))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert [word for word in words if word not in str(caught.value)] == []


def test_nothing_evaluated_keeps_no_best():
    with pytest.raises(ConfigError, match="nothing is evaluated"):
        make_config(data={"path": "p", "eval_rows": 0}, eval={"keep_best": "held_out/avg@4"})
    assert make_config(eval={"keep_best": "held_out/pass@2"}).eval.keep_best == "held_out/pass@2"
    with pytest.raises(ConfigError, match=r"eval\.stop_at = held_out/avg@4: nothing is evaluated"):
        make_config(data={"path": "p", "eval_rows": 0}, eval={"stop_at": ("held_out/avg@4", 0.9)})


def test_every_setting_of_a_suite_is_in_the_reference():
    _, _, table = config_reference().partition("### eval.suites: {NAME: ...}\n")
    for name, field in SuiteConfig.model_fields.items():
        assert f"| `{name}` |" in table
        assert field.description


@pytest.mark.parametrize(
    ("every", "publish_every", "due"),
    [(6, 2, [0, 6, 12]), (5, 2, [0, 6, 10]), (1, 3, [0, 3, 6, 9, 12]), (4, 6, [0, 6, 12])],
)
def test_a_suite_is_due_at_the_first_publication_at_or_after_its_interval(every, publish_every, due):
    (suite,) = make_config(eval={"suites": {"math": {**MATH, "every": every}}}).suites
    last = [suite.last_due(version, publish_every) for version in range(13)]
    assert sorted(set(last)) == due
    assert all(found <= version for version, found in enumerate(last))


@pytest.mark.parametrize(
    "played", ["nonsense", "", {}, {"a b": "mine:Game"}, {"game": "bad"}, {"game": None}, 3]
)
def test_environments_of_a_suite_are_paths_as_those_of_the_run(played):
    with pytest.raises(ConfigError, match=r"eval\.suites\.math\.environments"):
        make_config(eval={"suites": {"math": {**MATH, "environments": played}}})


@pytest.mark.parametrize(
    ("run", "suite"),
    [({}, {"functions": {"environment": 1.0}}), ({"environments": "mine:Game"}, {"environments": "none"})],
)
def test_a_suite_without_environment_cannot_have_its_reward(run, suite):
    with pytest.raises(ConfigError, match=r"eval\.suites\.math\.functions.* the suite has no environment"):
        make_config(
            {"rewards": {"functions": {}}, **run} if run else {}, eval={"suites": {"math": {**MATH, **suite}}}
        )


def test_the_key_of_a_suites_environment_is_one_that_a_config_has():
    names = ("environment", "game", "math.environment", "math.v2.game")
    assert [key_of(name) for name in names] == [
        "environments",
        "environments.game",
        "eval.suites.math.environments",
        "eval.suites.math.v2.environments.game",
    ]


def test_who_would_switch_evaluation_off_by_its_period_is_told_what_does() -> None:
    with pytest.raises(ConfigError, match=r"eval\.every = 0: .*; data\.eval_rows=0 switches evaluation off"):
        parse_config({**MINIMAL, "eval": {"every": 0}})
