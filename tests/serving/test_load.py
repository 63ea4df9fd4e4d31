"""Many concurrent mixed requests, some faulty: none lost, none wrong, constant memory; and a drain that loses nothing."""

import contextlib
import io
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ov3fast.inference import caption, encode, reconstruct_image
from ov3fast.inference.similarity import similarity

from .conftest import KINDS, Client, form
from .test_faults import READABLE, UNREADABLE, head

TEXTS = ["a red square", "red", "a"]


class Load:
    """Requests with their expected responses, computed with the library."""

    def __init__(self, model, photos, folder) -> None:
        self.images = [*photos, *READABLE.items()]
        for name, data in self.images:
            (folder / name).write_bytes(data)
        files = [folder / name for name, _ in self.images]
        found = {size: encode(model, files, image_size=size) for size in (32, 64)}
        self.pooled = {size: one.pooled.numpy() for size, one in found.items()}
        self.tokens = {size: one.tokens.numpy() for size, one in found.items()}
        self.captions = [one.caption for one in caption(model, files, beams=2)]
        self.psnr = [reconstruct_image(model, file).psnr for file in files]
        self.scores = similarity(model, files, TEXTS).tolist()

    def one(self, client: Client, number: int) -> str:
        """Sends request `number`, checks its response, and returns its kind."""
        pick = random.Random(number)
        kinds = ["encode", "several", "tokens", "caption", "reconstruct", "similarity", "broken", "leaves", "lies", "slow"]
        kind = pick.choices(kinds, [30, 10, 15, 8, 10, 10, 8, 4, 3, 2])[0]
        i, size = pick.randrange(len(self.images)), pick.choice([32, 32, 64])
        getattr(self, f"_{kind}")(client, i, size, pick)
        return kind

    def _answer(self, client, path, images, texts=(), **headers):
        """Retries requests rejected because the queue is full; a request is lost only if it never gets a response."""
        for _ in range(200):
            answer = client.form(path, images, texts, **headers)
            if answer.status not in (429, 503):
                return answer
            assert int(answer.headers["retry-after"]) >= 1
            time.sleep(0.05)
        raise AssertionError("never taken")

    def _encode(self, client, i, size, pick):
        answer = self._answer(client, f"/encode?size={size}", [self.images[i]]).json()
        assert np.array_equal(np.float32(answer["images"][0]["pooled"]), self.pooled[size][i])

    def _several(self, client, i, size, pick):
        chosen = [pick.randrange(len(self.images)) for _ in range(pick.randrange(2, 9))]
        answer = self._answer(client, f"/encode?size={size}", [self.images[j] for j in chosen], Accept="application/x-npy")
        assert np.array_equal(np.load(io.BytesIO(answer.body)), self.pooled[size][chosen])

    def _tokens(self, client, i, size, pick):
        path = f"/encode?size={size}&output=tokens"
        answer = self._answer(client, path, [self.images[i]], Accept="application/x-npy")
        assert np.array_equal(np.load(io.BytesIO(answer.body))[0], self.tokens[size][i])

    def _caption(self, client, i, size, pick):
        assert self._answer(client, "/caption?beams=2", [self.images[i]]).json()["images"][0]["caption"] == self.captions[i]

    def _reconstruct(self, client, i, size, pick):
        assert self._answer(client, "/reconstruct", [self.images[i]]).json()["images"][0]["psnr"] == self.psnr[i]

    def _similarity(self, client, i, size, pick):
        found = self._answer(client, "/similarity", [self.images[i]], TEXTS).json()["images"][0]
        assert np.array_equal(np.float32(found["scores"]), np.float32(self.scores[i]))

    def _broken(self, client, i, size, pick):
        name = pick.choice([name for name in UNREADABLE if name not in ("heavy.bmp", "wide.png")])
        data, status, code = UNREADABLE[name]
        if code == "too_many_frames":  # of the limits of test_faults.py
            status, code = 200, None
        answer = self._answer(client, "/encode", [(name, data)])
        assert answer.status == status and (code is None or answer.code == code), (name, answer)

    def _leaves(self, client, i, size, pick):
        body, headers = form([self.images[i]])
        with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
            connection.sendall(head(len(body), headers["Content-Type"]) + body[: pick.choice([5, len(body) // 2, len(body)])])

    def _lies(self, client, i, size, pick):
        data = self.images[i % len(KINDS)][1]  # of one frame: half an animation holds its first
        with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head(len(data) // 2) + data)
                assert connection.recv(1 << 12).startswith(b"HTTP/1.1 4")

    def _slow(self, client, i, size, pick):
        data = self.images[i][1]
        with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
            connection.sendall(head(len(data)))
            for start in range(0, len(data), len(data) // 4 + 1):
                time.sleep(0.03)
                connection.sendall(data[start : start + len(data) // 4 + 1])
            answer = connection.recv(1 << 12)
            assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 429", b"HTTP/1.1 503")), answer


def run(load: Load, client: Client, numbers, at_once: int) -> Counter:
    with ThreadPoolExecutor(at_once) as pool:
        return Counter(pool.map(lambda number: load.one(client, number), numbers))


@pytest.fixture(scope="module")
def load(model, photos, tmp_path_factory) -> Load:
    return Load(model, photos, tmp_path_factory.mktemp("load"))


def test_mixed_requests_with_faults(load, server):
    kinds = run(load, server, range(120), at_once=12)
    assert kinds.total() == 120 and len(kinds) >= 9
    assert server.service.batcher.waiting == 0 and server("/health").status == 200


@contextlib.contextmanager
def command(model, vae_folder, folder, *options: str):
    """`ov3fast serve` in a separate process: (client, process) once it is ready."""
    if not (folder / "model").exists():
        model.save_pretrained(folder / "model")
    arguments = ["serve", str(folder / "model"), "--vae", str(vae_folder), "--port", "0", "--threads", "1", *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "ov3fast", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert "http://127.0.0.1:" in line, process.stderr.read()
        client = Client(int(re.search(r":(\d+)$", line.strip()).group(1)))
        end = time.monotonic() + 120
        while client("/ready").status != 200 and time.monotonic() < end:
            time.sleep(0.05)
        yield client, process
    finally:
        process.kill()
        process.communicate()


def resident(process) -> int:
    """Resident memory of a process in bytes."""
    with open(f"/proc/{process.pid}/status") as file:
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1))


@pytest.mark.full
def test_two_thousand_requests(load, model, vae_folder, tmp_path):
    with command(model, vae_folder, tmp_path, "--max-queue", "64") as (client, process):
        kinds = run(load, client, range(500), at_once=24)
        begun = resident(process)
        kinds += run(load, client, range(500, 2000), at_once=24)
        grown = resident(process) - begun
        assert kinds.total() == 2000 and len(kinds) == 10
        assert grown < 0.05 * begun, f"{begun >> 20} MiB after 500 requests, {grown >> 20} MiB more after 2000"
        figures = client("/metrics").body.decode()
        assert re.search(r"^ov3fast_received_bytes 0.0$", figures, re.M) and re.search(
            r"^ov3fast_queue_length 0.0$", figures, re.M
        )
        assert 'status="500"' not in figures
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""


@pytest.mark.full
def test_sigterm_answers_what_is_in_work(load, model, vae_folder, tmp_path, photos):
    # A busy machine takes longer to drain than the default.
    options = ("--max-batch", "2", "--max-queue", "2000", "--drain-seconds", "300")
    with command(model, vae_folder, tmp_path, *options) as (client, process):
        many = [load.images[i % len(load.images)] for i in range(60)]
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(client.form("/encode", many))) for _ in range(6)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 20  # until all of them are in the queue, or done
        while time.monotonic() < end and "ov3fast_received_bytes 0.0" in client("/metrics").body.decode() and not answers:
            time.sleep(0.005)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(300)
        assert process.wait(60) == 0 and process.stderr.read() == ""
        assert [answer.status for answer in answers] == [200] * 6
        expected = np.stack([load.pooled[32][i % len(load.images)] for i in range(60)])
        assert all(np.array_equal(np.float32([i["pooled"] for i in answer.json()["images"]]), expected) for answer in answers)
        with pytest.raises(OSError):
            client("/health")


def test_errors_of_the_command(model, vae_folder, tmp_path, monkeypatch, capsys):
    from ov3fast import cli

    model.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n \n")
    start = ["serve", str(tmp_path / "model"), "--vae", str(vae_folder)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, words in (
            (["--port", port], f"can't listen on 127.0.0.1:{port}"),
            (["--port", "70000"], "port must be in 0..65535"),
            (["--texts", str(tmp_path / "texts.txt")], "has no text in it"),
            (["--max-batch", "0"], "max_batch must be at least 1"),
            (["--max-queue", "-1"], "max_queue must be positive"),
            (["--threads", "0"], "threads must be at least 1"),
        ):
            assert cli.main([*start, *options]) == 2
            assert words in capsys.readouterr().err
    monkeypatch.setenv("OV3FAST_API_KEY", " ")
    assert cli.main([*start, "--port", "0"]) == 2 and "OV3FAST_API_KEY is set but empty" in capsys.readouterr().err
