"""An episode that a harness leads: a user's function calls the policy as often as it likes, and returns what
that was worth.

    place.run(base_url, api_key) ..... the harness ..... returns its reward --Turn--> over
                                    |calls          ^answers
                              Door.take --> Recording --Ask--> engine --Generation--'

Calls of one harness are answered one after the other. While none is under way its engine slot serves others,
and the clock of `actors.turn_timeout_s` runs; it stands while the policy speaks. At a limit the harness is
answered with nothing and the reason "length", and given the rest of its clock to come to an end.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from actors.episode import DEADLINE, Ask, Episode, Generation
from actors.harness.chat import ApiError
from actors.harness.endpoint import LOOPBACK, MODEL, ChatCall, Endpoint
from actors.harness.recording import Dialogues, Recording
from actors.playing.played import EpisodeLimits
from core.records import Sample
from environments import EnvironmentFailure, Turn

_LOG = logging.getLogger(__name__)


class Led(Protocol):
    """An open place of a harness; `environments.pool.Place` says more of each method."""

    def run(self, base_url: str, api_key: str, model: str = "policy") -> Future[Turn]:
        """Runs it to its end."""
        ...

    def pause(self) -> None:
        """Stops its clock."""

    def resume(self) -> None:
        """Starts its clock again, from 0."""

    def close(self) -> None:
        """Frees the place."""


class HarnessEpisode(Episode):
    """An episode of the harness called `name`, begun by its constructor. `on_ignored` is told which settings
    of a request are not followed.
    """

    def __init__(
        self,
        name: str,
        place: Led,
        endpoint: Endpoint,
        recording: Recording,
        on_ignored: Callable[[Sequence[str]], None] = lambda names: None,
    ) -> None:
        super().__init__(())
        self._name, self._place, self._endpoint, self._recording = name, place, endpoint, recording
        self._on_ignored = on_ignored
        self._door = endpoint.open()
        self._calls: deque[ChatCall] = deque()
        self._under_way: ChatCall | None = None
        self._reward: float | None = None
        self._error: str | None = None
        self._since_s = time.monotonic()
        self._run = place.run(self._door.base_url, self._door.api_key, MODEL)

    @property
    def futures(self) -> Sequence[Future[Any]]:
        """Returns what it waits for besides the engine: the harness's end, or its next call."""
        return () if self._under_way is not None else (self._run, self._door.arrival)

    @property
    def is_ready(self) -> bool:
        """Returns whether the harness has come to its end, or calls."""
        waits = self._under_way is None
        return self.is_over or (waits and (self._run.done() or self._door.arrival.done()))

    @property
    def num_asked(self) -> int:
        """Returns how many questions for the engine it has had."""
        return self._recording.num_asked

    @property
    def num_sampled(self) -> int:
        """Returns how many tokens the policy has said."""
        return self._recording.num_sampled

    def poll(self) -> Sequence[Ask]:
        """Takes calls that came, and the harness's end; returns what the engine is to be asked."""
        if self.is_over or self._under_way is not None:
            return ()
        if self._run.done():
            self._end()
            return ()
        self._calls.extend(self._door.take())
        while self._calls:
            call = self._calls.popleft()
            if not call.is_gone and (ask := self._asked(call)) is not None:
                return (ask,)
        return ()

    def act(self, turn: int, generation: Generation) -> None:
        """Takes what the policy said, and tells the harness; nobody hears it whose client has left."""
        del turn
        call, self._under_way = self._under_way, None
        assert call is not None
        self._since_s = time.monotonic()
        if call.is_gone:
            self._recording.drop()
        else:
            call.answer(self._recording.answer(generation))
        self._place.resume()

    def end_late(self, said: Mapping[int, Generation]) -> None:
        """Cuts it at a deadline: the harness is told what the policy had said by then, and then nothing any
        more. It is over when that has happened before.
        """
        call = self._under_way
        for turn, generation in said.items():
            self.act(turn, generation)
        if self._under_way is not None:  # It had said nothing.
            self._recording.drop()
            self._under_way = None
            self._place.resume()
        if call is not None and not said:
            call.answer(self._recording.cut_answer())
        self.is_over = bool(self.limit) or not self._recording.num_turns
        if self.is_over and call is None:
            self.note_silence(self._name)
        self.limit = self.limit or DEADLINE

    def fail(self, text: str) -> None:
        """Ends it as an error, for what `text` says."""
        self._error, self.is_over = text, True

    def close(self) -> None:
        """Ends the harness, and refuses whatever it still calls."""
        self._endpoint.shut(self._door)
        for call in (*self._calls, self._under_way):
            if call is not None:
                call.refuse(ApiError(404, "the sample is over", code="sample_is_over"))
        self._place.close()

    def sample(self) -> Sample | None:
        """Returns what was recorded, with its error if it has one; None where the policy said nothing before
        a deadline.
        """
        recording = self._recording
        if not recording.num_turns and self._error is None:
            return None
        finish_reason = "length" if self.limit else "stop"
        return recording.trajectory().sample(
            turns=recording.num_turns,
            num_tool_calls=recording.num_tool_calls,
            finish_reason=finish_reason,
            text=recording.text,
            transcript=tuple(recording.transcript),
            reward=None if self._error is not None else self._reward,
            error=self._error,
        )

    def _asked(self, call: ChatCall) -> Ask | None:
        """Returns what the engine is asked for a call; None for one that is answered without it."""
        if call.request.ignored:
            self._on_ignored(call.request.ignored)
        try:
            ask = None if self.limit else self._recording.ask(call.request)
        except ApiError as error:
            call.refuse(error)
            return None
        if ask is None:  # The clock goes on: a harness that never stops calling comes to its end by it.
            self.limit = self.limit or self._recording.limit
            call.answer(self._recording.cut_answer())
            return None
        self._place.pause()
        self._note_wait()
        self._under_way = call
        return ask

    def _end(self) -> None:
        """Takes the harness's end: its reward, or how it failed."""
        self._note_wait()
        self.limit = self.limit or self._recording.limit
        try:
            turn = self._run.result()
            self._reward, self.attributes = turn.reward, turn.attributes
            if turn.reward is not None and not math.isfinite(turn.reward):
                raise EnvironmentFailure("raised", f"its reward is {turn.reward}")
            if not self._recording.num_turns:
                raise EnvironmentFailure("raised", "it ended without a call that the policy answered")
        except EnvironmentFailure as failure:
            self.failure, text = failure.kind, f"environment {self._name}: {failure}"
            if self._recording.too_long and not self._recording.num_turns:
                text += f"; {self._recording.too_long}"
            self.fail(text)
        self.is_over = True

    def _note_wait(self) -> None:
        self.environment_s += time.monotonic() - self._since_s
        self.num_answers += 1


class Harnesses:
    """The harnesses called `names`, with the endpoint that their episodes share."""

    def __init__(
        self, names: Collection[str], dialogues: Dialogues, limits: EpisodeLimits, host: str = LOOPBACK
    ) -> None:
        """Starts the endpoint at `host`. Raises AgroError when it does not come up."""
        self.names = frozenset(names)
        self._dialogues, self._limits = dialogues, limits
        self._endpoint = Endpoint(host)
        self._told: set[str] = set()

    def begin(self, name: str, place: Led) -> HarnessEpisode:
        """Returns a new episode in a place of the harness."""
        return HarnessEpisode(
            name, place, self._endpoint, Recording(self._dialogues, self._limits), self._tell
        )

    def close(self) -> None:
        """Ends the endpoint."""
        self._endpoint.close()

    def _tell(self, names: Sequence[str]) -> None:
        """Tells once of each setting of a request that is not followed."""
        if new := [name for name in names if name not in self._told]:
            self._told.update(new)
            _LOG.warning(
                "a harness sets %s: not followed, since the run itself says how tokens are sampled "
                "(actors.temperature, actors.top_p; in an evaluation its temperature)",
                ", ".join(new),
            )
