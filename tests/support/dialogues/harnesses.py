"""Harnesses in tests: a place that plays one in a thread, a tokenizer of bytes with a real chat template, and
an engine that says what it is told.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeAlias

import openai

from actors.episode import Ask, Generation
from actors.harness.episode import HarnessEpisode
from actors.harness.recording import Dialogues, Recording
from actors.playing.played import EpisodeLimits
from core.arrays import Float32s, Int32s
from core.records import VersionSpan
from environments import EnvironmentFailure, Turn
from tests.support.dialogues.chat_templates import FAMILIES
from tests.support.tokenizers_made import byte_tokenizer

FAMILY = FAMILIES["qwen25"]
TOKENIZER: Any = byte_tokenizer(*FAMILY.special, eos=FAMILY.eos, template=FAMILY.template)
END: int = TOKENIZER.convert_tokens_to_ids(FAMILY.end)
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'

Play: TypeAlias = Callable[[openai.AsyncOpenAI], Awaitable[float]]


def ids(text: str) -> list[int]:
    """The tokens of a text."""
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def generated(text: str, *, reason: str = "stop", version: int = 0, end: bool = True) -> Generation:
    """What an engine samples that says `text`, and with `end` the end token."""
    tokens = ids(text) + [END] * end
    return Generation(
        Int32s.of(tokens),
        Float32s.of([-float(place) for place in range(len(tokens))]),
        (VersionSpan(version, 0, len(tokens)),),
        reason,
        text,
    )


def recording(max_turns: int = 8, max_new_tokens: int = 100, max_sequence_tokens: int = 2_000) -> Recording:
    """A recording of the tokenizer here."""
    limits = EpisodeLimits(max_turns, max_new_tokens, max_sequence_tokens)
    return Recording(Dialogues(TOKENIZER, end_ids=[END]), limits)


class ThreadPlace:
    """A place whose harness runs in a thread; `clock` has what was told to its clock."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self.clock: list[str] = []
        self.is_closed = False
        self._future: Future[Turn] = Future()

    def run(self, base_url: str, api_key: str, model: str = "policy") -> Future[Turn]:
        """Runs it to its end."""
        assert model == "policy"

        async def play() -> float:
            async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
                return await self._play(client)

        def work() -> None:
            try:
                self._future.set_result(Turn("", done=True, reward=asyncio.run(play())))
            except Exception as error:  # noqa: BLE001 -- whatever the harness raises
                failure = EnvironmentFailure("raised", f"{type(error).__name__}: {error}")
                self._future.set_exception(failure)

        threading.Thread(target=work, daemon=True).start()
        return self._future

    def pause(self) -> None:
        """Notes it."""
        self.clock.append("pause")

    def resume(self) -> None:
        """Notes it."""
        self.clock.append("resume")

    def close(self) -> None:
        """Notes it."""
        self.is_closed = True


def drive(
    episode: HarnessEpisode, reply: Callable[[Ask], Generation], timeout_s: float = 60.0
) -> Sequence[Ask]:
    """Plays an episode to its end as an actor's loop does; returns what the engine was asked."""
    deadline_s = time.monotonic() + timeout_s
    asked: list[Ask] = []
    asks = list(episode.poll())
    while not episode.is_over:
        assert time.monotonic() < deadline_s, f"not over after {timeout_s} s, with {len(asked)} questions"
        for ask in asks:
            asked.append(ask)
            episode.act(ask.turn, reply(ask))
        if not asks and episode.futures:
            wait(episode.futures, 0.1, "FIRST_COMPLETED")
        asks = list(episode.poll())
    episode.close()
    return asked
