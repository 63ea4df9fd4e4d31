"""SentenceEncoder: the model's vectors, in the forms that sentence-transformers returns."""

import numpy as np
import pytest
import torch

from ov3fast.data.images import ImageError
from ov3fast.inference import VisionTower, encode
from ov3fast.interop.sentence_transformers import SentenceEncoder

from .conftest import noise

TEXTS = ["a red square", "red", "a"]


@pytest.fixture(scope="module")
def encoder(model):
    return SentenceEncoder(model)


@pytest.fixture(scope="module")
def pictures():
    return [noise(i, 40 + i, 50) for i in range(5)]


def test_the_vectors_are_the_models(encoder, model, pictures):
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(TEXTS, convert_to_tensor=True), model.encode_text(TEXTS))
        torch.testing.assert_close(encoder.encode(pictures, convert_to_tensor=True), model.encode(pictures)[0])
    assert torch.equal(encoder.encode(pictures, convert_to_tensor=True), encode(model, pictures).pooled)


def test_order_and_batches_do_not_matter(encoder, pictures):
    mixed = [TEXTS[0], pictures[0], pictures[1], TEXTS[1], pictures[2]]
    found = encoder.encode(mixed, batch_size=2)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32 and found.shape == (5, 24)
    assert np.array_equal(found[[0, 3]], encoder.encode(TEXTS[:2])) and np.array_equal(
        found[[1, 2, 4]], encoder.encode(pictures[:3])
    )
    assert np.array_equal(encoder.encode(pictures, batch_size=1), encoder.encode(pictures, show_progress_bar=False))


def test_forms_of_the_answer(encoder, pictures):
    one = encoder.encode("a red square")
    assert one.shape == (24,) and np.array_equal(one, encoder.encode(["a red square"])[0])
    assert encoder.encode(pictures[0]).shape == (24,)
    assert encoder.encode(np.stack([np.zeros((8, 8, 3), np.uint8)] * 2)).shape == (2, 24)
    listed = encoder.encode(TEXTS, convert_to_numpy=False)
    assert isinstance(listed, list) and torch.is_tensor(listed[0])
    unit = encoder.encode(TEXTS + pictures, normalize_embeddings=True, prompt=None)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    assert encoder.encode([]).shape == (0, 24)
    tokens = encoder.encode(pictures[:2], output_value="token_embeddings")
    assert len(tokens) == 2 and tokens[0].shape == (4, 32)
    assert encoder.get_sentence_embedding_dimension() == 24 and encoder.max_seq_length == 10


def test_similarity(encoder, pictures):
    images, texts = encoder.encode(pictures), encoder.encode(TEXTS, convert_to_tensor=True)
    found = encoder.similarity(images, texts)
    expected = torch.cosine_similarity(torch.from_numpy(images)[:, None], texts[None], dim=-1)
    torch.testing.assert_close(found, expected)
    assert encoder.similarity(images[0], texts[0]).shape == (1, 1)


def test_from_a_folder_with_files(model_folder, encoder, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    loaded = SentenceEncoder(model_folder)
    assert np.array_equal(loaded.encode([tmp_path / "a.png"] * 2), encoder.encode([pictures[0]] * 2))
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="image 1 can't be read: broken_image"):
        loaded.encode([tmp_path / "a.png", tmp_path / "b.png"])


def test_errors(encoder, model, pictures):
    with pytest.raises(TypeError, match="takes no prompt"):
        encoder.encode(TEXTS, prompt="a")
    with pytest.raises(ValueError, match="output_value must be"):
        encoder.encode(TEXTS, output_value="all")
    with pytest.raises(ValueError, match="token_embeddings are those of images"):
        encoder.encode(TEXTS, output_value="token_embeddings")
    with pytest.raises(ValueError, match="the model is on cpu, not on cuda"):
        encoder.encode(TEXTS, device="cuda")
    with pytest.raises(TypeError, match="preprocess: takes"):
        encoder.encode([3])
    tower = SentenceEncoder(VisionTower(model.encoder, model.get_vae()))
    assert np.array_equal(tower.encode(pictures), encoder.encode(pictures)) and tower.max_seq_length is None
    with pytest.raises(ValueError, match="a released vision tower has no text encoder"):
        tower.encode(TEXTS)
