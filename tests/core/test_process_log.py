"""Logs of processes: whole output of a real process, bounded, told apart by process; and what is concluded
from it.
"""

from __future__ import annotations

import logging
import logging.config
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.exceptions import ActorUnavailableError, RayError

from cluster.session import without_onlookers
from core.causes import Cause, KernelKills, cause_from
from core.own_warnings import MAX_TEXTS, OTHERS, OwnWarnings
from core.process_log import ProcessLog, bound, forget_old_logs, last_lines, log_path, role_of, words_of
from core.processes import Whereabouts, cause_of, remote
from tests.support import ROOT

PROGRAM = """
import os, sys, ctypes, logging, subprocess, warnings
from core.process_log import ProcessLog
ProcessLog(sys.argv[1], "actor-0", sys.argv[2]).begin(lambda name, counts: True)
print("printed")
logging.getLogger("learner.x").info("logged")
logging.getLogger("theirs").warning("warned")
subprocess.run(["echo", "a child's"])
{end}
"""


def run_process(run_dir: Path, name: str, end: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("{end}", end), str(run_dir), name], cwd=ROOT
    )
    process.wait(60)
    return process


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("end", "what", "code", "words"),
    [
        ("os._exit(7)", "exit code", 7, "actor-0.1 ends by os._exit(7)"),
        ("ctypes.string_at(0)", "signal", signal.SIGSEGV, "Fatal Python error: Segmentation fault"),
        ("os.abort()", "signal", signal.SIGABRT, "Fatal Python error: Aborted"),
        ("os.kill(os.getpid(), 9)", "signal", signal.SIGKILL, "a child's"),
    ],
)
def test_a_real_death_is_read_from_the_log_of_its_process(
    run_dir: Path, end: str, what: str, code: int, words: str
) -> None:
    path = log_path(run_dir, "actor-0")
    process = run_process(run_dir, "actor-0.1", end)
    successor = run_process(run_dir, "actor-0.2", "print('the successor')")
    said = words_of(path, process.pid)
    for line in ("printed", "INFO learner.x: logged", "WARNING theirs: warned", "a child's"):
        assert line in said
    assert "the successor" not in said
    assert words_of(path) == words_of(path, successor.pid)
    assert words_of(path, 1) == ""
    silent_end = (
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes ..."
    )
    cause = cause_from(silent_end, said, process.pid)
    assert (cause.what, cause.code) == (what, code)
    assert f"(pid {process.pid})" in cause.sentence
    assert words in "\n".join(cause.last_words)
    assert len(cause.last_words) <= 4


def test_what_ray_knows_of_an_end_is_taken_where_it_says_more() -> None:
    known = "Worker exits unexpectedly. Worker exits with an exit code 1. The process receives a SIGTERM."
    assert (cause_from(known, "", 3).what, cause_from(known, "", 3).code) == ("signal", signal.SIGTERM)
    known = "Worker exits unexpectedly. Worker exits with an exit code 4."
    assert cause_from(known, "", 3) == Cause("exit code", "its process ended with exit code 4 (pid 3)", 4)
    assert cause_from("something new", "", None) == Cause("unknown", "something new")


def test_a_log_is_bounded_its_end_is_kept_and_whoever_appends_goes_on(run_dir: Path) -> None:
    path = log_path(run_dir, "board")
    with path.open("ab", buffering=0) as child:
        for number in range(10):
            child.write(b"%03d %s\n" % (number, b"x" * 100))
            bound(path, "board", limit_bytes=500)
        child.write(b"the last word\n")
    assert path.stat().st_size < 700
    assert path.with_name("board.log.old").stat().st_size <= 500
    assert b"\0" not in path.read_bytes()
    assert "the last word" in words_of(path, os.getpid())


def test_a_flooding_process_bounds_its_log_by_itself(run_dir: Path) -> None:
    end = "import core.process_log as p, time; [print('x' * 10**6) or time.sleep(0.2) for _ in range(20)]; time.sleep(1.5)"
    run_process(run_dir, "actor-0", end)
    sizes = {path.name: path.stat().st_size for path in (run_dir / "logs").iterdir()}
    assert sum(sizes.values()) < 16e6
    assert sizes["actor-0.log.old"] > 1e6


def test_a_full_disk_costs_a_process_that_prints_nothing_but_its_words(run_dir: Path) -> None:
    end = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))\n"
        "for _ in range(20): print('x' * 5000); sys.stderr.write('y' * 5000); logging.getLogger('core').error('z')\n"
        "sys.stdout.flush(); os.mkdir(sys.argv[1] + '/survived')"
    )
    process = run_process(run_dir, "actor-0", end)
    assert process.returncode == 0
    assert (run_dir / "survived").is_dir()
    assert log_path(run_dir, "actor-0").stat().st_size <= 1000


def test_a_machine_that_does_not_see_the_run_directory_says_where_it_writes(tmp_path: Path) -> None:
    warnings = OwnWarnings()
    try:
        ProcessLog(str(tmp_path / "elsewhere"), "actor-0")._open()
        (text,) = warnings.take()
    finally:
        warnings.end()
    assert "cannot write into" in text
    assert "No such directory" in text
    assert "what they write stays in Ray's session folder there" in text
    assert not (tmp_path / "elsewhere").exists()


def test_only_the_newest_logs_stay(run_dir: Path) -> None:
    for number in range(5):
        path = log_path(run_dir, f"actor-{number}")
        path.touch()
        os.utime(path, (number, number))
    for quiet in ("board", "learner-rank-0"):
        log_path(run_dir, quiet).touch()
        os.utime(log_path(run_dir, quiet), (0, 0))
    forget_old_logs(run_dir, ["actor-0.3"], keep=2)
    assert {path.name for path in (run_dir / "logs").iterdir()} == {
        *("actor-0.log", "board.log", "learner-rank-0.log"),  # They live, and say nothing.
        *("actor-3.log", "actor-4.log"),
    }
    assert [role_of(name) for name in ("actor-3.12", "actor-3", "learner-rank-0")] == [
        "actor-3",
        "actor-3",
        "learner-rank-0",
    ]


def test_a_crash_that_vllm_tells_in_place_of_faulthandler_is_one() -> None:
    words = 'loading\n!!!!!!! Segfault encountered !!!!!!!\n  File "<unknown>", line 0, in 0xff\n'
    cause = cause_from("connection error code 2. End of file", words, 7)
    assert (cause.what, cause.code) == ("signal", signal.SIGSEGV)
    assert cause.sentence == "its process crashed: Segfault encountered, SIGSEGV (pid 7)"
    assert cause.last_words[0] == "!!!!!!! Segfault encountered !!!!!!!"
    cause = cause_from("connection error code 2. End of file", "Hello!\n!!! beware\n", 7)
    assert (cause.what, cause.code) == ("signal", signal.SIGKILL)


def test_last_lines_are_without_colours_and_of_a_crash_the_first() -> None:
    assert last_lines("a\n\n\x1b[33mb\x1b[0m\n:actor_name:X\nc\n", 2) == ["b", "c"]
    bars = "b\nLoading weights:   0%|          | 0/20\rLoading weights: 100%|##| 20/20\nShards: 100% Completed | 1/1\n"
    assert last_lines("a\n" + bars, 2) == ["a", "b"]
    assert last_lines("a\nFatal Python error: Aborted\nframe 1\nframe 2\nframe 3\n", 2) == [
        "Fatal Python error: Aborted",
        "frame 1",
    ]


def test_what_our_own_code_warns_of_is_counted_by_its_text_whenever_it_came() -> None:
    warnings = OwnWarnings()
    try:
        for _ in range(2):
            logging.getLogger("learner.step.logprobs").warning(
                "%s: log-probs are taken from whole logits", "GraniteForCausalLM"
            )
        logging.getLogger("learner.step.logprobs").info("nothing")
        logging.getLogger("someones_library").warning("theirs")
        logging.getLogger("someones_library").error("their failure")
        assert warnings.take() == {
            "GraniteForCausalLM: log-probs are taken from whole logits": 2,
            "their failure": 1,
        }
        logging.getLogger("learner.step.row_softmax").warning("liger-kernel does not work")
        assert warnings.take() == {"liger-kernel does not work": 1}
        assert warnings.take() == {}
        for number in range(2 * MAX_TEXTS):
            logging.getLogger("buffer.shard").warning("number %d", number)
        found = warnings.take()
        assert len(found) <= MAX_TEXTS + 1
        assert found[OTHERS] > MAX_TEXTS - 10
    finally:
        warnings.end()


def test_a_library_that_configures_logging_does_not_end_the_listening() -> None:
    warnings = OwnWarnings()
    try:
        handlers = {"own": {"class": "logging.StreamHandler"}}
        vllm = {"vllm": {"handlers": ["own"], "propagate": False}}
        logging.config.dictConfig(
            {"version": 1, "disable_existing_loggers": False, "handlers": handlers, "loggers": vllm}
        )
        logging.getLogger("environments.nursery").warning("ours")
        assert warnings.take() == {"ours": 1}
        logging.getLogger("vllm.engine").error("theirs")
        assert warnings.take() == {"theirs": 1}
    finally:
        warnings.end()
        logging.getLogger("vllm").handlers.clear()
        logging.getLogger("vllm").propagate = True


def test_a_risen_count_of_the_kernel_explains_a_kill(tmp_path: Path) -> None:
    counter = tmp_path / "vmstat"
    counter.write_text("nr_free_pages 5\noom_kill 3\n")
    kernel = KernelKills(counter)
    killed = cause_from("connection error code 2. End of file", "", 7)
    assert kernel.explain(killed) == killed
    counter.write_text("nr_free_pages 5\noom_kill 4\n")
    explained = kernel.explain(killed)
    assert explained.what == "out of memory"
    assert "the kernel killed it for lack of memory" in explained.sentence
    assert kernel.explain(killed) == killed
    assert KernelKills(tmp_path / "none").explain(killed) == killed
    crash = Cause("signal", "its process crashed", int(signal.SIGSEGV))
    counter.write_text("oom_kill 9\n")
    assert kernel.explain(crash) == crash


def test_what_another_machines_process_wrote_is_not_taken_from_ours_of_the_same_number(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = socket.gethostname()
    log = f"===== actor-0: process 71 on {here} since 2026\nours\n===== actor-1: process 71 on node7 since 2026\ntheirs\n"
    log_path(run_dir, "actor-0").write_text(log)
    monkeypatch.setattr("core.process_log._this.folder", run_dir / "logs")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")

    def words(address: str, where: Whereabouts | None = None) -> tuple[str, ...]:
        text = f"The actor died.\n\tpid: 71\n\tip: {address}\nconnection error code 2. End of file"
        return cause_of(RayError(text), where).last_words

    assert words("10.0.0.1") == ("ours",)
    assert words("10.0.0.2") == ()
    assert words("10.0.0.2", Whereabouts("n", 71, "node7")) == ("theirs",)
    assert words("10.0.0.2", Whereabouts("n", 71, "node8")) == ()


@pytest.mark.parametrize(
    ("end", "what", "code"),
    [("os._exit(7)", "exit code", 7), ("os.kill(os.getpid(), 9)", "signal", signal.SIGKILL)],
)
def test_a_connection_that_ended_before_ray_heard_of_the_death_is_told_as_that_death(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, end: str, what: str, code: int
) -> None:
    monkeypatch.setattr("core.process_log._this.folder", run_dir / "logs")
    pid = run_process(run_dir, "actor-0.1", end).pid
    unavailable = ActorUnavailableError("RPC error: keepalive watchdog timeout", None)
    cause = cause_of(unavailable, Whereabouts("n", pid, socket.gethostname()))
    assert (cause.what, cause.code) == (what, code)
    assert str(pid) in cause.sentence
    assert "a child's" in cause.last_words
    for alive in (Whereabouts("n", os.getpid(), socket.gethostname()), Whereabouts("n", pid, "node7"), None):
        assert cause_of(unavailable, alive).what == "unknown"
        assert "keepalive watchdog timeout" in cause_of(unavailable, alive).sentence


class Seeing:
    """Tells which GPUs its CUDA would find."""

    def seen(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.slow
def test_each_process_sees_the_gpus_that_ray_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Ray itself is told to leave that to others."""
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    with without_onlookers():
        ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        asked = [1, 1, 0]
        parts = [
            remote(Seeing, ProcessLog(str(tmp_path), f"part-{number}"))
            .options(num_cpus=0, num_gpus=gpus)
            .remote()
            for number, gpus in enumerate(asked)
        ]
        seen = ray.get([part.seen.remote() for part in parts], timeout=120)
    finally:
        ray.shutdown()
    assert sorted(seen[:2]) == ["5", "7"]
    assert seen[2] == ""
