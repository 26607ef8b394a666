"""One environment's processes, as the pool sees them: its template, the places that it starts, and
who plays where.

    template --starts--> PlaceProcess --plays--> Playing (one, or several on an event loop), each asked one thing
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import subprocess
import time
import uuid
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field

from core import children
from core.text import shown_name
from environments import EnvironmentFailure, FailureKind, Turn
from environments.place import CANCEL_LIMIT_S
from environments.spec import EnvironmentSpec
from environments.template import Pattern
from environments.tool_errors import ToolErrors
from environments.wire import Channel, PlaceOrder, Question, Reply, TemplateReport

STARTUP_TIMEOUT_S = 60.0
AGAIN_AFTER_S = 5.0
"""A template that could not be started is tried again after this."""
END_TIMEOUT_S = 5.0
CANCEL_TIMEOUT_S = CANCEL_LIMIT_S + 2.0
IDLE_S = 60.0
"""A place's process that plays nothing for as long is ended."""
EPISODES_OF_A_HOST = 16
MARK = "AGRO_PLACES"
"""An environment variable of a template, by which whatever comes of it is found."""

_METHODS = {"reset": "reset", "act": "its answer", "finish": "get_reward"}

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Playing:
    """An open episode, what it is asked, and until when that is to be answered; of one that is over, until
    when its process is to have forgotten it.

    is_cancelled  whether its process is to give up what it is asked, and owes the word that it has
    """

    number: int
    question: Question | None = None
    future: Future[Turn] | None = None
    deadline_s: float | None = None
    num_pauses: int = 0
    process: PlaceProcess | None = None
    failure: EnvironmentFailure | None = None
    is_over: bool = False
    is_cancelled: bool = False

    def answer(self, outcome: Turn | EnvironmentFailure) -> None:
        """Completes what is asked; a failure is kept for what will be."""
        future, self.future, self.question = self.future, None, None
        if not self.is_over:  # Else the moment is its process's, which may be silent.
            self.deadline_s = None
        if isinstance(outcome, Turn):
            assert future is not None
            future.set_result(outcome)
            return
        self.failure = self.failure or outcome
        if future is not None:
            future.set_exception(self.failure)


@dataclass(eq=False)
class PlaceProcess:
    """A process in which episodes are played.

    deadline_s  the moment until which it must have begun; None once it has
    late        what is told of its episodes where it is killed because one did not react
    idle_s      since when it plays nothing
    """

    number: int
    channel: Channel
    deadline_s: float | None = None
    playing: dict[int, Playing] = field(default_factory=dict)
    is_begun: bool = False
    is_retired: bool = False
    is_killed: bool = False
    late: str = ""
    idle_s: float = 0.0


@dataclass
class PoolCounts:
    """What has happened in a pool: processes started, episodes that failed by kind, processes that episodes
    left behind and that were killed.
    """

    started: int = 0
    failures: Counter[FailureKind] = field(default_factory=Counter)
    leftovers: int = 0


class Nursery:
    """The processes of one environment. Everything is called in the pool's turns, and nothing waits.

    `ask` asks for an answer of an episode, `end` forgets the episode; `tick` keeps the deadlines;
    `take_reports` and `take_replies` are called when a socket has something.
    """

    def __init__(
        self,
        spec: EnvironmentSpec,
        turn_timeout_s: float,
        memory_bytes: int,
        selector: selectors.BaseSelector,
        counts: PoolCounts,
    ) -> None:
        self._spec, self._timeout_s, self._memory_bytes = spec, turn_timeout_s, memory_bytes
        self._selector, self._counts = selector, counts
        self._shown = shown_name(spec.name, spec.path)
        self._tool_errors = ToolErrors(self._shown)
        self._room = EPISODES_OF_A_HOST if spec.is_async else 1
        self._template: children.Child | None = None
        self._orders: Channel | None = None
        self._ready_deadline_s: float | None = None
        self._broken, self._retry_s, self._mark = "", 0.0, ""
        self._processes: dict[int, PlaceProcess] = {}
        # Of those, by number, the ones that play nothing and may; not of an asynchronous environment.
        self._resting: dict[int, PlaceProcess] = {}

    @property
    def is_awaited(self) -> bool:
        """Returns whether there is a deadline to keep."""
        return self._ready_deadline_s is not None or any(
            process.playing or process.deadline_s is not None for process in self._processes.values()
        )

    # --- Asked by the pool ---

    def start(self) -> None:
        """Starts the template, unless it lives or has just failed to."""
        if self._template is not None or time.monotonic() < self._retry_s:
            return
        self._broken, self._mark = "", uuid.uuid4().hex
        variables = {
            MARK: self._mark,
            # A thread for each core in each place would be too many, and a template must run one to fork.
            **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
            # An episode that is played again iterates its sets in the same order.
            "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),
        }
        template = None
        try:
            template = children.start("environments.template:serve", variables)
            self._selector.register(template.socket, selectors.EVENT_READ, (self, None))
        except OSError as error:
            self._broken = f"no process could be started: {error}"
            self._retry_s = time.monotonic() + AGAIN_AFTER_S
            if template is not None:
                children.kill(template.process)
                template.socket.close()
            return
        self._template = template
        self._orders = Channel(template.socket, TemplateReport)
        self._ready_deadline_s = time.monotonic() + STARTUP_TIMEOUT_S
        self._order(Pattern(self._spec.name, self._spec.path, self._memory_bytes))

    def ask(self, playing: Playing, question: Question, future: Future[Turn]) -> None:
        """Asks an episode something, in the process that it keeps until its end."""
        playing.question, playing.future = question, future
        if playing.failure is None and playing.process is None:
            self.start()
            if self._orders is None:
                self._fail(playing, "crash", self._broken)
            else:
                self._give_process(playing)
        if playing.failure is not None:
            playing.answer(playing.failure)
            return
        assert playing.process is not None
        if playing.process.is_begun:
            self._start_clock(playing)
        self._send(playing.process, question)

    def _give_process(self, playing: Playing) -> None:
        try:
            playing.process = self._free_process()
        except OSError as error:  # No file descriptors are left, say; there may be some for the next.
            self._fail(playing, "crash", f"no process could be started for it: {error}")
        else:
            playing.process.playing[playing.number] = playing

    def pause(self, playing: Playing) -> None:
        """Stops the clock of what an episode is asked."""
        playing.num_pauses += 1
        if not playing.is_over:
            playing.deadline_s = None

    def resume(self, playing: Playing) -> None:
        """Starts the clock again, unless it is stopped for another reason."""
        playing.num_pauses -= 1
        if playing.question is not None and playing.process is not None and playing.process.is_begun:
            self._start_clock(playing)

    def end(self, playing: Playing) -> None:
        """Forgets an episode, unless its process does so by itself. The process plays another if this one was
        answered, did not fail, and left nothing behind.
        """
        if playing.is_over:
            return
        process, was_asked, failure = playing.process, playing.question is not None, playing.failure
        playing.answer(EnvironmentFailure("closed", "the episode was closed"))
        if process is None or process.is_killed or playing.number not in process.playing:
            return
        if was_asked or (failure is not None and not self._spec.is_async):
            self._give_up(process, playing)
        else:
            _leave(playing)
            self._send(process, Question(playing.number, "end"))

    def close(self) -> None:
        """Lets the template end all places and itself; what is asked fails as `closed`."""
        for process in [*self._processes.values()]:
            self._forget(process, "closed", "the pool was closed")
        if self._orders is not None:
            self._selector.unregister(self._orders.socket)
            self._orders.close()

    def wait(self, timeout_s: float) -> None:
        """Waits for the end of a template that was told to end; kills what is left of its family then."""
        if self._template is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._template.process.wait(max(0.0, timeout_s))
            self._kill_family()

    # --- Told by processes ---

    def take_reports(self) -> None:
        """Takes what the template says."""
        if self._orders is None:  # It was lost since its socket was looked at.
            return
        self._orders.flush()
        try:
            reports: list[TemplateReport] = self._orders.receive()
        except EOFError:
            self._lose_template()
            return
        for report in reports:
            if report.what == "ready":
                self._ready_deadline_s = None
                for process in self._processes.values():
                    process.deadline_s = time.monotonic() + STARTUP_TIMEOUT_S
            elif report.what == "broken":
                self._broken = report.how
            elif report.number in self._processes:
                self._bury(self._processes[report.number], report)
        self._listen(self._orders)

    def take_replies(self, process: PlaceProcess) -> None:
        """Takes what a place's process says."""
        if process.number not in self._processes:  # It was buried since its socket was looked at.
            return
        process.channel.flush()
        try:
            replies: list[Reply] = process.channel.receive()
        except EOFError:  # It has ended, or has closed its socket; its template will say how it ended.
            self._selector.unregister(process.channel.socket)
            self._kill(process)
            return
        for reply in replies:
            self._take(process, reply)
        self._listen(process.channel, process)

    def tick(self, now_s: float) -> None:
        """Fails what was not answered in time, and ends what plays nothing."""
        if self._ready_deadline_s is not None and now_s >= self._ready_deadline_s:
            self._broken = f"importing it did not end within {STARTUP_TIMEOUT_S:g} s"
            self._ready_deadline_s = None
            self._kill_family()
        for process in [*self._processes.values()]:
            if process.is_killed:
                continue
            if process.deadline_s is not None and now_s >= process.deadline_s:
                self._kill(process, f"its process did not begin within {STARTUP_TIMEOUT_S:g} s")
            late = [one for one in process.playing.values() if _is_late(one, now_s)]
            for playing in late:
                self._be_late(process, playing)
            if not process.playing and process.is_begun and now_s - process.idle_s >= IDLE_S:
                self._kill(process)

    # --- What comes of it ---

    def _take(self, process: PlaceProcess, reply: Reply) -> None:
        if reply.what == "begun":
            process.is_begun, process.deadline_s = True, None
            for playing in process.playing.values():
                if playing.is_cancelled:
                    playing.deadline_s = time.monotonic() + CANCEL_TIMEOUT_S
                self._start_clock(playing)
            return
        if reply.episode not in process.playing:
            return
        playing = process.playing[reply.episode]
        if reply.what in ("left", "cancelled"):
            del process.playing[reply.episode]
            process.idle_s = time.monotonic()
            process.is_retired |= bool(reply.processes or reply.threads)
            if reply.threads:
                _log.warning("environment %s leaves threads behind when an episode ends", self._shown)
            if process.is_retired and not process.playing:
                self._kill(process)
            elif not (process.is_killed or self._spec.is_async):
                self._resting[process.number] = process
        elif playing.question is not None and reply.turn is not None:
            self._tool_errors.count(len(playing.question.calls), reply.turn)
            if reply.turn.done and not self._spec.is_async:
                _leave(playing)
            playing.answer(reply.turn)
        elif playing.question is not None:
            self._fail(playing, reply.kind, reply.text)

    def _be_late(self, process: PlaceProcess, playing: Playing) -> None:
        if playing.is_cancelled or (playing.is_over and not self._spec.is_async):
            self._kill(process, "another episode in its process did not react")
            return
        if playing.is_over:
            process.is_retired = True
            self._give_up(process, playing)
            _log.warning(
                "environment %s: close did not end within %g s; it is cancelled",
                self._shown,
                END_TIMEOUT_S,
            )
            return
        assert playing.question is not None
        what = "it" if playing.question.what == "run" else _METHODS[playing.question.what]
        self._fail(
            playing,
            "timeout",
            f"{what} did not end within {self._timeout_s:g} s; where it needs longer, raise "
            "actors.turn_timeout_s",
        )
        self._give_up(process, playing)

    def _give_up(self, process: PlaceProcess, playing: Playing) -> None:
        """Ends an episode that was not answered: with its process, or on an event loop by itself."""
        if not self._spec.is_async:
            self._kill(process)
            return
        playing.is_over = playing.is_cancelled = True
        playing.deadline_s = time.monotonic() + CANCEL_TIMEOUT_S if process.is_begun else None
        self._send(process, Question(playing.number, "cancel"))

    def _kill(self, process: PlaceProcess, late: str = "") -> None:
        """Has the process killed; it is buried when its template says how it ended."""
        if not process.is_killed:
            process.is_killed, process.late = True, late
            self._resting.pop(process.number, None)
            self._order(PlaceOrder("kill", process.number))

    def _bury(self, process: PlaceProcess, report: TemplateReport) -> None:
        if report.leftovers:
            self._counts.leftovers += report.leftovers
            _log.warning(
                "environment %s leaves processes behind when an episode ends; they are killed",
                self._shown,
            )
        if report.used:
            self._forget(
                process,
                "memory",
                f"it used {children.shown_gib(report.used)} GiB of memory with its children, more than "
                f"rewards.memory_gib = {self._memory_bytes / 2**30:g}",
            )
        elif process.late:
            self._forget(process, "timeout", process.late)
        else:
            self._forget(process, "crash", f"its process died: {report.how}")

    def _forget(self, process: PlaceProcess, kind: FailureKind, why: str) -> None:
        """Fails the episodes of a process that is no more."""
        del self._processes[process.number]
        self._resting.pop(process.number, None)
        with contextlib.suppress(KeyError, ValueError):  # Its socket was closed by the other side before.
            self._selector.unregister(process.channel.socket)
        process.channel.close()
        for playing in process.playing.values():
            self._fail(playing, kind, why)

    def _lose_template(self) -> None:
        """Buries all processes with their template, which the next question starts again."""
        assert self._template is not None
        assert self._orders is not None
        self._kill_family()
        how = "it does not react to SIGKILL"
        with contextlib.suppress(subprocess.TimeoutExpired):
            how = children.describe_exit(self._template.process.wait(1.0))
        self._selector.unregister(self._orders.socket)
        self._orders.close()
        self._template = self._orders = self._ready_deadline_s = None
        kind: FailureKind = "raised" if self._broken else "crash"
        if self._broken:
            self._retry_s = time.monotonic() + AGAIN_AFTER_S
        for process in [*self._processes.values()]:
            self._forget(process, kind, self._broken or f"the process that started its own died: {how}")

    def _kill_family(self) -> None:
        """Kills the template and whatever carries its mark, also what has left its session."""
        if self._template is not None:
            children.kill(self._template.process)
            try:
                children.kill_marked(f"{MARK}={self._mark}")
            except OSError as error:
                _log.warning("what environment %s left behind may live on: %s", self._shown, error)

    def _fail(self, playing: Playing, kind: FailureKind, text: str) -> None:
        if playing.failure is None and kind != "closed":
            self._counts.failures[kind] += 1
        playing.answer(EnvironmentFailure(kind, " ".join(text.split())))

    # --- Sockets and clocks ---

    def _free_process(self) -> PlaceProcess:
        """Returns a process with room for an episode, or a new one."""
        if self._resting:
            return self._resting.pop(min(self._resting))  # So that the youngest rest for long, and end.
        if (free := self._emptiest()) is not None:
            return free
        ours, theirs = socket.socketpair()
        process = PlaceProcess(self._counts.started + 1, Channel(ours, Reply))
        try:
            self._selector.register(ours, selectors.EVENT_READ, (self, process))
        except OSError:
            ours.close()
            theirs.close()
            raise
        self._counts.started += 1
        if self._ready_deadline_s is None:
            process.deadline_s = time.monotonic() + STARTUP_TIMEOUT_S
        self._processes[process.number] = process
        self._order(PlaceOrder("start", process.number), theirs.detach())
        return process

    def _emptiest(self) -> PlaceProcess | None:
        """Returns the process with the most room of an asynchronous environment; None where none has any."""
        free = [
            process
            for process in self._processes.values()
            if self._spec.is_async
            and not process.is_killed
            and not process.is_retired
            and len(process.playing) < self._room
            # Until it has given up what it was to, its event loop may be blocked.
            and not any(playing.is_cancelled for playing in process.playing.values())
        ]
        return min(free, key=lambda process: (not process.is_begun, len(process.playing)), default=None)

    def _start_clock(self, playing: Playing) -> None:
        if playing.question is not None and playing.num_pauses == 0:
            playing.deadline_s = time.monotonic() + self._timeout_s

    def _order(self, message: PlaceOrder | Pattern, fd: int | None = None) -> None:
        if self._orders is not None:
            self._orders.send(message, fd)
            self._listen(self._orders)

    def _send(self, process: PlaceProcess, question: Question) -> None:
        process.channel.send(question)
        self._listen(process.channel, process)

    def _listen(self, channel: Channel, process: PlaceProcess | None = None) -> None:
        """Wants to hear from the socket, and when it takes more of what waits."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if channel.is_waiting else 0)
        with contextlib.suppress(KeyError, ValueError):  # The other side has closed it.
            if self._selector.get_key(channel.socket).events != events:
                self._selector.modify(channel.socket, events, (self, process))


def _leave(playing: Playing) -> None:
    """Notes that an episode is over, which its process is to say as well, and can be asked nothing more."""
    playing.is_over, playing.deadline_s = True, time.monotonic() + END_TIMEOUT_S
    playing.failure = playing.failure or EnvironmentFailure("closed", "the episode is over")


def _is_late(playing: Playing, now_s: float) -> bool:
    return playing.deadline_s is not None and now_s >= playing.deadline_s
