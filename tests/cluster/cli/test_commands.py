"""What holds for every command of the command line."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from argparse import Namespace

import pytest

import launch
from cluster.cli import commands
from cluster.monitor.terminal import summary_screen
from tests.support import ROOT
from tests.support.configs import quickstart


@pytest.mark.parametrize(("asked", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_of_every_command_sleep_while_they_wait(monkeypatch, asked, expected):
    seen: list[str] = []

    def evaluate(arguments: Namespace) -> int:
        seen.append(os.environ["OMP_WAIT_POLICY"])
        return 0

    monkeypatch.setenv("OMP_WAIT_POLICY", asked or "")
    if asked is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(commands, "evaluate", evaluate)
    monkeypatch.setattr(sys, "argv", ["launch.py", "evaluate", "somewhere"])

    assert launch.main() == 0
    assert seen == [expected]


def test_the_command_line_says_so_before_torch_is_imported():
    code = "import sys, launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("summary", "goes_on"),
    [
        ({"stopped": "SIGINT", "steps": 63}, True),
        ({"stopped": "SIGINT", "steps": None}, True),
        ({"stopped": "SIGINT", "steps": 600}, False),
        ({"stopped": None, "steps": 63}, False),
    ],
)
def test_a_run_that_was_stopped_says_the_command_that_goes_on_with_it(summary, goes_on):
    given = ["eval.stop_at=[held_out/avg@4, 0.9]", "run.dir=x/../runs/a b"]
    arguments = Namespace(config="configs/quickstart.yaml", overrides=given)
    told = commands._go_on(arguments, quickstart(), {"run_dir": "/runs/a b", **summary})
    if not goes_on:
        assert told is None
        return
    line = next(line for line in summary_screen(summary, told).splitlines() if "go on" in line)
    words = shlex.split(line)
    assert words[-4:] == ["train", "configs/quickstart.yaml", given[0], "run.dir=/runs/a b"]
    assert commands._go_on(arguments, quickstart("checkpoint.every=0"), {"run_dir": "/r", **summary}) is None


def made(*words: str) -> subprocess.CompletedProcess[str]:
    """What make would do, without doing it, where no other make has started this process."""
    others = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS")
    env = {name: value for name, value in os.environ.items() if name not in others}
    command = ["make", "--dry-run", *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("target", ["quickstart", "quickstart-tools", "demo-smollm2"])
def test_make_gives_its_config_fields_to_launch_py_as_they_were_typed(target):
    given = [
        "run.dir=runs/a b",
        "run.steps=20",
        'run.name=it\'s $HOME $(shell date) `date` \\ #1  "x"',
        "eval.stop_at=[held_out/avg@4, 0.9]",
        "rewards.functions={closeness:closeness: 1}",
        "environments={sums: 'environments.calculator:Calculator'}",
    ]
    words = shlex.split(made(target, *given, "ARGS=run.seed=1").stdout.splitlines()[-1])
    assert words[-1] == "run.seed=1"
    assert sorted(words[-1 - len(given) : -1]) == sorted(given)
    assert words[1:3] == ["launch.py", "train"]


@pytest.mark.parametrize("target", ["test", "setup", None])
def test_make_refuses_config_fields_where_nothing_takes_them(target):
    refused = made(*filter(None, [target]), "run.dir=runs/x")
    assert refused.returncode == 2
    assert "run.dir: only quickstart quickstart-tools demo-smollm2 take config fields" in refused.stderr
