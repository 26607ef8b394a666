"""What a harness calls, as tokens: conversations that go on, fork and begin anew; nothing is sampled there
that the engine did not sample.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from actors.harness.chat import ApiError, ChatAnswer, ChatRequest, message_of
from actors.harness.recording import Dialogues, Recording
from actors.playing.played import EpisodeLimits
from core.records import Sample
from tests.support.dialogues.chat_templates import FAMILIES
from tests.support.dialogues.harnesses import ADD, CALL, END, FAMILY, TOKENIZER, generated, ids, recording
from tests.support.tokenizers_made import byte_tokenizer


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def called(found: Recording, messages: list[dict[str, Any]], reply: str, **keys: Any) -> ChatAnswer:
    how = {key: keys.pop(key) for key in ("reason", "version", "end") if key in keys}
    assert found.ask(ChatRequest(tuple(messages), **keys)) is not None
    return found.answer(generated(reply, **how))


def whole(messages: list[dict[str, Any]], *, opened: bool = False, **keys: Any) -> list[int]:
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, **keys)
    return ids(text.removesuffix("\n") if not opened else text)


def sample(found: Recording) -> Sample:
    return found.trajectory().sample(finish_reason="stop")


def segments(found: Sample) -> list[tuple[list[int], list[bool]]]:
    bounds = [0, *found.segments, len(found.tokens)]
    tokens, sampled = found.tokens.numpy().tolist(), found.is_sampled.numpy().tolist()
    return [(tokens[first:last], sampled[first:last]) for first, last in itertools.pairwise(bounds)]


def test_a_conversation_that_goes_on_is_one_list_of_tokens():
    found = recording()
    messages = [user("2+3?")]
    for reply, question in (("six", "no"), ("five", "sure?"), ("yes", "")):
        answer = called(found, messages, reply)
        assert (answer.content, answer.finish_reason, answer.calls) == (reply, "stop", ())
        assert answer.completion_tokens == len(reply) + 1
        messages = [*messages, message_of(answer), user(question)]
    made = sample(found)
    assert made.segments == ()
    assert made.tokens.numpy().tolist() == whole(messages[:-1])
    said = TOKENIZER.decode(made.sampled_tokens.tolist())
    assert said == f"six{FAMILY.end}five{FAMILY.end}yes{FAMILY.end}"
    assert (found.num_turns, found.num_sampled, found.text) == (3, made.num_sampled, "yes")
    assert found.transcript == [
        ("user", "2+3?"),
        ("assistant", "six"),
        ("user", "no"),
        ("assistant", "five"),
        ("user", "sure?"),
        ("assistant", "yes"),
    ]


def test_an_answer_brought_back_otherwise_written_is_the_same_answer():
    found = recording()
    answer = called(found, [user("2+3?")], " five ")
    back = {"role": "assistant", "content": "five", "refusal": None}
    called(found, [user("2+3?"), back, user("sure?")], "yes")
    assert answer.content == " five "
    assert sample(found).segments == ()
    assert " five " in TOKENIZER.decode(sample(found).tokens.numpy().tolist())


def test_another_conversation_is_a_further_segment_and_the_first_may_go_on():
    found = recording()
    first = called(found, [user("a?")], "A", version=3)
    other = called(found, [user("b?")], "B", version=4)
    called(found, [user("a?"), message_of(first), user("more")], "AA", version=5)
    called(found, [user("b?"), message_of(other), user("more")], "BB", version=6)
    made = sample(found)
    (one, one_sampled), (two, _) = segments(made)
    assert one == whole([user("a?"), message_of(first), user("more"), {"role": "assistant", "content": "AA"}])
    assert two == whole([user("b?"), message_of(other), user("more"), {"role": "assistant", "content": "BB"}])
    assert [token for token, was in zip(one, one_sampled, strict=True) if was] == [
        *ids("A"),
        END,
        *ids("AA"),
        END,
    ]
    assert [span.version for span in made.version_spans] == [3, 5, 4, 6]
    assert made.turns == 1  # Counted by the episode.


def test_a_fork_begins_with_the_tokens_as_they_were_sampled_but_they_are_sampled_once():
    found = recording()
    start = [user("2+3?")]
    answer = called(found, start, "<odd> six ", reason="stop")
    called(found, [*start, message_of(answer), user("no")], "five")
    called(found, [*start, message_of(answer), user("yes")], "fine")
    made = sample(found)
    (one, _), (two, two_sampled) = segments(made)
    shared = whole([*start, {"role": "assistant", "content": "<odd> six "}])
    assert one[: len(shared)] == two[: len(shared)] == shared
    assert [token for token, was in zip(two, two_sampled, strict=True) if was] == [*ids("fine"), END]


def test_the_same_question_again_is_a_further_segment():
    found = recording()
    called(found, [user("2+3?")], "six")
    called(found, [user("2+3?")], "five")
    assert len(segments(sample(found))) == 2


def test_what_others_said_is_shown_and_not_sampled():
    found = recording()
    others = [user("2+3?"), {"role": "assistant", "content": "By another model: 4"}, user("sure?")]
    called(found, others, "no, 5")
    made = sample(found)
    assert TOKENIZER.decode(made.sampled_tokens.tolist()) == f"no, 5{FAMILY.end}"
    assert made.tokens.numpy().tolist() == whole([*others, {"role": "assistant", "content": "no, 5"}])


def test_calls_of_tools_are_told_with_ids_of_their_own_and_go_on():
    found = recording()
    start = [user("Add.")]
    answers, messages = [], start
    for reply in (CALL, CALL, "done"):
        answer = called(found, messages, reply, tools=(ADD,))
        answers.append(answer)
        results = [{"role": "tool", "tool_call_id": call.id, "content": "2"} for call in answer.calls]
        messages = [*messages, message_of(answer), *results]
    assert [answer.finish_reason for answer in answers] == ["tool_calls", "tool_calls", "stop"]
    assert [call.id for answer in answers for call in answer.calls] == ["call00000", "call00001"]
    assert found.num_tool_calls == 2
    made = sample(found)
    assert made.segments == ()
    shown = TOKENIZER.decode(made.tokens.numpy().tolist())
    assert shown.count("<tool_response>\n2\n</tool_response>") == 2


def test_other_tools_are_another_conversation():
    found = recording()
    answer = called(found, [user("Add.")], "no", tools=(ADD,))
    called(found, [user("Add."), message_of(answer), user("so?")], "no")
    assert len(segments(sample(found))) == 2


@pytest.mark.parametrize("reply", [CALL + "<tool_call>{</tool_call>", "<tool_call>add(1)</tool_call>"])
def test_a_call_that_cannot_be_read_is_told_as_text(reply):
    answer = called(recording(), [user("Add.")], reply, tools=(ADD,))
    assert (answer.content, answer.calls, answer.finish_reason) == (reply, (), "stop")


def test_with_tool_choice_none_an_answer_is_text():
    answer = called(recording(), [user("Add.")], CALL, tools=(ADD,), reads_calls=False)
    assert (answer.content, answer.calls) == (CALL, ())


def test_a_stop_text_is_not_told_and_the_answer_is_closed_before_what_follows():
    found = recording()
    answer = called(found, [user("2+3?")], "five STOP", end=False, stop=("STOP", "x"))
    assert answer.content == "five "
    called(found, [user("2+3?"), message_of(answer), user("sure?")], "yes")
    made = sample(found)
    shown = TOKENIZER.decode(made.tokens.numpy().tolist())
    assert f"five STOP{FAMILY.end}\n" in shown
    assert TOKENIZER.decode(made.sampled_tokens.tolist()) == f"five STOPyes{FAMILY.end}"


def test_logprobs_are_those_of_the_tokens():
    answer = called(recording(), [user("2+3?")], "5", has_logprobs=True)
    assert answer.logprobs == (("5", 0.0), (FAMILY.end, -1.0))


# --- Limits ---


def test_after_max_turns_there_is_nothing_to_ask():
    found = recording(max_turns=1)
    answer = called(found, [user("2+3?")], "six")
    assert found.limit == ""
    assert found.ask(ChatRequest((user("2+3?"), message_of(answer), user("no")))) is None
    assert found.limit == "max_turns"
    assert found.cut_answer().finish_reason == "length"
    assert sample(found).num_sampled == 4


def test_a_sequence_without_room_is_not_asked_and_the_last_room_is_given():
    found = recording(max_sequence_tokens=len(whole([user("2+3?")], opened=True)) + 4)
    ask = found.ask(ChatRequest((user("2+3?"),)))
    assert ask is not None
    assert ask.max_tokens == 4
    answer = found.answer(generated("6666", reason="length", end=False))
    assert (answer.finish_reason, found.limit) == ("length", "max_sequence_tokens")
    assert found.ask(ChatRequest((user("2+3?"), message_of(answer), user("no")))) is None
    assert found.limit == "max_sequence_tokens"


@pytest.mark.parametrize(("wanted", "limit"), [(None, "max_new_tokens"), (2, "")])
def test_an_answer_is_cut_by_the_run_or_by_the_request(wanted, limit):
    found = recording(max_new_tokens=4)
    ask = found.ask(ChatRequest((user("2+3?"),), max_tokens=wanted))
    assert ask is not None
    assert ask.max_tokens == (wanted or 4)
    answer = found.answer(generated("6" * (ask.max_tokens or 0), reason="length", end=False))
    assert (answer.finish_reason, found.limit) == ("length", limit)


def test_messages_that_the_template_refuses_are_a_wrong_request():
    family = FAMILIES["gemma"]
    tokenizer = byte_tokenizer(*family.special, eos=family.eos, template=family.template)
    found = Recording(Dialogues(tokenizer), EpisodeLimits(8, 8, 500))
    with pytest.raises(ApiError, match="does not take messages of system, user: no system role"):
        found.ask(ChatRequest(({"role": "system", "content": "x"}, user("hi"))))
    assert found.ask(ChatRequest((user("hi"),))) is not None


def test_a_dropped_question_leaves_nothing():
    found = recording()
    assert found.ask(ChatRequest((user("2+3?"),))) is not None
    found.drop()
    called(found, [user("2+3?")], "five")
    assert (found.num_turns, sample(found).segments) == (1, ())


def test_dialogues_are_made_once_for_the_same_tools_and_few_are_kept():
    dialogues = Dialogues(TOKENIZER)
    assert dialogues.of([ADD]) is dialogues.of([dict(ADD)])
    first = dialogues.of([])
    for number in range(Dialogues._MOST):
        dialogues.of([{"type": "function", "function": {"name": f"f{number}"}}])
    assert dialogues.of([]) is not first
