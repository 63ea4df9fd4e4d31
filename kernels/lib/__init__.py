"""What several kernels share: the table of configurations, tiled products, sums over rows, the random stream, GELU."""
