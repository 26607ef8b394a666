"""The reward of procedural prompts is what their family gives, over several families, and only for these."""

from __future__ import annotations

import importlib.util
import json

import pytest

from actors.dataset.procedural import read_rows
from core.config import RewardsConfig
from core.errors import RewardError
from rewards.check import bad_rows
from rewards.pool import RewardPool
from rewards.reasoning_gym import reasoning_gym

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed: make setup"
)

CONFIG = RewardsConfig(functions={"reasoning_gym": 1.0}, timeout_s=60)


def row_of(path):
    return read_rows("data.path", f"reasoning_gym:{path}", "train", 1)[0]


def score(row, *completions):
    columns = {name: [value] * len(completions) for name, value in row.items()}
    return reasoning_gym(list(completions), **columns)


@pytest.mark.parametrize("path", ["chain_sum?max_terms=2&size=1", "arc_agi?size=1", "word_sorting?size=1"])
def test_the_gold_answer_is_worth_all_where_it_is_marked(path):
    row = row_of(path)
    answer = row["answer"]
    completions = [
        answer,
        f"Let me see.\n<answer>{answer}</answer>",
        f"<think>99</think>\n{answer}",
        "",
        "no",
    ]
    assert score(row, *completions)[:3] == [1.0, 1.0, 1.0]
    assert max(score(row, *completions)[3:]) < 0.1


def test_a_family_without_one_right_answer_is_scored_by_what_it_asks():
    row = row_of("graph_color?size=1")
    assert "answer" not in row
    puzzle = row["metadata"]["puzzle"]
    colors = dict.fromkeys(puzzle["vertices"])

    def color(vertices):
        if not vertices:
            return True
        taken = {colors[b if a == vertices[0] else a] for a, b in puzzle["edges"] if vertices[0] in (a, b)}
        for option in puzzle["color_options"]:
            if option not in taken:
                colors[vertices[0]] = option
                if color(vertices[1:]):
                    return True
        colors[vertices[0]] = None
        return False

    assert color(puzzle["vertices"])
    right = json.dumps({str(vertex): value for vertex, value in colors.items()})
    assert score(row, right)[0] == 1.0
    assert score(row, "{}")[0] < 1.0


def test_parameters_of_the_family_are_those_of_the_row():
    row = row_of("chain_sum?max_terms=3&max_digits=1&size=7")
    made_by = row["reasoning_gym"]
    assert made_by == {"family": "chain_sum", "parameters": {"max_terms": 3, "max_digits": 1}}


@pytest.mark.slow
def test_rows_of_several_families_are_scored_in_one_worker():
    rows = [row_of("chain_sum?size=1"), row_of("arc_agi?size=1"), row_of("spell_backward?size=1")]
    with RewardPool(CONFIG) as pool:
        futures = [pool.submit(row["question"], [row["answer"], "x"], row) for row in rows]
        rewards = [[scored.reward for scored in future.result(60)] for future in futures]
    assert [right for right, _ in rewards] == [1.0, 1.0, 1.0]
    assert all(wrong < 0.2 for _, wrong in rewards)


def test_rows_from_elsewhere_are_refused_with_what_to_do():
    good, other = row_of("chain_sum?size=1"), {"question": "2+2=", "answer": "4"}
    bad = bad_rows(CONFIG, "mine.jsonl", {0: good, 1: other})
    assert list(bad) == [1]
    assert "data.path: reasoning_gym:FAMILY" in bad[1]
    with pytest.raises(RewardError, match="use another reward"):
        score(other, "4")
