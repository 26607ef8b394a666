"""What a reward function is given, by the names and annotations of its arguments."""

from __future__ import annotations

import functools

import pytest

from rewards.registry import WeightedReward, load_reward
from rewards.scoring import Scored
from rewards.signature import read_signature, takes_messages
from tests.support.scores import GIVEN, score, score_group


class Caller:
    def __init__(self, function):
        self.function = function

    def __call__(self, completions, answer):
        return self.function(completions=completions, answer=answer)


def passing_on(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


SIGNATURES = {
    "(prompts, completions, **columns)": (
        lambda seen: lambda prompts, completions, **columns: seen(locals()),
        "all",
    ),
    "(completions, prompts, **kwargs)": (
        lambda seen: lambda completions, prompts, **kwargs: seen(locals()),
        "all",
    ),
    "(completions, **kwargs)": (lambda seen: lambda completions, **kwargs: seen(locals()), "all"),
    "(**kwargs)": (lambda seen: lambda **kwargs: seen(locals()), "all"),
    "(completions, solution, **kwargs)": (
        lambda seen: lambda completions, solution, **kwargs: seen(locals()),
        "all",
    ),
    "(prompts, completions, completion_ids=None, **kwargs)": (
        lambda seen: lambda prompts, completions, completion_ids=None, **kwargs: seen(locals()),
        "all",
    ),
    "(*, completions, answer)": (
        lambda seen: lambda *, completions, answer: seen(locals()),
        "completions answer",
    ),
    "(solution, completions)": (
        lambda seen: lambda solution, completions: seen(locals()),
        "completions solution",
    ),
    "(completions, target=None)": (
        lambda seen: lambda completions, target=None: seen(locals()),
        "completions",
    ),
    "(completions, answer=None)": (
        lambda seen: lambda completions, answer=None: seen(locals()),
        "completions answer",
    ),
    "(prompts, completions, /, **columns)": (
        lambda seen: lambda prompts, completions, /, **columns: seen(locals()),
        "all",
    ),
    "(completions, answer, /)": (
        lambda seen: lambda completions, answer, /: seen(locals()),
        "completions answer",
    ),
    "(completions, target=None, answer=None, /)": (
        lambda seen: lambda completions, target=None, answer=None, /: seen(locals()),
        "completions",
    ),
    "partial": (
        lambda seen: functools.partial(lambda completions, weight, **kwargs: seen(locals()), weight=2),
        "all",
    ),
    "partial that binds a column": (
        lambda seen: functools.partial(
            lambda completions, answer: seen({"completions": completions}), answer="mine"
        ),
        "completions",
    ),
    "object": (lambda seen: Caller(lambda **given: seen(given)), "completions answer"),
    "bound method": (lambda seen: Caller(lambda **given: seen(given)).__call__, "completions answer"),
    "wrapper": (lambda seen: passing_on(lambda completions, answer: seen(locals())), "completions answer"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_gets_what_it_names(name):
    seen: dict[str, object] = {}

    def note(given):
        given = {**given, **given.get("kwargs", {}), **given.get("columns", {})}
        ours = ("seen", "weight", "kwargs", "columns")
        seen.update({key: value for key, value in given.items() if value is not None and key not in ours})
        return [1.0, 0.0]

    make, expected = SIGNATURES[name]
    scored = score((make(note), 1.0), columns={"answer": "72", "solution": "7"})
    assert scored == [Scored(1.0), Scored(0.0)]
    assert seen == (GIVEN if expected == "all" else {key: GIVEN[key] for key in expected.split()})


def test_the_abbreviations_p_and_c_are_given_in_this_order():
    assert score((lambda p, c, **columns: [float(p[0] == "question")] * len(c), 1.0)) == [Scored(1.0)] * 2
    assert (
        score((lambda _, completions, **columns: [1.0, 2.0], 1.0))[0].error == "f0 needs '_', which the row "
        "does not have (it has "
        "nothing)"
    )
    # Other names are columns: prompts are never taken for completions.
    assert (
        "f0 needs 'outputs', 'inputs'" in score((lambda outputs, inputs, **columns: [1.0, 1.0], 1.0))[0].error
    )


def test_columns_without_which_a_function_cannot_be_called():
    needed = read_signature("f", lambda completions, solution, target=None, **columns: 0).columns
    assert needed == ("solution",)
    assert read_signature("f", lambda prompts, completions, **columns: 0).columns == ()
    assert read_signature("f", load_reward("math_verify")).columns == ("answer",)


def test_prompts_and_completions_come_as_messages_where_that_is_asked_for():
    def format_reward(completions, prompts, **columns):
        pairs = zip(prompts, completions, strict=True)
        return [
            float(prompt[-1]["content"] == "q" and completion[0]["content"] == "a")
            for prompt, completion in pairs
        ]

    rewards = [WeightedReward("f", 1.0, format_reward, messages=True)]
    columns = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}
    assert score_group(rewards, "<rendered>", ["a", "b"], columns) == [Scored(1.0), Scored(0.0)]
    assert score_group(rewards, "<rendered>", ["a", "b"], {"question": "q"}) == [Scored(1.0), Scored(0.0)]
    refused = score_group([WeightedReward("f", 1.0, format_reward)], "q", ["a"], {})[0].error
    assert "It may want messages: write ?messages behind its name" in refused


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        ("list[list[dict[str, str]]]", True),
        ("List[List[Dict[str, str]]]", True),
        ("list[str]", False),
        ("list", False),
    ],
)
def test_an_annotation_says_whether_completions_are_messages(annotation, expected):
    def reward(completions, **columns):
        return []

    reward.__annotations__["completions"] = annotation
    assert takes_messages(reward) is expected
    assert not takes_messages(lambda completions: [])
