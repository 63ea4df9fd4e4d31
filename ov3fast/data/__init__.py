"""Shards -> samples -> batches: reading, ordering, cropping, and the demo set.

config.py      DataConfig, SourceConfig: what a run is trained on
loader.py      Loader: batches by step number;  store.py: all samples of the sources
shards.py      tar shards with random access;  skips.py: what could not be used
order.py       which sample comes when;  counter.py: the randomness behind it
transforms.py  crops, resizing, backgrounds;  captions.py: caption choice, Recap-DataComp-1B join
assets.py      package files with real pictures;  demo/: the demo set made of them
"""

from ov3fast.data.check import Summary, summarise
from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.data.loader import Batch, Loader
from ov3fast.data.order import Order, order_hash
from ov3fast.data.shards import Sample, ShardDataset, write_index, write_shards
from ov3fast.data.skips import DataError, SampleError, Skip, SkipCounter, SkipWarning
from ov3fast.data.store import Store

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "Loader",
    "Order",
    "Sample",
    "SampleError",
    "ShardDataset",
    "Skip",
    "SkipCounter",
    "SkipWarning",
    "SourceConfig",
    "Store",
    "Summary",
    "order_hash",
    "summarise",
    "write_index",
    "write_shards",
]
