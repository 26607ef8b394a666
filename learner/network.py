"""Which of a node's networks the learner's ranks speak over."""

from __future__ import annotations

import os
import socket

import psutil

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def speak_where(address: str) -> None:
    """Lets gloo listen on the interface by which rank 0, at `address`, is reached, unless the environment
    names one.

    By itself gloo listens at what this host's own name resolves to, which Debian and Ubuntu make 127.0.1.1:
    no other node would reach it.
    """
    if (name := interface_towards(address)) is not None:
        os.environ.setdefault(GLOO_INTERFACE, name)


def interface_towards(address: str) -> str | None:
    """Returns the name of the interface whose address this host has when it speaks to `address`; None where
    that cannot be told.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # Nothing is sent.
            own = probe.getsockname()[0]
    except OSError:
        return None
    found = psutil.net_if_addrs()
    return next((name for name, given in found.items() if own in {entry.address for entry in given}), None)
