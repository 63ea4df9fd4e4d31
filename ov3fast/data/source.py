"""What the loader reads samples from: tar shards, or anything with this protocol.

class Rows:                                    # an Energon, Lance or Parquet reader, say
    def __len__(self): ...
    def keys(self, indices): ...
    def read(self, index, decode=True): ...    # -> data.Sample

SourceConfig(path="source:my_package.readers:rows")         # rows() makes one; "source:my_package.readers:rows:train" calls rows("train")
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from ov3fast.data.shards import Sample
from ov3fast.data.skips import DataError, SampleError

PREFIX = "source:"


@runtime_checkable
class SampleSource(Protocol):
    """Random access to a fixed set of samples, numbered from 0.

    The loader does ordering, resuming, mixing, cropping and captions, so a source has no state of its own. Worker processes and threads
    call it, so it must be picklable or survive a fork, and be thread-safe. It may have `lengths`, the number of samples in each shard,
    which the order then keeps together (`data.shard_window`).
    """

    def __len__(self) -> int:
        """The number of samples."""

    def keys(self, indices: Sequence[int]) -> list[str]:
        """Their keys: stable names of the samples."""

    def read(self, index: int, decode: bool = True) -> Sample:
        """One sample; image None unless `decode`. Raises SampleError for one that must be skipped."""


class GivenSource:
    """A SampleSource, with the interface that the store expects."""

    def __init__(self, source: SampleSource, name: str):
        self.source, self.name, self.uncounted = source, name, 0
        self.lengths = [int(length) for length in getattr(source, "lengths", [len(source)])]
        if not len(source) or sum(self.lengths) != len(source):
            raise DataError(f"path: {name} has {len(source)} samples, but its lengths add up to {sum(self.lengths)}")

    def __len__(self) -> int:
        return len(self.source)

    def read(self, i: int, decode: bool = True, shrink: Any = None) -> Sample:
        """shrink is for files; a source returns decoded images."""
        return self.source.read(i, decode)

    def text(self, i: int) -> Sample:
        return self.read(i, decode=False)

    def __getitem__(self, i: int) -> Sample:
        return self.read(i)

    def keys(self, indices: Sequence[int]) -> list[str]:
        return self.source.keys(indices)

    def image_bytes(self, i: int) -> tuple[str, bytes]:
        """(key, the decoded image's pixels), in place of the image file."""
        sample = self.read(i)
        assert sample.image is not None
        return sample.key, sample.image.tobytes()


def given_source(path: str) -> GivenSource:
    """The source named by "source:module:name" or "source:module:name:argument". DataError if there is none, or it lacks a method."""
    module, _, rest = path.removeprefix(PREFIX).partition(":")
    name, _, argument = rest.partition(":")
    try:
        make: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"path: {path!r} can't be imported ({error}); it takes source:MODULE:FUNCTION, or source:MODULE:FUNCTION:ARGUMENT"
        ) from None
    source = make(argument) if argument else make()
    if not isinstance(source, SampleSource):
        raise DataError(
            f"path: {path!r} returned {type(source).__name__}, which lacks one of __len__, keys and read (data.SampleSource)"
        )
    return GivenSource(source, path)


__all__ = ["GivenSource", "SampleError", "SampleSource", "given_source"]
