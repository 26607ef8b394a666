"""A simulated engine behind the real actor loop: the interface of actors.engine.Engine, without a model.

    class SimulatedActor(RolloutActor):
        def _make_engine(self):
            return FakeEngine(self._config.actors, step_s=0.01, num_tokens=(50, 200))

Every request with a slot gets one token a step. A sample is a function of its seed alone: its length, and its
text, digits.
"""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.engine import PromptRefused
from actors.episode import Generation
from core.arrays import Float32s, Int32s
from core.config import ActorsConfig
from core.errors import SnapshotError
from core.records import VersionSpan
from core.weights.snapshots import checksum

EOS = 1
FIRST_DIGIT = 3


def _digits(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(10), k=count)


@dataclass
class _Asked:
    request_id: str
    tokens: tuple[int, ...]
    seed: int
    length: int
    ends_with: str  # What the last token is: "EOS", the end of a "stop" text, or one that a limit "cut".
    version_spans: list[VersionSpan] = field(default_factory=list)
    started_s: float = 0.0

    @classmethod
    def of(
        cls, request_id: str, tokens: Sequence[int], seed: int, wanted: int, limit: int, stop: Sequence[str]
    ) -> _Asked:
        said = "".join(map(str, _digits(seed, wanted - 1))) if stop else ""
        stops = [said.index(text) + len(text) for text in stop if text in said]
        length, ends_with = min([(wanted, "EOS"), (limit, "cut"), *((end, "stop") for end in stops)])
        return cls(request_id, tuple(tokens), seed, length, ends_with)

    @property
    def num_tokens(self) -> int:
        return self.version_spans[-1].end if self.version_spans else 0

    def grow(self, version: int) -> None:
        start, count = self.num_tokens, self.num_tokens
        if self.version_spans and self.version_spans[-1].version == version:
            start = self.version_spans.pop().start
        self.version_spans.append(VersionSpan(version, start, count + 1))

    def generation(self) -> Generation:
        digits = _digits(self.seed, self.num_tokens)
        is_finished = self.num_tokens == self.length and self.ends_with != "cut"
        token_ids = [FIRST_DIGIT + digit for digit in digits]
        if is_ended := is_finished and self.ends_with == "EOS":
            token_ids[-1] = EOS
        return Generation(
            tokens=Int32s.of(token_ids),
            logprobs=Float32s.of([-2.3] * len(token_ids)),
            version_spans=tuple(self.version_spans),
            finish_reason="stop" if is_finished else "length",
            text="".join(map(str, digits[: self.num_tokens - is_ended])),
        )


class FakeEngine:
    """`slots` of `config`; each step takes `step_s`, each update `load_s` seconds.

    num_tokens   length of a sample: the bounds of a uniform draw, or a function of its seed
    refuses      why a prompt is not taken, "" when it is
    submitted    request id and seed of everything submitted so far; `loaded`: the versions loaded
    transfer     takes weights that are pushed: one of vLLM's WeightTransferEngines, whose model is a `PushedWeights`
    """

    def __init__(
        self,
        config: ActorsConfig,
        *,
        step_s: float = 0.0,
        num_tokens: tuple[int, int] | Callable[[int], int] = (4, 4),
        load_s: float = 0.0,
        refuses: Callable[[tuple[int, ...]], str] = lambda tokens: "",
        version: int = -1,
    ) -> None:
        self._config, self._step_s, self._load_s, self._refuses = config, step_s, load_s, refuses
        self._length = (
            num_tokens if callable(num_tokens) else lambda seed: random.Random(seed).randint(*num_tokens)
        )
        self._waiting: deque[_Asked] = deque()
        self._running: dict[str, _Asked] = {}
        self.version = version
        self.submitted: list[tuple[str, int]] = []
        self.loaded: list[int] = []
        self.transfer: Any = None
        self.is_receiving = False

    @property
    def num_unfinished(self) -> int:
        """Returns the number of requests that are submitted and not finished."""
        return len(self._waiting) + len(self._running)

    @property
    def num_tokens_under_way(self) -> int:
        """Returns the tokens generated so far by these."""
        return sum(request.num_tokens for request in self._running.values())

    def submit(
        self,
        request_id: str,
        tokens: Sequence[int],
        *,
        seed: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        """Queues a request, whose length its seed decides, unless it says one of `stop` or is cut before."""
        del temperature
        known = seed or 0
        self.submitted.append((request_id, known))
        limit = self._config.max_new_tokens if max_tokens is None else max_tokens
        self._waiting.append(_Asked.of(request_id, tokens, known, self._length(known), limit, stop))

    def step(self) -> list[tuple[str, Generation]]:
        """Gives every running request one token, and returns those that finished."""
        while self._waiting and len(self._running) < self._config.slots:
            request = self._waiting.popleft()
            if reason := self._refuses(request.tokens):
                refused = PromptRefused(reason)
                refused.request_id = request.request_id
                raise refused
            request.started_s = time.monotonic()
            self._running[request.request_id] = request
        time.sleep(self._step_s)
        for request in self._running.values():
            request.grow(self.version)
        done = [request for request in self._running.values() if request.num_tokens == request.length]
        for request in done:
            del self._running[request.request_id]
        return [(request.request_id, request.generation()) for request in done]

    def overdue(self, timeout_s: float) -> list[str]:
        """Returns the requests that have run for longer than `timeout_s`."""
        deadline_s = time.monotonic() - timeout_s
        return [
            key
            for key, _ in itertools.takewhile(
                lambda entry: entry[1].started_s < deadline_s, self._running.items()
            )
        ]

    def truncate(self, request_ids: list[str]) -> list[tuple[str, Generation]]:
        """Ends requests and returns what they have."""
        ended = [self._running[request_id] for request_id in request_ids if request_id in self._running]
        self.abort(request_ids)
        return [(request.request_id, request.generation()) for request in ended if request.num_tokens]

    def abort(self, request_ids: list[str]) -> None:
        """Drops requests."""
        dropped = set(request_ids)
        self._waiting = deque(request for request in self._waiting if request.request_id not in dropped)
        self._running = {key: request for key, request in self._running.items() if key not in dropped}

    def load_weights(self, version: int, weights: Iterable[tuple[str, Any]]) -> None:
        """Notes the version; the weights themselves are read and forgotten."""
        list(weights)
        time.sleep(self._load_s)
        self.version = version
        self.loaded.append(version)

    def connect_transfer(self, init_info: dict[str, Any]) -> Any:
        """Joins the group that `init_info` describes, and returns the connection."""
        connection = copy.copy(self.transfer)
        connection.init_transfer_engine(connection.parse_init_info(init_info))
        return connection

    def use_connection(self, connection: Any) -> None:
        """Lets the next transfers arrive over this connection."""
        self.transfer.shutdown()
        self.transfer = connection

    def drop_connection(self, connection: Any) -> None:
        """Leaves a group that will not be used."""
        connection.shutdown()

    def start_transfer(self) -> None:
        """Begins a transfer."""
        self.is_receiving = False

    def update_transfer(self, update_info: dict[str, Any]) -> None:
        """Receives a part of a transfer."""
        self.is_receiving = True
        self.transfer.update_weights(update_info)

    def finish_transfer(self, version: int, probes: Mapping[str, str]) -> int:
        """Checks the probes, notes the version, and returns how many there were. Raises SnapshotError."""
        weights = self.transfer.model.weights
        if damaged := [name for name, value in probes.items() if checksum(weights[name]) != value]:
            raise SnapshotError(f"version {version} arrived damaged: {damaged[0]}")
        self.version = version
        self.loaded.append(version)
        return len(probes)

    def undo_transfer(self) -> None:
        """Goes back to the weights before; to none where new ones had begun to arrive."""
        if self.is_receiving:
            self.version = -1

    def abort_transfer(self) -> None:
        """Ends what is being received."""
        self.transfer.shutdown()


class PushedWeights:
    """A model for vLLM's transfer engines: keeps what it is given."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}

    def load_weights(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Keeps what vLLM would load."""
        self.weights |= {name: tensor.clone() for name, tensor in pairs}
