"""Throughput of a model, of `ov3fast encode` over files, and of `ov3fast serve` at saturation, and the server's latency at 70 % load.

    python -m benches.serve runs/demo [--out benches/results/serve.csv] [--images 4]

Client and server share the machine, so the client does as little as possible: requests are prepared once, and only the status of responses is read. Saturation:
16 closed-loop connections. Load: open-loop Poisson arrivals (fixed seed) at 70 % of the saturated rate.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import io
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benches.timing import machine
from ov3fast.inference import encode, load_model
from ov3fast.inference.batches import batch_invariant

FIELDS = (
    "model", "image_size", "threads", "images_per_request", "model_images_s", "encode_images_s", "encode_share", "server_images_s",
    "server_share", "load", "p50_ms", "p99_ms", "p99_over_p50", "requests", "cpu", "torch", "commit",
)  # fmt: skip
CONNECTIONS = 16
LOAD = 0.7
IDLE = 2.0
"""Seconds after which a connection without a request isn't used again."""


def pictures(folder: Path, count: int, side: int) -> list[Path]:
    """JPEG files of smooth noise, slightly larger than the model's input."""
    random_ = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(random_.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((side + side // 4, side + side // 8), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.jpg", quality=90)
    return sorted(folder.iterdir())


def rates(model, files: list[Path], seconds: float) -> tuple[float, float]:
    """Images/s of the model alone, in batches of 32, and of encode over the files: medians of short rounds of both in turn, so that the machine's drift
    reaches both alike."""
    size = model.encoder.config.image_size
    batch = torch.rand(32, 3, size, size) * 2 - 1

    def alone(count: int) -> None:
        with torch.inference_mode(), batch_invariant(model):
            for _ in range(count // len(batch)):
                model.encode(batch)

    def through(count: int) -> None:
        encode(model, files[:count], tokens=False)

    alone(64)
    began = time.perf_counter()
    alone(64)
    # As many files as take two seconds, in full batches.
    count = max(1, min(len(files), int(2 * 64 / (time.perf_counter() - began))) // 32) * 32
    took: dict[Callable[[int], None], list[float]] = {alone: [], through: []}
    began, number = time.perf_counter(), 0
    while time.perf_counter() - began < seconds or number < 4:
        for run in (alone, through) if number % 2 else (through, alone):
            start = time.perf_counter()
            run(count)
            took[run].append(time.perf_counter() - start)
        number += 1
    return count / statistics.median(took[alone]), count / statistics.median(took[through])


def request(files: list[Path], port: int) -> bytes:
    body = io.BytesIO()
    for file in files:
        body.write(f'--x\r\nContent-Disposition: form-data; name="image"; filename="{file.name}"\r\n\r\n'.encode())
        body.write(file.read_bytes() + b"\r\n")
    body.write(b"--x--\r\n")
    head = (
        f"POST /encode?encoding=base64 HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        f"Content-Length: {body.tell()}\r\n\r\n"
    )
    return head.encode() + body.getvalue()


class Connection:
    """A persistent connection; `ask` returns the status of a response."""

    async def open(self, port: int) -> Connection:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def ask(self, message: bytes) -> int:
        self.writer.write(message)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head).group(1))
        await self.reader.readexactly(length)
        return int(head.split(b" ", 2)[1])


async def saturated(port: int, messages: list[bytes], seconds: float) -> float:
    """Requests per second."""
    connections = [await Connection().open(port) for _ in range(CONNECTIONS)]
    end = time.perf_counter() + seconds
    done = 0

    async def ask_again(connection: Connection, number: int) -> None:
        nonlocal done
        while time.perf_counter() < end:
            assert await connection.ask(messages[number % len(messages)]) == 200
            number += CONNECTIONS
            done += time.perf_counter() < end

    await asyncio.gather(*(ask_again(one, i) for i, one in enumerate(connections)))
    return done / seconds


async def under_load(port: int, messages: list[bytes], rate: float, seconds: float) -> list[float]:
    """Seconds from each request's scheduled arrival to its response."""
    times, tasks, free = random.Random(0), [], []
    took: list[float] = []

    async def one(message: bytes, due: float) -> None:
        while free and time.perf_counter() - free[0][1] > IDLE:  # the server may close them
            free.pop(0)
        connection = free.pop()[0] if free else await Connection().open(port)
        assert await connection.ask(message) == 200
        took.append(time.perf_counter() - due)
        free.append((connection, time.perf_counter()))

    due = time.perf_counter()
    end, number = due + seconds, 0
    while due < end:
        await asyncio.sleep(max(0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(one(messages[number % len(messages)], due)))
        due += times.expovariate(rate)
        number += 1
    await asyncio.gather(*tasks)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", help="name of the model in the table; default: its path")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--images", type=int, default=4, help="images per request")
    parser.add_argument("--files", type=int, default=1024)
    parser.add_argument(
        "--seconds", type=float, default=15, help="length of each of the three measurements: rates, saturation, load"
    )
    options = parser.parse_args()
    threads = torch.get_num_threads()
    model = load_model(options.model)
    side = model.encoder.config.image_size
    with tempfile.TemporaryDirectory() as folder:
        files = pictures(Path(folder), options.files, side)
        own, through = rates(model, files, options.seconds)
        print(f"model {own:.1f}, encode {through:.1f} images/s ({through / own:.3f})", flush=True)
        command = [sys.executable, "-m", "ov3fast", "serve", options.model, "--port", "0", "--threads", str(threads)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            messages = [request(files[i : i + options.images], port) for i in range(0, min(len(files), 256), options.images)]
            del model
            rate, took = asyncio.run(measure(port, messages, options.seconds))
        finally:
            server.terminate()
            server.wait()
    p50, p99 = statistics.median(took), np.quantile(took, 0.99)
    images = rate * options.images
    print(
        f"server {images:.1f} images/s ({images / through:.3f} of encode); at {LOAD:.0%}: p50 {1e3 * p50:.1f} ms, p99 {1e3 * p99:.1f} ms"
        f" ({p99 / p50:.2f}), {len(took)} requests"
    )
    if options.out:
        facts = machine()
        row = (
            options.name or options.model, side, threads, options.images, f"{own:.1f}", f"{through:.1f}", f"{through / own:.3f}",
            f"{images:.1f}", f"{images / through:.3f}", LOAD, f"{1e3 * p50:.1f}", f"{1e3 * p99:.1f}", f"{p99 / p50:.2f}", len(took),
            facts["cpu"], facts["torch"], facts["commit"],
        )  # fmt: skip
        former = list(csv.reader(options.out.open()))[1:] if options.out.exists() else []
        with options.out.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([FIELDS, *(one for one in former if one[0] != row[0]), row])


async def until_ready(port: int) -> None:
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        if (await reader.read()).startswith(b"HTTP/1.1 200"):
            return
        await asyncio.sleep(0.2)


async def measure(port: int, messages: list[bytes], seconds: float) -> tuple[float, list[float]]:
    """(saturated requests per second, latencies at LOAD times that rate)."""
    await until_ready(port)
    await saturated(port, messages, seconds / 5)
    rate = await saturated(port, messages, seconds)
    return rate, await under_load(port, messages, LOAD * rate, seconds)


if __name__ == "__main__":
    main()
