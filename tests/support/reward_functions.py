"""Reward functions that misbehave, for the tests of the pool: `tests.support.reward_functions:hang` and so
on.

Each misbehaves only where the completion says "bad", so that a test can send good groups through the same
worker.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time

HEAVY_MODULES = ("torch", "vllm", "ray", "deepspeed", "datasets", "transformers", "pydantic", "numpy")


def length(prompts, completions, **columns):
    """A well-behaved one: the number of characters."""
    return [float(len(completion)) for completion in completions]


def echo_column(prompts, completions, *, value, **columns):
    return value


def in_a_quarter_second(prompts, completions, **columns):
    """Well-behaved, and slow: four groups a second at most from each worker, so that a run lasts on a
    fast machine too.
    """
    time.sleep(0.25)
    return length(prompts, completions)


def hang(prompts, completions, **columns):
    if "bad" in completions:
        time.sleep(1000)
    return length(prompts, completions)


def big_power(prompts, completions, **columns):
    base = 9 if "bad" in completions else 1
    return [float(base**base**base**base)] * len(completions)


def spin(prompts, completions, **columns):
    while "bad" in completions:
        pass
    return length(prompts, completions)


def ignore_sigterm_and_spin(prompts, completions, **columns):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return spin(prompts, completions)


def segfault(prompts, completions, **columns):
    if "bad" in completions:
        ctypes.string_at(0)
    return length(prompts, completions)


def allocate_2_gb(prompts, completions, **columns):
    return [float(len(bytearray(2 << 30)) >> 30)] * len(completions)


def allocate(prompts, completions, **columns):
    if "bad" in completions:
        kept = [bytearray(b"x") * (64 << 20) for _ in range(5)]
        time.sleep(len(kept) * 1000)
    return length(prompts, completions)


def reserve(prompts, completions, **columns):
    """Much address space and hardly any memory, as node, WebAssembly and CUDA want it."""
    mmap.mmap(-1, 8 << 30)
    lines = "new WebAssembly.Memory({initial: 1}); console.log(42)"
    answer = (
        subprocess.run(["node", "-e", lines], capture_output=True, text=True).stdout
        if shutil.which("node")
        else "42"
    )
    return [float(answer)] * len(completions)


def let_a_child_allocate(prompts, completions, **columns):
    if "bad" in completions:
        subprocess.run(
            [sys.executable, "-c", "import time; kept = bytearray(b'x') * (300 << 20); time.sleep(1000)"]
        )
    return length(prompts, completions)


def leave(prompts, completions, **columns):
    if "bad" in completions:
        os._exit(3)
    return length(prompts, completions)


def kill_itself(prompts, completions, **columns):
    if "bad" in completions:
        os.kill(os.getpid(), signal.SIGKILL)
    return length(prompts, completions)


def sys_exit(prompts, completions, **columns):
    sys.exit("enough")


def stop_itself(prompts, completions, **columns):
    if "bad" in completions:
        os.kill(os.getpid(), signal.SIGSTOP)
    return length(prompts, completions)


def hang_with_child(prompts, completions, *, pid_file, **columns):
    child = subprocess.Popen(["sleep", "1000"])
    with open(pid_file[0], "w") as file:
        file.write(str(child.pid))
    time.sleep(1000)


def process_id(prompts, completions, **columns):
    return [float(os.getpid())] * len(completions)


def says_yes(prompts, completions):
    """Reads messages, which nothing but its name in a config says."""
    return [float(completion[0]["content"] == "yes") for completion in completions]


def num_messages(completions):
    """Reads whole conversations."""
    return [float(len(messages)) for messages in completions]


def score_of_environment(environments, **columns):
    """As TRL's rewards read what an environment found."""
    return [environment.score for environment in environments]


def num_heavy_modules(prompts, completions, **columns):
    return [float(sum(name in sys.modules for name in HEAVY_MODULES))] * len(completions)


def raises(prompts, completions, **columns):
    raise KeyError("no such thing")


def without_completions(prompts, answer):
    return []


def wants_solution(completions, solution, **columns):
    return [float(completion == gold) for completion, gold in zip(completions, solution, strict=True)]


def accuracy(completions: list[list[dict[str, str]]], solution: list[str], **kwargs) -> list[float | None]:
    contents = [completion[0]["content"] for completion in completions]
    return [float(content == gold) for content, gold in zip(contents, solution, strict=True)]


class Judge:
    def __call__(self, completions, **columns):
        return []


NOT_A_FUNCTION = 3


def far_beyond(completions):
    return [1.5e308] * len(completions)
