"""A first run on a GPU: what `python tools/gpu_run.py` is made of."""
