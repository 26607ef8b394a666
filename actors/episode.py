"""A sample that is being generated: its environment, what the policy has seen and said so far, and what the
engine is asked next.

    environment --observation--> `observe`: tokens, not sampled --+--> `tokens` --engine--> Generation
         ^                                                        |                             |
         `--------------- text ----------------- `act`: tokens, sampled, never tokenised again <-'

Tokens in, tokens out. Prompts are rendered and tokenised when they are loaded, which is an environment's
`reset`. An environment that is not done after its first turn has its observation tokenised as the chat
template renders it after the turns so far, given to `observe`, and the request submitted again:
actors/groups.py names the place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from core.arrays import Bits, Float32s, Int32s
from core.records import Sample, VersionSpan
from environments import Environment, Turn


class Generation(NamedTuple):
    """The tokens that an engine sampled for one request. `version_spans` count them from 0; `text` is what
    they say.
    """

    tokens: Int32s
    logprobs: Float32s
    version_spans: tuple[VersionSpan, ...]
    finish_reason: str
    text: str


class Episode:
    """One open sample. Example, of one turn: `Episode(OneTurn(), prompt.token_ids)`, then `act(generation)`,
    then `sample`.
    """

    def __init__(self, environment: Environment, first: Sequence[int]) -> None:
        """Begins with `first`, the tokens of what the policy sees first."""
        self._environment = environment
        self._pieces: list[Int32s] = []
        self._lengths: list[int] = []  # Of what was not sampled and what was, in turn: the runs of the mask.
        self._logprobs: list[Float32s] = []
        self._spans: list[VersionSpan] = []
        self._texts: list[str] = []
        self._rewards: list[float] = []
        self._finish_reason = ""
        self.observe(first)

    @property
    def tokens(self) -> list[int]:
        """Returns all tokens so far, from which the engine is to go on."""
        return [token for piece in self._pieces for token in piece.numpy().tolist()]

    def observe(self, tokens: Sequence[int]) -> None:
        """Appends the tokens of what the policy is shown; they are not sampled."""
        self._append(Int32s.of(tokens), is_sampled=False)

    def act(self, generation: Generation) -> Turn:
        """Appends what the policy said, and lets the environment answer to it. Raises whatever the
        environment does.
        """
        start = self._num_sampled
        self._append(generation.tokens, is_sampled=True)
        self._logprobs.append(generation.logprobs)
        for span in generation.version_spans:
            self._spans.append(VersionSpan(span.version, start + span.start, start + span.end))
        self._texts.append(generation.text)
        self._finish_reason = generation.finish_reason
        turn = self._environment.step(generation.text)
        if turn.reward is not None:
            self._rewards.append(turn.reward)
        return turn

    def sample(self) -> Sample:
        """Returns the trajectory as it is now; without a reward where no turn had one."""
        return Sample(
            tokens=Int32s.joined(self._pieces),
            is_sampled=Bits.runs(*self._lengths),
            logprobs=Float32s.joined(self._logprobs),
            version_spans=tuple(self._spans),
            turns=len(self._texts),
            finish_reason=self._finish_reason,
            text=next(reversed(self._texts), ""),
            reward=math.fsum(self._rewards) if self._rewards else None,
        )

    @property
    def _num_sampled(self) -> int:
        return sum(self._lengths[1::2])

    def _append(self, tokens: Int32s, *, is_sampled: bool) -> None:
        self._pieces.append(tokens)
        if len(self._lengths) % 2 == is_sampled:  # The next run is one of this kind.
            self._lengths.append(len(tokens))
        else:
            self._lengths[-1] += len(tokens)
