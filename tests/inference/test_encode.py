import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ov3fast.data.preprocess import square
from ov3fast.data.skips import DataError, SkipWarning
from ov3fast.inference import Embeddings, encode, find_images, load_model, read_embeddings, read_image, write_embeddings
from ov3fast.inference.decoding import Options, decoded
from ov3fast.inference.images import cropped
from ov3fast.models import vision_tower
from ov3fast.models.vae import FrozenVAE

GOOD = ["more/p5.jpg", "p0.png", "p1.png", "p2.png", "p3.png", "p4.png", "p6.webp"]


@pytest.fixture(scope="module")
def found(model, folder) -> Embeddings:
    with pytest.warns(SkipWarning):
        return encode(model, folder, batch_size=3)


def test_a_folder_in_order_without_the_broken_ones(found, folder):
    assert found.names == GOOD
    assert found.pooled.shape == (7, 24) and found.tokens.shape == (7, 4, 32)
    assert found.skipped == {"p0b.png": "truncated_image", "p3b.jpg": "broken_image"}
    assert found.about["latents"] == "openvision3" and found.about["image_size"] == "32"


def test_broken_images_are_named_in_warnings(model, folder):
    with pytest.warns(SkipWarning) as caught:
        encode(model, folder)
    messages = [str(w.message) for w in caught if w.category is SkipWarning]
    assert len(messages) == 2 and messages[0].startswith("skipped p0b.png: truncated_image")


def test_it_is_what_the_model_gives(found, model, folder):
    pictures = torch.stack([square(read_image(folder / name), 32) for name in GOOD])
    pooled, tokens = model.encode(pictures)
    torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.tokens, tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 50])
@pytest.mark.filterwarnings("ignore::ov3fast.data.skips.SkipWarning")
def test_embeddings_do_not_depend_on_the_batch(found, model, folder, batch_size):
    again = encode(model, folder, batch_size=batch_size, workers=batch_size)
    assert again.names == found.names
    # float32 rounding: sums of a few hundred terms in another order.
    for ours, theirs in ((again.pooled, found.pooled), (again.tokens, found.tokens)):
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max()


@pytest.mark.filterwarnings("ignore::ov3fast.data.skips.SkipWarning")
def test_progress_stays_off_what_is_no_terminal(model, folder, capsys):
    encode(model, folder, progress=True)
    assert capsys.readouterr().out == ""


def test_size_and_tokens_are_options(model, folder):
    larger = encode(model, folder / "p1.png", image_size=64, tokens=False)
    assert larger.tokens is None and larger.pooled.shape == (1, 24) and larger.about["image_size"] == "64"
    assert encode(model, folder / "p1.png", image_size=64).tokens.shape == (1, 16, 32)


def test_files_and_folders_mixed_keep_their_names_apart(folder, tmp_path):
    (tmp_path / "p0.png").write_bytes((folder / "p0.png").read_bytes())
    names = find_images([folder / "p1.png", tmp_path, folder])
    assert list(names)[0] == f"{folder}/p1.png" and f"{tmp_path}/p0.png" in names and "p2.png" in names
    # A file given twice is encoded once.
    assert len(names) == 1 + 9 and names["more/p5.jpg"] == folder / "more" / "p5.jpg"


def test_too_large_images_are_skipped(model, folder):
    with pytest.warns(SkipWarning, match="too_large"):
        found = encode(model, [folder / "p3.png", folder / "p0.png"], max_image_pixels=64 * 64)
    assert found.names == ["p0.png"] and found.skipped == {"p3.png": "too_large"}


# ---- preparation -----------------------------------------------------------------------------------------------------


def test_square_resizes_the_shorter_side_and_crops_the_centre():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    picture = square(Image.fromarray(pixels), 16)
    resized = Image.fromarray(pixels).resize((48, 16), Image.Resampling.BICUBIC).crop((16, 0, 32, 16))
    expected = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1
    assert picture.shape == (3, 16, 16) and picture.dtype == torch.float32
    torch.testing.assert_close(picture, expected, atol=1.01 / 127.5, rtol=0)


def test_transparency_becomes_white(folder):
    assert (square(read_image(folder / "p6.webp"), 32) == 1).all()


def test_cropped_keeps_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    picture = cropped(Image.fromarray(pixels), 16)
    expected = torch.from_numpy(pixels[2:34, 1:49]).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(picture, expected, atol=1e-6, rtol=0)


def test_photos_are_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    upright = read_image(tmp_path / "turned.jpg")
    assert upright.size == (20, 40) and upright.getpixel((10, 5))[2] > 200 and upright.getpixel((10, 35))[0] > 200


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e.safetensors", "e.npz", "e.npy"])
def test_round_trip(found, tmp_path, name):
    path = write_embeddings(tmp_path / "new" / name, found)
    again = read_embeddings(path)
    assert torch.equal(again.pooled, found.pooled)
    assert again.tokens is None if name.endswith(".npy") else torch.equal(again.tokens, found.tokens)
    assert (again.names, again.skipped, again.about) == (found.names, found.skipped, found.about)
    assert not [p for p in path.parent.iterdir() if "writing" in p.name]


def test_files_are_plain_ones(found, tmp_path):
    from safetensors import safe_open

    with safe_open(str(write_embeddings(tmp_path / "e.safetensors", found)), "np") as file:
        assert json.loads(file.metadata()["names"]) == GOOD and file.metadata()["latents"] == "openvision3"
        assert "centre crop" in file.metadata()["preprocess"]
        assert file.get_tensor("tokens").shape == (7, 4, 32)
    assert np.load(write_embeddings(tmp_path / "e.npy", found)).shape == (7, 24)
    assert json.loads((tmp_path / "e.json").read_text())["image_size"] == "32"


def test_a_failed_write_leaves_the_old_file(found, tmp_path, monkeypatch):
    path = write_embeddings(tmp_path / "e.npz", found)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="no space left"):
        write_embeddings(path, found)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["e.npz"]


# ---- models ----------------------------------------------------------------------------------------------------------


def test_models_from_folders(model, vae, vae_folder, folder, tmp_path, found):
    model.save_pretrained(tmp_path / "run" / "model")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded = load_model(path, vae=vae_folder)
        assert not loaded.training
        assert torch.equal(encode(loaded, folder / "p1.png").pooled, encode(model, folder / "p1.png").pooled)


def test_a_released_tower_with_a_vae(model, vae, vae_folder, folder, tmp_path):
    vision = model.config.vision
    tensors = vision_tower.to_released_state_dict(model.encoder)
    config = {
        "embed_dim": vision.embed_dim,
        "vision_cfg": {
            "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 1.5, "image_size": 4, "patch_size": 2, "in_channels": 16,
        },
    }  # fmt: skip
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "open_clip_pytorch_model.bin")
    for given in (vae_folder, vae):
        tower = load_model(tmp_path, vae=given)
        ours, theirs = encode(tower, folder / "p1.png"), encode(model, folder / "p1.png")
        torch.testing.assert_close(ours.pooled, theirs.pooled)
        torch.testing.assert_close(ours.tokens, theirs.tokens)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors_of_paths(model, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="images: there is no file or folder .*nowhere"):
        encode(model, folder / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"images: the folder .* holds no images \(.jpg, "):
        encode(model, tmp_path)
    with pytest.raises(ValueError, match="images: .*notes.txt is not an image by its suffix; it takes .jpg"):
        encode(model, folder / "notes.txt")
    with pytest.raises(ValueError, match="images: got no path"):
        encode(model, [])
    with (
        pytest.warns(SkipWarning),
        pytest.raises(DataError, match=r"none of the 2 images could be read \(1 broken_image, 1 trunc"),
    ):
        encode(model, [folder / "p3b.jpg", folder / "p0b.png"])


def test_errors_of_options(model, folder, found, tmp_path):
    with pytest.raises(ValueError, match="image_size must be a multiple of 16 pixels, got 40"):
        encode(model, folder, image_size=40)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encode(model, folder, batch_size=0)
    with pytest.raises(ValueError, match="out must end in .safetensors, .npz, .npy, .parquet; got .*e.txt"):
        write_embeddings(tmp_path / "e.txt", found)
    with pytest.raises(FileNotFoundError, match="read_embeddings: there is no file .*e.npz"):
        read_embeddings(tmp_path / "e.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    with pytest.raises(ValueError, match=r"other.npz was not written by write_embeddings \(it holds a\)"):
        read_embeddings(tmp_path / "other.npz")


def test_errors_of_models(vae, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"no model there: neither config.json nor open_clip_config.json .*it holds more, notes.txt"
    ):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match="it is a file; name a model folder"):
        load_model(folder / "notes.txt")
    assert isinstance(vae, FrozenVAE)


@pytest.mark.parametrize(("read", "model", "beside"), [(0.01, 0.5, False), (0.01, 0.2, True)])
def test_decoding_is_done_between_batches_while_it_is_quick(read, model, beside, monkeypatch):
    """read, model: seconds per image and per batch."""
    threads, clock = [], SimpleNamespace(now=0.0)
    monkeypatch.setattr("ov3fast.inference.decoding.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def reader(number):
        def image():
            threads.append(threading.current_thread())
            clock.now += read
            return Image.new("RGB", (8, 8), (number, 0, 0))

        return image

    found = []
    for name, picture in decoded({str(number): reader(number) for number in range(10)}, 8, Options(batch_size=4)):
        found.append((name, int(picture[0, 0, 0])))
        clock.now += model if len(found) % 4 == 0 else 0
    assert found == [(str(number), number) for number in range(10)]
    here = [thread is threading.current_thread() for thread in threads]
    assert here == [True] * 4 + [not beside] * 6
