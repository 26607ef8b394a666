"""Why a process is gone, in a few lines: what it raised, what Ray knows, what it wrote last, and what the
kernel counts.

    what Ray says of it  --.
    what it wrote        --+--cause_from--> Cause: exit code | signal | out of memory | node lost | hang | exception
    the kernel's counter --'                       (processes.py makes them of Ray's errors)

Nobody tells the exit status of a Ray worker: its parent is the raylet, which hears only that a connection
ended. What is known is put together from Ray's text, from the process's log (faulthandler's trace, the line
of os._exit) and from the kernel's counter of processes that it killed for lack of memory.
"""

from __future__ import annotations

import contextlib
import re
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from core.process_log import last_lines

What: TypeAlias = Literal["exit code", "signal", "out of memory", "node lost", "hang", "exception", "unknown"]

KILLED = "its process was killed (kill -9, or the kernel for lack of memory) or crashed"
_SILENT_END = "connection error code 2. End of file"  # Ray follows it up with a paragraph of guesses.
_EXIT_CODE = re.compile(r"exit code (\d+)")
_OWN_EXIT = re.compile(r" ends by os\._exit\((\d+)\)$", re.MULTILINE)
_FATAL = re.compile(r"^(?:Fatal Python error: (?=.)|!+ (?=Segfault enc))(.+?)(?: !+)?$", re.MULTILINE)
_FATAL_SIGNALS = {
    "Segmentation fault": signal.SIGSEGV,
    "Segfault encountered": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Floating point exception": signal.SIGFPE,
    "Illegal instruction": signal.SIGILL,
}
"""The words of faulthandler, and of a library of vLLM's that takes this one signal from it."""
_MEMORY_WORDS = re.compile(
    r"out of memory|outofmemory|memoryerror|low on memory|lack of memory\b.*counter", re.I
)


@dataclass(frozen=True)
class Cause:
    """Why a process is gone. `code`: its exit code, or the number of the signal; `last_words`: lines of its
    log.
    """

    what: What
    sentence: str
    code: int | None = None
    last_words: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The sentence, and under it the last words, indented."""
        return "\n".join([self.sentence, *(f"  {line}" for line in self.last_words)])


def hung(sentence: str) -> Cause:
    """The cause of one that lives and does not work: `no answer for 3 s, its process is stopped`."""
    return Cause("hang", sentence)


def cause_from(known: str, words: str, pid: int | None) -> Cause:
    """The cause from what Ray says of the end ('' where it says nothing) and from what the process wrote."""
    which = "" if pid is None else f" (pid {pid})"
    shown = tuple(last_lines(words))
    if fatal := list(_FATAL.finditer(words)):
        number = _FATAL_SIGNALS.get(fatal[-1][1])
        name = "" if number is None else f", {number.name}"
        return Cause(
            "signal", f"its process crashed: {fatal[-1][1]}{name}{which}", number and int(number), shown
        )
    if own := list(_OWN_EXIT.finditer(words)):
        code = int(own[-1][1])
        return Cause("exit code", f"its process ended itself with exit code {code}{which}", code, shown)
    if "SIGTERM" in known:
        return Cause("signal", f"its process was ended by SIGTERM{which}", int(signal.SIGTERM), shown)
    if code_text := _EXIT_CODE.search(known):
        return Cause(
            "exit code", f"its process ended with exit code {code_text[1]}{which}", int(code_text[1]), shown
        )
    if _SILENT_END in known or not known:
        return Cause("signal", f"{KILLED}{which}", int(signal.SIGKILL), shown)
    return Cause("unknown", f"{known[:300]}{which}", None, shown)


class KernelKills:
    """Processes of this machine that the kernel has killed for lack of memory: its counter, where it has
    one.
    """

    def __init__(self, path: Path = Path("/proc/vmstat")) -> None:
        self._path = path
        self._seen = self._count()

    def explain(self, cause: Cause) -> Cause:
        """The cause of a death by SIGKILL, which the kernel's counter explains where it has risen since the
        last one.
        """
        if cause.what != "signal" or cause.code != signal.SIGKILL:
            return cause
        before, self._seen = self._seen, self._count()
        if before is None or self._seen is None or self._seen <= before:
            return cause
        sentence = cause.sentence.replace(
            KILLED, "the kernel killed it for lack of memory (its counter of that has risen)"
        )
        return replace(cause, what="out of memory", sentence=sentence)

    def _count(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            for line in self._path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return None


def memory_hint(cause: str) -> str:
    """What to lower when `cause` may be a lack of memory."""
    likely = "This looks like" if _MEMORY_WORDS.search(cause) else "If it is"
    knobs = "actors.slots and actors.engine_memory"
    return f"{likely} a lack of memory: lower {knobs}, or run fewer actors."
