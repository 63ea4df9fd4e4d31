"""Search by text and by image over an embeddings file."""

import json

import pytest
import torch

from ov3fast import cli
from ov3fast.inference import VisionTower, encode, write_embeddings
from ov3fast.inference.search import search

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def index(model, folder):
    return encode(model, folder, tokens=False)


def test_an_image_finds_itself(model, folder, index):
    hits = search(model, index, image=folder / "p1.png", top=3)
    assert len(hits) == 3 and hits[0].name == "p1.png" and hits[0].score == pytest.approx(1, abs=1e-5)
    assert hits[0].score >= hits[1].score >= hits[2].score
    assert len(search(model, index, image=folder / "p1.png", top=99)) == len(index.names)


def test_by_text_in_the_order_of_cosines(model, index):
    hits = search(model, index, text="a red square", top=len(index.names))
    with torch.no_grad():
        cosines = torch.cosine_similarity(index.pooled, model.encode_text(["a red square"]))
    assert [hit.name for hit in hits] == [index.names[i] for i in cosines.argsort(descending=True)]


def test_the_command(model, vae_folder, folder, index, tmp_path, capsys):
    write_embeddings(tmp_path / "index.safetensors", index)
    model.save_pretrained(tmp_path / "model")
    command = ["search", str(tmp_path / "index.safetensors"), "--model", str(tmp_path / "model"), "--vae", str(vae_folder)]
    assert cli.main([*command, "--image", str(folder / "p2.png"), "--top", "1"]) == 0
    assert capsys.readouterr().out == "1.0000\tp2.png\n"
    assert cli.main([*command, "--text", "a red square", "--json"]) == 0
    assert {"score", "image"} == set(json.loads(capsys.readouterr().out.splitlines()[0]))
    assert cli.main(command) == 2


def test_refusals(model, index):
    with pytest.raises(ValueError, match="set either text or image"):
        search(model, index)
    with pytest.raises(ValueError, match="top must be at least 1"):
        search(model, index, text="a", top=0)
    with pytest.raises(ValueError, match="no text encoder"):
        search(VisionTower(model.encoder, model.get_vae()), index, text="a")
    other = type(index)(index.pooled[:, :3], None, index.names, {}, index.about)
    with pytest.raises(ValueError, match="vectors of width 3, but the model's have 24"):
        search(model, other, text="a")
    with pytest.raises(ValueError, match="the index was made with latents 'flux', but the model takes 'openvision3'"):
        search(model, type(index)(index.pooled, None, index.names, {}, {"latents": "flux"}), text="a")
