"""What vLLM's CPU engine is given: the seeds of the noise that tokens are drawn by, a function of a request's
seed and a place without a pattern; and cheaper ways to the same activations.
"""

import sys
from types import SimpleNamespace

import numpy as np
import torch

from actors.engine_cpu import SMALL_WEIGHTS, keep_small_linears, mixed, silu_and_mul


def seeds(first: int, count: int, place: int, step: int = 0) -> np.ndarray:
    places = place + step * np.arange(count)
    return mixed(np.arange(first, first + count, dtype=np.uint64), places.astype(np.uint64))


def test_a_seed_depends_on_its_request_and_its_place_alone():
    assert seeds(7, 3, 20).tolist() == [seeds(7 + row, 1, 20)[0] for row in range(3)]
    assert len({*seeds(0, 200, 1), *seeds(0, 200, 2), *seeds(200, 200, 1)}) == 600


def test_neighbours_in_seed_and_place_share_no_noise():
    """A sum of the two alone would give the sample after this one, a place earlier, the same noise."""
    assert not set(seeds(0, 1000, 1)) & set(seeds(1, 1000, 0))
    assert len(set(seeds(0, 1000, 1000, step=-1))) == 1000


def test_every_bit_is_set_half_the_time_for_seeds_that_follow_one_another():
    found = seeds(0, 20_000, 5)
    assert found.min() >= 0
    bits = (found[:, None] >> np.arange(63)) & 1
    assert abs(bits.mean(0) - 0.5).max() < 0.02
    correlation = np.corrcoef(bits[1:].T, bits[:-1].T)[:63, 63:]
    assert abs(correlation).max() < 0.04


def test_an_activation_is_bit_for_bit_what_its_two_halves_give():
    rows = torch.randn(5, 8)
    assert torch.equal(silu_and_mul(rows), torch.nn.functional.silu(rows[:, :4]) * rows[:, 4:])


def test_small_float32_layers_are_torchs_and_all_others_vllms(monkeypatch):
    packed = []
    utils = SimpleNamespace(dispatch_cpu_unquantized_gemm=lambda layer, remove_weight: packed.append(layer))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers", SimpleNamespace(utils=utils))
    for _ in range(2):  # An engine after another in one process.
        keep_small_linears()
    small, large = (
        torch.nn.Linear(8, 4),
        torch.nn.Linear(2, SMALL_WEIGHTS, device="meta").to_empty(device="cpu"),
    )
    others = [
        large,
        torch.nn.Linear(8, 4).bfloat16(),
        torch.nn.Linear(8, 4, device="meta"),
        torch.nn.Conv1d(4, 4, 2),
    ]
    for layer in (small, *others):
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    head = torch.nn.Linear(8, 4)
    utils.dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    assert small.cpu_linear is torch.nn.functional.linear
    assert packed == [*others, head]
