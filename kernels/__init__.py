"""Triton kernels, one file per operator; installed as `ov3fast.kernels`."""
