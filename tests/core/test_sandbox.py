"""Programs that attack the sandbox: whatever they do, it says how they ended, and nothing of them is left."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core import sandbox
from core.sandbox import Limits, run
from tests.support import ROOT
from tests.support.clocks.machine import machine_s

pytestmark = pytest.mark.timed

SMALL = Limits(cpu_s=5, wall_s=60, memory_bytes=200 << 20, file_bytes=1 << 20, processes=8, output_bytes=4096)
NAMESPACES = pytest.mark.skipif(
    not sandbox.isolation().processes, reason="this kernel allows no namespaces without privileges"
)
EITHER = pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "without"])


def ended(program, namespaces, limits=SMALL, stdin=""):
    return run(program, stdin, limits, use_namespaces=namespaces)


def num_alive(marker):
    """Counts processes that carry `marker` in their command line."""
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += marker.encode() in path.read_bytes()
        except OSError:  # It has just ended.
            continue
    return found


def left_alone(marker, within_s=60.0):
    deadline_s = time.monotonic() + within_s
    while num_alive(marker) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return num_alive(marker) == 0


@EITHER
def test_a_program_reads_and_prints_in_an_empty_directory_without_the_callers_variables(
    namespaces, monkeypatch
):
    monkeypatch.setenv("SECRET", "hf_123")
    out = ended(
        "import os, sys\nprint(input(), os.listdir(), 'SECRET' in os.environ)\nprint('é', file=sys.stderr)\n"
        "os.write(3, b'done')\nsys.exit(7)",
        namespaces,
        stdin="hello",
    )
    assert (out.how, out.code, out.stdout, out.stderr) == ("exit", 7, "hello [] False\n", "é\n")
    assert out.report == b"done"
    assert out.in_words == "exit code 7"


@EITHER
@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("while True: pass", "cpu time"),
        ("import time; time.sleep(1000)", "wall time"),
        ("9**9**9", "cpu time"),
        ("kept = []\nwhile True: kept.append(b'x' * (1 << 20))", "memory"),
        ("while True: print('x' * 1000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output"),
    ],
    ids=["loop", "sleep", "power", "memory", "stdout", "stderr"],
)
def test_a_program_that_takes_too_much_is_killed_and_its_limit_is_named(namespaces, program, how):
    limits = SMALL._replace(cpu_s=1, wall_s=1 if how == "wall time" else 100)
    began_s = machine_s()
    out = ended(program, namespaces, limits)
    assert (out.how, out.code) == (how, None)
    assert len(out.stdout) <= SMALL.output_bytes
    assert len(out.stderr) <= SMALL.output_bytes
    assert machine_s() - began_s < 15


@EITHER
@pytest.mark.parametrize("bomb", ["os.fork()", "os.fork() or os.setsid()"])
def test_the_kernel_bounds_the_processes_of_a_fork_bomb(namespaces, bomb):
    out = ended(f"import os\nwhile True: {bomb}", namespaces)
    assert (out.how, out.code) == ("exit", 1)
    assert "Resource temporarily unavailable" in out.stderr


def test_without_namespaces_a_program_may_start_threads_and_no_process():
    thread = "import threading\nthread = threading.Thread(target=print, args=('thread',))\nthread.start()\n"
    out = ended(thread + "thread.join()\nimport subprocess\nsubprocess.run(['true'])", False)
    assert (out.code, out.stdout) == (1, "thread\n")
    assert "BlockingIOError" in out.stderr


@NAMESPACES
def test_memory_of_several_processes_counts_together():
    out = ended(
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n"
        "        kept = b'x' * (80 << 20); time.sleep(100)\ntime.sleep(100)",
        True,
    )
    assert out.how == "memory"


@EITHER
def test_more_memory_at_once_than_there_may_ever_be_is_the_programs_own_error(namespaces):
    out = ended("x = bytearray(8 << 30)", namespaces)
    assert (out.how, out.code) == ("exit", 1)
    assert "MemoryError" in out.stderr


@EITHER
def test_a_file_is_bounded(namespaces):
    out = ended("with open('big', 'wb') as file:\n    while True: file.write(b'x' * (1 << 20))", namespaces)
    assert (out.how, out.code) == ("exit", 1)
    assert "File too large" in out.stderr or "No space left" in out.stderr


@NAMESPACES
def test_what_is_left_running_is_killed():
    marker = f"stray-{os.getpid()}"
    daemon = (
        "import os, subprocess, sys, time\n"
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        f"        subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)', {marker!r}],"
        " start_new_session=True)\n        time.sleep(1000)\n    os._exit(0)\n"
        "time.sleep(0.3)\nprint('done')"
    )
    out = ended(daemon, True)
    assert (out.how, out.code, out.stdout) == ("exit", 0, "done\n")
    assert left_alone(marker)


@EITHER
def test_a_program_that_kills_its_parent_gains_nothing(namespaces):
    out = ended(
        "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(0.3)\nprint(1)",
        namespaces,
    )
    if namespaces and sandbox.isolation().processes:
        assert (out.how, out.code, out.stdout) == ("exit", 0, "1\n")
    else:
        assert (out.how, out.in_words) == ("exit", "SIGKILL")


@EITHER
def test_a_program_cannot_kill_others_where_it_has_a_namespace_and_it_is_said(namespaces):
    out = ended(f"import os; os.kill({os.getpid()}, 0)", namespaces)
    assert (out.code != 0) == out.isolation.processes
    assert namespaces or not out.isolation.processes


@EITHER
def test_there_is_no_network_where_it_says_so(namespaces):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        out = ended(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)", namespaces)
    assert (out.code != 0) == out.isolation.network
    if out.isolation.network:
        assert "unreachable" in out.stderr or "Permission denied" in out.stderr


def test_nothing_is_written_elsewhere_where_it_says_so(tmp_path):
    out = ended(f"open({str(tmp_path / 'mine')!r}, 'w').write('x')", True)
    assert (tmp_path / "mine").exists() is not out.isolation.files


@EITHER
def test_the_working_directory_is_gone_afterwards(namespaces):
    out = ended("import os; open('kept', 'w').write('x'); print(os.getcwd())", namespaces)
    assert not Path(out.stdout.strip()).parent.exists()


@EITHER
def test_a_program_dies_with_whoever_runs_it(namespaces, tmp_path):
    program = (
        f"from core import sandbox; sandbox.run('import time; time.sleep(99)', use_namespaces={namespaces})"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment) as caller:
        deadline_s = time.monotonic() + 60
        while not num_alive(f"{tmp_path}/agro-sandbox-") >= 2 and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert num_alive(f"{tmp_path}/agro-sandbox-")
        caller.kill()
    assert left_alone(f"{tmp_path}/agro-sandbox-")


def test_a_crash_is_told_by_its_signal():
    out = ended("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", False)
    assert (out.how, out.code, out.in_words) == ("exit", -11, "SIGSEGV")


def descriptors():
    """Returns the number of each open descriptor with what it is of."""
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # The one by which they are listed.
            found.add((path.name, os.readlink(path)))
    return found


def test_many_threads_run_programs_at_once_and_leave_no_descriptor():
    ended("", True)
    gc.collect()  # What other tests have left, whose numbers would be given again.
    before = descriptors()
    answers = {}

    def ask(number):
        answers[number] = ended(f"print({number} * 2)", True).stdout

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: f"{number * 2}\n" for number in range(6)}
    assert not descriptors() - before


def test_what_is_kept_from_a_program_is_told_in_words():
    assert str(sandbox.Isolation(True, True, True)) == (
        "kept from the network, other processes and other files"
    )
    assert str(sandbox.Isolation(True, False, False)) == (
        "kept from the network; this kernel does not keep it from other processes and other files"
    )
    assert str(sandbox.Isolation(False, False, False)).startswith("kept from nothing; ")
