"""One episode of a user's environment, in the process where its code runs: what is asked of it, checked and
made a Turn.

It is written as coroutines for environments that are asynchronous; where nothing is, `at_once` runs them
through. Whatever a user's code raises becomes an EnvironmentFailure, except from a tool: the policy is told,
as in TRL, and the episode goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import numbers
import os
import random
import sys
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from core.users import pictures
from core.users.code import in_one_line, one_line, place_of
from environments import EnvironmentFailure, Observation, ToolCall, ToolErrorKind, Turn
from environments.loading import UserEnvironment, by_name, signature
from environments.wire import Question

MAX_CHARS = 2**22
"""An observation that is longer is no observation: the longest context of any model is shorter."""
T = TypeVar("T")


class Acting:
    """One episode: `acting = Acting(loaded)`, then `answer(question)` for each question but `end`."""

    def __init__(self, loaded: UserEnvironment) -> None:
        self._loaded = loaded
        self._environment: Any = None
        self._gave_rewards = False

    async def answer(self, question: Question) -> Turn:
        """Returns the environment's answer. Raises EnvironmentFailure."""
        try:
            return await self._answer(question)
        except EnvironmentFailure:
            raise
        except Exception as error:  # noqa: BLE001 - what a user's objects do when they are read is theirs, too
            raise self._raised("what it returned", error) from None

    async def _answer(self, question: Question) -> Turn:
        if question.what == "reset":
            return await self._reset(question)
        if question.what == "run":
            return await self._run(question)
        if question.what == "finish":
            return await self._finish()
        if self._loaded.kind == "turns":
            return await self._step(question.text)
        return await self._call_tools(question.calls)

    async def _finish(self) -> Turn:
        """Ends what a limit cut. The rewards of steps add up: to 0 where none came before the limit, which is
        an outcome and no failure.
        """
        has_reward = callable(getattr(self._environment, "get_reward", None))
        adds_up = self._loaded.kind == "turns" and not has_reward
        return await self._over(0.0 if adds_up else None)

    async def close(self) -> None:
        """Lets the environment close what it opened, if it has `close`. Raises EnvironmentFailure."""
        close = getattr(self._environment, "close", None)
        if callable(close):
            await self._ask("close", close)
        self._environment = None

    async def _reset(self, question: Question) -> Turn:
        self._environment = await self._ask("its constructor", self._loaded.make)
        row = question.row or {}
        if "seed" not in row:
            row = {**row, "seed": question.seed} if _names_seed(self._environment.reset) else row
        arguments = by_name(self._environment.reset, row)
        shown = await self._ask("reset", self._environment.reset, **arguments)
        if shown is not None and not isinstance(shown, str):
            raise self._broken("reset", shown, "text to add to the last user message, or None")
        return Turn(self._clean(shown or "", "reset"), done=False)

    async def _step(self, text: str) -> Turn:
        answer = await self._ask("step", self._environment.step, text)
        turn = self._turn_of(answer)
        reward = self._number(turn.reward, "step")
        self._gave_rewards |= reward is not None
        observation = self._clean(turn.observation, "step")
        if turn.done:
            return (await self._over(reward))._replace(observation=observation)
        return Turn(observation, done=False, reward=reward)

    def _turn_of(self, answer: Any) -> Turn:
        """Returns a Turn of what `step` returned: one, or a tuple of observation, reward and done, perhaps
        with more, as gymnasium's `observation, reward, terminated, truncated, info`.
        """
        if isinstance(answer, Turn):
            return answer
        if isinstance(answer, tuple) and 3 <= len(answer) <= 5:
            observation, reward, done, *more = answer
            is_over = bool(done) or (len(more) == 2 and bool(more[0]))
            if not isinstance(done, str | Mapping):
                return Turn(observation, is_over, reward)
        raise self._broken("step", answer, "a Turn, or observation, reward, done")

    async def _call_tools(self, calls: tuple[ToolCall, ...]) -> Turn:
        """Runs the calls in turn; without any the policy has said its last."""
        if not calls:
            return await self._over(None)
        messages, errors, last_error = [], [], ""
        for call in calls:
            result, error, told = await self._call(call)
            last_error = told or last_error
            content = result if isinstance(result, str) else str(result)
            message = {"role": "tool", "name": call.name, "content": content}
            if call.id:
                message["tool_call_id"] = call.id
            messages.append(message)
            errors += [error] if error is not None else []
        return Turn(
            self._clean(tuple(messages), "a tool"),
            done=False,
            tool_errors=tuple(errors),
            last_error=last_error,
        )

    async def _call(self, call: ToolCall) -> tuple[Any, ToolErrorKind | None, str]:
        """Returns a tool's result, or what the policy is told instead, what kind of error that is, and what
        its user may be told of it.
        """
        if call.problem or call.arguments is None:
            problem = call.problem or "the arguments could not be read"
            return {"error": problem}, "unparsable", one_line(problem)
        if call.name not in self._loaded.tool_names:
            there = ", ".join(self._loaded.tool_names) or "none"
            problem = f"there is no tool {call.name!r}; there are: {there}"
            return {"error": problem}, "unknown", one_line(problem)
        tool = getattr(self._environment, call.name)
        try:
            signature(tool).bind(**call.arguments)
        except TypeError as error:
            problem = f"{call.name}: {error}"
            return {"error": problem}, "arguments", one_line(problem)
        try:
            return await _maybe(tool(**call.arguments)), None, ""
        except Exception as error:  # noqa: BLE001 - a user's tool may raise anything, and the policy is told
            return {"error": str(error)}, "raised", _told(call.name, error)
        except BaseException as error:
            if _is_cancelled():
                raise
            raise self._raised(call.name, error) from None

    async def _over(self, reward: float | None) -> Turn:
        """Returns the Turn that ends the episode, with the reward that the environment gives for it."""
        get_reward = getattr(self._environment, "get_reward", None)
        if callable(get_reward):
            given = self._number(await self._ask("get_reward", get_reward), "get_reward")
            if given is not None and self._gave_rewards:
                raise EnvironmentFailure(
                    "raised", "both step and get_reward give rewards; let one return None"
                )
            reward = reward if given is None else given
        return Turn("", done=True, reward=reward, attributes=pictures.take(self._environment))

    async def _run(self, question: Question) -> Turn:
        harness, row = self._loaded.make, question.row or {}
        offered: dict[str, Any] = {
            "base_url": question.base_url,
            "api_key": question.api_key,
            "model": question.model,
            "seed": row.get("seed", question.seed),
        }
        named = inspect.signature(harness).parameters.keys()
        if "client" in named:
            offered["client"] = self._client(question)
        available = {**row, **{name: value for name, value in offered.items() if name in named}}
        reward = await self._ask("it", harness, **by_name(harness, available))
        return Turn("", done=True, reward=self._number(reward, "it"))

    def _client(self, question: Question) -> Any:
        import openai  # Imported before in the template of a harness.

        cls = openai.AsyncOpenAI if self._loaded.is_async else openai.OpenAI
        # A call waits as long as the engine takes; one that is repeated would be recorded twice.
        return cls(base_url=question.base_url, api_key=question.api_key, timeout=None, max_retries=0)

    # --- Calls of users' code ---

    async def _ask(self, what: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Calls users' code. Raises EnvironmentFailure that says what raised what, and where."""
        try:
            return await _maybe(function(*given, **named))
        except BaseException as error:
            if _is_cancelled():
                raise
            raise self._raised(what, error) from None

    def _raised(self, what: str, error: BaseException) -> EnvironmentFailure:
        return EnvironmentFailure("raised", _told(what, error))

    def _broken(self, what: str, returned: Any, expected: str) -> EnvironmentFailure:
        shown = " ".join(repr(returned)[:80].split())
        return EnvironmentFailure("raised", f"{what} returned {shown}; expected {expected}")

    def _number(self, value: Any, what: str) -> float | None:
        """Returns a reward as a number, of whatever library; None stays None."""
        if value is None:
            return None
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
            value = value.item()
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise self._broken(what, value, "a finite number as reward, or None")
        return float(value)

    def _clean(self, observation: Any, what: str) -> Observation:
        """Returns an observation of text that can be written as UTF-8: text, or messages with roles."""
        if observation is None:
            return ""
        if isinstance(observation, str):
            if len(observation) > MAX_CHARS:
                raise EnvironmentFailure(
                    "raised",
                    f"{what} returned {len(observation):,} characters; at most {MAX_CHARS:,} can be shown",
                )
            return _writable(observation)
        if isinstance(observation, list | tuple) and all(map(_is_message, observation)):
            return tuple(
                {
                    **self._plain({**message, "content": ""}, what),
                    "content": self._clean(message["content"], what),
                }
                for message in observation
            )
        raise self._broken(what, observation, "text or a list of messages as observation")

    def _plain(self, value: Any, what: str) -> Any:
        """Returns what a message has besides its content, made of Python's own text and numbers."""
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
            value = value.item()
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return _writable(value)
        if isinstance(value, numbers.Integral):
            return int(value)
        if isinstance(value, numbers.Real):
            return float(value)
        if isinstance(value, list | tuple):
            return [self._plain(one, what) for one in value]
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {_writable(key): self._plain(one, what) for key, one in value.items()}
        raise self._broken(
            what, value, "nothing in a message but text, numbers, lists, and mappings with text as keys"
        )


def _told(what: str, error: BaseException) -> str:
    """Returns what raised what, and where, in one line."""
    place = place_of(error, __file__)
    where = f" ({os.path.basename(place.filename)}:{place.lineno})" if place else ""
    return f"{what} raised {in_one_line(error)}{where}"


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine that waits for nothing, and returns what it does. Raises EnvironmentFailure where it
    does wait.
    """
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    coroutine.close()
    raise EnvironmentFailure("raised", "it waits for something, but none of its methods is `async def`")


def sow(seed: int) -> None:
    """Seeds the generators of random numbers that this process has loaded."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _is_cancelled() -> bool:
    """Returns whether it is this process that gives up what it is asked; a user's code may say so itself."""
    with contextlib.suppress(RuntimeError):  # Nothing is asynchronous here.
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return False


async def _maybe(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _writable(text: str) -> str:
    """Returns the text with a ? for what UTF-8 cannot write: half of a surrogate pair."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _names_seed(function: Callable[..., Any]) -> bool:
    return "seed" in signature(function).parameters
