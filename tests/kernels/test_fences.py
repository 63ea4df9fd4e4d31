"""Fences between writes to shared memory and the products that read it, on Hopper."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from ov3fast import ops
from ov3fast.kernels import mlp
from ov3fast.kernels.lib import fences

ROOT = Path(__file__).parents[2]
PTX = (
    "\tbar.sync \t0;\n\t@%p12 barrier.sync 1, 128;\n\twgmma.fence.sync.aligned;\n\twgmma.mma_async.sync.aligned.m64n64k16 {};\n"
)
RACING = {
    "test_flash_attention_compiled.py": "test_compiled_code_of_sm_90 and (head_dim_64 or head_dim_72_causal)",
    "test_mlp_compiled.py": "sm_90 and whole and large",
    "test_patch_embed_compiled.py": "test_within_budget and sizes1 and contiguous and sm_90",
}
"""Tests in which ptxrun finds races in the code of Triton 3.6 without the fences: file -> tests."""


def test_a_fence_comes_before_each_barrier_and_each_group_of_products():
    lines = fences.fenced(PTX).split("\n")
    assert [line.strip() == fences.FENCE for line in lines] == [True, False] * 3 + [False, False]
    assert [line for line in lines if line.strip() != fences.FENCE] == PTX.split("\n")
    assert fences.fenced("\tbar.sync 0;\n\tmma.sync;\n") == "\tbar.sync 0;\n\tmma.sync;\n"


@pytest.mark.parametrize(("version", "installed"), [("3.6.0", True), ("3.8.1", True), ("3.9.0", False), ("4.0.0+git", False)])
def test_it_is_for_the_versions_that_need_it(monkeypatch, version, installed):
    monkeypatch.setattr(triton, "__version__", version)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.add_stages_inspection_hook = None
        fences.install()
        fences.install()
        hook = triton.knobs.runtime.add_stages_inspection_hook
        assert isinstance(hook, fences._Hook) is installed and getattr(hook, "before", None) is None


@pytest.mark.skipif(ops.triton.INTERPRETED, reason="the interpreter compiles nothing")
def test_our_kernels_alone_are_changed():
    """A previously installed hook is still called."""
    called = []
    hook = fences._Hook(lambda *arguments: called.append(arguments) or ("other", "hash"))
    for name, expected in ((mlp._mlp_forward.__name__, fences.fenced(PTX)), ("somebody_else's", PTX)):
        stages = {"ptx": lambda source, metadata: source}
        hook(None, stages, None, None, 90)
        assert stages["ptx"](PTX, {"name": name}) == expected
    assert hook() == ("other ov3fast fences", "hash 1") and len(called) == 3


@pytest.mark.full
@pytest.mark.skipif(
    not os.environ.get("OV3FAST_OTHER_TRITON"), reason="OV3FAST_OTHER_TRITON names no folder with another Triton"
)
@pytest.mark.parametrize("file", RACING)
def test_code_of_another_triton_has_no_race(file):
    """The folder comes from `pip install --no-deps --target FOLDER triton==3.6.0`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["OV3FAST_OTHER_TRITON"], str(ROOT)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{file}", "-k", RACING[file]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
