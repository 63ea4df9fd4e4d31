"""contrastive_loss: launch.py chooses a schedule and launches; tiles.py holds the kernels over tiles of pairs, rows.py those over rows of features."""
