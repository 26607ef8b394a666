"""Prompts that reasoning-gym generates on the spot: the same everywhere, held out apart, and what is
wrong said in a line.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import pytest

from actors.dataset.procedural import read_rows
from actors.prompts import load_prompts, load_suite
from core.config import DataConfig
from core.errors import DataError
from rewards import reasoning_gym
from tests.support.configs import make_config

is_installed = importlib.util.find_spec("reasoning_gym") is not None
with_library = pytest.mark.skipif(not is_installed, reason="reasoning-gym is not installed: make setup")
SUMS = "reasoning_gym:chain_sum?max_terms=2&max_digits=1&size=50"


def questions(path: str, split: str, limit: int | None = None, *trained: str) -> list[str]:
    known = [(name, "train") for name in trained]
    return [row["question"] for row in read_rows("data.path", path, split, limit, known).values()]


@with_library
def test_a_split_is_the_same_at_every_call_and_held_out_prompts_are_not_trained_on() -> None:
    train, test = questions(SUMS, "train"), questions(SUMS, "test", 16, SUMS)
    assert train == questions(SUMS, "train")
    assert len(train) == len(set(train)) == 50
    assert len(test) == 16
    assert not set(train) & set(test)
    assert questions(SUMS, "test", 8, SUMS) == test[:8]
    # What stands for a missing package is gone again.
    assert "bfi" not in sys.modules or importlib.util.find_spec("bfi")


@with_library
def test_parameters_reach_the_family() -> None:
    (row,) = read_rows(
        "data.path", "reasoning_gym:chain_sum?min_terms=4&max_terms=4&size=1", "train", None
    ).values()
    assert row["question"].count("+") + row["question"].count("-") >= 3
    assert int(row["answer"]) == eval(row["question"].rpartition(":")[2].strip(" ="))
    assert len(questions("reasoning_gym:gsm_symbolic?size=3", "train")) == 3


@with_library
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("reasoning_gym:chain_sums", ["no family 'chain_sums'", "chain_sum"]),
        ("reasoning_gym:", ["no family ''"]),
        ("reasoning_gym:chain_sum?terms=3", ["no parameter terms", "max_terms"]),
        ("reasoning_gym:chain_sum?min_terms=9", ["data.path", "chain_sum refuses that", "max_terms"]),
        ("reasoning_gym:chain_sum?max_terms=many", ["chain_sum refuses that"]),
        ("reasoning_gym:chain_sum?max_terms", ["expected parameters as in"]),
        ("reasoning_gym:chain_sum?size=0", ["size = 0", "at least 1"]),
        ("reasoning_gym:zebra_puzzles?size=1", ["zebra_puzzles refuses that", "pycosat"]),
        ("reasoning_gym:game_of_life?size=1", ["game_of_life refuses that", "cellpylib"]),
    ],
)
def test_what_is_wrong_is_said(path: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        read_rows("data.path", path, "train", None)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@with_library
def test_they_are_prompts_like_any_other(tiny_models: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["tied"])
    data = DataConfig(path=SUMS, eval_rows=4, chat_template=False, max_prompt_tokens=200)
    train, held_out = load_prompts(data, tokenizer), load_prompts(data, tokenizer, evaluation=True)
    assert (len(train), len(held_out)) == (50, 4)
    assert int(train[0].columns["answer"]) < 20


TWO_TERMS = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2"


@with_library
@pytest.mark.parametrize("parameters", ["&size=2000", "&size=200", "", "&size=1&split=train"])
def test_a_suite_has_no_prompt_of_any_source_of_the_run_whatever_its_own_parameters(
    tiny_models: dict[str, Path], parameters: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["tied"])
    digits = "reasoning_gym:chain_sum?max_terms=3&max_digits=1&size=200&split=dev"
    data = {"path": {f"{TWO_TERMS}&size=2000": 3, digits: 1}, "chat_template": False, "eval_rows": 40}
    suites = {"sums": {"path": TWO_TERMS + parameters, "rows": 100}}
    config = make_config({"data": {**data, "max_prompt_tokens": 200}, "eval": {"suites": suites}})
    (suite,) = config.suites
    trained = {row.text for row in load_prompts(config.data, tokenizer).rows}
    assert len(trained) > 2000
    held_out = [
        load_suite(suite, config.data, tokenizer),
        load_prompts(config.data, tokenizer, evaluation=True),
    ]
    other = config.data.model_copy(update={"eval_path": TWO_TERMS + parameters})
    held_out.append(load_prompts(other, tokenizer, evaluation=True))
    assert [len(prompts) for prompts in held_out] == [100, 40, 40]
    for prompts in held_out:
        assert not trained & {row.text for row in prompts.rows}


@with_library
def test_a_suite_of_which_every_prompt_is_trained_on_is_refused_with_what_to_do() -> None:
    few = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
    with pytest.raises(DataError, match=r"no prompt that is not trained on.*size of data\.path"):
        questions(few, "test", 8, f"{few}&size=1000")


def test_without_the_library_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=r"reasoning-gym is not installed.*make setup"):
        read_rows("data.path", SUMS, "train", None)
    assert not any(isinstance(module, reasoning_gym._Absent) for module in sys.modules.values())


def test_parameters_are_read_as_a_config_is():
    longest = read_rows(
        "data.path", "reasoning_gym:chain_sum?min_terms=0600&max_terms=0600&size=1", "train", None
    )
    assert longest[0]["question"].count(" + ") + longest[0]["question"].count(" - ") == 599
    for query in ("size=true", "size=1&size=2", "max_terms=&a", "size=!!int 3"):
        with pytest.raises(DataError, match="reasoning_gym:chain_sum"):
            read_rows("data.path", f"reasoning_gym:chain_sum?{query}", "train", None)


def test_a_family_that_has_no_more_prompts_ends_soon():
    query = "min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=1000000"
    start_s = time.process_time()
    assert len(read_rows("data.path", f"reasoning_gym:chain_sum?{query}", "train", None)) == 200
    assert time.process_time() - start_s < 5.0
