"""What the tests of kernels share: small kernels to try the tools on, program orders, one sample call per operator."""
