"""What reward models say of samples: each is asked once a group, beside the reward functions.

samples --conversation_of--> messages --RewardModelClient--> a number each
                                               |-- no answer in time, a dead model, no score: errors
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

from actors.prompts import PromptRow, row_messages
from actors.reward_model import RewardModel, RewardModelClient, Value
from core.calls import Call, Calls, Local
from core.errors import AgroError, RewardError
from core.records import Sample
from rewards.hosted import HostedModel, hosted_models, path_of
from rewards.scoring import shorten

T = TypeVar("T")


class AskedModel(NamedTuple):
    """A reward model that was asked about a group: its name in the config, its weight, what it will say."""

    name: str
    weight: float
    values: Future[list[Value]]


class ModelRewards:
    """Asks the reward models among `functions` (weights by name).

    num_timeouts   samples for which a model gave no answer in time
    num_failures   samples for which it could not be asked: it died, or raised
    """

    def __init__(
        self,
        functions: Mapping[str, float],
        clients: Mapping[str, RewardModelClient],
        calls: Calls | None,
        system_prompt: str | None = None,
    ) -> None:
        """`system_prompt` is `data.system_prompt`. Raises RewardError for a model that is not among
        `clients`; without any, `calls` may be None.
        """
        self._system_prompt = system_prompt
        self._models = hosted_models(functions)
        if missing := [name for name in self._models if name not in clients]:
            raise RewardError(f"reward function {missing[0]!r}: its model is not hosted here, as in a run")
        self._weights, self._clients, self._calls = functions, clients, calls
        self._lock = threading.Lock()
        self.num_timeouts = self.num_failures = 0

    def __len__(self) -> int:
        return len(self._models)

    def ask(self, prompt: PromptRow, samples: Sequence[Sample]) -> list[AskedModel]:
        """Asks every model. The values are per sample, in order: its reward, not weighted, or why there is
        none. No future has an exception, and each ends within the model's `timeout_s`.
        """
        conversations = [whole_conversation(prompt, sample, self._system_prompt) for sample in samples]
        return [
            AskedModel(name, self._weights[name], self._ask(name, conversations, model.timeout_s))
            for name, model in self._models.items()
        ]

    def _ask(
        self, name: str, conversations: list[list[dict[str, Any]]], timeout_s: float
    ) -> Future[list[Value]]:
        client, num = self._clients[name], len(conversations)

        async def answer() -> list[Value]:
            try:
                async with asyncio.timeout(timeout_s):
                    values = await client.score(conversations)
            except TimeoutError:
                self._count(num, is_late=True)
                return [f"{name} did not answer within {timeout_s:g} s (timeout_s behind its ?)"] * num
            except AgroError as error:
                self._count(num, is_late=False)
                return [shorten(f"{name} failed: {' '.join(str(error).split())}")] * num
            if len(values) != num:
                return [f"{name} gave {len(values)} values for {num} conversations"] * num
            return [value if isinstance(value, float) else shorten(f"{name}: {value}") for value in values]

        assert self._calls is not None
        return self._calls.start(Call(client.who, "score", answer), math.inf).future

    def _count(self, num_samples: int, *, is_late: bool) -> None:
        with self._lock:
            if is_late:
                self.num_timeouts += num_samples
            else:
                self.num_failures += num_samples


ModelsFor: TypeAlias = Callable[[Mapping[str, float]], ModelRewards]
"""Gives who asks the reward models among functions (weights by name)."""


def no_models(functions: Mapping[str, float]) -> ModelRewards:
    """Returns who asks no reward model. Raises RewardError where `functions` name one."""
    return ModelRewards(functions, {}, None)


def hosted_here(
    models: Mapping[str, HostedModel], timeout_s: float, system_prompt: str | None = None
) -> ModelsFor:
    """Returns who asks `models` where there is no run to host them: they are loaded in this process. Raises
    RewardError for what is no classifier; `timeout_s` is as in `Calls`.
    """
    clients = {
        name: RewardModelClient(
            Local(RewardModel(name, model, path_of(name))), f"the reward model {path_of(name)}"
        )
        for name, model in models.items()
    }
    return partial(
        ModelRewards,
        clients=clients,
        calls=Calls(timeout_s) if clients else None,
        system_prompt=system_prompt,
    )


def whole_conversation(
    prompt: PromptRow, sample: Sample, system_prompt: str | None = None
) -> list[dict[str, Any]]:
    """Returns what was said, as messages: the system prompt, the prompt's, then what the sample says, and is
    told.
    """
    said = sample.transcript or (("assistant", sample.text),)
    return [*_asked(prompt, system_prompt), *({"role": role, "content": text} for role, text in said)]


def gathered(futures: Sequence[Future[T]]) -> Future[list[T]]:
    """Returns a future of all their results, in order, which is done when the last of them is; it has the
    exception of one that has any.
    """
    done: Future[list[T]] = Future()
    lock, left = threading.Lock(), len(futures)

    def look(_: Future[T]) -> None:
        nonlocal left
        with lock:
            left -= 1
            is_last = not left
        if not is_last:
            return
        try:
            results = [future.result() for future in futures]
        except Exception as error:  # noqa: BLE001 - handed on: a callback's exception would be lost
            done.set_exception(error)
        else:
            done.set_result(results)

    if not futures:
        done.set_result([])
    for future in futures:
        future.add_done_callback(look)
    return done


def _asked(prompt: PromptRow, system_prompt: str | None) -> list[dict[str, Any]]:
    """Returns the prompt as messages, as its row says it and not as the policy's template writes it."""
    if prompt.messages is not None:
        return [dict(message) for message in prompt.messages]
    told = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*told, *row_messages(prompt)]
