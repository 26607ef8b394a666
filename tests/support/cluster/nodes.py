"""Computers that are none: parts of this machine with a network, a name, processes and memory of their own.

    with Nodes(shared) as nodes:
        head = nodes.add()                       gpunode0, 10.77.0.1
        head.run("ray", "start", "--head", ...)
        nodes.add().run("ray", "start", "--address", ...)
        nodes.kill(head)                         as a power cut does

A node is a set of Linux namespaces. Its name resolves to 127.0.1.1, as Debian has it; /tmp, /dev/shm and all
that listens are its own; files elsewhere are everybody's, and `shared` is at /mnt. The first node's network
is the bridge between them. All is gone when its first process is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import ROOT

NETWORK = "10.77.0"
SHARED = "/mnt"
LIMIT_S = 120.0
_SCRATCH = "/tmp/ray" if str(ROOT).startswith("/tmp/") else "/tmp"
_REACHES = """
import errno, socket, sys
with socket.socket() as probe:
    probe.settimeout(30)
    sys.exit(probe.connect_ex((sys.argv[1], 9)) != errno.ECONNREFUSED)
"""
_BEGIN = f"""
set -e
mount --make-rprivate /
mount --bind "$SHARED_FROM" {SHARED}
mkdir -p {_SCRATCH}
mount -t tmpfs none {_SCRATCH}
mount -t tmpfs none /dev/shm
hostname "$NODE_NAME"
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$NODE_NAME" > /dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
ip link set lo up
echo ready
exec sleep infinity
"""


def can_have_nodes(shared: Path) -> bool:
    """Says whether this machine lets us have two nodes that reach each other."""
    try:
        with Nodes(shared) as nodes:
            first, second = nodes.add(), nodes.add()
            second.run(sys.executable, "-c", _REACHES, first.address)
    except (AssertionError, IndexError, OSError, subprocess.SubprocessError):
        return False
    return True


@dataclass(frozen=True)
class Node:
    """One of them: its first process here, its name and its address."""

    keeper: subprocess.Popen[str]
    pid: int
    name: str
    address: str

    def command(self, *command: str) -> list[str]:
        """Returns the command line that runs `command` there, in the directory it is called from."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--mount", "--uts", "--pid", f"--wd={ROOT}"]
        return [*enter, *command]

    def run(self, *command: str, env: Mapping[str, str] | None = None, **options: Any) -> str:
        """Runs a command there to its end, which must be a good one; returns what it printed."""
        done = subprocess.run(
            self.command(*command),
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            **options,
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


class Nodes:
    """The nodes that are there, connected by the first one's bridge."""

    def __init__(self, shared: Path) -> None:
        self._shared, self._all = shared, list[Node]()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._all:
            self.kill(node)

    def add(self) -> Node:
        """Starts another node, and connects it."""
        number = len(self._all)
        name, address = f"gpunode{number}", f"{NETWORK}.{number + 1}"
        keeper = subprocess.Popen(
            [
                "unshare",
                "--net",
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                _BEGIN,
            ],
            env={**os.environ, "NODE_NAME": name, "SHARED_FROM": str(self._shared)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == "ready\n", f"{name} did not start"
        pid = int(Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text().split()[0])
        node = Node(keeper, pid, name, address)
        self._all.append(node)
        self._connect(node)
        return node

    def kill(self, node: Node) -> None:
        """Ends all processes of a node at once, and with them the node."""
        node.keeper.kill()
        node.keeper.wait()
        deadline_s = time.monotonic() + LIMIT_S
        while os.path.exists(f"/proc/{node.pid}"):
            assert time.monotonic() < deadline_s, f"{node.name} does not end"
            time.sleep(0.05)

    def _connect(self, node: Node) -> None:
        first = self._all[0]
        if node is first:
            self._ip(
                first,
                f"link add bridge type bridge; link set bridge up; addr add {node.address}/24 dev bridge",
            )
            return
        wire = f"to-{node.name}"
        self._ip(first, f"link add {wire} type veth peer name eth0 netns {node.pid}")
        self._ip(first, f"link set {wire} master bridge; link set {wire} up")
        self._ip(node, f"addr add {node.address}/24 dev eth0; link set eth0 up")

    def _ip(self, node: Node, commands: str) -> None:
        for command in commands.split("; "):
            # Not in its process namespace: another node is named by the id that its process has here.
            enter = ["nsenter", "--target", str(node.pid), "--net"]
            subprocess.run([*enter, "ip", *command.split()], check=True, timeout=LIMIT_S)
