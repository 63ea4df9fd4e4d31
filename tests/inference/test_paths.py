"""Paths in encode: checked before any work, same results in every format, nothing lost if a job ends early."""

import errno
import json
import os
import signal
import sys
import threading

import numpy as np
import pytest
import torch

from ov3fast import io
from ov3fast.data.skips import SkipWarning
from ov3fast.inference import caption, encode, encode_to_file, find_images, read_embeddings, write_embeddings
from ov3fast.io import check_writable

FORMATS = ("e.safetensors", "e.npz", "e.npy")


@pytest.fixture
def photos(folder, tmp_path):
    """Five valid pictures in a separate folder."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("p0.png", "p1.png", "p2.png", "p3.png", "p4.png"):
        (photos / name).write_bytes((folder / name).read_bytes())
    return photos


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_holds_what_encode_gives(model, photos, tmp_path, name):
    written = encode_to_file(model, photos, tmp_path / "new" / name, batch_size=2)
    expected = encode(model, photos, batch_size=2)
    found = read_embeddings(written.path)
    assert written.names == found.names == expected.names and found.about == expected.about
    assert torch.equal(found.pooled, expected.pooled)
    assert found.tokens is None if name == "e.npy" else torch.equal(found.tokens, expected.tokens)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted({name, "e.json"} if name == "e.npy" else {name})


def test_names_that_are_not_utf_8_are_alike_in_every_format(model, photos, tmp_path):
    odd = os.fsencode(photos) + b"/caf\xe9 \xff.png"
    with open(odd, "wb") as file:
        file.write((photos / "p0.png").read_bytes())
    found = [read_embeddings(encode_to_file(model, photos, tmp_path / name).path) for name in FORMATS]
    for one in found:
        assert one.names == found[0].names and b"caf\xe9 \xff.png" in [os.fsencode(name) for name in one.names]
    [json_text] = [path.read_bytes() for path in tmp_path.glob("e.json")]
    json_text.decode("ascii")


def test_npy_keeps_no_tokens_in_memory_or_on_disk(model, photos, tmp_path, monkeypatch):
    sizes = []
    write = write_embeddings

    def watched(path, embeddings):
        sizes.append(sum(p.stat().st_size for p in tmp_path.glob(".e.writing-*/*")))
        assert embeddings.tokens is None and isinstance(embeddings.pooled.numpy().base, np.ndarray | torch.Tensor | None)
        return write(path, embeddings)

    monkeypatch.setattr(sys.modules["ov3fast.inference.encode"], "write_embeddings", watched)
    encode_to_file(model, photos, tmp_path / "e.npy")
    assert sizes == [5 * 24 * 4]


# ---- checked before the work -----------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch, model):
    def fail(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.setattr(sys.modules["ov3fast.inference.encode"], "decoded", fail)


def test_outputs_are_refused_before_the_work(model, photos, tmp_path, no_work):
    (tmp_path / "keep.json").write_text(json.dumps({"names": "mine"}))
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").write_text("")
    for out, error, words in (
        ("x.txt", ValueError, "must end in .safetensors, .npz, .npy, .parquet"),
        ("folder.npz", OSError, "is a folder; give a file"),
        ("file/x.npz", OSError, "file is no folder"),
        ("keep.npy", FileExistsError, "keep.json, which holds something else"),
    ):
        with pytest.raises(error, match=words):
            encode_to_file(model, photos, tmp_path / out)
    with pytest.raises(OSError, match="nothing can be written in /proc"):
        encode_to_file(model, photos, "/proc/x.npz")
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        encode_to_file(model, photos, tmp_path / "x.npz", image_size=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.npz", "keep.json", "photos"]
    assert json.loads((tmp_path / "keep.json").read_text()) == {"names": "mine"}


def test_read_only_files_are_refused(tmp_path, monkeypatch):
    (tmp_path / "old.npz").write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, whom nothing stops
    with pytest.raises(PermissionError, match="out is read-only"):
        check_writable(tmp_path / "old.npz")


def test_ones_own_npy_is_written_again(model, photos, tmp_path):
    for _ in range(2):
        encode_to_file(model, photos, tmp_path / "e.npy")
    assert len(read_embeddings(tmp_path / "e.npy").names) == 5


def test_the_home_folder_is_meant_by_its_sign(model, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(photos)
    written = encode_to_file(model, "~/photos", "~/out/e.npz")
    assert written.path == tmp_path / "out" / "e.npz" and written.path.is_file()
    assert len(read_embeddings("~/out/e.npz").names) == 5 and not (photos / "~").exists()


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_symlinked_folders_are_followed_and_loops_end(photos, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(photos)
    (photos / "loop").symlink_to(photos)
    (photos / "up").symlink_to(tmp_path / "set")
    names = list(find_images(tmp_path / "set"))
    assert names == [f"link/p{i}.png" for i in range(5)]


def test_what_a_folder_holds_besides_is_counted_or_foreign(photos, model):
    (photos / "notes.txt").write_text("")
    (photos / "raw.HEIC").write_text("")
    (photos / "._p0.png").write_bytes(b"macOS")
    (photos / ".DS_Store").write_bytes(b"macOS")
    found = find_images(photos)
    assert len(found) == 5 and dict(found.left_out) == {".txt": 1, ".heic": 1}
    with pytest.warns(UserWarning, match=r"left out 2 files that are not images by their suffix \(1 .heic, 1 .txt\)"):
        encode(model, photos)


def test_a_dangling_link_is_named(photos, model):
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    with pytest.warns(SkipWarning, match="gone.png: unreadable_file"):
        assert encode(model, photos).skipped == {"gone.png": "unreadable_file"}


def test_an_error_of_any_kind_costs_one_image(photos, model, monkeypatch):
    module = sys.modules["ov3fast.inference.decoding"]
    read = module.read_image

    def odd(path, *arguments):
        if path.name == "p2.png":
            raise KeyError("a codec's own kind of error")
        return read(path, *arguments)

    monkeypatch.setattr(module, "read_image", odd)
    with pytest.warns(SkipWarning):
        found = encode(model, photos)
    assert len(found.names) == 4 and found.skipped == {"p2.png": "broken_image"}


# ---- a job that ends early -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_done_is_kept(model, photos, tmp_path, monkeypatch, name, error):
    before = encode_to_file(model, photos / "p4.png", tmp_path / name).path.read_bytes()
    batches = []

    def fail(inputs):
        if batches:
            raise error
        batches.append(len(inputs))
        return encode_(inputs)

    encode_ = model.encode
    monkeypatch.setattr(model, "encode", fail)
    with pytest.warns(UserWarning, match=r"stopped after 2 of 5 images; they are in .*e.partial"), pytest.raises(error):
        encode_to_file(model, photos, tmp_path / name, batch_size=2)
    monkeypatch.undo()
    assert (tmp_path / name).read_bytes() == before
    partial = read_embeddings((tmp_path / name).with_name(name.replace("e.", "e.partial.")))
    assert partial.names == ["p0.png", "p1.png"] and torch.equal(partial.pooled, encode(model, photos, batch_size=2).pooled[:2])
    assert not [p for p in tmp_path.iterdir() if "writing" in p.name]


def test_no_thread_is_left_behind(model, photos, monkeypatch):
    before = threading.active_count()
    monkeypatch.setattr(model, "encode", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        encode(model, photos, batch_size=1)
    assert threading.active_count() == before


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_is_one_line_and_leaves_nothing(model, photos, tmp_path, monkeypatch, name):
    class Full(type(tmp_path)):
        def touch(self, *_, **__):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io, "Path", Full)
    with pytest.raises(OSError, match="the disk is full; nothing was changed"):
        encode_to_file(model, photos, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kilobytes", [4, 8, 12, 24])
def test_a_file_system_that_is_really_full(model, photos, small_disk, monkeypatch, name, kilobytes):
    """The disk fills up while writing the rows, the final file, and its metadata, in turn."""
    encode_ = model.encode
    monkeypatch.setattr(
        model, "encode", lambda inputs: [value.repeat(1, *[30] * (value.ndim - 1)) for value in encode_(inputs)]
    )
    disk = small_disk(kilobytes)
    with pytest.raises(OSError, match="the disk is full.*/disk/e") as caught:
        encode_to_file(model, photos, disk / name)
    assert caught.value.errno == errno.ENOSPC and list(disk.iterdir()) == []


# ---- captions --------------------------------------------------------------------------------------------------------


def test_captions_are_the_models_own(model, folder):
    found = list(caption(model, folder, batch_size=3))
    assert [one.name for one in found if one.caption is None] == ["p0b.png", "p3b.jpg"]
    assert found[1].name == "p0.png" and found[1].caption == next(caption(model, folder / "p0.png")).caption
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        caption(model, folder, beams=0)
