"""Shared by the kernel tests: small kernels for testing the tools, program orders, sample calls of every operator."""
