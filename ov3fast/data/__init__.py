"""Shards -> samples -> batches: reading, ordering, cropping, and the demo set.

config.py      DataConfig, SourceConfig: what a run is trained on;  limits.py: limits that several files share
loader.py      Loader: batches by step number;  store.py: SampleStore, all samples of the sources
shards.py      tar shards with random access;  indexed_tar.py: one tar and its samples;  tar_index.py: the index beside it
urls.py        files behind URLs, and their cache;  source.py: SampleSource, for samples from elsewhere
images.py      image bytes -> upright 8-bit images;  jpeg.py: by simplejpeg;  transforms.py: crops, resizing, backgrounds
crops.py       a batch's crops;  threads.py: the threads that read and decode
captions.py    which text counts as a caption, and picking one;  recap.py: the Recap-DataComp-1B join
latent_shards.py   the VAE's moments on disk
order.py       which sample comes when;  mixing.py: of which source;  hash_rng.py: the randomness behind it
skips.py       what could not be used;  check.py: a summary of a set of shards
assets.py      package files with real images;  demo/: the demo set made of them
"""

from ov3fast.data.check import Summary, summarise
from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.data.loader import Batch, Loader
from ov3fast.data.order import Order, order_hash
from ov3fast.data.recap import JoinReport, join_captions
from ov3fast.data.shards import Sample, ShardDataset, index_shards, write_index, write_shards
from ov3fast.data.skips import DataError, SampleError, Skip, SkipCounter, SkipWarning
from ov3fast.data.source import SampleSource
from ov3fast.data.store import SampleStore, Store

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "JoinReport",
    "Loader",
    "Order",
    "Sample",
    "SampleError",
    "SampleSource",
    "SampleStore",
    "ShardDataset",
    "Skip",
    "SkipCounter",
    "SkipWarning",
    "SourceConfig",
    "Store",
    "Summary",
    "index_shards",
    "join_captions",
    "order_hash",
    "summarise",
    "write_index",
    "write_shards",
]
