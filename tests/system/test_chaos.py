"""The whole system with its real parts while something dies every seven seconds."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from buffer.ledger import audit_run
from cluster.cli.why import why
from cluster.deaths import read_deaths
from tests.support.runs import rows_of, running, running_actors, start_train, wait_for_step

pytestmark = pytest.mark.slow
STEPS = 80
LAST_STEPS = 15
"""Nothing is killed in these: a row has the buffer's gauges of a second before."""
MAX_KILLS = 7
EVERY_S = 7.0
# 320 groups from two actors, each of which scores one at a time: 40 s at least.
PACE = ("rewards.functions={tests.support.reward_functions:in_a_quarter_second: 1}", "rewards.workers=1")
# Of prompts whose samples all say something, and of groups all of whose samples are as long as one another.
WORTH = ("data.curriculum=1?reward=1", "buffer.skip_equal_rewards=true")
# What dies, and how: an engine lives in its actor's process, so that a stopped process is a hung engine.
DEATHS = (
    ("RolloutActor", signal.SIGKILL),
    ("Board", signal.SIGKILL),
    ("ReplayBuffer", signal.SIGKILL),
    ("Monitor", signal.SIGKILL),
    ("RolloutActor", signal.SIGSTOP),
    ("ReplayBuffer", signal.SIGKILL),
    ("Board", signal.SIGKILL),
    ("RolloutActor", signal.SIGKILL),
    ("ReplayBuffer", signal.SIGKILL),
    ("RolloutActor", signal.SIGKILL),
)


def kill_one(process: subprocess.Popen[str], run_dir: Path, part: str, how: signal.Signals) -> bool:
    """The oldest running process of that part, of actors one that has loaded; False when there is none just
    now.
    """
    victims = running(process.pid, part)
    if part == "RolloutActor":
        loaded = set(running_actors(run_dir).values())
        victims = [victim for victim in victims if victim.pid in loaded]
    for victim in victims[:1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(how)
            return True
    return False


KINDS = {
    "RolloutActor": "rollout actor",
    "ReplayBuffer": "buffer shard",
    "Board": "board",
    "Monitor": "monitor",
}


def check_record(run_dir: Path, killed: Counter[tuple[str, str]]) -> None:
    """Every death is recorded with its cause, every process has a log, and `launch.py why` tells them all."""
    died = Counter((death.kind, death.what) for death in read_deaths(run_dir))
    assert died == Counter(
        {
            (KINDS[part], "hang" if how == "SIGSTOP" else "signal"): count
            for (part, how), count in killed.items()
            if count
        }
    )
    told = "\n".join(why(run_dir))
    for death in read_deaths(run_dir):
        assert death.pid is not None
        assert f"{death.name}" in told
        assert death.done in told
        assert f": process {death.pid} on " in (run_dir / death.log).read_text(errors="replace")
    assert "The run finished in order" in told
    logs = {path.name for path in (run_dir / "logs").iterdir()}
    assert {
        "driver.log",
        "learner-rank-0.log",
        "monitor.log",
        "board.log",
        "buffer-0.log",
        "actor-0.log",
    } <= logs


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_training_ends_at_its_step_count_with_a_clean_audit_though_something_dies_every_seven_seconds(
    num_shards: int, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    more = (
        f"buffer.num_shards={num_shards}",
        "buffer.uses_per_group=2",
        "eval.every=1000",
        "checkpoint.every=20",
        *PACE,
        "actors.count=2",
        *(WORTH if num_shards > 1 else ()),
    )
    process = start_train(tiny_models["tied"], run_dir, STEPS, *more)
    wait_for_step(process, run_dir, 3)
    deaths: Counter[tuple[str, str]] = Counter()
    next_s, is_noticed = time.monotonic(), True
    planned = itertools.islice(DEATHS, MAX_KILLS)
    while process.poll() is None:
        if (
            is_noticed
            and time.monotonic() >= next_s
            and len(rows_of(run_dir)) < STEPS - LAST_STEPS
            and (death := next(planned, None))
        ):
            next_s = time.monotonic() + EVERY_S
            part, how = death
            deaths[part, how.name] += kill_one(process, run_dir, part, how)
        # What dies before the driver has seen it is no death to it, and an event is told twice where the
        # monitor dies just then.
        is_noticed = len(read_deaths(run_dir)) >= deaths.total()
        time.sleep(0.3)
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    assert sum(deaths.values()) >= 4, f"too little died to prove anything: {deaths}"
    rows = rows_of(run_dir)
    assert [row["progress/step"] for row in rows] == list(range(1, STEPS + 1))
    found = audit_run(run_dir)
    assert found["violations"] == []
    assert found["events"]["trained"] == 8 * STEPS, "every batch was handed out once"
    assert found["max_staleness"] <= 16
    assert rows[-1]["buffer/starts"] == num_shards + sum(
        count for (part, _), count in deaths.items() if part == "ReplayBuffer"
    )
    events = "\n".join(event["text"] for event in rows_of(run_dir, "events"))
    for part, name in (("ReplayBuffer", "replay buffer"), ("Board", "board"), ("Monitor", "monitor")):
        assert events.count(f"{name} restarted (") == deaths[part, "SIGKILL"] > 0
    if num_shards > 1:
        assert found["status"]["rested"] >= rows[-1]["buffer/rested"] > 0
        assert found["evictions"]["evicted_equal"] >= rows[-1]["buffer/evicted_equal"] > 0
    check_record(run_dir, deaths)
    assert "Traceback" not in out + err
