"""Signals that end a run: the first one in order, a second one at once, a third one on the spot.

The answer to a signal comes from a thread of its own (woken by a pipe that Python's handler in C writes to),
because the main thread may be in a long call of a library, such as an import or the start of Ray. This module
imports nothing that takes time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_CODES: dict[str | None, int] = {None: 0, "SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}
"""By the signal that ended the run, as a shell has it: 128 and the signal's number."""
TELL_TIMEOUT_S = 1.0
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_AGAIN = signal.SIGURG
"""From the teller to the main thread. It means nothing else here, and is ignored by who does not know it."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the process without the rest of the work; `name` is the signal's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class StopSignal:
    """Takes SIGINT, SIGTERM and SIGHUP as a request to end; `name` is the first one's, None until it comes.

        with StopSignal() as stop:
            prepare()                                  # a signal raises Interrupted here
            stop.end_in_order("type the same again")
            while stop.name is None:
                step()

    The first signal raises Interrupted in the main thread as long as no process of the run has started; after
    `end_in_order` it only sets `name`, and a second one raises. A SIGHUP that is ignored from the start, as
    under `nohup`, stays ignored.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._in_order = False
        self._go_on = ""
        self._num_told = self._num_handled = 0
        self._has_interrupted = False

    def __enter__(self) -> StopSignal:
        numbers = [
            number
            for number in _NUMBERS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        ]
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        self._before[_LOOK_AGAIN] = signal.signal(_LOOK_AGAIN, self._look_again)
        reading, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._teller = threading.Thread(target=self._tell, args=(reading,), name="signals", daemon=True)
        self._teller.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._pipe)  # That ends the thread, once it has told what came.
        self._teller.join(TELL_TIMEOUT_S)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Puts off the first signal's Interrupted to the end of what must not be broken off in the middle."""
        self._in_order = True
        try:
            yield
        finally:
            self._in_order = False
        self.raise_if_asked()

    def end_in_order(self, go_on: str) -> None:
        """Says that there is something to end in order from now on; `go_on` says what to type to go on with
        it afterwards.
        """
        self._go_on = go_on
        self._in_order = True

    def raise_if_asked(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self.name is not None:
            raise Interrupted(self.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._num_handled += 1
        self._leave_closed_terminals()
        name = signal.Signals(number).name
        self.name = self.name or name
        if not self._in_order:
            raise Interrupted(name)
        self._interrupt_at_second(name)

    def _look_again(self, number: int, frame: FrameType | None) -> None:
        """Interrupts for a second signal that `_handle` has not seen: two of a kind during one long call of a
        library are one call of it, and that may come before the second is counted.
        """
        if self.name is not None:
            self._interrupt_at_second(self.name)

    def _interrupt_at_second(self, name: str) -> None:
        is_second = max(self._num_handled, self._num_told) > 1
        if self._in_order and is_second and not self._has_interrupted:
            self._has_interrupted = True
            raise Interrupted(name)

    def _tell(self, reading: int) -> None:
        while received := os.read(reading, 1):
            number = received[0]
            if number not in _NUMBERS:
                continue
            self._num_told += 1
            self._leave_closed_terminals()
            name = signal.Signals(number).name
            with contextlib.suppress(OSError):
                os.write(2, f"{name}: {self._answer()}\n".encode())
            if self._num_told > 2:
                # What is left below this process ends with it (cluster/guardian.py).
                os._exit(EXIT_CODES[name])
            if self._num_told > 1:
                signal.pthread_kill(threading.main_thread().ident or 0, _LOOK_AGAIN)
        os.close(reading)

    def _answer(self) -> str:
        if not self._in_order:
            return "ending; no process of the run has started yet"
        if self._num_told == 1:
            return "ending in order; a second signal interrupts"
        return f"interrupting: what was acknowledged is kept; to go on, {self._go_on}"

    def _leave_closed_terminals(self) -> None:
        """Sends output of a closed terminal to nowhere: after a hang-up every write to it would fail, and
        with it what ends the run.
        """
        for descriptor in self._terminals:
            if not os.isatty(descriptor):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
