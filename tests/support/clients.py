"""Clients of things in this process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

from core.calls import Call, Local
from core.monitor_client import MONITOR, MonitorClient


def events_to(told: list[str]) -> Callable[[str], Call[None]]:
    """What `Calls` tells events by, of a monitor that only keeps them."""
    return MonitorClient(Local(SimpleNamespace(event=told.append)), MONITOR).event
