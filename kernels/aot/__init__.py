"""Ahead-of-time checks without a GPU: compiles every kernel in every configuration for every chip and reports what the machine code uses.

    python -m ov3fast.kernels.aot --target sm_90 sm_100 --op flash_attention --csv table.csv --json table.json

cases/ lists what to compile, compile.py compiles and caches, table.py builds and checks the rows. No kernel imports anything from here.
"""
