"""The parts of OpenVision 3 and the whole: VAE, vision towers, text towers, tokenizers, loaders.

Modules call ov3fast.ops, never kernels.
"""
