"""What a place's process does between two episodes, which it does for each of them."""

from __future__ import annotations

import subprocess
import sys

from tests.support import ROOT

CODE = """
import subprocess, sys
from core import children
from environments import place
children.adopt_orphans()
looked = []
children.family = lambda pid: looked.append(pid) or [pid, 0]
assert (place._num_children(), looked) == (0, [])
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
assert (place._num_children(), len(looked)) == (1, 1)
child.communicate()
assert (place._num_children(), len(looked)) == (0, 1)
"""


def test_all_processes_are_read_only_where_an_episode_has_left_some_behind() -> None:
    subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, check=True, timeout=60)
