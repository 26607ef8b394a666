"""Where the ranks of several nodes meet: at an interface, not at what a host's own name resolves to."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from learner import network
from learner.worker import LearnerRank
from tests.support import ROOT
from tests.support.configs import make_config

MEET = """
import os, sys
import psutil, torch.distributed as dist
from learner.network import speak_where
address, port, rank, repaired = sys.argv[1], *map(int, sys.argv[2:5])
if repaired:
    speak_where(address)
dist.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=1)
dist.barrier()
print(*{c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN"}, sep=",")
"""
HOSTS = """
hostname agro-node
printf '127.0.0.1 localhost\\n127.0.1.1 agro-node\\n' > "$1"
mount --bind "$1" /etc/hosts
shift; exec "$@"
"""


def other_addresses() -> list[str]:
    found = [
        entry.address for given in psutil.net_if_addrs().values() for entry in given if entry.family == 2
    ]
    return [address for address in found if not address.startswith("127.")]


def test_the_interface_is_the_one_with_the_address_that_the_others_see(monkeypatch):
    assert network.interface_towards("127.0.0.1") == "lo"
    for address in other_addresses():
        assert network.interface_towards(address) not in (None, "lo")
    assert network.interface_towards("no address") is None
    monkeypatch.setattr("psutil.net_if_addrs", dict)
    assert network.interface_towards("127.0.0.1") is None


def test_an_interface_that_the_environment_names_stays(monkeypatch):
    monkeypatch.setattr("os.environ", {})
    network.speak_where("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = "ib0"
    network.speak_where("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.slow
def test_gloo_is_reached_on_a_host_whose_name_is_a_loopback_address(tmp_path):
    """As Debian's /etc/hosts has it, in namespaces of this test's own."""
    space = ["unshare", "--user", "--map-root-user", "--mount", "--uts", "bash", "-ec", HOSTS, "-"]
    space.append(str(tmp_path / "hosts"))
    if not other_addresses() or subprocess.run([*space, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine has no other address than the loopback's, or no namespaces")

    def listens(repaired: int) -> set[str]:
        with kept_port() as port:
            command = [*space, sys.executable, "-c", MEET, other_addresses()[0], port, "0", str(repaired)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return set(done.stdout.split()[-1].split(","))

    assert "127.0.1.1" in listens(repaired=0)
    assert "127.0.1.1" not in listens(repaired=1)


def test_the_port_at_which_the_ranks_meet_is_kept_for_their_own_server_while_they_load() -> None:
    rank = LearnerRank(0, make_config(), pad_id=0)
    _, port = rank.address()
    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind(("", port))
    command = [sys.executable, "-c", MEET, "127.0.0.1", str(port), "0", "0"]
    subprocess.run(command, cwd=ROOT, timeout=120, check=True)


@contextlib.contextmanager
def kept_port() -> Iterator[str]:
    """A port that nobody else is given meanwhile, and a server may still listen at."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield str(holder.getsockname()[1])
