"""Join Recap-DataComp-1B's captions (parquet) to img2dataset tars, by hash or by key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ov3fast.data.captions import sidecar
from ov3fast.data.shards import ShardDataset
from ov3fast.io import atomic_write


class JoinReport(NamedTuple):
    """What `join_captions` did: samples in the shards, samples that got captions, shards written."""

    samples: int
    matched: int
    shards: int


def join_captions(
    shards: str | Path | Sequence[str | Path],
    parquet: str | Path | Sequence[str | Path],
    columns: Sequence[str] = ("re_caption", "org_caption"),
    by: str = "sha256",
) -> JoinReport:
    """Write each shard's captions from parquet files beside it, where ShardDataset picks them up.

    Recap-DataComp-1B is parquet with the columns key, sha256, url, re_caption, org_caption, ...; its pictures come from
    img2dataset as tars. `by` is the column that both have: "sha256" is read from the tars' JSON files, "key" is the
    sample's name. The parquet is read once, filtered by pyarrow; memory grows with the captions of the given shards, so
    give a large set in several calls. Raises FileNotFoundError, and ValueError naming a column that is not there.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as pads

    paths = [str(p) for p in ([parquet] if isinstance(parquet, str | Path) else parquet)]
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(f"parquet: there is no file or folder {path}")
    table = pads.dataset(paths[0] if len(paths) == 1 else paths, format="parquet")
    for column in (by, *columns):
        if column not in table.schema.names:
            raise ValueError(f"columns: the parquet has no column {column!r}; it has {', '.join(table.schema.names)}")

    dataset = ShardDataset(shards)
    samples_of: dict[str, list[tuple[int, str]]] = {}  # the joined value -> (shard, key) of the samples that have it
    for shard, i in dataset.locations():
        sample = dataset.text(i)
        value = sample.key if by == "key" else sample.meta.get(by)
        if value is not None:
            samples_of.setdefault(str(value), []).append((shard, sample.key))
    found: list[dict[str, dict[str, str]]] = [{} for _ in dataset.shards]
    wanted = pc.field(by).cast(pa.string()).isin(list(samples_of))
    for batch in table.to_batches(columns=[by, *columns], filter=wanted):
        for row in batch.to_pylist():
            for shard, key in samples_of[str(row[by])]:
                found[shard][key] = {column: row[column] for column in columns if row[column]}
    for shard, captions in zip(dataset.shards, found, strict=True):
        with atomic_write(sidecar(shard.path)) as temporary:
            temporary.write_text(json.dumps(captions, ensure_ascii=False), encoding="utf-8")
    return JoinReport(len(dataset), sum(map(len, found)), len(found))
