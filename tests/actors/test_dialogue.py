"""Conversations in tokens: turn after turn is what the template makes of the whole, in six families, or it is
said at the start what is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from actors.dialogue import KNOWN_TOKENS, Dialogue
from core.config import ModelConfig
from core.errors import DataError
from core.tokenizer import load_tokenizer
from tests.support.dialogues.chat_templates import FAMILIES
from tests.support.tokenizers_made import byte_tokenizer, merging_tokenizer, sentence_tokenizer

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAKE_A_SYSTEM_MESSAGE = ("llama3", "qwen25", "qwen3", "smollm2")
_SPECIAL = ("<|im_start|>", "<|im_end|>")


def say(role: str, content: str, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def call(number: int, **arguments: int) -> dict[str, Any]:
    function = {"name": "add", "arguments": arguments}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


def made(family: str, make: Callable[..., Any] = merging_tokenizer) -> Any:
    found = FAMILIES[family]
    return make(*found.special, bos=found.bos, eos=found.eos, template=found.template)


def chatml(template: str = CHATML, **kwargs: Any) -> Any:
    return byte_tokenizer(*_SPECIAL, eos="<|im_end|>", template=template, **kwargs)


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))


def ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def turn_by_turn(dialogue: Dialogue, tokenizer: Any, rounds: list[Any]) -> tuple[int, ...]:
    """The tokens of [beginning, answer's text, messages, answer's text, ...], answers as a policy samples
    them behind what it was shown.
    """
    tokens = dialogue.first(rounds[0])
    for number, part in enumerate(rounds[1:]):
        if number % 2:
            tokens += dialogue.continuation(part)
        else:
            before = rendered(tokenizer, [say("user", "?")])
            head = ids(tokenizer, before)
            whole = ids(tokenizer, before + part)
            assert whole[: len(head)] == head
            tokens += whole[len(head) :] + dialogue.closing
    return tokens


# --- Turn after turn is the whole ---


@pytest.mark.parametrize("make", [merging_tokenizer, sentence_tokenizer])
@pytest.mark.parametrize(
    ("family", "system"),
    [*((family, "") for family in FAMILIES), *((family, "Be brief.") for family in TAKE_A_SYSTEM_MESSAGE)],
)
def test_rounds_of_words_are_what_the_template_makes_of_the_whole(family, system, make):
    tokenizer = made(family, make)
    system = [say("system", system)] if system else []
    opening = FAMILIES[family].opening
    dialogue = Dialogue(tokenizer)
    assert not [note for note in dialogue.check() if "anew" in note and not note.startswith("after a system")]
    begin = [*system, say("user", "What is 2+3?")]
    replies = ["yes, 5.", "no; {4}", "7"]
    asked = ["Too low.\n\nAgain?", "<Too> high!", "and now?"]
    rounds: list[Any] = [begin]
    messages = list(begin)
    for reply, question in zip(replies, asked, strict=True):
        rounds += [opening + reply, [say("user", question)]]
        messages += [say("assistant", reply), say("user", question)]
    assert turn_by_turn(dialogue, tokenizer, rounds) == ids(tokenizer, rendered(tokenizer, messages))


CALL_TEXTS = {
    "llama3": '{"name": "add", "parameters": {"a": 2, "b": 3}}',
    "qwen25": '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>',
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "b": 3}, "id": "call00000"}]',
}


@pytest.mark.parametrize("make", [merging_tokenizer, sentence_tokenizer])
@pytest.mark.parametrize("family", CALL_TEXTS)
def test_rounds_of_tools_are_what_the_template_makes_of_the_whole(family, make):
    tokenizer = made(family, make)
    dialogue = Dialogue(tokenizer, [ADD])
    assert not [note for note in dialogue.check() if not note.startswith("after a system")]
    result = say("tool", "5 \n", name="add", tool_call_id="call00000")
    calls = say("assistant", "", tool_calls=[call(0, a=2, b=3)])
    begin = [say("user", "What is 2+3?")]
    said = CALL_TEXTS[family]
    rounds = [begin, said, [result], said, [result]]
    whole = rendered(tokenizer, [*begin, calls, result, calls, result], tools=[ADD])
    assert turn_by_turn(dialogue, tokenizer, rounds) == ids(tokenizer, whole)
    (found,) = dialogue.read(said).calls
    assert (found.name, found.arguments, found.problem) == ("add", {"a": 2, "b": 3}, "")


@pytest.mark.parametrize("family", ["qwen25", "qwen3", "mistral"])
def test_answers_of_several_tools_follow_several_calls(family):
    tokenizer = made(family)
    dialogue = Dialogue(tokenizer, [ADD])
    results = [say("tool", str(n), name="add", tool_call_id=f"call{n:05d}") for n in range(3)]
    begin = [say("user", "Add them.")]
    calls = say("assistant", "", tool_calls=[call(n, a=n, b=n) for n in range(3)])
    whole = rendered(tokenizer, [*begin, calls, *results], tools=[ADD])
    found = dialogue.continuation(results)
    assert ids(tokenizer, whole)[-len(found) :] == found
    assert all(str(n) in tokenizer.decode(found) for n in range(3))


def test_a_template_of_one_call_a_turn_shows_the_answers_of_two():
    tokenizer = made("llama3")
    results = [say("tool", answer, tool_call_id=f"call0000{n}") for n, answer in enumerate(("six", "nine"))]
    text = tokenizer.decode(Dialogue(tokenizer, [ADD]).continuation(results))
    assert text.count("ipython") == 2
    assert "six" in text
    assert "nine" in text


def test_what_a_template_strips_is_stripped_turn_after_turn():
    tokenizer = made("gemma")
    dialogue = Dialogue(tokenizer)
    whole = rendered(tokenizer, [say("user", "  2?"), say("assistant", "3"), say("user", "no \n\n")])
    rounds = [[say("user", "  2?")], "3", [say("user", "no \n\n")]]
    assert turn_by_turn(dialogue, tokenizer, rounds) == ids(tokenizer, whole)


def test_what_several_samples_are_shown_is_written_once(monkeypatch):
    tokenizer, written = chatml(), []
    dialogue = Dialogue(tokenizer)
    render = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer),
        "apply_chat_template",
        lambda self, messages, **how: written.append(messages) or render(self, messages, **how),
    )
    for _ in range(3):
        for word in ("a", "b"):
            first = dialogue.first([{"role": "user", "content": word}])
            assert word in tokenizer.decode(first)
            assert word in tokenizer.decode(dialogue.continuation([{"role": "user", "content": word}]))
    assert len(written) == 4
    for _ in range(2):  # What is long is written each time: hundreds of them would take all memory.
        dialogue.first([{"role": "user", "content": "a b " * KNOWN_TOKENS}])
    assert len(written) == 6


def test_bos_stands_once_at_the_beginning_and_never_later():
    tokenizer = made("llama3")
    dialogue = Dialogue(tokenizer)
    assert dialogue.first([say("user", "hi")]).count(tokenizer.bos_token_id) == 1
    assert tokenizer.bos_token_id not in dialogue.continuation([say("user", "hi")])


def test_an_answer_that_a_stop_string_ended_is_closed_before_what_follows():
    dialogue = Dialogue(chatml())
    followed = dialogue.continuation([say("user", "go on")])
    assert dialogue.continuation([say("user", "go on")], ended=False) == dialogue.closing + followed


def test_the_end_token_of_the_models_files_counts():
    """SmolLM2's tokenizer names another end token than its template writes."""
    tokenizer = made("smollm2")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for end_ids in ((), (tokenizer.eos_token_id, end)):
        assert Dialogue(tokenizer, end_ids=end_ids).closing == (end,)


# --- What is shown first ---


def test_an_observation_is_appended_to_what_the_user_says_or_is_it():
    tokenizer = chatml()
    dialogue = Dialogue(tokenizer)
    prompt = [say("user", "Guess. ")]
    assert dialogue.first(prompt, "1 to 9") == dialogue.first([say("user", "Guess. 1 to 9")])
    assert prompt == [say("user", "Guess. ")]
    assert dialogue.first([], "1 to 9") == dialogue.first([say("user", "1 to 9")])
    with pytest.raises(DataError, match="no message and no observation"):
        dialogue.first([])
    with pytest.raises(DataError, match="no message follows"):
        dialogue.continuation([])


def test_template_options_reach_the_template():
    tokenizer = made("qwen3")
    dialogue = Dialogue(tokenizer, template_options={"enable_thinking": False})
    assert tokenizer.decode(dialogue.first([say("user", "hi")])).endswith("<think>\n\n</think>\n\n")
    assert tokenizer.decode(dialogue.continuation([say("user", "hi")])).endswith("<think>\n\n</think>\n\n")
    (anew, *_) = dialogue.check()
    assert "writes earlier turns anew" in anew
    assert "trained on that" in anew


# --- What is told, and what is refused ---


def test_thoughts_that_a_template_leaves_out_are_kept_and_that_is_told():
    tokenizer = made("qwen3")
    (note,) = Dialogue(tokenizer).check()
    assert note == (
        "the chat template leaves out what the policy thought in earlier turns: the policy goes on from what it "
        "was shown and what it sampled, and is trained on that"
    )
    assert Dialogue(tokenizer, [ADD]).check() == ()  # It keeps them between the answers of tools.


def test_a_system_message_that_moves_is_told():
    (note,) = Dialogue(made("mistral")).check()
    assert note.startswith("after a system message the chat template writes earlier turns anew (")


def test_a_template_without_tools_is_told_and_answers_of_tools_are_the_users():
    dialogue = Dialogue(made("gemma"), [ADD])
    unseen, role, form = dialogue.check()
    assert unseen.startswith("warning: the chat template does not show the policy its tools (add)")
    assert role.startswith("the chat template has no role 'tool'")
    assert "in the forms hermes" in form
    results = [say("tool", "5", name="add"), say("tool", "6", name="add")]
    assert dialogue.continuation(results) == dialogue.continuation([say("user", "5\n6")])


NUMBERED = (
    "{% for m in messages %}[{{ loop.index }}] {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[{{ messages | length + 1 }}] {% endif %}"
)
REFUSED = [
    (NUMBERED, "what it writes after an answer depends on what came before"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no end token after an answer"),
    (
        "{% for m in messages %}{% if not loop.index0 or m.role == 'assistant' %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}",
        "leaves out what a message of the role 'user' says",
    ),
    ("{{ messages[-1].content }}<|im_end|>", "leaves out what the assistant says"),
    (
        "{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}" + CHATML,
        "does not take messages of user, assistant, user: one question only",
    ),
    (
        "{% if messages | length > 3 %}{{ raise_exception('two questions only') }}{% endif %}" + CHATML,
        "does not take messages of user, assistant, user, assistant, user: two questions only",
    ),
]


@pytest.mark.parametrize(("template", "reason"), REFUSED)
def test_a_template_that_is_no_continuation_is_refused_with_the_reason_and_what_to_do(template, reason):
    tokenizer = byte_tokenizer(
        *_SPECIAL, eos=None if "end token" in reason else "<|im_end|>", template=template
    )
    with pytest.raises(DataError) as refused:
        Dialogue(tokenizer).check()
    assert reason in str(refused.value)
    assert "chat_template.jinja" in str(refused.value)
    assert "data.chat_template=false" in str(refused.value)


def test_an_end_that_is_one_token_with_what_follows_is_refused():
    tokenizer = merging_tokenizer(
        eos=None, template="{% for m in messages %}{{ m.role }}: {{ m.content }}}\n{% endfor %}"
    )
    end = tokenizer.convert_tokens_to_ids("}")
    with pytest.raises(DataError, match="one token of the end of an answer, '}', and what follows"):
        Dialogue(tokenizer, end_ids=[end]).check()


def test_a_form_of_calls_that_cannot_be_read_back_is_refused():
    template = (
        "{{ tools }}{% for m in messages %}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
        "({{ c.function.arguments.x }}){% endfor %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(
        DataError, match=r"'<call>tool\(QANSWERQ\)', which is in none of the forms.*response_template"
    ):
        Dialogue(chatml(template), [ADD]).check()


# --- Reading answers ---


def test_without_tools_an_answer_is_its_text():
    text = '<tool_call>{"name": "add"}</tool_call>'
    assert Dialogue(made("qwen25")).read(text) == (text, ())


def test_an_answer_is_read_from_its_tokens_where_its_text_lacks_special_tokens():
    tokenizer = made("mistral")
    dialogue = Dialogue(tokenizer, [ADD])
    tokens = ids(tokenizer, 'so[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]') + dialogue.closing
    said = dialogue.read('so[{"name": "add", "arguments": {"a": 1}}]', tokens)
    assert said.text == "so"
    assert [found[:2] for found in said.calls] == [("add", {"a": 1})]


def test_the_tokenizers_response_template_reads_first():
    tokenizer = chatml(
        CHATML.replace(
            "{{ m.content }}",
            "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}{{ m.content }}",
        )
    )
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {"close": "<|im_end|>", "optional": True},
            "tool_calls": {
                "open": "<call>",
                "close": "</call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
        },
    }
    dialogue = Dialogue(tokenizer, [ADD])
    assert "does not show the policy its tools" in " ".join(dialogue.check())
    said = dialogue.read('<call>{"name": "add", "arguments": {"a": 1}}</call>')
    assert [found[:3] for found in said.calls] == [("add", {"a": 1}, "")]
    (broken,) = dialogue.read('<call>{"name": </call>').calls
    assert broken.problem
    assert broken.arguments is None


# --- Text without a template, Mistral's own tokenizer ---


@pytest.mark.parametrize("make", [byte_tokenizer, merging_tokenizer, sentence_tokenizer])
def test_without_a_template_what_follows_is_the_text_as_it_is(make):
    tokenizer = make("<eos>")
    dialogue = Dialogue(tokenizer, chat_template=False)
    assert dialogue.check() == ()
    (unseen,) = Dialogue(tokenizer, [ADD], chat_template=False).check()
    assert unseen.startswith(
        "warning: with data.chat_template=false nothing shows the policy its tools (add)"
    )
    tokens = dialogue.first([say("user", "2+3=")]) + ids(tokenizer, "<eos>")
    tokens += dialogue.continuation([say("user", "No. ")])
    assert tokens == ids(tokenizer, "2+3=<eos>No. ")


def test_without_a_template_and_an_end_token_the_text_follows():
    tokenizer = byte_tokenizer("<eos>", eos=None)
    dialogue = Dialogue(tokenizer, chat_template=False)
    assert dialogue.continuation([say("user", "No.")]) == ids(tokenizer, "No.")


def test_mistrals_own_tokenizer_goes_on_as_it_writes_the_whole(tmp_path):
    (vocabulary, *_) = sorted((Path(mistral_common.__file__).parent / "data").glob("tekken*"))
    (tmp_path / "tekken.json").symlink_to(vocabulary)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    dialogue = Dialogue(tokenizer, [ADD])
    assert dialogue.check() == ()
    begin = [say("user", "2+3?")]
    calls = say("assistant", "", tool_calls=[call(0, a=2, b=3)])
    result = say("tool", "5", name="add", tool_call_id="call00000")
    whole = tokenizer.apply_chat_template(
        [*begin, calls, result], tools=[ADD], tokenize=True, return_dict=False
    )
    first, followed = dialogue.first(begin), dialogue.continuation([result])
    assert tuple(whole[: len(first)]) == first
    assert tuple(whole[-len(followed) :]) == followed
    sampled = whole[len(first) : -len(followed)]
    assert sampled[-1] == tokenizer.eos_token_id
    assert [found[:2] for found in dialogue.read("", sampled).calls] == [("add", {"a": 2, "b": 3})]
