import io
import json

import pytest
import torch
from PIL import Image
from rich.console import Console

from ov3fast.data import write_shards
from ov3fast.data.skips import DataError, SkipWarning
from ov3fast.evaluation import DEMO_TARGETS, evaluate, print_tables
from ov3fast.evaluation.pictures import embed_images, embed_texts, read_pictures, spread
from ov3fast.evaluation.retrieval import ranks, similarity


class Brightness(torch.nn.Module):
    """A stand-in for LPIPS: the difference of the means."""

    backbone, preprocess = "brightness", "none"

    def forward(self, x, y):
        return (x.mean((1, 2, 3)) - y.mean((1, 2, 3))).abs()


@pytest.fixture(scope="module")
def result(model, demo):
    options = {"pictures": 8, "captions": 4, "probe_train": 40, "probe_test": 20, "batch_size": 4}
    return evaluate(model, demo, lpips=Brightness(), progress=False, **options)


def test_the_tables_are_json(result):
    assert json.loads(json.dumps(result.tables, allow_nan=False)) == result.tables
    assert set(result.tables) == {
        "data", "reconstruction", "retrieval", "zero_shot", "captions", "probe", "protocols", "seconds", "images_per_s", "metrics", "figures",
    }  # fmt: skip
    assert result.tables["data"]["pictures"] == {"style": 6, "unseen": 10, "photos": 4}


def test_retrieval_is_that_of_the_embeddings(result, model, demo):
    """Recomputed by hand for the held-out style: one picture per concept against the six names."""
    pictures = read_pictures(demo.pairs_style, 32)
    scores = similarity(embed_images(model, pictures.images), embed_texts(model, pictures.texts("name")))
    ids = torch.arange(6)
    expected = {f"R@{k}": (ranks(scores, ids, ids) < k).double().mean().item() for k in (1, 5, 10)}
    table = result.tables["retrieval"]["style"]
    assert {k: table["image_to_text"][k] for k in expected} == pytest.approx(expected)
    assert table["chance"]["image_to_text"]["R@1"] == pytest.approx(1 / 6)


def test_styles_are_ranked_apart_and_averaged(result):
    table = result.tables["retrieval"]["unseen"]
    assert set(table["styles"]) == {"style0", "style1"} and table["texts"] == 5
    for way in ("image_to_text", "text_to_image"):
        each = [table["styles"][style][way]["R@1"] for style in table["styles"]]
        assert table[way]["R@1"] == pytest.approx(sum(each) / 2)
        assert table["chance"][way]["R@1"] == pytest.approx(1 / 5)


def test_zero_shot_is_over_the_names_of_all_sets(result):
    for name, count in (("style", 6), ("unseen", 10)):
        table = result.tables["zero_shot"][name]
        assert table["classes"] == 11 and table["images"] == count and table["chance"]["top1"] == pytest.approx(1 / 11)


def test_reconstruction_takes_from_every_set(result):
    table = result.tables["reconstruction"]
    assert table["pictures"]["count"] == 8 and table["photos"]["count"] == 4
    assert {row["key"].split("-")[0] for row in table["pictures"]["images"]} == {"style", "unseen"}
    assert set(table["photos"]["model"]) == {"psnr", "ssim", "ssim_uniform", "lpips_style", "latent_l1"}
    assert result.tables["protocols"]["lpips_style"].startswith("lpips-style/brightness-none/")


def test_captions_are_the_models_own(result, model):
    rows = result.tables["captions"]
    assert [row["set"] for row in rows] == ["style", "style", "unseen", "unseen"]
    images = result.captioned.images.float() / 127.5 - 1
    assert [row["caption"] for row in rows] == model.caption(images)
    assert all(row["reference"].startswith("a picture of a") for row in rows)


def test_the_probe_runs(result):
    probe = result.tables["probe"]
    assert (probe["train"], probe["test"], probe["chance"], probe["features"]) == (40, 20, 0.1, 24)
    assert probe["pixels"] == 1.0 and 0 <= probe["accuracy"] <= 1


def test_the_headline_holds_every_target(result):
    found = {row["id"]: row for row in result.tables["metrics"]}
    assert set(DEMO_TARGETS) <= set(found)
    for id, target in DEMO_TARGETS.items():
        assert found[id]["target"] == target and found[id]["passed"] == (found[id]["value"] >= target)
    assert found["style/image_to_text/R@5"]["passed"] is None
    assert found["photos/psnr"]["baseline"].startswith("VAE alone ")


def test_twice_the_same(result, model, demo):
    again = evaluate(
        model, demo, lpips=Brightness(), progress=False, pictures=8, captions=4, probe_train=40, probe_test=20, batch_size=4
    )
    timed = ("seconds", "images_per_s")
    assert {k: v for k, v in again.tables.items() if k not in timed} == {
        k: v for k, v in result.tables.items() if k not in timed
    }


def test_the_tables_print(result):
    text = io.StringIO()
    tables = {**result.tables, "captions": [{"key": "k", "caption": "a [b]odd[/b] [UNK] one", "reference": "its [own]"}]}
    print_tables(tables, Console(file=text, width=80))
    shown = text.getvalue()
    assert (
        "\nKnown concepts in an unseen style, 6 texts" in shown
        and "missed" in shown
        and "chance 16.7 %" in shown
        and ">= 45.0 %" in shown
        and "VAE alone" in shown
    )
    assert "a [b]odd[/b] [UNK] one" in shown and "its [own]" in shown


def test_the_model_keeps_its_mode_and_the_terminal_stays_clean(model, demo, capsys):
    model.train()
    evaluate(model, demo.pairs_style, progress=True, pictures=1, captions=1)
    assert model.training
    model.eval()
    assert capsys.readouterr().out == ""


def test_any_folder_of_shards(model, demo, fashion_folder):
    found = evaluate(
        model,
        demo.pairs_unseen,
        progress=False,
        pictures=2,
        captions=1,
        fashion_mnist=fashion_folder,
        probe_train=40,
        probe_test=20,
    )
    table = found.tables["retrieval"]["data"]
    # Not a demo set: styles are not distinguished, and both pictures of a name are correct.
    assert list(table["styles"]) == [""] and table["texts"] == 5 and table["images"] == 10
    assert table["chance"]["image_to_text"]["R@1"] == pytest.approx(1 / 5) == table["chance"]["text_to_image"]["R@1"]
    assert all(row["target"] is None for row in found.tables["metrics"])
    assert found.tables["probe"]["test"] == 20 and "photos" not in found.tables["reconstruction"]


def test_captionless_pictures_are_reconstructed_only(model, demo):
    found = evaluate(model, demo.photos_heldout, progress=False, pictures=4, captions=2)
    assert found.tables["retrieval"] == {} and found.tables["reconstruction"]["pictures"]["count"] == 4
    assert found.tables["captions"][0]["reference"] == ""


def test_caption_key_and_image_size(model, demo):
    found = evaluate(model, demo.pairs_style, image_size=48, caption_key="caption", progress=False, pictures=2, captions=1)
    assert found.rankings["data"].texts[0] == "a picture of a red square"
    assert found.rankings["data"].pictures.images.shape == (6, 3, 48, 48)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_on_white_and_square(demo):
    pictures = read_pictures(demo.pairs_style, 32)
    assert pictures.images.shape == (6, 3, 32, 32) and pictures.images.dtype == torch.uint8
    assert (pictures.images[0, :, 0, 0] == 255).all()  # the transparent corner
    assert pictures.images[0, :, 16, 16].tolist() == [220, 30, 30]
    assert pictures.column("concept")[:2] == ["red", "green"]


def test_a_limit_is_spread_over_the_set(demo):
    assert len(read_pictures(demo.pairs_unseen, 32, limit=3)) == 3
    assert spread(10, 3) == [1, 5, 8] and spread(3, 10) == [0, 1, 2] and spread(4, None) == [0, 1, 2, 3] and spread(5, 0) == []


def test_broken_pictures_are_counted_up_to_a_budget(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20)).save(buffer, "PNG")
    good = {"png": buffer.getvalue()}
    write_shards([(f"{i}", {"png": b"broken"} if i == 3 else good) for i in range(12)], tmp_path / "set")
    with pytest.warns(SkipWarning, match="skipped 3: broken_image"):
        pictures = read_pictures(tmp_path / "set", 32)
    assert len(pictures) == 11 and pictures.skipped == {"broken_image": 1} and "3" not in pictures.keys
    with pytest.warns(SkipWarning), pytest.raises(DataError, match="1 of 12 samples were skipped"):
        read_pictures(tmp_path / "set", 32, skip_budget=0.05)


def test_errors(model, tmp_path, demo):
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        evaluate(model, tmp_path / "nowhere", progress=False)
    with pytest.raises(DataError, match="holds no .tar file"):
        evaluate(model, tmp_path, progress=False)
    with pytest.raises(ValueError, match="multiples of 16"):
        evaluate(model, demo, image_size=40, progress=False)
    with pytest.raises(FileNotFoundError, match="has no train-images-idx3-ubyte.gz"):
        evaluate(model, demo.pairs_style, fashion_mnist=tmp_path, progress=False, pictures=1, captions=1)
