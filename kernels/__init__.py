"""Triton kernels, one file per operator; installed as `ov3fast.kernels`.

A file holds its `@triton.jit` kernels, the functions that launch them (`forward`, `backward`: the contract of the operator's reference), and
`entries()`, which tells `aot.py` how to compile and count each kernel. configs.py is the table of block sizes, philox.py the random stream.
"""
