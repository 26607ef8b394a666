"""Runs a piece of generated Python in a process of its own, with limits, and says how it ended.

    run(program, stdin, limits) --> Ended: "exit", or the limit that it ran into; bounded output; the exit code
    isolation()                 --> what this machine's kernel keeps from it

What is held everywhere: time on the clock and on the CPU, memory of all its processes together, their number,
the size of what it writes and prints, an environment without the caller's variables, an empty working
directory; what it leaves running is killed. Where the kernel allows namespaces without privileges, it has no
network, sees and can signal no process but its own, and can write nowhere but in that directory. Where it
does not, a filter of system calls refuses sockets, and processes too, since nothing else could bound them.
`Ended.isolation` says which of these held.

It is NOT a security boundary, and is no place for programs of people who mean harm. A program runs as the
same user, reads whatever this user can read, may reach Unix sockets by their paths, and meets the whole
kernel. It holds what a policy under training writes by accident, or in search of reward. Run the actors in
containers or virtual machines of their own where that is not enough.

Memory is watched from outside, some fifty times a second: a program is a little beyond its limit when it is
killed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from core import children

START_LIMIT_S = 30.0
_LOOK_EVERY_S = 0.02
_LAUNCHER = Path(__file__).with_name("launcher.py")
_REPORT_BYTES = 2**20


class Limits(NamedTuple):
    """What one program may use, with all the processes that it starts.

    cpu_s         seconds on the CPU, of each process; rounded up to whole ones
    wall_s        seconds on the clock, from its start; None: three times as many, and one
    memory_bytes  memory touched by all of them together
    file_bytes    the size of a file, and of all in the working directory where that is in memory
    processes     how many there may be at once, threads included; where there are no namespaces, one with
                  any number of threads
    output_bytes  what each of stdout and stderr may hold
    """

    cpu_s: float = 5.0
    wall_s: float | None = None
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    processes: int = 16
    output_bytes: int = 64 << 10

    @property
    def clock_s(self) -> float:
        """Returns the seconds on the clock that it may take."""
        return self.wall_s if self.wall_s is not None else 3 * self.cpu_s + 1


class Isolation(NamedTuple):
    """What the kernel keeps from a program: the network, other processes, files outside its directory."""

    network: bool
    processes: bool
    files: bool

    def __str__(self) -> str:
        """Says it in words, for the start of a run."""
        kept = [name for name, holds in zip(self._fields, self, strict=True) if holds]
        open_to_it = [name for name, holds in zip(self._fields, self, strict=True) if not holds]
        words = {"network": "the network", "processes": "other processes", "files": "other files"}
        told = f"kept from {_listed([words[name] for name in kept])}" if kept else "kept from nothing"
        if not open_to_it:
            return told
        return f"{told}; this kernel does not keep it from {_listed([words[name] for name in open_to_it])}"


class Ended(NamedTuple):
    """How a program ended.

    how        "exit", or what it ran into: "wall time", "cpu time", "memory", "output"
    code       its exit code, negative for a signal; None where it was killed for a limit
    report     what it wrote to file descriptor 3, which is neither stdout nor stderr
    """

    how: str
    code: int | None
    stdout: str
    stderr: str
    report: bytes
    wall_s: float
    isolation: Isolation

    @property
    def in_words(self) -> str:
        """Returns the end in a few words: "exit code 1", "SIGSEGV", "too much memory"."""
        if self.how != "exit":
            return f"too much {self.how}"
        assert self.code is not None
        if self.code >= 0:
            return f"exit code {self.code}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.code).name
        return f"signal {-self.code}"


def run(program: str, stdin: str = "", limits: Limits | None = None, *, use_namespaces: bool = True) -> Ended:
    """Runs `program`, the text of a Python file, and returns how it ended, at the latest when its time is up.

    It blocks, and may be called from several threads; the program dies with the thread that called. Raises
    OSError where no process can be started. `use_namespaces=False` is for the tests of what holds without.
    """
    limits = limits or Limits()
    base = Path(tempfile.mkdtemp(prefix="agro-sandbox-"))
    try:
        (base / "work").mkdir()
        text = program.encode("utf-8", errors="replace")
        (base / "program.py").write_bytes(text)
        (base / "stdin").write_bytes(stdin.encode("utf-8", errors="replace"))
        with _Running(base, limits, use_namespaces) as running:
            return running.watch()
    finally:
        shutil.rmtree(base, ignore_errors=True)


@functools.cache
def isolation() -> Isolation:
    """Returns what is kept from a program on this machine; it is found out by running one."""
    return run("").isolation


class _Running:
    """A program under way: its launcher, and the pipes from it."""

    def __init__(self, base: Path, limits: Limits, use_namespaces: bool) -> None:
        self._limits = limits
        self._status = bytearray()
        self._kept = {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}
        status, status_fd = os.pipe()
        report, report_fd = os.pipe()
        settings = self._settings(base, use_namespaces, status_fd, report_fd)
        try:
            with open(base / "stdin", "rb") as stdin:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_LAUNCHER), json.dumps(settings)],
                    stdin=stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=[status_fd, report_fd],
                    start_new_session=True,
                    env=settings["env"],
                )
        except BaseException:
            os.close(status)
            os.close(report)
            raise
        finally:
            os.close(status_fd)
            os.close(report_fd)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._selector = selectors.DefaultSelector()
        self._fds = [self._process.stdout.fileno(), self._process.stderr.fileno(), report, status]
        for fd, name in zip(self._fds, (*self._kept, "status"), strict=True):
            os.set_blocking(fd, False)
            self._selector.register(fd, selectors.EVENT_READ, name)
        self._own_fds = (status, report)

    def _settings(self, base: Path, use_namespaces: bool, status_fd: int, report_fd: int) -> dict[str, Any]:
        limits, work = self._limits, str(base / "work")
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        env = {
            "PATH": os.defpath,
            "HOME": work,
            "TMPDIR": work,
            "PYTHONPATH": work,
            "PYTHONHASHSEED": "0",  # The order of a set is no reason for another reward.
            "LANG": "C.UTF-8",
            **one_thread,
        }
        return {
            "parent_pid": os.getpid(),
            "namespaces": use_namespaces,
            "work_dir": work,
            "argv": [sys.executable, "-B", "-X", "utf8", str(base / "program.py")],
            "env": env,
            "cpu_s": math.ceil(limits.cpu_s),
            "address_bytes": 2 * limits.memory_bytes + (1 << 30),
            "file_bytes": limits.file_bytes,
            "processes": limits.processes,
            "status_fd": status_fd,
            "report_fd": report_fd,
        }

    def watch(self) -> Ended:
        """Returns when the program has ended, or has been killed for a limit."""
        began_s = started_s = time.monotonic()
        how = ""
        while not how:
            has_status = len(self._status)
            self._read(_LOOK_EVERY_S)
            if not has_status and self._status:
                started_s = time.monotonic()
            # What is there is read before it is said that no more comes.
            is_over = self._process.poll() is not None
            self._read(0)
            timeout_s = self._limits.clock_s if self._status else START_LIMIT_S
            how = self._exceeded() or ("exit" if is_over else "")
            if not how and time.monotonic() - started_s > timeout_s:
                how = "wall time"
        self._end()
        return self._ended(how, time.monotonic() - (started_s if self._status else began_s))

    def _exceeded(self) -> str:
        """Returns the limit that the program has exceeded; empty where it has none."""
        if any(len(self._kept[name]) > self._limits.output_bytes for name in ("stdout", "stderr")):
            return "output"
        if len(self._kept["report"]) > _REPORT_BYTES:
            return "output"
        pids = _family(self._process.pid)
        used = children.used_bytes(pids, self._limits.memory_bytes)
        return "memory" if used > self._limits.memory_bytes else ""

    def _read(self, wait_s: float) -> None:
        for key, _ in self._selector.select(wait_s):
            try:
                data = os.read(key.fd, 2**16)
            except BlockingIOError:
                continue
            (self._status if key.data == "status" else self._kept[key.data]).extend(data)
            if not data:
                self._selector.unregister(key.fd)
        if not self._selector.get_map():
            time.sleep(min(wait_s, 0.001))

    def _end(self) -> None:
        """Kills what there is left of the program, and waits for its launcher."""
        if self._process.poll() is None:
            # The launcher last: what it started ends with it, unless it was told not to.
            for pid in sorted(_family(self._process.pid) - {self._process.pid}, reverse=True):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            children.kill(self._process)
        self._process.wait()

    def _said(self) -> dict[str, Any]:
        """Returns what the launcher and its init have said so far."""
        said: dict[str, Any] = {}
        for line in bytes(self._status).splitlines():
            with contextlib.suppress(ValueError):
                said.update(json.loads(line))
        return said

    def _ended(self, how: str, wall_s: float) -> Ended:
        said = self._said()
        if "network" not in said or "problem" in said:
            words = said.get("problem") or bytes(self._kept["stderr"]).decode(errors="replace").strip()
            raise OSError(f"no sandboxed program could be started: {words or 'its launcher says nothing'}")
        code = said.get("code") if how == "exit" else None
        if how == "exit" and code is None:
            code = -signal.SIGKILL  # It has killed its own parent.
        if code == -signal.SIGXCPU:
            how, code = "cpu time", None
        texts = {
            name: bytes(data[: self._limits.output_bytes]).decode(errors="replace")
            for name, data in self._kept.items()
        }
        kept = Isolation(said["network"], said["processes"], said["files"])
        report = bytes(self._kept["report"])
        return Ended(how, code, texts["stdout"], texts["stderr"], report, wall_s, kept)

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process.poll() is None:
            self._end()
        self._selector.close()
        for fd in self._own_fds:
            os.close(fd)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def _family(pid: int) -> set[int]:
    """Returns the process and its descendants. It asks the kernel for children: to read all of /proc, as
    others do, is too slow for fifty times a second.
    """
    found, open_pids = {pid}, [pid]
    while open_pids:
        parent = open_pids.pop()
        with contextlib.suppress(OSError):
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as file:
                    born = set(map(int, file.read().split())) - found
                found |= born
                open_pids += born
    return found


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
