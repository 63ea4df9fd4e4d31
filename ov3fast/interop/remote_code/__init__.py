"""The files that `ov3fast export transformers` puts beside the weights, for trust_remote_code; they need torch, transformers, diffusers
and Pillow, and use ov3fast's operators where ov3fast is installed."""
