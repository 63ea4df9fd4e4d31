"""Adding an operator takes its own files and one line in each of two tables, shown here for one called `halve`, in a copy of the tree.

Only the files listed in CONTRIBUTING.md are written: the dispatch, the samples of every backend, the bench table and the documentation pick it up.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FILES = {
    "ov3fast/ops/halve.py": '''"""Half of a tensor.

    y_i = x_i / 2
"""

from torch import Tensor

from . import _check, _dispatch, _operator, cpu
from ._calls import Call


def reference(x: Tensor) -> Tensor:
    """Plain PyTorch, the specification."""
    return x / 2


def halve(x: Tensor, *, impl: str | None = None) -> Tensor:
    """Half of x [...], like x. Raises TypeError that names the argument."""
    return _halve(impl, x)


def _backward_eager(grad_y, x, need_x):
    return grad_y / 2


_dispatch.register("halve", "eager", reference, _backward_eager)
_halve = _operator.define(
    "halve",
    "(Tensor x) -> Tensor",
    fake=lambda x: x.new_empty(x.shape),
    check=lambda x: _check.tensor("halve", "x", x),
    specification=reference,
    save=lambda inputs, output: _operator.Saved((inputs[0],)),
    gradients={"x": 0},
    backward_schema="(Tensor grad_y, Tensor x, bool need_x) -> Tensor",
    backward_fake=lambda grad_y, x, need_x: x.new_empty(x.shape),
    differentiable_backward=_backward_eager,
)
''',
    "kernels/halve.py": '''"""Half of a tensor."""

import torch
import triton
import triton.language as tl


@triton.jit
def _halve(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0) / 2, mask=i < n)


def forward(x):
    x = x.contiguous()
    y = torch.empty_like(x)
    _halve[(triton.cdiv(x.numel(), 64),)](x, y, x.numel(), BLOCK=64)
    return y


def backward(grad_y, x, need_x):
    return forward(grad_y)
''',
    "tests/ops/test_halve.py": '''import torch

from ov3fast import ops, testing
from ov3fast.ops.halve import reference


def test_parity():
    testing.check(ops.halve, reference, (testing.make(3, 5),), dtype=torch.float32)
''',
    "docs/operators/halve.md": "# halve\n\n::: ov3fast.ops.halve.halve\n",
}  # fmt: skip
CPU = {
    "ov3fast/ops/halve.py": '''

_HALVE = cpu.Kernel("halve", "T* x, T* y, int64_t n")


def _forward_cpu(x):
    y = cpu.empty_like(x)
    _HALVE(x.dtype, cpu.dense(x), y, x.numel())
    return y


cpu.register("halve", _forward_cpu, lambda grad_y, x, need_x: _forward_cpu(grad_y), operands=("x",))
''',
    "csrc/cpu/halve.cpp": '''#include "export.h"
#include "parallel.h"

using namespace ov3;

template <class T>
void halve(const T* x, T* y, int64_t n, int threads) {
    parallel(ceil_div(n, 64), threads, [&](int64_t task, int) {
        for_vectors(std::min<int64_t>(64, n - task * 64), [&](int64_t i, int lanes) {
            store(y + task * 64 + i, load(x + task * 64 + i, lanes) * 0.5f, lanes);
        });
    });
}
OV3_EXPORT(halve)
''',
}  # fmt: skip
CALLS = """

CALLS = [Call("halve", halve, reference, lambda draw, *shape: [draw(*shape)], least=(3,), tiny=(5, 70), real=(64, 256))]
"""
LINES = {
    "ov3fast/ops/__init__.py": ("from .mlp import mlp as mlp\n", "from .halve import halve as halve\n"),
    "ov3fast/ops/triton/__init__.py": ("KERNELS = {\n", '    "halve": Kernels("halve", ("x",)),\n'),
}


def add(tree: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((path.read_text(encoding="utf-8") if path.exists() else "") + text, encoding="utf-8")


@pytest.fixture
def tree(tmp_path):
    """A copy of the relevant parts of the tree, plus the toy operator's files except its CPU kernel, and its two lines."""
    unneeded = shutil.ignore_patterns("_native", "__pycache__", "results", "*.so")
    for name in ("ov3fast", "kernels", "benches", "csrc", "docs", "tests/kernel_tools", "tests/ops", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=unneeded, symlinks=name == "ov3fast")
    for name in ("mkdocs.yml", "pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "benches" / "results").symlink_to(ROOT / "benches" / "results")
    (tmp_path / "ov3fast" / "_native").symlink_to(ROOT / "ov3fast" / "_native")
    if not (tmp_path / "ov3fast" / "kernels").exists():
        (tmp_path / "ov3fast" / "kernels").symlink_to("../kernels")
    add(tmp_path, FILES)
    for name, (behind, line) in LINES.items():
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert text.count(behind) == 1
        (tmp_path / name).write_text(text.replace(behind, behind + line), encoding="utf-8")
    return tmp_path


def run(tree: Path, code: str, **environment: str) -> str:
    paths = os.pathsep.join(map(str, (tree, tree / "tests", tree / "tools")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FOUND = """
import torch
import doc_tables
from benches import cases
from kernel_tools.samples import SAMPLES
from ov3fast import ops

print(*ops.table()["halve"])
[sample] = [sample for sample in SAMPLES if sample.op == "halve"]
for backend, status in ops.table()["halve"].items():
    if status == "ready":
        with ops.use(backend):
            sample.assert_parity("tiny", torch.float32)
        print("right on", backend)
for case in cases.rest(cases.full(on_gpu=False)):
    print("bench", *case[:2])
print(dict(doc_tables.index())["[`halve`](halve.md)"])
"""


def test_it_is_found(tree):
    add(tree, {"ov3fast/ops/halve.py": CALLS})
    lines = run(tree, FOUND, TRITON_INTERPRET="1").splitlines()
    assert lines == [
        "triton eager",
        "right on triton",
        "right on eager",
        "bench halve fp32",
        "bench halve bf16",
        "Half of a tensor",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "import hooks, types; print(hooks.on_config(types.SimpleNamespace("
         "docs_dir='.', nav=[{'Operators': ['operators/*.md']}])).nav[0]['Operators'])"],
        cwd=tree / "docs", capture_output=True, text=True, check=True,
    )  # fmt: skip
    pages = re.findall(r"operators/(\w+)\.md", done.stdout)
    assert pages[0] == "index" and "halve" in pages


@pytest.mark.full
def test_its_cpu_kernel_too(tree, reuse_objects):
    add(tree, CPU)
    add(tree, {"ov3fast/ops/halve.py": CALLS})
    (tree / "ov3fast" / "_native").unlink()
    reuse_objects(tree)
    command = [sys.executable, "csrc/build.py", "ov3fast/_native", "--only", "portable"]
    subprocess.run(command, cwd=tree, check=True, timeout=900)
    lines = run(tree, FOUND).splitlines()
    assert lines[0] == "triton cpu eager" and "right on cpu" in lines


def test_contributing_lists_the_same_places():
    """At most: its ops file, one csrc file, one kernels file, its test, its page, and one line in each of two tables."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add an operator")[1].split("\n## ")[0]
    steps = re.findall(r"^\d\. (.*(?:\n   .*)*)", section, flags=re.MULTILINE)
    places = [
        name.replace("NAME", "halve") for step in steps for name in re.findall(r"`((?:\w+/)+[\w.]+)`", step.split(":")[0])
    ]
    assert places == [*FILES, *LINES][:1] + ["csrc/cpu/halve.cpp"] + [*FILES, *LINES][1:]
