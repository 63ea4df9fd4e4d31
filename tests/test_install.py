"""Installation: the operators need only torch, and the pinned versions fit CPU and GPU builds of torch."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later read TOML")
ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = {r for extra in EXTRAS.values() for r in map(Requirement, extra) if r.name != "ov3fast"}


def pins(name: str) -> dict[str, str]:
    lines = (line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
    return {project.lower().replace("_", "-"): version for project, version in (line.split("==") for line in lines)}


def closure(*names: str) -> set[str]:
    """These distributions and all their dependencies."""
    found, waiting = set(), list(names)
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            needed = map(Requirement, metadata.requires(name) or ())
            waiting += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory) -> Path:
    """A folder of packages with ov3fast, torch and torch's dependencies."""
    site = tmp_path_factory.mktemp("site")
    for name in closure("torch"):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            (site / top).symlink_to(distribution.locate_file(top))
    (site / "ov3fast").symlink_to(ROOT / "ov3fast")
    return site


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=site, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True)


def test_operators_need_torch_alone(torch_alone):
    code = """
import torch
from ov3fast import ops, testing
q = torch.randn(1, 5, 2, 8, requires_grad=True)
ops.flash_attention(q, q, q).sum().backward()
print(q.grad.shape, ops.table()["layer_norm"]["triton"])
"""
    done = run(torch_alone, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 5, 2, 8])" in done.stdout
    if "triton" not in closure("torch"):
        assert "triton is not installed" in done.stdout.lower()


def test_a_command_says_how_to_get_what_it_lacks(torch_alone):
    done = run(torch_alone, "-m", "ov3fast", "encode", "model", "photos", "--out", "out.npz")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "pip install 'ov3fast[all]'" in done.stderr


def test_torch_is_the_only_dependency():
    assert [Requirement(r).name for r in PROJECT["dependencies"]] == ["torch"]


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_extras_name_only_extras_that_exist(extra):
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == "ov3fast":
            assert requirement.extras <= set(EXTRAS) - {extra}


@pytest.mark.parametrize(
    "requirement", sorted(REQUIREMENTS | {Requirement(r) for r in PROJECT["dependencies"]}, key=str), ids=str
)
def test_every_requirement_has_a_pin_within_its_range(requirement):
    if requirement.name == "pip":
        pytest.skip("pip comes with the virtual environment")
    assert requirement.specifier.contains((pins("constraints.txt") | pins("constraints-cpu.txt"))[requirement.name])


def test_no_pin_competes_with_the_triton_that_torch_brings():
    assert "triton" not in pins("constraints.txt"), "a torch built for GPUs depends on one exact Triton"
    assert "triton" in pins("constraints-cpu.txt")
    [triton] = [r for r in REQUIREMENTS if r.name == "triton"]
    assert not triton.specifier


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "ov3fast" / "py.typed").exists()
