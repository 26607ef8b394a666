"""The learner's weights as a formal `WeightSource` of vLLM's trainer API: one pass at a time, which all ranks
make together.

Importing this imports `vllm.distributed.weight_transfer`: only nccl and ipc do.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from core.errors import TrainingError
from learner.policy.source import ZeroSource

NUM_PROBES = 8
VLLM_SYMBOLS: tuple[str, ...] = (
    "vllm.distributed.weight_transfer.base:ParamMeta",
    "vllm.distributed.weight_transfer.base:WeightSource.iter_groups",
    "vllm.distributed.weight_transfer.base:VLLMWeightSyncClient",
)


class Pass(WeightSource):
    """One pass over the source; `begin` is called before its first parameter, `look` with each."""

    def __init__(
        self, source: ZeroSource, begin: Callable[[], None], look: Callable[[str, torch.Tensor], None]
    ) -> None:
        self._source, self._begin, self._look = source, begin, look
        self._weights = iter(source)
        self._num_passed = -1

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(*parameter) for parameter in self._source.metadata()]

    @property
    def has_begun(self) -> bool:
        """Whether a gather was made: the other ranks are in it with us."""
        return self._num_passed >= 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        if not self.has_begun:
            self._begin()
            self._num_passed = 0
        for name, tensor in self._weights:
            self._num_passed += 1
            self._look(name, tensor)
            yield name, tensor

    def finish(self) -> None:
        """Whatever is left of it. Raises TrainingError when a gather had failed."""
        collections.deque(self, maxlen=0)
        if self._num_passed != (total := len(self._source.metadata())):
            raise TrainingError(
                f"gathering the weights ended after {self._num_passed} of {total} "
                "parameters; events.jsonl says why"
            )


def probe_names(source: ZeroSource) -> frozenset[str]:
    """Vectors from the first to the last, norms where there are any: what vLLM keeps as it is, under
    its own name.
    """
    vectors = [parameter.name for parameter in source.metadata() if len(parameter.shape) == 1]
    chosen = [name for name in vectors if "norm" in name] or vectors
    last = len(chosen) - 1
    return frozenset(
        chosen[round(index * last / max(1, NUM_PROBES - 1))] for index in range(NUM_PROBES) if chosen
    )
