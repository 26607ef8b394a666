"""The text of config files: YAML 1.2's values, texts that arrive as they were meant or are refused, and
what is written reads the same.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import Config
from core.config.files import dump_config
from core.config.text import TextError, read, write
from core.errors import ConfigError
from learner.catalogue import load_config, parse_config, parse_text
from tests.support import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"

VALUES: list[tuple[str, Any]] = [
    ("0600", 600),
    ("0o17", 15),
    ("0x1F", 31),
    ("-7", -7),
    ("+7", 7),
    ("1e-5", 1e-5),
    ("1e3", 1000.0),
    ("1.", 1.0),
    (".5", 0.5),
    (".inf", math.inf),
    ("-.inf", -math.inf),
    ("true", True),
    ("FALSE", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("# nothing", None),
    ("1:30", "1:30"),
    ("1_000", "1_000"),
    ("0b1", "0b1"),
    ("yes", "yes"),
    ("off", "off"),
    ("inf", "inf"),
    ("2024-01-01", "2024-01-01"),
    ("2024-13-45", "2024-13-45"),
    ("=", "="),
    ("'7'", "7"),
    ('"null"', "null"),
    ("[1, [two, 3.0]]", [1, ["two", 3.0]]),
    (
        "{0-1: 0.5, 2: 0.4, 0600: a, null: b, yes: c}",
        {"0-1": 0.5, "2": 0.4, "0600": "a", "null": "b", "yes": "c"},
    ),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = read(text)
    assert found == value
    assert type(found) is type(value)
    assert math.isnan(read(".nan"))


KEPT = [
    (r"'\boxed{}'", r"\boxed{}"),
    (r'"\\boxed{}"', r"\boxed{}"),
    (r"Put it in \boxed{}.", r"Put it in \boxed{}."),
    ("'Answer after ####'", "Answer after ####"),
    ("Answer after ####.", None),
    ("C# and F#", "C# and F#"),
    ('"Think.\\nThen answer."', "Think.\nThen answer."),
    ('"1\\t2"', "1\t2"),
    ('"\\u00e9\\x41\\U0001F600"', "éA😀"),
    ("|\n    Think.\n    Answer after ####\n", "Think.\nAnswer after ####\n"),
    (">-\n    Think,\n    then # answer\n", "Think, then # answer"),
    ("a/path  # where it lies", "a/path"),
    ("'two words'  # a comment", "two words"),
    ("words  #", "words"),
]


@pytest.mark.parametrize(("written", "text"), KEPT)
def test_text_is_kept(written: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(TextError, match="comment"):
            read(f"data:\n  x: {written}\n")
    else:
        assert read(f"data:\n  x: {written}\n  # below\n  y: 1\n") == {"data": {"x": text, "y": 1}}


REFUSED = [
    (r'"\boxed{}"', r"`\b` of `\boxed{}` is an escape"),
    (r'"a \frac{1}{2}"', r"`\f` of `\frac{1}{2}`"),
    (r'"a \times b"', r"`\t` of `\times b`"),
    (r'"\rho"', r"`\r` of `\rho`"),
    (r'"\alpha"', r"`\a` of"),
    (r'"\vec x"', r"`\v` of"),
    (r'"\eta"', r"`\e` of"),
    (r'"\nabla f"', r"`\n` of"),
    (r'"x \neq y"', r"`\n` of"),
    (r'"$\nu_1$"', r"`\n` of"),
    (r'"\N"', r"`\N` of"),
    (r'"a\ b"', "`\\ ` of"),
    (r'"\_"', r"`\_` of"),
    (r'"\0"', r"`\0` of"),
    (r'"\xi"', "single quotes"),
    (r'"\upsilon"', "single quotes"),
    (r'"\sum"', "unknown escape character 's'; a backslash in double quotes begins an escape"),
    (
        "Finish with #### and the number.",
        "`#### and the number.` behind the text `Finish with` would be a comment",
    ),
    ("Finish with # and the number.", "would be a comment"),
    ("Finish\t#### and", "cannot start any token"),
    ("####", "`####` behind the text `` would be a comment"),
    ("Finish ####", "behind the text `Finish`"),
    ("a/path #comment", "behind the text `a/path`"),
    ("Finish with\n    #### and the number", "`#### and the number` behind"),
    ("&amp; is an anchor", "begins with & or * wants quotes"),
    ("&c is an anchor", "&c is an anchor"),
    ("*bold* text", "not YAML"),
    ("*bold text", "*bold is an alias"),
    ("!important thing", "!important is a tag"),
    ("! thing", "! is a tag"),
    ("!!str 3", "is a tag"),
    ("Reply: so", "a text that holds `: ` wants quotes"),
    ("@you", "cannot start any token"),
    ("a\x08b", "(U+0008)"),
]


@pytest.mark.parametrize(("written", "words"), REFUSED)
def test_text_that_would_be_another_one_is_refused(written: str, words: str) -> None:
    with pytest.raises(TextError) as caught:
        read(f"data:\n  x: {written}\n  y: 1\n")
    assert words in str(caught.value)
    assert "line 2" in str(caught.value) or "character" in str(caught.value)


@pytest.mark.parametrize("written", ["Use # as a mark", "# as a mark", "Use\n    # as a mark"])
def test_in_prose_no_comment_is_guessed(written: str) -> None:
    text = f"data:\n  system_prompt: {written}\n"
    read(text)
    with pytest.raises(TextError, match="comment"):
        read(text, ["system_prompt"])
    assert read("data: # of ours\n  system_prompt: 'Use'  # a mark\n  # or not\n", ["system_prompt"]) == {
        "data": {"system_prompt": "Use"}
    }


TYPED = [
    "Answer after ####",
    "#### and # so on",
    r"Put it in \boxed{}.",
    '"quoted"',
    "'7'",
    "yes",
    "0600",
    "[a, b]",
    "{a: b}",
    "key: value",
    "*bold* &amp; !now",
    "- item",
    " spaces at both ends ",
    "two\nlines\tand a tab",
    "a=b",
    "",
    "~",
    "--dry-run=x",
]


@pytest.mark.parametrize("text", TYPED)
def test_text_arrives_as_typed_on_the_command_line(text: str) -> None:
    config = load_config(QUICKSTART, ["data.chat_template=true", f"data.system_prompt={text}"])
    assert config.data.system_prompt == text
    assert parse_text(dump_config(config), "the dump") == config


def test_null_on_the_command_line_is_none_where_there_may_be_none() -> None:
    config = load_config(QUICKSTART, ["data.system_prompt=null", "run.name=null", "run.dir=null"])
    assert (config.data.system_prompt, config.run.name, config.run.dir) == (None, "null", None)


def test_the_path_of_another_model_leaves_the_recipe_behind() -> None:
    assert load_config(QUICKSTART).model.make == "recipes.arithmetic:make_base"
    assert load_config(QUICKSTART, ["model.path=someone/model"]).model.make is None
    assert (
        load_config(QUICKSTART, ["model.path=.cache/arithmetic-base"]).model.make
        == "recipes.arithmetic:make_base"
    )
    both = load_config(QUICKSTART, ["model.path=./there", "model.make=recipes.smollm2:make"])
    assert both.model.make == "recipes.smollm2:make"
    assert load_config(QUICKSTART, ["model.make=recipes.smollm2:make"]).model.path == ".cache/arithmetic-base"


def test_a_dump_shows_what_cannot_be_seen() -> None:
    config = load_config(QUICKSTART, ["data.chat_template=true", "data.system_prompt=It's  \\boxed{}. "])
    assert "  system_prompt: 'It''s  \\boxed{}. '\n" in dump_config(config)
    config = load_config(
        QUICKSTART, ["data.chat_template=true", 'data.system_prompt=a\tb\n\u200bc\xa0\nabla "d"\\']
    )
    assert '  system_prompt: "a\\x09b\\n\\u200Bc\\xA0\\x0Aabla \\"d\\"\\\\"\n' in dump_config(config)
    assert parse_text(dump_config(config), "the dump") == config
    assert "  path: configs/arithmetic\n" in dump_config(config)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        "null",
        "0600",
        "yes",
        "1:30",
        "~",
        "a #b",
        "a: b",
        "- a",
        "\\nabla",
        "\nabla",
        "\n",
        " ",
        "'",
        '"',
        "\x7f",
        "\ufeff",
        "\u2028",
        "😀",
    ]
)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


SECTIONS = st.dictionaries(st.sampled_from(["key", "x_y"]), TREES, min_size=1)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["section_a", "b"]), SECTIONS, min_size=1))
def test_what_is_written_reads_the_same(tree: dict[str, dict[str, Any]]) -> None:
    def plain(value: Any) -> Any:
        """Without the infinities that no config holds."""
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return 0.5 if value in (math.inf, -math.inf) else value

    tree = plain(tree)
    assert read(write(tree), ["key"]) == tree


@settings(max_examples=100, deadline=None)
@given(TEXTS, st.floats(1e-12, 1e3), st.integers(0, 2**32 - 1), TEXTS, st.sampled_from(["auto", "off"]))
def test_a_config_that_is_printed_and_given_back_is_the_same(
    prompt: str, lr: float, seed: int, path: str, name: str
) -> None:
    tree = copy.deepcopy(load_config(QUICKSTART).model_dump())
    tree["data"] |= {"system_prompt": prompt, "chat_template": True, "path": path}
    tree["learner"]["lr"], tree["run"]["seed"], tree["run"]["name"] = lr, seed, name
    found = config_or_message(tree)
    if isinstance(found, str):
        assert "(U+" in found or "not empty" in found
    else:
        assert parse_text(dump_config(found), "the dump") == found


def config_or_message(tree: dict[str, Any]) -> Config | str:
    try:
        return parse_config(tree)
    except ConfigError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab:#'\"\\[]{}&*!|>-? \n\t,~%@`0.n"), max_size=25), st.booleans())
def test_any_text_is_a_value_or_a_text_error(text: str, comments: bool) -> None:
    with contextlib.suppress(TextError):
        found = read(text, ["a"], comments=comments)
        assert isinstance(found, None | bool | int | float | str | list | dict)


def test_a_large_file_is_read_in_seconds_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_text("- xxxxxx\n" * 29_000)
    start_s = time.perf_counter()
    with pytest.raises(ConfigError, match="holds a list"):
        load_config(large)
    assert time.perf_counter() - start_s < 60
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "pipe.yaml")


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + QUICKSTART.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(path) == load_config(QUICKSTART)
    assert isinstance(load_config(path), Config)


ESCAPES = [
    r"\U00110000",
    r"\UFFFFFFFF",
    r"\natural",
    r"\nleq",
    r"\nless",
    r"\nrightarrow",
    r"\nexists",
    r"\nsubseteq",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_an_escape_that_is_no_character_or_a_command_of_tex_is_refused(escape):
    with pytest.raises(TextError, match="single quotes"):
        read(f'a: "x {escape} y"')


def test_a_line_break_in_double_quotes_is_one_where_words_follow():
    assert read(r'a: "if\nnext\nnatural\nI am"') == {"a": "if\nnext\nnatural\nI am"}
