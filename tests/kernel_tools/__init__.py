"""Shared by the tests of kernels: small kernels to try the tools on, program orders, sample calls of every operator."""
