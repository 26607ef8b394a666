"""Measures what a batch of long trajectories costs on its way to the learner: `make bench-trajectory`.

Bytes a token, memory, and seconds to decode on each rank.

There are 64 groups of 8 samples of 8,192 tokens each, as they are inserted: random token ids of a vocabulary
of 128,256, random log-probs, and one text a group; with short, middling and long prompts. Tokens are all
tokens of all samples, prompts included.
"""

from __future__ import annotations

import gc
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.results import measure_load, save, show
from core.records import (
    Group,
    Sample,
    StoredGroup,
    VersionSpan,
    complete_group,
    encode,
    encode_batch,
    open_batch,
)
from learner.step.share import owned

GROUPS, SAMPLES, TOKENS, VOCABULARY = 64, 8, 8192, 128_256
PROMPTS, RANKS = (256, 1024, 4096), 4
CHARS_PER_TOKEN = 4
ROUNDS = 5


def make_group(number: int, prompt_tokens: int) -> StoredGroup:
    """Returns a scored group as a shard keeps it: one text, and the tokens and log-probs of all samples."""
    rng = np.random.default_rng(number)
    count = TOKENS - prompt_tokens
    prompt = rng.integers(0, VOCABULARY, prompt_tokens)
    samples = tuple(
        Sample.one_turn(
            prompt.tolist(),
            rng.integers(0, VOCABULARY, count).tolist(),
            (-rng.standard_exponential(count)).tolist(),
            version_spans=(VersionSpan(3, 0, count),),
            finish_reason="stop",
            text="" if place else "text" * (count * CHARS_PER_TOKEN // 4),
            reward=float(rng.random() < 0.5),
            answer_id=42,
        )
        for place in range(SAMPLES)
    )
    text = "p" * (CHARS_PER_TOKEN * prompt_tokens)
    return StoredGroup.of(
        Group(
            group_id=number,
            prompt_index=number,
            source_row=number,
            prompt=text,
            samples=samples,
            actor="actor-0",
        )
    )


def resident_bytes() -> int:
    """Returns the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def measure(prompt_tokens: int, num_ranks: int) -> dict[str, float]:
    """Returns the figures; ranks are timed one after the other, in CPU seconds, medians of some rounds."""
    payload = encode_batch(3, [make_group(number, prompt_tokens) for number in range(GROUPS)])
    total = GROUPS * SAMPLES * TOKENS
    batch = open_batch(payload)
    places = owned(batch.index, num_ranks)

    def decode(rank: int) -> list[Group]:
        return [complete_group(batch.index.groups[place], batch.payloads[place]) for place in places[rank]]

    gc.collect()
    before = resident_bytes()
    whole = [decode(rank) for rank in range(num_ranks)]
    held = resident_bytes() - before
    seconds = []
    for rank in range(num_ranks):
        times = []
        for _ in range(ROUNDS):
            whole[rank] = []
            start_s = time.process_time()
            whole[rank] = decode(rank)
            times.append(time.process_time() - start_s)
        seconds.append(statistics.median(times))
    start_s = time.process_time()
    open_batch(payload)
    return {
        "tokens": total,
        "wire_bytes_a_token": len(payload) / total,
        "index_bytes_a_sample": len(encode(batch.index)) / (GROUPS * SAMPLES),
        "decoded_bytes_a_token": held / total,
        "decoded_mb": held / 1e6,
        "decoded_mb_a_rank": held / 1e6 / num_ranks,
        "decode_s_a_rank": statistics.median(seconds),
        "index_s": time.process_time() - start_s,
    }


def main() -> None:
    """Measures, prints and saves."""
    load = measure_load()
    found = {f"prompt of {tokens}": measure(tokens, RANKS) for tokens in PROMPTS}
    for title, row in found.items():
        show(title, [row])
    print(save("trajectory", {**found, "load": load}))


if __name__ == "__main__":
    main()
