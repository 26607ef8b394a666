"""The calculator, called as a policy calls it, in its process."""

from __future__ import annotations

import pytest

from core.users import pictures
from environments import ToolCall
from environments.calculator import Calculator
from environments.spec import describe
from tests.support.environments.places import TurningPool


@pytest.mark.parametrize(
    ("expression", "result"),
    [("(17 + 4) * 2", "42"), ("7 / 2", "3.5"), ("-2 ** 3", "-8"), ("10 // 3 % 2", "1"), ("1e3", "1000")],
)
def test_it_calculates(expression: str, result: str) -> None:
    assert Calculator().calculate(expression) == result


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("9**9**9", "too large"),
        ("(-8)**0.5", "too large, or no number"),
        ("2 * x", "numbers, parentheses"),
        ("__import__('os')", "numbers, parentheses"),
        ("1+" * 200 + "1", "200 characters"),
        ("1 +", "invalid syntax"),
        ("1/0", "division by zero"),
    ],
)
def test_what_is_no_expression_raises_what_the_policy_is_told(expression: str, why: str) -> None:
    with pytest.raises((ValueError, SyntaxError, ArithmeticError), match=why):
        Calculator().calculate(expression)


def test_an_episode_with_tools() -> None:
    specs = describe({"environment": "environments.calculator:Calculator"})
    assert specs["environment"].columns == ("answer",)
    with TurningPool(specs.values(), 30.0, 2**29) as pool:
        place = pool.open("environment", {"prompt": "6*7-1?", "answer": "41"}, 0)
        assert place.reset().result(60).observation == ""
        turn = place.act("", (ToolCall("calculate", {"expression": "6*7-1"}),)).result(60)
        assert turn.observation == ({"role": "tool", "name": "calculate", "content": "41"},)
        place.act("", (ToolCall("give_answer", {"answer": 41}),)).result(60)
        turn = place.act("It is 41.").result(60)
        assert (turn.done, turn.reward) == (True, 1.0)
        assert pictures.show(turn.attributes).results == ["41"]
