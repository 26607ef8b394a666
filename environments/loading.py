"""Loads what stands behind a path of the config's `environments`, and says what kind of environment it is, in
a process of its own.

    module:Class       reset(**row), and public typed methods as tools, or step(text)
    module:function    a harness: it is async, or takes `client` or `base_url`
    module:factory     a function that needs no argument and returns an object of such a class, as TRL takes it
"""

from __future__ import annotations

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from core.errors import ConfigError
from core.text import key_of
from core.users.code import find, in_one_line
from environments import Turn
from environments.spec import EnvironmentSpec, Kind

NO_TOOLS = frozenset({"reset", "get_reward", "close"})
"""Public methods that are asked by us, never by the policy."""
OF_HARNESS = frozenset({"client", "base_url", "api_key", "model", "seed"})
"""What a harness may take besides the columns of its row."""


class UserEnvironment(NamedTuple):
    """An environment's class or function, found: `loaded.make()` is an environment for one episode.

    make  makes an environment; of a harness, it is the harness itself
    kind  what it is, see `EnvironmentSpec`
    type  the class of what `make` makes; None for a harness
    """

    make: Callable[..., Any]
    kind: Kind
    type: type | None

    @property
    def tool_names(self) -> tuple[str, ...]:
        """Returns the names of the methods that are tools, in the order of their names, as TRL lists them."""
        if self.type is None or self.kind != "tools":
            return ()
        return tuple(_tool_names(self.type))

    @property
    def is_async(self) -> bool:
        """Returns whether anything that is asked of it is a coroutine function."""
        if self.type is None:
            return inspect.iscoroutinefunction(inspect.unwrap(_innermost(self.make)))
        asked = [*self.tool_names, *NO_TOOLS, *(["step"] if self.kind == "turns" else [])]
        return any(inspect.iscoroutinefunction(getattr(self.type, name, None)) for name in asked)

    @property
    def has_reward(self) -> bool:
        """Returns whether it may give a reward itself."""
        return self.kind != "tools" or hasattr(self.type, "get_reward")

    @property
    def columns(self) -> tuple[str, ...]:
        """Returns the columns of the dataset without which it cannot be reset, or called."""
        function = self.make if self.type is None else _bound(self.type, "reset")
        needed = [name for name, parameter in _parameters(function).items() if _is_needed(parameter)]
        return tuple(name for name in needed if name != "seed" and (self.type or name not in OF_HARNESS))


def load(name: str, path: str) -> UserEnvironment:
    """Returns the environment that `path` means. Raises ConfigError, in one line, when there is none, or what
    stands there is none.
    """
    what = f"{key_of(name)} = {path}"
    plain, _, query = path.partition("?")
    found = find(what, plain, ConfigError)
    arguments = _arguments(what, query)
    try:
        return _loaded(what, found, arguments)
    except ConfigError:
        raise
    except BaseException as error:
        raise ConfigError(f"{what}: making one raised {in_one_line(error)}") from error


def schemas(name: str, path: str, loaded: UserEnvironment) -> tuple[dict[str, Any], ...]:
    """Returns the JSON schemas of the tools. Raises ConfigError for one without type hints, or whose
    docstring does not describe its arguments.
    """
    if not loaded.tool_names:
        return ()
    from transformers.utils import get_json_schema  # Two seconds, in the process that describes alone.

    assert loaded.type is not None
    found = []
    for tool in loaded.tool_names:
        try:
            found.append(json.loads(json.dumps(get_json_schema(_bound(loaded.type, tool)))))
        except Exception as error:
            raise ConfigError(
                f"{key_of(name)} = {path}: its method {tool!r} is no tool: {in_one_line(error)} A tool has type "
                "hints, and a docstring that describes each argument under `Args:`; a method that is none "
                "begins with _."
            ) from error
    return tuple(found)


def spec_of(name: str, path: str, loaded: UserEnvironment) -> EnvironmentSpec:
    """Returns what the environment is. Raises ConfigError as `schemas` does."""
    return EnvironmentSpec(
        name=name,
        path=path,
        kind=loaded.kind,
        tools=schemas(name, path, loaded),
        is_async=loaded.is_async,
        has_reward=loaded.has_reward,
        columns=loaded.columns,
    )


def by_name(function: Callable[..., Any], available: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what of `available` the function takes by name: everything where it ends in `**row`."""
    parameters = _parameters(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(available)
    return {name: value for name, value in available.items() if name in parameters}


# --- What it is ---


def _loaded(what: str, found: Any, arguments: dict[str, Any]) -> UserEnvironment:
    def make() -> Any:
        return found(**arguments)

    if inspect.isclass(found):
        _check_arguments(what, found, arguments)
        return UserEnvironment(make, _kind(what, found), found)
    if not callable(found):
        raise ConfigError(f"{what}: it is {type(found).__name__}, expected a class or a function.")
    function = inspect.unwrap(_innermost(found))
    taken = _parameters(found)
    if inspect.iscoroutinefunction(function) or taken.keys() & {"client", "base_url"}:
        _check_arguments(what, found, arguments, is_partial=True)
        return UserEnvironment(_Harness(found, arguments), "harness", None)
    needed = [name for name, parameter in taken.items() if _is_needed(parameter) and name not in arguments]
    if needed:
        raise ConfigError(
            f"{what}: a function is a harness if it is async or takes `client`, and makes environments if it "
            f"needs no argument; this one needs {', '.join(needed)}."
        )
    made = type(make())  # As TRL does with its factories; what it is, only one of them says.
    return UserEnvironment(make, _kind(what, made), made)


class _Harness:
    """A harness with the arguments that the config gives it."""

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self.__wrapped__, self._arguments = function, arguments
        parameters = inspect.signature(function).parameters.values()
        kept = [parameter for parameter in parameters if parameter.name not in arguments]
        self.__signature__ = inspect.Signature(kept)

    def __call__(self, **available: Any) -> Any:
        return self.__wrapped__(**available, **self._arguments)


def _kind(what: str, cls: type) -> Kind:
    if not callable(getattr(cls, "reset", None)):
        raise ConfigError(f"{what}: {cls.__name__} has no reset(**row), which begins an episode.")
    if callable(getattr(cls, "step", None)) and not _is_tool(cls.step):  # type: ignore[attr-defined]
        return "turns"
    if not _tool_names(cls) and not hasattr(cls, "get_reward"):
        raise ConfigError(
            f"{what}: {cls.__name__} has no step(text), no public method that would be a tool, and no "
            "get_reward(): nothing would come of what the policy says."
        )
    return "tools"


def _tool_names(cls: type) -> list[str]:
    public = [name for name in dir(cls) if not name.startswith("_") and name not in NO_TOOLS]
    return [name for name in public if _is_method(cls, name)]


def _is_method(cls: type, name: str) -> bool:
    """Returns whether an object's attribute of this name is a bound method, which is what TRL asks."""
    return isinstance(inspect.getattr_static(cls, name), types.FunctionType | classmethod)


def _is_tool(step: Callable[..., Any]) -> bool:
    """Returns whether a method called `step` is a tool, as in some classes for TRL: its docstring describes
    arguments, and what it returns is annotated, and no observation with reward and end.
    """
    try:
        returned = typing.get_type_hints(step).get("return")
    except (NameError, TypeError, AttributeError):
        return False
    is_turn = returned is Turn or returned is tuple or typing.get_origin(returned) is tuple
    return returned is not None and not is_turn and "Args:" in (inspect.getdoc(step) or "")


def _bound(cls: type, name: str) -> Callable[..., Any]:
    """Returns the method as of an object, without making one."""
    found = inspect.getattr_static(cls, name)
    if isinstance(found, types.FunctionType):
        return types.MethodType(found, object())
    method: Callable[..., Any] = getattr(cls, name)
    return method


# --- Arguments ---


def _arguments(what: str, query: str) -> dict[str, Any]:
    """Returns the arguments behind the `?` of a path: numbers, true, false and null as JSON has them, else
    text.
    """
    arguments: dict[str, Any] = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier() or name in arguments:
            raise ConfigError(
                f"{what}: {part!r} behind the ? is no argument; expected name=value, each once."
            )
        try:
            arguments[name] = json.loads(value)
        except ValueError:
            arguments[name] = value
    return arguments


def _check_arguments(
    what: str, function: Callable[..., Any], arguments: dict[str, Any], *, is_partial: bool = False
) -> None:
    """Raises ConfigError when the function cannot be called with the arguments, alone or with more."""
    try:
        accepted = inspect.signature(function)
    except ValueError:  # Of a class written in C.
        return
    try:
        accepted.bind_partial(**arguments) if is_partial else accepted.bind(**arguments)
    except TypeError as error:
        takes = ", ".join(accepted.parameters) or "nothing"
        raise ConfigError(
            f"{what}: {error}; it takes {takes}, given as ?name=value behind the path."
        ) from None


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """Returns what `inspect.signature` does, and raises what it raises. That of a class's method is found
    once: three of them are a fifth of what an episode of a calculator takes.
    """
    if isinstance(function, types.MethodType) and isinstance(function.__func__, types.FunctionType):
        return _signature_of_method(function.__func__)
    return inspect.signature(function)


@functools.lru_cache(maxsize=256)
def _signature_of_method(function: types.FunctionType) -> inspect.Signature:
    return inspect.signature(types.MethodType(function, object()))


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return signature(function).parameters
    except (ValueError, TypeError):
        return {}


def _is_needed(parameter: inspect.Parameter) -> bool:
    by_star = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return parameter.default is parameter.empty and not by_star


def _innermost(function: Any) -> Any:
    """Returns the function that a partial, or an object with `__call__`, calls."""
    while hasattr(function, "func"):
        function = function.func
    if not inspect.isroutine(function) and not inspect.isclass(function):
        return getattr(function, "__wrapped__", function.__call__)
    return function
