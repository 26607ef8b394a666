"""One rank of tests/learner/policy/test_zero.py: `main(DIR, RANK)`, with DIR/config.json; rank 0 writes
metrics.json and policy/.
"""

import json
import socket
import time
from pathlib import Path
from typing import Any

import torch

_kept: list[socket.socket] = []


def meet(out_dir: Path, rank: int) -> int:
    """The port that rank 0 chose, and keeps from others as long as it lives."""
    path = out_dir / "port"
    if rank == 0:
        _kept.append(socket.socket())
        _kept[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Its own server can listen there.
        _kept[-1].bind(("127.0.0.1", 0))
        port = _kept[-1].getsockname()[1]
        path.with_suffix(".tmp").write_text(str(port))
        path.with_suffix(".tmp").rename(path)
    while not path.exists():
        time.sleep(0.05)
    return int(path.read_text())


def partition_everything() -> None:
    """Tiny parameters too, which ZeRO-3 would keep whole: between the passes they are empty, as a large
    model's are.
    """
    from learner.policy import zero

    make_config = zero._deepspeed_config

    def with_threshold(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = make_config(*args, **kwargs)
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    zero._deepspeed_config = with_threshold


def main(out_dir: Path, rank: int) -> None:
    from learner.catalogue import parse_config
    from learner.objectives import load_objective
    from learner.policy.zero import ZeroFrozen, ZeroPolicy, init_process_group
    from learner.step.frozen import frozen_names
    from learner.step.share import Share
    from learner.step.update import Updater
    from tests.support.configs import LR
    from tests.support.learning.updates import random_batches

    torch.set_num_threads(1)
    partition_everything()
    config = parse_config(json.loads((out_dir / "config.json").read_text()))
    device = init_process_group(
        rank,
        config.learner.ranks,
        "127.0.0.1",
        meet(out_dir, rank),
        use_gpu=False,
        timeout_s=120,
        sequence_parallel=config.learner.sequence_parallel,
    )
    objective = load_objective(config.objective)
    policy = ZeroPolicy(config.model, config.learner)
    frozen = {name: ZeroFrozen(config.model, config.learner) for name in frozen_names(objective)}
    updater = Updater(config, policy, objective, frozen, pad_id=0, device=device)
    metrics = [
        updater.update(Share.of(batch, config.learner.sequence_parallel), LR).metrics()
        for batch in random_batches(policy.module.config.vocab_size, segments=True)
    ]
    assert not any(parameter.numel() for parameter in policy.module.parameters()), (
        "not everything is partitioned between the steps"
    )
    policy.save_pretrained(str(out_dir / "policy"), bucket_bytes=4096)
    if rank == 0:
        (out_dir / "metrics.json").write_text(json.dumps(metrics))
