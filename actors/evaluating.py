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
from actors.reward_model.asked import ModelsFor, no_models
from actors.scoring import Scorer, Scores
from core.config import Config
from core.config.environments import all_paths
from core.config.evaluation import Suite
from core.errors import RewardError
from core.evaluation.records import EvalItem, EvalSample
from core.records import Sample
from core.weights.board import BoardClient
from rewards.scoring import Scored, shorten


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
        self._scorers = SuiteScorers(config, scorer)
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
            self._scorers.of(suite.name)
            self._groups.start(open_item(item, suite, self._prompts[suite.name]))

    def scorer(self, group: OpenGroup) -> Scores:
        """Returns who scores the samples of a group: of one to train on the run's scorer."""
        item = group.item
        return self._scorers.of(item.suite) if isinstance(item, EvalItem) else self._run_scorer

    def deliver(self, results: Sequence[EvalSample]) -> None:
        """Sends results to the board, again until it has them."""
        if results:
            for result in results:
                del self._open[result.item]
            self._outbox.deliver(self._board.finish(msgspec.msgpack.encode(results)))

    def close(self) -> None:
        """Ends the workers that suites have of their own."""
        self._scorers.close()


class SuiteScorers:
    """The scorers of suites: `run_scorer` for one that is scored as the run is, else one of its own, which is
    made when it is first asked for. Suites with the same functions share one.
    """

    def __init__(
        self, config: Config, run_scorer: Scorer | None = None, models_for: ModelsFor = no_models
    ) -> None:
        """Without `run_scorer` one is made for the suites that are scored as the run is, too; `models_for`
        then says who asks reward models.
        """
        self._config, self._run_scorer = config, run_scorer
        self._models_for = models_for if run_scorer is None else run_scorer.models_for
        self._suites = {suite.name: suite for suite in config.suites}
        self._made: dict[str, LateScorer] = {}

    def of(self, name: str) -> Scores:
        """Returns the scorer of a suite; its workers start now."""
        suite = self._suites[name]
        if self._run_scorer is not None and not suite.has_own_functions:
            return self._run_scorer
        key = repr(suite.functions)
        if key not in self._made:
            rewards = self._config.rewards.model_copy(update={"functions": dict(suite.functions)})
            self._made[key] = LateScorer(partial(Scorer, rewards, self._models_for, all_paths(self._config)))
        return self._made[key]

    def close(self) -> None:
        """Ends the workers of those it made."""
        for scorer in self._made.values():
            scorer.close()


class LateScorer:
    """A scorer that is made in a thread of its own, so that nobody waits for its workers; what is asked
    before it is there is asked then.
    """

    def __init__(self, make: Callable[[], Scorer]) -> None:
        """`make` may raise: whatever is asked is then an error, which says so."""
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
            except Exception as error:  # noqa: BLE001 - whatever it is, somebody waits for the future
                told = str(error) if isinstance(error, RewardError) else f"{type(error).__name__}: {error}"
                scored.set_result([Scored(error=shorten(told))] * len(samples))
            else:
                asked.add_done_callback(lambda done: scored.set_result(done.result()))

        self._made.add_done_callback(ask)
        return scored

    @property
    def counters(self) -> dict[str, float]:
        """Returns the scorer's totals so far."""
        is_there = self._made.done() and self._made.exception() is None
        return self._made.result().counters if is_there else {}

    def close(self) -> None:
        """Ends the scorer's processes, as soon as it is there."""
        self._made.add_done_callback(_close)

    def _make(self, make: Callable[[], Scorer]) -> None:
        try:
            made = make()
        except Exception as error:  # noqa: BLE001 - whoever asks is told
            self._made.set_exception(error)
        else:
            self._made.set_result(made)


def _close(made: Future[Scorer]) -> None:
    if made.exception() is None:
        made.result().close()


def open_item(item: EvalItem, suite: Suite, prompts: PromptSet) -> OpenGroup:
    """Returns the group of an item, with nothing generated yet."""
    samples: list[Sample | None] = [None] * suite.samples
    return OpenGroup(item, prompts[item.prompt_index], samples, temperature=suite.temperature)


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
