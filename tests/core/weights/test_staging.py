"""Weights on their way to a device: what arrives is what was sent, however late the device copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from core.weights.staging import SPARE_BYTES, Staging


class LateLane:
    """A device that copies only when it is waited for, as a busy GPU does."""

    def __init__(self, free_bytes: float = float("inf")) -> None:
        self._begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._free_bytes = free_bytes
        self.most_begun = self.num_waits = 0

    def begin(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self._begun.append((target, source))
        self.most_begun = max(self.most_begun, len(self._begun))

    def mark(self) -> Callable[[], object]:
        upto = list(self._begun)

        def wait() -> None:
            self.num_waits += 1
            for pair in upto:
                if any(pair is each for each in self._begun):
                    self._begun = [each for each in self._begun if each is not pair]
                    pair[0].copy_(pair[1])

        return wait

    def free_bytes(self) -> float:
        return self._free_bytes


def weights() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        ("a", torch.randn(300, 7)),
        ("scale", torch.tensor(1.5)),
        ("b", torch.randn(64, dtype=torch.bfloat16)),
        ("none", torch.empty(0)),
        ("turned", torch.randn(40, 30).t()),
        ("ids", torch.arange(2000)),
    ]


@pytest.mark.parametrize("half_bytes", [64, 1000, 2**20])
def test_what_arrives_is_what_was_sent_however_late_the_device_copies(half_bytes: int) -> None:
    lane = LateLane()
    staging = Staging(torch.device("cpu"), lane, half_bytes)
    for _ in range(2):  # The halves are used again by the next version.
        arrived = dict(staging.staged(weights()))
        lane.mark()()
        for name, tensor in weights():
            assert arrived[name].dtype == tensor.dtype
            assert torch.equal(arrived[name], tensor), name
    # A half is filled while the other is on its way: never is all waited for at once.
    assert lane.most_begun > 1
    assert lane.num_waits > 2 or half_bytes == 2**20


def test_large_tensors_are_copied_by_several_threads_alike() -> None:
    large = torch.arange(5 * 2**20, dtype=torch.int32)
    lane = LateLane()
    arrived = dict(Staging(torch.device("cpu"), lane, 2**23).staged([("large", large)]))
    lane.mark()()
    assert torch.equal(arrived["large"], large)


def test_a_tensor_for_which_the_device_has_no_room_is_handed_on_as_it_is() -> None:
    given = torch.randn(1000)
    little = Staging(torch.device("cpu"), LateLane(SPARE_BYTES + given.nbytes - 1))
    assert dict(little.staged([("a", given)]))["a"] is given
    enough = Staging(torch.device("cpu"), LateLane(SPARE_BYTES + given.nbytes))
    assert dict(enough.staged([("a", given)]))["a"] is not given
