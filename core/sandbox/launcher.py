"""The launcher of a sandboxed program: `core/sandbox/__init__.py` starts this file as a script, and it starts
the program.

    launcher                 unshares what the kernel lets it, and is the reaper of all that the program leaves
      init                   the first process of the process namespace, with which all others end
        program              has the limits, and becomes another interpreter

Where there is no process namespace, launcher and init are one, and what is left of the program is killed one
by one. Only the standard library is imported here, so that it starts in hundredths of a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from typing import Any

_PDEATHSIG, _SUBREAPER, _SECCOMP, _NO_NEW_PRIVILEGES = 1, 36, 22, 38
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PRIVATE, _RECURSIVE, _NO_SUID, _NO_DEVICES, _NO_EXEC = 0x40000, 0x4000, 2, 4, 8
_AT_HERE, _AT_RECURSIVE, _MOUNT_SETATTR, _READ_ONLY = -100, 0x8000, 442, 1
_NOBODY = 65534
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SOCKET_CALL = {"x86_64": 41, "aarch64": 198}
_IO_URING_SETUP = 425
_NPROC_IS_PER_NAMESPACE = (5, 14)
_END_LIMIT_S = 2.0

_libc = ctypes.CDLL(None, use_errno=True)


def main(settings: dict[str, Any]) -> None:
    """Starts the program of `settings`, and writes to its `status_fd` what isolates it, then how it ended."""
    _libc.prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings["parent_pid"]:
        return
    _libc.prctl(_SUBREAPER, 1)
    has_namespaces = settings["namespaces"] and _unshare()
    if not has_namespaces:
        _be_init(settings, {"network": False, "processes": False, "files": False})
        return
    living, life = os.pipe()  # It ends with this process.
    init_pid = os.fork()
    if init_pid == 0:
        os.close(life)
        _libc.prctl(_PDEATHSIG, signal.SIGKILL)
        if select.select([living], [], [], 0)[0]:  # The launcher died before prctl took effect.
            return
        _be_init(settings, {"network": True, "processes": True, "files": _protect_files(settings)})
        os._exit(0)
    os.waitpid(init_pid, 0)


def _unshare() -> bool:
    """Gives this process's children namespaces of their own; returns whether the kernel allowed it."""
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(_NEW_USER | _NEW_PIDS | _NEW_NET | _NEW_MOUNTS | _NEW_IPC) != 0:
        return False
    # Inside it is nobody, even where it is root outside: it loses every capability when the program starts.
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{_NOBODY} {uid} 1")
    _write("/proc/self/gid_map", f"{_NOBODY} {gid} 1")
    return True


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _protect_files(settings: dict[str, Any]) -> bool:
    """Lets nothing be written but in an empty working directory in memory; returns whether that holds."""
    size = f"size={settings['file_bytes']},mode=0777".encode()
    try:
        _mount(None, "/", None, _PRIVATE | _RECURSIVE, None)
        with contextlib.suppress(OSError):  # Refused where parts of /proc are hidden, as in a container.
            _mount("proc", "/proc", "proc", _NO_SUID | _NO_DEVICES | _NO_EXEC, None)
        attributes = struct.pack("QQQQ", _READ_ONLY, 0, 0, 0)
        if _libc.syscall(_MOUNT_SETATTR, _AT_HERE, b"/", _AT_RECURSIVE, attributes, len(attributes)) != 0:
            return False
        _mount("tmpfs", settings["work_dir"], "tmpfs", _NO_SUID | _NO_DEVICES, size)
        with contextlib.suppress(OSError):
            _mount("tmpfs", "/dev/shm", "tmpfs", _NO_SUID | _NO_DEVICES, size)
    except OSError:
        return False
    return True


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: bytes | None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    if _libc.mount(*encoded, ctypes.c_ulong(flags), data) != 0:
        raise OSError(ctypes.get_errno(), "mount", target)


def _be_init(settings: dict[str, Any], isolation: dict[str, bool]) -> None:
    """Lives the program's parent: starts it, waits for it, says how it ended, ends what it left."""
    status_fd = settings["status_fd"]
    pid = os.fork()
    if pid == 0:
        _become_program(settings, isolation)
    has_namespace = isolation["processes"]
    signal.signal(signal.SIGTERM, lambda *_: _kill_the_rest(pid, has_namespace=has_namespace))
    os.close(settings["report_fd"])
    reaped, status = os.waitpid(-1, 0)
    while reaped != pid:
        reaped, status = os.waitpid(-1, 0)
    os.write(status_fd, json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    _kill_the_rest(pid, has_namespace=has_namespace)


def _become_program(settings: dict[str, Any], isolation: dict[str, bool]) -> None:
    try:
        _libc.prctl(_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        os.chdir(settings["work_dir"])
        _set_limits(settings, isolation)
        isolation["network"] = isolation["network"] or _filter_sockets()
        os.write(settings["status_fd"], json.dumps(isolation).encode() + b"\n")
        os.close(settings["status_fd"])
        os.dup2(settings["report_fd"], 3)
        os.set_inheritable(3, True)
        os.closerange(4, 256)
        os.execve(settings["argv"][0], settings["argv"], settings["env"])
    except BaseException as error:  # noqa: BLE001 - a fork must never go on as its parent
        with contextlib.suppress(OSError):
            problem = json.dumps({"problem": f"{type(error).__name__}: {error}"})
            os.write(settings["status_fd"], problem.encode() + b"\n")
        os._exit(127)


def _set_limits(settings: dict[str, Any], isolation: dict[str, bool]) -> None:
    cpu_s = settings["cpu_s"]
    limits = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
        resource.RLIMIT_AS: (settings["address_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (settings["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (256, 256),
        resource.RLIMIT_CORE: (0, 0),
    }
    # The kernel counts the processes of a user; in a namespace of its own those are the program's alone.
    release = tuple(int(part) for part in platform.release().split(".")[:2] if part.isdigit())
    if isolation["processes"] and release >= _NPROC_IS_PER_NAMESPACE:
        limits[resource.RLIMIT_NPROC] = (settings["processes"] + 2,) * 2
    for kind, (soft, hard) in limits.items():
        _, highest = resource.getrlimit(kind)
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        resource.setrlimit(kind, (soft, hard))


def _kill_the_rest(program_pid: int, *, has_namespace: bool) -> None:
    """Kills all that the program started; in a process namespace the kernel does, with its first process."""
    if has_namespace:
        os._exit(0)
    deadline_s = time.monotonic() + _END_LIMIT_S
    while time.monotonic() < deadline_s:
        # One call for all of a session that are alike: a fork bomb is faster than one call for each.
        with contextlib.suppress(OSError):
            os.killpg(program_pid, signal.SIGKILL)
        for pid in _descendants():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
    os._exit(0)


def _descendants() -> list[int]:
    found, open_pids = [], [os.getpid()]
    while open_pids:
        pid = open_pids.pop()
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
            born = [int(child) for child in file.read().split()]
            found += born
            open_pids += born
    return found


def _filter_sockets() -> bool:
    """Refuses sockets other than Unix ones, and io_uring, which makes sockets too, by a filter of system
    calls. Returns whether the kernel took it.
    """
    machine = platform.machine()
    if machine not in _AUDIT_ARCH or sys.maxsize < 2**32:
        return False
    load, equal, allow, refuse = 0x20, 0x15, 0x7FFF0000, 0x00050000 | errno.EACCES
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 0, 6, _AUDIT_ARCH[machine]),  # another: refused, since it numbers its calls otherwise
        (load, 0, 0, 0),  # the system call
        (equal, 4, 0, _IO_URING_SETUP),
        (equal, 0, 2, _SOCKET_CALL[machine]),
        (load, 0, 0, 16),  # its first argument
        (equal, 0, 1, 1),  # AF_UNIX
        (0x06, 0, 0, allow),
        (0x06, 0, 0, refuse),
    ]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    has_promised = _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    return has_promised and _libc.prctl(_SECCOMP, 2, header, 0, 0) == 0


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
