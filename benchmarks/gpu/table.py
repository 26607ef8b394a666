"""The table for README.md of what `make bench-gpu` has measured, a card each: pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HEAD = "| {card} | this system | bare | of bare |\n|---|---|---|---|"


class Compared(NamedTuple):
    """A line: what, our figure, the bare one, and the ratio of the two; empty where there is none."""

    what: str
    ours: str
    bare: str = ""
    ratio: str = ""


def tables(results: Path) -> str:
    """Returns a Markdown table for each card with a file in the folder."""
    files = sorted(results.glob("gpu-*.json"))
    found = {path.stem.removeprefix("gpu-"): json.loads(path.read_text("utf-8")) for path in files}
    return "\n\n".join(table(card, done) for card, done in found.items())


def table(card: str, done: Mapping[str, Any]) -> str:
    """Returns the table of one card: what was not measured has no line."""
    measured = {name: found for name, found in done.items() if name != "machine" and found.get("ok")}
    compared = [*_actors(measured), *_weights(measured), *_learner(measured), *_reward(measured)]
    lines = [f"| {row.what} | {row.ours} | {row.bare} | {row.ratio} |" for row in compared]
    return "\n".join([HEAD.format(card=card), *lines])


def _actors(measured: Mapping[str, Any]) -> Iterator[Compared]:
    for name, found in measured.items():
        if name.startswith("actor-"):
            what = f"tokens/s of an engine, {name.removeprefix('actor-')}, against vLLM's own loop"
            yield Compared(what, f"{found['tokens_per_s']:,}", f"{found['bare']:,}", f"{found['ratio']:.2f}")


def _weights(measured: Mapping[str, Any]) -> Iterator[Compared]:
    for name, found in measured.items():
        kind, _, size = name.partition("-")
        if kind == "publish":
            ratio = found["bare_copy_s"] / found["stall_s"]
            what = (
                f"standstill of a learner for a publication of {size} ({found['gb']:g} GB), against one copy"
            )
            yield Compared(what, f"{found['stall_s']:.2f} s", f"{found['bare_copy_s']:.2f} s", f"{ratio:.2f}")
            yield Compared("checksums and object store, beside the next step", f"{found['store_s']:.2f} s")
        elif kind == "update":
            yield Compared(f"standstill of an engine for an update of {size}", f"{found['pause_s']:.2f} s")
            yield Compared("checksums of an update, beside generation", f"{found['verify_s']:.2f} s")


def _learner(measured: Mapping[str, Any]) -> Iterator[Compared]:
    for name, found in measured.items():
        if not name.startswith("learner-"):
            continue
        by_case = {row["case"]: row for row in found["rows"]}
        ours, plain = by_case["ours"], by_case["plain loop"]
        at = f"at {ours['budget_tokens']:,} tokens"
        bare = f"{plain['tokens_per_s']:,}" if "tokens_per_s" in plain else plain["result"]
        ratio = f"{ours['ratio']:.2f}" if "ratio" in ours else ""
        what = f"trained tokens/s {at}, against a plain PyTorch loop"
        yield Compared(what, f"{ours['tokens_per_s']:,}", bare, ratio)
        for key, what in (("mfu", "share of the card's peak"), ("peak_gib", "GiB at most")):
            if key in ours:
                yield Compared(f"{what} {at}", f"{ours[key]}", f"{plain.get(key, '')}")


def _reward(measured: Mapping[str, Any]) -> Iterator[Compared]:
    together, alternating = (measured.get(f"reward-{mode}") for mode in ("together", "alternating"))
    if together is None or alternating is None:
        return
    is_reached = together["is_reached"] and alternating["is_reached"]
    yield Compared(
        f"seconds to a mean reward of {together['aim']:g}, learner and actor at once, against in turns",
        _reached(together),
        _reached(alternating),
        f"{together['seconds'] / alternating['seconds']:.2f}" if is_reached else "",
    )


def _reached(found: Mapping[str, Any]) -> str:
    if found["is_reached"]:
        return f"{found['seconds']:.0f} s, {found['steps']:.0f} steps"
    return f"{found['reward']:.2f} after {found['seconds']:.0f} s"
