"""What only a machine with a GPU can prove (`make test-gpu`) and measure (`make bench-gpu`);
`--on-cpu` tries every case here, with tiny models.

    python -m benchmarks.gpu test | bench [CASE ...] [--minutes 9] [--again] [--on-cpu]
    python -m benchmarks.gpu table     what was measured, for README.md

Each case (benchmarks/gpu/cases.py) has a process of its own, and a limit. What is done stands in
benchmarks/results/gpu-<card>.json: a second call goes on with what is not, so that a machine that is lent for
minutes at a time gets through. No case needs the network. Without a GPU the cases are listed, and nothing
fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import CASES, Case, run_case
from benchmarks.gpu.table import tables
from benchmarks.results import describe_machine

RESULTS = Path(__file__).parents[1] / "results"


def card() -> str | None:
    """Returns the name of the first GPU; None where there is none."""
    import torch

    return torch.cuda.get_device_name(0).replace(" ", "-").lower() if torch.cuda.is_available() else None


def num_gpus() -> int:
    """Returns how many GPUs this process sees."""
    import torch

    return torch.cuda.device_count()


def main() -> int:
    """Runs what is not done yet, prints it, and returns 1 where a case has failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("what", choices=[*CASES, "table"])
    parser.add_argument("names", nargs="*", metavar="CASE", help="these alone")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--again", action="store_true", help="forget what is done")
    parser.add_argument("--on-cpu", action="store_true", help="try all with tiny models")
    given = parser.parse_intermixed_args()  # Names may stand behind options.
    if given.what == "table":
        print(tables(RESULTS) or "Nothing was measured on a GPU yet: make bench-gpu, on a machine with one.")
        return 0
    cases = [case for case in CASES[given.what] if not given.names or case.name in given.names]
    if len(cases) < len(given.names):
        parser.error(f"expected some of {', '.join(case.name for case in CASES[given.what])}")
    if given.on_cpu:
        return _try_all(cases)
    if (name := card()) is None:
        print(f"No GPU here: nothing is run. On a machine with one, `make {given.what}-gpu` shows that")
        for case in cases:
            wants = "" if case.gpus == 1 else f" ({case.gpus} GPUs)"
            print(f"  {case.name:<18} {case.shows}{wants}; at most {case.timeout_s:.0f} s")
        return 0
    return _run(cases, RESULTS / f"gpu-{name}.json", minutes=given.minutes, again=given.again)


def told(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """Prints what a case has found, and returns it without what it said: that is for who looks on."""
    kept = {name: value for name, value in found.items() if name != "said"}
    print(f"{case.name:<18} {kept}", *found.get("said", ()), sep="\n    ", flush=True)
    return kept


def _try_all(cases: Sequence[Case]) -> int:
    """Runs the cases without a GPU, and keeps nothing of it."""
    found = {}
    for case in cases:
        found[case.name] = told(case, run_case(case, on_cpu=True))
    return int(not all(one["ok"] for one in found.values()))


def _run(cases: Sequence[Case], path: Path, *, minutes: float, again: bool) -> int:
    """Runs the cases that are not done by what stands in the file, as far as the time goes."""
    done: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    deadline_s, left_out, has_run = time.monotonic() + 60 * minutes, 0, False
    if again:
        done = {name: found for name, found in done.items() if name not in {case.name for case in cases}}
    done["machine"] = describe_machine()
    for case in cases:
        if case.gpus > num_gpus():
            done[case.name] = {"ok": None, "found": f"not run: it wants {case.gpus} GPUs"}
        elif not done.get(case.name, {}).get("ok"):
            if has_run and time.monotonic() + case.timeout_s > deadline_s:
                left_out += 1
                continue
            done[case.name], has_run = told(case, run_case(case, on_cpu=False)), True
            path.write_text(json.dumps(done, indent=1) + "\n", "utf-8")
            continue
        told(case, done[case.name])
    if left_out:
        print(f"{left_out} cases have no time left: the same command goes on with them")
    return int(any(done.get(case.name, {}).get("ok") is False for case in cases))


if __name__ == "__main__":
    sys.exit(main())
