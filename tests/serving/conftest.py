"""A tiny model behind a real server on the loopback, and a client for it."""

import contextlib
import http.client
import io
import json
import threading
import time
import uuid
from typing import NamedTuple

import pytest
from tiny_models import folder, model, noise, vae, vae_folder

from ov3fast.serving.app import create_app
from ov3fast.serving.options import Options
from ov3fast.serving.server import _bound, _Server


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return self.json()["error"]["code"]


class Client:
    """Calls a server on the loopback interface; one connection per call."""

    def __init__(self, port: int, server=None) -> None:
        self.port, self.server = port, server

    def __call__(self, path, body=None, headers=None, *, method=None, timeout=60) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def form(self, path, images=(), texts=(), **headers) -> Answer:
        """images: (name, bytes) each."""
        return self(path, *form(images, texts, **headers))

    @property
    def service(self):
        return self.server.service


def form(images=(), texts=(), **headers) -> tuple[bytes, dict[str, str]]:
    """A multipart body, and headers."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in images
    ]
    parts += [f'--{boundary}\r\nContent-Disposition: form-data; name="text"\r\n\r\n{text}\r\n'.encode() for text in texts]
    kind = f"multipart/form-data; boundary={boundary}"
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), {"Content-Type": kind, **headers}


@contextlib.contextmanager
def running(model, options: Options | None = None):
    """A Client for a server running in a thread."""
    options = options or Options()
    with _bound("127.0.0.1", 0) as listener:
        server = _Server(create_app(model, options, name="tiny"), options, 10)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        client = Client(listener.getsockname()[1], server)
        try:
            end = time.monotonic() + 120
            while not server.service.ready and time.monotonic() < end:
                time.sleep(0.01)
            yield client
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def server(model):
    with running(model, Options(max_batch=8, texts=("a red square", "a square"))) as client:
        yield client


@pytest.fixture(scope="session")
def photos():
    """(name, bytes) of pictures of several sizes and formats."""
    return [(f"{i}.{kind}", saved(noise(i, *size), kind)) for i, (size, kind) in enumerate(KINDS)]


KINDS = [((64, 64), "png"), ((50, 70), "jpeg"), ((33, 32), "webp"), ((120, 60), "png"), ((48, 48), "gif"), ((40, 90), "tiff")]


def saved(image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
