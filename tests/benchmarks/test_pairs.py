"""Figures of pairs: in turns, warm rounds forgotten, and a ratio a round."""

from __future__ import annotations

from benchmarks.pairs import Ratio, compare, interleave


def test_every_other_round_goes_backwards_and_warm_rounds_are_forgotten():
    called: list[str] = []

    def call(name: str, figure: float):
        def noted() -> float:
            called.append(name)
            return figure + len(called)

        return noted

    found = interleave({"a": call("a", 0.0), "b": call("b", 100.0)}, rounds=2, warm_rounds=1)
    assert "".join(called) == "abbaab"
    assert found == {"a": [4.0, 5.0], "b": [103.0, 106.0]}


def test_a_slow_half_hour_leaves_the_ratio_of_its_pairs():
    assert compare([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == Ratio(2.0, 2.0, 3.0)


def test_a_ratio_is_three_columns_of_results():
    assert Ratio(2.0, 1.0, 3.0).fields("of_bare") == {
        "of_bare": 2.0,
        "of_bare_least": 1.0,
        "of_bare_most": 3.0,
    }
