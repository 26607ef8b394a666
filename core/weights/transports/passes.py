"""The learner's weights as vLLM's trainer engines take them: one pass at a time, which all ranks make
together.

Nothing of vLLM is imported here: nccl.py and ipc.py make the formal `WeightSource` of a Pass, which has all
that one asks for.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator

import torch

from core.errors import TrainingError
from core.weights.transports.base import Parameter, ParameterSource

NUM_PROBES = 8
VLLM_SYMBOLS: tuple[str, ...] = (
    "vllm.distributed.weight_transfer.base:ParamMeta",
    "vllm.distributed.weight_transfer.base:WeightSource.iter_groups",
    "vllm.distributed.weight_transfer.base:VLLMWeightSyncClient",
)
"""What a pass relies on: `Parameter` has the fields of a ParamMeta, `ActorsClient` the methods of a
VLLMWeightSyncClient.
"""


class Pass:
    """One pass over the source; `begin` is called before its first parameter, `look` with each."""

    def __init__(
        self, source: ParameterSource, begin: Callable[[], None], look: Callable[[str, torch.Tensor], None]
    ) -> None:
        self._source, self._begin, self._look = source, begin, look
        self._weights = iter(source)
        self._num_passed = -1

    def metadata(self) -> list[Parameter]:
        """Returns what iteration yields, as vLLM reads it: name, dtype and shape of each parameter."""
        return self._source.metadata()

    @property
    def has_begun(self) -> bool:
        """Says whether a gather was made: the other ranks are in it with us."""
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
        """Passes over whatever is left. Raises TrainingError when a gather had failed."""
        collections.deque(self, maxlen=0)
        if self._num_passed != (total := len(self._source.metadata())):
            raise TrainingError(
                f"gathering the weights ended after {self._num_passed} of {total} "
                "parameters; events.jsonl says why"
            )


def probe_names(source: ParameterSource) -> frozenset[str]:
    """Returns the names of a few vectors from the first to the last, norms where there are any.

    They are what vLLM keeps as it is, under its own name.
    """
    vectors = [parameter.name for parameter in source.metadata() if len(parameter.shape) == 1]
    chosen = [name for name in vectors if "norm" in name] or vectors
    last = len(chosen) - 1
    return frozenset(
        chosen[round(index * last / max(1, NUM_PROBES - 1))] for index in range(NUM_PROBES) if chosen
    )
