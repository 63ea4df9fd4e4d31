"""Join Recap-DataComp-1B's captions (parquet) to img2dataset tars, by hash or by key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ov3fast.data.captions import read_captions, sidecar, well_formed
from ov3fast.data.shards import ShardDataset
from ov3fast.data.skips import DataError, SampleError, printable
from ov3fast.io import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa

LEAST_MATCH = 0.01


class JoinError(DataError, ValueError):
    """The two sides don't fit: hardly anything matches, a key is ambiguous, or a column can't be converted."""


class _Counts(NamedTuple):
    samples: int
    matched: int
    shards: int


class JoinReport(_Counts):
    """What `join_captions` did: samples in the shards, samples that got captions, shards written; and as attributes:

    rows: in the parquet files. matched_rows: rows whose key a sample has. without_key: samples without a usable key.
    without_text: samples whose rows have no caption.
    """

    rows: int = 0
    matched_rows: int = 0
    without_key: int = 0
    without_text: int = 0

    def __str__(self) -> str:
        return (
            f"{self.matched} of {self.samples} samples in {self.shards} shards got captions, from {self.matched_rows} of "
            f"{self.rows} rows ({self.without_text} samples match rows without text, {self.without_key} have no key)"
        )


Place = tuple[int, str]  # (shard number, sample key)


class _Keys:
    """The samples, indexed by their join key."""

    def __init__(self, by: str) -> None:
        self.by = by
        self.of_text: dict[str, list[Place]] = {}
        self.integers = False  # whether some sample's JSON has an integer: keys then match whatever their leading zeros
        self.fields: Counter[str] = Counter()
        self.without = 0
        self._of_number: dict[str, list[Place]] | None = None

    def add(self, value: object, place: Place) -> None:
        if isinstance(value, bool) or not isinstance(value, str | int):
            self.without += 1
            return
        self.integers |= isinstance(value, int)
        self.of_text.setdefault(str(value), []).append(place)

    def of_number(self) -> dict[str, list[Place]]:
        """By number without leading zeros. JoinError if two texts are the same number."""
        if self._of_number is None:
            self._of_number, text_of = {}, {}
            for text, places in self.of_text.items():
                number = _number(text)
                if number in self._of_number:
                    raise JoinError(
                        f"by: the samples' {self.by} {text_of[number]!r} and {text!r} are both {number} as integer keys; "
                        "join by another column, or give the parquet text keys"
                    )
                self._of_number[number], text_of[number] = places, text
        return self._of_number


def join_captions(
    shards: str | Path | Sequence[str | Path],
    parquet: str | Path | Sequence[str | Path],
    columns: Sequence[str] = ("re_caption", "org_caption"),
    by: str = "sha256",
    *,
    least_match: float = LEAST_MATCH,
) -> JoinReport:
    """Write each shard's captions from parquet files beside the shard, where ShardDataset finds them.

    Recap-DataComp-1B is parquet with the columns key, sha256, url, re_caption, org_caption, ...; its images come from
    img2dataset as tars. `by` is the column that both have: "sha256" is read from the tars' JSON files, "key" is the
    sample's name. Keys are text, integers or binary (UTF-8, or the raw bytes of the samples' hexadecimal keys); integers match
    zero-padded text unless two texts are the same number. Captions are text or lists of text. Files may differ in these
    types and may lack a caption column that others have. Of several rows with the same key, the last text of each column is kept.

    Memory grows with the captions of the given shards; pass a large set in several calls, with least_match=0: it is
    the fraction of samples and of rows that must match.

    Raises FileNotFoundError; ValueError for a missing column; JoinError (a ValueError) for types that can't be joined,
    or if hardly anything matches. Nothing is written in these cases.
    """
    columns = list(columns)
    files = _files(parquet)
    schemas = {file: _schema(file) for file in files}
    _check_columns(schemas, by, columns)

    dataset = ShardDataset(shards)
    keys = _sample_keys(dataset, by)
    found: list[dict[str, dict]] = [{} for _ in dataset.shards]
    rows = matched_rows = 0
    example = None
    for file in files:
        for part in _parts(file, schemas[file], keys, by, columns):
            rows += part.rows
            matched_rows += len(part.matches)
            example = part.example if example is None else example
            for places, fields in part.matches:
                texts: dict[str, str | tuple[str, ...]] = {}
                read_captions(fields, texts, {})
                for shard, key in places:
                    found[shard].setdefault(key, {}).update(texts)
    matched = sum(len(captions) for captions in found)
    _check_match(keys, example, least_match, (matched, len(dataset)), (matched_rows, rows))

    without_text = sum(not texts for captions in found for texts in captions.values())
    for shard, captions in zip(dataset.shards, found, strict=True):
        with atomic_write(sidecar(shard.path)) as temporary:
            # ASCII, since keys may not be valid UTF-8.
            temporary.write_text(json.dumps({key: texts for key, texts in captions.items() if texts}), encoding="ascii")
    report = JoinReport(len(dataset), matched - without_text, len(found))
    report.rows, report.matched_rows, report.without_key, report.without_text = rows, matched_rows, keys.without, without_text
    return report


# ---- the parquet's side ----------------------------------------------------------------------------------------------


def _files(parquet: str | Path | Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in [parquet] if isinstance(parquet, str | Path) else parquet:
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"parquet: there is no file or folder {path}")
        inside = (
            sorted(p for p in path.rglob("*.parquet") if p.is_file() and not p.name.startswith("._"))
            if path.is_dir()
            else [path]
        )
        if not inside:
            raise FileNotFoundError(f"parquet: the folder {path} holds no .parquet file")
        files += inside
    if not files:
        raise ValueError("parquet: got an empty list; it takes parquet files or folders of them")
    return files


def _schema(file: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(file)
    except pa.ArrowException as error:
        raise JoinError(f"parquet: {file} can't be read: {error}") from None


def _check_columns(schemas: dict[Path, pa.Schema], by: str, columns: list[str]) -> None:
    for file, schema in schemas.items():
        if by not in schema.names:
            raise ValueError(f"columns: the parquet has no column {by!r} in {file}; it has {', '.join(schema.names)}")
        if _key_kind(schema.field(by).type) is None:
            raise JoinError(f"by: the column {by!r} of {file} holds {schema.field(by).type}; keys are text, integers or binary")
    for column in columns:
        having = [(file, schema.field(column).type) for file, schema in schemas.items() if column in schema.names]
        if not having:
            names = ", ".join(dict.fromkeys(name for schema in schemas.values() for name in schema.names))
            raise ValueError(f"columns: the parquet has no column {column!r}; it has {names}")
        for file, kind in having:
            if not _is_caption(kind):
                raise JoinError(f"columns: the column {column!r} of {file} holds {kind}; captions are text or lists of text")


def _key_kind(kind: pa.DataType) -> str | None:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _key_kind(kind.value_type)
    if _is_text(kind):
        return "text"
    if types.is_integer(kind):
        return "integer"
    return "binary" if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind) else None


def _is_caption(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind):
        return _is_caption(kind.value_type)
    return _is_text(kind) or types.is_null(kind)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


class _Part(NamedTuple):
    """A batch of rows: their number, an example key, and the places and caption fields of the matching ones."""

    rows: int
    example: object
    matches: list[tuple[list[Place], dict]]


def _parts(file: Path, schema: pa.Schema, keys: _Keys, by: str, columns: list[str]) -> Iterator[_Part]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    kind = _key_kind(schema.field(by).type)
    by_number = kind == "integer" or (kind == "text" and keys.integers)
    needed = list(dict.fromkeys([by, *(column for column in columns if column in schema.names)]))
    known = keys.of_number() if by_number else keys.of_text
    wanted = pa.array([key for key in known if well_formed(key) == key], pa.string())  # Arrow's text is UTF-8
    try:
        for batch in pq.ParquetFile(file).iter_batches(columns=needed):
            batch = _filterable(batch)
            values = batch.column(by)
            rows, example = len(values), values[0].as_py() if len(values) else None
            if kind != "binary" and kind == ("integer" if by_number else "text"):  # as texts they are equal: Arrow filters
                batch = batch.filter(pc.is_in(pc.cast(values, pa.string()), value_set=wanted))
            matches = []
            for row in batch.to_pylist():
                places = _places(known, row.pop(by) if by not in columns else row[by], by_number)
                if places:
                    matches.append((places, row))
            yield _Part(rows, example, matches)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise JoinError(f"parquet: {file} can't be read: {error}") from None


def _filterable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Arrow can't filter string views, so they are cast."""
    import pyarrow as pa

    columns = [column.cast(pa.string()) if pa.types.is_string_view(column.type) else column for column in batch.columns]
    return pa.record_batch(columns, names=batch.schema.names)


def _places(known: dict[str, list[Place]], value: object, by_number: bool) -> list[Place]:
    if value is None:
        return []
    if not isinstance(value, bytes):
        return known.get(_number(str(value)) if by_number else str(value), [])
    # Text, decoded like the tars' names, or the raw bytes of a hexadecimal key.
    return known.get(value.decode("utf-8", "surrogateescape")) or known.get(value.hex(), [])


def _number(text: str) -> str:
    """Digits without leading zeros; anything else unchanged."""
    return (text.lstrip("0") or "0") if text.isascii() and text.isdecimal() else text


# ---- the shards' side ------------------------------------------------------------------------------------------------


def _sample_keys(dataset: ShardDataset, by: str) -> _Keys:
    keys = _Keys(by)
    for shard, i in dataset.locations():
        try:
            sample = dataset.text(i)
        except SampleError:
            keys.without += 1
            continue
        keys.fields.update(sample.meta.keys())
        keys.add(sample.key if by == "key" else sample.meta.get(by), (shard, sample.key))
    return keys


def _check_match(keys: _Keys, example: object, least: float, samples: tuple[int, int], rows: tuple[int, int]) -> None:
    """JoinError if less than `least` of the samples or of the rows match; shows a key of each side."""
    for side, (matched, total) in (("samples", samples), ("rows of the parquet", rows)):
        if matched >= least * total and (matched or not least):
            continue
        if keys.of_text:
            own = f"the samples' {keys.by} looks like {next(iter(keys.of_text))!r}"
        else:
            own = f"no sample has a {keys.by} (their JSON has {', '.join(sorted(keys.fields)) or 'nothing'})"
        raise JoinError(
            printable(
                f"by: {matched} of {total} {side} match by {keys.by!r}: {own}, the parquet's like {example!r}. Join by another "
                f"column; if so few matches are expected, as with a part of a large set, pass least_match=0"
            )
        )
