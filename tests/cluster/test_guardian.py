"""The guardian of a local run: whatever its driver started ends with the driver, however the driver ends."""

import subprocess
import sys
import time

import psutil
import pytest

from tests.support import ROOT
from tests.support.runs import wait_for_end

pytestmark = pytest.mark.timed
DRIVER = """
import os, subprocess, sys, time
from cluster.guardian import LOOK_S, guard

guard()
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
time.sleep(2 * LOOK_S)
# As Ray's raylet starts a worker and dies at once: nobody's child, and younger than the guardian's last look.
session = f"/nowhere/session_2026-01-02_03-04-05_678901_{os.getpid()}/sockets/plasma_store"
worker = [sys.executable, "-c", "import time; time.sleep(299)", f"--object-store-name={session}"]
launcher = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], start_new_session=True, stdout=-3, stderr=-3).pid)"
orphan = subprocess.run([sys.executable, "-c", launcher, *worker], capture_output=True, text=True).stdout.strip()
print(child.pid, orphan, flush=True)
time.sleep(300)
"""


@pytest.mark.slow
def test_children_and_orphans_of_the_session_end_with_a_killed_driver_and_nothing_else_does() -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    stranger = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; time.sleep(60)",
            "/nowhere/session_2026-01-02_03-04-05_678901_1/x",
        ]
    )
    try:
        assert driver.stdout is not None
        family = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
        assert len(family) == 2
        time.sleep(0.5)
        assert all(process.is_running() for process in family)
        driver.kill()
        assert wait_for_end(family) == []
        assert stranger.poll() is None
    finally:
        stranger.kill()
        driver.kill()
        driver.wait()
        stranger.wait()
