"""Episodes that a harness leads: agents written with the `openai` package, over real HTTP, against an engine
that says what it is told.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from actors.episode import Ask, Generation
from actors.harness.endpoint import Endpoint
from actors.harness.episode import HarnessEpisode
from tests.support.dialogues.harnesses import (
    ADD,
    CALL,
    FAMILY,
    TOKENIZER,
    Play,
    ThreadPlace,
    drive,
    generated,
    recording,
)


def user(content: str) -> Any:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as found:
        yield found


class Played:
    """An episode that is over: what the engine was asked, what was kept, and its place."""

    def __init__(self, endpoint: Endpoint, play: Play, *replies: str | Generation, **limits: int) -> None:
        self.place = ThreadPlace(play)
        self.ignored: list[Any] = []
        self.episode = HarnessEpisode("agent", self.place, endpoint, recording(**limits), self.ignored.append)
        left = list(replies)

        def reply(ask: Ask) -> Generation:
            del ask
            found = left.pop(0)
            return generated(found) if isinstance(found, str) else found

        self.asked = drive(self.episode, reply)
        assert not left
        self.sample = self.episode.sample()

    @property
    def said(self) -> str:
        """What was sampled, as text."""
        assert self.sample is not None
        return str(TOKENIZER.decode(self.sample.sampled_tokens.tolist()))


async def guess(client: openai.AsyncOpenAI) -> float:
    """An agent of two turns, as one writes it."""
    messages = [user("2+3?")]
    for turn in range(2):
        response = await client.chat.completions.create(
            model="gpt-4o-mini", messages=messages, temperature=0.1, max_tokens=20
        )
        messages.append(response.choices[0].message)
        if response.choices[0].message.content == "5":
            return 1.0 - turn / 2
        messages.append(user("No. Again?"))
    return 0.0


def test_an_agent_of_the_openai_package_is_an_episode(endpoint):
    played = Played(endpoint, guess, "6", "5")
    sample = played.sample
    assert sample is not None
    assert (sample.reward, sample.turns, sample.finish_reason, sample.error) == (0.5, 2, "stop", None)
    assert sample.segments == ()
    assert played.said == f"6{FAMILY.end}5{FAMILY.end}"
    assert [ask.max_tokens for ask in played.asked] == [20, 20]
    assert [ask.turn for ask in played.asked] == [0, 1]
    assert played.ignored == [("temperature",)] * 2
    assert played.place.clock == ["pause", "resume"] * 2
    assert played.place.is_closed
    assert [role for role, _ in sample.transcript] == ["user", "assistant", "user", "assistant"]


async def with_tools(client: openai.AsyncOpenAI) -> float:
    messages: list[Any] = [user("Add.")]
    while True:
        stream: Any = await client.chat.completions.create(
            model="policy", messages=messages, tools=[ADD], stream=True, stop=["END"]
        )
        text, calls = "", list[Any]()
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            calls += chunk.choices[0].delta.tool_calls or []
        if not calls:
            return float(text)
        called = [
            {"id": call.id, "type": "function", "function": call.function.model_dump()} for call in calls
        ]
        messages.append({"role": "assistant", "content": text, "tool_calls": called})
        for call in calls:
            found = json.loads(call.function.arguments)["a"] + 1
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(found)})


def test_streams_tools_and_stop_texts_work(endpoint):
    played = Played(endpoint, with_tools, CALL, generated("2 END", end=False))
    sample = played.sample
    assert sample is not None
    assert (sample.reward, sample.num_tool_calls, sample.segments) == (2.0, 1, ())
    assert [ask.stop for ask in played.asked] == [("END",)] * 2
    shown = TOKENIZER.decode(sample.tokens.numpy().tolist())
    assert "<tool_response>\n2\n</tool_response>" in shown


async def at_once(client: openai.AsyncOpenAI) -> float:
    calls = [
        client.chat.completions.create(model="policy", messages=[user(text)]) for text in ("a", "b", "c")
    ]
    return float(len({found.choices[0].message.content for found in await asyncio.gather(*calls)}))


def test_calls_at_once_are_answered_in_turn_as_segments(endpoint):
    sample = Played(endpoint, at_once, "1", "2", "3").sample
    assert sample is not None
    assert sample.reward == 3.0
    assert len(sample.segments) == 2


async def impatient(client: openai.AsyncOpenAI) -> float:
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=2.0).chat.completions.create(model="policy", messages=[user("a")])
    found = await client.chat.completions.create(model="policy", messages=[user("b")])
    return float(found.choices[0].message.content or 0)


def test_what_a_client_that_left_did_not_hear_is_not_kept(endpoint):
    place = ThreadPlace(impatient)
    episode = HarnessEpisode("agent", place, endpoint, recording())

    def slow(ask: Ask) -> Generation:
        call = episode._under_way
        while "a<" in TOKENIZER.decode(ask.tokens) and call is not None and not call.is_gone:
            asyncio.run(asyncio.sleep(0.01))
        return generated("7")

    assert len(drive(episode, slow)) == 2
    sample = episode.sample()
    assert sample is not None
    assert (sample.reward, sample.turns, sample.num_sampled, sample.segments) == (7.0, 1, 2, ())


async def raising(client: openai.AsyncOpenAI) -> float:
    await client.chat.completions.create(model="policy", messages=[user("a")])
    raise KeyError("oops")


async def silent(client: openai.AsyncOpenAI) -> float:
    del client
    return 1.0


async def infinite(client: openai.AsyncOpenAI) -> float:
    await client.chat.completions.create(model="policy", messages=[user("a")])
    return float("inf")


@pytest.mark.parametrize(
    ("play", "error"),
    [
        (raising, "environment agent: KeyError: 'oops'"),
        (silent, "environment agent: it ended without a call that the policy answered"),
        (infinite, "environment agent: its reward is inf"),
    ],
)
def test_a_harness_that_fails_makes_an_error_and_no_reward(endpoint, play, error):
    played = Played(endpoint, play, *([] if play is silent else ["1"]))
    assert played.sample is not None
    assert (played.sample.error, played.sample.reward) == (error, None)
    assert played.episode.failure == "raised"
    assert played.place.is_closed


async def endless(client: openai.AsyncOpenAI) -> float:
    messages, reasons = [user("a")], []
    while "length" not in reasons:
        found = await client.chat.completions.create(model="policy", messages=messages)
        reasons.append(found.choices[0].finish_reason)
        messages += [found.choices[0].message, user("more")]
    return float(len(reasons))


def test_at_a_limit_calls_are_answered_with_length_and_the_sample_is_truncated(endpoint):
    played = Played(endpoint, endless, "1", "2", max_turns=2)
    assert played.sample is not None
    assert (played.sample.finish_reason, played.sample.turns, played.sample.reward) == ("length", 2, 3.0)
    assert played.episode.limit == "max_turns"
    assert played.place.clock == ["pause", "resume"] * 2  # It goes on while limits answer.


async def long_winded(client: openai.AsyncOpenAI) -> float:
    found = await client.chat.completions.create(model="policy", messages=[user("a" * 3000)])
    assert found.choices[0].finish_reason == "length"
    return 0.0


async def long_winded_and_strict(client: openai.AsyncOpenAI) -> float:
    await long_winded(client)
    raise KeyError("oops")


@pytest.mark.parametrize(
    ("play", "why"),
    [
        (long_winded, "it ended without a call that the policy answered; a call is "),
        (long_winded_and_strict, "KeyError: 'oops'; a call is "),
    ],
)
def test_a_first_call_that_leaves_no_room_is_an_error_that_says_so(endpoint, play, why):
    played = Played(endpoint, play)
    assert played.sample is not None
    assert (played.sample.reward, played.episode.failure) == (None, "raised")
    error = str(played.sample.error)
    assert error.startswith(f"environment agent: {why}")
    assert error.endswith(
        " tokens long, which leaves no room for an answer: actors.max_sequence_tokens is 2000"
    )


async def wrong(client: openai.AsyncOpenAI) -> float:
    with pytest.raises(openai.BadRequestError, match="n = 2 is not supported"):
        await client.chat.completions.create(model="policy", messages=[user("a")], n=2)
    await client.chat.completions.create(model="policy", messages=[user("a")])
    return 1.0


def test_a_wrong_call_is_its_own_error_and_the_harness_goes_on(endpoint):
    played = Played(endpoint, wrong, "1")
    assert played.sample is not None
    assert played.sample.reward == 1.0


def test_a_deadline_tells_the_harness_what_was_said_and_lets_it_end(endpoint):
    place = ThreadPlace(endless)
    episode = HarnessEpisode("agent", place, endpoint, recording())
    asks: list[Ask] = []
    while not asks:
        asks = list(episode.poll())
    episode.end_late({asks[0].turn: generated("cut", reason="length", end=False)})
    assert not episode.is_over
    assert drive(episode, lambda ask: generated("never")) == []
    sample = episode.sample()
    assert sample is not None
    assert (sample.finish_reason, sample.reward, sample.text) == ("length", 1.0, "cut")
    assert episode.limit


def test_a_deadline_before_anything_was_said_leaves_nothing(endpoint):
    episode = HarnessEpisode("agent", ThreadPlace(endless), endpoint, recording())
    asks: list[Ask] = []
    while not asks:
        asks = list(episode.poll())
    episode.end_late({})
    assert episode.is_over
    assert episode.sample() is None
    episode.close()


def test_a_second_deadline_ends_it(endpoint):
    async def stubborn(client: openai.AsyncOpenAI) -> float:
        await client.chat.completions.create(model="policy", messages=[user("a")])
        await asyncio.sleep(3)
        return 1.0

    episode = HarnessEpisode("agent", ThreadPlace(stubborn), endpoint, recording())
    asks: list[Ask] = []
    while not asks:
        asks = list(episode.poll())
    episode.act(0, generated("1"))
    episode.end_late({})
    assert not episode.is_over
    episode.end_late({})
    assert episode.is_over
    sample = episode.sample()
    assert sample is not None
    assert (sample.reward, sample.finish_reason, sample.error) == (None, "length", None)
    assert episode.silence == "environment agent: had not answered at actors.straggler_timeouts_s"
    episode.close()
