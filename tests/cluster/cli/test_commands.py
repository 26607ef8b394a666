"""What holds for every command of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace

import pytest

import launch
from cluster.cli import commands


@pytest.mark.parametrize(("asked", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_of_every_command_sleep_while_they_wait(monkeypatch, asked, expected):
    seen: list[str] = []

    def evaluate(arguments: Namespace) -> int:
        seen.append(os.environ["OMP_WAIT_POLICY"])
        return 0

    monkeypatch.setenv("OMP_WAIT_POLICY", asked or "")
    if asked is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(commands, "evaluate", evaluate)
    monkeypatch.setattr(sys, "argv", ["launch.py", "evaluate", "somewhere"])

    assert launch.main() == 0
    assert seen == [expected]


def test_the_command_line_says_so_before_torch_is_imported():
    code = "import sys, launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
