"""What a start says of its environments: the chat template, the columns, the reward."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from actors.prompts import PromptRow, load_prompts
from cluster.preparation import environment_checks
from cluster.preparation.environment_checks import Acted, check_environments, playable
from cluster.preparation.suites import check_suites, load_suites
from core.config import Config
from core.config.environments import all_paths
from core.errors import ConfigError, DataError, RewardError
from environments.spec import EnvironmentSpec
from tests.support.configs import make_config
from tests.support.dialogues.chat_templates import FAMILIES
from tests.support.tokenizers_made import byte_tokenizer

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
PATHS = {"game": "mine:Game", "sums": "mine:Sums"}
SPECS = {
    "mine:Game": EnvironmentSpec("game", "mine:Game", "turns", has_reward=True, columns=("secret",)),
    "mine:agent": EnvironmentSpec("agent", "mine:agent", "harness", has_reward=True),
    "mine:Sums": EnvironmentSpec("sums", "mine:Sums", "tools", tools=(ADD,)),
}


@pytest.fixture(autouse=True)
def _described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        environment_checks, "describe", lambda paths: {name: SPECS[path] for name, path in paths.items()}
    )


def tokenizer(family: str = "qwen25", template: str | None = None) -> Any:
    found = FAMILIES[family]
    return byte_tokenizer(*found.special, eos=found.eos, template=template or found.template)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    rows = [
        {"prompt": "Guess.", "environment": "game", "secret": 3},
        {"prompt": "Add.", "environment": "sums"},
        {"prompt": "Guess.", "environment": "game"},
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_config(
        {"environments": PATHS},
        data={"path": str(tmp_path), "on_bad_row": "skip", "max_prompt_tokens": 2_000, "eval_rows": 3},
        learner={"micro_batch_tokens": 10_000},
        eval={
            "suites": {
                "same": {"path": str(tmp_path)},
                "other": {"path": str(tmp_path), "environments": {"game": "mine:Sums", "sums": "mine:Sums"}},
                "plain": {"path": str(tmp_path), "environments": "none"},
            }
        },
    )


def test_without_environments_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(environment_checks, "describe", None)
    assert check_environments(make_config(), None, ()) == Acted({})


def test_environments_of_suites_have_names_of_their_own_in_the_run(config):
    assert all_paths(config) == {**PATHS, "other.game": "mine:Sums", "other.sums": "mine:Sums"}
    acted = check_environments(config, tokenizer(), ())
    suites = load_suites(config, tokenizer(), acted)
    found = {name: [row.environment for row in prompts.rows] for name, prompts in suites.items()}
    assert found == {
        "same": ["game", "sums"],
        "other": ["other.game", "other.sums", "other.game"],
        "plain": [None] * 3,
    }


def test_rows_without_a_column_that_their_environment_needs_are_bad(config):
    acted = check_environments(config, tokenizer(), ())
    tools = acted.tools(config.environment_paths)
    prompts = load_prompts(config.data, tokenizer(), environments=tools)
    kept = playable(config, acted, prompts)
    assert ([row.source_row for row in kept.rows], kept.num_bad_rows) == ([0, 1], 1)
    strict = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_row": "stop"})})
    with pytest.raises(DataError, match=r"no column 'secret', which the environment 'game' needs; it has"):
        playable(strict, acted, prompts)


def test_a_template_that_cannot_go_on_is_refused_with_the_environment(config):
    numbered = "{% for m in messages %}{{ loop.index }}{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(DataError, match="mine:Game: the tokenizer's chat template cannot go on"):
        check_environments(config, tokenizer(template=numbered + "{{ messages | length }}"), ())


def test_what_a_template_does_is_told_once(config):
    notes = check_environments(config, tokenizer("gemma"), ()).notes
    assert len(set(notes)) == len(notes)
    assert any("does not show the policy its tools (add)" in note for note in notes)


def test_an_environment_without_a_reward_cannot_be_the_reward(config):
    asked = config.model_copy(
        update={"rewards": config.rewards.model_copy(update={"functions": {"environment": 1.0}})}
    )
    with pytest.raises(ConfigError, match=r"mine:Sums has no reward of its own.*get_reward\(\)"):
        check_environments(asked, tokenizer(), ())


def test_a_reward_that_no_function_names_is_told(config):
    (note,) = [note for note in check_environments(config, tokenizer(), ()).notes if "counts for" in note]
    assert "warning: rewards.functions does not name 'environment': what mine:Game may give" in note
    named = config.rewards.model_copy(update={"functions": {"exact_match": 1.0, "environment": 0.0}})
    only = {
        "environments": "mine:Game",
        "rewards": named,
        "eval": config.eval.model_copy(update={"suites": {}}),
    }
    notes = check_environments(config.model_copy(update=only), tokenizer(), ()).notes
    assert not any("counts for" in note for note in notes)


READS = {"tests.support.reward_functions:score_of_environment": 1.0}


def test_functions_that_read_environments_are_refused_where_a_harness_has_none_to_show(config):
    functions = {"rewards": config.rewards.model_copy(update={"functions": READS})}
    of_run = {"environments": "mine:agent", "eval": config.eval.model_copy(update={"suites": {}})}
    with pytest.raises(RewardError, match=r"^rewards\.functions: .* mine:agent is a harness"):
        check_environments(config.model_copy(update=of_run | functions), tokenizer(), ())
    asked = make_config(
        eval={"suites": {"m": {"path": "x", "environments": "mine:agent", "functions": READS}}}
    )
    with pytest.raises(RewardError, match=r"^eval\.suites\.m\.functions: .* mine:agent is a harness"):
        check_environments(asked, tokenizer(), ())


def test_functions_that_read_environments_are_refused_in_a_suite_without_any():
    suite = {"path": "x", "functions": READS}
    with pytest.raises(
        RewardError, match=r"^eval\.suites\.m\.functions: .* set eval\.suites\.m\.environments"
    ):
        check_suites(make_config(eval={"suites": {"m": suite}}))
    check_suites(make_config(eval={"suites": {"m": {**suite, "environments": "mine:Game"}}}))
    inherits = {"environments": "mine:Game", "rewards": {"functions": READS}}
    with pytest.raises(RewardError, match=r"^eval\.suites\.m\.functions: "):
        check_suites(make_config(inherits, eval={"suites": {"m": {"path": "x", "environments": "none"}}}))


def test_an_environment_without_a_name_is_told_by_its_path(config):
    data = config.data.model_copy(update={"on_bad_row": "stop"})
    unnamed = config.model_copy(update={"data": data, "environments": "mine:Game"})
    row = PromptRow(0, "Guess.", (), {"environment": "game"}, environment="environment")
    spec = EnvironmentSpec("environment", "mine:Game", "turns", columns=("secret",))
    prompts = dataclasses.replace(
        load_prompts(data, tokenizer(), environments={"game": (), "sums": ()}), rows=[row]
    )
    with pytest.raises(
        DataError, match=r"no column 'secret', which the environment 'mine:Game' needs; it has"
    ):
        playable(unnamed, Acted({"environment": spec}), prompts)
