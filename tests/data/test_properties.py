"""Random archives and images: never a crash, never a silent loss.

Samples in = samples used + samples counted as skipped, for the index, `data check`, the training loader, the evaluation and `encode`'s
reader.
"""

import io
import json
import posixpath
import struct
import tarfile
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ov3fast.data import (
    DataConfig,
    DataError,
    Loader,
    SampleError,
    ShardDataset,
    SkipWarning,
    SourceConfig,
    summarise,
    write_index,
)
from ov3fast.data.images import IMAGE_SUFFIXES, ImageError, decode_image
from ov3fast.data.preprocess import read_image
from ov3fast.data.tar_members import read_contents
from ov3fast.evaluation.pictures import read_pictures

pytestmark = pytest.mark.filterwarnings("ignore::ov3fast.data.skips.SkipWarning")

RANDOM = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FOLDERS = settings(RANDOM, max_examples=40)  # each example goes through every reader of a folder
SAMPLE_REASONS = {
    "broken_image", "truncated_image", "too_large", "unsupported_depth", "unsupported_format", "missing_image", "missing_caption",
    "broken_json", "truncated_tar", "unsorted_tar",
}  # fmt: skip
IMAGE_REASONS = {"broken_image", "truncated_image", "too_large", "unsupported_depth", "unsupported_format"}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = encoded(Image.new("RGB", (6, 4), (9, 8, 7)), "JPEG")

# ---- archives ----------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", "d/c", "x" * 120, "é", b"\xff\xe9".decode("utf-8", "surrogateescape"), "new\nline", "./e"])
SUFFIXES = st.sampled_from([".jpg", ".JPG", ".png", ".txt", ".json", ".cls", ".seg.png", ""])
FOREIGN = st.sampled_from(
    ["._a.jpg", "d/._c.txt", ".DS_Store", "__MACOSX/a.jpg", "__MACOSX/d/._c.jpg", "Thumbs.db", "d/desktop.ini"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=3) | st.sampled_from(["words", "\ud83d", "\ude00 x", " "]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "caption", "captions", "meta", "url"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
CONTENTS = st.one_of(
    st.just(GOOD),
    st.just(GOOD[:-20]),
    st.binary(max_size=40),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.just(b"words"),
)
TYPES = st.sampled_from(
    [tarfile.REGTYPE] * 12 + [tarfile.AREGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE]
)
NAMES = st.builds(str.__add__, KEYS, SUFFIXES) | FOREIGN
MEMBERS = st.lists(st.tuples(NAMES, CONTENTS, TYPES, NAMES), max_size=14)
KINDS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def tar_of(members, kind) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, errors="surrogateescape") as tar:
        for name, content, type_, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, link
            info.size = len(content) if type_ in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # ustar has no room for this name
                continue
    return buffer.getvalue()


def keys_in(data: bytes) -> set[str]:
    """The keys of an archive's samples, by Python's tarfile."""
    keys = set()
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape", encoding="utf-8") as tar:
        seen: set[str] = set()
        for info in tar:
            folder, slash, file = info.name.rpartition("/")
            linked = info.linkname if info.islnk() else posixpath.normpath(posixpath.join(folder, info.linkname))
            if not (info.isreg() or ((info.islnk() or info.issym()) and (linked in seen or f"./{linked}" in seen))):
                continue
            seen.add(info.name)
            stem, dot, suffix = file.partition(".")
            foreign = (
                file.startswith("._") or file in (".DS_Store", "Thumbs.db", "desktop.ini") or "__MACOSX" in folder.split("/")
            )
            if stem and suffix and not foreign:
                keys.add(folder + slash + stem)
    return keys


def keys_of(dataset: ShardDataset) -> set[str]:
    """The keys of all samples, readable or not."""
    keys = set()
    for i in range(len(dataset)):
        try:
            keys.add(dataset[i].key)
        except SampleError as error:
            assert error.skip.reason in SAMPLE_REASONS, error.skip
            keys.add(error.skip.key)
    return keys


def use(folder: Path, dataset: ShardDataset) -> None:
    """Every reader of a folder accounts for all of its samples."""
    summary = summarise(folder, workers=2)
    assert summary.samples == len(dataset) == summary.readable + summary.skipped
    assert set(summary.reasons) <= SAMPLE_REASONS
    str(summary).encode()
    source = SourceConfig(str(folder), captions=(("txt", 0.5), ("caption", 0.5)))
    for cache in (False, True):
        try:
            data = Loader(DataConfig(sources=(source,), skip_budget=1.0, cache_images=cache), image_size=8, batch_size=2)
            for batch in data.batches(stop=2):
                assert all(text.strip() and text.encode() for text in (*batch.text, *batch.captions))
        except DataError:  # none is usable, or none has these keys
            continue
        if cache:
            known = len(data.store.skipped())
            assert len(data.usable()) + known == len(dataset)
            assert data.skips.counts.total() == known + data.store.uncounted
    try:
        pictures = read_pictures(folder, 8, skip_budget=1.0)
    except DataError:
        return
    assert len(pictures) + sum(pictures.skipped.values()) == len(dataset) + dataset.uncounted
    assert all(text == "" or text.encode() for text in pictures.texts())


@FOLDERS
@given(MEMBERS, KINDS, st.none() | st.floats(0, 1), st.sampled_from(["none", "before", "after"]))
def test_any_archive(members, kind, cut, indexed):
    data = tar_of(members, kind)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SkipWarning)
        folder = Path(name)
        (folder / "._0.tar").write_bytes(b"x")
        (folder / "0.tar").write_bytes(data)
        whole = keys_in(data)
        before = indexed == "before" and len(whole) > 0
        if before:
            write_index(folder)
        if cut is not None:
            data = data[: int(cut * len(data))]
            (folder / "0.tar").write_bytes(data)
        try:
            if indexed == "after":
                write_index(folder)
            dataset = ShardDataset(folder)
        except DataError as error:
            assert not whole or cut is not None, error
            return
        keys = keys_of(dataset)
        assert dataset.left_out.counts["foreign_archive"] == 1
        assert any("foreign_archive" in str(warning.message) for warning in caught)
        if before:
            assert len(dataset) == len(whole)
        elif cut is None:
            assert keys == whole and dataset.uncounted == 0
        else:
            assert keys <= whole and (keys == whole or dataset.left_out.counts["truncated_tar"] == 1 == dataset.uncounted)
        use(folder, dataset)


@pytest.mark.parametrize(
    "kind, stem",
    [(tarfile.USTAR_FORMAT, "a"), (tarfile.PAX_FORMAT, "é" * 60), (tarfile.GNU_FORMAT, "é" * 60)],
    ids=["ustar", "pax", "gnu"],
)
def test_a_small_tar_cut_at_every_offset(tmp_path, kind, stem):
    """Every sample before the cut is found, and a cut archive is distinguished from a complete one. Long names have extra headers."""
    picture = encoded(Image.new("L", (1, 1)), "GIF")
    files = (("gif", picture), ("txt", b"words"))
    data = tar_of([(f"{stem}{i}.{suffix}", content, tarfile.REGTYPE, "") for i in range(2) for suffix, content in files], kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = [info.offset_data + info.size for info in tar if info.name.endswith(".txt")]
    end_mark = data.rindex(b"words") // 512 * 512 + 1024  # one block of zeros ends an archive
    whole = read_contents(data).members
    for cut in range(end_mark + 600):
        contents = read_contents(data[:cut])
        assert contents.members == [member for member in whole if member.start + member.size <= cut]
        assert (contents.cut is not None) == (cut < end_mark) and not contents.left_out
    path = tmp_path / "0.tar"
    for cut in range(0, end_mark + 600, 23):
        path.write_bytes(data[:cut])
        expected = sum(end <= cut for end in ends)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SkipWarning)
            try:
                dataset = ShardDataset(tmp_path)
            except DataError as error:
                assert expected == 0 and ("no_tar" in str(error) or "empty_file" in str(error)), cut
                continue
        captions = [dataset.text(i).captions for i in range(len(dataset))]
        # Without a second sample nothing shows that the first one lost its text, so it counts as missing_caption.
        assert captions == [{"txt": "words"}] * expected or (captions == [{}] and expected == 0), cut
        assert (dataset.left_out.counts["truncated_tar"] == 1 == dataset.uncounted) == (cut < end_mark), cut


@RANDOM
@given(st.binary(max_size=3000))
def test_any_bytes_named_tar(data):
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipWarning)
        (Path(name) / "0.tar").write_bytes(data)
        with pytest.raises(DataError):
            ShardDataset(name)


@FOLDERS
@given(MEMBERS.filter(bool), KINDS, st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_an_archive(members, kind, damage):
    data = bytearray(tar_of(members, kind))
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipWarning)
        (Path(name) / "0.tar").write_bytes(data)
        try:
            dataset = ShardDataset(name)
        except DataError:
            return
        keys_of(dataset)
        use(Path(name), dataset)


# ---- images ------------------------------------------------------------------------------------------------------------

EXIF = st.one_of(
    st.none(), st.binary(max_size=60), st.binary(max_size=30).map(lambda tail: b"Exif\0\0" + tail),
    st.integers(0, 300).map(lambda value: exif_block(value)), st.tuples(st.integers(1, 8), st.integers(0, 40)).map(lambda of: exif_block(of[0])[: of[1]]),
)  # fmt: skip


def exif_block(orientation: int) -> bytes:
    block = Image.Exif()
    block[274] = orientation
    return block.tobytes()


MODES = {
    "PNG": ("1", "L", "LA", "I;16", "P", "RGB", "RGBA"), "JPEG": ("L", "RGB", "CMYK"), "TIFF": ("1", "L", "LA", "I;16", "I", "F", "P", "RGB", "RGBA", "CMYK", "LAB", "YCbCr"),
    "WEBP": ("RGB", "RGBA"), "GIF": ("1", "L", "P"), "BMP": ("1", "L", "P", "RGB"), "PPM": ("1", "L", "RGB", "I;16"),
}  # fmt: skip


@st.composite
def images(draw) -> tuple[bytes, tuple[int, int]]:
    """(file, size): encoded images of every mode and depth with random EXIF blocks."""
    kind = draw(st.sampled_from(sorted(MODES)))
    mode, size = draw(st.sampled_from(MODES[kind])), (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    bytes_a_pixel = {"I;16": 2, "I": 4, "F": 4, "LA": 2, "RGB": 3, "LAB": 3, "YCbCr": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    if mode == "F":
        image = Image.fromarray(rng.random(size[::-1], np.float32) * draw(st.sampled_from([1, 255, np.nan])))
    elif mode == "1":
        image = Image.fromarray(rng.integers(0, 2, size[::-1]).astype(bool))
    else:
        image = Image.frombytes(mode, size, rng.bytes(size[0] * size[1] * bytes_a_pixel))
    if mode == "P":
        image.putpalette(rng.bytes(768))
    options = {}
    exif = draw(EXIF)
    if exif is not None and kind in ("PNG", "JPEG", "WEBP"):
        options["exif"] = exif
    if mode in ("L", "P") and kind in ("PNG", "GIF") and draw(st.booleans()):
        options["transparency"] = draw(st.integers(0, 255))
    return encoded(image, kind, **options), size


@RANDOM
@given(images())
def test_any_whole_image_is_read_or_named_by_its_depth(drawn):
    data, size = drawn
    try:
        image = decode_image(data)
    except ImageError as error:
        assert error.reason == "unsupported_depth" or "LAB" in str(error), error
        return
    assert image.mode in ("RGB", "RGBA") and image.size in (size, size[::-1]) and not image.info


@FOLDERS
@given(images(), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4), st.floats(0, 1.5))
def test_any_damaged_image_is_the_same_in_files_and_shards(drawn, damage, cut):
    data = bytearray(drawn[0])
    for place, value in damage:
        data[int(place * (len(data) - 1))] = value
    data = bytes(data[: int(cut * len(data))])
    with tempfile.TemporaryDirectory() as name:
        file, tar = Path(name) / "a.png", Path(name) / "0.tar"
        file.write_bytes(data)
        tar.write_bytes(
            tar_of([("a.png", data, tarfile.REGTYPE, ""), ("a.txt", b"words", tarfile.REGTYPE, "")], tarfile.USTAR_FORMAT)
        )
        dataset = ShardDataset(tar)
        try:
            image = read_image(file)
        except ImageError as error:
            assert error.reason in IMAGE_REASONS
            with pytest.raises(SampleError) as same:
                dataset[0]
            assert same.value.skip.reason == error.reason
        else:
            assert np.array_equal(np.asarray(image), np.asarray(dataset[0].image))
        use(Path(name), dataset)


@RANDOM
@given(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff\xe1", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"BM", b"P6 "]))  # fmt: skip
def test_any_bytes_named_image(data, magic):
    try:
        image = decode_image(magic + data)
    except ImageError as error:
        assert error.reason in IMAGE_REASONS
    else:
        assert image.mode in ("RGB", "RGBA") and min(image.size) > 0


@RANDOM
@given(st.sampled_from([0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE]), st.sampled_from([b"", b"Exif\0\0", b"JFIF\0", b"ICC_PROFILE\0", b"MPF\0", b"Adobe", b"Photoshop 3.0\0"]), st.binary(max_size=60))  # fmt: skip
def test_no_segment_costs_a_jpeg_its_pixels(marker, name, payload):
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(name + payload) + 2) + name + payload
    image = decode_image(GOOD[:2] + segment + GOOD[2:])
    assert image.size in ((6, 4), (4, 6)) and image.mode == "RGB"


def test_the_list_of_suffixes_is_of_what_is_read():
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)
