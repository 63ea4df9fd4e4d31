import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast.data import DataConfig, DataError, Loader, SampleStore, SkipWarning, SourceConfig, order_hash

FULL = (("name", 0.5), ("caption", 0.5))


def config(path, **options):
    source = {k: options.pop(k) for k in ("group_by", "views", "paired", "captions", "caption_key") if k in options}
    return DataConfig(sources=(SourceConfig(str(path), **source),), **options)


def loader(data, batch_size=4, **options):
    return Loader(data, image_size=8, batch_size=batch_size, **options)


def same(a, b):
    return (
        a.keys == b.keys and a.text == b.text and a.captions == b.captions and torch.equal(a.index, b.index)
        and torch.equal(a.variant, b.variant) and torch.equal(a.pairs, b.pairs) and torch.equal(a.images, b.images)
        and np.array_equal(a.planned, b.planned) and a.cursors == b.cursors
    )  # fmt: skip


# ---- what a batch is ---------------------------------------------------------------------------------------------------


def test_a_batch_of_single_samples(make_shards):
    batch = next(loader(config(make_shards(10))).batches())
    assert batch.images.shape == (4, 3, 8, 8) and batch.images.dtype == torch.float32
    assert batch.keys == [f"{i:05d}" for i in batch.index.tolist()] and batch.pairs.tolist() == [[0, 1, 2, 3]]
    for row, i in enumerate(batch.index.tolist()):
        colour = torch.tensor([i, 2 * i, 3 * i]) / 127.5 - 1
        torch.testing.assert_close(batch.images[row], colour[:, None, None].expand(3, 8, 8))
        assert batch.captions[row] == f"caption {i}" and batch.text[row] in (f"name {i}", f"caption {i}")


def test_each_sample_once_per_epoch_and_batches_cross_epochs(make_shards):
    batches = list(loader(config(make_shards(10))).batches(stop=10))
    seen = torch.cat([batch.index for batch in batches]).tolist()
    for epoch in range(4):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert torch.cat([batch.variant for batch in batches]).tolist() == [i // 10 for i in range(40)]
    assert seen[:10] != seen[10:20]


def test_caption_keys_come_by_probability_and_change_with_the_epoch(make_shards):
    data = loader(config(make_shards(50), captions=(("name", 0.8), ("caption", 0.2))), batch_size=50)
    text = [data.batch(step).text for step in range(20)]
    share = np.mean([t.startswith("name") for row in text for t in row])
    assert abs(share - 0.8) < 0.05
    by_sample = [{t for row in text for t in row if t.endswith(f" {i}")} for i in range(50)]
    assert all(len(found) == 2 for found in by_sample)


def test_caption_key_falls_back_to_the_contrastive_text(make_shards):
    batch = loader(config(make_shards(10), caption_key="absent", captions=(("name", 1.0),))).batch(0)
    assert batch.captions == batch.text == [f"name {i}" for i in batch.index.tolist()]


# ---- several sources and grouping --------------------------------------------------------------------------------------


@pytest.fixture
def mixed(make_shards):
    """24 samples of 8 concepts in 3 styles, and 10 unpaired photos."""
    return DataConfig(
        sources=(
            SourceConfig(str(make_shards(24, name="pairs", concepts=8)), fraction=12, group_by="concept", views=2),
            SourceConfig(str(make_shards(10, name="photos")), fraction=4, paired=False),
        )
    )


def test_exact_shares_views_and_pairs(mixed):
    data = loader(mixed, batch_size=16)
    assert data.units == [6, 4] and data.samples == 34
    for step in range(6):
        batch = data.batch(step)
        assert len(batch.keys) == 16 and (batch.index[:12] < 24).all() and (batch.index[12:] >= 24).all()
        assert batch.pairs.tolist() == [list(range(6)), list(range(6, 12))] and len(batch.text) == 6
        first, second = batch.index[batch.pairs]
        assert torch.equal(first % 8, second % 8) and (first != second).all()
        assert batch.captions[12:] == [""] * 4 and all(batch.captions[:12])
    assert data.cursors(5) == (30, 20) and batch.cursors == (36, 24) and data.epoch(4) == 3.0


def test_every_concept_once_per_epoch_in_changing_styles(mixed):
    data = loader(mixed, batch_size=16)
    rows = torch.cat([data.batch(step).index[:12].reshape(2, 6).T for step in range(16)]).numpy()  # 96 units, 12 epochs
    concepts = rows[:, 0] % 8
    for epoch in range(12):
        assert sorted(concepts[8 * epoch : 8 * epoch + 8]) == list(range(8))
    assert set(rows.ravel()) == set(range(24))


def test_a_text_shared_by_different_samples_is_true_of_both(make_shards, files):
    """Styles of a concept share its name, while their captions differ."""
    replace = {}
    for i in range(8):
        changed = files(i, concepts=4)
        changed["json"] = json.dumps(
            {**json.loads(changed["json"]), "captions": {"name": f"n{i % 4}", "caption": f"c{i}"}}
        ).encode()
        replace[i] = changed
    folder = make_shards(8, concepts=4, replace=replace)
    data = loader(config(folder, group_by="concept", views=2, captions=FULL), batch_size=8)
    for step in range(8):
        batch = data.batch(step)
        assert batch.text == [f"n{i % 4}" for i in batch.index[:4].tolist()]
        assert batch.captions == [f"c{i}" for i in batch.index.tolist()]


def test_too_few_samples_of_a_concept_repeat_with_another_augmentation(make_shards):
    folder = make_shards(4)
    data = loader(config(folder, group_by="concept", views=3, variants=5), batch_size=12)
    for step in range(3):
        batch = data.batch(step)
        index, variant = batch.index[batch.pairs], batch.variant[batch.pairs]
        assert (index == index[0]).all()
        assert variant.T.tolist() == [[(3 * step + view) % 5 for view in range(3)]] * 4


def test_variants_repeat_their_pixels(make_shards, png, files):
    noise = {**files(0), "png": png(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)))}
    data = loader(config(make_shards(1, replace={0: noise}), variants=3, cache_images=True), batch_size=1)
    batches = [data.batch(step) for step in range(6)]
    assert [int(batch.variant) for batch in batches] == [0, 1, 2, 0, 1, 2]
    for step in range(3):
        assert torch.equal(batches[step].images, batches[step + 3].images)
        assert not torch.equal(batches[step].images, batches[(step + 1) % 3].images)
        again = data.pixels(batches[step].index, batches[step].variant)
        assert torch.equal(again, batches[step].images)


def test_flips_and_backgrounds_vary_and_evaluation_does_not(make_shards, png, files):
    half = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    half.paste((255, 0, 0, 255), (0, 0, 16, 32))
    folder = make_shards(1, replace={0: {**files(0), "png": png(half)}})
    data = loader(config(folder, crop="center", flip=True), batch_size=1)
    pictures = torch.cat([data.batch(step).images for step in range(40)])
    red = torch.tensor([1.0, -1.0, -1.0])
    left, right = pictures[:, :, 4, 0], pictures[:, :, 4, -1]
    flipped = (right == red).all(1)
    assert 8 < flipped.sum() < 32 and ((left == red).all(1) == ~flipped).all()
    assert len(torch.where(flipped[:, None], left, right).unique(dim=0)) == 40
    by_turns = loader(config(folder, crop="center", background="mixed"), batch_size=1)
    whites = [bool((by_turns.batch(step).images[0, :, 4, -1] == 1).all()) for step in range(8)]
    assert whites == [True, True, True, False] * 2
    evaluated = loader(config(folder, flip=True), batch_size=1, train=False)
    assert torch.equal(evaluated.batch(0).images, evaluated.batch(1).images)
    assert evaluated.batch(0).images[0, :, 4, -1].tolist() == [1.0, 1.0, 1.0]


# ---- elastic order, resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
def test_workers_change_nothing(mixed, cache):
    mixed = dataclasses.replace(mixed, cache_images=cache)
    expected = list(loader(mixed, batch_size=16).batches(start=2, stop=7))
    for workers in (1, 2):
        data = loader(dataclasses.replace(mixed, workers=workers), batch_size=16)
        made = list(data.batches(start=2, stop=7))
        assert [batch.step for batch in made] == [2, 3, 4, 5, 6] and all(map(same, expected, made))


def test_cached_and_streamed_are_the_same(mixed):
    cached = loader(dataclasses.replace(mixed, cache_images=True), batch_size=16)
    assert all(same(loader(mixed, batch_size=16).batch(step), cached.batch(step)) for step in range(4))
    assert cached.usable().tolist() == list(range(34))
    plan = cached.batch(3, pixels=False)
    assert plan.images is None and torch.equal(cached.pixels(plan.index, plan.variant), cached.batch(3).images)
    with pytest.raises(ValueError, match=r"pixels: False needs data\.cache_images"):
        loader(mixed, batch_size=16).batch(0, pixels=False)


def test_ranks_share_the_same_global_batch(mixed):
    whole = loader(mixed, batch_size=16)
    ranks = [loader(mixed, batch_size=16, rank=rank, world=2) for rank in range(2)]
    for step in range(5):
        one, parts = whole.batch(step), [data.batch(step) for data in ranks]
        pairs = torch.cat([part.index[part.pairs] for part in parts], 1)
        assert torch.equal(one.index[one.pairs], pairs)
        assert one.text == parts[0].text + parts[1].text
        assert one.index[12:].tolist() == parts[0].index[6:].tolist() + parts[1].index[6:].tolist()
        assert all(np.array_equal(one.planned, part.planned) for part in parts)
        row = {int(i): one.images[r] for r, i in enumerate(one.index)}
        assert all(torch.equal(row[int(i)], image) for part in parts for i, image in zip(part.index, part.images, strict=True))


def test_resuming_anywhere_needs_no_replay_and_the_hash_agrees(make_shards, monkeypatch):
    folder = make_shards(10)

    def run(data, start, stop, running):
        for batch in data.batches(start, stop):
            running = order_hash(running, batch.keys)
        return running

    whole = run(loader(config(folder)), 0, 12, "")
    half = run(loader(config(folder)), 0, 7, "")
    resumed = loader(config(folder, workers=1))
    reads = []
    read = SampleStore.sample
    monkeypatch.setattr(SampleStore, "sample", lambda self, index, *more: reads.append(index) or read(self, index, *more))
    assert run(resumed, 7, 12, half) == whole != half
    fresh = loader(config(folder))
    reads.clear()
    fresh.batch(9)
    assert len(reads) == 4  # of the 40 samples before and in the batch


def test_a_stage_with_another_batch_size_goes_on_where_the_last_stopped(make_shards):
    folder = make_shards(12)
    whole = loader(config(folder), batch_size=1)
    sequence = [int(whole.batch(step).index) for step in range(24)]
    first = loader(config(folder), batch_size=4)
    assert torch.cat([b.index for b in first.batches(stop=3)]).tolist() == sequence[:12]
    second = loader(first.store, batch_size=6, cursors=first.batch(2).cursors)
    assert torch.cat([b.index for b in second.batches(stop=2)]).tolist() == sequence[12:]


# ---- faults ------------------------------------------------------------------------------------------------------------


def faulty(files, png, fault):
    broken = files(3)
    if fault == "broken_image":
        broken["png"] = b"no image"
    elif fault == "truncated_image":
        broken["png"] = broken["png"][:-25]
    elif fault == "missing_caption":
        broken["json"] = json.dumps({"captions": {"other": "x", "name": " "}, "meta": {"concept": "c3"}}).encode()
    elif fault == "broken_json":
        broken["json"] = b"{"
    elif fault == "missing_image":
        del broken["png"]
    elif fault == "too_large":
        broken["png"] = png(Image.new("RGB", (60, 40)))
    return broken


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "fault", ["broken_image", "truncated_image", "missing_caption", "broken_json", "missing_image", "too_large"]
)
def test_a_fault_is_skipped_counted_and_named(make_shards, files, png, fault, cache):
    folder = make_shards(10, replace={3: faulty(files, png, fault)})
    options = {"skip_budget": 0.1, "max_image_pixels": 1000, "cache_images": cache}
    with pytest.warns(SkipWarning, match=f"skipped 00003: {fault}"):
        data = loader(config(folder, **options))
        batches = list(data.batches(stop=5))
    assert data.skips.counts == {fault: 1}
    if cache:
        assert 3 not in data.usable()
        assert all(torch.equal(data.batch(step, pixels=False).index, batches[step].index) for step in range(5))
    seen = torch.cat([batch.index for batch in batches]).tolist()
    assert len(seen) == 20 and 3 not in seen and set(seen[:10]) == set(range(10)) - {3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipWarning)
        for workers in (0, 1):
            again = list(loader(config(folder, workers=workers, **{**options, "cache_images": not cache})).batches(stop=5))
            assert all(map(same, batches, again))
        with pytest.raises(DataError, match=rf"1 of 10 samples were skipped \(1 {fault}\), more than skip_budget = 0\.05"):
            list(loader(config(folder, **{**options, "skip_budget": 0.05})).batches(stop=3))


def test_a_tar_cut_short_is_counted(make_shards):
    folder = make_shards(16, per_shard=8)
    tar = folder / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.warns(SkipWarning, match="truncated_tar"):
        data = loader(config(folder, skip_budget=0.5))
        seen = torch.cat([batch.index for batch in data.batches(stop=8)]).tolist()
    lost = data.skips.counts["truncated_tar"]
    assert 2 <= lost <= 6 and data.skips.counts.total() == lost and max(seen) == 15 - lost
    with pytest.raises(DataError, match="truncated_tar"), warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipWarning)
        list(loader(config(folder)).batches(stop=4))


def test_a_concept_loses_a_style_or_gives_way(make_shards, files):
    """Sample 3 is one of three of concept c3; 0, 8 and 16 are the only ones of c0."""
    replace = {i: {**files(i, concepts=8), "png": b"-"} for i in (3, 0, 8, 16)}
    folder = make_shards(24, concepts=8, replace=replace)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipWarning)
        data = loader(config(folder, group_by="concept", views=2, skip_budget=0.5), batch_size=16)
        index = torch.cat([batch.index[batch.pairs] for batch in data.batches(stop=10)], 1)
    assert data.skips.counts == {"broken_image": 4}
    assert not set(index.flatten().tolist()) & {3, 0, 8, 16} and torch.equal(index[0] % 8, index[1] % 8)
    assert {11, 19} <= set(index.flatten().tolist())


def test_nothing_usable_is_an_error(make_shards):
    folder = make_shards(4, replace={i: {"json": b"{}", "png": b"-"} for i in range(4)})
    with pytest.raises(DataError, match="100 samples in a row can't be used"), warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipWarning)
        next(loader(config(folder, skip_budget=1.0), batch_size=2).batches())


def test_warnings_stop_while_counts_go_on(make_shards, files):
    folder = make_shards(10, replace={i: {**files(i), "png": b"-"} for i in range(6)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SkipWarning)
        data = loader(config(folder, skip_budget=0.6, cache_images=True))
    assert len(caught) == 3 and "further ones are only counted" in str(caught[-1].message)
    assert data.skips.counts == {"broken_image": 6} and str(data.skips) == "6 broken_image"


# ---- configuration errors ----------------------------------------------------------------------------------------------


def test_a_missing_caption_key_names_those_that_exist(make_shards):
    folder = make_shards(10)
    with pytest.raises(DataError, match=r"none of the keys 're_caption'; they have 'caption', 'name'"):
        loader(config(folder, captions=(("re_caption", 1.0),)))
    with pytest.raises(DataError, match="group_by: sample 0 .* no field 'word'; it has concept, style"):
        loader(config(folder, group_by="word"))


def test_no_data_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("OV3FAST_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"data\.sources: there is no source; .*`ov3fast data demo`"):
        loader(DataConfig())
    with pytest.raises(FileNotFoundError, match="'demo:pairs-train' is not built .* run `ov3fast data demo` first"):
        loader(config("demo:pairs-train"))


def test_a_batch_that_cannot_be_divided_is_refused(mixed, make_shards):
    with pytest.raises(ValueError, match="batch_size: .* 6 units a step, which 4 ranks can't share"):
        loader(mixed, batch_size=16, world=4)
    with pytest.raises(ValueError, match="batch_size: 1 images can't be divided"):
        loader(mixed, batch_size=1)
    other = SourceConfig(str(make_shards(4, name="third")), views=3)
    with pytest.raises(ValueError, match=r"views: the paired sources must have the same number, got \[2, 3\]"):
        loader(dataclasses.replace(mixed, sources=(*mixed.sources, other)), batch_size=18)
    with pytest.raises(ValueError, match="cursors: got 1 of them; there are 2 sources"):
        loader(mixed, batch_size=16, cursors=(0,))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DataConfig(crop="middle"), "crop: got 'middle'; it takes 'inception' or 'center'"),
        (lambda: DataConfig(interpolation="nearest"), "interpolation: got 'nearest'"),
        (lambda: DataConfig(background="black"), "background: got 'black'"),
        (lambda: DataConfig(min_area=0.0), "min_area: got 0.0"),
        (lambda: DataConfig(variants=0), "variants: got 0"),
        (lambda: DataConfig(workers=-1), "workers: got -1"),
        (lambda: SourceConfig("x", fraction=0), "fraction: got 0"),
        (lambda: SourceConfig("x", views=0), "views: got 0"),
        (lambda: SourceConfig("x", captions=()), r"captions: got \(\)"),
    ],
)
def test_wrong_fields_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
