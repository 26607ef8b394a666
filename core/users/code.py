"""Finds users' classes and functions by their path, `module:name`, in a process that may die of it: importing
a module runs whatever stands in it.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from core.errors import AgroError

MAX_REASON_CHARS = 300
_OWN = Path(__file__).resolve().parents[2]
_ROOMS = ("actors", "buffer", "cluster", "core", "environments", "learner", "rewards")
_NOT_THEIRS = tuple(
    f"{folder}{os.sep}" for folder in (sysconfig.get_path("stdlib"), *(str(_OWN / room) for room in _ROOMS))
)


def find(what: str, path: str, error: type[AgroError]) -> Any:
    """Returns what stands in a module on the path or in the working directory under a name.

    Raises `error`, whose one line begins with `what`, for a path that is no `module:name`, a module that does
    not import, exits while it is imported, or lacks the name: then it tells the nearest that it has.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise error(f"{what}: {path!r} is no path; expected module:name.")
    meant = module_name.removesuffix(".py").removeprefix("./").replace("/", ".")
    if meant != module_name or not all(map(str.isidentifier, module_name.split("."))):
        hint = "expected words joined by dots"
        if meant != module_name:
            hint = f"write {meant}:{name} for that file of the working directory"
        raise error(f"{what}: {module_name!r} is no name of a module; {hint}.")
    module = _import(what, module_name, error)
    found = getattr(module, name, None)
    if found is None:
        public = [other for other in vars(module) if not other.startswith("_")]
        near = difflib.get_close_matches(name, public, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise error(f"{what}: module {module_name} has no {name!r}{hint}{_namesake(module)}")
    return found


def look_in_working_directory() -> None:
    """Lets modules in the folder that the command is run in be imported."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # At the end: a user's file must not hide a library.
    importlib.invalidate_caches()


def in_one_line(error: BaseException) -> str:
    """Returns the error's type and message on one line of at most MAX_REASON_CHARS, which UTF-8 can write."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - the message of a user's error is written by the user's code
        message = "(its message cannot be read)"
    return one_line(f"{type(error).__name__}: {message}").removesuffix(":")


def one_line(text: str) -> str:
    """Returns text on one line of at most MAX_REASON_CHARS, which UTF-8 can write."""
    reason = " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())
    return reason if len(reason) <= MAX_REASON_CHARS else reason[: MAX_REASON_CHARS - 3] + "..."


def place_of(error: BaseException, asker: str) -> traceback.FrameSummary | None:
    """Returns where in the user's code the error came from: not in a library that it calls. Where none of it
    is the user's, the last place outside the file `asker`, which called it; None where there is none.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != asker]
    found = [frame for frame in frames if _is_theirs(frame.filename)] or frames
    return found[-1] if found else None


def _is_theirs(file: str) -> bool:
    is_installed = not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
    return not (is_installed or file.startswith("<") or os.path.abspath(file).startswith(_NOT_THEIRS))


def _import(what: str, module_name: str, error: type[AgroError]) -> ModuleType:
    look_in_working_directory()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        name = missing.name
        if name is not None and (module_name == name or module_name.startswith(name + ".")):
            raise error(
                f"{what}: no module named {name!r}. It must be importable where the run starts: in the working "
                f"directory ({os.getcwd()}), or installed."
            ) from None
        raise error(
            f"{what}: importing {module_name} needs a package that is not installed: {missing}"
        ) from missing
    except SystemExit as end:
        code = f" ({' '.join(str(end.code).split())})" if end.code is not None else ""
        raise error(
            f"{what}: {module_name} exits while it is imported{code}; "
            'let what it does as a program stand under `if __name__ == "__main__":`.'
        ) from None
    except BaseException as cause:
        raise error(f"{what}: importing {module_name} raised {in_one_line(cause)}") from cause


def _namesake(module: ModuleType) -> str:
    """Returns a remark on the file in the working directory that `module` hides by its name, empty when there
    is none.
    """
    name = module.__name__.split(".")[0]
    theirs = next((path for path in (f"{name}.py", name) if os.path.exists(path)), None)
    found = getattr(module, "__file__", None) or "built into Python"
    if theirs is None or os.path.dirname(os.path.abspath(found)).startswith(os.getcwd()):
        return ""
    return f" ({theirs} in the working directory is not what the name {name} means here: {found}; rename it.)"
