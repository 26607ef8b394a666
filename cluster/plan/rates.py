"""What machines do: peaks of GPUs, and which share of them is reached, each with its source.

A `Rate` is not one number but three. Everything that is told from them is told as a range, since few were
measured with this system on a GPU, and those on one (benchmarks/results/gpu-nvidia-h200.json).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

Case = Literal["worst", "likely", "best"]
CASES: tuple[Case, ...] = ("worst", "likely", "best")
RESULTS_DIR = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


class Rate(NamedTuple):
    """A figure to plan with: what to expect at worst, most likely and at best, and who found it."""

    worst: float
    likely: float
    best: float
    source: str

    def at(self, case: Case) -> float:
        """Returns the figure of one case."""
        return {"worst": self.worst, "likely": self.likely, "best": self.best}[case]


class Device(NamedTuple):
    """A GPU by its maker's data sheet: dense bfloat16 FLOP/s, bytes of memory a second, bytes a second to the
    other GPUs of its node in one direction, and to the host.
    """

    title: str
    memory_bytes: float
    peak_flops: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float


PCIE4, PCIE5 = 32e9, 64e9
DEVICES: dict[str, Device] = {
    "a100": Device("A100 80 GB SXM", 80e9, 312e12, 2.04e12, 300e9, PCIE4),
    "a10g": Device("A10G", 24e9, 70e12, 0.60e12, PCIE4, PCIE4),
    "l40s": Device("L40S", 48e9, 362e12, 0.864e12, PCIE4, PCIE4),
    "rtx4090": Device("RTX 4090", 24e9, 165e12, 1.01e12, PCIE4, PCIE4),
    "h100": Device("H100 80 GB SXM", 80e9, 989e12, 3.35e12, 450e9, PCIE5),
    "h200": Device("H200 SXM", 141e9, 989e12, 4.8e12, 450e9, PCIE5),
    "b200": Device("B200", 180e9, 2250e12, 7.7e12, 900e9, PCIE5),
}
"""By the name that is typed; the figures are those of NVIDIA's data sheets (without sparsity)."""

TRAIN_SHARE = Rate(
    0.17,
    0.38,
    0.50,
    "of the peak, recomputed passes counted: torchtitan docs/performance.md has 33-39 % for 8B by FSDP on "
    "8 to 128 H100, KempnerForge 27-58 % for 7B on 32 to 1 H200; 17 % measured for 1.1B on one H200",
)
DECODE_BANDWIDTH = Rate(
    0.50,
    0.70,
    0.80,
    "of the memory's: one sequence of Llama-3.1-8B by vLLM 0.23 on an A100 reaches 77 % (J. Musgrave's sweep)",
)
DECODE_COMPUTE = Rate(0.30, 0.45, 0.60, "of the peak in matrix products of a few hundred rows: an estimate")
PREFILL_SHARE = Rate(0.30, 0.45, 0.60, "of the peak: an estimate, as for training")
ENGINE_STEP_S = Rate(
    10e-3,
    7e-3,
    2e-3,
    "Python of an engine's step that no GPU work covers: steps of 256 sequences of 0.5B and 1.5B took 7 and "
    "9 ms on an H200, of which its memory explains less than one",
)
TENSOR_PARALLEL = Rate(
    0.70,
    0.85,
    0.95,
    "kept at each doubling of an engine's GPUs: an estimate; Lambda's table of vLLM 0.5.4 has 0.57 for "
    "models that fit on one",
)
LINK_SHARE = Rate(0.60, 0.76, 0.85, "of a link's bandwidth by NCCL's gathers: an estimate")
NETWORK_SHARE = Rate(0.60, 0.80, 0.95, "of a node's network by NCCL: an estimate")
EXPOSED = Rate(1.0, 0.5, 0.1, "of ZeRO-3's traffic that no computation hides: an estimate")
HOST_COPY_SHARE = Rate(0.60, 0.78, 0.85, "of PCIe by copies from pinned memory: an estimate")
PAGEABLE_BYTES_PER_S = Rate(4e9, 6e9, 8e9, "from shared memory to a GPU, not pinned: an estimate")
HASH_BYTES_PER_S = Rate(5e9, 10.5e9, 12e9, "xxh3 of a snapshot by one thread: 10.5 GB/s measured on a CPU")
STORE_BYTES_PER_S = Rate(
    1.4e9, 5.3e9, 8e9, "into Ray's object store: 1.4 GB/s measured on two cores, 8 beside an H200"
)
PULL_BYTES_PER_S = Rate(1.5e9, 2.0e9, 2.5e9, "one node's pull from another by Ray: an estimate")
SERVED_BYTES_PER_S = Rate(2.1e9, 3.0e9, 3.2e9, "what all pulling nodes get together: an estimate")
PUSH_SHARE = Rate(0.40, 0.60, 0.80, "of the slowest link by NCCL's broadcasts in buckets: an estimate")
DELTA_SHARE = Rate(
    0.05, 0.016, 0.01, "of a version's bytes that a step of 1e-6 changes in bfloat16: 1.6 % measured at 30M"
)
COMPARED_BYTES_PER_S = Rate(
    0.4e9, 0.67e9, 2e9, "of a delta against what it is from: 0.67 GB/s measured on a CPU"
)
PATCHED_BYTES_PER_S = Rate(
    1e9, 1.6e9, 4e9, "of a version put together from a delta: 1.6 GB/s measured on a CPU"
)
CHECKPOINT_BYTES_PER_S = Rate(0.5e9, 1.0e9, 2.0e9, "of a rank: hashing 1.2 GB/s measured, then the disk")
ADAM_BYTES = 34.0
"""What AdamW reads and writes of a parameter: gradient 4, float32 weight, both moments twice 4 each, and the
copy in bfloat16 with what the clipping reads.
"""
OFFLOADED_ADAM_S = Rate(8e-9, 4e-9, 2e-9, "a parameter, fused AdamW on two threads: 83 ms for 20 M measured")
ENGINE_RESERVE_BYTES = 3e9
"""What vLLM leaves for activations and CUDA graphs: an estimate."""

CPU_TRAIN_TOKENS_PER_S = ((333_888, 13_790.0), (23_072_256, 450.0))
CPU_DECODE_TOKENS_PER_S = ((333_888, 10_900.0), (134_515_008, 215.0))
"""By parameters, one thread, where benchmarks/results/ has no file of it."""
CPU_SAMPLE_S = Rate(
    0.40e-3, 0.25e-3, 0.20e-3, "of a sample in the actor beside its tokens: docs/performance.md"
)
CPU_SERVICE_S = Rate(
    0.30e-3, 0.20e-3, 0.15e-3, "of a sample in buffer, board, driver, monitor and Ray: docs/performance.md"
)
GPU_SAMPLE_S = Rate(0.5e-3, 0.3e-3, 0.2e-3, "of a sample in the actor beside its tokens: about a CPU's")
CPU_SPREAD = {"worst": 0.6, "likely": 1.0, "best": 1.2}
"""Of a CPU's rate, by case: cores differ, and others use them."""


def all_rates() -> dict[str, Rate]:
    """Returns the rates by their names here."""
    return {name: value for name, value in globals().items() if isinstance(value, Rate)}


def cpu_train_tokens_per_s(num_params: float) -> float:
    """Returns the tokens that one thread trains a second, without reference and recomputation."""
    rows = [(row["parameters"], row["tokens_per_s"]) for row in _results("learner-cpu2").get("speed", ())]
    return _between(_fastest(rows) or CPU_TRAIN_TOKENS_PER_S, num_params)


def cpu_decode_tokens_per_s(num_params: float) -> float:
    """Returns the tokens that one thread generates a second, with all slots in use."""
    row = _results("actors-cpu2").get("sums", {})
    small, large = CPU_DECODE_TOKENS_PER_S
    rate = small[1]
    if isinstance(row, dict) and row.get("bare_cpu_ms_a_sample", 0) > 0:
        rate = 1e3 * row.get("tokens_a_sample", 0.0) / row["bare_cpu_ms_a_sample"] or rate
    return _between(((small[0], rate), large), num_params)


def _fastest(rows: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Returns the fastest of the rows of each size."""
    best: dict[float, float] = {}
    for size, rate in rows:
        best[size] = max(rate, best.get(size, 0.0))
    return tuple(sorted(best.items())) if len(best) > 1 else ()


def _between(points: Sequence[tuple[float, float]], size: float) -> float:
    """Returns the value at `size` on the line through the two nearest points, both axes logarithmic."""
    upper = next((index for index, point in enumerate(points) if size <= point[0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[max(0, upper - 1)], points[max(1, upper)]
    slope = math.log(y1 / y0) / math.log(x1 / x0)
    return y0 * (size / x0) ** slope


def _results(name: str) -> dict[str, Any]:
    """Returns a committed file of results, {} where there is none."""
    try:
        found = json.loads((RESULTS_DIR / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
