"""Unit tests of generated programs as a reward: every form of tests, and programs that try to get by."""

from __future__ import annotations

import json

import pytest

from core.config import RewardsConfig
from core.errors import RewardError
from rewards.check import bad_rows, start_notes
from rewards.pool import RewardPool
from rewards.python_tests import PythonTests, extract_program, read_tests
from rewards.registry import load_reward

pytestmark = pytest.mark.timed

SQUARE = "def square(x):\n    return x * x"
WRONG = "def square(x):\n    return x + x"
ECHO = "print(int(input()) * 2)"


def block(program, language="python"):
    return f"Let me think.\n```{language}\n{program}\n```\nDone."


def score(completion, tests, entry_point=None, **parameters):
    names = None if entry_point is None else [entry_point]
    return PythonTests(**parameters)([completion], [tests], names)[0]


ASSERTS = ["assert square(2) == 4", "assert square(3) == 9", "assert square(0) == 0", "assert square(1) == 1"]
CHECK = "def check(candidate):\n    assert candidate(3) == 9"
STDIN = {"inputs": ["1\n", "2\n"], "outputs": ["2\n", "4\n"]}


@pytest.mark.parametrize(
    ("program", "tests", "entry_point", "value"),
    [
        (SQUARE, "assert square(3) == 9\nassert square(2) == 4", None, 1.0),
        (WRONG, "assert square(2) == 4\nassert square(3) == 9", None, 0.0),
        (SQUARE, ASSERTS, None, 1.0),
        (WRONG, ASSERTS, None, 0.5),
        (SQUARE, json.dumps(ASSERTS), None, 1.0),
        (SQUARE, CHECK, "square", 1.0),
        (WRONG, CHECK, "square", 0.0),
        (ECHO, STDIN, None, 1.0),
        ("print(2)", json.dumps(STDIN), None, 0.5),
        (ECHO, [{"input": "3", "output": "6"}, {"input": "4", "output": "9"}], None, 0.5),
        (SQUARE, {"inputs": [[2], [3]], "outputs": [4, 9], "fn_name": "square"}, None, 1.0),
        ("class Solution:\n    def two(self, a, b):\n        return (a, b)",
         [{"input": "1\n\"x\"", "output": "[1, \"x\"]", "fn_name": "two"}], None, 1.0),
        ("print('3.00  x')", [{"input": "", "output": "3.0\nx\n"}], None, 1.0),
        ("print(6); raise ValueError", [{"input": "", "output": "6"}], None, 0.0),
        ("if __name__ == '__main__':\n    input()\n" + SQUARE, ASSERTS, None, 1.0),
    ],
)  # fmt: skip
def test_a_program_is_worth_the_share_of_its_tests(program, tests, entry_point, value):
    assert score(block(program), tests, entry_point) == value


def test_all_or_nothing_is_a_parameter():
    half = block("def square(x):\n    return x + x")
    assert score(half, ASSERTS, score="all") == 0.0
    assert score(block(SQUARE), ASSERTS, score="all") == 1.0


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def square(x):\n    import os; os._exit(0)",
        "def square(x):\n    raise SystemExit(0)",
        "def square(x):\n    while True: pass",
        "def square(x):\n    return [x] * 10**10",
        "import os\nfor number in range(9): os.write(3, f'{number} 1\\n'.encode())",
        "this is no python",
    ],
)
def test_a_program_that_ends_the_run_has_passed_nothing(program):
    assert score(block(program), ASSERTS, cpu_s=1) == 0.0


def test_what_passed_before_a_program_hung_has_passed():
    program = "def square(x):\n    while x == 0: pass\n    return x * x"
    assert score(block(program), ASSERTS, cpu_s=3) == 0.5


def test_one_that_hangs_is_run_once_and_others_of_its_group_have_their_own():
    tests = {"inputs": ["1"] * 20, "outputs": ["2"] * 20}
    found = PythonTests(cpu_s=3)([block("while True: pass"), block("print(2)"), "none"], [tests] * 3)
    assert found == [0.0, 1.0, 0.0]


def test_the_last_block_of_python_is_the_program():
    first, last = block("first"), block("last")
    assert extract_program(first + last) == "last\n"
    assert extract_program(block("python") + block("shell", "sh")) == "python\n"
    assert extract_program(block("plain", "")) == "plain\n"
    assert extract_program("```python\ncut within") is None
    assert extract_program("no program") is None
    assert score("```python\n" + SQUARE, ASSERTS) == 0.0


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ("", "empty"),
        ([], "an empty list"),
        (7, "a int"),
        ("assert (", "no Python"),
        ({"inputs": [1], "outputs": []}, "1 inputs and 0 outputs"),
        ({"cases": []}, "expected inputs and outputs"),
        ([["x"]], "as number 1"),
        ([{"input": "no json", "output": "1", "fn_name": "f"}], "expected JSON"),
    ],
)
def test_tests_that_cannot_be_read_say_why(tests, reason):
    with pytest.raises(ValueError, match=reason):
        read_tests(tests)
    assert reason in PythonTests().row_problem({"tests": tests})
    assert PythonTests().row_problem({"tests": ASSERTS}) is None


def test_parameters_without_sense_are_refused():
    with pytest.raises(ValueError, match="timeout_s=0"):
        PythonTests(cpu_s=0)


def test_what_the_kernel_keeps_from_programs_is_told():
    assert "kept from" in PythonTests().start_note()


def test_the_reward_by_its_name_with_parameters_runs_in_a_worker_and_checks_the_rows():
    config = RewardsConfig(functions={"python_tests?timeout_s=20&score=all": 1.0}, timeout_s=60)
    rows = {0: {"prompt": "p", "tests": ASSERTS}, 1: {"prompt": "p", "tests": "assert ("}}
    assert list(bad_rows(config, "mine.jsonl", rows)) == [1]
    with RewardPool(config) as pool:
        scored = pool.submit("p", [block(SQUARE), block(WRONG), "no"], rows[0]).result(60)
    assert [sample.reward for sample in scored] == [1.0, 0.0, 0.0]
    assert "kept from" in start_notes(config)[0]
    with pytest.raises(RewardError, match="score"):
        load_reward("python_tests?score=half")
