"""Runs a scenario as often as it is asked for, each time in a process of its own, as one with an engine must
have, and reads what they report.

    python -m tests.support.scenarios.reported SCENARIO '[["MODEL_DIR", "OUT.json", ...], ...]'

They are forked, one after the other, from a process that has loaded vLLM, which takes most of their time.
Nothing of ours has started a thread or an engine by then; numpy's pool is one that a fork begins anew.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tests.support import ROOT

T = TypeVar("T")


def reports_of(
    scenario: str, kind: type[T], runs: Sequence[tuple[Path, Path, *tuple[int, ...]]], timeout_s: float = 600
) -> list[T]:
    """The report of each run of `main(model_dir, out, ...)` of tests/support/scenarios/<scenario>.py."""
    arguments = json.dumps(
        [[str(given) if isinstance(given, Path) else given for given in run] for run in runs]
    )
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.scenarios.reported", scenario, arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return [msgspec.json.decode(run[1].read_bytes(), type=kind) for run in runs]


def _in_a_fork(main: Any, model_dir: str, out: str, *arguments: int) -> int:
    """Returns the exit status of a process that does this and nothing else."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        main(Path(model_dir), Path(out), *arguments)
        status = 0
    except BaseException:  # noqa: BLE001 -- the end of a process: its parent tells by the status
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _main(scenario: str, runs: list[list[Any]]) -> int:
    from actors.engine_settings import set_engine_environment
    from core.config import ActorsConfig

    main = importlib.import_module(f"tests.support.scenarios.{scenario}").main
    set_engine_environment(ActorsConfig())
    importlib.import_module("vllm").LLMEngine  # noqa: B018 -- vLLM loads what it is asked for
    return int(any(_in_a_fork(main, *run) for run in runs))  # One that is killed has a number below 0.


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], json.loads(sys.argv[2])))
