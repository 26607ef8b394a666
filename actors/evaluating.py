"""The evaluation items that an actor has taken: what is generated for them, and what the board is told.

    board --EvalItem--> `start`: a group in the engine --`scorer` of its suite--> `eval_sample` --> `deliver`

Weights stay as they are while any of them is open: an evaluation belongs to one version.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import msgspec

from actors.exchange import Outbox
from actors.groups import Groups, OpenGroup
from actors.prompts import PromptRow, PromptSet
from actors.scoring import Scorer, Scores
from core.config import Config
from core.config.evaluation import Suite
from core.errors import RewardError
from core.evaluation.records import EvalItem, EvalSample
from core.records import Sample
from core.weights.board import BoardClient
from rewards.scoring import Scored


class Evaluating:
    """The open evaluation items of an actor; `len` counts them until the board is sent their results.

    Suites that are scored as the run is share its `scorer`; others have one of their own, whose workers start
    with their first item, beside generation.
    """

    def __init__(
        self,
        config: Config,
        prompts: Mapping[str, PromptSet],
        groups: Groups,
        board: BoardClient,
        outbox: Outbox,
        scorer: Scorer,
    ) -> None:
        self._config, self._prompts = config, prompts
        self._suites = {suite.name: suite for suite in config.suites}
        self._groups, self._board, self._outbox = groups, board, outbox
        self._run_scorer = scorer
        self._scorers: dict[str, LateScorer] = {}
        self._open: dict[EvalItem, int] = {}  # How many samples each has.

    def __len__(self) -> int:
        return len(self._open)

    @property
    def room(self) -> int:
        """Returns how many samples more are worth asking for: 0, or at least a quarter of the slots.

        Samples of evaluations fill the slots at most once: behind them training samples queue.
        """
        slots = self._config.actors.slots
        free = slots - sum(self._open.values())
        return free if 4 * free >= slots else 0

    def start(self, items: Iterable[EvalItem]) -> None:
        """Submits the samples of these items to the engine, which has their version loaded. What is under way
        already, for a board before this one, is for this one too.
        """
        for item in items:
            if item in self._open:
                continue
            suite = self._suites[item.suite]
            self._open[item] = suite.samples
            self._scorer_of(suite)  # Its workers start now.
            samples: list[Sample | None] = [None] * suite.samples
            prompt = self._prompts[suite.name][item.prompt_index]
            self._groups.start(OpenGroup(item, prompt, samples, temperature=suite.temperature))

    def scorer(self, group: OpenGroup) -> Scores:
        """Returns who scores the samples of a group: of one to train on the run's scorer."""
        if isinstance(group.item, EvalItem):
            return self._scorer_of(self._suites[group.item.suite])
        return self._run_scorer

    def deliver(self, results: Sequence[EvalSample]) -> None:
        """Sends results to the board, again until it has them."""
        if results:
            for result in results:
                del self._open[result.item]
            self._outbox.deliver(self._board.finish(msgspec.msgpack.encode(results)))

    def close(self) -> None:
        """Ends the workers that suites have of their own."""
        for scorer in self._scorers.values():
            scorer.close()

    def _scorer_of(self, suite: Suite) -> Scores:
        rewards = self._config.rewards
        if not suite.has_own_functions:
            return self._run_scorer
        key = repr(suite.functions)
        if key not in self._scorers:
            own = rewards.model_copy(update={"functions": dict(suite.functions)})
            self._scorers[key] = LateScorer(partial(Scorer, own, self._run_scorer.models_for))
        return self._scorers[key]


class LateScorer:
    """A scorer that is made in a thread of its own, so that nobody waits for its workers; what is asked
    before it is there is asked then.
    """

    def __init__(self, make: Callable[[], Scorer]) -> None:
        """`make` may raise RewardError: whatever is asked is then an error, which says so."""
        self._made: Future[Scorer] = Future()
        threading.Thread(target=self._make, args=(make,), name="suite-scorer", daemon=True).start()

    def score(
        self, prompt: PromptRow, samples: Sequence[Sample], attributes: Sequence[bytes | None] = ()
    ) -> Future[list[Scored]]:
        """Returns what `Scorer.score` does."""
        scored: Future[list[Scored]] = Future()

        def ask(made: Future[Scorer]) -> None:
            try:
                asked = made.result().score(prompt, samples, attributes)
            except RewardError as error:
                scored.set_result([Scored(error=str(error))] * len(samples))
            else:
                asked.add_done_callback(lambda done: scored.set_result(done.result()))

        self._made.add_done_callback(ask)
        return scored

    def close(self) -> None:
        """Ends the scorer's processes, as soon as it is there."""
        self._made.add_done_callback(_close)

    def _make(self, make: Callable[[], Scorer]) -> None:
        try:
            self._made.set_result(make())
        except RewardError as error:
            self._made.set_exception(error)


def _close(made: Future[Scorer]) -> None:
    if made.exception() is None:
        made.result().close()


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
        lengths=tuple(sample.num_sampled for sample in samples),
        truncated=tuple(sample.finish_reason == "length" for sample in samples),
        answer_ids=tuple(sample.answer_id for sample in samples),
        shown=samples[0].transcript,
        tool_calls_shown=samples[0].num_tool_calls,
    )
