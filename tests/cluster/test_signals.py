"""What a signal does: answered at once, also by a process that is in a library's long call."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.signals import Interrupted, StopSignal
from tests.support import ROOT
from tests.support.clocks.machine import machine_s

pytestmark = pytest.mark.timed
PREAMBLE = """
import hashlib, sys, time
from cluster.signals import EXIT_CODES, Interrupted, StopSignal

def long_call():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)  # Half a second and more without Python code: no handler of Python's either.

try:
    with StopSignal() as stop:
        print("ready", flush=True)
"""
EPILOGUE = """
except Interrupted as interrupted:
    sys.exit(EXIT_CODES[interrupted.name])
"""
LOADING = "        while True: long_call()\n"
RUNNING = """
        stop.end_in_order("the same command with run.dir=runs/x")
        print("begun", flush=True)
        while stop.name is None: time.sleep(0.01)
        print("ended", stop.name, flush=True)
        sys.exit(EXIT_CODES[stop.name])
"""
ENDING = """
        stop.end_in_order("the same command with run.dir=runs/x")
        try:
            print("begun", flush=True)
            while True: long_call()
        finally:
            print("closed", flush=True)
            {closing}
"""


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Ends what a failed test has left: some of it would keep a core busy for ever."""
    yield
    for process in started:
        with process:
            process.kill()
    started.clear()


def start(body: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREAMBLE + body + EPILOGUE]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )  # type: ignore[call-overload]
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_to_begin(process: subprocess.Popen[str]) -> None:
    """From now on it ends in order."""
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"


def answer_to(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """The line that answers the signal, within a second."""
    assert process.stderr is not None
    start_s = machine_s()
    process.send_signal(number)
    line = process.stderr.readline()
    assert machine_s() - start_s < 1.0
    return line


CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_before_anything_has_started_a_signal_ends_the_process(number: signal.Signals, code: int) -> None:
    process = start(LOADING)
    assert answer_to(process, number) == f"{number.name}: ending; no process of the run has started yet\n"
    assert process.wait(60) == code


@pytest.mark.parametrize(("number", "code"), CODES)
def test_later_it_asks_for_an_end_in_order(number: signal.Signals, code: int) -> None:
    process = start(RUNNING)
    wait_to_begin(process)
    assert "ending in order" in answer_to(process, number)
    assert process.communicate(timeout=120)[0] == f"ended {number.name}\n"
    assert process.returncode == code


def test_a_second_one_interrupts_and_says_how_to_go_on_and_a_third_ends_on_the_spot() -> None:
    process = start(ENDING.format(closing=""))
    wait_to_begin(process)
    assert "ending in order; a second signal interrupts" in answer_to(process, signal.SIGTERM)
    second = answer_to(process, signal.SIGTERM)
    assert (
        second == "SIGTERM: interrupting: what was acknowledged is kept; to go on, the same command with "
        "run.dir=runs/x\n"
    )
    assert process.communicate(timeout=120)[0] == "closed\n"
    assert process.returncode == 143

    process = start(ENDING.format(closing="time.sleep(60)"))
    wait_to_begin(process)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        answer_to(process, number)
    assert process.wait(60) == 130


def test_two_signals_during_one_call_of_a_library_are_two() -> None:
    process = start(ENDING.format(closing=""))
    wait_to_begin(process)
    answer_to(process, signal.SIGTERM)
    answer_to(process, signal.SIGTERM)
    assert process.wait(60) == 143


def test_a_second_one_counts_that_the_handler_took_for_the_first() -> None:
    with StopSignal() as stop:
        stop.end_in_order("the same command")
        signal.raise_signal(signal.SIGTERM)

        def hear_of_a_second() -> None:
            threading.Timer(0.1, os.write, (stop._pipe, bytes([signal.SIGTERM]))).start()
            time.sleep(60)

        with pytest.raises(Interrupted):  # The teller alone has heard of the second.
            hear_of_a_second()


def test_under_nohup_a_hangup_is_ignored() -> None:
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = start(RUNNING, **ignored)
    wait_to_begin(process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    answer_to(process, signal.SIGINT)
    assert process.wait(60) == 130


def test_a_closed_terminal_does_not_keep_a_run_from_ending_in_order(tmp_path: Path) -> None:
    note = tmp_path / "note"
    body = RUNNING.replace("sys.exit(", f"open({str(note)!r}, 'w').write('whole'); sys.exit(")
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", PREAMBLE + body + EPILOGUE])
    told = b""
    while b"begun" not in told:
        told += os.read(terminal, 100)
    os.close(terminal)  # As when a window is closed: SIGHUP, and every write fails from now on.
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 129
    assert note.read_text() == "whole"


@pytest.mark.slow
def test_rays_own_handler_does_not_abort_what_ends_in_order() -> None:
    body = """
        from learner.catalogue import load_config
        from cluster.session import ray_session
        stop.end_in_order("the same command with run.dir=runs/x")
        config = load_config("configs/quickstart.yaml")
        with ray_session(config.actors, config.learner):
            print("connected", flush=True)
            while stop.name is None: time.sleep(0.01)
            sys.exit(EXIT_CODES[stop.name] if signal.alarm(0) == 0 else "an alarm is set")
"""
    process = start("        import signal\n" + body)
    assert process.stdout is not None
    assert process.stdout.readline() == "connected\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert errors == "SIGTERM: ending in order; a second signal interrupts\n"
    assert process.returncode == 143
