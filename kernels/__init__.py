"""Triton kernels, one file or folder per operator; installed as `ov3fast.kernels`.

A file holds its `@triton.jit` kernels, the rows of configuration that they are launched with, and the functions that launch them (`forward`,
`backward`: the contract of the operator's reference). lib/ is what several share. aot/ proves kernels without a GPU; no kernel imports it.
"""
