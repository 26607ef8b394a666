"""deploy/: as far as it can be checked without Kubernetes, Slurm and Docker."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.plan.sizes import table
from cluster.preparation.placement import bundles, check
from learner.catalogue import load_config
from tests.support.house import ROOT

DEPLOY = ROOT / "deploy"

# --- docs/cluster.md ---


def test_the_sizes_are_what_plan_says() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page, "python -m cluster.plan.sizes prints the table anew"


# --- KubeRay ---

POD: dict[str, Any] = {
    "spec!": {
        "containers!": [
            {
                "name!": str,
                "image!": str,
                "resources": {"requests": {"*": str}, "limits": {"*": str}},
                "ports": [{"containerPort!": int, "name": str}],
                "volumeMounts": [{"name!": str, "mountPath!": str}],
                "env": [{"name!": str, "value": str}],
            }
        ],
        "volumes": [
            {
                "name!": str,
                "persistentVolumeClaim": {"claimName!": str},
                "emptyDir": {"medium": str, "sizeLimit": str},
            }
        ],
    }
}
RAY_CLUSTER: dict[str, Any] = {
    "rayVersion": str,
    "authOptions": {"mode": ("token", "disabled"), "secretName": str},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "idleTimeoutSeconds": int,
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
    },
    "headGroupSpec!": {"rayStartParams": {"*": str}, "template!": POD},
    "workerGroupSpecs": [
        {
            "groupName!": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "rayStartParams": {"*": str},
            "template!": POD,
        }
    ],
}
RAY_JOB: dict[str, Any] = {
    "apiVersion!": ("ray.io/v1",),
    "kind!": ("RayJob",),
    "metadata!": {"name!": str},
    "spec!": {
        "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        "entrypoint": str,
        "runtimeEnvYAML": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": RAY_CLUSTER,
    },
}
"""The fields of KubeRay's types that we use (RayJobSpec, RayClusterSpec); "!": it must be there, "*": any."""


def problems(value: Any, schema: Any, path: str = "") -> Iterator[str]:
    """What of a manifest is not as the schema has it."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            yield f"{path}: expected a list"
            return
        for number, one in enumerate(value):
            yield from problems(one, schema[0], f"{path}[{number}]")
    elif isinstance(schema, Mapping):
        if not isinstance(value, Mapping):
            yield f"{path}: expected a mapping"
            return
        known = {name.rstrip("!"): of for name, of in schema.items()}
        yield from (
            f"{path}.{name[:-1]} is missing" for name in schema if name[-1] == "!" and name[:-1] not in value
        )
        for name, one in value.items():
            if name in known or "*" in known:
                yield from problems(one, known.get(name, known.get("*")), f"{path}.{name}")
            else:
                yield f"{path}.{name} is no field"
    elif isinstance(schema, tuple):
        if value not in schema:
            yield f"{path}: {value!r} is none of {schema}"
    elif type(value) is not schema:
        yield f"{path}: {value!r} is no {schema.__name__}"


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "rayjob.yaml").read_text(encoding="utf-8")))


def test_the_manifest_has_the_fields_of_kuberays_types(manifests: list[dict[str, Any]]) -> None:
    claim, job = manifests
    assert claim["kind"] == "PersistentVolumeClaim"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert list(problems(job, RAY_JOB)) == []


def test_a_field_that_is_none_is_found(manifests: list[dict[str, Any]]) -> None:
    job = {**manifests[1], "kind": "RayJobs", "spec": {"backofLimit": 1, "backoffLimit": "1"}}
    assert list(problems(job, RAY_JOB)) == [
        ".kind: 'RayJobs' is none of ('RayJob',)",
        ".spec.backofLimit is no field",
        ".spec.backoffLimit: '1' is no int",
    ]


def pods(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]["template"]["spec"]
    yield from (group["template"]["spec"] for group in cluster["workerGroupSpecs"])


def test_all_pods_share_the_claim_the_image_and_authenticate(manifests: list[dict[str, Any]]) -> None:
    claim, job = manifests
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    images = set()
    for pod in pods(job):
        (container,) = pod["containers"]
        images.add(container["image"])
        claims = [
            volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume
        ]
        assert claims == [{"claimName": claim["metadata"]["name"]}]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert len(images) == 1
    assert f"ray[default]=={cluster['rayVersion']}" in (ROOT / "requirements" / "common.txt").read_text()


def test_the_groups_have_what_the_config_asks_for(manifests: list[dict[str, Any]]) -> None:
    spec = manifests[1]["spec"]
    python, script, command, path, *overrides = shlex.split(spec["entrypoint"])
    assert (python, script, command) == ("python", "launch.py", "train")
    config = load_config(ROOT / path, overrides)
    assert config.run.dir is not None
    assert config.run.dir.startswith("/shared/")
    placement = bundles(config.actors, config.learner)
    learner, actors = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (actors["minReplicas"], actors["maxReplicas"]) == config.actors.count
    nodes = [
        resources(group)
        for group, count in ((learner, learner["replicas"]), (actors, actors["replicas"]))
        for _ in range(count)
    ]
    assert check(placement, nodes) == []
    # An actor that is one more fits nowhere but on a pod that is one more.
    one_more = placement._replace(
        actor=placement.actor.__class__("actor", actors["replicas"] + 1, placement.actor.resources)
    )
    assert check(one_more, nodes) != []
    assert check(one_more, [*nodes, resources(actors)]) == []


def resources(group: dict[str, Any]) -> dict[str, float]:
    (container,) = group["template"]["spec"]["containers"]
    asked = container["resources"]["requests"]
    return {"CPU": float(asked["cpu"]), "GPU": float(asked["nvidia.com/gpu"])}


def test_rays_autoscaler_reads_the_groups_as_we_do(manifests: list[dict[str, Any]]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = manifests[1]["spec"]["rayClusterSpec"]
    metadata = {"name": "agro-8b", "namespace": "default"}
    read = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})
    kinds = read["available_node_types"]
    for group in spec["workerGroupSpecs"]:
        kind = kinds[group["groupName"]]
        assert {key: kind["resources"][key] for key in ("CPU", "GPU")} == resources(group)
        assert (kind["min_workers"], kind["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
    (head,) = (kind for name, kind in kinds.items() if name not in ("learner", "actors"))
    assert head["resources"]["CPU"] == 0  # Neither a rank nor an actor fits there.
    assert read["idle_timeout_minutes"] == 5


def test_the_manifest_keeps_the_rules_of_kuberays_operator(manifests: list[dict[str, Any]]) -> None:
    """Those of its types are above; these its operator looks at before it makes a cluster (as of 1.6)."""
    job = manifests[1]
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", job["metadata"]["name"])
    assert spec["ttlSecondsAfterFinished"] == 0 or spec["shutdownAfterJobFinishes"]
    assert spec["backoffLimit"] == 0 or spec["submissionMode"] != "InteractiveMode"
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"]), dict)
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)  # For a token.
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert "restartPolicy" not in group["template"]["spec"]  # Its autoscaler wants Never, or none.
        assert "labels" not in group["rayStartParams"]
        (container,) = group["template"]["spec"]["containers"]
        limits, requests = (container["resources"].get(kind, {}) for kind in ("limits", "requests"))
        assert limits.get("nvidia.com/gpu") == requests.get("nvidia.com/gpu")  # Kubernetes shares no GPU.


# --- the image ---


def instructions() -> list[tuple[str, str]]:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(word, rest) for word, _, rest in (line.strip().partition(" ") for line in lines) if word]


def test_the_images_steps_name_what_exists_and_parse() -> None:
    found = instructions()
    assert {word for word, _ in found} == {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "CMD"}
    for word, rest in found:
        if word == "RUN":
            subprocess.run(["bash", "-n", "-c", rest], check=True)
        if word == "COPY":
            *sources, _ = shlex.split(rest)
            assert all((ROOT / source).exists() for source in sources)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_what_is_copied_first_is_enough_to_make_the_environment(kind: str, tmp_path: Path) -> None:
    copies = [rest for word, rest in instructions() if word == "COPY"]
    assert copies[-1] == ". ."
    for copy in copies[:-1]:
        source, target = shlex.split(copy)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / target)
        else:
            shutil.copy(ROOT / source, tmp_path / target)
    command = ["make", "--dry-run", "setup", f"KIND={kind}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"requirements/constraints-{kind}.txt" in done.stdout
    assert f"requirements/{kind}.txt" in done.stdout


# --- Slurm ---

CALLED = 'echo "$(basename "$0") $*" >> "$CALLS"\n'
FAKES = {
    "scontrol": CALLED
    + 'if [ "$1 $2" = "show hostnames" ]; then printf "node1\\nnode2\\n"; fi\n'
    + 'if [ "$1 $2" = "show job" ]; then echo "JobId=77 $STATE"; fi\n',
    # Runs what follows the options.
    "srun": CALLED + 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
    # As on Debian, whose /etc/hosts has the own name at a loopback address.
    "hostname": 'if [ "$1" = --all-ip-addresses ]; then echo "fe80::1 127.0.0.2 10.0.0.1 172.17.0.1 "; '
    + "else echo 127.0.1.1; fi\n",
    "ray": CALLED + 'if [ "$1" = status ]; then exit 0; fi\nexec sleep 600\n',
    "python": 'if [[ "$1 $2" == -c*ray.init* ]]; then echo "joined $3" >> "$CALLS"; exit 0; fi\n'
    + 'if [ "$1" = -c ]; then exec "$PYTHON" "$@"; fi\n'
    + CALLED
    + 'eval "$DRIVER"\n',
}
ENDED = "exit 0"
JOINED = 'until grep -q -- --head "$CALLS" && grep -q -- --address= "$CALLS"; do sleep 0.05; done; exit 0'
"""A driver that waits until both nodes were started, as ranks and actors do."""
FAILED = "exit 3"
TRAINS = 'trap \'echo checkpoint >> "$CALLS"; exit 143\' TERM; echo trains >> "$CALLS"; while true; do sleep 0.1; done'

SAVES_SLOWLY = (
    'trap \'echo asked >> "$CALLS"\' TERM; echo trains >> "$CALLS"; '
    'until grep -q "show job" "$CALLS"; do sleep 0.05; done; exit 3'
)
"""A driver that ends when Slurm was asked about the job."""


class Allocation:
    """A folder with the script and a Slurm of fakes around it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        programs, own = folder / "slurm", folder / ".venv" / "bin"
        for place in (programs, own):
            place.mkdir(parents=True)
        for name, body in FAKES.items():
            file = (own if name in ("ray", "python") else programs) / name
            file.write_text(f"#!/bin/bash\n{body}")
            file.chmod(0o755)
        self._env = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "CALLS": str(self.calls),
            "PYTHON": shutil.which("python3") or "",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NODELIST": "node[1-2]",
        }

    def start(self, driver: str, state: str = "JobState=RUNNING") -> subprocess.Popen[bytes]:
        """Runs the script with a driver that does this, in a job that Slurm says this of."""
        command = ["bash", str(DEPLOY / "slurm.sh"), "run.yaml", "actors.count=2"]
        env = {**self._env, "DRIVER": driver, "STATE": state}
        return subprocess.Popen(command, env=env, start_new_session=True)

    def await_line(self, line: str) -> None:
        """Waits until the script or its driver has said this."""
        deadline_s = time.monotonic() + 120
        while line not in self.lines():
            assert time.monotonic() < deadline_s
            time.sleep(0.05)

    def lines(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def allocation(tmp_path: Path) -> Allocation:
    return Allocation(tmp_path)


def test_slurm_starts_a_ray_node_on_each_node_and_the_driver(allocation: Allocation) -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)
    assert allocation.start(JOINED).wait(120) == 0
    lines = allocation.lines()
    (head,) = [line for line in lines if line.startswith("srun") and "--head" in line]
    assert "--nodelist=node1" in head
    assert "--node-ip-address=10.0.0.1 --port=6379" in head
    (worker,) = [line for line in lines if line.startswith("srun") and "--address=10.0.0.1:6379" in line]
    assert "--nodelist=node2" in worker
    (driver,) = [line for line in lines if line.startswith("python")]
    run_dir = allocation.folder / "runs" / "slurm-77"
    assert lines.index("joined 2") < lines.index(driver)
    assert driver == f"python launch.py train run.yaml actors.count=2 run.dir={run_dir}"
    assert not any("requeue" in line for line in lines)
    token = run_dir.with_name("slurm-77.token")
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o077 == 0


def test_a_run_that_failed_fails_the_job(allocation: Allocation) -> None:
    assert allocation.start(FAILED).wait(120) == 3
    assert not any("requeue" in line for line in allocation.lines())


@pytest.mark.parametrize(
    ("warning", "state"),
    [
        (signal.SIGUSR1, "JobState=RUNNING PreemptTime=None"),
        (signal.SIGTERM, "JobState=PREEMPTED PreemptTime=None"),
        (signal.SIGTERM, "JobState=RUNNING PreemptTime=2026-11-26T17:00:00"),
    ],
)
def test_before_the_time_is_over_the_run_is_saved_and_queued_again(
    allocation: Allocation, warning: signal.Signals, state: str
) -> None:
    job = allocation.start(TRAINS, state)
    allocation.await_line("trains")
    job.send_signal(warning)
    assert job.wait(120) == 0
    lines = allocation.lines()
    assert lines.index("checkpoint") < lines.index("scontrol requeue 77")
    token = (allocation.folder / "runs" / "slurm-77.token").read_text()
    # The same job again: the same run, the same token.
    allocation.calls.unlink()
    assert allocation.start(ENDED).wait(120) == 0
    (driver,) = [line for line in allocation.lines() if line.startswith("python")]
    assert driver.endswith(f"run.dir={allocation.folder / 'runs' / 'slurm-77'}")
    assert (allocation.folder / "runs" / "slurm-77.token").read_text() == token


@pytest.mark.parametrize(
    "state", ["JobState=CANCELLED PreemptTime=None", "JobState=COMPLETING PreemptTime=None"]
)
def test_a_job_that_is_cancelled_is_saved_and_not_queued_again(allocation: Allocation, state: str) -> None:
    job = allocation.start(TRAINS, state)
    allocation.await_line("trains")
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 143
    lines = allocation.lines()
    assert "checkpoint" in lines
    assert "scontrol requeue 77" not in lines


def test_a_job_that_is_cancelled_while_it_saves_is_not_queued_again(allocation: Allocation) -> None:
    job = allocation.start(SAVES_SLOWLY, "JobState=CANCELLED")
    allocation.await_line("trains")
    job.send_signal(signal.SIGUSR1)
    allocation.await_line("asked")
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 3
    assert "scontrol requeue 77" not in allocation.lines()
    assert allocation.lines().count("asked") == 1
