"""The launcher of a sandboxed program: `core/sandbox/__init__.py` starts this file as a script, and it starts
the program.

    launcher                 unshares what the kernel lets it
      init                   the first process of the process namespace, with which all others end
        program              has the limits, and becomes another interpreter

Where there is no process namespace, launcher and init are one, and the program may start no process: nobody
could count them, and a fork bomb is faster than whoever kills it. Only the standard library is imported here,
so that it starts in hundredths of a second.
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
import socket
import struct
import sys
from typing import Any

_PDEATHSIG, _SECCOMP, _NO_NEW_PRIVILEGES = 1, 22, 38
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PRIVATE, _RECURSIVE, _NO_SUID, _NO_DEVICES, _NO_EXEC = 0x40000, 0x4000, 2, 4, 8
_AT_HERE, _AT_RECURSIVE, _MOUNT_SETATTR, _READ_ONLY = -100, 0x8000, 442, 1
_NOBODY = 65534
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SOCKET_CALL = {"x86_64": 41, "aarch64": 198}
_CLONE_CALL = {"x86_64": 56, "aarch64": 220}
_FORK_CALLS = {"x86_64": (57, 58), "aarch64": ()}
_CLONE3_CALL, _THREAD = 435, 0x10000
_COUNTED_UID = 2_000_000_000
_IO_URING_SETUP = 425
_NPROC_IS_PER_NAMESPACE = (5, 14)

_libc = ctypes.CDLL(None, use_errno=True)


def main(settings: dict[str, Any]) -> None:
    """Starts the program of `settings`, and writes to its `status_fd` what isolates it, then how it ended."""
    _libc.prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != settings["parent_pid"]:
        return
    has_namespaces = settings["namespaces"] and _unshare(settings)
    _libc.prctl(_PDEATHSIG, signal.SIGKILL)  # Another user's rights have cleared it.
    if os.getppid() != settings["parent_pid"]:
        return
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


def _unshare(settings: dict[str, Any]) -> bool:
    """Gives this process's children namespaces of their own; returns whether the kernel allowed it. Notes in
    `settings` whether it counts their processes.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        # The kernel counts the processes of no program whose real user is root.
        with contextlib.suppress(OSError):
            os.setresuid(_COUNTED_UID, 0, 0)
    # A user's processes are counted; in a namespace of its own those are the program's alone.
    release = tuple(int(part) for part in platform.release().split(".")[:2] if part.isdigit())
    settings["is_counted"] = os.getuid() != 0 and release >= _NPROC_IS_PER_NAMESPACE
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
    """Lives the program's parent: starts it, waits for it, says how it ended. What it left in a process
    namespace ends with this process.
    """
    status_fd = settings["status_fd"]
    pid = os.fork()
    if pid == 0:
        _become_program(settings, isolation)
    os.close(settings["report_fd"])
    reaped, status = os.waitpid(-1, 0)
    while reaped != pid:
        reaped, status = os.waitpid(-1, 0)
    os.write(status_fd, json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _become_program(settings: dict[str, Any], isolation: dict[str, bool]) -> None:
    try:
        _libc.prctl(_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        os.chdir(settings["work_dir"])
        is_counted = isolation["processes"] and settings["is_counted"]
        _set_limits(settings, is_counted=is_counted)
        is_filtered = _filter_calls(sockets=not isolation["network"], processes=not is_counted)
        if not (is_counted or is_filtered):
            raise OSError(errno.ENOSYS, "nothing here bounds the number of processes of a program")
        isolation["network"] = isolation["network"] or is_filtered
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


def _set_limits(settings: dict[str, Any], *, is_counted: bool) -> None:
    cpu_s = settings["cpu_s"]
    limits = {
        resource.RLIMIT_CPU: (cpu_s, cpu_s + 1),
        resource.RLIMIT_AS: (settings["address_bytes"],) * 2,
        resource.RLIMIT_FSIZE: (settings["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (256, 256),
        resource.RLIMIT_CORE: (0, 0),
    }
    if is_counted:
        limits[resource.RLIMIT_NPROC] = (settings["processes"] + 2,) * 2  # With the launcher and its init.
    for kind, (soft, hard) in limits.items():
        _, highest = resource.getrlimit(kind)
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        resource.setrlimit(kind, (soft, hard))


def _filter_calls(*, sockets: bool, processes: bool) -> bool:
    """Refuses `sockets` other than Unix ones, and io_uring, which makes sockets too; refuses new `processes`,
    but no threads. Returns whether the kernel took the filter of system calls.
    """
    machine = platform.machine()
    if not (sockets or processes) or machine not in _AUDIT_ARCH or sys.maxsize < 2**32:
        return False
    refuse, again, absent = (0x00050000 | code for code in (errno.EACCES, errno.EAGAIN, errno.ENOSYS))
    code = _Filter()
    code.load(4)  # The architecture: another one numbers its calls otherwise.
    code.unless(_AUDIT_ARCH[machine], refuse)
    if sockets:
        code.load(0)
        code.when(_IO_URING_SETUP, refuse)
        code.skip_unless(_SOCKET_CALL[machine], 2)
        code.load(16)  # Its first argument.
        code.unless(socket.AF_UNIX, refuse)
    if processes:
        code.load(0)
        for number in _FORK_CALLS[machine]:
            code.when(number, again)
        code.when(_CLONE3_CALL, absent)  # The C library asks for the older one then, whose flags can be seen.
        code.skip_unless(_CLONE_CALL[machine], 2)
        code.load(16)
        code.unless_any(_THREAD, again)
    return code.install()


class _Filter:
    """A program of classic BPF over system calls, of steps that go on or return."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, int, int, int]] = []

    def load(self, offset: int) -> None:
        """Looks at a word: 0 is the call's number, 4 the architecture, 16 the first argument."""
        self._steps.append((0x20, 0, 0, offset))

    def when(self, value: int, action: int) -> None:
        """Ends with the action where the word is the value."""
        self._steps += [(0x15, 0, 1, value), (0x06, 0, 0, action)]

    def unless(self, value: int, action: int) -> None:
        """Ends with the action where the word is another than the value."""
        self._steps += [(0x15, 1, 0, value), (0x06, 0, 0, action)]

    def unless_any(self, bits: int, action: int) -> None:
        """Ends with the action where the word has none of the bits."""
        self._steps += [(0x45, 1, 0, bits), (0x06, 0, 0, action)]

    def skip_unless(self, value: int, num_steps: int) -> None:
        """Leaves out a load and a step with its action where the word is another than the value."""
        self._steps.append((0x15, 0, num_steps + 1, value))

    def install(self) -> bool:
        """Lets all other calls pass, for this process and what it becomes; returns whether the kernel took
        it.
        """
        steps = [*self._steps, (0x06, 0, 0, 0x7FFF0000)]
        buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        header = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(buffer))
        has_promised = _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
        return has_promised and _libc.prctl(_SECCOMP, 2, header, 0, 0) == 0


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
