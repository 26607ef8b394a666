"""Sums of numbers that may be as large as a float can be: rewards are whatever users' functions return."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DOWN, _UP = 2.0**-64, 2.0**64
"""Room for sums, exact but for numbers below 1e-288."""


def total(values: Sequence[float]) -> float:
    """Returns the sum as exactly as `math.fsum`, which raises where a sum overflows: inf, -inf or nan where
    it is no finite number.
    """
    try:
        return math.fsum(values)
    except OverflowError:  # Of a partial sum, perhaps.
        return math.fsum([value * _DOWN for value in values]) * _UP
    except ValueError:  # Infinities of both signs.
        return math.nan


def mean(values: Sequence[float]) -> float:
    """Returns the mean of finite values, at least one, which is finite."""
    try:
        return math.fsum(values) / len(values)
    except OverflowError:
        return math.fsum([value * _DOWN for value in values]) / len(values) * _UP


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean of finite values, at least two:
    sqrt(sum_i (x_i - mean)^2 / (n - 1) / n); finite.
    """
    middle, count = mean(values), len(values)
    try:
        return math.sqrt(math.fsum([(value - middle) ** 2 for value in values]) / (count - 1) / count)
    except OverflowError:
        away = math.hypot(*(value * _DOWN - middle * _DOWN for value in values))
        return away / math.sqrt((count - 1) * count) * _UP
