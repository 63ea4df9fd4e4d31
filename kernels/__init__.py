"""Triton kernels, one file or folder per operator; installed as `ov3fast.kernels`.

Each file has its `@triton.jit` kernels, their launch configurations, and the functions that launch them (`forward` and `backward`, with the
signatures of the operator's reference). lib/ has shared code. aot/ checks kernels without a GPU; no kernel imports it.
"""
