"""contrastive_loss: launchers and schedules (loss.py), kernels over tiles of pairs (tiles.py) and over rows of features (rows.py)."""
