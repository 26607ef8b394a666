"""Asynchronous reward functions, good and bad, for the tests of the pool."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

from core.errors import RewardError
from rewards.workers import event_loop


async def second(completions, **columns):
    """As a judge: each completion is a call that takes a second."""
    await asyncio.gather(*(asyncio.sleep(1.0) for _ in completions))
    return [float(len(completion)) for completion in completions]


async def hangs(completions, **columns):
    await asyncio.sleep(1000 if "bad" in completions else 0.01)
    return [float(len(completions))] * len(completions)


async def swallows(completions, **columns):
    while "bad" in completions:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)
    return [1.0] * len(completions)


async def blocks(completions, **columns):
    await asyncio.sleep(0.5)  # So that others are under way.
    time.sleep(1000 if "bad" in completions else 0.0)
    return [1.0] * len(completions)


async def dies(completions, **columns):
    await asyncio.sleep(0.5)
    if "bad" in completions:
        os._exit(3)
    return [1.0] * len(completions)


async def raises(completions, **columns):
    await asyncio.sleep(0.01)
    if "bad" in completions:
        raise ValueError("bad answer")
    return [float(len(completions))] * len(completions)


async def process_id(completions, **columns):
    await asyncio.sleep(0.3)
    return [float(os.getpid())] * len(completions)


def plain(completions, **columns):
    return [0.5] * len(completions)


class Patient:
    """Has a limit of its own, longer than the run's."""

    timeout_s = 30.0

    async def __call__(self, completions, **columns):
        await asyncio.sleep(2.0)
        return [1.0] * len(completions)


patient = Patient()


async def for_5_s(completions, **columns):
    await asyncio.sleep(5.0)
    return [1.0] * len(completions)


async def half_a_pair(completions):
    """As a judge that quotes JSON which was cut within an emoji."""
    if "bad" in completions:
        raise ValueError("no score in \ud83d")
    return [ValueError("half \ud83d") if text == "half" else 1.0 for text in completions]


def plain_half_a_pair(completions):
    if "bad" in completions:
        raise ValueError("no score in \ud83d")
    return [ValueError("half \ud83d") if text == "half" else 1.0 for text in completions]


class Panic(BaseException):
    """As pyo3's PanicException."""


async def panics(completions):
    if "bad" in completions:
        raise Panic("rust")
    return [1.0] * len(completions)


def plain_panics(completions):
    if "bad" in completions:
        raise Panic("rust")
    return [1.0] * len(completions)


async def raises_ours(completions):
    if "bad" in completions:
        raise RewardError("no such rubric")
    return [1.0] * len(completions)


async def keeps_its_reply(completions):
    """Lets no reply out of its process, whose event loop turns."""

    def send(loop, reply):
        if reply.number == event_loop.BEAT:
            loop._connection.send_bytes(event_loop.encoded(reply, loop._warnings))
        else:
            loop._num_open += 1  # So that it goes on to say that it turns.

    event_loop._EventLoop._send = send
    return [1.0] * len(completions)
