"""From what a user names (a folder, a tar, a pattern, an index, a list of these) to tar files and their sample counts.

Nothing in a folder is ignored silently: archives without a complete sample, archives that macOS made, compressed archives, and those
missing from the folder's index are counted by reason.
"""

from __future__ import annotations

import glob
import json
import os
import re
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ov3fast.data import tar_index
from ov3fast.data.indexed_tar import OpenShard
from ov3fast.data.skips import DataError, SkipWarning, Tally, printable
from ov3fast.data.tar_members import is_foreign
from ov3fast.data.urls import Url, is_url

INDEX = "index.json"
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


@dataclass(frozen=True)
class Shard:
    """A tar file and its number of samples, from the index or, without one, from scanning the tar."""

    path: Path | Url
    samples: int
    truncated: bool = False
    """Known to be truncated."""
    size: int | None = None
    """In bytes, if the index has it."""

    def stamp(self) -> tuple[str, int, int, int]:
        """(path, samples, bytes, modification time in ns or 0 for a URL), which changes with the file."""
        if isinstance(self.path, Url):
            return str(self.path), self.samples, self.size or 0, 0
        status = self.path.stat()
        return str(self.path), self.samples, status.st_size, status.st_mtime_ns


@dataclass
class FoundShards:
    """Tars in order, and what was left out."""

    shards: list[Shard] = field(default_factory=list)
    left_out: Tally = field(default_factory=Tally)
    uncounted: int = 0
    """Samples known to be lost to truncations that no index counts, so that they have no number in the set."""
    looked_into: set[Path | Url] = field(default_factory=set)
    """Tars that were scanned; the others are taken from the index."""


def find_shards(shards: str | Path | Sequence[str | Path]) -> list[Shard]:
    """The tars of a folder (from its `index.json` if there is one), a tar, a glob pattern (`*.tar`), a brace pattern
    (`{00000..00003}.tar`), a wids index file, or a list of these; "~" is expanded. A folder, a tar, an index or a brace
    pattern may also be a URL that fsspec reads.

    Warns of what is left out. Raises FileNotFoundError if a path is missing and DataError if no tar has a sample.
    """
    found = find_tars(shards)
    warn_left_out(shards, found.left_out)
    return found.shards


def warn_left_out(shards: Any, left_out: Tally) -> None:
    """Issues one warning for the whole set."""
    if left_out:
        named = [str(item) for item in ([shards] if isinstance(shards, str | Path) else shards)]
        place = named[0] if len(named) == 1 else f"{named[0]} and {len(named) - 1} more"
        warnings.warn(printable(f"left out of {place}: {left_out}"), SkipWarning, stacklevel=3)


def find_tars(shards: str | Path | Sequence[str | Path]) -> FoundShards:
    """As find_shards, with what was left out instead of a warning."""
    found = FoundShards()
    items = [shards] if isinstance(shards, str | Path) else list(shards)
    if not items:
        raise DataError("shards: got an empty list; it takes tar files, folders, glob or brace patterns")
    for item in items:
        for expanded in _expanded(item):
            _find(expanded, found)
    if not found.shards:
        named = ", ".join(str(item) for item in items[:3])
        if found.left_out:
            raise DataError(printable(f"shards: {named} holds no whole sample: {found.left_out}"))
        raise DataError(f"shards: there is no sample in {named}")
    return found


def _expanded(item: str | Path | Url) -> list[Path | Url]:
    """The paths that a pattern expands to."""
    if is_url(item):
        path: Path | Url = Url(str(item))
        text = str(path)
        if glob.has_magic(text):
            raise DataError(
                f"shards: patterns with * can't be listed at a URL, got {text}; name the folder, or use {{00000..00003}}"
            )
        if "{" not in text:
            return [path]
    else:
        path = Path(item).expanduser()
        if path.exists():
            return [path]
        text = str(path)
    if re.search(r"\{[^{}]*(,|\.\.)[^{}]*\}", text):
        from braceexpand import UnbalancedBracesError, braceexpand

        try:
            return [match for part in braceexpand(text) for match in _expanded(part)]
        except UnbalancedBracesError:
            raise DataError(f"shards: the braces in {text} don't match") from None
    if glob.has_magic(text):
        paths = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        if not paths:
            raise DataError(f"shards: no file matches {text}")
        return paths
    raise FileNotFoundError(f"shards: there is no file or folder {path}")


def _find(path: Path | Url, found: FoundShards) -> None:
    if isinstance(path, Url):
        _find_url(path, found)
        return
    if path.is_dir() and (path / INDEX).exists():
        path = path / INDEX
    if path.suffix == ".json":
        _from_index(path, found)
    elif path.is_dir():
        tars = tars_in(path, found.left_out)
        if not tars and not found.left_out:
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            raise DataError(f"shards: the folder {path} holds no .tar file (it holds {inside}); name a folder of tar shards")
        for tar in tars:
            _look_into(tar, found)
    elif is_foreign(path.name):
        found.left_out.add("foreign_archive", str(path))
    else:
        _look_into(path, found)


def _find_url(url: Url, found: FoundShards) -> None:
    if url.suffix == ".tar":
        _by_its_index(url, found)
        return
    index = url if url.suffix == ".json" else url / INDEX
    try:
        content = index.read_bytes()
    except FileNotFoundError:
        if index is url:
            raise FileNotFoundError(f"shards: there is no index {url}") from None
        tars = [name for name in url.names() if name.endswith(".tar") and not is_foreign(name)]
        if not tars:
            raise DataError(f"shards: {url} holds neither {INDEX} nor a .tar file") from None
        for name in tars:
            _by_its_index(url / name, found)
        return
    for name, samples, entry in _entries(index, content):
        if samples:
            found.shards.append(Shard(index.parent / name, samples, bool(entry.get("truncated")), entry.get("filesize")))


def _by_its_index(url: Url, found: FoundShards) -> None:
    """Adds a tar behind a URL from its own index; it is not scanned to count its samples."""
    content = tar_index.read(url)
    counted = None if content is None else tar_index.count(content)
    if counted is None:
        raise DataError(f"shards: {url} has no index beside it; make one with `ov3fast data index {url.parent}`")
    if counted[0]:
        found.shards.append(Shard(url, counted[0], size=counted[1]))


def tars_to_index(shards: str | Path | Sequence[str | Path]) -> list[tuple[Path | Url | None, list[Path | Url]]]:
    """(folder, its tars) for each folder, (None, [tar]) for each single tar. DataError if there is no tar at all."""
    named: list[tuple[Path | Url | None, list[Path | Url]]] = []
    for item in [shards] if isinstance(shards, str | Path) else list(shards):
        for path in _expanded(item):
            if path.suffix.lower() == ".tar":
                named.append((None, [path]))
            elif isinstance(path, Url):
                named.append((path, [path / name for name in path.names() if name.endswith(".tar") and not is_foreign(name)]))
            elif path.is_dir():
                named.append((path, [*tars_in(path, Tally())]))
            else:
                raise DataError(f"shards: {path} is neither a folder nor a tar; `ov3fast data index` takes those")
    if not any(tars for _, tars in named):
        raise DataError(
            f"shards: there is no .tar file in {', '.join(map(str, [shards] if isinstance(shards, str | Path) else shards))}"
        )
    return named


def tars_in(folder: Path, left_out: Tally, listed: Set[str] = frozenset()) -> list[Path]:
    """All tars of a folder except those whose names are in `listed`."""
    tars = []
    for name in sorted(os.listdir(folder)):
        if name in listed:
            continue
        path = folder / name
        if _COMPRESSED.search(path.name):
            left_out.add("compressed_tar", str(path))
        elif path.suffix.lower() == ".tar":
            if is_foreign(path.name):
                left_out.add("foreign_archive", str(path))
            elif path.is_dir():
                left_out.add("folder_named_tar", str(path))
            elif not path.name.startswith("."):
                tars.append(path)
            else:
                left_out.add("hidden_archive", str(path))
    return tars


def _look_into(path: Path, found: FoundShards, listed: int | None = None, cut_before: bool = False) -> None:
    """Scan a tar and add it, with the number of samples that it holds or that its index lists.

    cut_before: the tar was already truncated when the index was written, so the index lists only what is left.
    """
    shard = OpenShard(path)
    shard.close()
    found.looked_into.add(path)
    found.left_out.merge(shard.left_out, str(path))
    whole = len(shard.samples)
    if listed is None and shard.problem:
        reason, _, detail = shard.problem.partition(": ")
        found.left_out.add(reason, f"{path}: {detail}")
        return
    if shard.cut is not None:
        lists = "" if listed is None else f"; {INDEX} lists {listed}"
        found.left_out.add("truncated_tar", f"{path} ends after {whole} whole samples{lists}")
        found.uncounted += shard.lost if listed is None or cut_before else 0
    if listed is not None and whole > listed:
        found.left_out.add("not_in_index", f"{path}; write the index again with write_index", whole - listed)
    samples = whole if listed is None else listed
    if samples:
        found.shards.append(Shard(path, samples, shard.cut is not None))


def _from_index(path: Path, found: FoundShards) -> None:
    sizes = _sizes(path.parent)
    listed = set()
    for url, samples, entry in _entries(path, path.read_bytes()):
        tar = path.parent / url
        listed.add(url)
        try:
            size = sizes[url] if url in sizes else tar.stat().st_size
        except OSError:
            raise FileNotFoundError(f"shards: {path} lists {url}, which does not exist") from None
        if is_foreign(tar.name):
            found.left_out.add("foreign_archive", str(tar))
        elif entry.get("filesize") == size and not entry.get("truncated"):
            if samples:
                found.shards.append(Shard(tar, samples, size=size))
        else:
            _look_into(tar, found, samples, bool(entry.get("truncated")))
    if path.name == INDEX:
        _unlisted(path.parent, listed, found.left_out)


def _entries(path: Path | Url, content: bytes) -> list[tuple[str, int, dict[str, Any]]]:
    """(tar, samples, the whole entry) of each shard in a wids index."""
    try:
        index = json.loads(content.decode("utf-8"))
        entries = [(str(entry["url"]), int(entry["nsamples"]), entry) for entry in index.get("shardlist", [])]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"shards: the index {path} can't be read ({type(error).__name__}: {error}); write it again with write_index, or delete it"
        ) from None
    if not entries:
        raise DataError(f"shards: the index {path} lists no shard")
    return entries


def _sizes(folder: Path) -> dict[str, int]:
    """Name -> size in bytes of the tars in a folder; a hundred thousand take a second."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.name.endswith(".tar") and entry.is_file()}


def _unlisted(folder: Path, listed: set[str], left_out: Tally) -> None:
    """Records the tars of a folder that its index lacks."""
    elsewhere = {(folder / url).resolve() for url in listed if os.path.dirname(url)}
    for tar in tars_in(folder, left_out, listed):
        if not elsewhere or tar.resolve() not in elsewhere:
            left_out.add("not_in_index", f"{tar}; write the index again with write_index")
