"""The run directory is the way into a run from another shell, also from another host that shares it.

    launch.py scale  --> scale.json  --> supervisor   the newest request, by id; taken within a second
    launch.py status <-- status.json <-- supervisor   written every second; holds the last answer

Both files are replaced whole, so that nobody reads half of one.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from core.errors import ConfigError, PeerTimeout
from core.json_lines import finite_tree, replace_json
from core.troubles import Troubles

STATUS_NAME, REQUEST_NAME = "status.json", "scale.json"
WRITE_EVERY_S = 1.0
STALE_S = 15.0
ANSWER_TIMEOUT_S = 15.0
POLL_S = 0.2
MOST_ACTORS = 1024


class ScaleRequest(msgspec.Struct, frozen=True):
    """Asks for so many rollout actors; `launch.py scale` writes it to scale.json."""

    id: str
    actors: int


class Answer(msgspec.Struct, frozen=True):
    """Says what became of a request: the actors added and retired, or why it was refused. `ask_for_actors`
    waits for it.
    """

    id: str
    actors: int
    added: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    refused: str = ""


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The content of status.json. `Control` fills in `pid`, `host` and `time` (seconds since 1970).

    state   starting, training, ending or over
    actors  name, state, since_s, pid, note (what is missing, or the cause), and the monitor's figures
    waits   seconds so far, by who waits for what
    answer  what became of the last request taken
    """

    name: str
    state: str
    step: int
    steps: int
    actors: list[dict[str, Any]]
    buffer: dict[str, float | None]
    waits: dict[str, float | None]
    stopped: str | None = None
    answer: Answer | None = None
    pid: int = 0
    host: str = ""
    time: float = 0.0


# --- The supervisor's side ---


class Control:
    """Takes requests and writes the status; `clock` gives seconds.

        control = Control(run_dir, tell)
        if request := control.take():
            control.answer(Answer(request.id, request.actors))
        if control.is_due():
            control.write(status)

    A disk that takes no status is told of, and costs nothing else.
    """

    def __init__(
        self, run_dir: Path, tell: Callable[[str], Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_dir, self._tell, self._clock = run_dir, tell, clock
        self._written_s = float("-inf")
        self._troubles = Troubles(tell, clock)
        self._seen: tuple[int, int] | None = None
        self._answer: Answer | None = None
        self.take()  # A request that lies there already was meant for an earlier start.

    def take(self) -> ScaleRequest | None:
        """Returns a request that came since the last call; one that cannot be read is told of and ignored."""
        path = self._run_dir / REQUEST_NAME
        try:
            found = path.stat()
            if self._seen == (found.st_ino, found.st_mtime_ns):
                return None
            self._seen = (found.st_ino, found.st_mtime_ns)
            return msgspec.json.decode(path.read_bytes(), type=ScaleRequest)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            self._tell(f"{REQUEST_NAME} is ignored: {error}")
            return None

    def answer(self, answer: Answer) -> None:
        """Puts what became of a request into the next status, which is due now."""
        self._answer = answer
        self._written_s = float("-inf")

    def is_due(self) -> bool:
        """Returns whether the status is to be written again."""
        return self._clock() - self._written_s >= WRITE_EVERY_S

    def write(self, status: RunStatus) -> None:
        """Replaces status.json."""
        self._written_s = self._clock()
        whole = msgspec.structs.replace(
            status, pid=os.getpid(), host=socket.gethostname(), time=time.time(), answer=self._answer
        )
        try:
            replace_json(self._run_dir / STATUS_NAME, finite_tree(msgspec.to_builtins(whole)))
            self._troubles.well(f"{STATUS_NAME} cannot be written")
        except OSError as error:
            self._troubles.note(f"{STATUS_NAME} cannot be written", error)


# --- The other shell's side ---


def read_status(run_dir: Path) -> RunStatus:
    """Returns the status of the run, whatever its age. Raises ConfigError when there is none."""
    try:
        return msgspec.json.decode((run_dir / STATUS_NAME).read_bytes(), type=RunStatus)
    except FileNotFoundError:
        what = "a run that has not started yet" if (run_dir / "config.yaml").is_file() else "no run directory"
        raise ConfigError(f"{run_dir} is {what}: there is no {STATUS_NAME} in it") from None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{run_dir / STATUS_NAME} cannot be read: {error}") from None


def death_of_driver(status: RunStatus) -> str | None:
    """Returns why nobody drives the run any more; None while its driver lives, and when the run is over in
    order.
    """
    if status.state == "over":
        return None
    age_s = time.time() - status.time
    if status.host == socket.gethostname() and not psutil.pid_exists(status.pid):
        return f"its driver (process {status.pid}) is gone since {age_s:.0f} s"
    if age_s > STALE_S:
        driver = f"its driver (process {status.pid} on {status.host})"
        return f"{driver} has not written {STATUS_NAME} for {age_s:.0f} s"
    return None


def ask_for_actors(
    run_dir: Path, count: int, timeout_s: float = ANSWER_TIMEOUT_S
) -> tuple[Answer, RunStatus]:
    """Asks the run's driver for `count` rollout actors; returns its answer, and the status at that moment.

    Raises ConfigError for no run here, a run that is over or without a living driver, or a count that cannot
    be meant; PeerTimeout when the driver does not answer.
    """
    if not 1 <= count <= MOST_ACTORS:
        raise ConfigError(f"--actors {count}: expected 1 to {MOST_ACTORS}")
    status = read_status(run_dir)
    if status.state == "over":
        raise ConfigError(
            f"{run_dir}: the run is over{f' ({status.stopped})' if status.stopped else ''}; "
            "there is nothing to scale"
        )
    if dead := death_of_driver(status):
        raise ConfigError(f"{run_dir}: {dead}; there is nothing to scale")
    request = ScaleRequest(uuid.uuid4().hex, count)
    replace_json(run_dir / REQUEST_NAME, msgspec.to_builtins(request))
    deadline_s = time.monotonic() + timeout_s
    while status.answer is None or status.answer.id != request.id:
        if time.monotonic() > deadline_s:
            raise PeerTimeout(
                f"the driver of {run_dir} (process {status.pid} on {status.host}) did not answer within "
                f"{timeout_s:.0f} s; "
                f"its last {STATUS_NAME} is {max(0.0, time.time() - status.time):.0f} s old"
            )
        time.sleep(POLL_S)
        status = read_status(run_dir)
        if status.state == "over":
            raise ConfigError(f"{run_dir}: the run is over; it ended before the request was taken")
    return status.answer, status
