"""What the guard says of a ratio: worse and better only beyond the noise, here or there."""

from __future__ import annotations

import pytest

from benchmarks.guard import NOISE, judge


def row(ratio: float, spread: float = 0.0) -> dict[str, float]:
    return {"ratio": ratio, "least": ratio - spread / 2, "most": ratio + spread / 2}


@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        (row(0.5), row(0.5), "as before"),
        (row(0.5 * (1 - 0.9 * NOISE)), row(0.5), "as before"),
        (row(0.4), row(0.5), "worse by 20%"),
        (row(0.6), row(0.5), "better by 20%"),
        (row(0.4, spread=0.2), row(0.5), "as before"),
        (row(0.4), row(0.5, spread=0.25), "as before"),
    ],
)
def test_a_change_within_the_noise_of_either_is_none(now, before, verdict):
    assert judge(now, before).startswith(verdict)
