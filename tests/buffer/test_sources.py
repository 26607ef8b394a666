"""Several sources of prompts: their shares, their epochs, and a stream that is the same for ever."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buffer.admission import work_item
from buffer.server import ReplayBuffer
from buffer.sources import Part, locate
from core.errors import ConfigError
from core.records import WorkItem
from tests.support.buffers import scenario
from tests.support.configs import buffer_config

PARTS = (Part(5, 3), Part(2, 1), Part(9, 2))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(0, 10_000))
def test_after_any_number_of_prompts_each_source_has_had_its_share_to_less_than_one(shares, start):
    counts = Counter(dict.fromkeys(range(len(shares)), 0))
    first = dict.fromkeys(counts)
    for number, ordinal in enumerate(range(start, start + 300), start=1):
        source, before = locate(ordinal, tuple(shares))
        first[source] = before if first[source] is None else first[source]
        assert before == first[source] + counts[source], "its ordinals are counted without gaps"
        counts[source] += 1
        if start == 0:
            off = max(abs(number * share / sum(shares) - counts[s]) for s, share in enumerate(shares))
            assert off < 1
    whole = 300 // sum(shares) * sum(shares)
    had = Counter(locate(ordinal, tuple(shares))[0] for ordinal in range(start, start + whole))
    assert [had[source] for source in range(len(shares))] == [
        whole // sum(shares) * share for share in shares
    ]


def test_each_source_visits_all_its_prompts_in_every_epoch_of_its_own():
    indices = [work_item(ordinal, seed=3, num_prompts=16, parts=PARTS).prompt_index for ordinal in range(180)]
    for start, end in ((0, 5), (5, 7), (7, 16)):
        size = end - start
        of_source = [index for index in indices if start <= index < end]
        of_source = of_source[: len(of_source) // size * size]
        epochs = [of_source[first : first + size] for first in range(0, len(of_source), size)]
        assert all(sorted(epoch) == list(range(start, end)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    assert (
        len({work_item(ordinal, seed=3, num_prompts=16, parts=PARTS).seed for ordinal in range(180)}) == 180
    )


def test_the_stream_of_several_sources_is_the_same_for_ever():
    found = [work_item(ordinal, seed=7, num_prompts=16, parts=PARTS).prompt_index for ordinal in range(12)]
    assert found == [3, 7, 4, 6, 10, 0, 2, 14, 1, 5, 8, 1], (
        "the stream changed: run directories out there would continue with other prompts"
    )
    alone = [work_item(ordinal, seed=7, num_prompts=10).seed for ordinal in range(12)]
    assert alone == [work_item(ordinal, seed=7, num_prompts=16, parts=PARTS).seed for ordinal in range(12)]


@scenario
async def test_the_shares_go_on_after_a_restart_and_other_sources_are_refused(run_dir):
    config = buffer_config(capacity=64)
    leased: list[int] = []
    for size in (7, 5):
        buffer = ReplayBuffer(config, run_dir, 16, parts=PARTS)
        payloads = await buffer.lease(f"a{size}", size, 1.0) or []
        leased += [msgspec.msgpack.decode(payload, type=WorkItem).prompt_index for payload in payloads]
        await buffer.close()
    seed = config.run.seed
    assert leased == [work_item(o, seed=seed, num_prompts=16, parts=PARTS).prompt_index for o in range(12)]
    with pytest.raises(
        ConfigError,
        match=r"16 usable prompts \(5 with share 3, 2 with share 1, 9 with share 2\), now .* 16 "
        r"\(5 with share 3, 2 with share 2, 9 with share 2\)",
    ):
        ReplayBuffer(config, run_dir, 16, parts=(PARTS[0], Part(2, 2), PARTS[2]))
    with pytest.raises(ConfigError, match="there are 16: its group ids would mean other prompts"):
        ReplayBuffer(config, run_dir, 16)
