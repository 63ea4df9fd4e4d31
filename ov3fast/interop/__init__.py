"""Doors to other libraries: one set of weights, the same tokens through each.

transformers.py   AutoModel, AutoConfig, AutoImageProcessor, AutoProcessor; a vision tower for transformers' Llava classes

Each file imports its library when it is imported, and none is imported by `import ov3fast`.
"""
