"""Checks what a run needs of the process and the machine it starts on, for a start before anything is made,
and for `doctor`.

Each check is short, starts nothing, and asks nothing of the network but whether the head in RAY_ADDRESS
listens.
"""

from __future__ import annotations

import getpass
import os
import resource
import shutil
import socket
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import PlacementError

CONNECT_TIMEOUT_S = 4.0
MAX_SOCKET_PATH = 107  # Linux takes so many bytes for the path of a Unix socket.
RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MIN_OPEN_FILES = 256
MIN_TEMP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Check:
    """One finding. `remedy` says what to do where it is not `ok`; `hint` is worth knowing where it is."""

    name: str
    found: str
    wanted: str
    ok: bool
    remedy: str = ""
    hint: str = ""


def check_surroundings() -> None:
    """Raises PlacementError for the first thing that would make a start fail."""
    for check in surroundings():
        if not check.ok:
            raise PlacementError(f"{check.name}: {check.found}; expected {check.wanted}. {check.remedy}")


def surroundings() -> Iterator[Check]:
    """Returns every check, those of the environment first."""
    yield check_home()
    yield check_user()
    yield from check_temp_dirs()
    yield check_open_files()
    yield check_host()
    yield check_cluster()


# --- Who and where ---


def check_home() -> Check:
    """Checks the home directory: libraries keep caches and compiled operations below it."""
    wanted = "a directory that can be written"
    remedy = "Set it: export HOME=/some/writable/directory"
    home = os.environ.get("HOME", "")
    if not home:
        return Check("HOME", "not set", wanted, False, remedy)
    if not Path(home).is_absolute():
        return Check("HOME", f"{home}, which is no absolute path", wanted, False, remedy)
    reason = _why_not_writable(Path(home))
    return Check("HOME", f"{home}: {reason}" if reason else home, wanted, not reason, remedy)


def check_user() -> Check:
    """Checks for a user name: torch names its cache after it."""
    try:
        return Check("user", getpass.getuser(), "a name", True)
    except (KeyError, OSError):
        remedy = "Give it one: export USER=agro LOGNAME=agro"
        return Check(
            "user", f"uid {os.getuid()} has no name", "an entry in /etc/passwd, or USER", False, remedy
        )


def check_temp_dirs() -> Iterator[Check]:
    """Checks TMPDIR, for everything, and what Ray takes: its sockets lie below it."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), None)
    for variable in dict.fromkeys(("TMPDIR", name or "TMPDIR")):
        path = Path(os.environ.get(variable) or "/tmp")
        reason = _why_not_writable(path, must_exist=True) if path.is_absolute() else "it is no absolute path"
        if not reason and shutil.disk_usage(path).free < MIN_TEMP_BYTES:
            reason = "no space is left there"
        remedy = f"Make it, or set another: export {variable}=/tmp"
        shown = variable if os.environ.get(variable) else f"{variable} (not set)"
        yield Check(
            shown,
            f"{path}: {reason}" if reason else str(path),
            "a directory that can be written",
            not reason,
            remedy,
        )
    if cluster_address() is None:  # On a cluster the head has chosen the directory.
        ray_dir = os.environ.get(name) if name else "/tmp"
        length, most = len(os.fsencode(str(ray_dir))), MAX_SOCKET_PATH - len(RAY_SOCKET)
        remedy = "Give Ray a shorter one: export RAY_TMPDIR=/tmp"
        yield Check(
            "Ray's sockets", f"{ray_dir} has {length} characters", f"at most {most}", length <= most, remedy
        )


def _why_not_writable(path: Path, *, must_exist: bool = False) -> str:
    """Returns why no file can be made in `path`, or where it is missing in its parent; empty when one can."""
    if must_exist and not path.exists():
        return "there is no such directory"
    try:
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=nearest):
            return ""
    except OSError as error:
        return f"it cannot be written ({error.strerror or error})"


# --- Limits ---


def check_open_files() -> Check:
    """Checks the limit of open files: Ray raises the soft limit to the hard one, and each of its processes
    takes some.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ok = hard == resource.RLIM_INFINITY or hard >= MIN_OPEN_FILES
    found = "no limit" if hard == resource.RLIM_INFINITY else str(hard)
    return Check(
        "open files",
        found,
        f">= {MIN_OPEN_FILES}",
        ok,
        f"Raise the hard limit of this shell: ulimit -n {MIN_OPEN_FILES}",
    )


def check_host() -> Check:
    """Checks whether this machine's name has an address: on one machine a run does without."""
    name, wanted = socket.gethostname(), "an address (for several machines)"
    try:
        return Check("host name", f"{name}, {socket.getaddrinfo(name, None)[0][4][0]}", wanted, True)
    except OSError as error:
        hint = (
            "Other machines cannot find it, and a run on this one alone does without: "
            f"add `127.0.0.1 {name}` to /etc/hosts."
        )
        return Check("host name", f"{name}: {error.strerror or error}", wanted, True, hint=hint)


# --- Ray ---


def cluster_address() -> str | None:
    """Returns the cluster that RAY_ADDRESS names, `auto` for the one of this machine; None to run alone:
    unset, empty or `local`.
    """
    value = os.environ.get("RAY_ADDRESS", "").strip()
    return None if value in ("", "local") else value


def check_cluster() -> Check:
    """Checks whether the Ray head that a run would join listens."""
    address, running = cluster_address(), running_head()
    if address is None:
        if running is None:
            return Check(
                "Ray cluster",
                "none",
                "any (optional)",
                True,
                hint="`train` starts a Ray of its own on this machine.",
            )
        found, hint = (
            f"{running} (a head on this machine)",
            "`train` joins it only with RAY_ADDRESS=auto, or through `ray job submit`.",
        )
        return Check("Ray cluster", found, "any (optional)", True, hint=hint)
    wanted, alone = "the head's host:port, or auto", "or unset RAY_ADDRESS to run alone."
    scheme = address.partition("://")[0] if "://" in address else ""
    if scheme:
        dashboard = "the dashboard's address"
        whose = {"ray": "the address of Ray's client", "http": dashboard, "https": dashboard}.get(
            scheme, "no head's address"
        )
        job = "submit a job there (`ray job submit --address`)"
        remedy = f"That is {whose}: {job}, set the head's host:6379, {alone}"
        return Check("Ray cluster", f"RAY_ADDRESS = {address}", wanted, False, remedy)
    if address == "auto" and running is None:
        remedy = f"No head was started on this machine: `ray start --head`, {alone}"
        return Check("Ray cluster", "RAY_ADDRESS = auto", wanted, False, remedy)
    host, port = _host_and_port(running or "" if address == "auto" else address)
    found = f"RAY_ADDRESS = {address}" + (f" ({running})" if address == "auto" else "")
    if not host or not port:
        return Check("Ray cluster", found, wanted, False, f"Set RAY_ADDRESS to the head's host:6379, {alone}")
    reason = _why_no_head(host, port)
    remedy = f"Nothing of Ray answers at {host}:{port}. Start the head there (`ray start --head`), {alone}"
    return Check("Ray cluster", f"{found}: {reason or 'listens'}", "a head that listens", not reason, remedy)


def running_head() -> str | None:
    """Returns the address that a head on this machine has left in its file."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    note = Path(folder) / "ray" / "ray_current_cluster"
    try:
        return note.read_text().strip() or None
    except OSError:
        return None


def _why_no_head(host: str, port: int) -> str:
    """Returns why no gRPC server can be reached there; empty when one can. Ray itself waits for ever for one
    that never answers.
    """
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error) or type(error).__name__
    except UnicodeError:
        return "that is no name of a host"
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return ""
    import grpc

    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return "something listens, but it is not Ray"
    return ""


def _host_and_port(address: str) -> tuple[str | None, int | None]:
    try:
        parts = urllib.parse.urlsplit(f"//{address}")
        return parts.hostname, parts.port
    except ValueError:
        return None, None
