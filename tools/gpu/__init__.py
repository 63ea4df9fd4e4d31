"""The parts of `python tools/gpu_run.py`, which tests and benchmarks on a GPU."""
