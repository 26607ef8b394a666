"""A calculator: the policy calculates with one tool and gives its answer with another.

`environments: environments.calculator:Calculator`, for rows of `prompt` and `answer`. The reward is 1 where
the answer given last is the row's, else 0: `rewards.functions: {environment: 1.0}`.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

MAX_CHARS = 200
LARGEST = 1e15
"""What is larger is told to be too large: beyond it not every whole number is a float."""
_OPERATIONS: dict[type[ast.operator | ast.unaryop], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


class Calculator:
    """Calculates. Public attributes, for reward functions: `results`, all that was calculated, and
    `given`."""

    def __init__(self) -> None:
        self.results: list[str] = []
        self.given: float | None = None
        self._answer = math.nan

    def reset(self, answer: Any, **row: Any) -> None:
        """Begins with the question in the row's prompt, to which nothing is added."""
        self._answer = float(str(answer).replace(",", ""))

    def calculate(self, expression: str) -> str:
        """
        Calculates an expression of numbers, parentheses and + - * / // % **.

        Args:
            expression: What to calculate, for example "(17 + 4) * 2".

        Returns:
            The result.
        """
        if len(expression) > MAX_CHARS:
            raise ValueError(f"the expression has more than {MAX_CHARS} characters")
        result = _value(ast.parse(expression.strip(), mode="eval").body)
        self.results.append(f"{result:.15g}")
        return self.results[-1]

    def give_answer(self, answer: float) -> str:
        """
        Gives the final answer to the question.

        Args:
            answer: The answer, a number.
        """
        self.given = float(answer)
        return "The answer was taken."

    def get_reward(self) -> float:
        """Returns 1 where the answer given last is the row's, else 0."""
        return float(self.given is not None and math.isclose(self.given, self._answer, rel_tol=1e-9))


def _value(node: ast.AST) -> float:
    """Returns what an expression comes to. Raises ValueError for what is none, or is too large."""
    value: Any
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        value = float(node.value)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        try:
            value = _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
        except OverflowError:
            value = math.inf
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        value = _OPERATIONS[type(node.op)](_value(node.operand))
    else:
        raise ValueError("it may have numbers, parentheses and + - * / // % ** only")
    if isinstance(value, complex) or not abs(value) <= LARGEST:
        raise ValueError("the result is too large, or no number")
    return float(value)
