"""Watches whether Ray itself lives: its control process (GCS) and this node's raylet. Nothing else tells in
time.

A driver whose GCS is gone hangs in the next call that needs it, and is ended by Ray after a minute without a
word of ours; one whose raylet is gone loses all its workers. So a thread of our own looks at both. The main
thread asks `cause` at each of its looks; if it hangs in Ray, so that it has not `obeyed` in time, `abandon`
ends the process in its place.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from core.errors import AgroError, TrainingError
from core.processes import explained

LOOK_S = 0.5
CLUSTER_LIMIT_S = 20.0
"""Of a cluster that was not started here: its head may be started again, or the network be slow."""
OBEY_S = 20.0
_NAMES = {"gcs_server": "Ray's control process (gcs_server)", "raylet": "this node's raylet"}


class RayWatch:
    """Watches Ray from a thread of its own; `cause` is '' while both processes live.

    watch = RayWatch(abandon)
    ...                       # at every look of the main thread:
    if watch.cause:
        watch.obeyed()        # it ends the run without waiting for Ray
    """

    def __init__(self, abandon: Callable[[str], Any]) -> None:
        """Starts the watch.

        `abandon(cause)` writes what there is of the run and ends this process, from another thread: the main
        one hangs.
        """
        # Private, but there is no public way to Ray's own processes.
        self._node: Any = ray._private.worker._global_node
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._ends: dict[str, Any] = {
            "gcs_server": (host.strip("[]"), int(port)),
            "raylet": self._node.raylet_socket_name,
        }
        self._answered_s = dict.fromkeys(self._ends, time.monotonic())
        self._abandon = abandon
        self._is_over, self._is_obeyed = threading.Event(), threading.Event()
        self.cause = ""
        threading.Thread(target=self._watch, name="ray's life", daemon=True).start()

    def explained(self, error: RayError) -> AgroError:
        """Returns why a call of Ray's failed.

        When Ray is gone, the main thread may meet that before this watch has looked: it is waited for.
        """
        deadline_s = time.monotonic() + 2 * LOOK_S
        while not self.cause and time.monotonic() < deadline_s:
            time.sleep(LOOK_S / 10)
        if not self.cause:
            return explained(error, "Ray")
        self.obeyed()
        return TrainingError(self.cause)

    def obeyed(self) -> None:
        """Notes that the main thread ends the run, without waiting for Ray."""
        self._is_obeyed.set()

    def stop(self) -> None:
        """Ends the watch: the run is over, and what becomes of Ray is no news any more."""
        self._is_over.set()
        self._is_obeyed.set()

    def _watch(self) -> None:
        look = self._dead_of_our_own if self._node.head else self._dead_of_a_cluster
        while not self._is_over.wait(LOOK_S):
            if dead := look():
                self.cause = (
                    f"{_NAMES[dead]} is gone: it was killed, or the machine has no memory left. Nothing of "
                    "this run can go on; "
                    "the same command with this run.dir goes on from its newest checkpoint"
                )
                if not self._is_obeyed.wait(OBEY_S):
                    self._abandon(self.cause)
                return

    def _dead_of_our_own(self) -> str | None:
        return next((kind for kind, _ in self._node.dead_processes() if kind in _NAMES), None)

    def _dead_of_a_cluster(self) -> str | None:
        for kind, end in self._ends.items():
            if _answers(end):
                self._answered_s[kind] = time.monotonic()
            elif time.monotonic() - self._answered_s[kind] > CLUSTER_LIMIT_S:
                return kind
        return None


def _answers(end: Any) -> bool:
    """Returns whether somebody listens there: at a host and port, or at the path of a socket."""
    family = socket.AF_INET6 if ":" in end[0] else socket.AF_INET
    if isinstance(end, str):
        family = socket.AF_UNIX
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(LOOK_S)
        try:
            probe.connect(end)
            return True
        except OSError:
            return False
