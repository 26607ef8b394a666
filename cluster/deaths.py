"""How the processes of a run die: one table, and the record of every death.

    fleet.py, learner.py, services.py --note--> Deaths --> RUN_DIR/deaths.jsonl     a line a death; nothing else writes it
                                                  |                                `--> launch.py why
                                                  `--> TrainingError                 where one role dies too often

`KINDS` says for each kind of process how its death is noticed, what it held, what is done, and when that is
given up; docs/deaths.md is made from it. What is no process of the run (its driver, Ray, the machine) ends
the run: `ENDS`.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from core.causes import Cause, KernelKills, memory_hint
from core.errors import TrainingError
from core.json_lines import JsonLines, Redactor, last_json_lines
from core.process_log import FOLDER, last_lines, log_path, role_of, words_of

FILE_NAME = "deaths.jsonl"
MOST_READ = 1000
"""Records that are read for `launch.py why`: a run of months may have more."""


@dataclass(frozen=True)
class ProcessKind:
    """One kind of process: what becomes of it, and of the run, in sentences without their full stop.

    `max_deaths` within `window_s` seconds end the run, with the cause of the last one: of one role
    (`actor-0` and its successors), or of all processes of the kind, where `together` has a name for them.
    """

    name: str
    noticed: str
    held: str
    done: str
    together: str = ""
    max_deaths: int = 5
    window_s: float = 300.0

    @property
    def policy(self) -> str:
        """The restarts' end, in a sentence."""
        whose = f"the {self.together}" if self.together else f"one {self.name}"
        return f"{self.max_deaths} deaths of {whose} within {self.window_s / 60:.0f} min end the run"

    def role(self, name: str) -> str:
        """What a process's deaths are counted for: `actor-0` of `actor-0.2`."""
        return self.together or role_of(name)


ACTOR = ProcessKind(
    "rollout actor",
    noticed="its call of run() ends within 2 s, or it does not answer: 2 s where its process is stopped, 3 s where it"
    " does nothing, 30 s where it works, 10 s on another machine; or its loop has not turned for run.timeout_s",
    held="leases on prompts, samples under way, finished groups that were not acknowledged",
    done="its leases are handed out again with the same seeds, and a successor with a name of its own takes its place",
)
RANK = ProcessKind(
    "learner rank",
    noticed="a call to a rank fails, and its process is gone or does not answer for 10 s",
    held="the steps since the newest checkpoint",
    done="all ranks start again from the newest checkpoint that verifies; the same batches come again; actors go on",
    together="learner ranks",
    window_s=1800.0,
)
SHARD = ProcessKind(
    "buffer shard",
    noticed="Ray has made another process in its place, which answers under a new process id",
    held="nothing that is not on disk: what it acknowledged is in its database",
    done="Ray starts it again, and repeats the calls that were under way; it recovers all it acknowledged",
    together="replay buffer",
)
BOARD = ProcessKind(
    "board",
    noticed="Ray has made another process in its place, which answers under a new process id",
    held="references to the newest snapshots, and the open evaluations",
    done="Ray starts it again; the driver tells it which evaluations are done and who ends, the learner publishes again,"
    " and open evaluations begin again",
)
MONITOR = ProcessKind(
    "monitor",
    noticed="Ray has made another process in its place, which answers under a new process id",
    held="the rates of the last seconds, and calls that were under way",
    done="Ray starts it again; it goes on in its files, with the newest row and the one that it held back",
)
REWARD_MODEL = ProcessKind(
    "reward model",
    noticed="Ray has made another process in its place, which answers under a new process id",
    held="conversations that waited for their rewards",
    done="Ray starts it again, where there is room, and repeats the calls that were under way; samples whose time is up"
    " meanwhile are errors",
)
KINDS = (ACTOR, RANK, SHARD, BOARD, MONITOR, REWARD_MODEL)

ENDS = (
    (
        "the driver",
        "its processes end within seconds (cluster/guardian.py); the same command with run.dir=RUN_DIR goes on from the"
        " newest checkpoint, and tells the death",
    ),
    (
        "Ray's control process, or this node's raylet",
        "the run ends within half a minute with one sentence, its summary and its report; the same command goes on",
    ),
)


def as_markdown() -> str:
    """Writes the tables of docs/deaths.md."""
    rows = [(kind.name, kind.noticed, kind.held, kind.done, kind.policy) for kind in KINDS]
    heads = ("what dies", "how that is noticed", "what it held", "what is done", "and at last")
    lines = [_row(heads), _row(["---"] * len(heads)), *map(_row, rows), ""]
    return "\n".join(
        [*lines, _row(("what else dies", "what happens")), _row(["---"] * 2), *map(_row, ENDS), ""]
    )


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


# --- The record ---


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """A line of deaths.jsonl.

    time         seconds since 1970
    step         optimizer steps done when it was noticed, as far as the monitor knew
    kind         name of a ProcessKind, or `driver`, or `run` where the run ended with an error
    name         the process: `actor-0.1`, `learner-rank-1`, `buffer-0`, `board`
    pid, host    its process id and machine, None and '' where they are not known
    what, code   the cause in a word (core/causes.py), and its exit code or the number of its signal
    cause        the cause in a sentence
    last_words   the last lines of its log, `log`: its file, below the run directory
    number       how many deaths of its role lie within the window, this one included
    """

    time: float
    step: int
    kind: str
    name: str
    pid: int | None = None
    host: str = ""
    what: str = "unknown"
    code: int | None = None
    cause: str
    noticed: str = ""
    held: str = ""
    done: str = ""
    last_words: tuple[str, ...] = ()
    log: str = ""
    number: int = 1


class HasPlace(Protocol):
    """A process's place: `core.processes.Whereabouts`, which knows Ray; this module is read without it."""

    @property
    def pid(self) -> int:
        """The process id on its machine."""

    @property
    def host(self) -> str:
        """The name of its machine."""


class DeathCount:
    """Deaths by role within the window of its kind."""

    def __init__(self) -> None:
        self._times_s: dict[str, tuple[float, deque[float]]] = {}  # By role: its window, and when it died.

    def note(self, role: str, now_s: float, window_s: float) -> int:
        """Notes a death of `role`; returns how many it had within the last `window_s` seconds, with this one.

        A role without a death within its window is forgotten.
        """
        self._times_s.setdefault(role, (window_s, deque()))[1].append(now_s)
        for name, (longest_s, times_s) in list(self._times_s.items()):
            while times_s and now_s - times_s[0] > longest_s:
                times_s.popleft()
            if not times_s:
                del self._times_s[name]
        return len(self._times_s[role][1])


class Deaths:
    """The deaths of this start of a run: counted, and written down in the run directory as soon as they are
    noticed. Example: `Deaths(run_dir).note(ACTOR, "actor-0", cause)`.
    """

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens RUN_DIR/deaths.jsonl. The supervisor sets `step`, optimizer steps done, at every turn."""
        self._run_dir, self._clock = run_dir, clock
        self._file = JsonLines(run_dir / FILE_NAME, Redactor(os.environ))
        self._kernel = KernelKills()
        self._recent = DeathCount()
        self._totals: Counter[ProcessKind] = Counter()
        self.step = 0

    def total(self, kind: ProcessKind) -> int:
        """Deaths of the kind so far, those of actors that retired anyway left out."""
        return self._totals[kind]

    def note(
        self,
        kind: ProcessKind,
        name: str,
        cause: Cause,
        *,
        where: HasPlace | None = None,
        noticed: str = "",
        held: str = "",
        done: str = "",
        counts: bool = True,
    ) -> Cause:
        """Writes the death of process `name` down; its cause, with what the kernel and its log know of it.

        `where` it was, None where that is not known; `noticed`, `held` and `done` of this death, where more
        is known than the kind's own sentences say. Raises TrainingError when the role has died too often
        within the kind's window; a death that does not count never does.
        """
        role = kind.role(name)
        log = log_path(self._run_dir, role_of(name))
        if where is None or where.host == socket.gethostname():  # The kernel of this machine counts its own.
            cause = self._kernel.explain(cause)
        if not cause.last_words:
            words = words_of(log, *((None, None) if where is None else (where.pid, where.host)))
            cause = replace(cause, last_words=tuple(last_lines(words)))
        number = self._recent.note(role, self._clock(), kind.window_s) if counts else 0
        self._totals[kind] += counts
        is_last = number >= kind.max_deaths
        done = f"the run ends: {kind.policy}" if is_last else done or kind.done
        death = Death(
            time=time.time(),
            step=self.step,
            kind=kind.name,
            name=name,
            what=cause.what,
            code=cause.code,
            cause=cause.sentence,
            noticed=noticed or kind.noticed,
            held=held or kind.held,
            done=done,
            last_words=cause.last_words,
            log=f"{FOLDER}/{log.name}" * log.is_file(),
            number=number,
        )
        self._write(
            death if where is None else msgspec.structs.replace(death, pid=where.pid, host=where.host)
        )
        if is_last:
            raise TrainingError(crash_loop(kind, role, number, cause))
        return cause

    def note_end(self, cause: str) -> None:
        """The run ends with an error, or by a signal."""
        self._write(Death(time=time.time(), step=self.step, kind="run", name="the run", cause=cause))

    def note_driver(self, *, pid: int, step: int, died_at: float, last_words: tuple[str, ...]) -> None:
        """The driver of an earlier start of this run had died, at `died_at` (since 1970) or soon after."""
        self._write(
            Death(
                time=died_at,
                step=step,
                kind="driver",
                name="driver",
                pid=pid,
                cause="its driver was killed, or the machine went down",
                noticed="the next start of the run found its status unfinished",
                held="the steps since the newest checkpoint",
                done="that start went on from the newest checkpoint",
                last_words=last_words,
                log="logs/driver.log",
            )
        )

    def close(self) -> None:
        """Closes the file; nothing more is noted."""
        self._file.close()

    def _write(self, death: Death) -> None:
        self._file.append(msgspec.to_builtins(death))


def crash_loop(kind: ProcessKind, role: str, number: int, cause: Cause) -> str:
    """The message of a run that stops because one part keeps dying."""
    text = f"{role} died {number} times within {kind.window_s / 60:.0f} min; the last time: {cause}"
    return f"{text}\n{memory_hint(str(cause))}" if kind is ACTOR else text


def read_deaths(run_dir: Path) -> list[Death]:
    """The newest `MOST_READ` deaths of the run in `run_dir`, oldest first; none of a run in which nobody
    died.

    A line that is torn, or that another version wrote, is left out. Raises OSError where the file cannot be
    read.
    """
    found = []
    for record in last_json_lines(run_dir / FILE_NAME, MOST_READ):
        try:
            found.append(msgspec.convert(record, Death))
        except msgspec.ValidationError:
            continue
    return found
