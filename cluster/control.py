"""The run directory is the way into a run from another shell, also from another host that shares it.

    launch.py scale  --> scale.json  --> supervisor   the newest request, by id; taken within a second
    launch.py status <-- status.json <-- supervisor   written every second; holds the last answer

Both files are replaced whole, so that nobody reads half of one.

Clocks of two machines differ, and a network disk shows what another machine wrote up to a minute late. So
from elsewhere a driver lives if its status is seen to change, by the time that passes here; only on the
driver's own machine do its process id and the age of its status say more.
"""

from __future__ import annotations

import contextlib
import errno
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
from core.machine import pid_space
from core.text import headline
from core.troubles import Troubles

STATUS_NAME, REQUEST_NAME = "status.json", "scale.json"
WRITE_EVERY_S = 1.0
STALE_S, STALE_ELSEWHERE_S = 15.0, 90.0
"""How long a driver's status may stay as it is: written on this machine, and elsewhere, where a network disk
may keep back what is new.
"""
CLOCKS_APART_S = 3600.0
"""No two machines' clocks differ by more: a status that is older is not waited for."""
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
    """The content of status.json. `Control` fills in `pid`, `pid_space` (where that counts), `host` and
    `time` (seconds since 1970).

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
    pid_space: str = ""
    host: str = ""
    time: float = 0.0

    @property
    def is_here(self) -> bool:
        """Says whether the driver is on this machine, where its process can be seen."""
        return self.pid_space == pid_space()

    @property
    def driver(self) -> str:
        """The driver in words: its process, and where it is."""
        return f"its driver (process {self.pid} on {self.host})"


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
        _look_anew(self._run_dir)
        try:
            with (self._run_dir / REQUEST_NAME).open("rb") as file:
                found = os.fstat(file.fileno())
                if self._seen == (found.st_ino, found.st_mtime_ns):
                    return None
                content = file.read()
            self._seen = (found.st_ino, found.st_mtime_ns)
            return msgspec.json.decode(content, type=ScaleRequest)
        except FileNotFoundError:
            return None
        except OSError as error:  # It is looked at again: on a network disk it may just have been replaced.
            self._troubles.note(f"{REQUEST_NAME} cannot be read", error)
        except msgspec.DecodeError as error:
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
            status,
            pid=os.getpid(),
            pid_space=pid_space(),
            host=socket.gethostname(),
            time=time.time(),
            answer=self._answer,
        )
        try:
            replace_json(self._run_dir / STATUS_NAME, finite_tree(msgspec.to_builtins(whole)))
            self._troubles.well(f"{STATUS_NAME} cannot be written")
        except OSError as error:
            self._troubles.note(f"{STATUS_NAME} cannot be written", error)


# --- The other shell's side ---


def read_status(run_dir: Path) -> RunStatus:
    """Returns the status of the run, whatever its age. Raises ConfigError when there is none."""
    _look_anew(run_dir)
    try:
        try:
            content = (run_dir / STATUS_NAME).read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            content = (run_dir / STATUS_NAME).read_bytes()  # On a network disk it had just been replaced.
        return msgspec.json.decode(content, type=RunStatus)
    except FileNotFoundError:
        what = "a run that has not started yet" if (run_dir / "config.yaml").is_file() else "no run directory"
        raise ConfigError(f"{run_dir} is {what}: there is no {STATUS_NAME} in it") from None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{run_dir / STATUS_NAME} cannot be read: {error}") from None


def death_of_driver(run_dir: Path, status: RunStatus) -> str | None:
    """Returns why nobody drives the run in `run_dir` any more; None while its driver lives, and when the run
    is over in order.

    Where `status` does not tell, it waits for another: a second as a rule, `STALE_S` at most for a driver of
    this machine that hangs, `STALE_ELSEWHERE_S` for one of another machine that is gone.
    """
    age_s = time.time() - status.time
    if status.state == "over" or (status.is_here and _is_seen(status) and 0 <= age_s < STALE_S):
        return None
    if dead := _known_death(status):
        return dead
    timeout_s = STALE_S if status.is_here else STALE_ELSEWHERE_S
    deadline_s = time.monotonic() + timeout_s
    while read_status(run_dir) == status:
        if time.monotonic() > deadline_s:
            return f"{status.driver} has not written {STATUS_NAME} for {max(age_s, timeout_s):.0f} s"
        time.sleep(POLL_S)
    return None


def ask_for_actors(run_dir: Path, count: int, timeout_s: float | None = None) -> tuple[Answer, RunStatus]:
    """Asks the run's driver for `count` rollout actors; returns its answer, and the status at that moment.

    It waits `timeout_s`, by default for as long as a status may stay as it is. Raises ConfigError for no run
    here, a run that is over or without a living driver, or a count that cannot be meant; PeerTimeout when the
    driver does not answer: the request is taken back then.
    """
    if not 1 <= count <= MOST_ACTORS:
        raise ConfigError(f"--actors {count}: expected 1 to {MOST_ACTORS}")
    first = status = read_status(run_dir)
    if status.state == "over":
        raise ConfigError(
            f"{run_dir}: the run is over{f' ({headline(status.stopped)})' if status.stopped else ''}; "
            "there is nothing to scale"
        )
    if dead := _known_death(status):
        raise ConfigError(f"{run_dir}: {dead}; there is nothing to scale")
    if timeout_s is None:
        timeout_s = STALE_S if status.is_here else STALE_ELSEWHERE_S
    request = ScaleRequest(uuid.uuid4().hex, count)
    replace_json(run_dir / REQUEST_NAME, msgspec.to_builtins(request))
    deadline_s = time.monotonic() + timeout_s
    while status.answer is None or status.answer.id != request.id:
        if time.monotonic() > deadline_s:
            _take_back(run_dir, request)
            wrote = f"has not written {STATUS_NAME} meanwhile" if status == first else "writes its status"
            raise PeerTimeout(
                f"the driver of {run_dir} (process {status.pid} on {status.host}) did not answer within "
                f"{timeout_s:.0f} s, and {wrote}; the request is taken back"
            )
        time.sleep(POLL_S)
        status = read_status(run_dir)
        if status.state == "over":
            raise ConfigError(f"{run_dir}: the run is over; it ended before the request was taken")
    return status.answer, status


def _known_death(status: RunStatus) -> str | None:
    """Returns why the driver is known to be gone without waiting for it; None where it may live."""
    age_s = time.time() - status.time
    if status.is_here and not _is_seen(status):
        return f"its driver (process {status.pid}) is gone since {age_s:.0f} s"
    if not status.is_here and age_s > CLOCKS_APART_S:
        return f"{status.driver} has not written {STATUS_NAME} for {age_s:.0f} s"
    return None


def _is_seen(status: RunStatus) -> bool:
    return psutil.pid_exists(status.pid)


def _take_back(run_dir: Path, request: ScaleRequest) -> None:
    """Removes the request, unless another has taken its place: a driver that answers late is not to obey what
    nobody waits for.
    """
    path = run_dir / REQUEST_NAME
    with contextlib.suppress(OSError, msgspec.DecodeError):
        if msgspec.json.decode(path.read_bytes(), type=ScaleRequest).id == request.id:
            path.unlink()


def _look_anew(run_dir: Path) -> None:
    """Lets a network disk ask its server what is in the directory, in place of what it remembers."""
    with contextlib.suppress(OSError), os.scandir(run_dir) as entries:
        next(entries, None)
