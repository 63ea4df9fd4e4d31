"""Maps the folders of this repository to packages and compiles the CPU and CUDA kernels; the metadata is in pyproject.toml.

The Triton kernels are in kernels/, next to csrc/, and are installed as `ov3fast.kernels`: Hugging Face has a package named
`kernels`, so ours must never be importable under that name.

csrc/build.py compiles the kernels without Python's or PyTorch's headers: a wheel is tied to a platform, not to a Python or PyTorch version. Without a
compiler the package still installs; the operators then run on PyTorch (or Triton), and `ov3fast doctor` says so. The CUDA kernels
need only nvcc, no GPU; without nvcc they are not built.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "csrc"))
from build import NoCompiler, build, build_cuda  # noqa: E402


class BuildKernels(build_ext):
    """Builds the libraries into ov3fast/_native, in the source tree for an editable install, else in the build folder."""

    def run(self):
        root = HERE if self.inplace or self.editable_mode else Path(self.build_lib)
        for what, make in (("CPU", build), ("CUDA", build_cuda)):
            try:
                make(root / "ov3fast" / "_native")
            except (NoCompiler, subprocess.CalledProcessError) as reason:
                self.warn(f"ov3fast: installed without {what} kernels: {reason}")

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        # ov3fast/kernels, a link that a source tree has, leads to the same files once more.
        *find_packages(include=["ov3fast", "ov3fast.*"], exclude=["ov3fast.kernels", "ov3fast.kernels.*"]),
        "ov3fast.kernels",
        *(f"ov3fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"ov3fast": "ov3fast", "ov3fast.kernels": "kernels"},
    ext_modules=[Extension("ov3fast._native", [])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
