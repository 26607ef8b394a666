"""What tests of the buffer share: payloads, scenarios on virtual time, and sums that must add up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from buffer.replay import EVICTIONS
from buffer.server import ReplayBuffer
from cluster.plan.virtual_time import run_virtually
from core.arrays import Float32s
from core.records import Group, Sample, VersionSpan, WorkItem, decode_batch, decode_group, encode

NUM_PROMPTS = 13


LEDGER_NAME = "ledger.jsonl"


def make_payload(
    ordinal: int, version: int = 0, rewards: tuple[float | None, ...] = (1.0, 0.0), num_tokens: int = 4
) -> bytes:
    samples = tuple(
        Sample.one_turn(
            (1, 2),
            range(num_tokens),
            (-0.5,) * num_tokens,
            version_spans=(VersionSpan(version, 0, num_tokens),),
            finish_reason="stop",
            text="four",
            reward=reward,
            error="ValueError: boom" if reward is None else None,
        )
        for reward in rewards
    )
    return encode(
        Group(group_id=ordinal, prompt_index=0, source_row=0, prompt="p", samples=samples, actor="a")
    )


def make_offline_payload(ordinal: int, rewards: tuple[float, ...] = (1.0, 0.0)) -> bytes:
    group = decode_group(make_payload(ordinal, rewards=rewards))
    samples = tuple(
        msgspec.structs.replace(sample, logprobs=Float32s(), version_spans=()) for sample in group.samples
    )
    return encode(msgspec.structs.replace(group, samples=samples))


def ordinals_of(items: list[bytes]) -> list[int]:
    return [msgspec.msgpack.decode(item, type=WorkItem).ordinal for item in items]


def ids_of(batch: bytes | None) -> list[int]:
    assert batch is not None, "no batch came"
    return [group.group_id for group in decode_batch(batch).groups]


async def check_sums(buffer: ReplayBuffer) -> dict[str, float]:
    """The stats without their prefix, after checking that every generated group is accounted for."""
    stats = {name.removeprefix("buffer/"): value for name, value in (await buffer.stats()).items()}
    assert stats["frontier"] == stats["inserted"] + sum(
        stats[name] for name in ("evicted_too_small", "failed", "leased", "rested")
    )
    assert stats["inserted"] == stats["groups"] + sum(stats[name] for name in EVICTIONS)
    return stats


def scenario(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs an async test on virtual time with the run directory `tmp_path`; its other arguments are
    fixtures and parameters.
    """

    def run(tmp_path: Any, **others: Any) -> None:
        run_virtually(test(str(tmp_path), **others))

    run.__name__, run.__doc__, run.pytestmark = test.__name__, test.__doc__, getattr(test, "pytestmark", [])  # type: ignore[attr-defined]
    first, *others = inspect.signature(test).parameters.values()
    run.__signature__ = inspect.Signature([first.replace(name="tmp_path"), *others])  # type: ignore[attr-defined]
    return run


def make_sample(version: int = 0, reward: float | None = 1.0, error: str | None = None) -> Sample:
    return Sample.one_turn(
        (1,), (1, 2), (-0.1, -0.2), version_spans=(VersionSpan(version, 0, 2),), finish_reason="stop", text="x",
        reward=reward, error=error,
    )  # fmt: skip


def make_group(*samples: Sample) -> Group:
    return Group(group_id=0, prompt_index=0, source_row=0, prompt="p", samples=samples, actor="a0")
