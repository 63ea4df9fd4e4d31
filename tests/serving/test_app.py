"""Endpoints: inputs, outputs, and bitwise equality with the library's results for the same files."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from ov3fast.inference import VisionTower, caption, encode, read_embeddings, reconstruct_image
from ov3fast.inference.search import search
from ov3fast.inference.similarity import similarity
from ov3fast.serving.options import Options

from .conftest import form, running

NPY, SAFETENSORS = {"Accept": "application/x-npy"}, {"Accept": "application/x-safetensors"}


@pytest.fixture(scope="module")
def files(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, data in photos:
        (folder / name).write_bytes(data)
    return [folder / name for name, _ in photos]


@pytest.fixture(scope="module")
def offline(model, files):
    return encode(model, files, batch_size=4)


def test_encode_is_the_offline_answer(server, photos, offline):
    found = server.form("/encode?output=both", photos).json()
    assert [image["name"] for image in found["images"]] == [name for name, _ in photos] and found["image_size"] == 32
    assert torch.equal(torch.tensor([image["pooled"] for image in found["images"]]), offline.pooled)
    assert torch.equal(torch.tensor([image["tokens"] for image in found["images"]]), offline.tokens)


def test_images_come_in_three_ways(server, photos, offline):
    name, data = photos[1]
    coded = base64.b64encode(data).decode()
    bodies = [
        form([(name, data)]),
        (data, {"Content-Type": "image/jpeg"}),
        (data, {"Content-Type": "application/octet-stream"}),
        *[
            (json.dumps(fields), {"Content-Type": "application/json"})
            for fields in (
                {"image": coded}, {"images": [coded]}, {"image": f"data:image/jpeg;base64,{coded}"},
                {"images": [{"name": name, "data": coded}]},
            )
        ],
    ]  # fmt: skip
    for body, headers in bodies:
        answer = server("/encode", body, {**headers, **NPY})
        assert answer.status == 200, answer.body
        assert np.array_equal(np.load(io.BytesIO(answer.body)), offline.pooled[1:2].numpy())


def test_answers_by_accept(server, photos, offline):
    tokens = server.form("/encode?output=tokens", photos, **NPY)
    assert tokens.headers["content-type"] == NPY["Accept"]
    assert np.array_equal(np.load(io.BytesIO(tokens.body)), offline.tokens.numpy())
    coded = server.form("/encode?encoding=base64", photos[:1]).json()["images"][0]["pooled"]
    values = np.frombuffer(base64.b64decode(coded["data"]), coded["dtype"]).reshape(coded["shape"])
    assert np.array_equal(values, offline.pooled[0].numpy())
    assert server.form("/encode", photos[:1], Accept="text/html, application/json;q=0.5").status == 200
    refused = server.form("/encode", photos[:1], Accept="text/html")
    assert refused.status == 406 and refused.code == "not_acceptable"
    assert server.form("/encode?output=both", photos[:1], **NPY).status == 406


def test_a_safetensors_answer_is_an_index(server, photos, offline, model, files, tmp_path):
    path = tmp_path / "answer.safetensors"
    path.write_bytes(server.form("/encode?output=both", photos, **SAFETENSORS).body)
    again = read_embeddings(path)
    assert torch.equal(again.tokens, offline.tokens) and again.about == offline.about and again.names == offline.names
    assert search(model, path, image=files[2], top=1)[0].name == files[2].name


def test_another_size(server, model, photos, files):
    found = server.form("/encode?size=64&output=tokens", photos[:2], **NPY)
    assert np.array_equal(np.load(io.BytesIO(found.body)), encode(model, files[:2], image_size=64).tokens.numpy())
    for size in ("7", "0", "-16", "4096", "many"):
        refused = server.form(f"/encode?size={size}", photos[:1])
        assert refused.status == 422 and refused.code == "bad_parameter" and size in refused.json()["error"]["message"]


def test_reconstruct(server, model, photos, files):
    whole = reconstruct_image(model, files[0])
    found = server.form("/reconstruct", photos[:2]).json()["images"]
    assert found[0]["psnr"] == whole.psnr and found[0]["vae_psnr"] == whole.vae_psnr
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(found[0]["png"]))))
    assert np.array_equal(picture, whole.reconstruction.permute(1, 2, 0).numpy())
    png = server.form("/reconstruct?view=side_by_side", photos[:1], Accept="image/png")
    assert Image.open(io.BytesIO(png.body)).size == (96, 32) and png.headers["content-type"] == "image/png"
    assert server.form("/reconstruct", photos[:2], Accept="image/png").status == 406
    arrays = load(server.form("/reconstruct", photos[:2], **SAFETENSORS).body)
    assert torch.equal(arrays["vae"][0], whole.vae) and torch.equal(arrays["original"][0], whole.original)


def test_caption(server, model, photos, files):
    for beams in (1, 3):
        found = server.form(f"/caption?beams={beams}", photos).json()["images"]
        assert [image["caption"] for image in found] == [one.caption for one in caption(model, files, beams=beams)]
    assert server.form("/caption?beams=99", photos[:1]).code == "bad_parameter"


def test_similarity(server, model, photos, files):
    texts = ["a red square", "red", "a", "square a"]
    expected = similarity(model, files, texts)
    found = server.form("/similarity?top=2", photos, texts).json()
    assert found["texts"] == texts
    assert torch.equal(torch.tensor([image["scores"] for image in found["images"]]), expected)
    near = found["images"][0]["nearest"]
    assert len(near) == 2 and near[0]["score"] == expected[0].max() and near[0]["score"] >= near[1]["score"]
    alone = server.form("/similarity", photos[:1], texts[3:], **NPY)
    assert np.array_equal(np.load(io.BytesIO(alone.body)), expected[:1, 3:].numpy())
    assert server.form("/similarity", photos[:1]).json()["texts"] == ["a red square", "a square"]  # the server's own


def test_state_and_interface(server):
    assert server("/health").json()["status"] == "ok"
    ready = server("/ready")
    assert ready.status == 200 and ready.json()["image_size"] == 32 and ready.json()["batch_sizes"][0] == 1
    described = server("/openapi.json").json()["paths"]
    assert {"/encode", "/reconstruct", "/caption", "/similarity", "/health", "/ready", "/metrics"} <= set(described)
    assert "multipart/form-data" in described["/encode"]["post"]["requestBody"]["content"]
    for page in ("/", "/docs"):
        answer = server(page)
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
        assert b"http://" not in answer.body and b"https://" not in answer.body, "it loads nothing from elsewhere"


def test_metrics(server, photos):
    before = numbers(server("/metrics").body)
    server.form("/encode", photos)
    server.form("/encode")
    after = numbers(server("/metrics").body)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['ov3fast_items_total{job="encode"}'] == len(photos)
    assert grown['ov3fast_requests_total{path="/encode",status="200"}'] == 1
    assert grown['ov3fast_requests_total{path="/encode",status="400"}'] == 1
    assert grown['ov3fast_refused_total{code="no_image"}'] == 1
    assert after["ov3fast_queue_length"] == 0 and after["ov3fast_received_bytes"] == 0 and after["ov3fast_ready"] == 1


def numbers(text: bytes) -> dict[str, float]:
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.decode().splitlines() if line[0] != "#"}


def test_a_key(model, photos):
    with running(model, Options(api_key="secret", max_batch=1)) as client:
        assert client.form("/encode", photos[:1]).status == client("/metrics").status == 401
        refused = client.form("/encode", photos[:1], Authorization="Bearer other")
        assert refused.code == "unauthorized" and refused.headers["www-authenticate"] == "Bearer"
        assert client.form("/encode", photos[:1], Authorization="Bearer secret").status == 200
        assert client.form("/encode", photos[:1], **{"X-API-Key": "secret"}).status == 200
        assert client("/metrics", headers={"X-API-Key": "secret"}).status == 200
        assert client("/health").status == client("/ready").status == client("/").status == 200


def test_a_released_tower_encodes_and_refuses_the_rest(model, photos, files, offline):
    tower = VisionTower(model.encoder, model.get_vae())
    with running(tower, Options(max_batch=1)) as client:
        assert np.array_equal(np.load(io.BytesIO(client.form("/encode", photos, **NPY).body)), offline.pooled.numpy())
        for path in ("/reconstruct", "/caption", "/similarity"):
            refused = client.form(path, photos[:1])
            assert refused.status == 501 and refused.code == "not_supported"


def test_urls(model, photos, server):
    body = json.dumps({"url": f"http://127.0.0.1:{server.port}/openapi.json"})
    json_ = {"Content-Type": "application/json"}
    assert server("/encode", body, json_).code == "urls_off"
    with running(model, Options(url_hosts=("127.0.0.1",), max_batch=1)) as client:
        assert client("/encode", body, json_).code == "broken_image"  # fetched, and no image
        for url in (
            "http://localhost/x.png",
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "http://127.0.0.1@evil/x",
            "http://[",
            "",
        ):
            assert client("/encode", json.dumps({"url": url}), json_).code == "url_refused", url
        missing = client("/encode", json.dumps({"url": f"http://127.0.0.1:{server.port}/nothing"}), json_)
        assert missing.code == "url_failed"
