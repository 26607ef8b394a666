"""math_verify on pairs written by hand: what a person would call the same answer, and what not."""

from __future__ import annotations

import datetime
import decimal
import math
import os
import re
import time

import numpy as np
import pytest

from rewards.exact_match import exact_match
from rewards.math import GROUP_LIMIT_S, LIMIT_S, _process, math_verify
from rewards.registry import WeightedReward
from tests.support.rewards.math_answers import KINDS
from tests.support.scores import score_group

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


@pytest.mark.parametrize("gold", ["yes indeed", "####", r"\boxed{", "She sold 72 clips.", r"\boxed{1+}"])
@pytest.mark.parametrize("completion", ["4", ""])
def test_an_unreadable_gold_answer_is_a_failure_and_not_a_wrong_answer(gold, completion):
    with pytest.raises(ValueError, match=r"gold answer .* cannot be read as mathematics"):
        math_verify(["q"], [completion], answer=[gold])


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ({"value": "72"}, "is an object"),
        (["72", "73"], "is a list of 2"),
        ([], "is a list of 0"),
        (None, "is null"),
        (True, "is true, neither text nor a number"),
        (math.nan, "is nan"),
        (10**400, "is a whole number of 1,329 bits"),
        (b"\xff", r"is b'\xff', bytes that are not UTF-8"),
        (datetime.timedelta(1), "is a timedelta"),
    ],
)
@pytest.mark.parametrize("reward", [math_verify, exact_match])
def test_a_gold_answer_that_is_not_one_answer_is_refused(reward, gold, reason):
    with pytest.raises(ValueError, match=re.escape(f"the gold answer {reason}")):
        reward(["q"], ["72"], answer=[gold])
    assert reason in reward.gold_problem(gold)


GOLDS = [
    72,
    "72",
    72.0,
    ["72"],
    [72.0],
    b"72",
    decimal.Decimal("72"),
    np.int64(72),
    np.array([72]),
    np.str_("72"),
    np.float32(72),
    ("72",),
]


@pytest.mark.parametrize("gold", GOLDS, ids=repr)
@pytest.mark.parametrize("reward", [math_verify, exact_match])
def test_a_gold_answer_as_parquet_gives_it_is_right(reward, gold):
    assert reward(["q"] * 2, ["72", "73"], answer=[gold] * 2) == [1.0, 0.0]
    assert reward.gold_problem(gold) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_answers(kind):
    rows = KINDS[kind]
    rewards = [math_verify(["q"], [completion], answer=[gold])[0] for completion, gold, _ in rows]
    wrong = [(*row, reward) for row, reward in zip(rows, rewards, strict=True) if reward != row[2]]
    assert wrong == []


def test_a_box_of_blanks_is_read_at_once():
    start_s = time.process_time()
    assert math_verify(["q"], [r"\boxed{" + " " * 100_000 + "5}"], answer=["5"]) == [1.0]
    assert math_verify.answer(r"\boxed{" + "\n \n" * 50_000 + "5}") == "5"
    assert time.process_time() - start_s < 2.0


# As competitions write their answers.
FORMS = r"""
\frac{3}{56} ~ \left( 3, \frac{\pi}{2} \right) ~ 6 - 5i ~ \text{Evelyn} ~ \begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix} ~ 1 \pm \sqrt{19}
~ (-\infty, 2) \cup (3, \infty) ~ x \in [-2,7] ~ \$32,\!348 ~ 10,\!080 ~ 3R^2 ~ .35625 ~ 11\sqrt2 ~ 2516_8 ~ \text{June 20} ~ \text{6 and 8}
~ y = 2x + 3 ~ \{1\pm\sqrt{5},-2\} ~ (\text{C}) ~ 5.4 \text{ cents} ~ \text{(B)} ~ 17^\circ ~ p^2-1 ~ 11\% ~ r=5 ~ A,B,C ~ (6,31,-1)
~ \left[-1,2\right) ~ \tan x ~ \cos 20^\circ ~ e^{-x} ~ \ln 3 ~ 3.0 \times 10^{8} ~ [0,3)\cup(3,4] ~ 8! ~ 7^{2019} ~ 4:3 ~ 12:45
~ \overline{AB} ~ \angle ABC ~ x > 17 ~ -3 < x < 9 ~ x \neq 13 ~ \emptyset ~ \infty ~ 4\text{ hours and }3\text{ minutes} ~ n^2+n ~ |x-19|
~ (x-1)^2+(y-2)^2=25 ~ x=1,y=23 ~ \sqrt[3]{29} ~ 1.\overline{27} ~ 2\frac{3}{7}
"""


def test_an_answer_is_itself_boxed_or_not_and_not_its_neighbour():
    golds = [" ".join(form.split()) for form in FORMS.split("~")]
    for gold, other in zip(golds, [*golds[1:], golds[0]], strict=True):
        rewards = math_verify(["q"] * 3, [gold, rf"So it is $\boxed{{{gold}}}$.", other], answer=[gold] * 3)
        assert rewards == [1.0, 1.0, 0.0], gold


ENDLESS = {
    "towers": [
        r"\boxed{\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}}",
        r"\boxed{9^{9^{9}}}",
        r"\boxed{1000000!}",
        r"\boxed{((9^9)^9)^{9^9}}",
    ],
    "others": [
        r"\boxed{2^{n^{2^{n^{2^n}}}} \cdot 99999!}",
        r"\boxed{(a+b+c+d)^{60}}",
        r"\boxed{\binom{10000000}{5000000}}",
        "The answer is $" + r"\frac{1}{1+" * 200 + "x" + "}" * 200 + "$",
    ],
}


def cpu_s():
    """CPU time so far, with that of the process that reads formulas."""
    _process.close()
    return time.process_time() + sum(os.times()[2:4])


@pytest.mark.parametrize("kind", ENDLESS)
def test_answers_that_do_not_end_cost_themselves_and_a_moment(kind):
    start_s = cpu_s()
    completions = ["4", *ENDLESS[kind], r"\boxed{8/2}", "5"]
    scored = score_group([WeightedReward("math_verify", 1.0, math_verify)], "q", completions, {"answer": "4"})
    assert [sample.reward for sample in scored] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert [sample.error for sample in scored] == [None] * 7
    assert [scored[index].answer for index in (0, 5, 6)] == ["4", "4", "5"]
    assert len({sample.answer for sample in scored[1:5]}) == 4  # They vote, as they are written.
    assert cpu_s() - start_s < 4 * LIMIT_S + 1.0


def test_a_whole_group_of_endless_answers_is_done_within_the_default_timeout():
    start_s = cpu_s()
    completions = [rf"\boxed{{(a+b+c+d)^{{{60 + index}}}}}" for index in range(12)]
    assert math_verify(["q"] * 12, completions, answer=["4"] * 12) == [0.0] * 12
    assert cpu_s() - start_s < GROUP_LIMIT_S + 12 * 0.15


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        (r"\boxed{9^{9^{9^{9}}}}", "is too large to be computed"),
        ("((9^9)^9)^{9^9}", "cannot be computed within 1 s"),
    ],
)
def test_a_gold_answer_that_cannot_be_computed_is_a_failure_and_not_a_wrong_answer(gold, reason):
    with pytest.raises(ValueError, match=f"gold answer .* {reason}"):
        math_verify(["q"], ["4"], answer=[gold])


VOTES = [
    [
        "x=3",
        "3",
        "3.0",
        r"\boxed{3}",
        "The final answer is $x = 3$.",
        "#### 3",
        "6/2",
        r"$\frac{6}{2}$",
        "**3**",
        "3 apples",
        "2+1 = 3",
    ],
    ["1,000", "1000", r"\boxed{1{,}000}", "#### 1 000", "1e3", "10^3", "$1000", "1000.00"],
    ["1/2", "2/4", "0.5", r"\frac12", r"\boxed{\dfrac{2}{4}}", "½", "50%", "50 percent"],
    ["x^2+1", "1+x^2", r"\boxed{x^2 + 1}", "y = x^2+1"],
    ["(x+1)^2", "x^2+2x+1"],
    ["1, 2", r"\{2,1\}", "1 and 2", r"$\boxed{2}$ and $\boxed{1}$", "x = 1 or x = 2"],
    ["(1,2)", r"\left(1, 2\right)", "x in nothing but $(1, 2)$"],
    ["(2,1)", r"(2, \, 1)"],
    ["2 1/2", "2.5", r"2\frac{1}{2}", "5/2 cups"],
    ["B", "(B)", r"\boxed{\text{(B)}}", "The answer is B.", "Option B"],
    ["2024-05-01", "May 1, 2024", "2024/5/1"],
    [r"\sqrt{18}", r"3\sqrt{2}", "3√2"],
    [r"\text{East}", "east", r"\boxed{East}"],
    [r"\pi", "π"],
    ["7", "x = 7", "7 == 7"],
    ["x=1, y=2", "y = 2, x = 1"],
    ["x=2, y=1"],
    ["1 < x < 2.5", "(1, 5/2)", r"x \in (1, 2.5)"],
    ["x^2+y^2=9", "9 = y^2 + x^2"],
    ["9"],
    ["(C) 12", "C", r"\textbf{(C)}\ 12"],
    [r"\text{No}", "no", "No."],
    [r"\emptyset", r"\varnothing"],
    ["3:45 pm", "3:45 PM"],
    [r"\boxed{1+}", "1+"],
]


def test_equal_answers_vote_together_and_others_do_not():
    votes = [{math_verify.answer(completion) for completion in same} for same in VOTES]
    assert [len(found) for found in votes] == [1] * len(VOTES), votes
    assert len(set.union(*votes)) == len(VOTES)
    assert None not in set.union(*votes)


def test_a_wrong_equation_votes_for_itself():
    assert len({math_verify.answer(text) for text in ("73 = 72", "72", "73")}) == 3
