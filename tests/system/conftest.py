"""What whole runs need around them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.runs import started


@pytest.fixture(autouse=True)
def no_run_goes_on() -> Iterator[None]:
    """A run whose test has failed does not take the cores from the tests after it."""
    yield
    for process in started:
        if process.poll() is None:
            process.kill()  # Its guardian ends the rest.
    started.clear()
