"""The section `data` of a config: several sources with their shares, columns, and options of templates."""

from __future__ import annotations

import inspect

import pytest

from core.config import DataConfig
from core.config.data import GIVEN, OF_TOKENIZER
from core.errors import ConfigError
from learner.catalogue import load_config
from tests.support import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
BAD = [
    ("data.path=", ["data.path = ''", "not empty", "several of them with their shares"]),
    ("data.path={}", ["data.path = {}", "{train.jsonl: 0.7"]),
    ("data.path={a.jsonl: 0}", ["data.path: the share of a.jsonl is 0", "a number above 0"]),
    ("data.path={a.jsonl: most}", ["data.path: the share of a.jsonl is 'most'"]),
    ("data.path={a: true}", ["data.path: the share of a is True"]),
    (
        "data.path={a: 0.123451, b: 0.9}",
        ["data.path: the shares 0.123451, 0.9", "1,023,451 prompts", "round them"],
    ),
    ("data.path={'': 1}", ["data.path: '' is no path"]),
    ("data.columns={answer: a..b}", ["data.columns: 'answer': 'a..b' is no path of keys"]),
    ("data.columns={answer: 3}", ["data.columns.answer = 3"]),
    ("data.template_options={tools: []}", ["'tools' is given to every template by itself"]),
    (
        "data.template_options={chat_template: x}",
        ["'chat_template'", "apply_chat_template", "no template sees"],
    ),
    ("data.template_options={truncation: true, max_length: 3}", ["'truncation'", "apply_chat_template"]),
    ("data.template_options=[1]", ["names of the template's own", "{enable_thinking: false}"]),
    ("data.columns=[a]", ["names and where rows keep them", "{answer: reward_model.ground_truth}"]),
    ("data.template_options={enable-thinking: false}", ["'enable-thinking' is no name of an option"]),
    (
        "data.template_options={enable_thinking: false}",
        ["data.chat_template = false", "Set data.chat_template=true"],
    ),
]


@pytest.mark.parametrize(("override", "said"), BAD, ids=[override for override, _ in BAD])
def test_a_bad_value_of_the_data_is_explained(override, said):
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [override])
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize(
    ("path", "sources"),
    [
        (None, {}),
        ("a.jsonl", {"a.jsonl": 1}),
        ({"b": 0.7, "c": 0.1, "a": 0.2}, {"a": 2, "b": 7, "c": 1}),
        ({"b": 6, "a": 2}, {"a": 1, "b": 3}),
        ({"a": 1 / 3, "b": 2 / 3}, {"a": 1, "b": 2}),
    ],
)
def test_shares_are_whole_numbers_whatever_they_were_written_as(path, sources):
    data = DataConfig(path=path)
    assert [*data.sources.items()] == [*sources.items()]


def test_no_argument_of_the_tokenizer_itself_passes_for_an_option_of_the_template():
    from transformers import PreTrainedTokenizerBase

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    own = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    assert own - {"self", "documents"} <= {*GIVEN, *OF_TOKENIZER}, "documents reach the template"


def test_sources_have_short_names_for_metrics():
    path = {
        "reasoning_gym:chain_sum?max_terms=3": 1,
        "data/sums.jsonl": 1,
        "someone/sums:easy?split=dev": 1,
        "x/sums": 2,
    }
    assert DataConfig(path=path).source_labels == ("sums", "chain_sum", "easy", "sums-2")
