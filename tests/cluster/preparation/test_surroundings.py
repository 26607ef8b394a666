"""What a stranger's machine may lack: one line with the remedy from a start, before anything is made,
and a finding of doctor's.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli.doctor import check_hub, check_ray_token
from cluster.preparation import surroundings
from cluster.preparation.surroundings import (
    check_cluster,
    check_home,
    check_host,
    check_open_files,
    check_temp_dirs,
    check_user,
    cluster_address,
)
from tests.support import ROOT
from tests.support.clocks.machine import machine_s


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(surroundings, "MAX_SOCKET_PATH", 400)  # pytest's directories are long.
    monkeypatch.setattr(surroundings, "CONNECT_TIMEOUT_S", 0.5)


@pytest.fixture
def listener() -> Iterator[int]:
    """A port where something listens that never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def train(
    environment: dict[str, str | None], *words: str, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """`launch.py train` of a copy of this environment with some variables changed; None: not set."""
    changed = {**os.environ, **environment}
    env = {name: value for name, value in changed.items() if value is not None}
    command = [*prefix, sys.executable, "launch.py", "train", "configs/quickstart.yaml", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def check_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2 and one line with these parts."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(part in done.stderr for part in ("error: ", *parts)), done.stderr


# --- Ray's address ---


@pytest.mark.parametrize("value", [None, "", " ", "local"])
def test_no_address_is_a_ray_of_our_own(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert cluster_address() is None
    check = check_cluster()
    assert check.ok
    assert check.found == "none"
    assert "starts a Ray of its own" in check.hint
    assert check_ray_token().ok


@pytest.mark.parametrize(
    "value", ["http://127.0.0.1:8265", "https://head", "ray://127.0.0.1:10001", "http://[::1", "redis://x:1"]
)
def test_an_address_for_jobs_or_clients_is_told_from_the_heads(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    check = check_cluster()
    assert not check.ok
    assert value in check.found
    assert "ray job submit" in check.remedy
    assert "unset RAY_ADDRESS" in check.remedy


@pytest.mark.parametrize(
    "value", ["somewhere", "host:port", "auto", "127.0.0.1:99999999", "[::1", "x" * 64 + ":1", "a..b:1"]
)
def test_an_address_that_names_no_head_is_a_finding(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", value)
    check = check_cluster()
    assert not check.ok
    assert "unset RAY_ADDRESS" in check.remedy


def test_a_port_where_nothing_listens_and_one_where_not_ray_does(
    monkeypatch: pytest.MonkeyPatch, listener: int
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listener}")
    start_s = machine_s()
    assert "not Ray" in check_cluster().found
    assert machine_s() - start_s < 5
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check = check_cluster()
    assert "refused" in check.found
    assert "ray start --head" in check.remedy


def test_the_head_of_this_machine_is_asked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")  # Of a head that was killed.
    assert "127.0.0.1:1 (a head on this machine)" in check_cluster().found
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert "auto (127.0.0.1:1): Connection refused" in check_cluster().found


# --- Directories and names ---


@pytest.mark.parametrize("value", [None, "", "relative/home", "/proc", "/dev/null/home"])
def test_a_home_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("HOME", raising=False)
    else:
        monkeypatch.setenv("HOME", value)
    check = check_home()
    assert not check.ok
    assert "export HOME=" in check.remedy
    assert check_hub().name  # Doctor's other checks go on without it.
    assert check_ray_token().name


def test_a_home_that_is_still_to_be_made_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "new" / "home"))
    assert check_home().ok
    assert not (tmp_path / "new").exists()


def temp_problems() -> dict[str, surroundings.Check]:
    return {check.name: check for check in check_temp_dirs() if not check.ok}


def test_a_temporary_directory_that_is_missing_unwritable_or_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert temp_problems() == {}
    for value, why in (
        (str(tmp_path / "none"), "no such directory"),
        ("/proc", "cannot be written"),
        ("/dev/null", "cannot be written"),
    ):
        monkeypatch.setenv("TMPDIR", value)
        assert why in temp_problems()["TMPDIR"].found
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "none"))
    assert list(temp_problems()) == ["RAY_TMPDIR"]
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(surroundings, "MIN_TEMP_BYTES", 2**62)
    assert "no space" in temp_problems()["TMPDIR"].found


def test_rays_sockets_have_the_length_that_ray_allows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ray._private.utils import validate_socket_filepath

    monkeypatch.undo()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    most = surroundings.MAX_SOCKET_PATH - len(surroundings.RAY_SOCKET)
    for length in (most, most + 1):
        folder = Path("/tmp") / ("x" * (length - len("/tmp/")))
        folder.mkdir()
        try:
            monkeypatch.setenv("TMPDIR", str(folder))
            assert ("Ray's sockets" in temp_problems()) == (length > most)
        finally:
            folder.rmdir()
        path = f"{folder}{surroundings.RAY_SOCKET}"
        if length == most:
            validate_socket_filepath(path)
        else:
            with pytest.raises(OSError, match="107"):
                validate_socket_filepath(path)


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    assert check_user().ok
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    check = check_user()
    assert not check.ok
    assert "export USER=" in check.remedy
    monkeypatch.setenv("USER", "agro")
    assert check_user().ok


def test_few_open_files_and_a_host_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_open_files().ok
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    assert "ulimit -n" in check_open_files().remedy
    assert check_host().ok
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    check = check_host()
    assert check.ok  # A run on one machine was tried without.
    assert "`127.0.0.1 no-such-host.invalid` to /etc/hosts" in check.hint


# --- A start ---


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, ("RAY_ADDRESS = http://127.0.0.1:8265", "ray job submit")),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, ("refused", "ray start --head")),
        ({"TMPDIR": "/tmp/there-is-none"}, ("TMPDIR", "no such directory", "export TMPDIR=")),
        (
            {"RAY_TMPDIR": "/tmp/../tmp/../tmp/../tmp/../tmp/../tmp/../tmp"},
            ("characters", "export RAY_TMPDIR=/tmp"),
        ),
        ({"HOME": None}, ("HOME", "not set", "export HOME=")),
    ],
)
def test_a_start_is_refused_in_one_line_and_leaves_nothing(
    environment: dict[str, str | None], parts: tuple[str, ...], tmp_path: Path
) -> None:
    start_s = machine_s()
    check_refused(train({"RAY_TMPDIR": None, **environment}, f"run.dir={tmp_path / 'run'}"), *parts)
    assert machine_s() - start_s < 20
    assert not (tmp_path / "run").exists()


def test_a_dry_run_finds_it_too() -> None:
    check_refused(train({"RAY_TMPDIR": None, "RAY_ADDRESS": "127.0.0.1:1"}, "--dry-run"), "refused")


def test_the_first_line_of_a_start_comes_at_once() -> None:
    command = [sys.executable, "launch.py", "train", "configs/quickstart.yaml", "data.path=/no/such/data"]
    start_s = machine_s()
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading configs/quickstart.yaml ...\n"
        assert machine_s() - start_s < 2.0
        process.kill()


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_directory_is_the_same_from_everywhere(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, ".")
    found = [check for check in check_temp_dirs() if not check.ok]
    assert [(check.name, check.found) for check in found] == [(variable, ".: it is no absolute path")]
