"""Bad input and bad clients: each gets a clear error, and other clients are unaffected."""

import contextlib
import json
import socket
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from ov3fast.inference import encode
from ov3fast.serving.options import Limits, Options

from .conftest import form, noise, running, saved


@pytest.fixture(scope="module")
def small(model):
    """A server with tight limits."""
    limits = Limits(
        max_image_bytes=60_000, max_request_bytes=200_000, max_pixels=300 * 300, max_frames=3, max_images=4, max_texts=3,
        max_text_length=20, receive_seconds=0.5, max_received_bytes=400_000,
    )  # fmt: skip
    with running(model, Options(max_batch=4, limits=limits)) as client:
        yield client


@pytest.fixture(autouse=True)
def unharmed(small, photos):
    """After each test: the server still answers, and holds no resources."""
    yield
    assert small.form("/encode", photos[:1]).status == 200
    end = time.monotonic() + 5
    while small.service.budget.used and time.monotonic() < end:
        time.sleep(0.01)
    assert small.service.budget.used == 0 and small.service.batcher.waiting == 0


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG of side x side black pixels in a few bytes."""
    rows = zlib.compressobj()
    packed = b"".join(rows.compress(b"\0" * (side // 8 + 1)) for _ in range(side)) + rows.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def animation(kind: str, frames: int) -> bytes:
    pictures = [noise(i, 40, 40) for i in range(frames)]
    return saved(pictures[0], kind, save_all=True, append_images=pictures[1:])


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(noise(1, 60, 40), "jpeg", exif=exif)


READABLE = {
    "cmyk.jpg": saved(noise(1, 40, 40).convert("CMYK"), "jpeg"),
    "16bit.png": saved(Image.fromarray((np.arange(1600, dtype=np.uint16) * 40).reshape(40, 40)), "png"),
    "palette.png": saved(noise(1, 40, 40).quantize(16), "png"),
    "transparent.png": saved(noise(1, 40, 40).convert("RGBA").quantize(16), "png", transparency=0),
    "rotated.jpg": rotated(),
    "grey.png": saved(noise(1, 40, 40).convert("L"), "png"),
    "animated.gif": animation("gif", 3),
    "animated.webp": animation("webp", 3),
    "pages.tiff": animation("tiff", 3),
}
PNG_FILE = saved(noise(1, 60, 60), "png")
UNREADABLE = {
    "truncated.png": (PNG_FILE[: len(PNG_FILE) // 2], 422, "truncated_image"),
    "truncated.jpg": (saved(noise(1, 60, 60), "jpeg")[:-300], 422, "truncated_image"),
    "text.png": (b"this is no picture", 422, "broken_image"),
    "page.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "broken_image"),
    "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(20), 415, "unsupported_format"),
    "script.ps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, "unsupported_format"),
    "floats.tif": (saved(Image.fromarray(np.full((20, 20), 9.0, np.float32)), "tiff"), 422, "unsupported_depth"),
    "zero.png": (b"", 422, "empty_image"),
    "bomb.png": (bomb(20_000), 413, "too_large"),
    "wide.png": (saved(Image.new("1", (90_001, 1)), "png"), 413, "too_large"),
    "frames.gif": (animation("gif", 5), 413, "too_many_frames"),
    "frames.png": (animation("png", 5), 413, "too_many_frames"),
    "frames.webp": (animation("webp", 5), 413, "too_many_frames"),
    "pages.tif": (animation("tiff", 5), 413, "too_many_frames"),
    "heavy.bmp": (saved(noise(1, 200, 150), "bmp"), 413, "image_too_large"),
}


@pytest.mark.parametrize("name", READABLE)
def test_odd_images_are_read_as_offline(small, model, name, tmp_path):
    (tmp_path / name).write_bytes(READABLE[name])
    found = small.form("/encode", [(name, READABLE[name])]).json()["images"][0]["pooled"]
    assert found == encode(model, tmp_path / name).pooled[0].tolist()


@pytest.mark.parametrize("name", UNREADABLE)
def test_images_that_cannot_be_used(small, photos, name):
    data, status, code = UNREADABLE[name]
    refused = small.form("/encode", [photos[0], (name, data)])
    assert (refused.status, refused.code) == (status, code), refused.body
    error = refused.json()["error"]
    assert error["image"] == 2 and name in error["message"]


def test_a_bomb_is_not_unpacked(small):
    data = bomb(20_000)
    assert len(data) < 60_000  # 400 million pixels
    began = time.monotonic()
    assert small.form("/encode", [("bomb.png", data)]).code == "too_large"
    assert time.monotonic() - began < 2


def test_counts_and_sizes_of_a_request(small, photos):
    assert small.form("/encode", photos[:1] * 5).code == "too_many_images"
    assert small.form("/encode", photos[:1] * 50).status in (400, 413)
    assert small.form("/similarity", photos[:1], ["a"] * 4).code == "too_many_texts"
    assert small.form("/similarity", photos[:1], ["a" * 21]).code == "text_too_long"
    assert small.form("/similarity", photos[:1]).code == "no_text"
    big = small("/encode", b"x" * 300_000, {"Content-Type": "image/png"})
    assert big.status == 413 and big.code == "request_too_large" and "200000" in big.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "image/png", 400, "no_image"),
        (b"{}", "application/json", 400, "no_image"),
        (b"{", "application/json", 400, "bad_json"),
        (b"[" * 100_000, "application/json", 400, "bad_json"),
        (b"[]", "application/json", 400, "unknown_field"),
        (b'{"picture": ""}', "application/json", 400, "unknown_field"),
        (b'{"image": 5}', "application/json", 400, "bad_json"),
        (b'{"image": "", "texts": [1]}', "application/json", 400, "bad_json"),
        (b'{"image": "*"}', "application/json", 400, "bad_base64"),
        (b'{"image": "\\ud800"}', "application/json", 400, "bad_base64"),
        (b"x", "multipart/form-data", 400, "bad_multipart"),
        (b"x", "multipart/form-data; boundary=y", 400, "bad_multipart"),
        (b'--y\r\nContent-Disposition: form-data; name="else"\r\n\r\n1\r\n--y--\r\n', "multipart/form-data; boundary=y", 400, "unknown_field"),
        (b"x", "text/plain", 415, "unsupported_media_type"),
        (b"x", "", 415, "unsupported_media_type"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(small, body, kind, status, code):
    refused = small("/encode", body, {"Content-Type": kind} if kind else {})
    assert (refused.status, refused.code) == (status, code), refused.body


def test_paths_and_methods(small):
    assert small("/nothing").status == 404 and small("/encode").status == 405


# ---- clients ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def raw(client, *parts: bytes):
    """A connection that has sent the parts."""
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
        yield connection


def head(length: int, kind: str = "image/png", extra: str = "") -> bytes:
    return f"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{extra}\r\n".encode()


def read_all(connection) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def test_a_body_that_never_ends_in_time(small):
    with raw(small, head(1000), b"half") as connection:
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"too_slow" in answer


def test_a_slow_sender_within_the_time_is_answered(small, photos):
    data = photos[0][1]
    with raw(small, head(len(data), extra="Connection: close\r\n")) as connection:
        for start in range(0, len(data), len(data) // 5 + 1):
            connection.sendall(data[start : start + len(data) // 5 + 1])
            time.sleep(0.02)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_a_head_that_never_ends_is_cut(small):
    with raw(small, b"POST /encode HTTP/1.1\r\nHost: x\r\nX-Slow: ") as connection:
        began = time.monotonic()
        assert read_all(connection) == b"" and time.monotonic() - began < 10


def test_a_length_that_says_too_little(small, photos):
    data = photos[0][1]
    with raw(small, head(len(data) // 2), data) as connection:
        answer = read_all(connection)
    assert b"truncated_image" in answer or b"broken_image" in answer


def test_a_length_that_says_too_much_is_refused_before_the_body(small):
    with raw(small, head(10**12)) as connection:
        assert b"HTTP/1.1 413 " in read_all(connection)


def test_lengths_that_are_none(small):
    for length in ("-5", "many", "1, 2"):
        with raw(small, head(0).replace(b"Content-Length: 0", f"Content-Length: {length}".encode())) as connection:
            assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_chunks_without_end(small):
    sent = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with raw(small, sent) as connection:
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        answer = read_all(connection)
    assert not answer or b"request_too_large" in answer  # refused while it sends, so that the client may see a reset


def test_clients_that_leave(small, photos):
    body, headers = form(photos[:1])
    request = head(len(body), headers["Content-Type"])
    before = small.service.metrics.registry.get_sample_value("ov3fast_disconnected_total")
    for cut in (10, len(body) // 2, len(body)):
        with raw(small, request, body[:cut]):
            pass
    end = time.monotonic() + 5
    while small.service.metrics.registry.get_sample_value("ov3fast_disconnected_total") < before + 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert small.service.metrics.registry.get_sample_value("ov3fast_disconnected_total") >= before + 2


def test_what_a_client_that_left_had_in_the_queue_is_dropped(small, photos):
    batcher = small.service.batcher
    run, seen = batcher.jobs["encode"], []
    gate_open = time.monotonic() + 0.6

    def slow(bucket, items):
        time.sleep(max(0, gate_open - time.monotonic()))
        seen.append(len(items))
        return run(bucket, items)

    batcher.jobs["encode"] = slow
    try:
        body, headers = form(photos[:1])
        with raw(small, head(len(body), headers["Content-Type"]), body):
            time.sleep(0.2)  # in work
            with raw(small, head(len(body), headers["Content-Type"]), body):
                time.sleep(0.2)  # waits
        time.sleep(0.5)
        assert seen == [1] and batcher.waiting == 0
    finally:
        batcher.jobs["encode"] = run


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyError])
def test_a_failure_within_is_told_and_stays_one_requests_own(small, photos, monkeypatch, error):
    run = small.service.batcher.jobs["encode"]

    def fail(bucket, items):
        if bucket == 64:
            raise error("secret detail")
        return run(bucket, items)

    monkeypatch.setitem(small.service.batcher.jobs, "encode", fail)
    failed = small.form("/encode?size=64", photos[:2])
    assert failed.status == 500 and failed.code == "internal" and b"secret" not in failed.body
    assert small.form("/encode", photos[:2]).status == 200


def test_a_flood_is_told_when_to_come_again(model, photos):
    from concurrent.futures import ThreadPoolExecutor

    limits = Limits(max_queue=8, max_client_share=0.5)
    with running(model, Options(max_batch=2, limits=limits)) as client:
        run = client.service.batcher.jobs["encode"]
        client.service.batcher.jobs["encode"] = lambda bucket, items: (time.sleep(0.05), run(bucket, items))[1]
        with ThreadPoolExecutor(40) as pool:
            found = list(pool.map(lambda _: client.form("/encode", photos[:1]), range(80)))
        statuses = {answer.status for answer in found}
        assert statuses == {200, 429}, statuses
        refused = next(answer for answer in found if answer.status == 429)
        assert int(refused.headers["retry-after"]) >= 1 and refused.code == "overloaded"
        right = client.form("/encode", photos[:1]).json()
        assert all(answer.json() == right for answer in found if answer.status == 200)


def test_more_bytes_at_once_than_may_be_held(small):
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(raw(small, head(190_000), bytes(150_000)))
        connection = stack.enter_context(raw(small, head(190_000), bytes(150_000)))
        answer = read_all(connection)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] in ("overloaded", "too_slow")
