"""What several kernels share: tiled products, strided rows, sums over rows, patches, the random stream, GELU, and picking a row of configuration."""
