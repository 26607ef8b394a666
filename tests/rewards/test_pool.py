"""The pool under attack: whatever a reward function does, its group gets an answer in time and the
others go on.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing.connection import Connection

import msgspec
import psutil
import pytest

from core.config import RewardsConfig
from core.errors import RewardError
from rewards.pool import RewardPool
from rewards.scoring import Completions, Scored
from rewards.workers import worker
from tests.support import ROOT
from tests.support.clocks.machine import machine_s
from tests.support.clocks.waits import until

pytestmark = pytest.mark.timed

TIMEOUT_S = 1.0
RESULT_LIMIT_S = 60.0


def pool_of(*names, timeout_s=TIMEOUT_S, workers=1, memory_gib=4.0):
    functions = dict.fromkeys(names, 1.0)
    config = RewardsConfig(functions=functions, timeout_s=timeout_s, memory_gib=memory_gib, workers=workers)
    return RewardPool(config)


def attack_pool(function, **settings):
    return pool_of(f"tests.support.reward_functions:{function}", **settings)


def score(pool, *completions, **columns):
    return pool.submit("q", completions, columns).result(RESULT_LIMIT_S)


STRANGERS: set[psutil.Process] = set()
"""Workers that were here before the test: of another one's actors that have not ended."""


@pytest.fixture(autouse=True)
def strangers():
    STRANGERS.clear()
    STRANGERS.update(worker_processes())


def worker_processes(parent=None):
    """Lists the workers that this test has started; those of another process, with `parent`."""
    found = []
    for child in psutil.Process(parent).children():
        with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):  # One that ends while we look.
            if child not in STRANGERS and "rewards.workers.worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def is_running(pid):
    with contextlib.suppress(psutil.NoSuchProcess):  # It may be waited for while we look.
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


ATTACKS = [
    ("hang", "timed out after 1 s (tests.support.reward_functions:hang)", "timeout"),
    ("big_power", "timed out after 1 s", "timeout"),
    ("spin", "timed out after 1 s", "timeout"),
    ("ignore_sigterm_and_spin", "timed out after 1 s", "timeout"),
    ("stop_itself", "timed out after 1 s", "timeout"),
    ("segfault", "the worker died: SIGSEGV", "crash"),
    ("kill_itself", "the worker died: SIGKILL (out of memory?)", "crash"),
    ("leave", "the worker died: it exited with code 3", "crash"),
]


@pytest.mark.parametrize(("function", "error", "kind"), ATTACKS)
def test_an_attack_is_over_in_time_and_the_next_groups_are_scored(function, error, kind):
    with attack_pool(function) as pool:
        before = score(pool, "a")
        start_s = machine_s()
        hurt = pool.submit("q", ["a", "bad", "c"], {})
        waiting = pool.submit("q", ["a", "b"], {})
        scored = hurt.result(RESULT_LIMIT_S)
        # All together, and the one that is to blame alone: twice the limit, and two processes that start.
        assert machine_s() - start_s < 2 * (TIMEOUT_S + 1.0)  # A second call finds whose fault it is.
        assert [sample.reward for sample in scored] == [1.0, None, 1.0]
        assert error in scored[1].error
        assert before == [Scored(1.0)]
        assert waiting.result(RESULT_LIMIT_S) == [Scored(1.0), Scored(1.0)]
        assert (pool.num_scored, pool.num_errors) == (5, 1)
        assert (pool.num_timeouts, pool.num_crashes) == (kind == "timeout", kind == "crash")


def test_a_hanging_group_does_not_delay_the_other_worker():
    with attack_pool("hang", workers=2, timeout_s=600.0) as pool:
        hurt = pool.submit("q", ["bad"], {})
        assert score(pool, "warm") == [Scored(4.0)], "work that waits starts a second process"
        assert len(worker_processes()) == 2
        start_s = machine_s()
        assert [score(pool, "a" * length)[0].reward for length in range(1, 21)] == list(range(1, 21))
        assert machine_s() - start_s < 2.0
        assert not hurt.done()


def test_many_crashes_in_a_row_never_break_the_pool():
    with attack_pool("leave", workers=2) as pool:
        futures = [pool.submit("q", ["bad" if index % 2 else "good"], {}) for index in range(20)]
        scored = [future.result(RESULT_LIMIT_S)[0] for future in futures]
    assert [sample.reward for sample in scored[::2]] == [4.0] * 10
    assert all("exited with code 3" in sample.error for sample in scored[1::2])
    assert pool.num_crashes == 10


def test_a_worker_that_dies_while_idle_costs_no_group():
    with attack_pool("length") as pool:
        assert score(pool, "abc") == [Scored(3.0)]
        for worker in worker_processes():
            worker.kill()
            until(lambda pid=worker.pid: not is_running(pid))
        assert score(pool, "abcd") == [Scored(4.0)]
        assert (pool.num_errors, pool.num_crashes) == (0, 0)


def test_a_killed_worker_takes_its_children_along(tmp_path):
    pid_file = tmp_path / "pid"
    with attack_pool("hang_with_child") as pool:

        def is_killed_with_a_child() -> bool:  # One that had no core for a second is killed without.
            assert "timed out" in score(pool, "a", pid_file=str(pid_file))[0].error
            return pid_file.exists() and bool(pid_file.read_text())

        until(is_killed_with_a_child)
        until(lambda: not is_running(int(pid_file.read_text())))


@pytest.mark.parametrize("function", ["allocate", "let_a_child_allocate"])
def test_a_worker_that_uses_more_memory_than_it_may_is_killed_with_the_figures(function):
    with attack_pool(function, timeout_s=20.0, memory_gib=0.2) as pool:
        hurt = score(pool, "a", "bad")
        found = re.fullmatch(
            r"the worker used (0\.\d+) GiB of memory with its children, more than rewards.memory_gib = 0.2 "
            r".*",
            hurt[1].error,
        )
        assert 0.2 < float(found.group(1)) < 0.6
        assert hurt[0] == Scored(1.0)
        assert score(pool, "a") == [Scored(1.0)]
        assert (pool.num_timeouts, pool.num_crashes) == (0, 1)


@pytest.mark.slow
def test_an_allocation_of_2_gb_is_within_the_limit():
    with attack_pool("allocate_2_gb", timeout_s=20.0) as pool:
        assert score(pool, "a") == [Scored(2.0)]


def test_reserved_address_space_is_no_memory():
    with attack_pool("reserve", timeout_s=20.0, memory_gib=0.2) as pool:
        assert score(pool, "a") == [Scored(42.0)]


def test_a_worker_is_reused_is_another_process_and_imports_nothing_heavy():
    with attack_pool("process_id") as pool:
        first, second = score(pool, "a")[0].reward, score(pool, "a")[0].reward
        assert first == second != os.getpid()
    with attack_pool("num_heavy_modules") as pool:
        assert score(pool, "a") == [Scored(0.0)]


def test_columns_reach_the_function_unchanged():
    with attack_pool("echo_column") as pool:
        assert (
            score(pool, "a", "b", value=2.5, prompt=[{"role": "user", "content": "q"}], none=None)
            == [Scored(2.5)] * 2
        )


def test_the_answer_that_votes_comes_with_the_reward():
    with pool_of("tests.support.reward_functions:length", "exact_match") as pool:
        assert score(pool, " 4 ", "five", answer="4") == [Scored(4.0, answer="4"), Scored(4.0, answer="five")]


def test_functions_that_only_compare_and_count_need_no_process():
    with pool_of("exact_match", "overlong?from=2&to=4") as pool:
        own = {"num_tokens": [1, 3]}
        scored = pool.submit("q", [" 4 ", "five"], {"answer": 4}, own).result(0)
        assert scored == [Scored(1.0, answer="4"), Scored(-0.5, answer="five")]
        refused = pool.submit("q", ["4"], {"answer": []}, {"num_tokens": [1]}).result(0)
        assert "exact_match raised ValueError: the gold answer" in refused[0].error
        assert (pool.num_groups, pool.num_scored, pool.num_errors) == (2, 2, 1)
        assert pool.columns == {"exact_match": ("answer",), "overlong?from=2&to=4": ()}
        assert pool.worker_s > pool.busy_s > 0
        assert not worker_processes()
    assert "the reward pool is closed" in pool.submit("q", ["4"], {"answer": 4}).result(0)[0].error


def test_a_name_says_that_its_function_takes_messages():
    with attack_pool("says_yes?messages") as pool:
        assert score(pool, "yes", "no") == [Scored(1.0), Scored(0.0)]
    with attack_pool("says_yes") as pool:
        assert "write ?messages behind its name" in score(pool, "yes")[0].error


def test_an_exception_in_the_reward_costs_its_group_and_no_worker():
    with pool_of("tests.support.reward_functions:raises", "exact_match") as pool:
        scored = score(pool, "a", answer="a")
        assert "raised KeyError" in scored[0].error
        assert (pool.num_errors, pool.num_crashes) == (1, 0)


def test_an_expression_that_does_not_end_costs_itself_and_no_worker():
    with pool_of("math_verify", timeout_s=20.0) as pool:
        start_s = machine_s()
        scored = score(pool, r"\boxed{4}", r"\boxed{(a+b+c+d)^{60}}", "4", answer="4")
        assert machine_s() - start_s < 3.0
        assert [sample.reward for sample in scored] == [1.0, 0.0, 1.0]
        assert [sample.answer for sample in scored] == ["4", "(a+b+c+d)^{60}", "4"]
        assert (pool.num_timeouts, pool.num_crashes, pool.num_errors) == (0, 0, 0)
        assert "is too large to be computed" in score(pool, "4", answer="9^{9^{9}}")[0].error


def test_functions_are_checked_when_the_pool_is_built():
    with pytest.raises(RewardError, match="did you mean 'exact_match'"):
        pool_of("exact_mtch")
    with pytest.raises(RewardError, match="no module named 'no_such_module'"):
        pool_of("no_such_module:f")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import os; os._exit(3)",
            "reward functions reward_at_import:f: the worker died while it imported "
            "them: it exited with code 3",
        ),
        ("import sys; sys.exit(3)", r"reward_at_import exits while it is imported \(3\)"),
        ("while True: pass", r"reward functions reward_at_import:f: importing them did not end within 1 s"),
        ("def f(completions): return [1.0", "SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line_when_the_pool_is_built(
    code, message, tmp_path, monkeypatch
):
    (tmp_path / "reward_at_import.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(worker, "STARTUP_LIMIT_S", 1.0 if "while" in code else 60.0)
    with pytest.raises(RewardError, match=message) as error:
        pool_of("reward_at_import:f")
    assert "\n" not in str(error.value)
    assert worker_processes() == []


def test_a_module_of_the_working_directory_is_found_in_the_worker(tmp_path, monkeypatch):
    (tmp_path / "reward_where_i_am.py").write_text(
        "print('loaded')\ndef f(completions): return [float(len(text)) for text in completions]"
    )
    monkeypatch.chdir(tmp_path)
    with pool_of("reward_where_i_am:f", timeout_s=10.0) as pool:
        assert score(pool, "abc") == [Scored(3.0)]
        assert "reward_where_i_am" not in sys.modules  # Its code runs in the worker only.


def test_a_module_that_is_gone_later_is_an_error_that_says_so(tmp_path, monkeypatch):
    module = tmp_path / "short_lived.py"
    module.write_text("import os\ndef f(completions): os._exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pool_of("short_lived:f") as pool:
        module.unlink()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        assert "exited with code 3" in score(pool, "a")[0].error
        assert "reward function 'short_lived:f': no module named 'short_lived'" in score(pool, "a")[0].error
        assert pool.num_crashes == 2


def test_what_does_not_pickle_is_an_error_and_not_an_exception():
    with attack_pool("length") as pool:
        assert "cannot be sent to a worker" in score(pool, "a", lock=threading.Lock())[0].error
        assert score(pool, "a") == [Scored(1.0)]


def test_a_function_annotated_for_messages_gets_messages():
    with attack_pool("accuracy", timeout_s=10.0) as pool:
        assert score(pool, "4", "5", solution="4", prompt=[{"role": "user", "content": "2+2"}]) == [
            Scored(1.0),
            Scored(0.0),
        ]


def test_large_groups_pass():
    with attack_pool("length", timeout_s=10.0) as pool:
        assert score(pool, *["x" * 1_000_000] * 20, padding="y" * 1_000_000) == [Scored(1e6)] * 20


def test_close_kills_the_workers_within_two_seconds_and_answers_what_was_waiting():
    with attack_pool("spin", timeout_s=100.0, workers=2) as pool:
        score(pool, "a")
        futures = [pool.submit("q", ["bad"], {}) for _ in range(5)]
        until(lambda: len(worker_processes()) == 2)
        time.sleep(0.5)
        start_s = machine_s()
        pool.close()
        assert machine_s() - start_s < 2.0
        assert worker_processes() == []
        assert all("pool was closed" in future.result(60)[0].error for future in futures)
        assert score(pool, "a") == [Scored(error="the reward pool is closed")]


PARENT = textwrap.dedent("""
    import time
    from core.config import RewardsConfig
    from rewards.pool import RewardPool
    functions = {"tests.support.reward_functions:FUNCTION": 1.0}
    pool = RewardPool(RewardsConfig(functions=functions, timeout_s=100.0, workers=WORKERS))
    pool.submit("q", ["a"], {}).result()
    futures = [pool.submit("q", ["bad"], {}) for _ in range(2)]
    time.sleep(2.0)
    print("ready", flush=True)
    time.sleep(100)
""")


@pytest.mark.parametrize("function", ["length", "spin", "big_power"])
def test_no_worker_survives_the_parents_kill_9(function):
    count = 1 if function == "length" else 2
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("FUNCTION", function).replace("WORKERS", str(count))],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    try:
        assert parent.stdout.readline() == "ready\n"
        # The second starts when work waits.
        until(lambda: len(worker_processes(parent.pid)) == count)
        workers = worker_processes(parent.pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        start_s = machine_s()
        until(lambda: not any(is_running(worker.pid) for worker in workers))
        assert machine_s() - start_s < 2.0
    finally:
        parent.kill()
        parent.stdout.close()


@pytest.mark.parametrize(
    "when", ["before the functions are named", "in the middle of a message", "with an answer on its way"]
)
def test_a_worker_whose_actor_is_gone_ends_without_a_word(when):
    ours, theirs = socket.socketpair()
    code = f"from rewards.workers.worker import serve; serve({theirs.fileno()}, {os.getpid()})"
    repository = ROOT
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=repository,
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    with Connection(ours.detach()) as connection:
        if when != "before the functions are named":
            connection.send_bytes(
                msgspec.msgpack.encode([worker.FunctionSpec("tests.support.reward_functions:length")])
            )
            assert msgspec.msgpack.decode(connection.recv_bytes(), type=worker.Loaded) == worker.Loaded(
                [worker.LoadedFunction()]
            )
        if when == "in the middle of a message":
            os.write(connection.fileno(), struct.pack("!i", 100) + b"only this")
        elif when == "with an answer on its way":
            payload = pickle.dumps(Completions("q", ["a"], {}))
            request = worker.Request(0, 0, (0,), 10.0, False, payload)
            connection.send_bytes(msgspec.msgpack.encode(request))
            assert connection.poll(60.0)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")


@pytest.mark.slow
def test_a_ray_actor_can_run_a_pool_and_leaves_no_worker_when_killed():
    code = textwrap.dedent("""
        import os, psutil, ray, time
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

        @ray.remote
        class Actor:
            def __init__(self):
                from core.config import RewardsConfig
                from rewards.pool import RewardPool
                functions = {"tests.support.reward_functions:num_heavy_modules": 1.0}
                self.pool = RewardPool(RewardsConfig(functions=functions))
            def score(self):
                return self.pool.submit("q", ["a"], {}).result()[0].reward
            def workers(self):
                return [child.pid for child in psutil.Process().children()]

        actor = Actor.remote()
        reward = ray.get(actor.score.remote(), timeout=60)
        workers = ray.get(actor.workers.remote(), timeout=60)
        ray.kill(actor)
        def is_alive(pid):
            try:
                return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return False

        deadline_s = time.monotonic() + 60
        while any(map(is_alive, workers)) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        alive = [pid for pid in workers if is_alive(pid)]
        print("result", reward, len(workers), len(alive))
    """)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180
    )
    assert "result 0.0 1 0" in run.stdout, run.stderr[-2000:]
