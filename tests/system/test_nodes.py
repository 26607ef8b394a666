"""Two nodes of a Ray cluster: what processes on the other one have, and a run on both, of which one is lost
and another comes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.preparation.nodes import SHM, STORE, address_of
from core.machine import LOADING_THRESHOLDS
from tests.support.cluster.nodes import SHARED, Node, Nodes, can_have_nodes
from tests.support.runs import environment, overrides, rows_of, started

pytestmark = pytest.mark.slow

LIMIT_S = 300.0
RAY = str(Path(sys.executable).parent / "ray")
CPUS = 3
"""Of a node: room for a rank, which asks for two, and an actor, which asks for one."""
TOKEN = "5d0f3a0c" * 8
ENV = environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
OBJECT_STORE_BYTES = 2 * 10**8
OF_THE_NODE = ["--num-cpus", str(CPUS), "--object-store-memory", str(OBJECT_STORE_BYTES)]


@dataclass
class Cluster:
    """Two nodes of it, and the directory that all see."""

    shared: Path
    nodes: Nodes
    head: Node
    other: Node


def join(node: Node, head: Node, **own: str) -> None:
    """Starts Ray on a node, with variables of its own; the head's begins the cluster."""
    where = ["--address", f"{head.address}:6379"]
    if node is head:
        where = ["--head", "--port", "6379", "--include-dashboard=false"]
    node.run(RAY, "start", *where, "--node-ip-address", node.address, *OF_THE_NODE, env={**ENV, **own})


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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    shared = tmp_path_factory.mktemp("shared")
    if not can_have_nodes(shared):
        pytest.skip("this machine allows no namespaces of networks")
    with Nodes(shared) as nodes:
        found = Cluster(shared, nodes, head=nodes.add(), other=nodes.add())
        join(found.head, found.head)
        join(found.other, found.head, NCCL_SOCKET_IFNAME="eth0")
        yield found


def test_another_node_s_processes_have_what_the_driver_passes_on_and_a_snapshot_travels_there_once(
    cluster: Cluster,
) -> None:
    passed = {
        "HF_TOKEN": "a-token",
        "NCCL_SOCKET_IFNAME": "the-head-s",
        "VLLM_HOST_IP": cluster.head.address,
        "SECRET": "the driver's own",
    }
    told = cluster.head.run(
        *(sys.executable, "-m", "tests.support.scenarios.cluster_scenario", *passed),
        env={**ENV, **passed, "RAY_ADDRESS": f"{cluster.head.address}:6379"},
    )
    found = json.loads(told.splitlines()[-1])
    environment = found["environment"]
    assert environment["HF_TOKEN"] == "a-token"
    assert environment["NCCL_SOCKET_IFNAME"] == "eth0", "its own network has its own names"
    assert environment["SECRET"] is None
    assert environment["VLLM_HOST_IP"] is None, "the other node has another address"
    assert environment["threshold"] == LOADING_THRESHOLDS[0]
    assert found["fetched"] == [found["size"]] * 4
    assert found["size"] <= found["received"] < 2 * found["size"], "once for the three actors of the node"
    assert len(found["nodes"]) == 2
    assert {address_of(node) for node in found["nodes"]} == {cluster.head.address, cluster.other.address}
    assert {node[STORE] for node in found["nodes"]} == {OBJECT_STORE_BYTES}
    assert min(node[SHM] for node in found["nodes"]) > OBJECT_STORE_BYTES


def test_a_run_goes_on_when_a_node_is_lost_and_takes_in_another(
    tiny_models: dict[str, Path], cluster: Cluster
) -> None:
    nodes, head, lost = cluster.nodes, cluster.head, cluster.other
    shutil.copytree(tiny_models["tied"], cluster.shared / "model")
    run_dir = cluster.shared / "run"

    def step() -> int:
        return int(status_of(run_dir)["step"])

    def num_running() -> int:
        return sum(actor["state"] == "running" for actor in status_of(run_dir)["actors"])

    driver = start_driver(head, cluster.shared / "driver.txt")
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
