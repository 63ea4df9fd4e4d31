"""contrastive_loss: launch.py selects a schedule and launches; tiles.py has the kernels over tiles of pairs, rows.py those over rows of features."""
