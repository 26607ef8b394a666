"""Calls that may never return, in a process that is a fork of this one."""

from __future__ import annotations

import gc

from rewards.bounded import BoundedProcess


def test_a_call_does_not_visit_what_its_parent_has() -> None:
    """A full collection in the process would copy all of that, and take more than an honest call's time."""
    had = [{"number": number} for number in range(1000)]
    process = BoundedProcess()
    assert process.call(5.0, gc.get_freeze_count) > len(had)
    process.close()
