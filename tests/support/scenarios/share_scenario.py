"""One rank of tests/learner/step/test_share.py: `main(DIR, NUM_RANKS, ALIKE, RANK)`, with an encoded batch in
DIR/batch; writes DIR/RANK.json.
"""

import json
from pathlib import Path

import torch.distributed as dist

from core.records import complete_group, decode_batch, open_batch
from learner.step import share
from tests.support.scenarios.zero_scenario import meet


def main(out_dir: Path, num_ranks: int, alike: int, rank: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{meet(out_dir, rank)}", rank=rank, world_size=num_ranks
    )
    payload, decoded = (out_dir / "batch").read_bytes(), []

    def noted(head: object, found: memoryview) -> object:
        group = complete_group(head, found)
        decoded.append(group.group_id)
        return group

    share.complete_group = noted
    received = share.receive_share(open_batch(payload) if rank == 0 else None, alike)
    mine = [group.group_id for group in received.groups]
    same = received == share.Share.of(decode_batch(payload), alike)
    found = {"groups": mine, "decoded": [*decoded], "same": same}
    (out_dir / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
