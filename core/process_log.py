"""The log of a process: one bounded file in the run directory, whose last words outlive the process.

    RUN_DIR/logs/actor-0.log          stdout, stderr and logging of actor-0 and of those that took its place,
                                      also what vLLM, DeepSpeed and faulthandler write there
    RUN_DIR/logs/actor-0.log.old      what was written before that, when the file had reached its limit
    RUN_DIR/logs/driver.log           logging and events of the driver, whose stdout is the run's terminal

Every process begins with a line of its own (`===== actor-0.1: process 4711 on node7 since ...`), so that the
last words of one that died are told from those of its successor.

A machine that does not see the run directory keeps what its processes write in Ray's session folder, and
says so.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeAlias, cast

from core.own_warnings import ROOMS, OwnWarnings

FOLDER = "logs"
LIMIT_BYTES = 4 * 2**20
LOOK_S = 1.0
NUM_LAST_LINES = 4
MAX_LOGS = 256
"""Logs in the folder of actors that are gone; those that went longest ago make room."""
MAX_LOOKED_AT = 32

_HEADER = re.compile(r"^===== (\S+): process (\d+) on (\S+) since .*$", re.MULTILINE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RAY_MARKS = re.compile(r"^:(job_id|actor_name|task_name):.*$", re.MULTILINE)
_FATAL = re.compile(r"Fatal Python error: |!+ Segfault encountered !+")
"""A crash, as faulthandler tells it, or a library of vLLM's that takes the signal from it."""
_PROGRESS = re.compile(r"\d+%(\||\s+Completed)")
"""A progress bar, of tqdm's or of vLLM's: the last that is written for long, and no news."""
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_log = logging.getLogger(__name__)

Send: TypeAlias = Callable[[str, Mapping[str, int]], bool]
"""Tells how often the process of that name has logged which warnings; says whether it could."""


@dataclass
class _This:
    """What this process knows of the run's logs: their folder, None where it has not begun one."""

    folder: Path | None = None


_this = _This()


@dataclass(frozen=True)
class ProcessLog:
    """The log of one process. It is made by the driver and begun in the process.

    role      names the file: what takes the place of `actor-0` goes on in `actor-0.log`
    name      names the process in the file and in its warnings: `actor-0.1`
    monitor   the name under which Ray knows the monitor, which is told of warnings; '' where nobody is
    """

    run_dir: str
    role: str
    name: str = ""
    monitor: str = ""

    @property
    def path(self) -> Path:
        """The log's place, on a machine that sees the run directory."""
        return log_path(Path(self.run_dir), self.role)

    def begin(self, send: Send) -> None:
        """Makes this process write into its log, and `send` its warnings, from now on. Nothing is raised."""
        warnings = OwnWarnings()
        descriptor = self._open()
        if descriptor is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                if isinstance(stream, io.TextIOWrapper):
                    stream.reconfigure(line_buffering=True)
            sys.stdout, sys.stderr = (
                cast(TextIO, _Forgiving(sys.stdout)),
                cast(TextIO, _Forgiving(sys.stderr)),
            )
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.close(descriptor)
            _this.folder = self.path.parent
            faulthandler.enable(2)
            _note_exits(self.name or self.role)
        begin_logging(logging.StreamHandler(sys.stderr))
        keep = threading.Thread(
            target=self._keep, args=(warnings, descriptor is not None, send), name="log", daemon=True
        )
        keep.start()

    def _open(self) -> int | None:
        try:
            if not self.path.parent.is_dir():  # The driver makes it: here is another machine's disk.
                raise FileNotFoundError(2, "No such directory")
            return open_log(self.path, self.name or self.role)
        except OSError as error:
            _log.warning(
                "the processes on %s cannot write into %s (%s): what they write stays in Ray's session folder there, %s",
                socket.gethostname(),
                self.path.parent,
                error.strerror,
                _descriptor_folder(),
            )
            return None

    def _keep(self, warnings: OwnWarnings, has_file: bool, send: Send) -> None:
        """Bounds the file and sends the warnings, for as long as the process lives."""
        owed: dict[str, int] = {}
        while True:
            time.sleep(LOOK_S)
            if has_file:
                with contextlib.suppress(OSError):  # A full disk: it is bounded later.
                    bound(self.path, self.name or self.role)
            for text, count in warnings.take().items():
                owed[text] = owed.get(text, 0) + count
            if owed and send(self.name or self.role, owed):
                owed = {}


class _Forgiving:
    """A stream to a disk that may be full: what that refuses is lost, and costs the process nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def log_path(run_dir: Path, role: str) -> Path:
    """The log of a role: `RUN_DIR/logs/actor-0.log`."""
    return run_dir / FOLDER / f"{role}.log"


def role_of(name: str) -> str:
    """The role of a process: `actor-0` of `actor-0.2`, its second successor."""
    return name.partition(".")[0]


def make_log_folder(run_dir: Path) -> None:
    """Makes the folder of the run's logs, which this process will look into. Raises OSError."""
    _this.folder = run_dir / FOLDER
    _this.folder.mkdir(exist_ok=True)


def begin_driver_log(run_dir: Path) -> None:
    """Logging, events and a crash of this process go to driver.log; its stdout and stderr stay the
    terminal's.

    Raises OSError where the folder of the logs cannot be made.
    """
    make_log_folder(run_dir)
    path = log_path(run_dir, "driver")
    descriptor = open_log(path, "driver")
    faulthandler.enable(descriptor)
    stream = os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")
    begin_logging(logging.StreamHandler(cast(TextIO, _Forgiving(stream))))

    def keep() -> None:
        while True:
            time.sleep(LOOK_S)
            with contextlib.suppress(OSError):
                bound(path, "driver")

    threading.Thread(target=keep, name="log", daemon=True).start()


def begin_logging(handler: logging.Handler) -> None:
    """The rooms' loggers from INFO on, all others from WARNING on, with times."""
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(handler)
    for room in ROOMS:
        logging.getLogger(room).setLevel(logging.INFO)


def open_log(path: Path, name: str) -> int:
    """A descriptor that appends to the log, after this process's first line. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(descriptor, _first_line(name))
    return descriptor


def bound(path: Path, name: str, limit_bytes: int = LIMIT_BYTES) -> None:
    """Empties this process's log when it has reached its limit; its end is kept as `<role>.log.old`. Raises
    OSError.

    The file is emptied and not renamed: this process's children write into it too, and everybody appends.
    """
    if path.stat().st_size < limit_bytes:
        return
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(tail(path, limit_bytes))
    aside.rename(path.with_name(path.name + ".old"))  # Whole: the process may end at any moment.
    os.truncate(path, 0)
    with path.open("ab") as file:
        file.write(_first_line(name))


def forget_old_logs(run_dir: Path, living: Iterable[str] = (), keep: int = MAX_LOGS) -> None:
    """Removes those logs of actors that were written to longest ago, where actors came and went for months;
    none of those that are `living`, which may have had nothing to say for long.
    """
    roles = {role_of(name) for name in living}
    with contextlib.suppress(OSError):
        gone = [path for path in (run_dir / FOLDER).glob("actor-*") if role_of(path.name) not in roles]
        paths = sorted(gone, key=lambda path: path.stat().st_mtime)
        for path in paths[: max(0, len(paths) - keep)]:
            path.unlink()


# --- What is read of it ---


def words_of(path: Path, pid: int | None = None, host: str | None = None) -> str:
    """What the process wrote: of process `pid`, or (None) of the newest, on machine `host` or (None) any. ''
    where there is nothing of it.
    """
    try:
        text = tail(path, LIMIT_BYTES).decode(errors="replace")
    except OSError:
        return ""
    headers = list(_HEADER.finditer(text))
    ends = [*(header.start() for header in headers[1:]), len(text)]
    found = [
        text[header.end() : end]
        for header, end in zip(headers, ends, strict=False)
        if pid in (None, int(header[2])) and host in (None, header[3])
    ]
    return found[-1] if found else ""


def words_of_process(pid: int, host: str) -> str:
    """What process `pid` of machine `host` wrote for this run, wherever in the logs it did; '' where that is
    not known here.
    """
    paths = _newest_first(_this.folder)
    return next((words for path in paths if (words := words_of(path, pid, host))), "")


def last_lines(text: str, count: int = NUM_LAST_LINES) -> list[str]:
    """The last `count` lines that say something, without colours and cut; of a crash the first."""
    plain = _RAY_MARKS.sub("", _COLOURS.sub("", text)).splitlines()
    lines = [line for line in plain if line.strip() and not _PROGRESS.search(line)]
    fatal = [number for number, line in enumerate(lines) if _FATAL.match(line)]
    start = fatal[-1] if fatal else max(0, len(lines) - count)
    return [line[:200] for line in lines[start : start + count]]


def _newest_first(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    with contextlib.suppress(OSError):
        newest_first = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime, reverse=True)
        return newest_first[:MAX_LOOKED_AT]
    return []


def _first_line(name: str) -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"===== {name}: process {os.getpid()} on {socket.gethostname()} since {since}\n".encode()


def tail(path: Path, num_bytes: int) -> bytes:
    """The last bytes of a file, at most so many. Raises OSError."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - num_bytes))
        return file.read(num_bytes)


def _descriptor_folder() -> str:
    """The folder that this process's stderr lies in."""
    with contextlib.suppress(OSError):
        return os.path.dirname(os.readlink("/proc/self/fd/2"))
    return "?"


def _note_exits(name: str) -> None:
    """A call of os._exit leaves a line in the log: no other trace tells it from a SIGKILL.

    The parent of a Ray worker is the raylet, which tells nobody the status that it ended with.
    """
    really_exit, pid = os._exit, os.getpid()

    def noted_exit(status: int) -> NoReturn:
        if os.getpid() == pid:  # Not a child that was forked, which ends so in order.
            os.write(2, f"{name} ends by os._exit({status})\n".encode())
        really_exit(status)

    os._exit = noted_exit
