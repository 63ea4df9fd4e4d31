"""Shared by several kernels: tiled products, strided rows, sums over rows, patches, random numbers, GELU, and configuration lookup."""
