"""What of rewards and data is found before anything starts: columns that are missing, gold answers that
are none.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest

from cluster.preparation.prepare import check_inputs
from core.config import RewardsConfig
from core.errors import DataError, RewardError
from rewards import check
from rewards.registry import load_reward
from tests.support import ROOT
from tests.support.configs import quickstart

SOLUTION = "tests.support.reward_functions:wants_solution"


def bad_rows(names, rows):
    config = RewardsConfig(functions=dict.fromkeys(names, 1.0))
    return check.bad_rows(config, "train.jsonl", dict(enumerate(rows)))


def test_a_column_that_no_row_has_is_refused_with_those_there_are():
    with pytest.raises(RewardError) as error:
        bad_rows([SOLUTION], [{"prompt": "1+1", "answer": "2"}] * 3)
    assert str(error.value) == (
        f"reward function {SOLUTION!r} needs 'solution', which train.jsonl does not have; its columns are "
        "'answer', 'prompt'. "
        "Add the column, or give the parameter a default."
    )
    with pytest.raises(RewardError, match=r"needs 'answer' .did you mean 'answers'"):
        bad_rows(["exact_match"], [{"prompt": "1+1", "answers": "2"}])


def test_a_row_without_a_column_that_others_have_is_a_bad_row():
    rows = [{"prompt": "1+1", "solution": "2"}, {"prompt": "1+2"}, {"prompt": "1+3", "solution": "4"}]
    assert bad_rows([SOLUTION], rows) == {1: f"no 'solution', which reward function {SOLUTION!r} needs"}
    assert bad_rows(["tests.support.reward_functions:length"], rows) == {}


@pytest.mark.parametrize("name", ["exact_match", "math_verify"])
def test_gold_answers_of_a_kind_that_cannot_be_compared_are_bad_rows(name):
    golds = ["72", 72.0, ["72"], b"72", {"value": "72"}, ["1", "2"], True, math.inf]
    found = bad_rows([name], [{"answer": gold} for gold in golds])
    assert list(found) == [4, 5, 6, 7]
    assert found[4] == "its answer is an object ({'value': '72'}), expected text or a number"


def test_gold_answers_that_math_verify_cannot_read_or_compute_are_bad_rows():
    golds = [
        "72",
        "yes indeed",
        r"\boxed{1+}",
        "((9^9)^9)^{9^9}",
        r"\frac{1}{2}",
        "May 1, 2024",
        r"\boxed{\text{East}}",
    ]
    found = bad_rows(["math_verify"], [{"answer": gold} for gold in golds])
    assert list(found) == [1, 2, 3]
    assert "'yes indeed' cannot be read as mathematics; for words use exact_match" in found[1]
    assert "cannot be computed within 1 s" in found[3]
    assert bad_rows(["exact_match"], [{"answer": gold} for gold in golds]) == {}


def test_a_function_is_looked_up_once_for_all_rows(monkeypatch):
    looked_up = []

    def load(name):
        looked_up.append(name)
        return load_reward(name)

    monkeypatch.setattr("rewards.check.load_reward", load)
    assert bad_rows(["exact_match"], [{"answer": str(number)} for number in range(100)]) == {}
    assert looked_up == ["exact_match"]


def test_a_function_that_reads_environments_is_refused_where_there_are_none():
    def checked(name):
        check.check_environments_read(
            RewardsConfig(functions={f"tests.support.reward_functions:{name}": 1.0})
        )

    checked("length")
    with pytest.raises(RewardError, match="reads `environments`, and this run has none: set environments"):
        checked("score_of_environment")
    with pytest.raises(RewardError, match="the environment's own reward takes no parameters"):
        check.check_functions(RewardsConfig(functions={"environment?weight=2": 1.0}))


def configured(tmp_path, model, rows, *overrides):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"data.path={tmp_path}/train.jsonl",
        "data.eval_rows=0",
        f"model.path={model}",
        f"run.dir={tmp_path}/run",
    )
    return quickstart(*settings, *overrides)


ROWS = [
    {"prompt": "1+1=", "answer": "2"},
    {"prompt": "1+2=", "answer": ["3", "4"]},
    {"prompt": "1+3=", "answer": 4},
]


def test_a_start_refuses_a_bad_gold_answer_by_row_or_leaves_it_out(tmp_path, tiny_models):
    with pytest.raises(DataError) as error:
        check_inputs(configured(tmp_path, tiny_models["tied"], ROWS))
    assert (
        "train.jsonl: 1 of 3 rows are bad\n  - row 2: its answer is a list of 2 (['3', '4']), expected one "
        "answer" in str(error.value)
    )
    checked = check_inputs(configured(tmp_path, tiny_models["tied"], ROWS, "data.on_bad_row=skip"))
    assert [row.source_row for row in checked.prompts.rows] == [0, 2]
    assert checked.prompts.num_bad_rows == 1


def test_a_log_with_all_its_rewards_needs_no_gold_answers(tmp_path, tiny_models):
    log = [{"prompt": "1+1=", "completion": str(number), "reward": number % 2} for number in range(4)]
    offline = (
        "data.path=null",
        f"data.offline={tmp_path}/train.jsonl",
        "objective.importance_weight=none",
        "actors.count=0",
    )
    check_inputs(configured(tmp_path, tiny_models["tied"], log, *offline))
    del log[0]["reward"]
    with pytest.raises(
        RewardError,
        match=r"reward function 'exact_match' needs 'answer', which "
        r".*train.jsonl does not have",
    ):
        check_inputs(configured(tmp_path, tiny_models["tied"], log, *offline))


@pytest.mark.slow
def test_a_dry_run_from_a_folder_with_the_reward_in_it_loads_it_and_leaves_nothing(tmp_path, tiny_models):
    """As `cd folder; python .../launch.py train`, where sys.path has launch.py's folder and not this one."""
    configured(tmp_path, tiny_models["tied"], [ROWS[0], ROWS[2]])
    (tmp_path / "reward_of_mine.py").write_text(
        "def f(completions, needed, **columns): return [0.0] * len(completions)"
    )
    command = [
        sys.executable,
        ROOT / "launch.py",
        "train",
        ROOT / "configs" / "quickstart.yaml",
        "--dry-run",
    ]
    settings = [
        "data.path=train.jsonl",
        "data.eval_rows=0",
        f"model.path={tiny_models['tied']}",
        "rewards.functions={reward_of_mine:f: 1}",
    ]
    before = sorted(os.listdir(tmp_path))
    run = subprocess.run([*command, *settings], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stderr.startswith(
        "error: reward function 'reward_of_mine:f' needs 'needed', which train.jsonl does not have"
    ), run.stderr
    assert sorted(os.listdir(tmp_path)) == before


def test_a_punishment_for_lengths_that_no_answer_has_is_told():
    config = RewardsConfig(functions={"overlong?from=64&to=80": 1.0, "overlong?from=63&to=80": 1.0})
    (note,) = check.length_notes(config, 64, "actors.max_new_tokens = 64")
    assert "'overlong?from=64&to=80' never acts: an answer has at most 64 sampled tokens" in note
    assert "actors.max_new_tokens = 64" in note
