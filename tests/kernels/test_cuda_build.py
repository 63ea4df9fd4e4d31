"""How the CUDA kernels are built, described and passed to the driver."""

import ctypes
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from ov3fast.ops import cuda

needs_nvcc = pytest.mark.skipif(not (shutil.which("nvcc") or os.environ.get("NVCC")), reason="there is no nvcc")


@needs_nvcc
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_no_stack_and_no_spill(target):
    """Also, every kernel is in the table exactly once."""
    pytest.importorskip("ov3fast.kernels.aot.chips")
    from ov3fast.kernels.aot import cuda as cuda_aot

    table = cuda_aot.rows([target])
    assert len({row["kernel"] for row in table}) == len(table) > 30
    for row in table:
        assert row["stack_bytes"] == row["spills"] == 0 and row["registers"] <= 128, row
        assert row["estimate_us"] > 0
        # Kernels that move 16 bytes at a time are all memory-bound.
        assert row["bound"] == "hbm" or "single" in row["variant"] or row["estimate_us"] < 30, row


@needs_nvcc
def test_nvcc_of_this_machine_serves(build):
    _, toolkit, architectures = build.find_nvcc()
    assert toolkit >= build.OLDEST_CUDA and 80 in architectures


@pytest.mark.parametrize(
    ("word", "reason"), [("0", "OV3FAST_CUDA is 0"), ("no", "must be 0 or 1, got 'no'"), ("", "no NVIDIA driver")]
)
def test_not_wanted(build, monkeypatch, tmp_path, word, reason):
    monkeypatch.setenv("OV3FAST_CUDA", word)
    monkeypatch.setenv("PATH", str(tmp_path))
    if not word and Path("/proc/driver/nvidia").exists():
        pytest.skip("there is an NVIDIA driver")
    with pytest.raises(build.NoCompiler, match=reason):
        build.build_cuda(tmp_path)


def test_without_nvcc(build, monkeypatch, tmp_path):
    monkeypatch.setenv("OV3FAST_CUDA", "1")
    for name in ("NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.NoCompiler, match="no nvcc"):
        build.build_cuda(tmp_path)


def test_old_nvcc(build, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    with pytest.raises(build.NoCompiler, match="is from CUDA 11.8, older than 12.1"):
        build.find_nvcc()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_reasons(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    assert cuda._obstacle.__wrapped__().startswith("the CUDA kernels were not built")
    (tmp_path / "cuda.json").write_text(json.dumps({"toolkit": [13, 0], "architectures": [80]}))
    assert cuda._obstacle.__wrapped__() == "there is no GPU"


def test_struct_is_laid_out_as_in_c():
    tensor = torch.ones(3)
    encoded = cuda.Struct(("i32", 7), ("ptr", [tensor, None], 3), ("f32", [0.5], 3), ("i64", -1), ("i32", 1)).encode()
    assert encoded == struct.pack("<i4xQQQfff4xqi4x", 7, tensor.data_ptr(), 0, 0, 0.5, 0, 0, -1, 1)
    with pytest.raises(ValueError, match="2 values for an array of 1"):
        cuda.Struct(("i32", [1, 2], 1)).encode()


def test_what_the_driver_gets(monkeypatch, tmp_path):
    """A stand-in for libcuda reads the arguments as the real one does."""
    from ov3fast.kernels.lib import cuda_driver
    from ov3fast.ops.cuda import driver

    calls, contexts, devices = [], [0], []

    class Library:
        def __getattr__(self, name):
            def call(*arguments):
                calls.append(name)
                if name == "cuDriverGetVersion":
                    arguments[0]._obj.value = 13020
                if name == "cuDeviceGet":
                    arguments[0]._obj.value = arguments[1].value
                if name == "cuDevicePrimaryCtxRetain":
                    arguments[0]._obj.value = 1000 + arguments[1].value
                if name == "cuCtxPushCurrent_v2":
                    contexts.append(arguments[0].value)
                if name == "cuCtxPopCurrent_v2":
                    contexts.pop()
                if name == "cuLaunchKernel":
                    devices.append(contexts[-1] - 1000)
                    assert [a.value for a in arguments[1:8]] == [5, 2, 1, cuda.THREADS, 1, 1, 0] and arguments[8].value == 99
                    pointer, number, real, pair, null = (ctypes.c_void_p(a) for a in arguments[9])
                    assert ctypes.cast(pointer, ctypes.POINTER(ctypes.c_void_p))[0] == tensor.data_ptr()
                    assert ctypes.cast(number, ctypes.POINTER(ctypes.c_int32))[0] == 12
                    assert ctypes.cast(real, ctypes.POINTER(ctypes.c_float))[0] == 0.25
                    assert ctypes.string_at(pair, 8) == struct.pack("<ii", 3, 4)
                    assert ctypes.cast(null, ctypes.POINTER(ctypes.c_void_p))[0] is None
                return 700 if name == failing else 0

            return call

    tensor, failing = torch.ones(2), None
    (tmp_path / "some.fatbin").write_bytes(b"binary")
    for name in ("context", "_module", "_function"):
        getattr(driver, name).cache_clear()
    monkeypatch.setattr(driver, "FOLDER", tmp_path)
    monkeypatch.setattr(cuda_driver, "library", Library)
    cuda_driver.version.cache_clear()
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 99}))
    arguments = ("x", tensor), ("n", 12), ("f", 0.25), ("s", cuda.Struct(("i32", 3), ("i32", 4))), ("none", None)
    launch = cuda.Launch("some", "kernel", (5, 2), arguments)
    assert driver.version() == 13020
    driver.run([launch, launch], torch.device("cuda", 1))
    assert calls.count("cuModuleLoadData") == 1 and calls.count("cuLaunchKernel") == 2 and calls[-1] == "cuCtxPopCurrent_v2"
    driver.run([launch], torch.device("cuda", 0))
    assert devices == [1, 1, 0] and contexts == [0] and calls.count("cuModuleLoadData") == 2
    failing = "cuLaunchKernel"
    with pytest.raises(RuntimeError, match=r"cuLaunchKernel: unknown error \(700\)"):
        driver.run([launch], torch.device("cuda", 1))
    assert calls[-1] == "cuCtxPopCurrent_v2"
    cuda_driver.version.cache_clear()
    for name in ("context", "_module", "_function"):
        getattr(driver, name).cache_clear()
