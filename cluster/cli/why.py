"""`launch.py why RUN_DIR [NAME]`: who died in a run, in order and in plain sentences; and how the run ended,
if it did.

Everything is read from the run directory: deaths.jsonl, status.json and the logs. Neither Ray nor the run is
asked, so that it works on a run that goes on, is over, was killed, or was copied from somewhere else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.control import STATUS_NAME, RunStatus, death_of_driver, read_status
from cluster.deaths import FILE_NAME, KINDS, MOST_READ, Death, read_deaths
from core.config.files import read_tree
from core.errors import ConfigError
from core.process_log import last_lines, log_path, role_of, words_of
from core.text import headline

NUM_LINES = 8
"""Lines of a log that are shown of a process that has not died."""
_LIMITS = {kind.name: kind for kind in KINDS}


def why(run_dir: Path, name: str = "") -> list[str]:
    """The lines to print. `name`: a process (`actor-0.1`), its role (`actor-0`) or its kind (`board`); ''
    for all.

    Raises ConfigError: `run_dir` is no run directory or cannot be read, or nobody in it has that name.
    """
    status = _status(run_dir)
    try:
        deaths = read_deaths(run_dir)
    except OSError as error:
        raise ConfigError(f"{run_dir / FILE_NAME} cannot be read: {error.strerror}") from None
    if name:
        return _of_one(run_dir, name, deaths, status)
    died = [death for death in deaths if death.kind != "run"]
    lines = [_where_it_is(run_dir, status), ""]
    if len(deaths) == MOST_READ:
        lines.append(f"The newest {MOST_READ} records of {FILE_NAME}:")
    for number, death in enumerate(deaths, 1):
        lines += [*_story(number, death), ""]
    if not died:
        lines.append("No process of this run has died.")
    return [*lines, *_how_it_ended(run_dir, status, deaths)]


def _status(run_dir: Path) -> RunStatus | None:
    """The run's last status, None where it had not written one. Raises ConfigError for what is no run
    directory.
    """
    known = ("config.yaml", "config-refused.yaml", STATUS_NAME, FILE_NAME)
    try:
        is_run = any((run_dir / name).is_file() for name in known)
        has_status = (run_dir / STATUS_NAME).is_file()
    except OSError as error:
        raise ConfigError(f"{run_dir} cannot be read: {error.strerror}") from None
    if not is_run:
        raise ConfigError(f"{run_dir} is no run directory (it holds none of {', '.join(known)})")
    return read_status(run_dir) if has_status else None


def _of_one(run_dir: Path, name: str, deaths: Sequence[Death], status: RunStatus | None) -> list[str]:
    """The deaths of one process, of a role or of a kind; what it wrote last where it has not died."""
    found = [death for death in deaths if name in (death.name, role_of(death.name), death.kind)]
    lines = [line for number, death in enumerate(found, 1) for line in (*_story(number, death), "")]
    if found and name not in _names(status):
        return lines[:-1]
    states = [_state(actor) for actor in _entries(status, name)]
    words = last_lines(words_of(log_path(run_dir, role_of(name))), NUM_LINES)
    if not (found or states or words):
        known = sorted({death.name for death in deaths} | set(_names(status)))
        raise ConfigError(
            f"{run_dir}: no {name} has died or is there; known are {', '.join(known) or 'none'}"
        )
    if not found:
        lines.append(f"{name} has not died. {' '.join(states)}".strip())
    return lines + _quoted(f"The end of logs/{role_of(name)}.log:", words)


def _state(actor: Mapping[str, Any]) -> str:
    if actor["state"] == "gone":
        return f"It is gone: {actor.get('note') or 'it ended in order'}."
    return f"It is {actor['state']} for {actor['since_s']:.0f} s."


def _names(status: RunStatus | None) -> list[str]:
    """Actors that are there."""
    return (
        [] if status is None else [str(actor["name"]) for actor in status.actors if actor["state"] != "gone"]
    )


def _entries(status: RunStatus | None, name: str) -> list[dict[str, Any]]:
    return [] if status is None else [actor for actor in status.actors if actor["name"] == name]


def _story(number: int, death: Death) -> list[str]:
    """One death, in sentences: a line each."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(death.time))
    if death.kind == "run":
        return _whole(f"{number}. {when}, after step {death.step}: the run ended:", death.cause, "   ")
    who = death.name if death.kind == death.name else f"{death.name}, a {death.kind},"
    lines = [f"{number}. {when}, after step {death.step}: {who} died: {_sentence(death.cause)}"]
    lines += [f"   Noticed: {_sentence(death.noticed)}"] if death.noticed else []
    lines += [f"   It held: {_sentence(death.held)}"] if death.held else []
    lines += [f"   What was done: {_sentence(death.done)}{_count(death)}"] if death.done else []
    return lines + _quoted(
        f"   Its last words{f', in {death.log}' if death.log else ''}:", death.last_words, "   "
    )


def _count(death: Death) -> str:
    kind = _LIMITS.get(death.kind)
    if kind is None or not 1 <= death.number < kind.max_deaths:
        return ""
    return f" This was death {death.number} of the {kind.max_deaths} within {kind.window_s / 60:.0f} min that end a run."


def _quoted(title: str, lines: Sequence[str], indent: str = "") -> list[str]:
    return [title, *(f"{indent}  | {line.strip()}" for line in lines)] if lines else []


def _sentence(text: str) -> str:
    """Returns the text in one line, with its full stop; last words are shown below it."""
    line = headline(text)
    return line if line.endswith((".", "?", "!")) else f"{line}."


def _whole(title: str, cause: str, indent: str = "") -> list[str]:
    """Returns the title with a cause of one line, or with the first one of several, and the others below."""
    first, *others = cause.strip().splitlines() or [""]
    return _quoted(f"{title} {first}", others, indent) or [f"{title} {_sentence(cause)}"]


def _where_it_is(run_dir: Path, status: RunStatus | None) -> str:
    if status is None:
        return f"{run_dir}: a run that was not begun."
    return f"{status.name}: {status.state}, step {status.step}/{status.steps}, in {run_dir}"


def _how_it_ended(run_dir: Path, status: RunStatus | None, deaths: Sequence[Death]) -> list[str]:
    """How the run ended; that it goes on, where it does. A cause that is told whole among `deaths` is a line
    here.
    """
    go_on = f"The same command {_what_it_does(run_dir)}."
    if status is None:
        is_refused = (run_dir / "config-refused.yaml").is_file()
        words = (
            "It was refused before anything was done." if is_refused else "It has not written a status yet."
        )
        return [words, *_driver_words(run_dir)]
    if gone := death_of_driver(run_dir, status):
        cause = f"The run did not end in order: {gone}; it was killed, or its machine went down. {go_on}"
        return [cause, *_driver_words(run_dir)]
    if status.state != "over":
        age_s = max(0.0, time.time() - status.time)
        return [
            f"The run goes on; its driver (process {status.pid} on {status.host}) wrote {age_s:.0f} s ago."
        ]
    if status.stopped is None:
        return [f"The run finished in order at step {status.step}."]
    if status.stopped.startswith("SIG"):
        return [f"The run was ended by {status.stopped}, in order, after step {status.step}. {go_on}"]
    how = f"The run ended with an error after step {status.step}:"
    is_told = any(death.kind == "run" and death.cause == status.stopped for death in deaths)
    lines = [f"{how} {_sentence(status.stopped)}"] if is_told else _whole(how, status.stopped)
    return [*lines, f"Mend the cause first; then the same command {_what_it_does(run_dir)}."]


def _what_it_does(run_dir: Path) -> str:
    """What the command of a run that is over does when it is given again."""
    if any((run_dir / "checkpoints").glob("step-*")):
        return f"with run.dir={run_dir} goes on from the newest checkpoint"
    with contextlib.suppress(ConfigError):
        if (read_tree(run_dir / "config.yaml").get("checkpoint") or {}).get("every") == 0:
            return "with another run.dir begins anew: this run keeps no checkpoints (checkpoint.every = 0)"
    return f"with run.dir={run_dir} begins at step 0: it has no checkpoint yet"


def _driver_words(run_dir: Path) -> list[str]:
    return _quoted(
        "The end of logs/driver.log:", last_lines(words_of(log_path(run_dir, "driver")), NUM_LINES)
    )
