"""Whole runs as a user starts them, and what can be seen of one from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support import ROOT
from tests.support.clocks.machine import machine_s

STEPS = 12


def environment(**extra: str) -> dict[str, str]:
    """This environment with the venv's programs first, and without a cluster that happens to run."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **env,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        **extra,
    }


def overrides(model: Path, run_dir: Path, steps: int = STEPS) -> list[str]:
    """The quickstart, small: its own rows, a random model, few steps, an evaluation in between."""
    return [
        f"model.path={model}",
        f"run.dir={run_dir}",
        f"run.steps={steps}",
        "run.timeout_s=180",
        "eval.every=6",
        "eval.sampling=[1,1.0]",
        "data.eval_rows=20",
        "learner.groups_per_step=8",
        "buffer.capacity=24",
        "actors.count=1",  # A start of an engine costs ten seconds of two cores.
    ]


def actor_of(mark: Path) -> psutil.Process | None:
    """The rollout actor in one of whose processes a mark was left, called `PHASE-PID`;
    None when it is over.
    """
    try:
        parents = psutil.Process(int(mark.name.partition("-")[2])).parents()
        return next((parent for parent in parents if "RolloutActor" in " ".join(parent.cmdline())), None)
    except psutil.NoSuchProcess:
        return None


def rows_of(run_dir: Path, name: str = "metrics") -> list[dict]:
    """The whole lines of a file: the last one may be written just now, or be torn by a kill."""
    path = run_dir / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(errors="replace").split("\n")[:-1] if line]


started: list[subprocess.Popen[str]] = []


def start_train(model: Path, run_dir: Path, steps: int = STEPS, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "launch.py",
        "train",
        "configs/quickstart.yaml",
        *overrides(model, run_dir, steps),
        *more,
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started.append(process)
    return process


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int, timeout_s: float = 240) -> None:
    deadline_s = time.monotonic() + timeout_s
    while len(rows_of(run_dir)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s, f"step {step} not reached in {timeout_s} s"
        time.sleep(0.2)


def processes_of(parents: list[int]) -> list[psutil.Process]:
    """Every process started below `parents`."""
    found = []
    for pid in parents:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return found


def wait_for_end(processes: list[psutil.Process], timeout_s: float = 60.0) -> list[str]:
    """Waits until all have ended, reaped or not; what those that live on are."""
    deadline_s = time.monotonic() + timeout_s
    while (alive := described(processes)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return alive


def running(pid: int, part: str) -> list[psutil.Process]:
    """The processes below `pid` whose command line names the part, the oldest first; none that is stopped or
    has ended meanwhile.
    """
    found = []
    for process in processes_of([pid]):
        with contextlib.suppress(psutil.NoSuchProcess):  # A zombie is one, too.
            if part in " ".join(process.cmdline()) and process.status() != psutil.STATUS_STOPPED:
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def running_actors(run_dir: Path) -> dict[str, int]:
    """Process ids of the actors that run, by name, as status.json has them."""
    actors = json.loads((run_dir / "status.json").read_text())["actors"]
    return {actor["name"]: actor["pid"] for actor in actors if actor["state"] == "running"}


def described(processes: list[psutil.Process]) -> list[str]:
    """What the processes that still live are, for a failed test to say."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                found.append(
                    f"{process.pid} {process.status()} child of {process.ppid()}: "
                    f"{' '.join(process.cmdline())[:300]}"
                )
    return found


def check_ends_in_order(process: subprocess.Popen[str], run_dir: Path, name: str, code: int) -> None:
    """Sends the signal: the run ends within 30 s with all its files, and no process of it is left."""
    family = processes_of([process.pid])
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # As Ctrl-C in a terminal: the whole process group.
    else:
        process.send_signal(signal.SIGTERM)
    start_s = machine_s()
    out, err = process.communicate(timeout=120)
    assert machine_s() - start_s <= 30
    assert process.returncode == code, out + err
    assert f"stopped: {name}" in out
    assert (run_dir / "policy" / "model.safetensors").exists()
    assert (run_dir / "report.html").exists()
    assert len(family) > 5
    assert wait_for_end(family) == []
