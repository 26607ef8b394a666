"""The reward protocol: names to functions, and one group scored with every value checked."""

from __future__ import annotations

import decimal
import fractions
import math
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import RewardError
from rewards.exact_match import exact_match
from rewards.registry import BUILTINS, RewardName, WeightedReward, load_reward, read_name
from rewards.scoring import MAX_ERROR_CHARS, Scored
from tests.support.scores import constant, score, score_group

PARAMETERS = {"overlong": "?from=3&to=5"}


def test_builtin_names_load():
    for name in BUILTINS:
        assert callable(load_reward(name + PARAMETERS.get(name, ""))), name


def test_parameters_behind_a_name_are_those_of_the_function():
    overlong = load_reward("overlong?from=192&to=256")
    assert overlong([""] * 5, num_tokens=[0, 192, 224, 256, 300]) == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert read_name("mine:f?messages") == RewardName("mine:f", {}, True)
    assert read_name("mine:f") == RewardName("mine:f", {}, False)
    assert read_name("python_tests?path=a%26b&messages") == RewardName("python_tests", {"path": "a&b"}, True)
    assert [
        read_name(name).is_local for name in ("mine:f", "environment", "reward_model:a/b?num_gpus=1")
    ] == [
        True,
        False,
        False,
    ]


def test_module_and_function_load():
    assert load_reward("tests.support.reward_functions:length")(["q"], ["four"]) == [4.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_mach", "did you mean 'exact_match'"),
        ("mathverify", "did you mean 'math_verify'"),
        ("zzz", "built in: exact_match, math_verify"),
        ("", "built in:"),
        ("overlng?from=1", "did you mean 'overlong'"),
        ("overlong", "missing required field `from`; expected overlong\\?from=...&to=..."),
        ("overlong?from=a&to=5", "Expected `int`, got `str` - at `\\$.from`"),
        ("overlong?from=5&to=3", "from=5 and to=3: expected 0 <= from < to"),
        ("overlong?from=5&too=3", "unknown field `too`"),
        ("overlong?from", "'from' behind the \\? is no parameter; expected NAME=VALUE"),
        ("exact_match?strict=1", "exact_match takes no parameter 'strict', nor any other"),
        ("tests.support.reward_functions:length?to=3", "mine = functools.partial\\(length, to=...\\)"),
        (":f", "module:function"),
        ("tests.support.reward_functions:", "module:function"),
        ("tests.no_such_module:f", "no module named 'tests.no_such_module'"),
        ("tests.support.reward_functions:lenght", "did you mean 'length'"),
        ("tests.support.reward_functions:NOT_A_FUNCTION", "int, which cannot be called"),
        (
            "tests.support.reward_functions:without_completions",
            "signature \\(prompts, answer\\); it does not take `completions`",
        ),
        (
            "tests.support.reward_functions:Judge",
            "is a class; name a function, or an object of it: `judge = Judge\\(\\)`",
        ),
        ("math:sqrt", "signature"),
        ("./my_rewards.py:f", "no name of a module; write my_rewards:f"),
        ("tests/support/reward_functions.py:zero", "write tests.support.reward_functions:zero"),
        ("..rewards:f", "no name of a module"),
        ("my rewards:f", "no name of a module"),
    ],
)
def test_what_cannot_be_loaded_says_why(name, message):
    with pytest.raises(RewardError, match=message):
        load_reward(name)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "raise ZeroDivisionError('at\\nimport')",
            "importing bad_reward_{n} raised ZeroDivisionError: at import",
        ),
        ("import a_package_nobody_has", "not installed.*a_package_nobody_has"),
        (
            "import sys; sys.exit('usage: run me')",
            "bad_reward_{n} exits while it is imported .usage: run me.; let what it does as a program",
        ),
        ("exit()", "bad_reward_{n} exits while it is imported; let"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("raise ValueError('word ' * 1000)", r"raised ValueError: word .*\.\.\.$"),
        ("def f(:", r"raised SyntaxError: invalid syntax .bad_reward_{n}.py, line 1."),
        ("x = '\\ud800'; raise ValueError(x * 3)", "raised ValueError"),
    ],
)
def test_a_module_that_fails_to_import_says_with_what_in_one_line(
    code, message, tmp_path, monkeypatch, request
):
    name = f"bad_reward_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(RewardError, match=message.replace("bad_reward_{n}", name)) as error:
        load_reward(f"{name}:f")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_module_in_the_working_directory_is_found_and_hides_no_library(tmp_path, monkeypatch):
    (tmp_path / "reward_beside_me.py").write_text(
        "def f(completions, **columns): return [2.0] * len(completions)"
    )
    (tmp_path / "json.py").write_text("def f(completions): pass")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load_reward("reward_beside_me:f")(["a"]) == [2.0]
    with pytest.raises(
        RewardError,
        match=r"json.py in the working directory is not what the name json means here: "
        r".*json/__init__.py; rename it",
    ):
        load_reward("json:f")


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("72", "72", 1.0),
        (" 72\n", "72 ", 1.0),
        ("72.", "72", 0.0),
        ("", "72", 0.0),
        ("72", 72, 1.0),
        ("Yes", "yes", 0.0),
    ],
)
def test_exact_match_compares_stripped(completion, answer, expected):
    assert exact_match(["q"], [completion], answer=[answer], other=[1]) == [expected]


def test_reward_is_the_weighted_sum():
    assert score((constant([1.0, 0.0]), 2.0), (constant([0.5, 1]), -1.0)) == [Scored(1.5), Scored(-1.0)]


def test_functions_get_the_prompt_and_every_column_once_per_completion():
    seen: dict[str, object] = {}

    def spy(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0] * len(completions)

    nested = [{"role": "user", "content": "q"}]
    score((spy, 1.0), columns={"answer": "72", "prompt": nested})
    assert seen == {
        "prompts": ["question"] * 2,
        "completions": ["a", "b"],
        "answer": ["72", "72"],
        "prompt": [nested, nested],
    }


def test_a_function_cannot_change_what_the_next_one_sees():
    def vandal(prompts, completions, **columns):
        completions.clear()
        return [0.0, 0.0]

    assert (
        score((vandal, 1.0), (lambda prompts, completions, **columns: [float(len(completions))] * 2, 1.0))
        == [Scored(2.0)] * 2
    )


def test_a_coroutine_that_comes_back_is_an_error():
    async def later():
        return [1.0]

    assert "asynchronous: it returned a coroutine" in score((lambda completions: later(), 1.0))[0].error


NUMBERS = {
    "numpy array": np.array([1.0, 0.0]),
    "numpy bools": np.array(["a", "b"]) == np.array(["a", "a"]),
    "list of numpy bools": list(np.array([True, False])),
    "numpy scalars": [np.float16(1), np.int64(0)],
    "0-d arrays": [np.array(1.0), np.array(0)],
    "tensor": torch.tensor([1.0, 0.0], requires_grad=True),
    "bfloat16 tensor": torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
    "torch scalars": [torch.tensor(1), torch.tensor(False)],
    "Decimals": [decimal.Decimal(1), decimal.Decimal("0.0")],
    "Fractions": [fractions.Fraction(1), fractions.Fraction(0, 7)],
    "sympy numbers": [sympy.Integer(1), sympy.Float(0)],
    "tuple of bools": (True, False),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_any_library_are_numbers(kind):
    assert score((constant(NUMBERS[kind]), 1.0)) == [Scored(1.0), Scored(0.0)]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.array([1.0]), "returned a ndarray of shape (1,), expected a number"),
        (torch.tensor([1.0, 2.0]), "returned a Tensor of shape (2,)"),
        (np.float32("nan"), "returned nan"),
        (decimal.Decimal("NaN"), "returned nan"),
        (decimal.Decimal("sNaN"), "returned a Decimal"),
        (np.str_("1.0"), "returned a str_"),
        (b"1", "returned a bytes"),
        (sympy.Symbol("x"), "returned a Symbol"),
        (None, "returned None"),
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        (-math.inf, "returned -inf"),
        ("1.0", "returned a str, expected a number"),
        ([1.0], "returned a list"),
        (1 + 2j, "returned a complex"),
        (10**400, "beyond the range"),
    ],
)
def test_a_value_that_is_no_finite_number_is_an_error_of_its_sample_only(value, reason):
    good, bad = score((constant([1.0, value]), 1.0))
    assert good == Scored(1.0)
    assert bad.reward is None
    assert bad.error.startswith("f0 ")
    assert reason in bad.error


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1.0], "1 values for 2 completions"),
        ([1.0] * 3, "3 values for 2 completions"),
        ([], "0 values"),
        (None, "returned NoneType, expected a list of 2 numbers"),
        (1.0, "returned float"),
        ("ab", "returned str"),
        ({0: 1.0, 1: 1.0}, "returned dict"),
        ({1.0, 0.0}, "returned set"),
        ((value for value in (1.0, 0.0)), "returned generator"),
        (np.array([[1.0], [0.0]]), "returned ndarray of shape (2, 1), expected a list of 2 numbers"),
        (np.array(1.0), "returned ndarray"),
        (torch.ones(3), "3 values for 2 completions"),
    ],
)
def test_a_result_of_the_wrong_shape_is_an_error_of_the_whole_group(values, reason):
    scored = score((constant(values), 1.0))
    assert [sample.reward for sample in scored] == [None, None]
    assert all(reason in sample.error for sample in scored)


def test_an_error_that_no_encoding_takes_arrives_in_words():
    def fails(prompts, completions, **columns):
        raise ValueError("cannot read \ud83d")

    (scored, _) = msgspec.msgpack.decode(msgspec.msgpack.encode(score((fails, 1.0))), type=list[Scored])
    assert "raised ValueError: cannot read ?" in scored.error


def test_an_exception_is_an_error_with_its_last_line_and_place():
    scored = score((load_reward("tests.support.reward_functions:raises"), 1.0))
    assert scored[0] == scored[1]
    assert scored[0].reward is None
    assert "f0 raised KeyError: 'no such thing' (reward_functions.py:" in scored[0].error


def test_sys_exit_and_a_missing_column_are_errors():
    exit_error = score((load_reward("tests.support.reward_functions:sys_exit"), 1.0))[0].error
    column_error = score((exact_match, 1.0), columns={"solution": "a"})[0].error
    assert "SystemExit: enough" in exit_error
    assert column_error == "f0 needs 'answer', which the row does not have (it has 'solution')"


def test_one_failing_function_makes_the_sample_an_error_and_is_named():
    scored = score((constant([1.0, 1.0]), 1.0), (constant([math.nan, 1.0]), 0.0))
    assert scored[0] == Scored(error="f1 returned nan")
    assert scored[1] == Scored(1.0)


def test_a_function_that_does_not_apply_is_left_out_of_the_sum_unless_none_applies():
    scored = score((constant([1.0, None, None]), 2.0), (constant([None, 3.0, None]), 1.0), completions="abc")
    assert scored[:2] == [Scored(2.0), Scored(3.0)]
    assert scored[2] == Scored(error="f0 returned None (could not score); f1 returned None (could not score)")


def test_an_exception_among_the_values_is_the_error_of_its_completion():
    scored = score((constant([1.0, ValueError("no  score")]), 1.0))
    assert scored == [Scored(1.0), Scored(error="f0: ValueError: no score")]


def with_answer(read_answer):
    def reward(prompts, completions, **columns):
        return [1.0] * len(completions)

    reward.answer = read_answer
    return reward


def test_the_first_function_that_can_read_an_answer_does():
    scored = score(
        (constant([0.0, 0.0]), 1.0),
        (with_answer(str.upper), 0.0),
        (with_answer(str.lower), 1.0),
        completions=("Aa", "Bb"),
    )
    assert scored == [Scored(1.0, answer="AA"), Scored(1.0, answer="BB")]
    assert score((constant([0.0, 0.0]), 1.0)) == [Scored(0.0)] * 2
    assert score((with_answer("no function"), 1.0)) == [Scored(1.0)] * 2


@pytest.mark.parametrize(
    "read_answer", [lambda text: None, lambda text: 4, lambda text: text[99], sys.exit, lambda text: "\ud800"]
)
def test_an_answer_that_cannot_be_read_or_sent_is_none_and_no_error(read_answer):
    assert score((with_answer(read_answer), 1.0)) == [Scored(1.0)] * 2


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so it is \boxed{\frac{1}{2}}.", "0.5"),
        ("2 + 2 = 4\n#### 1,000", "1000"),
        ("The final answer is $x=3$.", "3"),
        ("I do not know", None),
        (r"cut: \boxed{4", None),
    ],
)
def test_math_votes_with_the_value_of_the_final_answer(completion, answer):
    assert (
        score((load_reward("math_verify"), 1.0), completions=[completion], columns={"answer": "4"})[0].answer
        == answer
    )


def test_a_weighted_sum_that_overflows_is_an_error():
    assert score((constant([1e308, 1.0]), 1e10))[0].error == "the weighted sum of f0 is inf: 1e+10 * 1e+308"
    found = score((constant([1.5e308, 1.0]), 1.0), (constant([1.5e308, 1.0]), 1.0))
    assert found == [
        Scored(error="the weighted sum of f0, f1 is inf: 1 * 1.5e+308, 1 * 1.5e+308"),
        Scored(2.0),
    ], "a sum that Python raises at"
    assert "is nan: " in score((constant([1e308, 1.0]), 1e10), (constant([-1e308, 1.0]), 1e10))[0].error
    sums = (constant([1.5e308, 1.0]), 1.0), (constant([1e308, 1.0]), 1.0), (constant([-1e308, 1.0]), 1.0)
    assert score(*sums)[0].reward == 1.5e308, "the sum is a number, though two of the three are none"


def test_error_texts_stay_short():
    def loud(prompts, completions, **columns):
        raise ValueError("x" * 100_000)

    assert len(score((loud, 1.0), (loud, 1.0))[0].error) <= MAX_ERROR_CHARS


def test_no_completions_give_no_rewards():
    assert score((constant([]), 1.0), completions=()) == []


@given(
    st.lists(st.one_of(st.floats(), st.integers(), st.none(), st.text(), st.booleans()), max_size=6),
    st.integers(0, 6),
)
def test_every_completion_gets_a_finite_reward_or_an_error_whatever_is_returned(values, num_completions):
    scored = score((constant(values), 1.5), completions=["x"] * num_completions)
    assert len(scored) == num_completions
    assert all((sample.reward is None) != (sample.error is None) for sample in scored)
    assert all(sample.reward is None or math.isfinite(sample.reward) for sample in scored)


def test_scoring_and_pool_import_nothing_heavy():
    code = (
        "import sys, rewards.pool; from tests.support.reward_functions import HEAVY_MODULES; print([m for m in "
        "HEAVY_MODULES if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize("value", [np.complex64(1), 1j, np.complex128(1 + 1j)])
def test_a_complex_number_is_no_reward(value):
    scored = score_group([WeightedReward("f", 1.0, lambda completions, **columns: [value])], "p", ["c"], {})
    assert "expected a number" in scored[0].error


def test_an_array_that_cannot_be_read_is_the_error_of_its_group():
    class Unreadable:
        ndim = 1

        def tolist(self):
            raise NotImplementedError("no data")

    scored = score_group(
        [WeightedReward("f", 1.0, lambda completions, **columns: Unreadable())], "p", ["c"], {}
    )
    assert scored[0].error.startswith("f raised NotImplementedError: no data")
