"""A whole run that is submitted as a job of Ray."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.runs import ROOT, environment, overrides, processes_of, rows_of

pytestmark = pytest.mark.slow


@pytest.fixture
def ray_head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A local head with token authentication, ended by its own pid; no port of it is another's."""
    sockets = [socket.socket() for _ in range(4)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    port, dashboard_port, agent_port, client_port = (each.getsockname()[1] for each in sockets)
    for each in sockets:
        each.close()
    env = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0123456789abcdef" * 4)
    temp_dir = Path("/tmp") / f"agro-ray-{os.getpid()}"  # Ray's sockets need a short path.
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        f"--dashboard-agent-listen-port={agent_port}",
        f"--ray-client-server-port={client_port}",
    ]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={temp_dir}"]
    log = tmp_path / "head.log"
    with log.open("w") as file, subprocess.Popen(command, env=env, stdout=file, stderr=file) as head:
        try:
            deadline_s = time.monotonic() + 180
            while "Ray runtime started" not in log.read_text():
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline_s
                time.sleep(0.5)
            yield {**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}"}
        finally:
            family = processes_of([head.pid])[1:]
            head.terminate()
            head.wait(timeout=60)
            for process in psutil.wait_procs(family, timeout=10)[1]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def test_ray_job_submit_with_token_authentication(
    ray_head: dict[str, str], tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    entrypoint = [
        "python",
        "launch.py",
        "train",
        "configs/quickstart.yaml",
        *overrides(tiny_models["untied"], tmp_path / "run", 4),
    ]
    command = ["ray", "job", "submit", "--working-dir", ".", "--", *entrypoint]
    refused = subprocess.run(
        command,
        cwd=ROOT,
        env={**ray_head, "RAY_AUTH_TOKEN": "f" * 64},
        timeout=180,
        capture_output=True,
        text=True,
    )
    assert refused.returncode != 0
    deadline_s = time.monotonic() + 120
    while True:
        done = subprocess.run(command, cwd=ROOT, env=ray_head, timeout=280, capture_output=True, text=True)
        if "No available agent to submit job" not in done.stderr or time.monotonic() > deadline_s:
            break  # A head that has just started has no agent for jobs yet, and says "try again later".
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    assert "quickstart finished" in done.stdout
    rows = rows_of(tmp_path / "run")
    assert [row["progress/step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["mismatch/tokens"] > 32
    assert rows[0]["mismatch/mean"] < 1e-4
    assert "actors and learner agree at learner step 0" in (tmp_path / "run" / "events.jsonl").read_text()
    assert (tmp_path / "run" / "report.html").exists()
