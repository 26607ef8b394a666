"""What an engine has of its requests: those that wait for a slot, and what was sampled for those that have
one.

Nothing of vLLM is imported here. Its own bookkeeping (an output processor between the caller and its core)
makes objects for each token that only a server needs, a large part of what a short answer costs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from actors.episode import Generation
from core.arrays import Float32s, Int32s
from core.records import VersionSpan


class Options(NamedTuple):
    """How a request is sampled, as `Engine.submit` says: equal for the samples of a group."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]


class WaitingRequest(NamedTuple):
    """A request that has no slot yet."""

    request_id: str
    tokens: Sequence[int]
    seed: int | None
    options: Options


class RunningRequest:
    """A request that has a slot since `started_s`, and what was sampled for it so far, a token with its
    log-prob after another.

    `stops` is vLLM's detokenizer of this request, which finds stop texts; None where there are none to find.
    """

    __slots__ = ("_logprobs", "_starts", "_stops", "request_id", "started_s", "tokens")

    def __init__(self, request_id: str, stops: Any = None) -> None:
        self.request_id, self.started_s, self._stops = request_id, time.monotonic(), stops
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._starts: list[tuple[int, int]] = []  # A version, and the first token by it.

    def take(self, output: Any, version: int) -> str:
        """Takes what a step by the weights of `version` gave (vLLM's EngineCoreOutput); returns why the
        request is over, empty while it is not.
        """
        new: list[int] = output.new_token_ids
        reason = "" if output.finish_reason is None else str(output.finish_reason)
        if not new:
            return reason
        if not self._starts or self._starts[-1][0] != version:
            self._starts.append((version, len(self.tokens)))
        self.tokens += new
        self._logprobs += output.new_logprobs.logprobs[:, 0].tolist()  # The first column is what was sampled.
        if self._stops is not None and self._stops.update(new, reason == "stop"):
            return "stop"
        return reason

    def generation(self, finish_reason: str, text: str) -> Generation:
        """Returns all of it; `text` is what the tokens say."""
        # Where nothing was sampled there is no start.
        ends = [*(start for _, start in self._starts[1:]), len(self.tokens)]
        spans = [
            VersionSpan(version, start, end)
            for (version, start), end in zip(self._starts, ends, strict=False)
        ]
        return Generation(
            Int32s.of(self.tokens), Float32s.of(self._logprobs), tuple(spans), finish_reason, text
        )
