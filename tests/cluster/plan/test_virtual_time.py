import asyncio
import time

import pytest

from cluster.plan.virtual_time import run_virtually


def test_hours_pass_in_no_time_and_in_order() -> None:
    seen: list[tuple[float, str]] = []

    async def wait(delay_s: float, name: str) -> None:
        await asyncio.sleep(delay_s)
        seen.append((round(asyncio.get_running_loop().time(), 3), name))

    async def all_of_them() -> None:
        await asyncio.gather(wait(7200.0, "late"), wait(3600.0, "soon"), wait(0.0, "now"))

    used_s = time.process_time()
    run_virtually(all_of_them())

    assert seen == [(0.0, "now"), (3600.0, "soon"), (7200.0, "late")]
    assert time.process_time() - used_s < 60.0, "a loop that spins until a timer is due"


def test_what_waits_for_ever_is_a_deadlock() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="deadlock"):
        run_virtually(wait())
