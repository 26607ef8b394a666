"""What a place's process does between two episodes, which it does for each of them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from environments import place
from environments.wire import Reply
from tests.support import ROOT

NUM_CHILDREN = """
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
    subprocess.run([sys.executable, "-c", NUM_CHILDREN], cwd=ROOT, check=True, timeout=60)


def test_what_ends_soon_behind_an_episode_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [(1, 2), (0, 1), (0, 0), (1, 2)]
    monkeypatch.setattr(place, "_left", lambda: seen.pop(0))
    surroundings = place._Surroundings()
    monkeypatch.setattr(place, "LINGER_LIMIT_S", 600.0)
    assert surroundings.restored(7) == Reply(7, "left", processes=0, threads=0)
    monkeypatch.setattr(place, "LINGER_LIMIT_S", 0.0)
    assert surroundings.restored(8) == Reply(8, "left", processes=1, threads=2)
