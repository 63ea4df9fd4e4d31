"""ptxrun: run the PTX of Triton and CUDA C++ kernels on a CPU, with bounds, initialisation and race checks.

    from ptxrun import run, run_cuda, Struct
    report = run(kernel, grid, {'X': x, 'N': n}, {'BLOCK': 1024})       # Triton, ahead of time for sm_80; updates x in place
    report = run_cuda(source, 'kernel', grid, block, [x, n])            # CUDA C++ through nvcc
    assert report.ok, report

See README.md for what is checked and for the limits.
"""

from .arguments import Struct
from .cuda_front import compile_cuda, run_cuda
from .launch import run_ptx
from .memory import PtxFault
from .parser import PtxError
from .report import Finding, Report
from .triton_front import Compiled, compile_kernel, run

__all__ = [
    "run",
    "run_cuda",
    "run_ptx",
    "compile_kernel",
    "compile_cuda",
    "Compiled",
    "Struct",
    "Report",
    "Finding",
    "PtxFault",
    "PtxError",
]
