"""What a process of a run sees of its node: the GPUs that Ray gave it, and no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray

from core.process_log import ProcessLog
from core.processes import remote


class Seeing:
    """Tells which GPUs its CUDA would find."""

    def seen(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.slow
def test_each_process_sees_the_gpus_that_ray_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Ray itself is told to leave that to others."""
    monkeypatch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        asked = [1, 1, 0]
        parts = [
            remote(Seeing, ProcessLog(str(tmp_path), f"part-{number}"))
            .options(num_cpus=0, num_gpus=gpus)
            .remote()
            for number, gpus in enumerate(asked)
        ]
        seen = ray.get([part.seen.remote() for part in parts], timeout=120)
    finally:
        ray.shutdown()
    assert sorted(seen[:2]) == ["5", "7"]
    assert seen[2] == ""
