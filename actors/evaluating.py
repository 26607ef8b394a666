"""The evaluation items that an actor has taken: what is generated for them, and what the board is told.

    board --EvalItem--> `start`: a group in the engine --scored--> `eval_sample`: its EvalSample --`deliver`--> board

Weights stay as they are while any of them is open: an evaluation belongs to one version.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from actors.exchange import Outbox
from actors.groups import Groups, OpenGroup
from actors.prompts import PromptSet
from core.config import EvalConfig
from core.records import EvalItem, EvalSample, Sample
from core.weights.board import BoardClient


class Evaluating:
    """The open evaluation items of an actor; `len` counts them until the board is sent their results."""

    def __init__(
        self, config: EvalConfig, prompts: PromptSet, groups: Groups, board: BoardClient, outbox: Outbox
    ) -> None:
        self._config, self._prompts = config, prompts
        self._groups, self._board, self._outbox = groups, board, outbox
        self._num_open = 0

    def __len__(self) -> int:
        return self._num_open

    def start(self, items: Iterable[EvalItem]) -> None:
        """Submits the samples of these items to the engine, which has their version loaded."""
        for item in items:
            self._num_open += 1
            samples: list[Sample | None] = [None] * self._config.samples
            prompt = self._prompts[item.prompt_index]
            self._groups.start(OpenGroup(item, prompt, samples, temperature=self._config.temperature))

    def deliver(self, results: Sequence[EvalSample]) -> None:
        """Sends results to the board, again until it has them."""
        if results:
            self._num_open -= len(results)
            self._outbox.deliver(self._board.finish(msgspec.msgpack.encode(results)))


def eval_sample(item: EvalItem, group: OpenGroup, scored: Sequence[Sample]) -> EvalSample:
    """Returns the result of an evaluation item; a sample that was dropped has neither text nor reward, but an
    error.
    """
    left = iter(scored)
    dropped = Sample.one_turn((), (), version_spans=(), finish_reason="length", error=group.reason)
    samples = [dropped if sample is None else next(left) for sample in group.samples]
    return EvalSample(
        item=item,
        prompt=group.prompt.text,
        texts=tuple(sample.text for sample in samples),
        rewards=tuple(sample.reward for sample in samples),
        errors=tuple(sample.error for sample in samples),
        version_spans=tuple(sample.version_spans for sample in samples),
    )
