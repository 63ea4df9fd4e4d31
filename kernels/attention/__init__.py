"""flash_attention: launch.py launches the kernels of forward.py and backward.py; tiles.py is what both are made of, tma.py the loads through TMA."""
