"""Offline data: every row read and checked, groups fed without a policy version, and two runs that
train on them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.offline import OfflineActor, choose_samples, load_offline
from actors.prompts import PromptRow, PromptSet, load_prompts
from actors.scored import answer_id, group_of, with_scores
from buffer.client import BufferClient, connect_buffer
from buffer.ledger import audit
from buffer.server import ReplayBuffer
from cluster.preparation.environment_checks import Acted
from cluster.preparation.prepare import check_needs, load_training
from cluster.preparation.suites import no_evaluation
from core.config import Config
from core.errors import ConfigError, DataError, PeerTimeout
from core.monitor_client import MONITOR, MonitorClient
from core.records import (
    Sample,
    WorkItem,
    decode_batch,
)
from core.tokenizer import Detokenizer
from core.weights.board import BOARD, Board, BoardClient
from learner.objectives import load_objective
from recipes.arithmetic import make_tokenizer
from rewards.scoring import Scored
from tests.support.configs import offline_config
from tests.support.in_process import Handle
from tests.support.scores import write_rows
from tests.support.tokenizers_made import byte_tokenizer

EOS = 1
GOOD = [
    {"prompt": "1+1=", "completion": "2", "answer": "2"},
    {"prompt": "1+1=", "completion": "3", "answer": "2"},
]

NO_ENVIRONMENTS = Acted({})


def logged(prompt: Any, answer: Any, text: str, reward: float | None, finish_reason: str) -> Sample:
    """A sample as `data.offline` has it."""
    return Sample.one_turn(
        prompt, answer, version_spans=(), text=text, reward=reward, finish_reason=finish_reason
    )


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[PromptSet, list[str]]]:
    def load_rows(*rows: dict[str, Any] | str, **sections: Any) -> tuple[PromptSet, list[str]]:
        return load_offline(
            offline_config(write_rows(tmp_path / "log.jsonl", *rows), **sections), make_tokenizer()
        )

    return load_rows


# Loading


def test_rows_of_a_prompt_are_its_samples_with_eos_where_they_are_finished(load):
    prompts, _ = load(
        {"prompt": "1+1=", "completion": "2", "answer": "2", "reward": 0.5},
        {"prompt": "1+1=", "completion": "123", "answer": "2", "truncated": True},
        {"prompt": "1+1=", "completion": "4<eos>", "answer": "2", "reward": True, "truncated": None},
    )
    (prompt,) = prompts.rows
    tokenizer = make_tokenizer()
    ids = {text: tuple(tokenizer(text)["input_ids"]) for text in ("1+1=", "2", "123", "4")}
    assert (prompt.source_row, prompt.text, prompt.token_ids, prompt.columns) == (
        0,
        "1+1=",
        ids["1+1="],
        {"prompt": "1+1=", "answer": "2"},
    )
    assert prompt.offline == (
        logged(prompt.token_ids, (*ids["2"], EOS), "2", 0.5, "stop"),
        logged(prompt.token_ids, ids["123"], "123", None, "length"),
        logged(prompt.token_ids, (*ids["4"], EOS), "4", 1.0, "stop"),
    )


def test_prompts_are_rendered_like_training_prompts(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    messages = [{"role": "user", "content": "1+1"}]
    log = write_rows(
        tmp_path / "log.jsonl", {"prompt": messages, "completion": "2"}, {"prompt": "1+1", "completion": "3"}
    )
    prompts, _ = load_offline(offline_config(log, data={"chat_template": True}), tokenizer)
    training = write_rows(tmp_path / "train.jsonl", {"prompt": "1+1"})
    (expected,) = load_prompts(
        offline_config(log, data={"chat_template": True, "path": str(training)}).data, tokenizer
    ).rows
    assert [(row.text, row.token_ids, len(row.offline)) for row in prompts.rows] == [
        (expected.text, expected.token_ids, 2)
    ]


def test_parquet_gives_the_same_and_groups_of_one_prompt_stay_apart(load, tmp_path):
    rows = [{**row, "group": group, "reward": 1.0} for group in ("a", "b") for row in GOOD]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "log.parquet")
    from_parquet, _ = load_offline(offline_config(tmp_path / "log.parquet"), make_tokenizer())
    assert from_parquet.rows == load(*rows)[0].rows
    assert [(row.source_row, [sample.text for sample in row.offline]) for row in from_parquet.rows] == [
        (0, ["2", "3"]),
        (2, ["2", "3"]),
    ]


def test_duplicates_and_prompts_with_one_completion_are_left_out_and_counted(load):
    alone = {"prompt": "2+2=", "completion": "4", "answer": "4"}
    prompts, notes = load(*GOOD, {**GOOD[0], "reward": 7.0}, alone, alone)
    assert [(row.text, [(sample.text, sample.reward) for sample in row.offline]) for row in prompts.rows] == [
        ("1+1=", [("2", None), ("3", None)])
    ]
    assert "5 samples of 2 prompts, 2 of them exact duplicates, which are left out" in notes[0]
    assert "1 prompts left out: fewer than 2 different completions" in notes[1]


def test_a_target_of_k_samples_needs_k_completions_of_a_prompt(load):
    third, other = {**GOOD[0], "completion": "4"}, [{**row, "prompt": "1+2=", "answer": "3"} for row in GOOD]
    objective = {"importance_weight": "none", "target": "pass@3"}
    prompts, notes = load(*GOOD, third, *other, objective=objective)
    assert [(row.text, len(row.offline)) for row in prompts.rows] == [("1+1=", 3)]
    assert "1 prompts left out: fewer than 3 different completions" in notes[1]
    with pytest.raises(
        DataError,
        match=r"no prompt has 3 different completions.*3 at a time with "
        r"objective.target = pass@3",
    ):
        load(*GOOD, objective=objective)


def test_columns_that_differ_within_a_prompt_are_named(load):
    prompts, notes = load({**GOOD[0], "level": 1}, {**GOOD[1], "level": 2})
    assert prompts[0].columns["level"] == 1
    assert any("differ in level; reward functions get the first row's" in note for note in notes)


BAD_ROWS = [
    ({"completion": "2", "answer": "2"}, "no column 'prompt' or 'question'"),
    ({"prompt": "1+1=", "answer": "2"}, "no column 'completion'; it has 'prompt', 'answer'"),
    ({**GOOD[0], "completion": ""}, "'completion' is empty"),
    ({**GOOD[0], "completion": None}, "'completion' is null, expected text"),
    ({**GOOD[0], "completion": 2}, "'completion' is a number, expected text"),
    ({**GOOD[0], "reward": "1"}, "'reward' is text ('1'), expected a finite number"),
    ({**GOOD[0], "reward": [1]}, "'reward' is a list"),
    ('{"prompt": "1+1=", "completion": "2", "answer": "2", "reward": NaN}', "NaN is not a JSON value"),
    (
        '{"prompt": "1+1=", "completion": "2", "answer": "2", "reward": 1e999}',
        "'reward' is inf, expected a finite number",
    ),
    ({**GOOD[0], "reward": 10**400}, "'reward' is 1000"),
    ({**GOOD[0], "truncated": "no"}, "'truncated' is text, expected true or false"),
    ({**GOOD[0], "truncated": 1}, "'truncated' is a number, expected true or false"),
    ({**GOOD[0], "group": [1]}, "'group' is a list, expected text or a whole number"),
    (
        {**GOOD[0], "completion": "1234"},
        "the completion is 5 tokens long, EOS included; actors.max_new_tokens is 4",
    ),
    ({**GOOD[0], "answer": "3"}, "its 'answer' is '3', but '2' in line 1, which has the same prompt"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_stops_with_line_and_reason_or_is_skipped_and_counted(load, row, reason):
    with pytest.raises(DataError) as caught:
        load(*GOOD, row)
    assert "log.jsonl: 1 of 3 rows are bad\n  - line 3: " in str(caught.value)
    assert reason in str(caught.value)
    assert "data.on_bad_row=skip" in str(caught.value)
    prompts, notes = load(*GOOD, row, data={"on_bad_row": "skip"})
    assert (len(prompts), len(prompts[0].offline), prompts.num_bad_rows) == (1, 2, 1)
    assert "1 bad rows of" in notes[0]


def test_a_nan_in_a_parquet_file_is_a_bad_reward(tmp_path):
    pq.write_table(
        pa.Table.from_pylist([{**GOOD[0], "reward": float("nan")}, {**GOOD[1], "reward": 1.0}]),
        tmp_path / "log.parquet",
    )
    with pytest.raises(DataError, match="row 1: 'reward' is nan, expected a finite number"):
        load_offline(offline_config(tmp_path / "log.parquet"), make_tokenizer())


def test_a_log_in_which_no_prompt_has_two_completions_says_what_is_there(load):
    with pytest.raises(
        DataError,
        match=r"no prompt has 2 different completions \(2 samples of 1 prompts, 1 "
        r"of them exact duplicates\)",
    ):
        load(GOOD[0], GOOD[0])


def test_a_tokenizer_without_eos_needs_truncated_rows(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        load_offline(offline_config(write_rows(tmp_path / "log.jsonl", *GOOD)), tokenizer)
    log = write_rows(tmp_path / "log.jsonl", *({**row, "truncated": True} for row in GOOD))
    assert len(load_offline(offline_config(log), tokenizer)[0]) == 1


TURNS = "{% for m in messages %}<start>{{ m.content }}<turn>\n{% endfor %}{% if add_generation_prompt %}<start>{% endif %}"
ENDS = [
    ("2", ["2", "<turn>"]),
    ("2<turn>", ["2", "<turn>"]),
    ("2<turn>\n", ["2", "<turn>"]),
    ("2<eos>", ["2", "<eos>"]),
    ("2<turn>\n<eos>", ["2", "<turn>"]),
    ("2<eos><eos>", ["2", "<eos>"]),
    ("<turn>", ["<turn>"]),
    ("2<turn>\n<start>3<turn>", "the completion goes on after the end token '<turn>': '<start>3'"),
    ("2<eos>3", "the completion goes on after the end token '<eos>': '3'"),
]


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize(("completion", "expected"), ENDS)
def test_a_logged_completion_ends_once_as_the_policy_ends_it(tmp_path, completion, expected, chat_template):
    tokenizer = byte_tokenizer("<eos>", "<start>", "<turn>", template=TURNS)
    other = {"prompt": "1+1?", "completion": "4"}
    log = write_rows(tmp_path / "log.jsonl", other, {"prompt": "1+1?", "completion": completion})
    config = offline_config(
        log, data={"chat_template": chat_template, "max_prompt_tokens": 16}, actors={"max_new_tokens": 8}
    )
    if isinstance(expected, str):
        with pytest.raises(DataError, match=re.escape(f"line 2: {expected}")):
            load_offline(config, tokenizer)
        return
    sample = load_offline(config, tokenizer)[0][0].offline[1]
    plain = [*expected[:-1], "<eos>"] if completion == "2" and not chat_template else expected
    assert (tokenizer.convert_ids_to_tokens(sample.sampled_tokens.tolist()), sample.finish_reason) == (
        plain,
        "stop",
    )
    assert sample.text == ("" if completion == "<turn>" else "2")


def test_a_truncated_completion_holds_no_end_token_and_unknown_ones_are_bad_or_counted(load):
    with pytest.raises(
        DataError,
        match=r"line 3: 'truncated' is true, but the completion holds the end "
        r"token '<eos>'",
    ):
        load(*GOOD, {**GOOD[0], "completion": "4<eos>", "truncated": True})
    with pytest.raises(
        DataError,
        match=r"line 3: the tokenizer knows no part of the completion 'é': all of "
        r"it is <unk>",
    ):
        load(*GOOD, {**GOOD[0], "completion": "é"})
    _, notes = load(*GOOD, {**GOOD[0], "completion": "2é"})
    assert (
        notes[0]
        == "warning: data.offline: 1 completions hold something that the tokenizer does not know (the first: "
        "line 3)"
    )


@pytest.mark.parametrize(("skip", "text"), [(False, "<think>1</think>2"), (True, "12")])
def test_the_text_of_a_logged_completion_is_that_of_a_sampled_one(tmp_path, skip, text):
    tokenizer = byte_tokenizer("<eos>", "<think>", "</think>")
    log = write_rows(
        tmp_path / "log.jsonl",
        *({"prompt": "1", "completion": f"{said}<eos>"} for said in ("<think>1</think>2", "3")),
    )
    rewards = {"functions": {"exact_match": 1.0}, "skip_special_tokens": skip}
    sample = load_offline(offline_config(log, rewards=rewards, actors={"max_new_tokens": 8}), tokenizer)[0][
        0
    ].offline[0]
    assert (
        sample.text
        == text
        == Detokenizer(tokenizer, (0,), skip_special_tokens=skip).text(sample.sampled_tokens.tolist())
    )
    assert tokenizer.convert_ids_to_tokens(sample.sampled_tokens.tolist()) == [
        "<think>",
        "1",
        "</think>",
        "2",
        "<eos>",
    ]


def mixed_config(tmp_path: Path, *rows: dict[str, Any], **data: Any) -> Config:
    training = write_rows(
        tmp_path / "train.jsonl", {"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}
    )
    log = write_rows(tmp_path / "log.jsonl", *rows)
    return offline_config(f"{log}?share=0.5", data={"path": str(training), **data}, actors={"count": 1})


def test_mixing_gives_training_prompts_what_the_log_has_of_them(tmp_path):
    rows = [{"prompt": "1+1=", "completion": str(number), "group": number} for number in (2, 3, 3)]
    prompts, notes = load_training(
        mixed_config(tmp_path, *rows, {"prompt": "2+2=", "completion": "5"}),
        make_tokenizer(),
        NO_ENVIRONMENTS,
    )
    assert [(row.columns["answer"], [sample.text for sample in row.offline]) for row in prompts.rows] == [
        ("2", ["2", "3"]),
        ("4", ["5"]),
    ]
    assert notes == [
        "data.offline: 4 samples of 2 prompts, 1 exact duplicates left out",
        "offline samples for 1 of 2 prompts (2 of each group); 1 have fewer: what is missing is generated",
    ]


def test_a_logged_prompt_that_is_no_training_prompt_is_a_bad_row_when_mixing(tmp_path):
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "9+9=", "completion": "18"}]
    with pytest.raises(DataError, match=r"line 2: its prompt '9\+9=' is no training prompt"):
        load_training(mixed_config(tmp_path, *rows), make_tokenizer(), NO_ENVIRONMENTS)
    prompts, _ = load_training(
        mixed_config(tmp_path, *rows, on_bad_row="skip"), make_tokenizer(), NO_ENVIRONMENTS
    )
    assert ([len(row.offline) for row in prompts.rows], prompts.num_bad_rows) == ([1, 0], 1)
    with pytest.raises(DataError, match="No usable row is left"):
        load_training(mixed_config(tmp_path, rows[1], on_bad_row="skip"), make_tokenizer(), NO_ENVIRONMENTS)


def test_what_an_objective_needs_and_offline_or_lagged_data_lacks_is_refused():
    def needs_of(config: Config) -> frozenset[str]:
        return load_objective(config.objective).needs

    check_needs(offline_config("log"), needs_of(offline_config("log")))
    weighted = offline_config("log", objective={"importance_weight": "truncated"})
    with pytest.raises(
        ConfigError,
        match=r"needs behaviour log-probs.*data\.offline = log do not have\. Set "
        r"objective\.importance_weight=none",
    ):
        check_needs(weighted, needs_of(weighted))
    mixed = offline_config(
        "log?share=0.5",
        data={"path": "p"},
        actors={"count": 1},
        objective={"importance_weight": "token"},
    )
    with pytest.raises(ConfigError, match=r"objective\.importance_weight=none"):
        check_needs(mixed, needs_of(mixed))
    on_policy = offline_config("log", objective={"on_policy_coef": 0.01})
    with pytest.raises(
        ConfigError,
        match=r"all samples are offline: none is ever fresh\. Set "
        r"objective\.on_policy_coef=0",
    ):
        check_needs(on_policy, needs_of(on_policy))
    with pytest.raises(ConfigError, match=r"objective grpo needs behaviour log-probs"):
        check_needs(offline_config("log", objective={"name": "grpo"}), frozenset({"behaviour_logprobs"}))


def why_not(config: Config) -> str:
    return no_evaluation(config)


def test_why_nothing_is_evaluated_is_said():
    assert "actors.count = 0" in why_not(offline_config("log"))
    assert "data.eval_path" in why_not(offline_config("log", actors={"count": 1}))
    assert why_not(offline_config("log", actors={"count": 1}, data={"eval_path": "held_out.jsonl"})) == ""
    assert "data.eval_rows = 0" in why_not(offline_config("log", data={"eval_rows": 0}))


# Feeding


def test_the_choice_depends_on_the_seed_alone_and_takes_each_sample_once():
    row = PromptRow(
        0, "p", (3,), {}, tuple(logged((3,), (number,), str(number), None, "stop") for number in range(10))
    )
    chosen = [tuple(sample.text for sample in choose_samples(row, 4, seed)) for seed in range(300)]
    assert chosen[7] == tuple(sample.text for sample in choose_samples(row, 4, 7))
    assert all(len(set(texts)) == 4 for texts in chosen)
    counts = [sum(str(number) in texts for texts in chosen) for number in range(10)]
    assert min(counts) > 80, "each of ten should be in about 120"
    assert sorted(sample.text for sample in choose_samples(row, 99, 1)) == sorted(map(str, range(10)))
    assert all(sample.is_offline and len(sample.logprobs) == 0 for sample in choose_samples(row, 99, 1))


def test_a_given_reward_stands_whatever_the_functions_say():
    given, unscored = logged((3,), (1,), " x ", 0.25, "stop"), logged((3,), (1,), " x ", None, "stop")
    scored = with_scores(
        [given, given, unscored, unscored], [Scored(1.0, answer="x"), Scored(error="no")] * 2
    )
    # What no function reads an answer from votes by its text, without the space around it.
    assert {sample.answer_id for sample in scored} == {answer_id("x")}
    assert [(sample.reward, sample.error) for sample in scored] == [
        (0.25, None), (0.25, None), (1.0, None), (None, "no"),
    ]  # fmt: skip


def test_a_group_keeps_the_text_of_the_first_sample_that_has_no_error():
    said = [logged((3,), (number,), str(number), 1.0, "stop") for number in range(3)]
    prompt = PromptRow(7, "p", (3,), {})
    failed = msgspec.structs.replace(said[0], reward=None, error="no")
    for samples, texts in (
        (said, ["0", "", ""]),
        ([failed, *said[1:]], ["", "1", ""]),
        ([failed] * 2, ["0", ""]),
    ):
        group = group_of(WorkItem(5, 2, 0), prompt, samples, "a")
        assert [sample.text for sample in group.samples] == texts
        assert (group.group_id, group.prompt_index, group.source_row) == (5, 2, 7)


def peers_of(buffer: Any, board: Any, monitor: Any) -> tuple[BufferClient, BoardClient, MonitorClient]:
    """Clients of parts that run on this event loop."""
    loop = asyncio.get_running_loop()
    clients = BoardClient(Handle(board, loop), BOARD), MonitorClient(Handle(monitor, loop), MONITOR)
    return connect_buffer([Handle(buffer, loop)]), *clients


class Told:
    """Takes what the monitor would."""

    async def log_actor(self, name: str, counters: dict[str, float]) -> None:
        self.counters = counters


def test_the_feeder_fills_a_real_buffer_with_scored_groups_and_ends_when_retired(tmp_path):
    log = write_rows(
        tmp_path / "log.jsonl",
        *({"prompt": "1+1=", "completion": str(number), "answer": "2"} for number in range(6)),
        *(
            {"prompt": "2+2=", "completion": str(number), "answer": "4", "reward": number / 10}
            for number in (4, 5)
        ),
        {"prompt": "2+2=", "completion": "44", "answer": "4"},
    )
    config = offline_config(log)
    prompts, _ = load_offline(config, make_tokenizer())

    async def scenario() -> tuple[list[Any], dict[str, float], dict[str, float]]:
        buffer, board, told = (
            ReplayBuffer(config, str(tmp_path / "run"), len(prompts)),
            Board(config.run, {}, print),
            Told(),
        )
        feeder = OfflineActor("offline", config, prompts, *peers_of(buffer, board, told))
        running = asyncio.create_task(feeder.run())
        # Prompts come again.
        batches = [decode_batch(await buffer.sample(step, 2, 30.0) or b"") for step in range(8)]
        groups = [group for batch in batches for group in batch.groups]
        await board.retire(["offline"])
        counters = await asyncio.wait_for(running, 30)
        assert told.counters["groups"] >= 16
        stats = await buffer.stats()
        await buffer.close()
        return groups, counters, stats

    groups, counters, stats = asyncio.run(scenario())
    assert all(sample.is_offline and sample.error is None for group in groups for sample in group.samples)
    assert {group.prompt: len(group.samples) for group in groups} == {"1+1=": 4, "2+2=": 3}
    detokenizer = Detokenizer(make_tokenizer(), (EOS,))
    said = [
        (group.prompt, detokenizer.text(sample.sampled_tokens.tolist()), sample)
        for group in groups
        for sample in group.samples
    ]
    rewards = {(prompt, text): sample.reward for prompt, text, sample in said}
    expected = {("1+1=", str(number)): float(number == 2) for number in range(6)}
    assert rewards == {**expected, ("2+2=", "4"): 0.4, ("2+2=", "5"): 0.5, ("2+2=", "44"): 0.0}
    answers = {(prompt, text): sample.answer_id for prompt, text, sample in said}
    assert (answers["1+1=", "2"], answers["2+2=", "4"]) == (answer_id("2"), None), (
        "what had a reward was not scored"
    )
    assert len({group.group_id for group in groups}) == 16
    assert counters["errors"] == stats["buffer/samples_error"] == stats["buffer/leased"] == 0
    assert audit(tmp_path / "run" / "ledger.jsonl")["violations"] == []


def test_a_buffer_that_does_not_answer_the_feeder_is_named(tmp_path, monkeypatch):
    config = offline_config(write_rows(tmp_path / "log.jsonl", *GOOD), run={"timeout_s": 0.2})
    silent = SimpleNamespace(lease=lambda *arguments: asyncio.sleep(60))

    async def scenario() -> None:
        peers = peers_of(silent, Board(config.run, {}, print), Told())
        feeder = OfflineActor("offline", config, PromptSet([], 0, "none"), *peers)
        start, limits_s = feeder._calls.start, {"poll": 60.0}  # The board may be slow.
        monkeypatch.setattr(feeder._calls, "start", lambda call: start(call, limits_s.get(call.method)))
        await feeder.run()

    with pytest.raises(PeerTimeout, match="the replay buffer did not answer offline within"):
        asyncio.run(scenario())
