"""A clone in an empty folder, as a stranger has it, and commands typed there."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

PYTHON = ".venv/bin/python launch.py"


def make_clone(folder: Path) -> Path:
    """What git knows of this tree, in `folder`, with an environment as `make setup` leaves it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(".venv"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def run(folder: Path, command: str) -> str:
    """The output of a command typed in a clone, by a user with an empty home; it succeeds."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "AGRO_", "PYTHONPATH"))
    }
    done = subprocess.run(
        shlex.split(command),
        cwd=folder,
        env={**env, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


BY_TEST = {
    "make quickstart "
    "run.dir=RUN_DIR": "test_commands.py::test_make_gives_its_config_fields_to_launch_py_as_they_were_typed",
    f"{PYTHON} status RUN_DIR": "test_system.py::TestFinishedRun::test_the_commands_of_readme_for_a_run",
    f"{PYTHON} audit RUN_DIR": "test_system.py::TestFinishedRun::test_the_commands_of_readme_for_a_run",
    f"{PYTHON} why RUN_DIR": "test_system.py::TestFinishedRun::test_the_commands_of_readme_for_a_run",
    f"{PYTHON} why RUN_DIR actor-0": "test_system.py::TestFinishedRun::test_the_commands_of_readme_for_a_run",
    "launch.py why RUN_DIR": "test_system.py::TestFinishedRun::test_the_commands_of_readme_for_a_run",
    f"{PYTHON} scale RUN_DIR --actors "
    "4": "test_scaled_runs.py::test_scaling_one_to_three_to_one_from_another_shell_and_sigterm_lose_nothing",
    f"{PYTHON} chat RUN_DIR/policy "
    '"12+7="': "test_system.py::TestFinishedRun::test_the_commands_of_readme_for_a_run",
    f"{PYTHON} evaluate "
    "RUN_DIR/policy": "test_system.py::TestFinishedRun::test_policy_is_evaluated_by_vllm_through_the_cli",
    ".venv/bin/vllm serve RUN_DIR/policy": "test_readme.py::test_programs_of_the_environment_exist",
    "launch.py export RUN_DIR --step 200 --out "
    "DIR": "test_system.py::TestFinishedRun::test_the_commands_of_readme_for_a_run",
    "launch.py inspect-batch FILE": "test_guards.py::test_inspect_batch_shows_what_a_reader_looks_for",
    "launch.py doctor": "test_readme.py::test_doctor_runs_in_a_clone",
    "export PATH=$PWD/.venv/bin:$PATH": "test_submitted_runs.py::test_ray_job_submit_with_token_authentication",
    "export RAY_AUTH_MODE=token": "test_submitted_runs.py::test_ray_job_submit_with_token_authentication",
    "ray start --head": "test_submitted_runs.py::test_ray_job_submit_with_token_authentication",
    "ray job submit --working-dir . -- python launch.py train configs/quickstart.yaml": "test_submitted_runs.py::"
    "test_ray_job_submit_with_token_authentication",
    "launch.py plan CONFIG --gpu h100": "test_planning.py::test_the_command_prints_a_plan",
    f"{PYTHON} plan configs/llama3_8b_math.yaml --gpu "
    "h100": "test_planning.py::test_the_command_prints_a_plan",
    "python -m cluster.plan.sizes": "test_sizes_deploy.py::test_the_sizes_are_what_plan_says",
    "sbatch --nodes=2 deploy/slurm.sh configs/llama3_8b_math.yaml learner.ranks=8 "
    "actors.count=8": "test_sizes_deploy.py::test_slurm_starts_a_ray_node_on_each_node_and_the_driver",
    "ray job stop": "test_readme.py::test_programs_of_the_environment_exist",
    "ray job submit": "test_readme.py::test_programs_of_the_environment_exist",
    "wandb sync": "test_wandb_writer_continued.py::test_an_offline_run_that_was_killed_and_continued_is_one_curve_in_every_file",
}
