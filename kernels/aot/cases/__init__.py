"""One file per operator: `entries()` tells the ahead-of-time compiler how to compile its kernels and count their work."""
