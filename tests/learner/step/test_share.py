"""What of a batch reaches which rank: every group one rank, decoded there alone; the index all of them."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.records import Batch, StoredGroup, encode_batch, index_of, open_batch
from learner.step.share import Share, owned, receive_share
from tests.support.learning.ranks import run_ranks
from tests.support.learning.updates import random_batches
from tests.support.scenarios import share_scenario


def encoded(batch: Batch) -> bytes:
    return encode_batch(batch.step, map(StoredGroup.of, batch.groups))


def test_one_rank_has_the_whole_batch() -> None:
    batch = random_batches(50)[0]
    share = receive_share(open_batch(encoded(batch)))
    assert share == Share.of(batch) == Share(index_of(batch), batch.groups)


def test_a_payload_that_the_index_does_not_mean_is_refused() -> None:
    first, second = (StoredGroup.of(group) for group in random_batches(50)[0].groups[:2])
    mixed = open_batch(encode_batch(0, [first._replace(payload=second.payload)]))
    with pytest.raises(msgspec.ValidationError, match="the index names group 0 of"):
        receive_share(mixed)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "alike"), [(2, 1), (7, 1), (4, 2)])
def test_ranks_share_a_batch_and_each_decodes_its_own_groups_only(
    num_ranks: int, alike: int, tmp_path: Path
) -> None:
    """With 7 ranks there are more than groups: some get none. `alike` ranks share their rows."""
    batch = random_batches(50)[0]
    (tmp_path / "batch").write_bytes(encoded(batch))
    run_ranks(share_scenario.main, num_ranks, tmp_path, num_ranks, alike)
    found: list[dict[str, Any]] = [
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_ranks)
    ]
    places = owned(index_of(batch), num_ranks, alike)
    assert all(places[rank] == places[rank - rank % alike] for rank in range(num_ranks))
    assert sorted(place for mine in places[::alike] for place in mine) == list(range(len(batch.groups)))
    for rank, seen in enumerate(found):
        assert seen["groups"] == [batch.groups[place].group_id for place in places[rank]]
        assert seen["decoded"] == seen["groups"], "no other group was decoded"
        assert seen["same"]
