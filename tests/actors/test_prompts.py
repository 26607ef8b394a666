"""Datasets to prompts: what is accepted, and for everything else an error that says which row and why."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from actors.prompts import load_prompts
from core.config import DataConfig
from core.errors import DataError
from recipes.arithmetic import make_tokenizer

TEMPLATE = (
    "<s>{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
GOOD = {"prompt": "1+1=", "answer": "2"}


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and `<s>` put before every text unless special tokens are switched off."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={symbol: index for index, symbol in enumerate(["<s>", *symbols])}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture
def write(tmp_path):
    def write_lines(*rows, name="train.jsonl"):
        path = tmp_path / name
        texts = [row if isinstance(row, bytes | str) else json.dumps(row) for row in rows]
        lines = [text.encode() if isinstance(text, str) else text for text in texts]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return str(path)

    return write_lines


def plain(path, **settings):
    return DataConfig(path=str(path), chat_template=False, **settings)


def plain_of(path, **settings):
    return DataConfig(path=path, chat_template=False, **settings)


def test_plain_text_is_tokenised_as_it_is_with_special_tokens(tokenizer, write):
    prompts = load_prompts(plain(write(GOOD)), tokenizer)
    assert len(prompts) == 1
    assert prompts[0].text == "1+1="
    assert list(prompts[0].token_ids) == tokenizer("1+1=")["input_ids"]
    assert prompts[0].token_ids[0] == 0
    assert prompts[0].columns == GOOD


def test_a_rendered_template_has_its_special_token_once(tokenizer, write):
    prompts = load_prompts(DataConfig(path=write(GOOD), system_prompt="Be brief."), tokenizer)
    assert prompts[0].text == "<s>system: Be brief.\nuser: 1+1=\nassistant:"
    assert list(prompts[0].token_ids).count(0) == 1


def with_post_processor(single, *special, **names):
    """Of the arithmetic characters, with special tokens put around every text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [name for name, _ in special if name not in tokenizer.get_vocab()]}
    )
    pairs = [(name, tokenizer.convert_tokens_to_ids(name)) for name, _ in special]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=pairs
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", unk_token="<unk>", **names
    )


@pytest.mark.parametrize(
    "single", ["$A <eos>", "<s> $A <eos>", "<s> $A", "<s> $A <sep>", "<cls> <s> $A <sep> <eos>"]
)
def test_a_prompt_never_ends_in_what_the_tokenizer_appends(write, single):
    names = [("<eos>", 1), ("<s>", 0), ("<sep>", 0), ("<cls>", 0)]
    tokenizer = with_post_processor(single, *names, bos_token="<s>")
    texts = ["1+1=", "12+3=", "<s>1+1="]
    rows = load_prompts(plain(write(*({"prompt": text, "answer": "2"} for text in texts))), tokenizer).rows
    before = single.split("$A")[0].split()
    assert tokenizer.convert_ids_to_tokens(rows[0].token_ids) == [*before, *"1+1="]
    assert tokenizer.convert_ids_to_tokens(rows[1].token_ids) == [*before, *"12+3="]
    assert tokenizer.convert_ids_to_tokens(rows[2].token_ids)[-5:] == ["<s>", *"1+1="]
    assert tokenizer.convert_ids_to_tokens(rows[2].token_ids).count("<s>") == 1


@pytest.mark.parametrize(
    "template", ["{{ bos_token }}{{ messages[0].content }}", "<s>{{ bos_token }}{{ messages[0].content }}"]
)
def test_a_template_that_holds_bos_gives_it_once(write, template):
    tokenizer = with_post_processor("<s> $A <eos>", ("<eos>", 1), ("<s>", 0), bos_token="<s>")
    tokenizer.chat_template = template
    (row,) = load_prompts(DataConfig(path=write(GOOD)), tokenizer).rows
    assert tokenizer.convert_ids_to_tokens(row.token_ids) == ["<s>", *"1+1="]


def test_prompts_that_end_in_the_end_token_are_counted(write):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}<eos>"
    (note,) = load_prompts(DataConfig(path=write(GOOD)), tokenizer).notes
    assert note == "warning: 1 of 1 prompts end in <eos>: the answer begins after what ends one"


def test_wholly_unknown_prompts_are_bad_rows_and_partly_unknown_ones_are_counted(write):
    tokenizer = make_tokenizer()
    path = write(GOOD, {"prompt": "中文", "answer": "2"}, {"prompt": "1 + 1=", "answer": "2"})
    with pytest.raises(
        DataError,
        match=r"1 of 3 rows are bad\n  - line 2: the tokenizer knows no part of "
        r"'中文': all of it is <unk>",
    ):
        load_prompts(plain(path), tokenizer)
    prompts = load_prompts(plain(path, on_bad_row="skip"), tokenizer)
    assert (len(prompts), prompts.num_bad_rows) == (2, 1)
    (note,) = prompts.notes
    assert note.startswith("warning: 1 of 2 prompts hold something that the tokenizer does not know")
    assert note.endswith("(the first: line 3)")
    tokenizer.chat_template = "1+{% for m in messages %}{{ m.content }}{% endfor %}="
    messages = [user("1+", role="system"), user("é")]
    with pytest.raises(DataError, match="line 1: the tokenizer knows no part of 'é'"):
        load_prompts(DataConfig(path=write({"prompt": messages, "answer": "2"})), tokenizer)


def test_prompts_that_come_to_nothing_are_bad_rows_whatever_is_put_before_them(write):
    tokenizer = with_post_processor("<s> $A", ("<s>", 0), bos_token="<s>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(DataError, match="line 1: the prompt has no tokens"):
        load_prompts(plain(write({"prompt": "xx", "answer": "2"})), tokenizer)
    tokenizer.chat_template = "{% if false %}{{ messages[0].content }}{% endif %}"
    with pytest.raises(DataError, match="line 1: the chat template leaves out"):
        load_prompts(DataConfig(path=write(GOOD)), tokenizer)


def test_a_text_that_the_tokenizer_itself_refuses_is_a_bad_row(write):
    core = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    path = write({"prompt": "a", "answer": "2"}, {"prompt": "c", "answer": "2"})
    with pytest.raises(
        DataError,
        match=r"1 of 2 rows are bad\n  - line 2: the tokenizer does not take 'c': "
        r".*WordLevel",
    ):
        load_prompts(plain(path), tokenizer)


def test_padding_and_truncation_in_a_tokenizers_file_change_no_prompt(write):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=16, pad_id=0, pad_token="<pad>")
    rows = load_prompts(
        plain(write({"prompt": "1+1=", "answer": "2"}, {"prompt": "12+12=", "answer": "24"})), tokenizer
    ).rows
    assert ["".join(tokenizer.convert_ids_to_tokens(row.token_ids)) for row in rows] == ["1+1=", "12+12="]


def test_answers_are_found_where_verl_keeps_them_and_it_is_said(write):
    row = {
        "prompt": "1+1=",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"answer": "#### 2"},
    }
    prompts = load_prompts(plain(write(row)), make_tokenizer())
    assert prompts[0].columns == {**row, "answer": "2"}
    assert prompts.notes[0].endswith("train.jsonl: the answers are those in reward_model.ground_truth")
    for other, reason in (
        ({"style": "rule"}, "no 'reward_model.ground_truth', which other rows have"),
        ({"ground_truth": None}, "is null"),
    ):
        with pytest.raises(DataError, match=f"line 2: .*{reason}"):
            load_prompts(plain(write(row, {**row, "reward_model": other})), make_tokenizer())
    assert load_prompts(plain(write({**row, "answer": "3"})), make_tokenizer())[0].columns["answer"] == "3"


def test_messages_are_rendered_and_reach_the_reward_intact(tokenizer, write):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "1+1?", "id": [1, None]},
    ]
    row = {
        "prompt": messages,
        "answer": "2",
        "meta": {"tags": ["a", {"deep": 1.5}]},
        "number": 12345678901234567890,
    }
    other = {"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4", "meta": {"other": True}}
    prompts = load_prompts(DataConfig(path=write(row, other)), tokenizer)
    assert prompts[0].text == "<s>user: hi\nassistant: yes\nuser: 1+1?\nassistant:"
    assert [prompts[0].columns, prompts[1].columns] == [row, other]


@pytest.mark.parametrize("column", ["answer", "solution", "label"])
def test_the_answer_reaches_rewards_as_answer(tokenizer, write, column):
    prompts = load_prompts(plain(write({"question": "q", column: 7, "level": "easy"})), tokenizer)
    assert prompts[0].columns == {"question": "q", "answer": 7, column: 7, "level": "easy"}


def test_answer_wins_over_solution_and_prompt_over_question(tokenizer, write):
    row = {"question": "long", "prompt": "short", "solution": "so 2", "answer": "2"}
    prompts = load_prompts(plain(write(row)), tokenizer)
    assert (prompts[0].text, prompts[0].columns) == ("short", row)


def test_no_row_needs_an_answer_when_none_has_one(tokenizer, write):
    prompts = load_prompts(plain(write({"prompt": "a"}, {"prompt": "b"})), tokenizer)
    assert [row.columns for row in prompts.rows] == [{"prompt": "a"}, {"prompt": "b"}]


def test_rows_are_numbered_by_line_and_unicode_line_separators_do_not_split(tokenizer, write):
    path = write("\ufeff" + json.dumps(GOOD), "", '{"prompt": "a\u2028b", "answer": "c"}', "   ", GOOD)
    prompts = load_prompts(plain(path), tokenizer)
    assert [row.source_row for row in prompts.rows] == [0, 2, 4]
    assert prompts[1].text == "a\u2028b"


def test_parquet_files_shards_and_directories(tokenizer, tmp_path):
    rows = [{"prompt": f"{index}+1=", "answer": str(index + 1)} for index in range(6)]
    pq.write_table(pa.Table.from_pylist(rows[:4]), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[4:]), tmp_path / "train-00001-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test.parquet")
    shards = load_prompts(plain(tmp_path), tokenizer)
    file = load_prompts(plain(tmp_path / "test.parquet"), tokenizer)
    evaluation = load_prompts(plain(tmp_path, eval_rows=5), tokenizer, evaluation=True)
    assert [row.columns for row in shards.rows] == [row.columns for row in file.rows] == rows
    assert [row.source_row for row in evaluation.rows] == [0, 1, 2, 3, 4]


def test_evaluation_takes_the_first_rows_of_its_split_or_path(tokenizer, write, tmp_path):
    write(GOOD)
    write(*[{"prompt": str(index), "answer": "x"} for index in range(9)], name="test.jsonl")
    other = write({"prompt": "other", "answer": "x"}, name="other.jsonl")
    assert len(load_prompts(plain(tmp_path), tokenizer)) == 1
    assert [
        row.text for row in load_prompts(plain(tmp_path, eval_rows=3), tokenizer, evaluation=True).rows
    ] == ["0", "1", "2"]
    assert load_prompts(plain(tmp_path, eval_path=other), tokenizer, evaluation=True)[0].text == "other"
    assert len(load_prompts(plain(tmp_path, eval_rows=0), tokenizer, evaluation=True)) == 0


def test_several_sources_lie_one_after_the_other_by_name_each_with_its_share(tokenizer, write, tmp_path):
    for name, count in (("b", 3), ("a", 2)):
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"{name}{number}", "answer": "x"} for number in range(count)]
        for split in ("train", "test"):
            write(*rows, name=f"{name}/{split}.jsonl")
    path = {str(tmp_path / "b"): 0.75, str(tmp_path / "a"): 0.25}
    prompts = load_prompts(plain_of(path), tokenizer)
    assert [row.text for row in prompts.rows] == ["a0", "a1", "b0", "b1", "b2"]
    assert [tuple(part) for part in prompts.parts] == [(2, 1), (3, 3)]
    assert [(part.source, len(part)) for part in prompts.split()] == [
        (f"{tmp_path}/a/train.jsonl", 2),
        (f"{tmp_path}/b/train.jsonl", 3),
    ]
    held_out = load_prompts(plain_of(path, eval_rows=4), tokenizer, evaluation=True)
    assert [row.text for row in held_out.rows] == ["a0", "b0", "b1", "b2"]
    with pytest.raises(DataError, match=r"/a has 1 of 4 shares, which is none of data\.eval_rows = 1"):
        load_prompts(plain_of(path, eval_rows=1), tokenizer, evaluation=True)


def test_a_bad_row_of_one_source_names_that_source(tokenizer, write):
    good, bad = write(GOOD, name="good.jsonl"), write(GOOD, {"prompt": ""}, name="bad.jsonl")
    with pytest.raises(DataError, match=r"bad\.jsonl: 1 of 2 rows are bad\n  - line 2: 'prompt' is empty"):
        load_prompts(plain_of({good: 1, bad: 1}), tokenizer)
    prompts = load_prompts(plain_of({good: 1, bad: 1}, on_bad_row="skip"), tokenizer)
    assert (prompts.num_bad_rows, [part.num_bad_rows for part in prompts.split()]) == (1, [1, 0])


def test_evaluation_never_takes_the_training_file_silently(tokenizer, write):
    with pytest.raises(DataError, match=r"no split 'test'.*rows are trained on.*data\.eval_path"):
        load_prompts(plain(write(GOOD)), tokenizer, evaluation=True)


def test_evaluation_without_any_path_names_the_remedy(tokenizer):
    with pytest.raises(DataError, match=r"set data\.eval_path, or data\.eval_rows=0"):
        load_prompts(DataConfig(offline="log.jsonl", chat_template=False), tokenizer, evaluation=True)


def test_a_changed_file_is_read_again_and_nothing_is_left_behind(tokenizer, write, tmp_path):
    load_prompts(plain(write(GOOD)), tokenizer)
    prompts = load_prompts(plain(write({"prompt": "new", "answer": "1"})), tokenizer)
    assert prompts[0].text == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_tokenizer_without_chat_template_names_the_remedy(tokenizer, write):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match=r"data\.chat_template=false"):
        load_prompts(DataConfig(path=write(GOOD)), bare)


def user(content, role="user"):
    return {"role": role, "content": content}


BAD_ROWS = [
    ({"answer": "2"}, "no column 'prompt' or 'question'; it has 'answer'"),
    ({"instruction": "1+1", "answer": "2"}, "it has 'instruction', 'answer'"),
    ({"prompt": None, "answer": "2"}, "'prompt' is null, expected text"),
    ({"prompt": 3, "answer": "2"}, "'prompt' is a number"),
    ({"prompt": {"role": "user"}, "answer": "2"}, "'prompt' is an object"),
    ({"prompt": "", "answer": "2"}, "'prompt' is empty"),
    ({"question": " \n", "answer": "2"}, "'question' is empty"),
    ({"prompt": [], "answer": "2"}, "empty list of messages"),
    ({"prompt": ["hi"], "answer": "2"}, "message 1 of 'prompt' is not {'role': ..., 'content': ...}"),
    ({"prompt": [user("hi"), {"role": "user"}], "answer": "2"}, "message 2 of 'prompt' is not"),
    (
        {"prompt": [user("hi", role="human")], "answer": "2"},
        "has the role 'human', expected one of system, user",
    ),
    (
        {"prompt": [user([{"type": "text"}])], "answer": "2"},
        "the content of message 1 of 'prompt' is a list, expected text",
    ),
    ({"prompt": [user("")], "answer": "2"}, "the content of message 1 of 'prompt' is empty"),
    ({"prompt": [user("hi"), user("2", role="assistant")], "answer": "2"}, "nothing is left to answer"),
    (
        {"prompt": [user("out", role="tool")], "answer": "2"},
        "the chat template refuses the messages: no tools here",
    ),
    ({"prompt": json.dumps([user("1+1?")]), "answer": "2"}, "'prompt' is messages written out as text: "),
    ({"prompt": str([user("1+1?")]), "answer": "2"}, "'prompt' is messages written out as text: "),
    ({"prompt": "hi"}, "no 'answer', which other rows have"),
    ({"prompt": "hi", "solution": "2"}, "no 'answer', which other rows have"),
    ({"prompt": "hi", "answer": None}, "'answer' is null"),
    ({"prompt": "hi", "answer": "  "}, "'answer' is empty"),
    ({"prompt": "hi", "answer": []}, "'answer' is empty"),
    ('{"prompt": "hi", "answer": 1e999}', "'answer' is inf, which is beyond all numbers"),
    ({"prompt": "x" * 600, "answer": "2"}, "the prompt is 618 tokens long, data.max_prompt_tokens is 512"),
    ({"prompt": "hi", "answer": "2", "completions": ["a"]}, "'completions' is taken by the reward protocol"),
    ('{"prompt": "hi", "answer": }', "not JSON: Expecting value (column 28)"),
    ('{"prompt": "hi", "answer": "2"', "not JSON: Expecting ',' delimiter"),
    ('{"prompt": "hi", "answer": NaN}', "not JSON: NaN is not a JSON value"),
    ('["hi", "2"]', "holds a list, expected an object"),
    ("[" * 100_000, "not JSON"),
    (b'{"prompt": "h\xff", "answer": "2"}', "not UTF-8 (byte 14)"),
    ('{"prompt": "\\ud800", "answer": "2"}', "half a surrogate pair"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_stops_with_line_and_reason_or_is_skipped_and_counted(tokenizer, write, row, reason):
    path = write(GOOD, row, GOOD)
    with pytest.raises(DataError) as caught:
        load_prompts(DataConfig(path=path), tokenizer)
    message = str(caught.value)
    assert f"{path}: 1 of 3 rows are bad\n  - line 2: " in message
    assert reason in message
    assert "data.on_bad_row=skip" in message
    assert len(message) < 600
    prompts = load_prompts(DataConfig(path=path, on_bad_row="skip"), tokenizer)
    assert ([row.source_row for row in prompts.rows], prompts.num_bad_rows) == ([0, 2], 1)


def test_messages_need_the_chat_template_and_one_system_message(tokenizer, write):
    path = write(GOOD, {"prompt": [user("be brief", role="system"), user("hi")], "answer": "2"})
    with pytest.raises(
        DataError,
        match=r"line 2: 'prompt' is a list of messages, which needs "
        r"data\.chat_template=true",
    ):
        load_prompts(plain(path), tokenizer)
    with pytest.raises(
        DataError,
        match=r"line 2: 'prompt' has a system message of its own, but "
        r"data\.system_prompt is set",
    ):
        load_prompts(DataConfig(path=path, system_prompt="Be long."), tokenizer)


def test_the_first_five_bad_rows_are_listed_in_order_with_the_total(tokenizer, write):
    path = write(GOOD, *[{"prompt": "x" * (20 if index % 2 else 0), "answer": "2"} for index in range(8)])
    with pytest.raises(DataError) as caught:
        load_prompts(plain(path, max_prompt_tokens=10), tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("8 of 9 rows are bad")
    assert [line.split(":")[0] for line in lines[1:6]] == [f"  - line {number}" for number in range(2, 7)]
    assert lines[6] == "  ... and 3 more"


@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_no_usable_row_is_an_error_even_when_skipping(tokenizer, write, on_bad_row):
    with pytest.raises(DataError, match=r"(?s)2 of 2 rows are bad.*line 1: 'prompt' is empty.*No usable row"):
        load_prompts(plain(write({"prompt": ""}, {"prompt": None}), on_bad_row=on_bad_row), tokenizer)


def test_an_empty_file_has_no_rows(tokenizer, write):
    with pytest.raises(DataError, match="has no rows"):
        load_prompts(plain(write("", " ")), tokenizer)


def test_bad_rows_of_parquet_are_numbered_as_rows(tokenizer, tmp_path):
    pq.write_table(pa.Table.from_pylist([GOOD, {"prompt": "hi", "answer": None}]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="row 2: 'answer' is null"):
        load_prompts(plain(tmp_path), tokenizer)


def test_paths_that_hold_nothing_say_what_was_tried_and_what_is_accepted(tokenizer, write, tmp_path):
    write(GOOD)
    (tmp_path / "notes.txt").write_text("hi")
    (tmp_path / "broken.parquet").write_text("hi")
    cases = {
        tmp_path / "nothing.jsonl": r"there is no .*nothing\.jsonl\. Accepted: a \.jsonl or \.parquet file",
        "./nowhere": r"there is no .*nowhere\. Accepted",
        "data/sums.jsonl.gz": r"there is no .*sums\.jsonl\.gz\. Accepted",
        tmp_path / "notes.txt": r"notes\.txt is neither \.jsonl nor \.parquet",
        tmp_path / "broken.parquet": r"broken\.parquet is not a parquet file",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message):
            load_prompts(plain(path), tokenizer)
    with pytest.raises(
        DataError,
        match=r"no split 'dev': neither dev\.jsonl .* but broken\.parquet, "
        r"notes\.txt, train\.jsonl",
    ):
        load_prompts(plain(f"{tmp_path}?split=dev"), tokenizer)
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"more than once \(train\.jsonl, train\.parquet\)"):
        load_prompts(plain(tmp_path), tokenizer)


def test_a_hub_id_goes_through_datasets_with_subset_and_split(tokenizer, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([GOOD] * 5)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_prompts(plain("someone/sums:easy"), tokenizer)) == 5
    assert len(load_prompts(plain("someone/sums", eval_rows=2), tokenizer, evaluation=True)) == 2
    assert asked == [
        (("someone/sums", "easy"), {"split": "train"}),
        (("someone/sums", None), {"split": "test"}),
    ]


def test_an_unreachable_hub_id_says_both_things_that_were_tried(tokenizer, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        load_prompts(plain("someone/no-such-sums:easy"), tokenizer)
    message = str(caught.value)
    assert "data.path = someone/no-such-sums:easy: there is no " in message
    assert "as a hub dataset split 'train' of it could not be loaded: ConnectionError" in message
    assert "Accepted: a .jsonl or .parquet file" in message
