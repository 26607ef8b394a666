"""What a process may have of a machine, within a container's limits."""

from __future__ import annotations

import os
import socket
from types import SimpleNamespace

import pytest

from core import machine


def test_in_a_container_with_a_quota_what_is_free_is_the_quotas(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "cpu.max").write_text("400000 100000")
    now_s = 100.0
    monkeypatch.setattr(machine.time, "monotonic", lambda: now_s)
    (tmp_path / "cpu.stat").write_text("usage_usec 5000000\nuser_usec 1\n")
    before = machine.idle_cpu_seconds()
    now_s = 110.0
    (tmp_path / "cpu.stat").write_text("usage_usec 35000000\nuser_usec 1\n")
    assert machine.idle_cpu_seconds() - before == pytest.approx(10 * 4 - 30)


@pytest.mark.parametrize(("cores", "idle_s"), [({0, 2}, 1 + 3 + 20), ({4, 5}, 1 + 2 + 3 + 30)])
def test_the_cores_of_the_affinity_are_looked_at_or_all_where_rows_are_no_cores(
    cores, idle_s, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cores)
    rows = [SimpleNamespace(idle=float(number), iowait=10.0) for number in (1, 2, 3)]
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda percpu: rows)
    assert machine.idle_cpu_seconds() == idle_s


def test_where_a_sandbox_hides_the_kernel_s_start_processes_are_told_apart_by_the_host(monkeypatch):
    def hidden(path, **_):
        raise FileNotFoundError(path)

    machine.pid_space.cache_clear()
    monkeypatch.setattr(machine.Path, "read_text", hidden)
    try:
        assert machine.pid_space() == socket.gethostname()
    finally:
        machine.pid_space.cache_clear()
