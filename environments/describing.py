"""The process that says what an environment is: `environments.spec.describe`, seen from the other side."""

from __future__ import annotations

import os
import socket

import msgspec

from core import children
from core.errors import ConfigError
from environments.loading import load, spec_of


def serve(fd: int, parent_pid: int) -> None:
    """Reads names and paths from socket `fd`; writes for each, a line as soon as it is known, an
    EnvironmentSpec, or what is wrong.
    """
    children.die_with(parent_pid)
    os.set_inheritable(fd, False)
    with socket.socket(fileno=fd) as connection:
        parts = iter(lambda: connection.recv(2**16), b"")
        paths = msgspec.msgpack.decode(b"".join(parts), type=list[tuple[str, str]])
        for name, path in paths:
            try:
                said: object = spec_of(name, path, load(name, path))
            except ConfigError as error:
                said = str(error)
            connection.sendall(msgspec.json.encode(said) + b"\n")
