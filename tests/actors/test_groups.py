"""Groups on an engine that finishes requests while weights are awaited, as one on a GPU does: vLLM's core is
faked, with a pass under way between two steps.
"""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from actors.engine import Engine, PromptRefused
from actors.groups import Groups, OpenGroup
from actors.prompts import PromptRow
from actors.requests import RunningRequest, WaitingRequest
from core.config import ActorsConfig
from core.records import WorkItem
from tests.support.said import Said

WEIGHTS = [("w", torch.zeros(1))]
FIRST_TOKEN = 10
"""A token says which weights it was sampled by: this one those of version 0."""


class Core:
    """vLLM's core as `step_with_batch_queue` runs it: a step begins a pass and returns the one before.
    Request `key-number` ends with its `lengths[number]`th token.
    """

    def __init__(self, lengths: list[int]) -> None:
        self.batch_queue: collections.deque[tuple[Any, Any]] = collections.deque()
        self.weights = self.version = 0
        self._lengths = lengths
        self._given: dict[str, int] = {}  # Tokens of passes begun, by request.
        self._is_paused = False

    def pause_scheduler(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        self._is_paused = True

    def resume_scheduler(self) -> None:
        self._is_paused = False

    def add_request(self, name: str) -> None:
        self._given[name] = 0

    def abort_requests(self, names: list[str]) -> None:
        for name in names:
            self._given.pop(name, None)

    def get_output(self) -> Any:
        names = [] if self._is_paused else [name for name in self._given if self._left(name)]
        for name in names:
            self._given[name] += 1
        outputs = [self._output(name) for name in names]
        self.batch_queue.append((outputs, SimpleNamespace(total_num_scheduled_tokens=len(names))))
        if len(self.batch_queue) < 2 and names:
            return SimpleNamespace(outputs=[], weight_version=str(self.version))
        # The version is that of the moment in which the pass is over.
        return SimpleNamespace(outputs=self.batch_queue.popleft()[0], weight_version=str(self.version))

    def _left(self, name: str) -> int:
        return self._lengths[int(name.split("-")[2])] - self._given[name]

    def _output(self, name: str) -> Any:
        is_over = not self._left(name)
        return SimpleNamespace(
            request_id=name,
            new_token_ids=[FIRST_TOKEN + self.weights],
            new_logprobs=SimpleNamespace(logprobs=np.full((1, 1), -0.5, np.float32)),
            finish_reason="stop" if is_over else None,
            finished=is_over,
        )


class PipedEngine(Engine):
    """The engine's own books over such a core."""

    def __init__(self, config: ActorsConfig, lengths: list[int]) -> None:
        self.core, self.refuses = Core(lengths), False
        self._config, self._adapters, self.version = config, None, 0
        self._waiting, self._running = collections.deque(), {}
        self._drained, self._names = [], {}
        self._num_started = self._num_updates = 0
        self._detokenizer: Any = SimpleNamespace(text=lambda tokens: "said")
        self._engine = SimpleNamespace(
            engine_core=SimpleNamespace(
                engine_core=self.core,
                get_output=self.core.get_output,
                abort_requests=self.core.abort_requests,
            ),
            collective_rpc=self._load,
            set_weight_version=lambda version: setattr(self.core, "version", int(version)),
        )

    def _load(self, method: str, args: Any) -> list[list[str]]:
        assert method == "agro_load"
        self.core.weights += 1
        return [[]]

    def _start(self, waiting: WaitingRequest) -> None:
        if self.refuses:
            raise PromptRefused("too long")
        self._num_started += 1
        name = f"{waiting.request_id}-{self._num_started}"
        self.core.add_request(name)
        self._names[waiting.request_id] = name
        self._running[name] = RunningRequest(waiting.request_id)


class Bench:
    """One group, updated once while the last pass of its first sample was under way."""

    def __init__(self, lengths: list[int], **settings: Any) -> None:
        self.now_s = 0.0
        config = ActorsConfig(group_size=len(lengths), **{"slots": 4, **settings})
        self.engine = PipedEngine(config, lengths)
        self.groups = Groups(self.engine, config, clock=lambda: self.now_s)
        missing = [None] * len(lengths)
        self.groups.start(
            OpenGroup(WorkItem(0, 0, 0), PromptRow(0, "q", (1,), {}), [*missing], temperature=1.0)
        )
        assert self.groups.step() == []
        assert self.groups.update(1, WEIGHTS)

    def finish(self) -> list[OpenGroup]:
        """Steps until the engine has nothing any more."""
        ended = []
        for _ in range(20):
            if not self.engine.num_unfinished:
                break
            ended += self.groups.step()
        assert not self.engine.num_unfinished
        assert not len(self.groups)
        return ended


def said(group: OpenGroup) -> list[tuple[list[int], str] | None]:
    """Sampled tokens and finish reason by sample; each token must be of the weights that its label names."""
    found: list[tuple[list[int], str] | None] = []
    for sample in group.samples:
        if sample is None:
            found.append(None)
            continue
        generated = Said.of(sample)
        labels = [span.version for span in generated.version_spans for _ in range(span.start, span.end)]
        assert [FIRST_TOKEN + version for version in labels] == list(generated.token_ids)
        found.append((list(generated.token_ids), generated.finish_reason))
    return found


def test_what_finished_while_weights_were_awaited_is_returned_by_the_next_step():
    bench = Bench([1, 3])
    (group,) = bench.finish()
    assert said(group) == [([10], "stop"), ([10, 11, 11], "stop")]


def test_an_update_that_aborts_starts_again_what_had_finished_in_the_pass_under_way():
    bench = Bench([1, 3], on_update="abort")
    assert bench.groups.counters["samples_restarted"] == 2
    (group,) = bench.finish()
    assert said(group) == [([11], "stop"), ([11, 11, 11], "stop")]


def test_a_deadline_takes_what_had_finished_in_the_pass_under_way_as_it_is():
    bench = Bench([1, 3], straggler_timeouts_s=(None, 10.0))
    bench.now_s = 11.0
    (group,) = bench.finish()
    assert said(group) == [([10], "stop"), ([10], "length")]


def test_a_refusal_drops_what_had_finished_in_the_pass_under_way_with_its_group():
    bench = Bench([1, 3, 3], slots=2)
    bench.engine.refuses = True
    (group,) = bench.finish()
    assert said(group) == [None, None, None]
    assert group.reason == "too long"


def test_an_actor_that_retires_has_groups_until_what_finished_is_returned():
    bench = Bench([1, 1])
    assert len(bench.groups) == 1
    assert bench.engine.num_unfinished == 2
    (group,) = bench.groups.step()
    assert said(group) == [([10], "stop")] * 2
    assert (len(bench.groups), bench.engine.num_unfinished) == (0, 0)
