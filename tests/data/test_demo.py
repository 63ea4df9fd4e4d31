"""The demo builder over small fake packages; no network and no real package."""

import errno
import importlib.util
import json
import os
import struct
from pathlib import Path

import pytest

from ov3fast.data import DataError, Loader, ShardDataset
from ov3fast.data.assets import ASSETS, AssetError, MissingClient
from ov3fast.data.config import DataConfig, SourceConfig
from ov3fast.data.demo import build_demo, sources
from ov3fast.data.demo.archives import members, rcc_files
from ov3fast.data.demo.concepts import Concept, photo_captions, split_concepts, stamp_captions

_spec = importlib.util.spec_from_file_location("fake_packages", Path(__file__).with_name("packages.py"))
packages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(packages)


@pytest.fixture(scope="session")
def fakes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    return {name: packages.build(name, folder) for name in ASSETS}


@pytest.fixture
def build(fakes, tmp_path):
    """build(missing={...}) -> DemoSet; `build.fetched` are the names that were fetched."""

    def run(missing=(), failing=(), **options):
        def fetch(name, cache):
            run.fetched.append(name)
            if ASSETS[name].client in missing:
                raise MissingClient(f"{ASSETS[name].source}: the program is not on this machine")
            if name in failing:
                raise AssetError(f"{ASSETS[name].source}: another version")
            return fakes[name]

        return build_demo(tmp_path, progress=False, fetch=fetch, held_out=4, **options)

    run.fetched = []
    return run


def keys(folder):
    dataset = ShardDataset(folder)
    return [dataset.text(i).key for i in range(len(dataset))]


def test_the_whole_set(build, tmp_path):
    demo = build(workers=2)
    assert demo.root == tmp_path / "demo" and not demo.left_out
    unseen, style, train = ([ShardDataset(p)[i] for i in range(len(ShardDataset(p)))] for p in
                            (demo.pairs_unseen, demo.pairs_style, demo.pairs_train))  # fmt: skip
    concept = lambda samples: {s.meta["concept"] for s in samples}  # noqa: E731
    # 4 concepts are unseen in all styles, 4 are seen only in the other styles
    assert len(concept(unseen)) == len(concept(style)) == 4
    assert not concept(unseen) & (concept(train) | concept(style)) and concept(style) < concept(train)
    assert {s.meta["style"] for s in style} == {"noto"}
    assert not {s.key for s in style} & {s.key for s in train}
    assert {s.meta["style"] for s in train} == {"fluent", "twitter", "noto"}
    total = len(unseen) + len(style) + len(train)
    assert total == 32 + len([i for i in range(32) if i % 6]) + 32  # fluent (heart once, no skin tone), twitter, noto
    for sample in (*unseen, *style, *train):
        assert max(sample.image.size) <= 128 and set(sample.captions) == {"name", "sentence", "caption"}
        assert sample.captions["name"] in sample.captions["sentence"] in sample.captions["caption"]
        assert sample.meta["licence"] and sample.meta["source"] and "tone" not in sample.captions["name"]
    photos = [ShardDataset(demo.photos_train)[i] for i in range(len(ShardDataset(demo.photos_train)))]
    assert [s.key for s in photos[:4]] == ["gcompris-erase_gorilla0", "gcompris-erase_gorilla1", "gcompris-erase_gorilla2",
                                           "gcompris-categorization_tools_redHammer"]  # fmt: skip
    assert {s.meta["style"] for s in photos} == {"photo", "stamp"} and len(photos) == 4 + 3
    [pie] = [s for s in photos if s.key == "stamp-food_pie"]
    assert pie.captions == {"name": "pie", "sentence": "pie, food", "caption": "a picture of some pie, food"}
    assert pie.image.mode == "RGBA"
    assert len({s.meta["concept"] for s in photos if "frog" in s.key}) == 1
    assert ShardDataset(demo.photos_train)[0].image.size == (320, 256)
    assert len(keys(demo.photos_heldout)) == 2 + 8
    assert sorted(p.name for p in demo.fashion_mnist.iterdir()) == ["a.gz", "b.gz"]
    assert {p.name: p.read_bytes() for p in demo.lpips.iterdir()} == {
        "squeezenet_weights.pkl": b"weights",
        "squeeze.pth": b"heads",
    }


def test_the_manifest_tells_licences_sources_and_counts(build):
    manifest = json.loads((build().root / "manifest.json").read_text())
    assert manifest["assets"].keys() == ASSETS.keys() - {"matplotlib"}
    for name, entry in manifest["assets"].items():
        assert entry["sha256"] == ASSETS[name].sha256 and entry["licence"] and entry["source"]
    part = manifest["parts"]["pairs-train"]
    assert part["held_out_style"] == "noto" and part["samples"] == sum(part["styles"].values())
    assert manifest["left_out"] == {}


def test_a_second_call_is_served_from_the_cache(build):
    first = build()
    build.fetched.clear()
    assert build() == first and build.fetched == []


def test_an_interrupted_build_goes_on(build, monkeypatch):
    from ov3fast.data.demo import build as module

    write, done = module.write_shards, []

    def interrupted(samples, folder, **options):
        if len(done) == 2:
            next(iter(samples))
            raise KeyboardInterrupt
        done.append(folder.name)
        return write(samples, folder, **options)

    monkeypatch.setattr(module, "write_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build()
    monkeypatch.setattr(
        module, "write_shards", lambda samples, folder, **o: done.append(folder.name) or write(samples, folder, **o)
    )
    demo = build()
    assert done == ["pairs-train", "pairs-style", "pairs-unseen", "photos-train", "photos-heldout"]
    assert demo.pairs_train and demo.photos_heldout


@pytest.mark.parametrize("kilobytes", [8, 40, 120])
def test_a_full_disk_is_one_line_and_a_larger_one_goes_on(fakes, small_disk, kilobytes):
    def build(cache):
        return build_demo(cache, progress=False, fetch=lambda name, cache: fakes[name], held_out=4)

    disk = small_disk(kilobytes)
    with pytest.raises(OSError, match="the disk is full.*/disk") as caught:
        build(disk)
    assert caught.value.errno == errno.ENOSPC
    assert not list(disk.rglob(".*")) and not (disk / "demo" / "manifest.json").exists()
    assert build(small_disk(10_000)).pairs_train


def test_a_set_that_is_there_needs_no_writing(build, monkeypatch):
    first = build()
    monkeypatch.setattr("ov3fast.data.demo.build.check_writable_folder", lambda *_: pytest.fail("it was asked for"))
    assert build() == first


def test_what_a_killed_build_left_is_cleared_after_an_hour(build, tmp_path):
    old, young = tmp_path / "demo/.pairs-train.writing-1", tmp_path / "demo/.pairs-train.writing-2"
    for leftover in (old, young):
        leftover.mkdir(parents=True)
        (leftover / "00000.tar").touch()
    os.utime(old, (1, 1))
    build()
    assert not old.exists() and young.exists()


def test_threads_change_no_bit(build, tmp_path):
    first = {p.relative_to(tmp_path): p.read_bytes() for p in build(workers=1).root.rglob("*.tar")}
    (tmp_path / "demo").rename(tmp_path / "old")
    assert first == {p.relative_to(tmp_path): p.read_bytes() for p in build(workers=3).root.rglob("*.tar")}


def test_without_apt_two_emoji_styles_remain(build):
    demo = build(missing={"apt"})
    assert set(demo.left_out) == {"noto", "tuxpaint", "gcompris", "fashion-mnist"}
    assert "apt tuxpaint-stamps-default 2022.06.04-1: the program is not on this machine" in str(demo)
    assert {ShardDataset(demo.pairs_style).text(i).meta["style"] for i in range(4)} == {"twitter"}
    assert demo.fashion_mnist is None and len(keys(demo.photos_train)) == 6 and len(keys(demo.photos_heldout)) == 2 + 2
    assert not set(keys(demo.photos_train)) & set(keys(demo.photos_heldout))


def test_pip_alone_suffices(build, monkeypatch):
    """Symbols drawn in several fonts; here letters, since the test's font has no symbols."""
    monkeypatch.setattr(sources, "SYMBOLS", range(0x41, 0x5B))
    demo = build(missing={"npm", "apt"})
    assert set(demo.left_out) == {"fluent", "twitter", "noto", "tuxpaint", "gcompris", "fashion-mnist"}
    train = ShardDataset(demo.pairs_train)
    assert len(train) + len(ShardDataset(demo.pairs_style)) + len(ShardDataset(demo.pairs_unseen)) == 3 * 26
    sample = train[0]
    assert sample.captions["caption"].endswith(f"symbol of {sample.captions['name']}") and sample.image.mode == "RGBA"
    data = DataConfig(
        sources=(
            SourceConfig(str(demo.pairs_train), fraction=12, group_by="concept", views=2),
            SourceConfig(str(demo.photos_train), fraction=4, paired=False),
        ),
        cache_images=True,
    )
    batch = Loader(data, image_size=16, batch_size=16).batch(0)
    assert batch.images.shape == (16, 3, 16, 16) and batch.images.std() > 0.2 and len(batch.text) == 6


def test_only_one_emoji_style_is_not_enough(build, monkeypatch):
    monkeypatch.setattr(sources, "SYMBOLS", range(0x41, 0x5B))
    demo = build(missing={"npm"})
    assert "a single emoji style is left" in demo.left_out["noto"]
    assert {ShardDataset(demo.pairs_style).text(i).meta["source"] for i in range(4)} == {"pip matplotlib 3.10.7"}
    assert "stamp-animals_frog" in keys(demo.photos_train)


def test_names_come_from_twitter_without_the_emoji_package(build):
    demo = build(failing={"emoji"})
    assert "emoji" in demo.left_out
    dataset = ShardDataset(demo.pairs_unseen)
    assert all(dataset.text(i).captions["name"] in packages.EMOJI.values() for i in range(len(dataset)))


def test_clients_that_are_not_asked_for_are_left_out_and_can_come_later(build, monkeypatch):
    monkeypatch.setattr(sources, "SYMBOLS", range(0x41, 0x5B))
    demo = build(clients=("pip",))
    assert "the client apt was not asked for" in demo.left_out["gcompris"] and "gcompris" not in build.fetched
    assert not build(clients=("pip", "npm", "apt")).left_out
    with pytest.raises(ValueError, match="clients: got 'conda'; it takes pip, npm, apt"):
        build(clients=("conda",))


def test_refresh_tries_again_what_was_left_out(build):
    demo = build(missing={"apt"})
    unseen = (demo.pairs_unseen / "00000.tar").read_bytes()
    assert build().left_out and not build(refresh=True).left_out
    assert (demo.pairs_unseen / "00000.tar").read_bytes() != unseen  # with the third style


def test_no_client_at_all_is_an_error_with_the_reasons(build):
    with pytest.raises(
        DataError, match=r"the demo set has no pairs-train: .*pip emoji 2\.16\.0: the program is not on this machine"
    ):
        build(missing={"pip", "npm", "apt"})


# ---- archives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2, 3])
def test_resource_bundles_of_all_versions(version):
    files = {"/a/b/one.txt": b"1" * 500, "/a/two": b"", "/c/ünï.bin": bytes(range(256))}
    assert dict(rcc_files(packages.rcc(files, version, compressed=("/a/b/one.txt",)))) == files


def test_what_is_no_archive_is_refused(tmp_path):
    for name, message in (("x.rar", "none of .whl"), ("x.deb", "not a Debian package")):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(ValueError, match=message):
            list(members(tmp_path / name, lambda name: True))
    with pytest.raises(ValueError, match=r"holds data\.tar\.zst; only data\.tar\.xz is read"):
        list(members(packages.deb(tmp_path / "y.deb", {}, "data.tar.zst"), lambda name: True))
    with pytest.raises(ValueError, match="not a Qt resource bundle"):
        list(rcc_files(b"qrex" + bytes(40)))
    broken = packages.rcc({"/a": b"x"})
    with pytest.raises(ValueError, match="unknown resource flags 0x4"):
        list(rcc_files(broken[: 24 + 22 + 4] + struct.pack(">H", 4) + broken[24 + 22 + 6 :]))


# ---- concepts ----------------------------------------------------------------------------------------------------------


def test_splits_are_fixed_and_never_hold_out_two_equal_names():
    concepts = [Concept(chr(0x1F300 + i), f"name {i // 2}", "", ("fluent", "noto")) for i in range(100)]
    split, again = split_concepts(concepts, held_out=15), split_concepts(concepts[::-1], held_out=15)
    assert {c.text for c in split.unseen} == {c.text for c in again.unseen}
    for held in (split.unseen, split.style_shift):
        assert len(held) == 15 == len({c.name for c in held})
    assert split.style == "noto" and not {c.text for c in split.unseen} & {c.text for c in split.style_shift}
    assert {c.text for c in split_concepts(concepts, seed=1, held_out=15).unseen} != {c.text for c in split.unseen}
    alone = split_concepts([Concept(chr(0x1F300 + i), f"{i}", "", ("fluent",)) for i in range(20)])
    assert alone.style is None and not alone.style_shift and len(alone.unseen) == 4


def test_captions():
    apple = Concept("🍎", "red apple", "food and drink", ("fluent",))
    assert apple.captions("fluent") == {
        "name": "red apple", "sentence": "red apple, food and drink", "caption": "a 3d render of red apple, food and drink",
    }  # fmt: skip
    assert Concept("☂", "umbrella", "", ()).captions("oblique sans")["caption"] == "an oblique sans symbol of umbrella"
    assert stamp_captions("plants/oak", "The oak. ")["name"] == "oak"
    assert photo_captions("explore_monuments/usa/canyondeChelly2")["caption"] == "a photo of canyonde chelly"
    assert photo_captions("imagenet_06_609") == {}


def test_a_fetch_that_fills_the_disk_names_the_cache(tmp_path):
    def fetch(name, cache):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk is full") as caught:
        build_demo(tmp_path, progress=False, fetch=fetch, held_out=4)
    assert caught.value.filename == str(tmp_path)
