"""Maps the folders of this repository to packages; the metadata is in pyproject.toml.

The Triton kernels live in kernels/ beside csrc/ and are installed as `ov3fast.kernels`: Hugging Face has a package named
`kernels`, so ours must never be importable under that name.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ov3fast", "ov3fast.*"]), "ov3fast.kernels"],
    package_dir={"ov3fast": "ov3fast", "ov3fast.kernels": "kernels"},
)
