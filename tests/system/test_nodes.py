"""One run on two nodes of a Ray cluster, of which one is lost and another comes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster.nodes import SHARED, Node, Nodes, can_have_nodes
from tests.support.runs import environment, overrides, rows_of, started

pytestmark = [pytest.mark.slow, pytest.mark.alone]

LIMIT_S = 300.0
RAY = str(Path(sys.executable).parent / "ray")
CPUS = 3
"""Of a node: room for a rank, which asks for two, and an actor, which asks for one."""
TOKEN = "5d0f3a0c" * 8
ENV = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
OF_THE_NODE = ["--num-cpus", str(CPUS), "--object-store-memory", str(2 * 10**8)]


def join(node: Node, head: Node) -> None:
    """Starts Ray on a node; the head's begins the cluster."""
    where = ["--address", f"{head.address}:6379"]
    if node is head:
        where = ["--head", "--port", "6379", "--include-dashboard=false"]
    node.run(RAY, "start", *where, "--node-ip-address", node.address, *OF_THE_NODE, env=ENV)


def start_driver(head: Node, said: Path) -> subprocess.Popen[str]:
    """Starts the run from the head, with a rank on each node; what it prints goes to a file."""
    settings = overrides(Path(SHARED, "model"), Path(SHARED, "run"), steps=100_000)
    settings += ["learner.ranks=2", "learner.num_cpus=2", "actors.num_cpus=1", "actors.count=1"]
    settings += ["data.eval_rows=0", "checkpoint.every=2", f"run.placement_timeout_s={LIMIT_S}"]
    with said.open("w") as file:
        driver = subprocess.Popen(
            head.command(sys.executable, "launch.py", "train", "configs/quickstart.yaml", *settings),
            env={**ENV, "RAY_ADDRESS": f"{head.address}:6379"},
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    started.append(driver)
    return driver


def wait_until(condition: Callable[[], bool], what: str, driver: subprocess.Popen[str]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert driver.poll() is None, f"the driver ended before: {what}"
        assert time.monotonic() < deadline_s, f"never within {LIMIT_S:.0f} s: {what}"
        time.sleep(0.2)


def status_of(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.exists() else {"step": 0, "actors": []}


def test_a_run_goes_on_when_a_node_is_lost_and_takes_in_another(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    if not can_have_nodes(tmp_path):
        pytest.skip("this machine allows no namespaces of networks")
    shutil.copytree(tiny_models["tied"], tmp_path / "model")
    run_dir = tmp_path / "run"

    def step() -> int:
        return int(status_of(run_dir)["step"])

    def num_running() -> int:
        return sum(actor["state"] == "running" for actor in status_of(run_dir)["actors"])

    with Nodes(tmp_path) as nodes:
        head, lost = nodes.add(), nodes.add()
        for node in (head, lost):
            join(node, head)
        driver = start_driver(head, tmp_path / "driver.txt")
        wait_until(lambda: step() >= 4, "four steps on two nodes", driver)
        told = lost.run(sys.executable, "launch.py", "status", f"{SHARED}/run", env=ENV)
        assert f"on {head.name}" in told, "the driver is another node's"

        nodes.kill(lost)
        wait_until(
            lambda: any(row["kind"] == "learner rank" for row in rows_of(run_dir, "deaths")),
            "a death",
            driver,
        )
        before = step()
        joined = nodes.add()
        join(joined, head)
        wait_until(lambda: step() >= before + 3, "steps with the node that joined", driver)
        told = joined.run(sys.executable, "launch.py", "scale", f"{SHARED}/run", "--actors", "2", env=ENV)
        assert "2 actors" in told
        # Each node has room for one actor beside its rank.
        wait_until(lambda: num_running() == 2, "an actor on each node", driver)
        died = {(row["kind"], row["host"]) for row in rows_of(run_dir, "deaths")}
        assert ("learner rank", lost.name) in died
        assert not {kind for kind, _ in died} - {"learner rank", "rollout actor"}, (
            "the driver's node has the rest"
        )
