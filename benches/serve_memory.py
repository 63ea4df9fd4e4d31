"""The memory of `ov3fast serve` over many requests, benches/results/serve-memory.csv.

    python -m benches.serve_memory [--requests 100000]

A tiny model with random weights answers, so that what counts is what a request leaves behind: 16 connections ask again as soon as they are answered, for pooled vectors, tokens,
captions, reconstructions and similarities of ever new texts, and one request in 20 must be refused. A row is written after each twentieth of the requests, so a run that is stopped leaves
those it got to. Exits with 1 if the process grew by more than 5 % after the first tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benches.serve import CONNECTIONS, Connection, pictures, until_ready
from benches.timing import machine
from ov3fast.io import atomic_write
from ov3fast.models.config import CaptionConfig, DecoderConfig, OpenVision3Config, TextConfig, VisionConfig
from ov3fast.models.openvision3 import OpenVision3
from ov3fast.models.tokenizer import get_tokenizer
from ov3fast.models.vae import FLUX_VAE, FrozenVAE

RESULTS = Path(__file__).parent / "results" / "serve-memory.csv"
FIELDS = ("requests", "refused", "seconds", "resident_mb", "grown_percent", "threads", "cpu", "torch", "commit")
SIDE, POINTS, GROWTH = 32, 20, 5.0


def tiny_model(folder: Path) -> None:
    vae = {**FLUX_VAE, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": SIDE}
    torch.manual_seed(0)
    made = FrozenVAE.from_config(vae)
    made.vae.save_pretrained(folder / "vae")
    tokenizer = get_tokenizer("wordpiece").restrict(["a red square"])
    config = OpenVision3Config(
        vision=VisionConfig(width=32, depth=1, heads=2, mlp_dim=48, image_size=SIDE, embed_dim=24),
        decoder=DecoderConfig(width=32, depth=1, heads=2, mlp_dim=48),
        text=TextConfig(width=32, depth=1, heads=2, mlp_dim=48, context_length=10),
        caption=CaptionConfig(width=24, depth=1, heads=2, mlp_dim=48, length=4),
        vae=str(folder / "vae"),
    ).for_tokenizer(tokenizer)
    OpenVision3(config, vae=made, tokenizer=tokenizer).save_pretrained(folder / "model")


def message(number: int, data: bytes, port: int) -> bytes:
    """Request `number`: three in four ask for vectors, the rest for everything else, and one in 20 is broken."""
    kind = number % 20
    if kind == 19:
        data = b"no picture"
    path = "/encode?output=tokens" if kind < 5 else "/encode?encoding=base64"
    path = {15: "/caption?beams=2", 16: "/reconstruct", 17: "/similarity", 18: "/similarity"}.get(kind, path)
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n' + data + b"\r\n"
    if path == "/similarity":
        body += b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\na red square, number %d\r\n' % number
    body += b"--x--\r\n"
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(port: int, images: list[bytes], numbers: range) -> int:
    """Makes the requests; how many were refused. A broken image must get 4xx, everything else 200."""
    waiting = iter(numbers)
    refused = 0

    async def one(connection: Connection) -> None:
        nonlocal refused
        for number in waiting:
            request = message(number, images[number % len(images)], port)
            try:
                status = await connection.ask(request)
            except (asyncio.IncompleteReadError, ConnectionError):  # closed while it was idle, as a server may
                status = await (await connection.open(port)).ask(request)
            broken = number % 20 == 19
            assert 400 <= status < 500 if broken else status == 200, (number, status)
            refused += broken

    connections = [await Connection().open(port) for _ in range(CONNECTIONS)]
    await asyncio.gather(*map(one, connections))
    for connection in connections:
        connection.writer.close()
    return refused


def resident(pid: int) -> float:
    """MB of a process in memory."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def write(rows: list[dict[str, object]]) -> None:
    with atomic_write(RESULTS) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    facts, rows, refused = machine(), [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(folder)
        (folder / "images").mkdir()
        images = [file.read_bytes() for file in pictures(folder / "images", 64, SIDE)]
        command = [
            sys.executable,
            "-m",
            "ov3fast",
            "serve",
            str(folder / "model"),
            "--port",
            "0",
            "--threads",
            str(given.threads),
        ]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            asyncio.run(until_ready(port))
            step, began = given.requests // POINTS, time.perf_counter()
            for start in range(0, step * POINTS, step):
                refused += asyncio.run(ask(port, images, range(start, start + step)))
                now = resident(server.pid)
                base = rows[1]["resident_mb"] if len(rows) > 1 else now
                rows.append({
                    "requests": start + step, "refused": refused, "seconds": round(time.perf_counter() - began), "resident_mb": round(now, 1),
                    "grown_percent": round(100 * (now / base - 1), 2), "threads": given.threads,
                    **{key: facts[key] for key in ("cpu", "torch", "commit")},
                })  # fmt: skip
                print(*(f"{key} {rows[-1][key]}" for key in FIELDS[:5]), sep=", ", flush=True)
                write(rows)
        finally:
            server.terminate()
            server.wait()
    return int(rows[-1]["grown_percent"] > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
