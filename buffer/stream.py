"""The prompt stream of a run: which prompt belongs to which ordinal. A pure function, the same in every
process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from buffer.admission import work_item
from buffer.sources import Part, stream_state
from core.config import Config
from core.errors import ConfigError
from core.records import WorkItem


@dataclass(frozen=True)
class PromptStream:
    """The items by their ordinals: `PromptStream.of(config, num_prompts=300).item(7)`.

    num_prompts  usable prompts
    parts        their sources, where there are several
    num_shards   above 1 each prompt belongs to one shard of the buffer, which knows of all its visits
    """

    seed: int
    num_prompts: int
    parts: tuple[Part, ...]
    num_shards: int

    @classmethod
    def of(cls, config: Config, num_prompts: int, parts: tuple[Part, ...] = ()) -> PromptStream:
        """Returns the stream of a run. Raises ConfigError where a shard would have no prompt of its own."""
        num_shards = config.buffer.num_shards if config.data.curriculum is not None else 1
        fewest = min((part.num_prompts for part in parts), default=num_prompts)
        if fewest < num_shards:
            raise ConfigError(
                f"data.curriculum with buffer.num_shards = {num_shards} needs at least as many prompts of each "
                f"source; one has {fewest}. Lower buffer.num_shards, or remove data.curriculum."
            )
        return cls(config.run.seed, num_prompts, parts, num_shards)

    @property
    def state(self) -> dict[str, Any]:
        """Returns what the stream depends on, as JSON keeps it."""
        return stream_state(self.seed, self.num_prompts, self.parts, self.num_shards)

    def num_prompts_at(self, shard: int) -> int:
        """Returns how many prompts belong to a shard; all of them where they belong to none."""
        if self.num_shards == 1:
            return self.num_prompts
        sizes = [part.num_prompts for part in self.parts] or [self.num_prompts]
        return sum(len(range(shard, size, self.num_shards)) for size in sizes)

    def item(self, ordinal: int) -> WorkItem:
        """Returns the item at `ordinal`."""
        return work_item(
            ordinal,
            seed=self.seed,
            num_prompts=self.num_prompts,
            parts=self.parts,
            num_shards=self.num_shards,
        )
