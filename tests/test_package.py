"""The package as users see it: builds, imports, layers, and no interference with other packages."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, cwd, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WITH_CUDA = {**os.environ, "OV3FAST_CUDA": "1"}


def tracked() -> list[str]:
    """Files of the repository, without links to folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory, reuse_objects) -> Path:
    """A folder with the sdist and the wheel, built from a copy to keep the checkout clean."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name)
    reuse_objects(source)
    code = "import setuptools.build_meta as b; b.build_sdist('..'); b.build_wheel('..')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, env=WITH_CUDA)
    return folder


@pytest.mark.full
def test_wheel_carries_the_kernels_and_assets(built, tmp_path):
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "ov3fast/py.typed" in names
    modules = (path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py"))
    kernels = {f"ov3fast/{path}" for path in modules} | {"ov3fast/kernels/measured.csv"}
    assert kernels == {name for name in names if name.startswith("ov3fast/kernels/")}
    assert "ov3fast/assets/small_vae/diffusion_pytorch_model.safetensors" in names
    assert "ov3fast/assets/bert_uncased_vocab.txt" in names
    assert not any(name.startswith(("kernels/", "tests/", "benches/", "csrc/")) for name in names)
    assert wheel.name.split("-")[2:4] == ["py3", "none"], "the kernels are bound to a platform, not to a Python"
    if shutil.which("c++"):
        assert "ov3fast/_native/ov3_portable.so" in names
    if shutil.which("nvcc"):
        assert {f"ov3fast/_native/{name}" for name in ("adamw_ema.fatbin", "group_norm_silu.fatbin", "cuda.json")} <= set(names)
    code = "import ov3fast, ov3fast.kernels; print(ov3fast.kernels.__file__)"
    assert run(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).startswith(str(tmp_path / "site"))


@pytest.mark.full
def test_sdist_builds_the_same_wheel(built, reuse_objects, tmp_path):
    [sdist], [wheel] = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.glob("ov3fast-*")
    missing = {name for name in tracked() if name.startswith(("csrc/", "kernels/")) and not (source / name).is_file()}
    assert not missing, "objects from these sources may hide that they are missing"
    reuse_objects(source)
    code = "import setuptools.build_meta as b; b.build_wheel('..')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, env=WITH_CUDA)
    [again] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as left, zipfile.ZipFile(again) as right:
        assert sorted(left.namelist()) == sorted(right.namelist())
        right.extractall(tmp_path / "site")
    code = "import ov3fast.kernels; print(ov3fast.kernels.__file__)"
    assert run(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).startswith(str(tmp_path / "site"))


def test_editable_install_carries_the_kernels(tmp_path):
    found = run("import ov3fast.kernels; print(ov3fast.kernels.__file__)", tmp_path)
    assert Path(found).resolve() == ROOT / "kernels" / "__init__.py"


def test_import_is_light(tmp_path):
    code = """
import time, torch
start = time.process_time()
import ov3fast, ov3fast.ops, ov3fast.kernels
from ov3fast import OpenVision3
print(time.process_time() - start)
import sys
heavy = [m for m in ("diffusers", "transformers", "tensorboard", "pyarrow", "triton") if m in sys.modules]
assert not heavy, heavy
assert not torch.cuda.is_initialized()
"""
    assert min(float(run(code, tmp_path).splitlines()[0]) for _ in range(3)) < 1.5


def test_hugging_face_libraries_run_from_the_repository_root():
    code = """
import torch
from transformers import ViTConfig, ViTModel
from diffusers import AutoencoderKL
tiny = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32, patch_size=16)
assert ViTModel(tiny)(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 5, 8)
vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
assert vae(torch.zeros(1, 3, 8, 8)).sample.shape == (1, 3, 8, 8)
print("ok")
"""
    assert run(code, ROOT).endswith("ok")


def test_unknown_name():
    import ov3fast

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ov3fast.nonsense  # noqa: B018
