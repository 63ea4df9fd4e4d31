"""Proof without a GPU: compiles every kernel with every row of its table for every chip, and tells what came out.

    python -m ov3fast.kernels.aot --target sm_90 sm_100 --op flash_attention --csv table.csv --json table.json

cases/ holds what to compile, compile.py compiles and remembers, table.py makes the rows and judges them. No kernel imports anything from here.
"""
