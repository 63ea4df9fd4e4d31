"""Compiled kernels are tried without the interpreter: their files are left out where TRITON_INTERPRET=1."""

from ov3fast.ops import triton

collect_ignore_glob = ["*_compiled.py", "test_cuda_*.py"] if triton.INTERPRETED else []
