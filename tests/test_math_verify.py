"""math_verify on pairs written by hand: what a person would call the same answer, and what not."""

from __future__ import annotations

import pytest

from rewards.math import math_verify

PAIRS = [
    # completion, gold, reward
    ("72", "72", 1.0),
    ("The answer is 72.", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 1.0),
    ("So she sold 73 clips.\n#### 73", "In May 24, together 72.\n#### 72", 0.0),
    ("#### 70,000", "profit of 200,000-130,000\n#### 70000", 1.0),
    ("He pays $18 in total.", "#### 18", 1.0),
    ("#### $18", "#### 18", 1.0),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.0),
    (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
    (r"\boxed{1/2}", "0.5", 1.0),
    (r"\boxed{\dfrac{2}{4}}", r"$\frac12$", 1.0),
    (r"\boxed{\frac{1}{3}}", "0.33", 0.0),
    ("-2/3", r"-\frac{2}{3}", 1.0),
    ("2/3", r"-\frac{2}{3}", 0.0),
    (r"\boxed{\{2, 1\}}", r"\{1,2\}", 1.0),
    (r"\boxed{1, 2}", r"\{1,2\}", 1.0),
    (r"\boxed{\{1, 3\}}", r"\{1,2\}", 0.0),
    (r"\boxed{\{1, 2, 3\}}", r"\{1,2\}", 0.0),
    (r"The interval is \boxed{(1, 2]}.", "(1,2]", 1.0),
    (r"The interval is \boxed{(1, 2)}.", "(1,2]", 0.0),
    (r"\boxed{(-\infty, 3)}", r"(-\infty,3)", 1.0),
    (r"\boxed{12\text{ cm}}", "12", 1.0),
    (r"\boxed{12}", r"12\text{ cm}", 1.0),
    (r"\boxed{18 dollars}", "18", 1.0),
    (r"\boxed{90^\circ}", "90", 1.0),
    (r"\boxed{1{,}234}", "1234", 1.0),
    (r"\boxed{1\,234}", "1234", 1.0),
    ("The total is 1,234 apples", "1234", 1.0),
    (r"\boxed{12,345,678}", "12345678", 1.0),
    (r"\boxed{50\%}", r"50\%", 1.0),
    (r"\boxed{50\%}", "0.5", 1.0),
    (r"\boxed{0.4}", r"50\%", 0.0),
    (r"\boxed{\boxed{6}}", "6", 1.0),
    (r"First \boxed{5}, but no: \boxed{6}", "6", 1.0),
    (r"First \boxed{5}, but no: \boxed{6}", "5", 0.0),
    (r"The answer is \boxed{7}. I checked it 3 times on page 12.", "7", 1.0),
    (r"We have \boxed{7} and then \boxed{8", "7", 1.0),
    (r"The answer is \boxed{12", "12", 0.0),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
    (r"\boxed{x^2+2x}", "(x+1)^2", 0.0),
    (r"\boxed{3\sqrt{2}}", r"\sqrt{18}", 1.0),
    (r"3\sqrt{2}", "3", 0.0),
    (r"3\sqrt{2}", r"3\sqrt{2}", 1.0),
    (r"\boxed{\pi}", r"\pi", 1.0),
    (r"\boxed{x=5}", "5", 1.0),
    (r"\boxed{\text{East}}", r"\text{East}", 1.0),
    (r"\boxed{\text{West}}", r"\text{East}", 0.0),
    (r"\boxed{1.5e3}", "1500", 1.0),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", 1.0),
    (r"The final answer is $4$. I hope it is correct.", r"so that $2+2=\boxed{4}$.", 1.0),
    (r"\boxed{}", "4", 0.0),
    ("", "4", 0.0),
    ("   \n", "4", 0.0),
    ("I do not know.", "4", 0.0),
    ("}}}{{ \\frac{", "4", 0.0),
    (r"\boxed{\frac{1}{0}}", "4", 0.0),
    ("\\boxed{" * 200, "4", 0.0),
]


@pytest.mark.parametrize(("completion", "gold", "expected"), PAIRS)
def test_completion_against_gold(completion, gold, expected):
    assert math_verify(["q"], [completion], answer=[gold]) == [expected]


def test_a_group_is_scored_in_order_and_numeric_gold_is_accepted():
    assert math_verify(["q"] * 3, ["1", "2", "3"], answer=[2] * 3, question=["?"] * 3) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("gold", ["yes indeed", "", "####", r"\boxed{"])
@pytest.mark.parametrize("completion", ["4", ""])
def test_an_unreadable_gold_answer_is_a_failure_and_not_a_wrong_answer(gold, completion):
    with pytest.raises(ValueError, match=r"gold answer .* cannot be read as mathematics"):
        math_verify(["q"], [completion], answer=[gold])
