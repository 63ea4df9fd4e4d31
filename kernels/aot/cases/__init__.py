"""One file per operator: `entries()` describes how to compile its kernels and how much work a launch does."""
