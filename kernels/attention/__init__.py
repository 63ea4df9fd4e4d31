"""flash_attention: launch.py launches the kernels of forward.py and backward.py; tiles.py has their building blocks, tma.py the loads through TMA."""
