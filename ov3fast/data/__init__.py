"""Shards -> samples -> batches: reading, ordering, cropping, and the demo set."""
