"""Says what belongs to which shard of the buffer, and under which name it lies in the run directory."""

from __future__ import annotations

from pathlib import Path

from core.errors import ConfigError


def store_name(shard: int, num_shards: int) -> str:
    """Returns the file name of a shard's database."""
    return "buffer.sqlite" if num_shards == 1 else f"buffer-{shard}.sqlite"


def ledger_name(shard: int, num_shards: int) -> str:
    """Returns the file name of a shard's ledger."""
    return "ledger.jsonl" if num_shards == 1 else f"ledger-{shard}.jsonl"


def share_of(total: int, shard: int, num_shards: int) -> int:
    """Returns this shard's part of `total`; the parts of all shards differ by one at most."""
    return total // num_shards + (shard < total % num_shards)


def check_num_shards(directory: Path, num_shards: int) -> None:
    """Raises ConfigError when the directory holds the buffer of another number of shards."""
    names = {store_name(shard, num_shards) for shard in range(num_shards)}
    if others := sorted(path.name for path in directory.glob("buffer*.sqlite") if path.name not in names):
        raise ConfigError(
            f"{directory} was started with another buffer.num_shards than {num_shards}: it holds "
            f"{', '.join(others)}. "
            "Restore buffer.num_shards, or set another run.dir."
        )
