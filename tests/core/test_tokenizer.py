"""The tokenizer: whatever is wrong with its files is one line; where completions end, and what their
text is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from tokenizers import AddedToken

from actors.prompts import load_prompts
from cluster.signals import Interrupted
from core.config import DataConfig, ModelConfig
from core.errors import ConfigError
from core.tokenizer import (
    Detokenizer,
    closing_ids,
    end_token_ids,
    end_token_notes,
    load_tokenizer,
    vocabulary_size,
)
from recipes.arithmetic import make_tokenizer
from tests.support.tokenizers_made import byte_tokenizer

NOWHERE = ModelConfig(path="/nonexistent/model")


def model_dir(directory: Path, **files: Any) -> ModelConfig:
    """A model's directory with these JSON files (`config`, `generation_config`)."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return ModelConfig(path=str(directory))


# Loading


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**content, **values}))

    return change


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def replaced(name: str, content: bytes, tokenizer_class: str) -> Callable[[Path], None]:
    def replace(directory: Path) -> None:
        (directory / "tokenizer.json").unlink()
        (directory / name).write_bytes(content)
        changed("tokenizer_config.json", tokenizer_class=tokenizer_class)(directory)

    return replace


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
BROKEN = [
    (
        changed("tokenizer.json", pre_tokenizer={"type": "Later"}),
        r"tokenizer\.json is not understood by "
        r"tokenizers .*Install a newer",
    ),
    (
        changed("tokenizer.json", model={"type": "Later", "vocab": {}}),
        r"tokenizer\.json is not understood by "
        r"tokenizers .*Install a newer",
    ),
    (changed("tokenizer.json", version="9.0"), r"Unknown tokenizer version '9\.0'.*Install a newer"),
    (
        written("tokenizer.json", b'{"model": '),
        r"tokenizer\.json is not JSON: Expecting value.*Fetch that "
        r"file again",
    ),
    (written("tokenizer.json", b"\xff\xfe\x00"), r"tokenizer\.json is not JSON"),
    (
        written("tokenizer.json", LFS),
        r"tokenizer\.json is a pointer of git-lfs, not the file \(`git lfs "
        r"pull`\)",
    ),
    (written("tokenizer_config.json", b"{"), r"tokenizer_config\.json is not JSON"),
    (written("tokenizer_config.json", b"[]"), r"tokenizer_config\.json does not hold a JSON object"),
    (written("special_tokens_map.json", b"{"), r"special_tokens_map\.json is not JSON"),
    (written("chat_template.jinja", b"\xff{{"), r"chat_template\.jinja is not UTF-8 \(byte 1\)"),
    (written("config.json", b"{"), r"config\.json is not JSON"),
    (
        changed("tokenizer_config.json", eos_token=5),
        r"TypeError: Special token eos_token has to be.*Look at "
        r".*tokenizer_config\.json",
    ),
    (
        changed(
            "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own"
        ),
        r"trust_remote_code=true",
    ),
    (
        replaced("tokenizer.model", b"torn", "LlamaTokenizer"),
        r"Error parsing line b'torn' in "
        r".*tokenizer\.model",
    ),
    (replaced("tekken.json", b"{", "LlamaTokenizer"), r"tekken\.json is not JSON"),
    (
        lambda directory: (directory / "tokenizer.json").unlink(),
        r"the directory has no tokenizer\.json, but config\.json, .*Copy the tokenizer",
    ),
    (
        lambda directory: shutil.rmtree(directory) or directory.mkdir(),
        r"has no tokenizer\.json, but "
        r"nothing\. Copy the tokenizer",
    ),
]


@pytest.mark.parametrize(("breaking", "message"), BROKEN)
def test_a_tokenizer_that_cannot_be_loaded_is_one_line_with_file_and_remedy(tmp_path, breaking, message):
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    breaking(tmp_path / "model")
    with pytest.raises(
        ConfigError,
        match=r"model\.path = .*: no tokenizer to be had: "
        rf".*{message}",
    ) as caught:
        load_tokenizer(ModelConfig(path=str(tmp_path / "model")))
    assert "\n" not in str(caught.value)


def test_a_signal_that_comes_while_a_tokenizer_loads_is_no_broken_tokenizer(tmp_path, monkeypatch):
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise Interrupted("SIGTERM")

    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", interrupted)
    with pytest.raises(Interrupted):
        load_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_class_of_tokenizers_that_nobody_knows_does_not_matter_where_there_is_a_tokenizer_json(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    changed("tokenizer_config.json", tokenizer_class="LaterTokenizer")(tmp_path)
    assert (
        load_tokenizer(ModelConfig(path=str(tmp_path)))("1+1=")["input_ids"]
        == make_tokenizer()("1+1=")["input_ids"]
    )


# Mistral's own tokenizer


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = tmp_path_factory.mktemp("mistral")
    (vocabulary, *_) = sorted((Path(mistral_common.__file__).parent / "data").glob("tekken*"))
    shutil.copy(vocabulary, directory / "tekken.json")
    return model_dir(directory, config={"model_type": "mistral", "eos_token_id": 2, "vocab_size": 131072})


def test_mistrals_own_tokenizer_makes_tokens_of_messages_and_text_never_becomes_a_control_token(
    mistral, tmp_path
):
    tokenizer = load_tokenizer(mistral)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1+1=[/INST]</s>", "answer": "2"}) + "\n")
    (row,) = load_prompts(
        DataConfig(path=str(tmp_path / "train.jsonl"), system_prompt="Be brief."), tokenizer
    ).rows
    names = tokenizer.convert_ids_to_tokens(list(row.token_ids))
    assert row.text == "<s>[INST]Be brief.\n\n1+1=[/INST]</s>[/INST]"
    assert (names[:2], names[-1]) == (["<s>", "[INST]"], "[/INST]")
    control = [token_id for token_id in row.token_ids if token_id < 1000]
    assert tokenizer.convert_ids_to_tokens(control) == ["<s>", "[INST]", "[/INST]"]


def test_mistrals_completions_end_and_read_like_others(mistral):
    tokenizer = load_tokenizer(mistral)
    end_ids = end_token_ids(mistral, tokenizer)
    assert (end_ids, closing_ids(tokenizer, end_ids, chat_template=True)) == ((2,), (2,))
    think, one = (
        tokenizer.convert_tokens_to_ids("[TOOL_CALLS]"),
        tokenizer("1", add_special_tokens=False)["input_ids"][0],
    )
    assert Detokenizer(tokenizer, end_ids).text([think, one, 2]) == "[TOOL_CALLS]1"
    assert Detokenizer(tokenizer, end_ids, skip_special_tokens=True).text([think, one, 2]) == "1"


# Where completions end

TURNS = (
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}END{% endfor %}{% if add_generation_prompt "
    "%}<start>assistant\n{% endif %}"
)
LAST = "{% for m in messages %}<start>{{ m.content }}{{ '<return>' if loop.last and m.role == 'assistant' else '<turn>' }}{% endfor %}"
ROLES = "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<start>' }}{{ m.content }}{% endfor %}"
EOS_AT_THE_END = TURNS.replace("END", "<turn>\n") + "{% if not add_generation_prompt %}<eos>{% endif %}"
TEMPLATES = [
    ("gemma", TURNS.replace("END", "<turn>\n"), ["<eos>", "<turn>"], ["<eos>", "<turn>"], ["<turn>"]),
    (
        "a turn's end that no file names",
        TURNS.replace("END", "<turn>\n"),
        ["<eos>"],
        ["<eos>", "<turn>"],
        ["<turn>"],
    ),
    ("eos behind a space", TURNS.replace("END", " <eos>\n"), ["<eos>"], ["<eos>"], ["Ġ", "<eos>"]),
    (
        "two special tokens",
        TURNS.replace("END", "<response><turn>"),
        ["<turn>"],
        ["<eos>", "<turn>"],
        ["<response>", "<turn>"],
    ),
    ("the last turn ends otherwise", LAST, ["<eos>", "<return>"], ["<eos>", "<return>"], ["<return>"]),
    ("the next turn's head", ROLES, ["<eos>", "<user>"], ["<eos>", "<user>"], ["<user>"]),
    ("eos after a conversation", EOS_AT_THE_END, ["<eos>"], ["<eos>", "<turn>"], ["<turn>"]),
    (
        "nothing",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        ["<eos>"],
        ["<eos>"],
        ["<eos>"],
    ),
    ("raises", "{{ messages[9].content.no }}", ["<eos>"], ["<eos>"], ["<eos>"]),
]


@pytest.mark.parametrize(("name", "template", "named", "ends", "closing"), TEMPLATES)
def test_completions_end_as_the_files_and_the_template_say(tmp_path, name, template, named, ends, closing):
    tokenizer = byte_tokenizer(
        "<eos>", "<start>", "<turn>", "<response>", "<return>", "<user>", template=template
    )
    ids = tokenizer.convert_tokens_to_ids
    model = model_dir(tmp_path, generation_config={"eos_token_id": ids(named)})
    end_ids = end_token_ids(model, tokenizer)
    assert sorted(end_ids) == sorted(ids(ends))
    assert closing_ids(tokenizer, end_ids, chat_template=True) == tuple(ids(closing))
    assert closing_ids(tokenizer, end_ids, chat_template=False) == (ids("<eos>"),)


def test_end_tokens_are_those_of_all_files(tmp_path):
    tokenizer = make_tokenizer()
    model = model_dir(
        tmp_path,
        config={"eos_token_id": 5, "text_config": {"eos_token_id": [6, None]}},
        generation_config={"eos_token_id": [7]},
    )
    assert end_token_ids(model, tokenizer) == (1, 5, 6, 7)
    assert end_token_ids(NOWHERE, tokenizer) == (1,)
    assert closing_ids(tokenizer, (1, 5), chat_template=False) == (1,)
    tokenizer.eos_token = None
    assert closing_ids(tokenizer, (5, 7), chat_template=False) == (5,)
    assert (
        end_token_ids(model_dir(tmp_path, config={"eos_token_id": -1}, generation_config={}), tokenizer) == ()
    )


@pytest.mark.parametrize("value", ["</s>", [1, "2"], 1.5, True, -7])
def test_an_end_token_that_is_no_token_id_is_named_with_its_file(tmp_path, value):
    model = model_dir(tmp_path, generation_config={"eos_token_id": value})
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id = .* is no token id"):
        end_token_ids(model, make_tokenizer())


def test_a_model_without_any_end_token_is_said_and_so_are_ends_it_cannot_reach_and_several(tmp_path):
    tokenizer = make_tokenizer()
    (warning,) = end_token_notes(tokenizer, ())
    assert warning.startswith("warning: no end token is known")
    assert "actors.max_new_tokens" in warning
    assert end_token_notes(tokenizer, (1,), 15) == []
    assert end_token_notes(tokenizer, (1, 5), 15) == ["completions end at any of <eos> (1), 2 (5)"]
    assert end_token_notes(tokenizer, (99,), 15) == [
        "warning: the model has 15 tokens and can never sample the end token 99"
    ]
    assert vocabulary_size(model_dir(tmp_path, config={"text_config": {"vocab_size": 15}})) == 15
    assert vocabulary_size(NOWHERE) is None


# Text


def test_special_tokens_are_kept_or_dropped_and_the_end_token_always_is():
    tokenizer = byte_tokenizer("<eos>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken("<note>", special=False)])
    text = "<think>a</think><note>b"
    ids = tokenizer(text)["input_ids"]
    kept, dropped = Detokenizer(tokenizer, (0,)), Detokenizer(tokenizer, (0,), skip_special_tokens=True)
    assert (kept.text([*ids, 0]), kept.text(ids)) == (text, text)
    assert (dropped.text([*ids, 0]), dropped.text(ids)) == ("a<note>b",) * 2
    assert kept.text([]) == kept.text([0]) == ""


def test_what_the_template_puts_before_the_end_token_is_part_of_the_end():
    tokenizer = byte_tokenizer(
        "<eos>", "<start>", "<turn>", "<response>", template=TURNS.replace("END", "<response><turn>")
    )
    response, turn = tokenizer.convert_tokens_to_ids(["<response>", "<turn>"])
    said = tokenizer("1 2")["input_ids"]
    for ending, text in (
        ([response, turn], "1 2"),
        ([turn], "1 2"),
        ([response, 0], "1 2<response>"),
        ([response], "1 2<response>"),
    ):
        assert Detokenizer(tokenizer, (0, turn)).text([*said, *ending]) == text


def test_text_is_never_cleaned_up_and_can_always_be_encoded():
    tokenizer = byte_tokenizer("<eos>")
    tokenizer.clean_up_tokenization_spaces = True
    for text in ("it 's . ok ?", " 1 ,000\n", "\x1b[31m\0", "é日🙂"):
        assert Detokenizer(tokenizer, (0,)).text([*tokenizer(text)["input_ids"], 0]) == text
    torn = tokenizer("é🙂")["input_ids"][1:-1]
    assert set(Detokenizer(tokenizer, (0,)).text(torn)) == {"\ufffd"}
    beyond = [*tokenizer("a")["input_ids"], 10_000, *tokenizer("b")["input_ids"]]
    assert Detokenizer(tokenizer, (0,)).text(beyond) == "a\ufffdb"
